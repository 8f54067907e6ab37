"""What the commands have in common: options, encoders, and how they speak."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from torch import Tensor

from captum_fam._files import printable
from captum_fam.encoders import find_layer
from captum_fam.encoders._ready import ready_encoder, running


def encoder_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that explain images with an encoder."""
    options = [
        click.option(
            "--encoder",
            default="bundled",
            show_default=True,
            help="bundled, torchvision:NAME, timm:NAME, hf:PATH (a folder of transformers, or a name on"
            " huggingface.co) or module.path:factory, a function without arguments: its code is run, of a module in the"
            " current folder first.",
        ),
        click.option("--weights", type=Path, help="State dict of the encoder, as torch.save writes it."),
        click.option(
            "--layer",
            help="Dotted name.  [default: the last module with a map, or tokens of one, that the embedding depends on]",
        ),
        click.option(
            "--similarity", type=click.Choice(["cosine", "dot", "euclidean"]), default="cosine", show_default=True
        ),
        click.option(
            "--size",
            type=click.IntRange(1, 4096),
            help="Side in pixels that images are resized to.  [default: the encoder's]",
        ),
        click.option("--device", default="cpu", show_default=True, help="A torch device, such as cuda."),
        click.option(
            "--mean", type=float, nargs=3, help="Mean of the RGB channels in [0, 1].  [default: the encoder's]"
        ),
        click.option(
            "--std", type=float, nargs=3, help="Standard deviation of the RGB channels.  [default: the encoder's]"
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True)
class Loaded:
    """Images as an encoder sees them, their embeddings, and the layer to explain."""

    model: torch.nn.Module
    layer_name: str
    layer: torch.nn.Module
    tensors: Tensor
    embeddings: Tensor
    size: int


@contextmanager
def loaded(
    images: Sequence[Image.Image], encoder: str, layer: str | None, size: int | None, **loading: Any
) -> Iterator[Loaded]:
    """Loads the encoder and embeds the images; in this context, whatever the encoder raises becomes one line."""
    with running(encoder, size):
        ready = ready_encoder(encoder, size=size, **loading)
        tensors = ready.batch([ready.tensor(image) for image in images])
        named = find_layer(ready.model, layer, tensors[:1]) if layer is not None else None  # before the encoder runs
        embeddings = torch.cat([ready.embed(t) for t in (tensors[:1], tensors[1:])])
        layer_name, module = named or find_layer(ready.model, None, tensors[:1])
        yield Loaded(ready.model, layer_name, module, tensors, embeddings, ready.size)


def say(line: object, err: bool = False) -> None:
    """A line of ours, with names and messages of others in it."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    click.echo(printable(line).encode(encoding, "backslashreplace").decode(encoding), err=err)


def short(path: Path, longest: int = 30) -> str:
    name = printable(path.name)
    return name if len(name) <= longest else f"{name[: longest // 2]}\N{HORIZONTAL ELLIPSIS}{name[-longest // 2 :]}"


def number(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None
