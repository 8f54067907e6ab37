"""The pairs of a batch job: read from a file of others, copied in parts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from captum_fam.encoders import one_line


def write_pairs(pairs: Path, file: Path, part_size: int) -> int:
    """The columns of the pairs as an Arrow file, whose record batch i is part i; the number of pairs."""
    total, writer = 0, None
    for table in _in_parts(_read_pairs(pairs), part_size):
        if "id" not in table.column_names:
            table = table.add_column(0, "id", pa.array(range(total, total + len(table)), pa.int64()))
        if writer is None:
            writer = pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        writer.write_table(table.combine_chunks())
        total += len(table)
    if writer is None:
        raise ValueError(f"{pairs} lists no pairs: it has columns, but no rows")
    writer.close()
    return total


@contextmanager
def _reading(pairs: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken file makes Arrow raise many kinds
        raise ValueError(f"cannot read {pairs} ({one_line(error)}): pass a .parquet or .csv file") from error


def _read_pairs(pairs: Path) -> Iterator[pa.Table]:
    suffix = pairs.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise ValueError(f"cannot read {pairs}: pass a file that ends in .parquet or .csv")
    with _reading(pairs):
        parquet = pq.ParquetFile(pairs) if suffix == ".parquet" else None
        names = pa.csv.open_csv(pairs).schema.names if parquet is None else parquet.schema_arrow.names
    columns = _columns(pairs, names)
    with _reading(pairs):
        batches = _csv(pairs, columns) if parquet is None else parquet.iter_batches(columns=columns)
    while True:
        with _reading(pairs):
            batch = next(batches, None)
            if batch is None:
                return
            plain = {name: _plain(batch[name]) for name in columns}
            for column in plain.values():
                column.validate(full=True)  # Parquet may hold text that is no UTF-8
        for name in ("query", "reference"):
            if not (pa.types.is_string(plain[name].type) or pa.types.is_null(plain[name].type)):
                raise ValueError(
                    f"the column {name!r} of {pairs} must hold paths as text, but holds {plain[name].type}"
                )
            plain[name] = plain[name].cast(pa.string())
        yield pa.table(plain)


def _csv(pairs: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    text = pa.csv.ConvertOptions(  # as it is: 007 is no number
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    # Without newlines_in_values, one between quotes would end a row where Arrow's blocks meet.
    parsing = pa.csv.ParseOptions(newlines_in_values=True)
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


def _plain(column: pa.Array) -> pa.Array:
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
