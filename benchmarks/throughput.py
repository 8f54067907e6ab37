"""How fast are many pairs explained? ``captum-fam batch`` beside the plain forward passes of the same model.

    python -m benchmarks.throughput [--data FOLDER]

Reads photos/clothing.zip of the folder (default: CAPTUM_FAM_DATA). Prints a table, and writes it to
benchmarks/throughput.md.
"""

import importlib
import math
import os
import platform
import statistics
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.report import table
from captum_fam.batch import explain_pairs
from captum_fam.encoders import load_encoder
from captum_fam.images import read_image, to_tensor

RESULT = Path(__file__).with_name("throughput.md")
BATCH, HITS = 32, 10

TEXT = """# How fast are many pairs explained?

Made by `{command}`: {machine}, {cores} cores, Python {python}, torch {torch}, ray {ray}.

A batch job should explain pairs as fast as the encoder alone can embed them.

{table}

- **plain**: both images of each pair go through the encoder under `torch.inference_mode()` in batches of {batch}.
  Nothing else is done, and the time to start is not counted. Half of the pairs run before the batch job and half
  after it. It runs by {way}, which was faster here than {other}.
- **batch**: `captum-fam batch` in batches of {batch} pairs, from its start to its end. This includes starting the
  processes, checking and writing.
- **of plain**: the speed beside that of plain. 1 means as fast.
- **a log**: a list with {hits} hits for each query. A query goes through the encoder once in a batch, so a log is
  faster.

{conclusion}

The encoder is {encoder} at 224 pixels with random weights; speed does not depend on them. The shorter side of the
photographs has 160 pixels or more. Every row includes reading and decoding them. A pair is two images.

{bounds}
"""


class Timed(nn.Module):
    """An encoder that notes when it is at work."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.spans = model, list[tuple[float, float]]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        z: torch.Tensor = self.model(images)
        self.spans.append((begin, time.perf_counter()))
        return z

    def busy(self) -> float:
        """The share of the time from its first pass to its last that it is at work."""
        return sum(end - begin for begin, end in self.spans) / (self.spans[-1][1] - self.spans[0][0])


made: list[Timed] = []


def timed() -> nn.Module:
    """A factory, as --encoder takes it, of a small and so a hungry encoder."""
    model = torchvision.models.mobilenet_v3_small(weights=None)
    model.classifier = nn.Identity()
    made.append(Timed(model))
    return made[-1]


class Photos(Dataset):
    """Tensors of image files."""

    def __init__(self, paths: Sequence[str], encoder: str, weights: Path) -> None:
        loaded = load_encoder(encoder, weights)
        self.paths, self.options = paths, (loaded.size, loaded.mean, loaded.std)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(read_image(Path(self.paths[index])), *self.options)


def forward(paths: Sequence[str], encoder: str, weights: Path, threads: int, readers: int) -> float:
    """Seconds for the embeddings of all images."""
    torch.set_num_threads(threads)
    model, photos = load_encoder(encoder, weights).model, Photos(paths, encoder, weights)
    loader = DataLoader(photos, BATCH, num_workers=readers)  # as the batch job's queries and references
    with torch.inference_mode():
        model(photos[0][None])
        begin = time.perf_counter()
        for images in loader:
            model(images)
        return time.perf_counter() - begin


def apart(paths: Sequence[str], encoder: str, weights: Path, processes: int) -> float:
    """Seconds for the embeddings of all images, by processes of one thread each."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        run = partial(forward, encoder=encoder, weights=weights, threads=1, readers=0)
        return max(pool.map(run, [paths[i::processes] for i in range(processes)]))


