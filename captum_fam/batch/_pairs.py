"""The pairs of a batch job: read from a list of others, copied in parts."""

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from captum_fam.batch._part import ROW
from captum_fam.encoders import one_line

LISTS = (".parquet", ".csv", ".tsv")


Numbers: TypeAlias = Callable[[pa.ChunkedArray], pa.Array]  # the rows of references in a file of embeddings


def write_pairs(pairs: Path, file: Any, part_size: int, numbers: Numbers | None = None) -> int:
    """The columns of a list of pairs as an Arrow file, whose record batch i is part i; the number of pairs."""
    total = write_tables(_read_pairs(pairs, numbers), file, part_size)
    if not total:
        raise ValueError(f"{pairs} lists no pairs: it has columns, but no rows")
    return total


def write_tables(tables: Iterable[pa.Table], file: Any, part_size: int) -> int:
    """The same for pairs as tables."""
    total, writer = 0, None
    for table in _in_parts(tables, part_size):
        if "id" not in table.column_names:
            table = table.add_column(0, "id", pa.array(range(total, total + len(table)), pa.int64()))
        if writer is None:
            writer = pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        writer.write_table(table.combine_chunks())
        total += len(table)
    if writer is not None:
        writer.close()
    return total


@contextmanager
def reading(pairs: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken file makes Arrow raise many kinds
        raise ValueError(
            f"cannot read {pairs} ({one_line(error)}): pass a .parquet or .csv file, text in UTF-8"
        ) from error


def _read_pairs(pairs: Path, numbers: Numbers | None = None) -> Iterator[pa.Table]:
    suffix = pairs.suffix.lower()
    if suffix not in LISTS:
        raise ValueError(
            f"cannot read {pairs}: pass a list of pairs, a file that ends in .parquet or .csv, or a folder of images"
        )
    with reading(pairs):
        parquet = pq.ParquetFile(pairs) if suffix == ".parquet" else None
        # Without newlines_in_values, one between quotes would end a row where Arrow's blocks meet.
        parsing = pa.csv.ParseOptions(newlines_in_values=True, delimiter="," if parquet else _delimiter(pairs))
        if parquet is None:
            names = pa.csv.open_csv(pairs, parse_options=parsing).schema.names
        else:
            names = parquet.schema_arrow.names
    columns = _columns(pairs, names)
    with reading(pairs):
        batches = _csv(pairs, columns, parsing) if parquet is None else parquet.iter_batches(columns=columns)
    while True:
        with reading(pairs):
            batch = next(batches, None)
            if batch is None:
                return
            plain = {name: plain_text(batch[name]) for name in columns}
            for column in plain.values():
                column.validate(full=True)  # Parquet may hold text that is no UTF-8
        for name in ("query", "reference"):
            kind = plain[name].type
            numbered = name == "reference" and numbers is not None and pa.types.is_integer(kind)
            if not (pa.types.is_string(kind) or pa.types.is_null(kind) or numbered):
                raise ValueError(f"the column {name!r} of {pairs} must hold paths as text, but holds {kind}")
            plain[name] = plain[name].cast(pa.string())
        if numbers is not None:
            plain[ROW] = numbers(plain["reference"])
        yield pa.table(plain)


def _delimiter(pairs: Path) -> str:
    """Of a header with the columns query and reference, or else the most frequent of what may be one."""
    with pairs.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline(2**16)
    by = {one: next(csv.reader([header], delimiter=one), []) for one in ",;\t"}
    right = [one for one, names in by.items() if {"query", "reference"} <= set(names)]
    return right[0] if right else max(by, key=lambda one: len(by[one]))


def _csv(pairs: Path, columns: list[str], parsing: pa.csv.ParseOptions) -> Iterator[pa.RecordBatch]:
    text = pa.csv.ConvertOptions(  # as it is: 007 is no number
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    return pa.csv.open_csv(pairs, parse_options=parsing, convert_options=text)  # type: ignore[no-any-return]


def _columns(pairs: Path, names: list[str]) -> list[str]:
    for name in ("id", "query", "reference"):
        if names.count(name) != 1 and (name != "id" or name in names):
            near = get_close_matches(name, names, 1)
            hint = f": rename {near[0]!r}" if near and name not in names else ""
            raise ValueError(
                f"{pairs} must have one column {name!r}, but its columns are {', '.join(names) or 'none'}{hint}"
            )
    return [name for name in ("id", "query", "reference") if name in names]


def plain_text(column: pa.Array) -> pa.Array:
    """Without a dictionary, which could differ from part to part; text of all kinds as one."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_view = getattr(pa.types, "is_string_view", lambda kind: False)  # since Arrow 16
    text = pa.types.is_large_string(column.type) or is_view(column.type)
    return column.cast(pa.string()) if text else column


def _in_parts(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    rest = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while len(rest) >= rows:
            yield rest[:rows]
            rest = rest[rows:]
    if rest is not None and len(rest):
        yield rest
