"""Transformers: is it the encoder, the layer or the method? How often maps find the shared object of medium scenes.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.transformers

Needs ``pip install 'captum-fam[tutorials]'``. The table goes to ``benchmarks/transformers.md``.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import integrated, study
from benchmarks import pairs as of_pairs
from benchmarks.faithfulness import resized, right_object
from benchmarks.report import table
from captum_fam.scenes import removal_effects

OUTPUT = Path(__file__).with_suffix(".md")
PAIRS, HALF = 32, 1
LAYERS = {  # what the first, the third and the last attention see, and a map before all of them
    "vit_token": ["vit.patch_embed.trunk", *(f"vit.blocks.{n}.norm1" for n in (0, 2, 3))],
    "vit_mean": ["vit.patch_embed.trunk", *(f"vit.blocks.{n}.norm1" for n in (0, 2, 3))],
    "vit_cifar10": ["patch_embed", *(f"blocks.{n}.norm1" for n in (0, 2, 3))],
    "dino_vit": ["patch_embed", *(f"blocks.{n}.norm1" for n in (0, 2, 3))],
}
METHODS: dict[str, Callable[[study.Question], Tensor]] = {
    "FAM": study.fam(),
    "decomposition": study.decomposition(),
    "decomposition self": study.decomposition("self"),
    "integrated": study.decomposition(n_steps=8),
    "integrated self": study.decomposition("self", n_steps=8),
    "match less others": study.match_less_others,
}


def encoder(name: str, data: Path, weights: str) -> study.Encoder:
    if name not in study.SIGNED:
        return study.encoder(name, data, weights)
    net, size, pictures = integrated.load(name, data)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in net.modules() if weights != "trained" else ():
            study._forget(module, weights)
    return study.Encoder(name, net, net, net, size, pictures)


def rows(name: str, data: Path, weights: str) -> list[list[str]]:
    """For each layer, how often each method finds the object: in all pairs / in those where the encoder uses it."""
    e = encoder(name, data, weights)
    pairs = of_pairs.pairs(data, "medium", e.pictures, e.size, HALF, PAIRS)
    assert pairs.scenes is not None
    used = of_pairs.used(removal_effects(e.net, pairs.scenes))
    found = []
    for layer in tqdm(LAYERS[name], f"{name}, {weights}"):
        q = study.Question.of(replace(e, layer=integrated.layer_of(e.net, layer)), pairs.images, pairs.references)
        row = [name, weights, f"{used.float().mean():.2f}", f"`{layer}`"]
        for method in METHODS.values():
            right = right_object(resized(method(q), e.size), pairs.scenes.objects, pairs.scenes.labels.shape[1])
            row.append(f"{right.mean():.2f} / {right[used].mean():.2f}")
        found.append(row)
    return found


@click.command()
def main() -> None:
    """Print and write the table."""
    if not os.environ.get("CAPTUM_FAM_DATA"):
        raise click.ClickException("CAPTUM_FAM_DATA is not set: name the folder with encoders.py and photos/")
    data = Path(os.environ["CAPTUM_FAM_DATA"])
    warnings.filterwarnings("ignore")
    found = [row for weights in ("trained", "untrained") for name in LAYERS for row in rows(name, data, weights)]
    lines = [
        "# Transformers: the encoder, the layer or the method?",
        "",
        "Made by `python -m benchmarks.transformers`.",
        "",
        "If a map of a transformer does not find the shared object, is it the fault of the encoder, the layer or the",
        f"method? This table tries {PAIRS} medium scenes of half {HALF}. Each has four objects, one of them shared.",
        "",
        "* *Used*: the share of scenes whose similarity falls most without the shared object.",
        "* Each method: how often the mean of its map is largest on the shared object, in all pairs / in the pairs",
        "  where the encoder uses it. Chance is 0.25.",
        '* *Self* is `contrast="self"`. *Match less others* is `CorrespondenceMap` less the same map for others.',
        "",
        table(["encoder", "weights", "used", "layer", *METHODS], found),
    ]
    OUTPUT.write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
