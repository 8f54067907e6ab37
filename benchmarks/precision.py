"""What do maps lose in half precision? ``captum-fam batch --precision`` beside float32, on pretrained encoders.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.precision

Prints a table, and writes it to benchmarks/precision.md.
"""

import os
import platform
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from benchmarks.report import table
from captum_fam.batch import explain_pairs, read_maps
from captum_fam.metrics import rank_correlation

RESULT = Path(__file__).with_name("precision.md")
DATA = Path(os.environ.get("CAPTUM_FAM_DATA", ""))
HALVES = ("bfloat16", "float16")

TEXT = """# What do maps lose in half precision?

Made by `python -m benchmarks.precision`: Python {python}, torch {torch}, on a CPU.

`captum-fam batch` explains {pairs} pairs of clothing photographs by FAM of the cosine, once for each precision of the
encoder. The table compares the results with those of the same encoder in float32. Each cell has the median, the worst
among the best 95 % of the pairs, and the worst of all:

- **score**: the error of the cosine.
- **map**: the largest error at any place, as a share of the largest absolute value of the map.
- **order**: Spearman's rank correlation of the two maps' places; 1 is best.

{table}
"""


def _load(name: str) -> Any:
    sys.path.append(str(DATA))
    import encoders
    import signed_encoders

    return (encoders if name in encoders.names() else signed_encoders).load(name)


# Factories, as --encoder takes them.


def mobilenet_v2() -> nn.Module:
    return _load("mobilenet_v2_imagenet").net  # type: ignore[no-any-return]


def mobilenet_v1() -> nn.Module:
    return _load("mobilenet_v1_050_imagenet").net  # type: ignore[no-any-return]


def resnet44_cifar10() -> nn.Module:
    return _load("resnet44_cifar10").net  # type: ignore[no-any-return]


def vit_cifar10() -> nn.Module:
    return _load("vit_cifar10").net  # type: ignore[no-any-return]


def mobilevit() -> nn.Module:
    return _load("mobilevit_flowers").net  # type: ignore[no-any-return]


SIZES: dict[Callable[[], nn.Module], int] = {
    mobilenet_v1: 160,
    mobilenet_v2: 224,
    mobilevit: 256,
    resnet44_cifar10: 32,
    vit_cifar10: 32,
}


def worst(values: list[float]) -> str:
    """The median, the 95th percentile and the largest."""
    return " / ".join(f"{v:.2g}" for v in np.quantile(values, (0.5, 0.95, 1)))


@click.command()
@click.option("--pairs", default=200, show_default=True)
@click.option("--output", default=RESULT, show_default=False, type=click.Path(path_type=Path))
def main(pairs: int, output: Path) -> None:
    """Measure the errors and write the table."""
    archive = DATA / "photos" / "clothing.zip"
    if not archive.exists():
        raise click.UsageError("data are missing: set CAPTUM_FAM_DATA to the folder of pretrained encoders")
    rows = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        with zipfile.ZipFile(archive) as zipped:
            names = sorted(n for n in zipped.namelist() if n.startswith("test/") and n.endswith(".jpg"))
            zipped.extractall(root, names)
        draw = np.random.default_rng(0)
        columns = {side: [names[i] for i in draw.integers(0, len(names), pairs)] for side in ("query", "reference")}
        pq.write_table(pa.table(columns), root / "pairs.parquet")
        chosen = {"bundled": None} | {f"benchmarks.precision:{make.__name__}": size for make, size in SIZES.items()}
        for encoder, size in chosen.items():

            def maps(precision: str, encoder: str = encoder, size: int | None = size) -> Any:
                to = root / f"{encoder.rpartition(':')[2]}-{precision}"
                explain_pairs(
                    root / "pairs.parquet", to, encoder=encoder, size=size, root=root, precision=precision, workers=1
                )
                return read_maps(to)

            whole = maps("float32")
            for precision in HALVES:
                half = maps(precision)
                both = [(a, b) for a, b in zip(whole, half) if not (a.failure or b.failure)]
                assert all(a.map.shape == b.map.shape and whole.layer == half.layer for a, b in both)
                rows.append(
                    [
                        f"{encoder.rpartition(':')[2]}, `{whole.layer}`, {' by '.join(map(str, both[0][0].map.shape))}",
                        precision,
                        worst([abs(a.score - b.score) for a, b in both]),
                        worst([float(np.abs(a.map - b.map).max() / np.abs(a.map).max()) for a, b in both]),
                        " / ".join(f"{v:.4f}" for v in np.quantile(orders(both), (0.5, 0.05, 0))),
                        str(len(whole) - len(both)),
                    ]
                )
                click.echo(rows[-1], err=True)
    head = ["encoder, layer, places", "precision", "score: median / 95 % / worst", "map: median / 95 % / worst"]
    head += ["order: median / 95 % / worst", "failed"]
    output.write_text(
        text := TEXT.format(
            python=platform.python_version(), torch=version("torch"), pairs=pairs, table=table(head, rows)
        )
    )
    click.echo(text)


def orders(both: list[tuple[Any, Any]]) -> list[float]:
    return rank_correlation(
        *(torch.from_numpy(np.stack([pair[i].map for pair in both]))[:, None] for i in (0, 1))
    ).tolist()


if __name__ == "__main__":
    main()
