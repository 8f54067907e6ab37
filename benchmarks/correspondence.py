"""What a correspondence map should take away when a user has no background: where it points in scenes.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.correspondence

Needs ``pip install 'captum-fam[tutorials]'`` for EfficientNet-Lite0. What is chosen, is chosen on one half of the
pictures (half 0); the other (half 1) shows what it is worth. The table goes to ``benchmarks/correspondence.md``.
"""

import os
import warnings
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import integrated, study
from benchmarks.faithfulness import resized, right_object
from benchmarks.pairs import pairs as pairs_of
from benchmarks.pairs import used as used_of
from benchmarks.report import table
from captum_fam import CorrespondenceMap, LabelFreeActivationMap
from captum_fam.demo import photographs
from captum_fam.images import to_tensor
from captum_fam.scenes import removal_effects

OUTPUT = Path(__file__).parent / "correspondence.md"
PAIRS, TEMPERATURE, NEIGHBOURS = 32, 0.1, 10
SIGNED = [name for name in integrated.LAYERS if name in study.SIGNED]
ENCODERS = [*dict.fromkeys([*study.GROUPS["weak"], "bundled", "efficientnet_lite0", *SIGNED])]


def encoder(name: str, data: Path, weights: str) -> study.Encoder:
    if name not in (*SIGNED, "efficientnet_lite0"):
        return study.encoder(name, data, weights)
    net, size, pictures = integrated.load(name, data)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in net.modules() if weights != "trained" else ():
            study._forget(module, weights)
    return study.Encoder(name, net, net, integrated.layer_of(net, integrated.LAYERS[name][-1]), size, pictures)


def crops(images: Tensor) -> list[Tensor]:
    """Nine quarters of each image, enlarged."""
    size = images.shape[2]
    starts = (0, size // 4, size // 2)
    parts = [images[:, :, y : y + size // 2, x : x + size // 2] for y in starts for x in starts]
    return [F.interpolate(part, (size, size), mode="bilinear") for part in parts]


def candidates(q: study.Question, without_others: bool) -> dict[str, Tensor]:
    """Maps (N, 1, h, w); those that take something else away than other images only where they are wanted."""
    correspondence = CorrespondenceMap(q.encoder.net, q.encoder.layer)

    def match(**references: Tensor) -> Tensor:
        numbers = torch.arange(PAIRS) if len(next(iter(references.values()))) == PAIRS else None
        return correspondence.attribute(q.images, numbers, internal_batch_size=16, **references)

    best = match(reference=q.references)
    found = {
        "FAM": study.fam()(q),
        "decomposition self": study.decomposition("self")(q),
        "contrast with the rest": study.decomposition("rest")(q),
        "best match": best,
    }
    every = correspondence.attribute_all(q.images, reference=q.references, internal_batch_size=16)
    rows = torch.arange(PAIRS)[:, None]
    for n in (3, 6, 12, 24):
        found[f"less {n} others"] = best - every[rows, (rows + 1 + torch.arange(n)) % PAIRS].mean(1, keepdim=True)
    if not without_others:
        return found
    size = q.encoder.size
    photos = torch.stack([to_tensor(p, size, (0.0,) * 3, (1.0,) * 3) for p in photographs().values()])
    found["less six photographs of the package"] = CorrespondenceMap(
        q.encoder.net, q.encoder.layer, background=photos
    ).attribute(q.images, torch.arange(PAIRS), reference=q.references, internal_batch_size=16)
    found["less crops of the image"] = best - torch.stack([match(reference=c) for c in crops(q.images)]).mean(0)

    across, within = (correspondence.attribute_matrix(q.images, x) for x in (q.references, q.images))
    others = within.masked_fill(torch.eye(within.shape[1], dtype=torch.bool), -2)
    k = min(NEIGHBOURS, *across.shape[1:])
    near = across.topk(k, 2).values.mean(2, keepdim=True) + across.topk(k, 1).values.mean(1, keepdim=True)
    warm = across / TEMPERATURE
    found |= {
        "less the mean over the reference's places": across.amax(2) - across.mean(2),
        "less the mean over both images' places": across.amax(2) - (across.mean(2) + within.mean(2)) / 2,
        "less the best match in the image itself": across.amax(2) - others.amax(2),
        f"dual softmax at {TEMPERATURE}": (warm.softmax(2) * warm.softmax(1)).amax(2),
        f"less the {k} nearest on both sides (CSLS)": (2 * across - near).amax(2),
        "of features less their mean over both images": centred(q),
    }
    return {name: M.reshape(best.shape) for name, M in found.items()}


def centred(q: study.Question) -> Tensor:
    lafam = LabelFreeActivationMap(q.encoder.net, q.encoder.layer)
    A, R = (
        torch.cat([lafam.attribute(x, attr_dim_summation=False) for x in images.split(16)]).flatten(2)
        for images in (q.images, q.references)
    )
    mean = torch.cat([A, R], 2).mean(2, keepdim=True)
    return (F.normalize(A - mean, dim=1).mT @ F.normalize(R - mean, dim=1)).amax(2)


def measure(data: Path, half: int, weights: str, without_others: bool) -> dict[str, list[tuple[float, float]]]:
    """For each candidate and encoder how often it finds the shared object: in all pairs, and where it is used."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name in tqdm(ENCODERS, desc=f"half {half}, {weights}"):
        e = encoder(name, data, weights)
        pairs = pairs_of(data, "medium", e.pictures, e.size, half, PAIRS)
        assert pairs.scenes is not None
        effects = removal_effects(e.net, pairs.scenes)
        used = used_of(effects)
        for candidate, maps in candidates(study.Question.of(e, pairs.images, pairs.references), without_others).items():
            right = right_object(resized(maps, e.size), pairs.scenes.objects, pairs.scenes.labels.shape[1])
            found.setdefault(candidate, []).append((right.mean().item(), right[used].mean().item()))
    return found


def columns(**halves: dict[str, list[tuple[float, float]]]) -> str:
    head = [f"{name.replace('_', ' ')}: {of}" for name in halves for of in ("right object", "where used")]
    rows = next(iter(halves.values()))
    return table(
        ["map", *head],
        [[row, *(f"{x:.3f}" for found in halves.values() for x in np.nanmean(found[row], 0))] for row in rows],
    )


@click.command()
def main() -> None:
    """Print and write the tables."""
    if not os.environ.get("CAPTUM_FAM_DATA"):
        raise click.ClickException("CAPTUM_FAM_DATA is not set: name the folder with encoders.py and photos/")
    data = Path(os.environ["CAPTUM_FAM_DATA"])
    warnings.filterwarnings("ignore")
    choice = measure(data, 0, "trained", without_others=True)
    worth, control = (measure(data, 1, weights, without_others=False) for weights in ("trained", "untrained"))
    lines = [
        "# What a correspondence map takes away",
        "",
        "Made by `python -m benchmarks.correspondence`.",
        "",
        "`CorrespondenceMap` takes the best match of each place. What should it subtract, so that it finds the shared",
        "object? The values are shares of pairs in which the map is largest on the shared object, one of four.",
        f"There are {PAIRS} pairs of medium scenes for each of {len(ENCODERS)} encoders.",
        "",
        "* *Where used*: only pairs whose similarity, for this encoder, falls most without the shared object.",
        "* *less n others*: the best match less that in n references of other pairs. All rows with *less* subtract",
        "  from the best match.",
        "",
        "## Half 0: the choice",
        "",
        columns(half_0=choice),
        "",
        "## Half 1: the test of it",
        "",
        columns(trained=worth, untrained=control),
    ]
    OUTPUT.write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
