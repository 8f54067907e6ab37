"""The pairs of a batch job: read from the user's list, and copied in parts."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from captum_fam._files import opened
from captum_fam.batch._part import BAD, ROW
from captum_fam.encoders import one_line

LISTS = (".parquet", ".csv", ".tsv")
_AT_ONCE = 2**14  # rows of a list
_PARTS = 16  # of a short list, so that each worker has some
_LEAST, _MOST = 64, 512  # pairs in a part whose size nobody has asked for

Numbers: TypeAlias = Callable[[pa.ChunkedArray], pa.Array]  # the rows of references in a file of embeddings


def write_pairs(pairs: Path | str, file: Any, part_size: int | None, numbers: Numbers | None = None) -> tuple[int, int]:
    """
    Writes the columns of a list of pairs as an Arrow file, whose record batch i is part i. Returns the number of pairs,
    and that of pairs in a part.
    """
    total, size = write_tables(_read_pairs(pairs, numbers), file, part_size)
    if not total:
        raise ValueError(f"{pairs} lists no pairs: it has columns, but no rows")
    return total, size


def write_tables(tables: Iterable[pa.Table], file: Any, part_size: int | None) -> tuple[int, int]:
    """The same for pairs that come as tables."""
    total, writer = 0, None
    size, tables = _sized(tables, part_size)
    for table in _in_parts(tables, size):
        if "id" not in table.column_names:
            table = table.add_column(0, "id", pa.array(range(total, total + len(table)), pa.int64()))
        if writer is None:
            writer = pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        writer.write_table(table.combine_chunks())
        total += len(table)
    if writer is not None:
        writer.close()
    return total, size


def _sized(tables: Iterable[pa.Table], part_size: int | None) -> tuple[int, Iterable[pa.Table]]:
    """How many pairs a part has, and the tables. Without ``part_size``, the number of pairs decides."""
    if part_size is not None:
        return part_size, tables
    tables, first, total = iter(tables), [], 0
    for table in tables:
        first.append(table)
        total += len(table)
        if total >= _PARTS * _MOST:
            return _MOST, chain(first, tables)
    return max(_LEAST, -(-total // _PARTS)), first


@contextmanager
def reading(pairs: Path | str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken file makes Arrow raise many kinds
        raise ValueError(
            f"cannot read {pairs} ({one_line(error)}): pass a .parquet or .csv file, text in UTF-8"
        ) from error


def _read_pairs(pairs: Path | str, numbers: Numbers | None = None) -> Iterator[pa.Table]:
    suffix = Path(pairs).suffix.lower()
    if suffix not in LISTS:
        raise ValueError(
            f"cannot read {pairs}: pass a list of pairs, a file that ends in .parquet or .csv, or a folder of images"
        )
    for plain in _of_parquet(pairs) if suffix == ".parquet" else _of_csv(pairs):
        for name in ("query", "reference"):
            kind = plain[name].type
            numbered = name == "reference" and numbers is not None and pa.types.is_integer(kind)
            if not (pa.types.is_string(kind) or pa.types.is_null(kind) or numbered):
                raise ValueError(f"the column {name!r} of {pairs} must hold paths as text, but holds {kind}")
            plain[name] = plain[name].cast(pa.string())
        if numbers is not None:
            plain[ROW] = numbers(plain["reference"])
        yield pa.table(plain)


def _of_parquet(pairs: Path | str) -> Iterator[dict[str, pa.Array]]:
    with reading(pairs):
        parquet = pq.ParquetFile(pairs if isinstance(pairs, Path) else opened(pairs))
        names = parquet.schema_arrow.names
    columns = _columns(pairs, names)
    with reading(pairs):
        batches = parquet.iter_batches(columns=columns)
    while True:
        with reading(pairs):
            batch = next(batches, None)
            if batch is None:
                return
            plain = {name: plain_text(batch[name]) for name in columns}
            for column in plain.values():
                column.validate(full=True)  # Parquet may hold text that is no UTF-8
        yield plain


def _of_csv(pairs: Path | str) -> Iterator[dict[str, pa.Array]]:
    """Tables of text, so that 007 stays 007. If a row does not fit the header, its column BAD has the reason."""
    with reading(pairs):
        delimiter, before = dialect(pairs)
        stream = TextIOWrapper(opened(pairs), encoding="utf-8-sig", newline="")
    with stream:
        rows = _rows(pairs, stream, delimiter, before)
        header, bad = next(rows, ([], ""))
        if bad:
            raise ValueError(f"cannot read {pairs}: {bad}")
        columns = _columns(pairs, header)
        places = [header.index(name) for name in columns]
        while some := list(islice(rows, _AT_ONCE)):
            fields = [[row[n] or None if n < len(row) else None for n in places] for row, _ in some]
            found = dict(zip(columns, (pa.array(column, pa.string()) for column in zip(*fields))))
            yield found | {BAD: pa.array([bad or None for _, bad in some], pa.string())}


def _rows(pairs: Path | str, stream: TextIO, delimiter: str, before: int) -> Iterator[tuple[list[str], str]]:
    """The header and the rows, each with what is wrong with it, or "", after ``before`` lines that hold none."""
    for _ in range(before):
        stream.readline()
    reader, width = csv.reader(stream, delimiter=delimiter, strict=True), 0
    while True:
        line = before + reader.line_num + 1
        bad: object = ""
        with reading(pairs):
            try:
                row = next(reader, None)
            except csv.Error as error:
                row, bad = [], error
        last = before + reader.line_num
        if bad and last > line:  # which rows it swallowed is not known
            raise ValueError(
                f"cannot read lines {line} to {last} of {pairs} ({bad}): close a quote that is open, or double one that"
                " is part of a name"
            )
        if bad:
            bad = f"line {line} of the list cannot be read ({bad}): mend its quotes"
        if row is None:
            return
        if not row and not bad:  # an empty line
            continue
        width = width or len(row)
        while len(row) > width and not row[-1]:  # as spreadsheets write them
            row.pop()
        if not bad and len(row) != width:
            cure = f'put quotes around a name that has "{delimiter}"' if len(row) > width else "add what is missing"
            bad = f"line {line} of the list has {len(row)} fields, but its header {width}: {cure}"
        yield row, str(bad)


def dialect(pairs: Path | str) -> tuple[str, int]:
    """
    The delimiter, and how many lines come before the header: one if it names the delimiter, as in Excel's files, else
    none. The delimiter is the one that gives a header with the columns query and reference, or else the most frequent
    candidate.
    """
    with TextIOWrapper(opened(pairs), encoding="utf-8-sig", errors="replace") as file:
        header = file.readline(2**16)
    if named := re.fullmatch(r'"?sep=([^"\w])"?', header.rstrip("\r\n")):
        return named[1], 1
    by = {one: next(csv.reader([header], delimiter=one), []) for one in ",;\t"}
    right = [one for one, names in by.items() if {"query", "reference"} <= set(names)]
    return right[0] if right else max(by, key=lambda one: len(by[one])), 0


def _columns(pairs: Path | str, names: list[str]) -> list[str]:
    for name in ("id", "query", "reference"):
        if names.count(name) != 1 and (name != "id" or name in names):
            near = get_close_matches(name, names, 1)
            hint = f": rename {near[0]!r}" if near and name not in names else ""
            raise ValueError(
                f"{pairs} must have one column {name!r}, but its columns are {', '.join(names) or 'none'}{hint}"
            )
    return [name for name in ("id", "query", "reference") if name in names]


def plain_text(column: pa.Array) -> pa.Array:
    """A column without a dictionary, which could differ from part to part, and with one type for all kinds of text."""
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
