"""What all commands share: an encoder on its device, images as it sees them, and its failures as one line."""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from captum_fam.encoders import LoadedEncoder, load_encoder, one_line
from captum_fam.engine.untouched import embed
from captum_fam.images import to_tensor

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ReadyEncoder(LoadedEncoder):
    """An encoder on its device, and images as it sees them."""

    device: str

    def tensor(self, image: Image.Image) -> Tensor:
        """An RGB image as a tensor (3, size, size), on the CPU."""
        return to_tensor(image, self.size, self.mean, self.std, self.resample)

    def batch(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors as a batch (N, 3, size, size) for the encoder."""
        return torch.stack(list(tensors)).to(self.device, self.dtype)

    def embed(self, tensors: Tensor) -> Tensor:
        try:
            return embed(self.model, "inputs", (tensors,), None, None)
        except (TypeError, ValueError) as error:
            fact, what = _for_a_factory(one_line(error))
            raise ValueError(
                f"{self.name} gives no embeddings (B, D) ({fact}): let the factory return {what}"
            ) from error


def _for_a_factory(text: str) -> tuple[str, str]:
    """A message for callers from Python, with advice for a factory instead of that about their arguments."""
    fact = re.split(r"; |\. (?=If it|It takes|Pass)", text)[0]
    parts = re.findall(r"model\.\w+(?=[ ,])", text)
    selected = re.search(r"output_selector=lambda \w+: (.+?)(?:, (?:or|of) .*)?\.?$", text)
    if parts:
        return fact, f"{' or '.join(parts)}, which embeds images alone"
    if selected:
        return fact, f"a module whose forward ends with that: {selected[1]}"
    return fact, "a module that does"


def ready_encoder(
    encoder: str,
    weights: Path | None,
    size: int | None,
    device: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    precision: str | None = None,
) -> ReadyEncoder:
    """Loads an encoder. Call this, and whatever runs the encoder, within the context ``running``."""
    if not all(map(math.isfinite, (*(mean or ()), *(std or ())))) or min(std or (1,)) <= 0:
        raise ValueError("--mean must be finite and --std positive: give three numbers for each")
    loaded = load_encoder(encoder, weights, size)
    model = _to_device(loaded.model, device)
    if precision is not None:
        model = model.to(PRECISIONS[precision])
    return ReadyEncoder(
        model,
        loaded.size,
        mean or loaded.mean,
        std or loaded.std,
        loaded.resample,
        loaded.name,
        device=device,
    )


@contextmanager
def running(encoder: str, size: int | None, advice: str = "--size, or another --layer") -> Iterator[None]:
    """Within the context, what a user's encoder prints goes to stderr, and its errors become one line with advice."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        images = f"images of {size} pixels" if size else "images of its default size"
        raise ValueError(f"{encoder} failed on {images} ({one_line(error)}): try {advice}") from error


def planes(maps: object, layer: str) -> Tensor:
    """Maps (N, h, w), from attributions in any form that holds single maps."""
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise ValueError(f"layer {layer} does not give one map (B, C, h, w): name another with --layer")
    return maps.flatten(0, 1).float().cpu()


def _to_device(model: torch.nn.Module, device: str) -> torch.nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use device {device}: {str(error).splitlines()[0]}") from error
