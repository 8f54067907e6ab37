"""What all commands share: encoders and their images."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_fam.cli._say import say, short
from captum_fam.encoders import find_layer, one_line
from captum_fam.encoders._ready import ReadyEncoder, ready_encoder, running
from captum_fam.images import read_image


@dataclass(frozen=True)
class Loaded:
    """Images as an encoder sees them, their embeddings, those of texts, and the layer to explain."""

    model: torch.nn.Module
    layer_name: str
    layer: torch.nn.Module
    tensors: Tensor
    embeddings: Tensor
    texts: Tensor
    size: int


@contextmanager
def loaded(
    images: Sequence[Image.Image],
    encoder: str,
    layer: str | None,
    size: int | None,
    texts: Sequence[str] = (),
    **loading: Any,
) -> Iterator[Loaded]:
    """Loads the encoder and embeds images and texts; within the context, errors of the encoder become one line."""
    with running(encoder, size):
        ready = ready_encoder(encoder, size=size, **loading)
        said = _embedded(ready, texts)
        tensors = ready.batch([ready.tensor(image) for image in images])
        named = find_layer(ready.model, layer, tensors[:1]) if layer is not None else None  # before the encoder runs
        embeddings = torch.cat([ready.embed(t) for t in (tensors[:1], tensors[1:]) if len(t)])
        if said is not None and said.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"{encoder} gives sentences {said.shape[1]} dimensions and images {embeddings.shape[1]}: --text needs"
                " an encoder that has both in one space"
            )
        layer_name, module = named or find_layer(ready.model, None, tensors[:1])
        said = embeddings[:0] if said is None else said.to(embeddings)
        yield Loaded(ready.model, layer_name, module, tensors, embeddings, said, ready.size)


def _embedded(ready: ReadyEncoder, texts: Sequence[str]) -> Tensor | None:
    try:
        return ready.embed_text(list(texts)) if texts else None
    except ValueError:
        raise
    except Exception as error:  # whatever a text tower raises
        raise ValueError(f"{ready.name} failed on --text ({one_line(error)}): try another sentence") from error


@dataclass(frozen=True)
class Reference:
    """
    A reference that the user named: an image, or a sentence.

    Attributes:
        number: its number, from 1, as the user counts.
        name: the path or the sentence.
        image: the image, if there is one that can be read.
        error: why the image cannot be read.
    """

    number: int
    name: Path | str
    image: Image.Image | None = None
    error: str = ""

    @property
    def caption(self) -> str:
        return f"{self.number}: {short(self.name)}" if isinstance(self.name, Path) else f"{self.number}"

    @property
    def shown(self) -> str:
        return str(self.name) if isinstance(self.name, Path) else f'"{self.name}"'


def read_references(paths: Sequence[Path], needed: int = 1) -> list[Reference]:
    """
    Reads references one by one, and says which cannot be read.

    Raises:
        ValueError: fewer than ``needed`` can be read.
    """
    found, first = [], None
    for number, path in enumerate(paths, 1):
        try:
            found.append(Reference(number, path, read_image(path)))
        except ValueError as error:
            first = first or error
            found.append(Reference(number, path, error=" ".join(str(error).split())))
    broken = [reference for reference in found if reference.error]
    if first is not None and len(found) - len(broken) < needed:
        raise first if len(found) == 1 else ValueError(f"no reference can be read; the first: {first}")
    for reference in broken:
        say(f"captum-fam: reference {reference.number} is left out: {reference.error}", err=True)
    return found


def number(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None
