"""What maps cost on a GPU, in plain forward passes of the same images, and how near they are to those of the CPU.

    python -m benchmarks.gpu

Random weights: the time is that of trained ones. The page goes to ``benchmarks/gpu.md``.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import timm
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.report import table
from captum_fam import CorrespondenceMap, FeatureActivationMap, IntegratedDecomposition, SimilarityDecomposition
from captum_fam.engine.untouched import buffers_restored

OUTPUT = Path(__file__).with_name("gpu.md")
TURNS, WARM_UP, BATCHES, SIZE = 9, 2, (8, 32), 224
Calls = dict[str, Callable[[], Any]]
TEXT = """# What maps cost on a GPU

Made by `python -m benchmarks.gpu` ({device}, torch {torch}). Images have {size} pixels, weights are random.

- *Time*: multiples of a plain forward pass of the same batch. All rows run in each of {turns} turns, after {warm_up}
  turns to warm up; values are medians.
- *Peak*: the memory that a call needs beside weights and inputs, including its result. *Over plain*: multiples of
  that of the plain forward pass.

{cost}

## Is it the map of the CPU?

Each value is the largest difference to the map that the CPU makes in float64, over the largest value of that map, for
two images.

TF32 is set by `torch.backends.cuda.matmul.allow_tf32` and `torch.backends.cudnn.allow_tf32`. By default, torch sets
only the second.

{agreement}
"""


def encoders() -> dict[str, tuple[nn.Module, str, str]]:
    """Encoders, an earlier and the last layer of each."""
    resnet: Any = torchvision.models.resnet50(weights=None)
    resnet.fc = nn.Identity()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        resnet(torch.rand(16, 3, SIZE, SIZE))  # statistics, without which activations grow from block to block
    vit = timm.create_model("vit_small_patch16_224", num_classes=0)
    return {
        "ResNet-50": (resnet.eval(), "layer3", "layer4"),
        "ViT-S/16": (vit.eval(), "blocks.5.norm1", "blocks.11.norm1"),
    }


def calls(encoder: nn.Module, early: str, last: str, x: Tensor) -> Calls:
    def restored() -> None:
        with torch.no_grad(), buffers_restored(encoder):
            encoder(x)

    s, at = torch.rand(1000, encoder(x[:1]).shape[1]).to(x), encoder.get_submodule
    fam, correspondence = FeatureActivationMap(encoder, at(last)), CorrespondenceMap(encoder, at(last))
    path = {name: SimilarityDecomposition(encoder, at(name), n_steps=8) for name in (early, last)}
    integrated = IntegratedDecomposition(encoder)
    return {
        "plain forward pass, buffers copied and put back": restored,
        f"`FeatureActivationMap`, {last}": lambda: fam.attribute(x, reference_embedding=s[:1]),
        "the same, 64 references": lambda: fam.attribute_all(x, reference_embedding=s[:64]),
        "the same, 1,000 references": lambda: fam.attribute_all(x, reference_embedding=s),
        f"`SimilarityDecomposition`, `n_steps=8`, {last}": lambda: path[last].attribute(x, reference_embedding=s[:1]),
        f"the same, {early}": lambda: path[early].attribute(x, reference_embedding=s[:1]),
        "`IntegratedDecomposition`": lambda: integrated.attribute(x, reference_embedding=s[:1]),
        f"`CorrespondenceMap`, one reference, {last}": lambda: correspondence.attribute(x, reference=x[:1]),
    }


def matrices(encoder: nn.Module, layers: tuple[str, ...], x: Tensor) -> Calls:
    """Of one pair."""
    one, two = x[:1], x[1:2]

    def of(layer: str) -> Callable[[], Tensor]:
        method = SimilarityDecomposition(encoder, encoder.get_submodule(layer), n_steps=8)
        return lambda: method.attribute_matrix(one, two)  # type: ignore[return-value]

    return {f"`attribute_matrix`, `n_steps=8`, {layer}": of(layer) for layer in layers}


def seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(run: Callable[[], Any]) -> float:
    """In MB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def costs(name: str, encoder: nn.Module, x: Tensor, of: Calls) -> Iterator[list[str]]:
    def plain() -> None:
        with torch.no_grad():
            encoder(x)

    plain_peak = 0.0
    for what, call in {"plain forward pass": plain, **of}.items():
        for _ in range(WARM_UP):
            plain()
            call()
        times = [(seconds(call), seconds(plain)) for _ in range(TURNS)]
        mine, base = map(statistics.median, zip(*times))
        added = peak(call)
        plain_peak = plain_peak or added
        ratios = f"{mine / base:.2f}", f"{added:,.0f}", f"{added / plain_peak:.1f}"
        yield [name, str(len(x)), what, f"{mine * 1e3:.1f}", *ratios]


@contextmanager
def tf32(matmul: bool, cudnn: bool) -> Iterator[None]:
    were = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = were


def maps(encoder: nn.Module, early: str, last: str, x: Tensor) -> dict[str, Tensor]:
    """Of each method, in float64 on the CPU."""
    chosen = {what: call for what, call in calls(encoder, early, last, x).items() if "Map" in what or "Decom" in what}
    found: dict[str, Any] = {what: call() for what, call in {**chosen, **matrices(encoder, (last,), x)}.items()}
    return {what: values.double().cpu() for what, values in found.items()}


def agreement(name: str, encoder: nn.Module, early: str, last: str) -> Iterator[list[str]]:
    torch.manual_seed(1)
    x = torch.rand(2, 3, SIZE, SIZE)

    def made(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(2)  # the references
        return maps(copy.deepcopy(encoder).to(device, dtype), early, last, x.to(device, dtype))

    expected, found = made("cpu", torch.float64), []
    for dtype, matmul, cudnn in (
        (torch.float32, False, False),
        (torch.float32, False, True),
        (torch.float32, True, True),
        (torch.bfloat16, False, False),
        (torch.float16, False, False),
    ):
        with tf32(matmul, cudnn):
            found.append(made("cuda", dtype))
    for what, values in expected.items():
        yield [name, what, *(f"{((f[what] - values).abs().max() / values.abs().max()).item():.1e}" for f in found)]


def shown(rows: Iterator[list[str]]) -> list[list[str]]:
    """The rows, said as they are made."""
    found = []
    for row in rows:
        click.echo("  ".join(row), err=True)
        found.append(row)
    return found


@click.command()
def main() -> None:
    """Print and write the page."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    cost, near = list[list[str]](), list[list[str]]()
    for name, (encoder, early, last) in encoders().items():
        near += shown(agreement(name, encoder, early, last))
        encoder.cuda()
        for n in BATCHES:
            x = torch.rand(n, 3, SIZE, SIZE, device="cuda")
            cost += shown(costs(name, encoder, x, calls(encoder, early, last, x)))
        cost += shown(costs(name, encoder, x[:1], matrices(encoder, (last, early), x)))
    text = TEXT.format(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        turns=TURNS,
        warm_up=WARM_UP,
        size=SIZE,
        cost=table(["encoder", "images", "map", "ms", "time", "peak, MB", "over plain"], cost),
        agreement=table(
            ["encoder", "map", "float32", "TF32 as torch has it", "TF32 everywhere", "bfloat16", "float16"], near
        ),
    )
    OUTPUT.write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
