"""What integrated and correspondence maps cost, in plain forward passes of one image.

    python -m benchmarks.cost_integrated

Random weights: the time is that of trained ones. Each call takes turns with a plain forward pass, and the medians of
both are compared. The table goes to ``benchmarks/cost_integrated.md``.
"""

import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import timm
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import table
from captum_fam import CorrespondenceMap, FeatureActivationMap, IntegratedDecomposition, Relax, SimilarityDecomposition

OUTPUT = Path(__file__).with_name("cost_integrated.md")
TURNS, THREADS, MASKS = 5, 2, 200
X, OTHERS = torch.rand(1, 3, 224, 224), torch.rand(12, 3, 224, 224)


def encoders() -> dict[str, tuple[nn.Module, str, str]]:
    """Encoders, an early and the last layer of each."""
    resnet: Any = torchvision.models.resnet50(weights=None)
    resnet.fc = nn.Identity()
    vit = timm.create_model("vit_small_patch16_224", num_classes=0)
    return {
        "ResNet-50": (resnet.eval(), "layer3", "layer4"),
        "ViT-S/16": (vit.eval(), "patch_embed", "blocks.11.norm1"),
    }


def calls(encoder: nn.Module, early: str, last: str) -> dict[str, Callable[[], Any]]:
    D = encoder(X).shape[1]
    one, many = torch.rand(1, D), torch.rand(64, D)
    at = encoder.get_submodule
    integrated = SimilarityDecomposition(encoder, at(early), n_steps=8)
    return {
        f"`FeatureActivationMap`, {last}": lambda: FeatureActivationMap(encoder, at(last)).attribute(
            X, reference_embedding=one
        ),
        f"`SimilarityDecomposition`, {early}": lambda: SimilarityDecomposition(encoder, at(early)).attribute(
            X, reference_embedding=one
        ),
        f"the same, `n_steps=8`, {early}": lambda: integrated.attribute(X, reference_embedding=one),
        f"the same, 64 references, {early}": lambda: integrated.attribute_all(X, reference_embedding=many),
        "`IntegratedDecomposition`, which looks for its layer": lambda: IntegratedDecomposition(encoder).attribute(
            X, reference_embedding=one
        ),
        f"`CorrespondenceMap`, one reference, {last}": lambda: CorrespondenceMap(encoder, at(last)).attribute(
            X, reference=X
        ),
        f"the same, 12 images as background, {last}": lambda: CorrespondenceMap(
            encoder, at(last), background=OTHERS
        ).attribute(X, reference=X),
        f"`Relax`, {MASKS} masks": lambda: Relax(encoder, n_samples=MASKS).attribute(X, reference_embedding=one),
    }


def ratio(call: Callable[[], Any], plain: Callable[[], Tensor]) -> float:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for run, found in zip((call, plain), times):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


@click.command()
def main() -> None:
    """Print and write the table."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore")
    rows = []
    for name, (encoder, early, last) in encoders().items():

        def plain(encoder: nn.Module = encoder) -> Tensor:
            with torch.no_grad():
                return encoder(X)  # type: ignore[no-any-return]

        plain()
        for what, call in tqdm(calls(encoder, early, last).items(), desc=name):
            rows.append([name, what, f"{ratio(call, plain):.1f}"])
    lines = [
        "# What integrated and correspondence maps cost",
        "",
        f"Made by `python -m benchmarks.cost_integrated` (torch {torch.__version__}, {platform.machine()}, {THREADS}"
        f" threads). Times are multiples of a"
        f" plain forward pass of one image of 224 pixels, medians of {TURNS} turns.",
        "",
        table(["encoder", "map", "time"], rows),
    ]
    OUTPUT.write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
