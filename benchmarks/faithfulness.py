"""Which map can be trusted? Encoders x methods x metrics, on scenes with a known answer and on photos with masks.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.faithfulness [--jobs 2]

Results go to ``benchmarks/faithfulness``: README.md, results.csv, figures. What is finished is kept in its folder
``cells`` (one file for each encoder, its weights and source of images), so that a run that was interrupted goes on
where it stopped; a file made with other settings is made again.
"""

import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import study
from benchmarks.report import draw_maps, write_report
from captum_fam import SimilarityScore, metrics
from captum_fam.scenes import removal_effects

FOLDER = Path(__file__).with_name("faithfulness")
EXAMPLES = 5  # pairs that are drawn
COMMAND = "CAPTUM_FAM_DATA=<data folder> python -m benchmarks.faithfulness"


@dataclass(frozen=True)
class Settings:
    """What a cell is made with."""

    version: int = 4  # of the code that makes cells: raise it when their numbers would change
    half: int = 1  # of the pictures; weightings were chosen on half 0, see weightings.py
    pairs: int = 40  # of scenes
    photos: int = 24  # pairs of photos, at most
    masks: int = 200  # of RELAX and Distance Explainer
    faithful: int = 12  # pairs that are changed step by step
    steps: int = 6
    cascaded: int = 4  # pairs whose maps see random weights
    occluded: int = 5  # cells along a side


@dataclass(frozen=True)
class Cell:
    """One encoder on one source of images."""

    encoder: str
    weights: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.encoder}-{self.weights}-{self.source}"


def cells() -> list[Cell]:
    """All of them, the long ones first."""
    found = []
    for name in study.ENCODERS:
        for weights in study.WEIGHTS if name != "mean_colour" else ("trained",):
            sources = ["medium", "hard", "photos"] if weights == "trained" else ["medium", "photos"]
            found += [Cell(name, weights, s) for s in sources if (name, s) != ("protonet_omniglot", "photos")]
    return sorted(found, key=lambda cell: cell.weights != "trained")


def localisation(maps: Tensor, pairs: study.Pairs) -> dict[str, Tensor]:
    """Per-example values of the metrics that need to know where."""
    large = resized(maps, pairs.masks.shape[-1])
    found = {
        "pointing game": metrics.pointing_game(maps, pairs.masks),
        "energy": metrics.energy_pointing_game(large, pairs.masks),
        "energy above the mean": metrics.energy_pointing_game(large - large.mean((2, 3), keepdim=True), pairs.masks),
        "rank accuracy": metrics.relevance_rank_accuracy(large, pairs.masks),
        "IoU at 0.5": metrics.iou(large, pairs.masks),
        "best IoU": metrics.iou(large, pairs.masks, threshold=None),
    }
    if pairs.scenes is not None:
        found["right object"] = right_object(large, pairs.scenes.objects, pairs.scenes.labels.shape[1])
    return found


def resized(maps: Tensor, size: int) -> Tensor:
    return torch.nn.functional.interpolate(maps, (size, size), mode="bilinear")


def right_object(maps: Tensor, objects: Tensor, n: int) -> Tensor:
    """Whether the mean of the map is larger on the shared object than on each distractor; ties count in part."""
    inside = torch.stack([objects == number + 1 for number in range(n)], 1)
    means = (maps * inside).sum((2, 3)) / inside.sum((2, 3))
    top = means >= means.amax(1, keepdim=True)
    return top[:, 0] / top.sum(1)


def faithfulness(q: study.Question, maps: Tensor, steps: int) -> dict[str, Tensor]:
    """Per-example values of the metrics that change the images."""
    score = SimilarityScore(q.encoder.net, q.s)
    whole = {"forward_func": score, "inputs": q.images, "attributions": maps, "max_examples_per_batch": 32}
    found: dict[str, Tensor] = {}
    for baseline in ("blur", "mean", "zero"):
        for name, metric in (("deletion", metrics.deletion), ("insertion", metrics.insertion)):
            found[f"{name}, {baseline}"] = metric(baselines=baseline, n_steps=steps, **whole).auc
    found["average drop"] = metrics.average_drop(baselines="mean", **whole)
    found["average increase"] = metrics.average_increase(baselines="mean", **whole)
    found["ROAD"] = metrics.road(percentages=(25, 50, 75), **whole).score
    return found


def dependence(q: study.Question, n: int, maps: Tensor, swapped: Tensor, other: Tensor, n_cells: int) -> Tensor:
    """How the maps of the first n images change with the reference, against how they should."""
    return metrics.reference_dependence(
        SimilarityScore(q.encoder.net, q.s),
        q.images[:n],
        maps[:n],
        swapped[:n],
        target=torch.arange(n),
        other_target=other[:n],
        n_cells=n_cells,
        max_examples_per_batch=32,
    ).agreement


def cascade(q: study.Question, method: Callable[[study.Question], Tensor]) -> Tensor:
    """The mean rank correlation of maps while the encoder loses its weights; references are embedded by the same."""

    def explain(images: Tensor) -> Tensor:
        return method(study.Question.of(q.encoder, images, q.references))

    return metrics.cascading_randomization(explain, q.encoder.embedder, q.images).rank_correlation.mean(0)


