"""What images and maps are, by their shapes: where that is in doubt, an error or a warning says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_fam._checks import describe, warn
from captum_fam.images import as_rgb
from captum_fam.visualization._levels import Numbers as Numbers
from captum_fam.visualization._levels import Pixels, levels, undone
from captum_fam.visualization._panels import Panel, Photo, Signal, Slices

Picture: TypeAlias = Tensor | NDArray[Any] | Image.Image
Pictures: TypeAlias = Picture | Sequence[Picture]
Values: TypeAlias = Tensor | NDArray[Any]
Listed: TypeAlias = Values | Sequence[Values | None]  # None, as of a failed pair, gets an error in plain words

COLOURS = (3, 4)  # numbers of channels that are colours
# By the number of their spatial dimensions.
FORMS = {
    1: "signals (C, T) or (T,)",
    2: "images (C, H, W), (H, W, C) or (H, W) with 1, 3 or 4 channels",
    3: "volumes (C, D, H, W) or (D, H, W)",
}


@dataclass(frozen=True)
class Maps:
    """Maps of B images as they were given, and the numbers of spatial dimensions that they may have."""

    name: str
    values: NDArray[Any]
    ranks: set[int]

    def __len__(self) -> int:
        return len(self.values) if self.values.ndim > 2 else 1

    def of(self, rank: int) -> list[Tensor]:
        """B maps with ``rank`` spatial dimensions, in float64 on the CPU."""
        spatial = self.values.shape[-rank:]
        values = np.array(self.values, np.float64, order="C")  # without negative strides
        return list(torch.from_numpy(values).reshape(-1, *spatial))


def as_one(name: str, values: Listed, batches: Sequence[int]) -> NDArray[Any]:
    """One array, also of a list; items of the list with one of these numbers of dimensions may be batches of one."""
    if isinstance(values, (Tensor, np.ndarray)):
        return real(name, values)
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"Expected `{name}` to be a real tensor or array, but got {describe(values)}.")
    if not values:
        raise ValueError(f"Expected `{name}` to be an array or a list of them, but it is empty.")
    items = []
    for i, item in enumerate(values):
        if item is None:
            raise ValueError(f"`{name}[{i}]` is None: leave out those without a map, or pass None for all references.")
        if not isinstance(item, (Tensor, np.ndarray)):
            got = f"{describe(values)} of {describe(item)}"
            raise TypeError(f"Expected `{name}` to be a real tensor or array, but got {got}.")
        items.append(real(name, item))
    shapes = [item.shape for item in items]
    if other := [shape for shape in shapes if shape != shapes[0]]:
        raise ValueError(
            f"Expected `{name}` to hold arrays of one shape, but got {shapes[0]} and {other[0]}; draw those of each"
            " shape in a figure of its own."
        )
    return np.concatenate(items) if shapes[0][:1] == (1,) and len(shapes[0]) in batches else np.stack(items)


def as_maps(name: str, values: Listed, images: Pictures) -> Maps:
    """Maps of these images. Maps of signals and volumes may lack the channel, too: (B, t) and (B, d, h, w)."""
    given = as_one(name, values, batches=(3, 4, 5))
    shape = given.shape
    if given.ndim == 2 and not isinstance(values, (Tensor, np.ndarray)):  # (t,) of each
        given = given[:, None]
    if (given.ndim == 2 and _are_signals(name, given.shape, images)) or (given.ndim == 4 and _ndim(images) == 5):
        given = given[:, None]
    one = given.ndim > 2 and given.shape[1] == 1
    ranks = {2: {2}, 3: {1, 2} if one else {2}, 4: {2} if one else set(), 5: {3} if one else set()}.get(given.ndim)
    if not ranks or not given.size:
        raise ValueError(
            f"Expected `{name}` to be maps (B, 1, h, w), (B, h, w) or (h, w), but got shape {shape};"
            " those of signals are (B, 1, t), of volumes (B, 1, d, h, w); sum attributions over their channels first."
        )
    return Maps(name, given, ranks)


def _ndim(images: Pictures) -> int:
    return images.ndim if isinstance(images, (Tensor, np.ndarray)) else 0


def _are_signals(name: str, shape: tuple[int, ...], images: Pictures) -> bool:
    """Whether a map of two dimensions is not (h, w) of a picture, but (B, t) of B signals."""
    B = shape[0]
    if isinstance(images, (Tensor, np.ndarray)):
        batch = images.ndim == 3 and images.shape[0] == B
        alone = images.ndim == 2 and (B == 1 or (images.shape[0] == B and tuple(images.shape) != tuple(shape)))
        signals = (images.ndim == 1 and B == 1) or alone or batch
        picture = alone or (batch and not {B, images.shape[2]}.isdisjoint((1, *COLOURS)))
    else:
        signals = isinstance(images, Sequence) and len(images) == B and _are_flat(images)
        picture = B == 1
    if signals and picture:
        raise ValueError(
            f"`{name}` of shape {tuple(shape)} may be maps of {B} signals or one map of a picture: pass"
            f" {name}[:, None] for signals, {name}[None, None] for a picture."
        )
    return signals


def _are_flat(images: Sequence[Picture]) -> bool:
    """Whether images are arrays with at most one dimension more than a signal."""
    return bool(images) and all(isinstance(image, (Tensor, np.ndarray)) and image.ndim < 3 for image in images)


def panels(
    name: str,
    images: Pictures,
    columns: Sequence[Maps],
    mean: Numbers,
    std: Numbers,
) -> tuple[list[Panel], list[list[Tensor]]]:
    """What is drawn under the maps of each image, and the maps, of one or of several methods."""
    rows, rank = len(columns[0]), _rank(name, images, columns)
    maps = [column.of(rank) for column in columns]
    shown: list[Panel] = []
    if rank == 2:
        shown += [Photo(image) for image in pictures(name, images, rows, mean, std)]
        return shown, maps
    found = _one_by_one(name, images, rows, rank, mean, std)
    arrays = [_channels_first(name, image, rank, max(m[0].shape[-1] for m in maps)) for image in found]
    if rank == 1:
        shown += [Signal(undone(a.T, mean, std).T) for a in arrays] * (rows // len(arrays))
        return shown, maps
    found = levels(name, [_volume(a, mean, std) for a in arrays], isinstance(images, (Tensor, np.ndarray)))
    volumes = [[_image(s) for s in volume] for volume in found]
    notes = [f"channel 0 of {len(a)}" * (len(a) not in (1, 3)) for a in arrays]
    for row, (slices, note) in enumerate(list(zip(volumes, notes)) * (rows // len(volumes))):
        shown.append(Slices.of(slices, note, [column[row] for column in maps]))
    return shown, maps


def pictures(name: str, images: Pictures, rows: int, mean: Numbers, std: Numbers) -> list[Image.Image]:
    """One image for each row."""
    found = [_picture(name, image, mean, std) for image in _one_by_one(name, images, rows, 2, mean, std)]
    shown = [_image(each) for each in levels(name, found, isinstance(images, (Tensor, np.ndarray)))]
    return shown * (rows // len(shown))


def _rank(name: str, images: Pictures, columns: Sequence[Maps]) -> int:
    """
    The number of spatial dimensions of images and of all their maps. Maps (B, 1, t) are maps of
    signals, as every method returns them, or maps (B, h, w) of pictures with h = 1. They count as
    the latter only if the images cannot be signals.
    """
    ranks = set.intersection(*(column.ranks for column in columns))
    if not ranks:
        shapes = {column.name: column.values.shape for column in columns}
        raise ValueError(f"Expected maps of as many dimensions of each method, but got {shapes}.")
    if ranks != {1, 2}:
        return ranks.pop()
    rows = len(columns[0])
    if isinstance(images, (Tensor, np.ndarray)):
        shape = images.shape
        picture = len(shape) > 3 or (len(shape) == 3 and shape[0] not in (1, rows) and shape[2] in (1, *COLOURS))
        return 2 if picture else 1
    return 1 if isinstance(images, Sequence) and _are_flat(images) else 2


def _one_by_one(name: str, images: Pictures, rows: int, rank: int, mean: Numbers, std: Numbers) -> list[Any]:
    """Single images, one for each row or for all of them."""
    found: list[Any]
    if isinstance(images, Sequence) and not isinstance(images, str):
        found = list(images)
    elif not isinstance(images, (Tensor, np.ndarray)):
        found = [images]
    elif images.ndim == rank + 2:
        found = list(images)
    elif images.ndim == rank + 1 and rows > 1 and len(images) > 1:
        found = _without_channels(name, images, rows, rank, mean, std)
    else:
        found = [images]
    if len(found) not in (1, rows):
        cure = "; maps of pictures are (B, 1, h, w), with h = 1, too" if rank == 1 else ""
        raise ValueError(f"Expected `{name}` to be one image or {rows}, one for each row, but got {len(found)}{cure}.")
    return found


def _without_channels(name: str, images: Any, rows: int, rank: int, mean: Numbers, std: Numbers) -> list[Any]:
    """Several images without channels, or a single one with its channels: the number of maps decides."""
    shape = tuple(images.shape)
    both = f"pass {name}[:, None] for images of one channel, {name}[None] for a single image in every row"
    if rank != 2:
        kind = FORMS[rank].split()[0]
        batch = "(B, C, T)" if rank == 1 else "(B, C, D, H, W)"
        raise ValueError(f"Expected `{name}` to be {rows} {kind} {batch}, as its maps are, but got {shape}; {both}.")
    told = {np.size(np.asarray(v)) for v in (mean, std) if v is not None} & set(COLOURS)
    if len(images) != rows or told & {shape[0], shape[2]}:
        return [images]
    if shape[2] in (1, *COLOURS):
        raise ValueError(f"`{name}` of shape {shape} may be {rows} images or a single one: {both}.")
    if rows in COLOURS:
        warn(f"`{name}` of shape {shape} is drawn as {rows} images, one for each map; {both}.")
    return list(images)


def _channels_first(name: str, image: Any, rank: int, places: int) -> NDArray[Any]:
    """A signal (C, T) or a volume (C, D, H, W)."""
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"Expected `{name}` to be tensors or arrays, {FORMS[rank]}, but got {describe(image)}.")
    values = real(name, image)
    if values.ndim == rank:
        values = values[None]
    if values.ndim != rank + 1 or not values.size:
        raise ValueError(
            f"Expected `{name}` to be {FORMS[rank]}, as its maps have {rank} dimensions, but got one of shape"
            f" {tuple(image.shape)}; maps of pictures are (B, 1, h, w)."
        )
    if values.shape[-1] < places <= max(values.shape):
        raise ValueError(
            f"Expected `{name}` to have its channels first, {FORMS[rank]}, but got one of shape {tuple(image.shape)},"
            f" whose last dimension is shorter than that of its map, {places}."
        )
    return values


def _volume(values: NDArray[Any], mean: Numbers, std: Numbers) -> Pixels:
    """A volume (C, D, H, W): in colours if it has three channels, else its first channel."""
    return Pixels(np.moveaxis(values, 0, -1), mean, std, 3 if len(values) == 3 else 1)


def _picture(name: str, image: Picture, mean: Numbers, std: Numbers) -> Pixels:
    if isinstance(image, Image.Image):
        try:
            rgb = as_rgb(image)
        except ValueError as error:
            raise ValueError(f"Cannot draw `{name}`: {error}.") from error
        if image.mode == "F":
            return Pixels(np.asarray(image)[..., None])
        return Pixels(np.asarray(image).astype(np.uint16)[..., None] if image.mode[0] == "I" else np.asarray(rgb))
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"Expected `{name}` to be a tensor, an array or a PIL image, but got {describe(image)}.")
    pixels = real(name, image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = [axis for axis in (0, -1) if pixels.ndim == 3 and pixels.shape[axis] in (1, *COLOURS)]
    if not channels or not pixels.size:
        raise ValueError(f"Expected `{name}` to be {FORMS[2]}, but got one of shape {tuple(image.shape)}.")
    # Where both ends could be the channels, tensors have them first, arrays last.
    return Pixels(np.moveaxis(pixels, channels[0 if isinstance(image, Tensor) else -1], -1), mean, std)


def _image(levels: NDArray[np.uint8]) -> Image.Image:
    """A picture of levels (H, W, C), without its opacity."""
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels[..., :3]).convert("RGB")


def real(name: str, values: Values) -> NDArray[Any]:
    """Real numbers as an array."""
    if isinstance(values, Tensor):
        given = values.detach().cpu().as_subclass(Tensor)
        values = (given.double() if given.is_floating_point() else given).numpy()
    if values.dtype.kind not in "fiub":
        raise TypeError(f"Expected `{name}` to be a real tensor or array, but got values of {values.dtype}.")
    return values
