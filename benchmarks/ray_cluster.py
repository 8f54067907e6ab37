"""What Ray costs and gives: a job on clusters of nodes in processes, beside worker processes and plain forward passes.

    python -m benchmarks.ray_cluster [--data FOLDER] [--pairs 10000]

Reads photos/clothing.zip of the folder (default: CAPTUM_FAM_DATA). Prints a table, and writes it to
benchmarks/ray_cluster.md. Takes some 15 minutes on two cores; with ``--pairs 1000``, two.
"""

import logging
import os
import platform
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision

from benchmarks.report import table
from benchmarks.throughput import apart
from captum_fam.batch import explain_pairs

RESULT = Path(__file__).with_name("ray_cluster.md")
WORKERS = (1, 2, 4)

TEXT = """# How fast is a batch job on Ray?

Made by `{command}`: {cores} cores, Python {python}, torch {torch}, ray {ray}.

{pairs:,} pairs of photographs, {encoder} with random weights, parts of {part_size}. Plain forward passes of both
images, {cores} processes: {plain:.1f} pairs in a second.

{table}

- Each run is a whole job from Python: it loads encoders, and checks and writes files.
- A cluster is a head without CPUs, and one node with one CPU for each worker. All of them are processes of this
  machine. The cluster runs before the job starts.
- A single worker process uses all cores; a single worker on Ray uses the one of its node.
- If there are more workers than cores, they share the cores. So this table cannot show what a second machine would
  add.

With two nodes, one of them killed when half of the parts were there, each pair is explained once, at {killed:.1f}
pairs in a second.

Ray carries little: {store} bytes went through the memory that its nodes share (its object stores), for {parts} parts
on two nodes. A worker gets the number of a part, reads the pairs from the folder, writes the file, and returns how
many pairs it had.

Seconds of the start, once: {starts}. A node of a cluster: {node:.1f}.
"""


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def starts() -> dict[str, float]:
    """Seconds of what a job on this machine alone waits for."""
    found = {}

    def load() -> None:
        import captum_fam.batch._engines  # noqa: F401  # by a worker

    begin = time.perf_counter()
    import ray

    found["importing Ray"] = time.perf_counter() - begin
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    found["starting it"] = seconds(lambda: ray.init("local", **quiet))
    found["a worker with its libraries"] = seconds(lambda: ray.get(ray.remote(load).remote()))
    found["ending it"] = seconds(ray.shutdown)
    return found


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """A cluster that this process is connected to, with its ``workers`` and the ``seconds`` of a node's start."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        made.workers = []
        made.seconds = seconds(lambda: made.workers.extend(made.add_node(num_cpus=1) for _ in range(nodes))) / nodes
        ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def stored() -> int:
    """Bytes that were ever put into the object stores of the nodes."""
    import ray
    from ray._private.internal_api import node_stats

    nodes = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]]
    return sum(node_stats(*node, include_memory_info=False).store_stats.cumulative_created_bytes for node in nodes)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), envvar="CAPTUM_FAM_DATA", help="Folder with photos.")
@click.option("--encoder", default="mobilenet_v3_small", show_default=True, help="Of torchvision.")
@click.option("--pairs", default=10_000, show_default=True)
@click.option("--part-size", default=128, show_default=True)
@click.option("--output", default=RESULT, show_default=False, type=click.Path(path_type=Path))
def main(data: Path | None, encoder: str, pairs: int, part_size: int, output: Path) -> None:
    """Measure and write the table."""
    archive = data and data / "photos" / "clothing.zip"
    if archive is None or not archive.exists():
        raise click.UsageError(
            "photos are missing: pass --data (or CAPTUM_FAM_DATA), a folder with photos/clothing.zip"
        )
    with TemporaryDirectory(prefix="ray") as folder:
        os.environ["RAY_TMPDIR"] = folder  # apart from other clusters of this machine
        root = Path(folder)
        with zipfile.ZipFile(archive) as zipped:
            names = sorted(name for name in zipped.namelist() if name.endswith(".jpg"))
            zipped.extractall(root, names)
        weights, name = root / "weights.pt", f"torchvision:{encoder}"
        torch.manual_seed(0)
        torch.save(getattr(torchvision.models, encoder)(weights=None).state_dict(), weights)
        draw = np.random.default_rng(0)
        both = [[str(root / names[i]) for i in draw.integers(0, len(names), pairs)] for _ in range(2)]
        pq.write_table(pa.table(dict(zip(("query", "reference"), both))), root / "pairs.parquet")

        def rate(label: str, workers: int, engine: str) -> float:
            """Pairs in a second."""
            options: dict[str, Any] = {"encoder": name, "weights": weights, "part_size": part_size}
            begin = time.perf_counter()
            found = explain_pairs(root / "pairs.parquet", root / label, workers=workers, engine=engine, **options)
            passed = time.perf_counter() - begin
            assert found.explained == pairs, found
            click.echo(f"{label}: {pairs / passed:.1f} pairs in a second", err=True)
            return pairs / passed

        started, cores = starts(), os.cpu_count() or 1
        plain = pairs / apart([path for pair in zip(*both) for path in pair], name, weights, cores)
        rows, parts = [], -(-pairs // part_size)
        for workers in WORKERS:
            local = rate(f"local-{workers}", workers, "local")
            with cluster(workers) as nodes:
                before = stored()
                on_ray = rate(f"ray-{workers}", workers, "ray")
                if workers == 2:
                    store, node = stored() - before, nodes.seconds
            rows.append([str(workers), *(f"{value:.1f} ({value / plain:.2f})" for value in (local, on_ray))])
        with cluster(2) as nodes:

            def kill() -> None:
                while len(list((root / "killed").glob("part-*"))) < parts / 2:
                    time.sleep(0.01)
                nodes.remove_node(nodes.workers[0], allow_graceful=False)

            threading.Thread(target=kill, daemon=True).start()
            killed = rate("killed", 2, "ray")
    text = TEXT.format(
        command="python -m benchmarks.ray_cluster" + f" --pairs {pairs}" * (pairs != 10_000),
        cores=cores,
        python=platform.python_version(),
        **{package: version(package) for package in ("torch", "ray")},
        **{"pairs": pairs, "encoder": encoder, "part_size": part_size, "parts": parts},
        **{"plain": plain, "killed": killed, "store": f"{store:,}", "node": node},
        table=table(["workers", "worker processes: pairs in a second (of plain)", "Ray, a node each"], rows),
        starts=", ".join(f"{what} {value:.1f}" for what, value in started.items()),
    )
    output.write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
