"""Many pairs as a batch job: explained in parts, by worker processes or Ray, that can be stopped at any moment."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
from tqdm.auto import tqdm

from captum_fam._checks import check_positive
from captum_fam._files import irregular
from captum_fam.batch._engines import ENGINES
from captum_fam.batch._job import digest, locked, prepare, seal
from captum_fam.batch._part import layers_of, part_file

__all__ = ["BatchResult", "explain_pairs"]


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
    if engine not in ENGINES:
        raise ValueError(f"Expected `engine` to be {' or '.join(map(repr, ENGINES))}, but got {engine!r}.")
    for file in (pairs, weights):
        if file is not None and (problem := _no_file(file)):
            raise ValueError(f"there is no file {file}: {problem}")
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: pass the one where relative paths start as --root")
    what = {"encoder": encoder, "layer": layer, "similarity": similarity, "size": size, "mean": mean, "std": std}
    what["root"] = str(root.resolve())
    job = what | {"pairs": digest(pairs), "weights": weights and digest(weights), "part_size": part_size}
    job = json.loads(json.dumps(job))
    with locked(output):
        total = prepare(output, pairs, job)
        parts = range(-(-total // part_size))
        layers = layers_of(output, parts, seal(job))
        layer = next(iter(layers.values()), layer)  # if none is named, and the encoder is no longer what it was
        left = [part for part in parts if part not in layers]
        done = sum(min(part_size, total - part * part_size) for part in layers)
        options = what | {
            "output": output.resolve(),
            "job": seal(job),
            "layer": layer,
            "weights": weights and weights.resolve(),
            "device": device,
            "batch_size": batch_size,
        }
        warned: dict[str, str] = {}
        with tqdm(total=total, initial=done, desc="captum-fam batch", unit="pair", disable=None) as progress:
            for count, new in ENGINES[engine](left, options, workers, len(parts)) if left else ():
                progress.update(count)
                warned = dict(new) | warned
        for text, path in warned.items():
            warnings.warn(f"{text} ({path}, for one)" if path else text, stacklevel=2)
        return _result([part_file(output, part) for part in parts])


def _no_file(path: Path) -> str:
    try:
        return (other := irregular(path)) and f"it is {other}"
    except (OSError, ValueError):
        return "check the path"


def _result(parts: list[Path]) -> BatchResult:
    errors = [pq.ParquetFile(part).read(["error"])["error"] for part in parts]
    failed = sum(len(e) - e.null_count for e in errors)
    first = next((e.drop_null()[0].as_py() for e in errors if e.null_count < len(e)), None)
    layer = pq.read_schema(parts[0]).metadata[b"layer"].decode()
    return BatchResult(sum(map(len, errors)) - failed, failed, first, layer)