def together(paths: Sequence[str], encoder: str, weights: Path, processes: int) -> float:
    """Seconds for the same, by one process that others feed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(forward, paths, encoder, weights, processes, processes).result()


@click.command()
@click.option("--data", type=click.Path(path_type=Path), envvar="CAPTUM_FAM_DATA", help="Folder with photos.")
@click.option("--encoder", default="mobilenet_v3_small", show_default=True, help="Of torchvision.")
@click.option("--pairs", default=10_000, show_default=True)
@click.option("--few", default=2_000, show_default=True, help="Pairs for the rows that compare engines.")
@click.option("--output", default=RESULT, show_default=False, type=click.Path(path_type=Path))
def main(data: Path | None, encoder: str, pairs: int, few: int, output: Path) -> None:
    """Measure throughput and write the table."""
    archive = data and data / "photos" / "clothing.zip"
    if archive is None or not archive.exists():
        raise click.UsageError(
            "photos are missing: pass --data (or CAPTUM_FAM_DATA), a folder with photos/clothing.zip"
        )
    n = os.cpu_count() or 1
    with TemporaryDirectory() as folder:
        root = Path(folder)
        with zipfile.ZipFile(archive) as zipped:
            names = sorted(name for name in zipped.namelist() if name.endswith(".jpg"))
            zipped.extractall(root, names)
        weights = root / "weights.pt"
        torch.manual_seed(0)
        torch.save(getattr(torchvision.models, encoder)(weights=None).state_dict(), weights)
        name = f"torchvision:{encoder}"
        draw = np.random.default_rng(0)
        both = [[str(root / names[i]) for i in draw.integers(0, len(names), pairs)] for _ in range(2)]
        log = [[path for path in both[0][: math.ceil(few / HITS)] for _ in range(HITS)][:few], both[1][:few]]

        def batch(label: str, columns: list[list[str]], **options: object) -> float:
            """Pairs in a second."""
            file, result = root / f"{label}.parquet", root / label
            pq.write_table(pa.table(dict(zip(("query", "reference"), columns))), file)
            begin = time.perf_counter()
            options = {"encoder": name, "weights": weights} | options
            found = explain_pairs(file, result, **options)  # type: ignore[arg-type]
            seconds = time.perf_counter() - begin
            assert found.explained == len(columns[0]), found
            return len(columns[0]) / seconds

        def first(count: int) -> list[list[str]]:
            return [column[:count] for column in both]

        def paths(columns: list[list[str]]) -> list[str]:
            return [path for pair in zip(*columns) for path in pair]

        def rate(columns: list[list[str]]) -> float:
            return len(columns[0]) / plain(paths(columns), name, weights, n)

        half, sample = pairs // 2, paths(first(few // 4))
        ways = {way: way(sample, name, weights, n) for way in (apart, together)}
        plain = min(ways, key=lambda way: ways[way])
        rates = [rate(first(half))]
        done = batch("all", both)
        rates.append(rate([column[half:] for column in both]))
        base = statistics.harmonic_mean(rates)
        runs: dict[str, Callable[[], float]] = {
            f"batch, {few:,} pairs, 1 worker": lambda: batch("one", first(few), workers=1),
            f"batch, {few:,} pairs, 2 workers": lambda: batch("two", first(few), workers=2),
            f"batch, {few:,} pairs, Ray, 1 worker": lambda: batch("ray1", first(few), engine="ray", workers=1),
            f"batch, {few:,} pairs, Ray, 2 workers": lambda: batch("ray2", first(few), engine="ray", workers=2),
            f"batch, a log of {few:,} pairs, {n} workers": lambda: batch("log", log),
        }
        rows = [
            [f"plain, {pairs:,} pairs", f"{base:.1f} ({min(rates):.1f} to {max(rates):.1f})", "1"],
            [f"batch, {pairs:,} pairs, {n} workers", f"{done:.1f}", f"{done / base:.2f}"],
        ]
        for label, run in runs.items():
            rows.append([label, f"{(value := run()):.1f}", f"{value / base:.2f}"])
            click.echo(rows[-1], err=True)
        photos, few_photos = Photos(both[0], name, weights), min(pairs, 500)
        begin = time.perf_counter()
        for i in range(few_photos):
            photos[i]
        decoded = few_photos / (time.perf_counter() - begin)
        batch("busy", first(few), encoder="benchmarks.throughput:timed", weights=None, size=224, workers=1)
        busy = importlib.import_module("benchmarks.throughput").made[-1].busy()  # this module has another name here
        size = sum(path.stat().st_size for path in (root / "all").glob("part-*")) / pairs
    names_of = {
        apart: "{n} processes of one thread each",
        together: "one process of {n} threads fed by a DataLoader of {n} workers",
    }
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    text = TEXT.format(
        command="python -m benchmarks.throughput",
        machine=cpu[0] if cpu else platform.machine(),
        cores=n,
        python=platform.python_version(),
        torch=version("torch"),
        ray=version("ray"),
        encoder=encoder,
        way=names_of[plain].format(n=n),
        other=names_of[together if plain is apart else apart].format(n=n),
        hits=HITS,
        batch=BATCH,
        table=table(["", "pairs in a second", "of plain"], rows),
        bounds=f"Reading, decoding and resizing alone: {decoded:.0f} images in a second on one core. With one worker, a"
        f" mobilenet_v3_small of {n} threads is at work {busy:.0%} of the time between its first pass and its last."
        f" Written: {size:.0f} bytes for each pair (a map of 7 by 7 places, compressed, with both images' paths).",
        conclusion="Goal: at least the speed of plain. "
        f"{'Reached' if done / base >= 1 else 'Missed'}: {done / base:.2f}.",
    )
    output.write_text(text)
    click.echo(text)


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


if __name__ == "__main__":
    main()
