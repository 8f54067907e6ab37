"""References that are known only by their embeddings, the rows of a file of the user."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captum_fam.batch._pairs import Numbers, plain_text, reading
from captum_fam.encoders import one_line
from captum_fam.encoders._loading import optional

_INDEXES = (".index", ".faiss")
FILES = (".npy", ".parquet", *_INDEXES)


def check_references(file: Path) -> None:
    """
    Checks a file of embeddings by its name.

    Raises:
        ValueError: it is neither an array (N, D) nor a table of ids and embeddings nor an index of faiss.
    """
    if file.suffix.lower() not in FILES:
        raise ValueError(
            f"cannot read {file} as embeddings: pass an array (N, D) that ends in .npy, a table with the columns id and"
            " embedding that ends in .parquet, or an index of faiss that ends in .index or .faiss"
        )
    if file.suffix.lower() == ".npy":
        _array(file)


def numbered(file: Path, copy: Path | None) -> Numbers:
    """
    A function that finds the rows of references, None for those that have none. Embeddings of a
    table or an index are copied as an array.

    Raises:
        ValueError: the file is not as described.
    """
    ids = None if copy is None else (_copied if file.suffix.lower() == ".parquet" else _copied_index)(file, copy)
    if ids is None:
        count = len(_array(file if copy is None else copy))

        def rows(references: pa.Array) -> pa.Array:
            """References are the numbers of rows themselves."""
            found = [_number(reference, count) for reference in references.to_pylist()]
            return pa.array(found, pa.int64())

        return rows
    return lambda references: pc.index_in(references, value_set=ids, skip_nulls=True).cast(pa.int64())


def _number(reference: str | None, count: int) -> int | None:
    """The number of one of ``count`` rows. Text with more digits than their number is not read as a number."""
    if reference is None or not reference.isdecimal() or len(reference) > len(str(count)):
        return None
    return number if (number := int(reference)) < count else None


def _array(file: Path) -> Any:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken file makes NumPy raise many kinds
        raise ValueError(f"cannot read {file} as embeddings ({one_line(error)}): pass one of numpy.save") from error
    if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize > 8 or not array.size:
        raise ValueError(
            f"expected {file} to hold embeddings (N, D) of floats, but it holds {array.dtype} of shape {array.shape}"
        )
    return array


def _copied(file: Path, copy: Path) -> pa.Array:
    """Returns the ids as text, and writes the embeddings as an array."""
    with reading(file):
        table = pq.ParquetFile(file)
    names = table.schema_arrow.names
    if names.count("id") != 1 or names.count("embedding") != 1:
        raise ValueError(
            f"{file} must have one column 'id' and one 'embedding', but its columns are {', '.join(names)}"
        )
    ids, D = [], None
    with copy.open("wb") as stream:
        for keys, values in _batches(file, table):
            if D is None:
                D = values.shape[1]
                header = {"descr": values.dtype.str, "fortran_order": False, "shape": (table.metadata.num_rows, D)}
                np.lib.format.write_array_header_1_0(stream, header)
            if values.shape[1] != D:
                raise ValueError(f"{file} holds embeddings of {D} dimensions and of {values.shape[1]}: pass one kind")
            stream.write(values.tobytes())
            ids.append(keys)
    if D is None:
        raise ValueError(f"{file} lists no embeddings: it has columns, but no rows")
    return _each_once(file, pa.chunked_array(ids))


def _each_once(file: Path, ids: pa.ChunkedArray) -> pa.Array:
    counts = pc.value_counts(ids.drop_null())
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise ValueError(f"{file} has more than one row of id {twice[0]['values'].as_py()!r}: keep one of them")
    return ids.combine_chunks()


def _copied_index(file: Path, copy: Path) -> pa.Array | None:
    """Returns the ids as text, None if they are the rows' numbers, and writes the vectors as an array."""
    faiss = optional("faiss", "retrieval")
    try:
        owner = index = faiss.read_index(str(file))  # what it holds ends with it
    except RuntimeError as error:
        raise ValueError(f"cannot read {file} as an index of faiss: pass one that faiss.write_index wrote") from error
    ids = None
    if hasattr(index, "id_map"):
        ids = pa.chunked_array([pa.array(faiss.vector_to_array(index.id_map)).cast(pa.string())])
        index = faiss.downcast_index(index.index)
    kind = type(index).__name__
    index = faiss.downcast_index(getattr(index, "storage", index))  # of HNSW, the storage has the vectors
    if not isinstance(index, faiss.IndexFlat):
        raise ValueError(
            f"{file} holds an {kind}, which does not keep its vectors one by one as they were: pass the embeddings"
            " themselves as .npy or .parquet, or an IndexFlatIP, IndexFlatL2 or IndexHNSWFlat"
        )
    if not owner.ntotal:
        raise ValueError(f"{file} holds no embeddings: call index.add(embeddings) before faiss.write_index")
    with copy.open("wb") as stream:
        np.save(stream, index.reconstruct_n(0, owner.ntotal))
    return None if ids is None else _each_once(file, ids)


def _batches(file: Path, table: pq.ParquetFile) -> Iterator[tuple[pa.Array, Any]]:
    """Yields ids, without those whose embedding is missing, and embeddings (n, D)."""
    with reading(file):
        batches = table.iter_batches(columns=["id", "embedding"])
    while True:
        with reading(file):
            batch = next(batches, None)
        if batch is None:
            return
        if not len(batch):
            continue
        ids, lists = plain_text(batch["id"]), batch["embedding"]
        if not (pa.types.is_string(ids.type) or pa.types.is_integer(ids.type)):
            raise ValueError(f"the column 'id' of {file} must hold text or integers, but holds {ids.type}")
        kind = lists.type
        value = getattr(kind, "value_type", None)
        if value is None or pa.types.is_dictionary(kind) or not pa.types.is_floating(value):
            raise ValueError(f"the column 'embedding' of {file} must hold lists of floats, but holds {kind}")
        with reading(file):
            there = lists.is_valid()
            lengths = pc.list_value_length(lists.drop_null())
        D = lengths[0].as_py() if len(lengths) else 0
        if not D or pc.any(pc.not_equal(lengths, D)).as_py():
            raise ValueError(f"the column 'embedding' of {file} must hold lists of one length, but does not")
        values = np.full((len(batch), D), np.nan, np.float64 if pa.types.is_float64(value) else np.float32)
        values[there.to_numpy(zero_copy_only=False)] = (
            lists.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, D)
        )
        yield pc.if_else(there, ids.cast(pa.string()), None), values
