"""How fast is one query matched with the stored places of many images? ``match_places`` beside the product alone.

    python -m benchmarks.gallery [--images 100000] [--folder FOLDER]

Needs as much disk as the first row of the table says. Prints tables, and writes them to benchmarks/gallery.md.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.report import table
from captum_fam import match_places
from captum_fam.tasks.stored_places import _AT_ONCE

RESULT = Path(__file__).with_name("gallery.md")
SHAPES = {"7 x 7 places of 512 channels": (7, 7, 512), "14 x 14 places of 384 channels": (14, 14, 384)}
DRAWN, RUNS = 1000, 3

TEXT = """# One query against the stored places of many images

Made by `python -m benchmarks.gallery`: {machine}, {cores} cores, Python {python}, torch {torch}.

How long does `match_places` take to match one query with stored places, beside the product of matrices that it must
compute? The places are random unit vectors, stored in float16. The query is in float32. `match_places` returns the 8
strongest matches of each image.

All times are microseconds for an image, medians of {runs} runs; in brackets, multiples of the product.

{times}

- **product**: the query times the same blocks, which lie in memory as float32. Nothing is read, converted or
  searched. The blocks of {drawn:,} images are used again and again.
- **half to single**, **and product**, **and maxima**: the steps of `match_places`, one added after another, on
  float16 blocks in memory. It converts them, multiplies, and takes the two maxima of each matrix.
- **matched**: `match_places` of a file that lies in the page cache. What it takes beyond *and maxima* is reading and
  choosing.
- **from disk**: the same, once, after the file was dropped from the page cache.

This table has the peak of resident memory of a process that matches a query, and the time of a single run. The row
*none* is a process that only imports the package and makes the query. Parquet files have no compression, and row
groups of {drawn:,}.

{memory}
"""


def unit_vectors(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def write(file: Path, images: int, shape: tuple[int, int, int]) -> None:
    drawn = unit_vectors(min(DRAWN, images), *shape, seed=1).half().numpy()
    with file.open("wb") as stream:
        header = {"descr": drawn.dtype.str, "fortran_order": False, "shape": (images, *shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, images, DRAWN):
            stream.write(drawn[: images - start].tobytes())
        os.fsync(stream.fileno())


def write_table(file: Path, images: int, shape: tuple[int, int, int]) -> None:
    drawn = unit_vectors(min(DRAWN, images), *shape, seed=1).half().numpy()
    places = pa.FixedShapeTensorArray.from_numpy_ndarray(drawn)
    schema = pa.schema({"id": pa.int64(), "places": places.type})
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, images, DRAWN):
            rows = min(DRAWN, images - start)
            writer.write_table(pa.table({"id": range(start, start + rows), "places": places[:rows]}, schema))


def forget(file: Path) -> None:
    """Drops a file from the page cache."""
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def steps(query: Tensor, images: int) -> dict[str, Callable[[], None]]:
    """The product alone, and the first steps of ``match_places``, over so many images."""
    N, C = query.shape
    full = unit_vectors(min(DRAWN, images), N, C, seed=1)
    half, size = full.half(), max(1, _AT_ONCE // (N * max(N, C)))

    def over(blocks: Tensor, one: Callable[[Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, images, len(blocks)):
                for block in blocks[: images - start].split(size):
                    one(block)

        return run

    def product(block: Tensor) -> Tensor:
        return block.flatten(0, 1) @ query.mT

    def maxima(block: Tensor) -> None:
        P = product(block.float()).reshape(len(block), N, N)
        P.max(1), P.amax(2)

    return {
        "product": over(full, product),
        "half to single": over(half, Tensor.float),
        "and product": over(half, lambda block: product(block.float())),
        "and maxima": over(half, maxima),
    }


def times(file: Path, images: int, shape: tuple[int, int, int]) -> dict[str, float]:
    """Seconds of each step and of the whole."""
    query = unit_vectors(*shape, seed=0)
    runs: dict[str, Callable[[], object]] = {
        **steps(query.flatten(0, 1), images),
        "matched": lambda: match_places(query, file),
    }
    match_places(query, file)  # reads it
    found = {name: [seconds(run)] for name, run in runs.items()}
    for _ in range(RUNS - 1):
        for name, run in runs.items():
            found[name].append(seconds(run))
    forget(file)
    return {name: statistics.median(values) for name, values in found.items()} | {
        "from disk": seconds(lambda: match_places(query, file))
    }


PEAK = """
import re, sys, torch
from captum_fam import match_places
query = torch.rand({shape})
if sys.argv[1:]:
    match_places(query, sys.argv[1])
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def peak(shape: tuple[int, int, int], *file: Path) -> str:
    """Megabytes of a fresh process."""
    program = PEAK.format(shape=shape)
    done = subprocess.run([sys.executable, "-c", program, *file], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def once(shape: tuple[int, int, int], count: int, file: Path) -> list[str]:
    """The peak of a process that matches a query, and the time for an image of another run."""
    return [peak(shape, file), f"{seconds(lambda: match_places(unit_vectors(*shape, seed=0), file)) / count * 1e6:.0f}"]


@click.command()
@click.option("--images", default=100_000, show_default=True, help="Of the first shape; a tenth of the second.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where the stores are made.")
@click.option("--output", default=RESULT, show_default=False, type=click.Path(path_type=Path))
def main(images: int, folder: Path | None, output: Path) -> None:
    """Measure times and memory, and write the tables."""
    rows, sizes, memory = [], [], []
    with TemporaryDirectory(dir=folder) as made:
        for (name, shape), count in zip(SHAPES.items(), (images, images // 10)):
            file = Path(made) / "stored.npy"
            write(file, count, shape)
            click.echo(f"{name}: written", err=True)
            sizes.append(f"{name}, {count:,} images, {file.stat().st_size / 1e9:.1f} GB")
            rows.append({step: value / count * 1e6 for step, value in times(file, count, shape).items()})
            click.echo(rows[-1], err=True)
            memory.append([name, f"{count:,}", ".npy", *once(shape, count, file)])
            file.unlink()
        name, shape = next(iter(SHAPES.items()))
        for count in (images // 10, images // 100):
            for file, make in ((Path(made) / "a.parquet", write_table), (Path(made) / "a.npy", write)):
                make(file, count, shape)
                memory.append([name, f"{count:,}", file.suffix, *once(shape, count, file)])
                file.unlink()
        memory.append(["", "none", "", peak(shape), ""])
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    text = TEXT.format(
        machine=cpu[0] if cpu else platform.machine(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=version("torch"),
        drawn=DRAWN,
        runs=RUNS,
        times=table(
            ["", *sizes],
            [[step, *(f"{row[step]:.1f} ({row[step] / row['product']:.2f})" for row in rows)] for step in rows[0]],
        ),
        memory=table(["", "stored images", "file", "peak, MB", "microseconds for an image"], memory),
    )
    output.write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
