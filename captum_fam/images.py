"""Image files: read, as tensors, and written."""

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

if TYPE_CHECKING:  # workers read images, and need not import it
    from matplotlib.figure import Figure


def read_image(path: Path) -> Image.Image:
    """
    An RGB image, upright.

    Raises:
        ValueError: there is no such file, or it is no image that can be read.
    """
    try:
        with Image.open(path) as image:
            return _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}: check the path") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read {path} as an image: pass a file that Pillow opens, such as PNG or JPEG"
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow clips deeper images at 255 when it converts them: scale 16 bits, and refuse what has no known range."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}")
    return image


def to_tensor(image: Image.Image, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """
    The whole image at size by size pixels, normalised: float32 (3, size, size).

    Examples::

        >>> from captum_fam.demo import photographs
        >>> from captum_fam.images import to_tensor
        >>> to_tensor(photographs()["cat"], 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).shape
        torch.Size([3, 224, 224])
    """
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
    normalised = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1)


def check_png(output: Path, inputs: Sequence[Path] = ()) -> None:
    """
    Raises:
        ValueError: a figure cannot be written to that file, or it is one of the inputs.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"cannot write {output}: name a file that ends in .png with -o")
    if any(output.resolve() == path.resolve() for path in inputs):
        raise ValueError(f"cannot write {output}: it is one of the images; name another file with -o")
    try:
        partial = _partial(output)
        partial.touch()
        partial.unlink()
        writable = not output.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"cannot write {output}: name a file in a folder that can be written to with -o")


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.{os.getpid()}")


def write_png(figure: "Figure", output: Path) -> None:
    """Writes the whole file or none."""
    content = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a file's name, that the font lacks
        figure.savefig(content, format="png", dpi=110)
    output = output.resolve()
    partial = _partial(output)
    try:
        partial.write_bytes(content.getvalue())
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"cannot write {output}: {error.strerror}") from error