def measure(cell: Cell, settings: Settings, data: Path) -> dict[str, Any]:
    """Per-example values: {method: {metric: [...]}}, and what belongs to the cell as a whole."""
    encoder = study.encoder(cell.encoder, data, cell.weights)
    count = settings.photos if cell.source == "photos" else settings.pairs
    pairs = study.pairs(data, cell.source, encoder.pictures, encoder.size, settings.half, count)
    q = study.Question.of(encoder, pairs.images, pairs.references)
    masked = cell.weights != "shuffled" and cell.source != "hard"
    maps, swapped = study.explain((q, q.swapped(pairs.other)), settings.masks if masked else 0)
    values = {
        name: {
            **localisation(m, pairs),
            **{f"{metric}, swapped": v for metric, v in localisation(swapped[name], pairs).items()},
        }
        for name, m in maps.items()
    }
    found: dict[str, Any] = {}
    if pairs.scenes is not None:
        effects = removal_effects(encoder.net, pairs.scenes)
        others = effects[:, 1:].amax(1)
        found["used"] = (effects[:, 0] > others + 1e-6).tolist()  # equal effects, as of a dead encoder, are none
    if cell.weights == "trained" and cell.source != "hard" and cell.encoder != "mean_colour":
        n = min(settings.faithful, len(q.images))
        for name, m in maps.items():
            values[name] |= faithfulness(q[:n], m[:n], settings.steps)
            values[name]["reference dependence"] = dependence(q, n, m, swapped[name], pairs.other, settings.occluded)
            if name in study.METHODS and name != "contrast with the rest" and cell.source == "photos":
                values[name]["cascading randomisation"] = cascade(q[: settings.cascaded], study.METHODS[name])
        names = list(maps)
        small = [resized(m, 32) for m in maps.values()]
        agreement = [[metrics.rank_correlation(a, b).mean().item() for b in small] for a in small]
        found["agreement"] = {"methods": names, "rank correlation": agreement}
    found["values"] = {m: {k: [round(x, 6) for x in v.tolist()] for k, v in ms.items()} for m, ms in values.items()}
    return found


def finish(cell: Cell, settings: Settings, data: Path, folder: Path) -> str:
    """Makes the file of a cell; a file is there as a whole or not at all."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # zero embeddings and the like of encoders without training
    content = {"cell": asdict(cell), "settings": asdict(settings), **measure(cell, settings, data)}
    path = folder / f"{cell.name}.json"
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").replace(path)
    return cell.name


def is_finished(cell: Cell, settings: Settings, folder: Path) -> bool:
    path = folder / f"{cell.name}.json"
    return path.exists() and json.loads(path.read_text())["settings"] == asdict(settings)


def cosines(name: str, settings: Settings, data: Path) -> tuple[float, float]:
    """The mean cosine of the scenes of a pair, and of scenes without an object in common."""
    encoder = study.encoder(name, data)
    pairs = study.pairs(data, "medium", encoder.pictures, encoder.size, settings.half, settings.pairs)
    with torch.no_grad():
        z, s = (torch.cat([encoder.net(x) for x in images.split(16)]) for images in (pairs.images, pairs.references))
    own, other = (torch.cosine_similarity(z, t).mean().item() for t in (s, s[pairs.other]))
    return own, other


def draw_examples(data: Path, settings: Settings, path: Path) -> None:
    """The first scenes of the bundled encoder, whose photos are in the public domain (CC0), and their maps."""
    encoder = study.encoder("bundled", data)
    pairs = study.pairs(data, "medium", encoder.pictures, encoder.size, settings.half, EXAMPLES)
    q = study.Question.of(encoder, pairs.images, pairs.references)
    (maps,) = study.explain((q,), settings.masks)
    columns = {"image": q.images.permute(0, 2, 3, 1).numpy(), "reference": q.references.permute(0, 2, 3, 1).numpy()}
    for name in (m for m in maps if m not in study.CONTROLS):
        columns[name] = resized(maps[name], encoder.size)[:, 0].numpy()
    assert pairs.scenes is not None
    outlines = {"image": pairs.masks[:, 0].numpy(), "reference": pairs.scenes.reference_masks[:, 0].numpy()}
    draw_maps(columns, outlines, path)


@click.command()
@click.option("--jobs", default=2, show_default=True, help="Processes, of one thread each.")
@click.option("--encoder", "only", multiple=True, type=click.Choice(study.ENCODERS), help="Only these.  [default: all]")
@click.option(
    "--output", default=FOLDER, show_default=False, type=click.Path(path_type=Path), help="Folder of results."
)
@click.option("--smoke", is_flag=True, help="Few pairs, steps and masks: does it run?")
def main(jobs: int, only: tuple[str, ...], output: Path, smoke: bool) -> None:
    """Measure all cells that are not finished and write the report."""
    if not os.environ.get("CAPTUM_FAM_DATA"):
        raise click.ClickException("CAPTUM_FAM_DATA is not set: name the folder with encoders.py and photos/")
    data, folder = Path(os.environ["CAPTUM_FAM_DATA"]), output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(pairs=4, photos=3, masks=20, faithful=2, steps=2, cascaded=2) if smoke else Settings()
    wanted = [cell for cell in cells() if not only or cell.encoder in only]
    todo = [cell for cell in wanted if not is_finished(cell, settings, folder)]
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc="cells") as progress,
    ):
        try:
            for done in as_completed([pool.submit(finish, cell, settings, data, folder) for cell in todo]):
                progress.set_postfix_str(done.result())
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is finished is kept
            raise
    draw_examples(data, settings, output / "maps.png")
    found = [json.loads((folder / f"{cell.name}.json").read_text()) for cell in wanted]
    names = sorted({cell.encoder for cell in wanted})
    write_report(found, {name: cosines(name, settings, data) for name in names}, output, COMMAND)
    click.echo((output / "README.md").read_text())


if __name__ == "__main__":
    main()
