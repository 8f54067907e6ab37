"""Vectors of the places of many images, as they are stored: written, and read a few images at a time."""

import mmap
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_fam._checks import describe

_HEADER = 128  # bytes, for any number of images, which is known only at the end
_FORMS = "a file that ends in .npy or .parquet, or an array or tensor (G, h, w, C) or (G, N, C) of floats"


def write_array(file: Path, parts: Iterable[Tensor]) -> None:
    """Writes parts of one array as a NumPy file (.npy, version 1.0), whole or not at all."""
    partial = file.with_name(f"{file.name}.part")
    try:
        with partial.open("wb") as stream:
            shape: tuple[int, ...] = (0,)
            stream.write(b"\0" * _HEADER)
            for part in parts:
                array = part.numpy()
                shape = (shape[0] + len(array), *array.shape[1:])
                stream.write(array.data.cast("B"))
            stream.seek(0)
            stream.write(_header(shape, array.dtype))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _header(shape: tuple[int, ...], dtype: Any) -> bytes:
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    start = np.lib.format.magic(1, 0)
    length = _HEADER - len(start) - 2
    return start + struct.pack("<H", length) + f"{text:<{length - 1}}\n".encode("ascii")


def stored_parts(stored: Any, at_once: int, channels: int) -> Iterator[tuple[Sequence[Any], Tensor]]:
    """
    Yields ids and vectors (b, h, w, C) or (b, N, C) of a few images at a time: ``at_once`` values. The ids of an array
    are the numbers of its rows. The lists of a table are vectors of ``channels`` values.
    """
    if not isinstance(stored, (str, os.PathLike)):
        yield from _of_array(stored, at_once)
        return
    path = Path(stored)
    if path.suffix.lower() == ".npy":
        yield from _of_array(np.load(path, mmap_mode="r", allow_pickle=False), at_once)
    elif path.suffix.lower() == ".parquet" or path.is_dir():
        for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
            yield from _of_parquet(file, at_once, channels)
    else:
        raise ValueError(f"Expected `stored` to be {_FORMS}, but got {str(path)!r}.")


def _of_array(stored: Any, at_once: int) -> Iterator[tuple[Sequence[Any], Tensor]]:
    shape, dtype = (getattr(stored, name, None) for name in ("shape", "dtype"))
    real = dtype.is_floating_point if isinstance(dtype, torch.dtype) else getattr(dtype, "kind", "") == "f"
    if shape is None or len(shape) < 3 or not real:
        got = f"{dtype} of shape {tuple(shape)}" if shape is not None else describe(stored)
        raise TypeError(f"Expected `stored` to be {_FORMS}, but got {got}.")
    whole = _shared(stored) if isinstance(stored, np.ndarray) else stored
    for ids in _ranges(len(stored), prod(shape[1:]), at_once):
        part = whole[ids.start : ids.stop]
        yield ids, part if isinstance(part, Tensor) else torch.from_numpy(np.array(part, part.dtype.newbyteorder("=")))
        _give_back(stored)


def _ranges(images: int, size: int, at_once: int) -> list[range]:
    step = max(1, at_once // max(1, size))
    return [range(i, min(i + step, images)) for i in range(0, images, step)]


def _shared(array: Any) -> Any:
    """A tensor that shares the array's memory, read-only or not; the array itself if torch cannot."""
    if min(array.strides) < 0 or not array.dtype.isnative:
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")  # nor is it written to
        return torch.from_numpy(np.asarray(array))


def _give_back(array: Any) -> None:
    """Frees the memory of what was read of a mapped file; it would grow to the file's size."""
    while isinstance(array, np.ndarray):
        if getattr(array, "mode", "r") == "c":  # a copy: what was written to it is not in the file
            return
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)


def _of_parquet(file: Path, at_once: int, channels: int) -> Iterator[tuple[Sequence[Any], Tensor]]:
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'captum-fam[batch]'") from error
    with pq.ParquetFile(file, buffer_size=2**20) as table:  # a row group may be all of it
        names, group = table.schema_arrow.names, table.metadata
        if names.count("id") != 1 or names.count("places") != 1:
            raise ValueError(f"Expected {file} to have one column 'id' and one 'places', but its columns are {names}.")
        size = sum(group.row_group(i).total_byte_size for i in range(group.num_row_groups))
        rows = max(1, at_once * group.num_rows // max(1, size))
        groups = ([number] for number in range(group.num_row_groups))  # all at once, each would stay in memory
        for batch in chain.from_iterable(table.iter_batches(rows, one, columns=["id", "places"]) for one in groups):
            lists = batch["places"]
            shape = getattr(lists.type, "shape", None)  # of Arrow's fixed_shape_tensor
            lists = lists.storage if shape is not None else lists
            value = getattr(lists.type, "value_type", None)
            lengths = [] if value is None else pc.unique(pc.list_value_length(lists)).to_pylist()
            floats = value is not None and pa.types.is_floating(value)
            if not floats or len(lengths) != 1 or not lengths[0] or lengths[0] % channels:
                raise ValueError(
                    f"Expected the column 'places' of {file} to hold lists of floats, {channels} for each place and all"
                    f" of one length, but it holds {lists.type}" + f" of lengths {lengths}." * bool(lengths)
                )
            vectors = torch.from_numpy(lists.flatten().to_numpy(zero_copy_only=False).copy())
            yield batch["id"].to_pylist(), vectors.reshape(len(lists), *(shape or (-1, channels)))
