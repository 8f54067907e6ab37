"""Image files: read, as tensors, and written."""

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from captum_fam._files import irregular, reading

if TYPE_CHECKING:  # workers read images, and need not import it
    from matplotlib.figure import Figure


class UnknownRangeError(ValueError):
    """Which number of a picture is white cannot be told."""


def read_image(path: Path) -> Image.Image:
    """
    An RGB image, upright.

    Raises:
        ValueError: there is no such file, or it is no image that can be read.
    """
    try:
        other = irregular(path)
        if not other:
            with reading(path), Image.open(path) as image:
                return as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}: check the path") from error
    except UnknownRangeError as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from error
    except Exception as error:  # broken files make Pillow raise many kinds
        raise ValueError(
            f"cannot read {path} as an image: pass a file that Pillow opens, such as PNG or JPEG"
        ) from error
    raise ValueError(f"cannot read {path} as an image: it is {other}, pass a file such as PNG or JPEG")


def as_rgb(image: Image.Image) -> Image.Image:
    """
    A picture of any mode as RGB, without its opacity. Pillow would clip what is deeper than 8 bits at 255: 16 bits and
    floats from 0 to 1 are scaled.

    Raises:
        ValueError: its numbers are of no known range, or Pillow cannot convert it.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        finite = values[np.isfinite(values)]
        low, high = finite.min(initial=0), finite.max(initial=0)
        # Mode I holds the numbers of files of 16 bits, and of 8 bits as well: if they are small, none can tell.
        white = 1 if image.mode == "F" else 65535
        if low < 0 or high > white or (image.mode == "I" and 0 < high <= 255):
            raise UnknownRangeError(
                f"it is of mode {image.mode} with values from {low:.6g} to {high:.6g}, whose range is not known; scale"
                " them to 8 bits, or to an array of values from 0 to 1"
            )
        return Image.fromarray(to_bytes(np.nan_to_num(values / white, posinf=0, neginf=0))).convert("RGB")
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    elif image.mode == "P" and "transparency" in image.info:  # Pillow warns of what RGB cannot hold
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_bytes(shares: NDArray[Any]) -> NDArray[np.uint8]:
    """Levels of values from 0 to 1."""
    levels: NDArray[np.uint8] = (shares.clip(0, 1) * 255).round().astype(np.uint8)
    return levels


def to_tensor(
    image: Image.Image,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Tensor:
    """
    The whole image at size by size pixels, normalised: float32 (3, size, size).

    Examples::

        >>> from captum_fam.demo import photographs
        >>> from captum_fam.images import to_tensor
        >>> to_tensor(photographs()["cat"], 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).shape
        torch.Size([3, 224, 224])
    """
    pixels = np.asarray(image.resize((size, size), resample), np.float32) / 255
    normalised = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1)


def check_output(output: Path, suffix: str, inputs: Sequence[Path] = ()) -> None:
    """
    Raises:
        ValueError: a file of that kind, such as ".png", cannot be written there, or it is one of the inputs.
    """
    if output.suffix.lower() != suffix:
        raise ValueError(f"cannot write {output}: name a file that ends in {suffix} with -o")
    if any(output.resolve() == path.resolve() for path in inputs):
        raise ValueError(f"cannot write {output}: it is one of the images; name another file with -o")
    try:
        partial = _partial(output)
        partial.touch()
        partial.unlink()
        writable = not output.exists() or not irregular(output)
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
    write_whole(content.getvalue(), output)


def write_whole(content: bytes, output: Path) -> None:
    """Writes the whole file or none."""
    output = output.resolve()
    partial = _partial(output)
    try:
        partial.write_bytes(content)
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"cannot write {output}: {error.strerror}") from error
