"""Many pairs as a batch job: explained in parts, by worker processes or Ray, that can be stopped at any moment."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from captum_fam._checks import check_positive
from captum_fam.batch._part import JOB, LOCK, PAIRS, PARTIAL, PartExplainer, part_file, whole
from captum_fam.encoders import one_line


@dataclass(frozen=True)
class BatchResult:
    """
    What became of a job.

    Attributes:
        explained: pairs that have a score and a map.
        failed: pairs that have an error instead.
        error: the first of them, or None.
        layer: whose maps they are.
    """

    explained: int
    failed: int
    error: str | None
    layer: str


def explain_pairs(
    pairs: Path,
    output: Path,
    *,
    encoder: str = "bundled",
    weights: Path | None = None,
    layer: str | None = None,
    similarity: str = "cosine",
    size: int | None = None,
    device: str = "cpu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    root: Path = Path(),
    part_size: int = 512,
    batch_size: int = 32,
    workers: int | None = None,
    engine: Literal["local", "ray"] | str = "local",
) -> BatchResult:
    r"""
    Explains each pair of images in a file, as ``captum-fam batch`` does.

    The output folder gets Parquet files with a row for each pair, in the order of the file:

    - ``id`` (the row's number where the file has none), ``query`` and ``reference``
    - ``score``: the similarity
    - ``map``, of the query for the reference (swap the columns for the other side): float16, and
      its ``shape``; the values are ``map * scale``, with a power of two as scale where the largest
      magnitude is above 2**15 or below 2**-3, else 1
    - ``error``: why there is neither score nor map; an image that cannot be read costs its own rows

    Each file is written at once and whole. Started again after whatever stop, the job finishes
    what is left. A pair that failed is not tried again, unless its file is deleted.

    Args:
        pairs (Path): A .parquet or .csv file with the columns query, reference and, perhaps, id.
        output (Path): A new or empty folder, or that of the same job. Another encoder (the name, and
                    what is in ``weights``; what a factory does is not looked at), layer, similarity,
                    size, mean, std, root, part_size or pairs are another job.
        encoder, weights, size: As in :func:`~captum_fam.encoders.load_encoder`.
        layer (str, optional): Dotted name.
                    Default: None, the last module with a map that the embedding depends on
        similarity (str): As in :func:`~captum_fam.channel_contributions`.
                    Default: ``"cosine"``
        device (str): A torch device; with ``"cuda"``, each worker has a GPU of its own.
                    Default: ``"cpu"``
        mean, std (Sequence[float], optional): Of the RGB channels in [0, 1].
                    Default: None, the encoder's
        root (Path): Where relative paths start.
                    Default: the current folder
        part_size (int): Pairs in each file, the unit of work.
                    Default: 512
        batch_size (int): Pairs that are explained at once. It changes results only by rounding.
                    Default: 32
        workers (int, optional): Processes, each with its own encoder.
                    Default: None, one for each CPU, or each GPU with ``device="cuda"``
        engine (str): ``"local"``, or ``"ray"`` for Ray Data, whose nodes must all see the files.
                    Default: ``"local"``

    Returns:
        *BatchResult*: of the whole job, runs before this one included.

    Raises:
        ValueError: an argument is not as described above, another run is at work in the same
                    folder, the encoder failed, or a worker died.

    The worker processes import the script that calls this: guard it with
    ``if __name__ == "__main__":``.

    Examples::

        >>> explain_pairs(Path("log.csv"), Path("maps"), encoder="torchvision:resnet50")  # doctest: +SKIP
        BatchResult(explained=4998, failed=2, error='there is no image ...', layer='layer4')
    """
    for name, value in {
        "part_size": part_size,
        "batch_size": batch_size,
        "workers": 1 if workers is None else workers,
    }.items():
        check_positive(name, value)
    if engine not in _ENGINES:
        raise ValueError(f"Expected `engine` to be {' or '.join(map(repr, _ENGINES))}, but got {engine!r}.")
    for path, found in ((pairs, pairs.is_file()), (weights, weights is None or weights.is_file())):
        if not found:
            raise ValueError(f"there is no file {path}: check the path")
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: pass the one where relative paths start as --root")
    what = {"encoder": encoder, "layer": layer, "similarity": similarity, "size": size, "mean": mean, "std": std}
    what["root"] = str(root.resolve())
    job = what | {"pairs": _digest(pairs), "weights": weights and _digest(weights), "part_size": part_size}
    with _lock(output):
        total = _prepare(output, pairs, json.loads(json.dumps(job)))
        parts = range(-(-total // part_size))
        left = [part for part in parts if not part_file(output, part).exists()]
        done = sum(min(part_size, total - part * part_size) for part in set(parts).difference(left))
        options = what | {
            "output": output.resolve(),
            "weights": weights and weights.resolve(),
            "device": device,
            "batch_size": batch_size,
        }
        doubts: dict[str, None] = {}
        with tqdm(total=total, initial=done, desc="captum-fam batch", unit="pair", disable=None) as progress:
            for count, found_doubts in _ENGINES[engine](left, options, workers, len(parts)) if left else ():
                progress.update(count)
                doubts.update(dict.fromkeys(found_doubts))
        for doubt in doubts:
            warnings.warn(doubt, stacklevel=2)
        return _result([part_file(output, part) for part in parts])


# The job and its folder


def _result(parts: list[Path]) -> BatchResult:
    errors = [pq.ParquetFile(part).read(["error"])["error"] for part in parts]
    failed = sum(len(e) - e.null_count for e in errors)
    first = next((e.drop_null()[0].as_py() for e in errors if e.null_count < len(e)), None)
    layer = pq.read_schema(parts[0]).metadata[b"layer"].decode()
    return BatchResult(sum(map(len, errors)) - failed, failed, first, layer)


def _lock(output: Path) -> AbstractContextManager[Any]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        return FileLock(output / LOCK, timeout=0).acquire()
    except Timeout:
        raise ValueError(f"another run is at work in {output}: wait for it, or pass another folder with -o") from None
    except OSError as error:
        raise ValueError(f"cannot write to {output} ({one_line(error)}): pass another folder with -o") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _prepare(output: Path, pairs: Path, job: dict[str, Any]) -> int:
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


# The engines: parts in, the counts and doubts of PartExplainer out, in any order


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _locally(
    left: list[int], options: dict[str, Any], workers: int | None, parts: int
) -> Iterator[tuple[int, list[str]]]:
    one_each = (
        torch.cuda.device_count() if options["device"] == "cuda" else _cpus() if options["device"] == "cpu" else 1
    )
    workers = min(workers or one_each or 1, parts)
    context = multiprocessing.get_context("spawn")
    options = options | {"threads": max(1, _cpus() // workers)}
    futures: set[Future[tuple[int, list[str]]]] = set()
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _start, (options, context.Value("i"))) as pool:
        try:
            for part in left:
                if len(futures) == 2 * workers:  # a billion would not fit
                    done, futures = wait(futures, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                with _deaf_to_interrupts():  # for the processes that this may start: we end them
                    futures.add(pool.submit(_work, part))
            while futures:
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process died, as one does that runs out of memory: start again, which finishes what is left,"
                " with fewer --workers or a smaller --batch-size"
            ) from error
        finally:  # at once, whatever they are doing: parts are whole or not there
            for process in set(multiprocessing.active_children()).difference(others):
                process.kill()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_explainer: PartExplainer


def _start(options: dict[str, Any], started: Any) -> None:
    """In a worker process."""
    global _explainer
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if options["device"] == "cuda" and torch.cuda.device_count():
        with started.get_lock():
            options = options | {"device": f"cuda:{started.value % torch.cuda.device_count()}"}
            started.value += 1
    _explainer = PartExplainer(**options)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(part: int) -> tuple[int, list[str]]:
    return _explainer(part)


def _on_ray(
    left: list[int], options: dict[str, Any], workers: int | None, parts: int
) -> Iterator[tuple[int, list[str]]]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"cannot import {error.name}: pip install 'captum-fam[ray]'") from error

    gpus = int(options["device"].startswith("cuda"))
    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        there = ray.cluster_resources()
        workers = min(workers or int(there.get("GPU" if gpus else "CPU", 0)), parts)
        if not workers:
            raise ValueError("Ray has no GPU: pass --device cpu, or --workers if it can get some")
        options = options | {"threads": max(1, int(there.get("CPU", 1)) // workers)}
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_items([{"part": part} for part in left], override_num_blocks=min(len(left), 64 * workers))
        done = rows.map_batches(
            _RayExplainer,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus,
            fn_constructor_kwargs=options,
        )
        failed = ""
        for row in done.iter_rows():  # to the end: Ray may end this process if it is shut down while rows come
            failed = failed or row["error"]
            yield row["pairs"], json.loads(row["doubts"])
        if failed:
            raise ValueError(failed)
    finally:
        if mine:
            ray.shutdown()


class _RayExplainer:
    """
    A PartExplainer in the words of Ray Data. An error is a value, for Ray would log it with its traceback, and the last
    that it does.
    """

    def __init__(self, **options: Any) -> None:
        self.explain, self.error = PartExplainer(**options), ""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        pairs, doubts = 0, list[str]()
        if not self.error:
            try:
                pairs, doubts = self.explain(int(batch["part"][0]))
            except Exception as error:
                self.error = str(error) if isinstance(error, ValueError) else one_line(error)
        return {"pairs": [pairs], "doubts": [json.dumps(doubts)], "error": [self.error]}


_ENGINES: dict[str, Callable[..., Iterator[tuple[int, list[str]]]]] = {"local": _locally, "ray": _on_ray}
