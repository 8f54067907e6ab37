"""A part of a batch job: its pairs are explained, and written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_fam._files import StoreError, irregular, located, printable, recorded_warnings, within
from captum_fam.batch._work import NAMES, QUERY, REFERENCE, SIDES, Explaining, Failure, Key, Work, in_turn
from captum_fam.encoders import find_layer, one_line
from captum_fam.encoders._ready import ready_encoder, running
from captum_fam.images import read_image
from captum_fam.methods.by_name import make_method, method_named
from captum_fam.methods.on_layer import OnLayer

# Readers of the folder as one table ignore names that begin with _.
JOB, PAIRS, LOCK, PARTIAL = "_batch.json", "_pairs.arrow", "_lock", "_tmp-"
EMBEDDINGS = "_references.npy"
ROW = "row"  # of the pairs' copy: where a reference's embedding is
BAD = "bad"  # of the pairs' copy: what is wrong with a row of the list


def part_file(output: Path, part: int) -> Path:
    return output / f"part-{part:06}.parquet"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """
    A temporary file that gets its name when its content is complete.

    Raises:
        ValueError: the file cannot be written, for example on a full disk.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{uuid4().hex}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({one_line(error)}): make room, or pass another folder with -o; what is written stays"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


_MAP = {"map": pa.list_(pa.float16()), "shape": pa.list_(pa.int32()), "scale": pa.float32()}
_REFERENCE_MAP = {f"reference_{name}": kind for name, kind in _MAP.items()}
_COLUMNS = (_MAP, _REFERENCE_MAP)  # of the sides
_OPEN = b"0" * 64  # in place of a seal
_PATIENCE = 32  # how many images in a row a store may refuse to a worker that has got none yet
Warned: TypeAlias = list[tuple[str, str]]  # texts, and the files that they are about, or ""


def _seal(job: str, part: int, content: bytes) -> bytes:
    return hashlib.sha256(f"{job} {part} ".encode() + content).hexdigest().encode()


def write_part(
    file: Path, table: pa.Table, layer: str, job: str, part: int, opposite: tuple[int, int] = (0, 0)
) -> None:
    """
    Writes the file of a part, with a seal on its content and its place. The seal is in the file's metadata, which
    readers of Parquet ignore. ``opposite`` is how many maps of each side add up to the other sign than their margins.
    """
    about = {"layer": layer, "opposite": json.dumps(opposite), "seal": _OPEN}
    pq.write_table(table.replace_schema_metadata(about), file, compression="zstd")
    head, _, tail = file.read_bytes().rpartition(_OPEN)
    with file.open("rb+") as stream:
        stream.seek(len(head))
        stream.write(_seal(job, part, head + tail))


def finished(output: Path, part: int, job: str) -> str | None:
    """
    The layer of a part whose file exists, else None. The whole file is read.

    Raises:
        ValueError: the file is not as this job wrote it.
    """
    file = part_file(output, part)
    if not os.path.lexists(file):
        return None
    try:
        if other := irregular(file):
            raise ValueError(f"it is {other}")
        content = file.read_bytes()
        about = pq.read_metadata(pa.BufferReader(content)).metadata
        head, _, tail = content.rpartition(about[b"seal"])
        if about[b"seal"] != _seal(job, part, head + tail):
            raise ValueError(f"it is no part {part} of this job, or damaged")
    except Exception as error:  # a broken file makes Arrow raise many kinds
        raise ValueError(
            f"{file} is not as this job wrote it ({one_line(error)}): delete it, and start again"
        ) from error
    return str(about[b"layer"], "utf-8")


def layers_of(output: Path, parts: Iterable[int], job: str) -> dict[int, str]:
    """
    The layer of each part whose file exists; all are the same.

    Raises:
        ValueError: a file in the folder is not as this job wrote it.
    """
    own = {part_file(output, part) for part in parts}
    for file in sorted(output.glob("*.parquet")):
        if file not in own and not file.name.startswith(("_", ".")):
            raise ValueError(f"{file} is no part of this job, but would be read with it: delete or move it")
    layers = {part: layer for part in parts if (layer := finished(output, part, job)) is not None}
    for (part, layer), (other, layer_of_other) in pairwise(layers.items()):
        if layer != layer_of_other:
            raise ValueError(
                f"{part_file(output, part)} is of layer {layer}, but {part_file(output, other)} of {layer_of_other}:"
                " delete one of them"
            )
    return layers


