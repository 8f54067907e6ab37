"""A batch job's folder: its pairs in parts, what it is a job of, and what became of it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from captum_fam.batch._part import JOB, LOCK, PAIRS, PARTIAL, whole
from captum_fam.encoders import one_line


def locked(output: Path) -> AbstractContextManager[Any]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        return FileLock(output / LOCK, timeout=0).acquire()
    except Timeout:
        raise ValueError(f"another run is at work in {output}: wait for it, or pass another folder with -o") from None
    except OSError as error:
        raise ValueError(f"cannot write to {output} ({one_line(error)}): pass another folder with -o") from error


def digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def prepare(output: Path, pairs: Path, job: dict[str, Any]) -> int:
    """Makes the folder that of this job, or finds that it is; the number of pairs."""
    for partial in output.glob(f"{PARTIAL}*"):
        partial.unlink()
    started = [path.name for path in output.iterdir() if not path.name.startswith(("_", "."))]
    file = output / JOB
    before = json.loads(file.read_text()) if file.exists() else None
    if before is None and started:
        raise ValueError(f"{output} is not empty (it has {min(started)}): pass another folder with -o")
    if before is None or (before["job"] != job and not started):
        file.unlink(missing_ok=True)  # first: it says that the pairs are whole and its own
        with whole(output / PAIRS) as partial:
            before = {"job": job, "pairs": _write_pairs(pairs, partial, job["part_size"])}
        with whole(file) as partial:
            partial.write_text(json.dumps(before, indent=2))
    changed = [
        name if name in ("pairs", "weights") else f"{name} ({before['job'].get(name)!r} then)"
        for name in job
        if before["job"].get(name) != job[name]
    ]
    if changed:
        raise ValueError(
            f"{output} holds a job of other {', '.join(changed)}: pass the same, or another folder with -o"
        )
    return int(before["pairs"])


def _write_pairs(pairs: Path, file: Path, part_size: int) -> int:
    """The columns of the pairs as an Arrow file, whose record batch i is part i; the number of pairs."""
    try:
        total, writer = 0, None
        for table in _in_parts(_read_pairs(pairs), part_size):
            if "id" not in table.column_names:
                table = table.add_column(0, "id", pa.array(range(total, total + len(table)), pa.int64()))
            if writer is None:
                writer = pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
            writer.write_table(table.combine_chunks())
            total += len(table)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {pairs} ({one_line(error)}): pass a .parquet or .csv file") from error
    if writer is None:
        raise ValueError(f"{pairs} lists no pairs: it has columns, but no rows")
    writer.close()
    return total


def _read_pairs(pairs: Path) -> Iterator[pa.Table]:
    suffix, batches = pairs.suffix.lower(), None
    if suffix == ".parquet":
        parquet = pq.ParquetFile(pairs)
        columns = _columns(pairs, parquet.schema_arrow.names)
        batches = parquet.iter_batches(columns=columns)
    elif suffix == ".csv":
        columns = _columns(pairs, pa.csv.open_csv(pairs).schema.names)
        text = pa.csv.ConvertOptions(  # as it is: 007 is no number
            include_columns=columns,
            column_types=dict.fromkeys(columns, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        )
        batches = pa.csv.open_csv(pairs, convert_options=text)
    else:
        raise ValueError(f"cannot read {pairs}: pass a file that ends in .parquet or .csv")
    for batch in batches:
        yield pa.table({name: _plain(pairs, name, batch[name]) for name in columns})


def _columns(pairs: Path, names: list[str]) -> list[str]:
    for name in ("query", "reference"):
        if names.count(name) != 1:
            near = get_close_matches(name, names, 1)
            hint = f": rename {near[0]!r}" if near and name not in names else ""
            raise ValueError(
                f"{pairs} must have one column {name!r}, but its columns are {', '.join(names) or 'none'}{hint}"
            )
    return ["id", "query", "reference"] if "id" in names else ["query", "reference"]


def _plain(pairs: Path, name: str, column: pa.Array) -> pa.Array:
    """Without a dictionary, which could differ from part to part; paths as text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if name == "id":
        return column
    if not any(is_(column.type) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise ValueError(f"the column {name!r} of {pairs} must hold paths as text, but holds {column.type}")
    return column.cast(pa.string())


def _in_parts(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    rest = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while len(rest) >= rows:
            yield rest[:rows]
            rest = rest[rows:]
    if rest is not None and len(rest):
        yield rest
