"""Image files: read, as tensors, and written."""

import importlib
import os
import warnings
from collections.abc import Sequence
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from captum_fam._files import FOLDER, fetched, irregular, is_address, reading

if TYPE_CHECKING:  # workers read images, and need not import it
    from matplotlib.figure import Figure


# Kinds of files that may be taken for pictures, by their first bytes (of HEIC and AVIF, from byte 8), and what helps.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HEIC_HELP = "HEIC, which Pillow opens with pillow-heif: pip install pillow-heif"
_AVIF_HELP = "AVIF, which Pillow opens from version 11.3 on: pip install --upgrade pillow"
_KINDS = {
    b"%PDF": "PDF: save its page as PNG or JPEG",
    b"\xff\x0a": "JPEG XL: convert it to PNG or JPEG",
    b"\0\0\0\x0cJXL ": "JPEG XL: convert it to PNG or JPEG",
    b"version https://git-lfs": "a pointer of Git LFS: git lfs pull fetches the picture",
    b"<": "text, such as SVG or a web page: save the picture itself, as PNG or JPEG",
}

# The file formats of figures.
FIGURES = (".png", ".pdf", ".svg")


class UnknownRangeError(ValueError):
    """A picture whose range is unknown: nothing says which number is white."""


def read_image(path: Path | str) -> Image.Image:
    """
    Reads an RGB image, upright, from a file or from the address of a store (as text).

    Raises:
        StoreError: the store cannot be read.
        ValueError: there is no such file, or it is no image that can be read.
    """
    try:
        file = path if isinstance(path, Path) else BytesIO(fetched(path))
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}: check the address") from error
    try:
        other = irregular(file) if isinstance(file, Path) else ""
        if not other:
            with reading(path), _opened(file) as image:
                return as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}: {_missing(Path(path))}") from error
    except UnknownRangeError as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from error
    except Exception as error:  # broken files make Pillow raise many kinds
        raise ValueError(f"cannot read {path} as an image: {_unreadable(file, error)}") from error
    files = f"pass its files, such as {Path(path, '*.jpg')}" if other == FOLDER else "pass a file such as PNG or JPEG"
    raise ValueError(f"cannot read {path} as an image: it is {other}, {files}")


def _opened(file: Path | BytesIO) -> Image.Image:
    """Opens a file by Pillow, or by its plugin for HEIC where that is installed."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if _beginning(file)[8:12] not in _HEIC or not _reads_heic():
            raise
    return Image.open(file)


def _reads_heic() -> bool:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _beginning(file: Path | BytesIO) -> bytes:
    if isinstance(file, BytesIO):
        return file.getvalue()[:32]
    with file.open("rb") as stream:
        return stream.read(32)


def _missing(path: Path) -> str:
    if is_address(path):
        return "it is an address; save the picture, and name its file"
    if not any(c in path.name for c in "*?["):
        return "check the path"
    found = len(glob(str(path)))
    return (
        f"{found} files match it, but the shell did not expand it; leave out its quotes, or name the files"
        if found
        else "no file matches it, either; check the path"
    )


def _unreadable(file: Path | BytesIO, error: Exception) -> str:
    """Why a file cannot be read, and what helps."""
    if isinstance(error, UnidentifiedImageError):
        begins = _beginning(file)
        if not begins:
            return "it is empty"
        if begins[4:8] == b"ftyp":
            kind = begins[8:12]
            if kind in _HEIC and not _reads_heic():
                return f"it is {_HEIC_HELP}"
            if kind in (b"avif", b"avis"):
                return f"it is {_AVIF_HELP}"
        for start, kind_and_help in _KINDS.items():
            if begins.lstrip().startswith(start):
                return f"it is {kind_and_help}"
    elif isinstance(error, (OSError, Image.DecompressionBombError)):
        return f"{' '.join(str(getattr(error, 'strerror', None) or error).split())}; pass a whole file that can be read"
    return "pass a file that Pillow opens, such as PNG or JPEG"


def as_rgb(image: Image.Image) -> Image.Image:
    """
    A picture of any mode as RGB, without its opacity. 16 bits, and floats from 0 to 1, are scaled
    to 8 bits; Pillow would clip them at 255.

    Raises:
        ValueError: the range of its numbers is not known, or Pillow cannot convert it.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        finite = values[np.isfinite(values)]
        low, high = finite.min(initial=0), finite.max(initial=0)
        # Mode I holds numbers of 16 bits, and of 8 bits as well: if they are small, nothing tells which.
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
    """Values from 0 to 1 as levels from 0 to 255."""
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
    How do I make an encoder's input of an image? Takes the whole image, resized and normalised.

    Args:
        image (PIL.Image.Image): An RGB image of any size.
        size (int): Height and width of the result in pixels.
        mean, std (sequence of float): What the encoder's images are normalised with, for the RGB
                    channels in [0, 1].
        resample (PIL.Image.Resampling): How Pillow resizes the image.
                    Default: ``BILINEAR``

    Returns:
        *Tensor*: (3, size, size), float32.

    Examples::

        >>> from captum_fam.demo import photographs
        >>> from captum_fam.images import to_tensor
        >>> to_tensor(photographs()["cat"], 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).shape
        torch.Size([3, 224, 224])
    """
    pixels = np.asarray(image.resize((size, size), resample), np.float32)
    rows = pixels.reshape(size, -1) / 255  # NumPy is eight times as fast on rows as on three numbers at a time
    rows -= np.broadcast_to(np.asarray(mean, np.float32), (size, 3)).ravel()
    rows /= np.broadcast_to(np.asarray(std, np.float32), (size, 3)).ravel()
    return torch.from_numpy(rows.reshape(pixels.shape)).permute(2, 0, 1)


def check_output(output: Path, suffixes: str | Sequence[str], inputs: Sequence[Path] = ()) -> None:
    """
    Checks that a figure can be written.

    Raises:
        ValueError: a file of one of these kinds, such as ".png", cannot be written there, or it is one of the inputs.
    """
    suffixes = [suffixes] if isinstance(suffixes, str) else suffixes
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {output}: name a file that ends in {' or '.join(suffixes)} with -o")
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


def write_figure(figure: "Figure", output: Path) -> None:
    """Writes the whole file, in the format of its name's ending, or none."""
    content = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a file's name, that the font lacks
        figure.savefig(content, format=output.suffix[1:].lower(), dpi=110)
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