class PartExplainer:
    """
    Explains parts of a job, by number. It loads the encoder for the first part. Engines only make it, in each worker,
    and give it parts.
    """

    def __init__(
        self,
        output: Path,
        job: str,
        encoder: str,
        layer: str | None,
        method: str | type,
        similarity: str,
        contrast: str | None,
        threshold: float | None,
        sides: str,
        references: Path | None,
        root: str,
        batch_size: int,
        threads: int,
        **loading: Any,
    ) -> None:
        """``references`` is a file of embeddings, whose rows the pairs name."""
        self.output, self.job, self.encoder, self.layer, self.method = output, job, encoder, layer, method
        self.similarity, self.contrast, self.threshold, self.sides = similarity, contrast, threshold, sides
        self.references, self.root, self.batch_size = references, located(root), batch_size
        self.threads, self.loading = threads, loading
        self._refused = 0.0  # images, by stores that have given none yet

    def __call__(self, part: int) -> tuple[int, Warned]:
        """Writes the file of a part, if there is none. Returns the number of its pairs, and the warnings about them."""
        with pa.memory_map(str(self.output / PAIRS)) as source:
            pairs = pa.table(pa.ipc.open_file(source).get_batch(part))
        if finished(self.output, part, self.job) is not None:  # made by a worker that outlived its run
            return len(pairs), []
        with recorded_warnings() as warned:
            columns, opposite = self._explain(pairs)
            layer = self._explaining.layer
        pairs = pairs.drop_columns([name for name in (ROW, BAD) if name in pairs.column_names])
        for name, column in columns.items():
            pairs = pairs.append_column(name, column)
        with whole(part_file(self.output, part)) as partial:
            write_part(partial, pairs, layer, self.job, part, opposite)
        return len(pairs), list(warned)

    def load(self) -> None:
        """Loads the encoder, if it is not loaded yet."""
        self._explaining  # noqa: B018  # which is kept

    def embeddings(self, paths: Sequence[str]) -> dict[Key, Tensor]:
        """Embeddings (D,) of images, by path, without images that cannot be read."""
        work = Work(self._explaining, (paths, paths), {})
        in_turn(tqdm(work.embedding(QUERY), "embeddings", unit="batch", disable=None), self._image, self.threads)
        return work.embeddings[QUERY]

    @cached_property
    def _explaining(self) -> Explaining:
        torch.set_num_threads(self.threads)
        kind = method_named(self.method, "explain_pairs")
        with self._running():
            encoder = ready_encoder(self.encoder, **self.loading)
            # Noise has something of everything. With images of the job, each worker could find another layer.
            noise = np.random.default_rng(0).integers(0, 256, (encoder.size, encoder.size, 3), np.uint8)
            image = encoder.batch([encoder.tensor(Image.fromarray(noise))])
            named = find_layer(encoder.model, self.layer, image) if self.layer else None
            D = encoder.embed(image).shape[1]
            name, layer = named or _layer_of(kind, encoder.model, image)
            method = make_method(kind, "explain_pairs", encoder.model, layer, similarity=self.similarity)
            less = method._less(self.contrast, self.threshold, 1, 1)
        if self.references is not None and self._stored.shape[1] != D:
            raise ValueError(
                f"the embeddings of the references have {self._stored.shape[1]} dimensions, but those of {self.encoder}"
                f" {D}: pass what this encoder gave as --reference-embeddings"
            )
        return Explaining(encoder, name, method, less, self.batch_size, self._running)

    @cached_property
    def _stored(self) -> Any:
        return np.load(self.references, mmap_mode="r")  # type: ignore[arg-type]  # there is one

    @contextmanager
    def _running(self) -> Iterator[None]:
        advice = "--size, a smaller --batch-size, or another --layer"
        advice += ", or leave out --precision" if self.loading["precision"] else ""
        with running(self.encoder, self.loading["size"], advice):
            yield

    def _explain(self, pairs: pa.Table) -> tuple[dict[str, pa.Array], tuple[int, int]]:
        """The columns of the results, and how many maps of each side have another sign than their margins."""
        queries, references = (pairs[name].to_pylist() for name in NAMES)
        bad = pairs[BAD].to_pylist() if BAD in pairs.column_names else [None] * len(pairs)
        keys, stored = references, {}
        if self.references is not None:
            keys = pairs[ROW].to_pylist()
        keys = [None if why else key for key, why in zip(keys, bad)]
        if self.references is not None:
            stored = self._rows(sorted({row for row in keys if row is not None}))
        work = Work(self._explaining, (queries, keys), stored)
        in_turn(work.steps(SIDES[self.sides], self.references is not None), self._image, self.threads)
        failures = [
            (Failure("bad row", why) if why else _unnamed(query, reference, key)) or work.failure(n)
            for n, (why, query, reference, key) in enumerate(zip(bad, queries, references, keys))
        ]
        numbers = [None if failure else n for n, failure in enumerate(failures)]
        columns = {"score": pa.array([None if n is None else work.scores[n] for n in numbers], pa.float64())}
        for side in SIDES[self.sides]:
            maps = [(None, None) if n is None else work.maps[side][n] for n in numbers]
            found = (
                [None if values is None else values.ravel() for values, _ in maps],
                [None if values is None else list(values.shape) for values, _ in maps],
                [scale for _, scale in maps],
            )
            columns |= {name: pa.array(c, kind) for (name, kind), c in zip(_COLUMNS[side].items(), found)}
        for name, n in (("failure", 0), ("error", 1)):
            columns[name] = pa.array([failure and failure[n] for failure in failures], pa.string())
        opposite = tuple(len(found.intersection(numbers)) for found in work.opposite)
        return columns, (opposite[QUERY], opposite[REFERENCE])

    def _rows(self, rows: list[int]) -> dict[Key, Tensor]:
        encoder = self._explaining.encoder
        wide = np.float64 if self._stored.dtype.itemsize == 8 else np.float32  # in this machine's order of bytes
        return dict(zip(rows, torch.from_numpy(self._stored[rows].astype(wide)).to(encoder.device)))

    def _image(self, path: str) -> Tensor | Failure:
        """The tensor of an image, or why there is none."""
        place = within(self.root, path)
        try:
            found: Tensor | Failure = self._explaining.encoder.tensor(read_image(place))
        except StoreError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            self._refused += 1
            if self._refused >= _PATIENCE:
                raise ValueError(
                    f"no store gave any of {_PATIENCE} images: start again when the stores work, which goes on with the"
                    f" job, or take these images out of the list; the last error: {error}"
                ) from error
            return Failure("cannot be read", printable(error))
        except Exception as error:  # whatever a broken file makes Pillow raise: it costs its own rows only
            kind = "no such file" if isinstance(error.__cause__, FileNotFoundError) else "cannot be read"
            found = Failure(kind, printable(str(error) if isinstance(error, ValueError) else one_line(error)))
        if isinstance(place, str):
            self._refused = -inf
        return found


def _layer_of(kind: type[Any], model: nn.Module, image: Tensor) -> tuple[str, nn.Module | None]:
    """The name and module of the layer that a method takes if none is named."""
    if not issubclass(kind, OnLayer):
        return "", None
    if not kind._finds_layer:
        return find_layer(model, None, image)
    name = kind(model, None).layer_of(image)
    return name, model.get_submodule(name)


def _unnamed(query: str | None, reference: str | None, key: Key | None) -> Failure | None:
    """The failure of a row that lacks a path or an embedding."""
    for name, path in zip(NAMES, (query, reference)):
        if path is None:
            return Failure("no path", f"there is no path in the column {name!r}")
    return Failure("no embedding", f"there is no embedding of the reference {reference!r}") if key is None else None
