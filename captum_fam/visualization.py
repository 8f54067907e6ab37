"""Figures of maps over the images that they explain."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_fam._checks import describe, warn
from captum_fam.comparison import Comparison
from captum_fam.images import as_rgb, to_bytes

Picture: TypeAlias = Tensor | NDArray[Any] | Image.Image
Pictures: TypeAlias = Picture | Sequence[Picture]
Values: TypeAlias = Tensor | NDArray[Any]

STRONGEST = 0.85  # opacity of a figure's largest map value over its image, in grey
LONGEST = 512  # pixels of an image's longer side in a figure
NARROWEST = 4  # an image is drawn at no more than this ratio of its sides
CHARACTERS = 13  # of small text to an inch
ROUNDING = 0.01  # how far values may leave [0, 1] when a normalisation is undone
WHITE = {"uint16": 65535}  # of dtypes, where it is not 255, or 1 for floats
COARSE = 3  # a map with so few locations along a side is said to be coarse
# Red speaks for, blue against; opacity carries the value, so that zero is clear.
SIGNED = LinearSegmentedColormap.from_list("signed", ["#0033dd", "white", "#dd1100"])


def visualize_pair(
    query: Pictures,
    reference: Pictures,
    query_map: Values,
    reference_map: Values,
    *,
    titles: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    label: str = "attribution",
    use_pyplot: bool = True,
) -> tuple[Figure, NDArray[Any]]:
    r"""
    Draws pairs of images side by side, each with its map over it: a row for each pair.

    All maps of the figure are on one colour scale. Those without negative values run from
    blue to red, their opacity with the root of the value; where there are negative values,
    all are red for positive and blue for negative ones. Maps are interpolated linearly to the
    size of their image; a map that is zero, constant, very coarse or not finite everywhere is
    said to be so under it.

    Args:
        query, reference (Tensor, array, PIL.Image or a list of them): B images each; a single
                    one is drawn in every row. One image is (C, H, W), (H, W, C) or (H, W), with
                    1, 3 or 4 channels; a batch has one dimension more. Floats in [0, 1], or
                    integers in [0, 255], of uint16 in [0, 65535]. PIL images of any mode; of mode I
                    with 16 bits, of mode F with values in [0, 1].
        query_map, reference_map (Tensor or array): Their maps, as ``attribute_pair`` returns
                    them: (B, 1, h, w), (B, h, w) or (h, w), any size.
        titles (list of str, optional): One for each pair.
                    Default: None
        mean, std (sequence of float, optional): Mean and standard deviation that the images
                    were normalised with, of each channel; undone, but for uint8 and PIL images.
                    Default: None
        label (str): Of the colour scale.
                    Default: ``"attribution"``
        use_pyplot (bool): Makes the figure with pyplot, so that a notebook shows it. It is never
                    shown from here.
                    Default: True

    Returns:
        *tuple*: the Figure and its Axes, an array (B, 4).

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> images, maps = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 7, 7)
        >>> figure, axes = visualize_pair(images, images.flip(0), maps, maps.flip(0), use_pyplot=False)
        >>> axes.shape
        (2, 4)
    """
    maps = [_maps("query_map", query_map), _maps("reference_map", reference_map)]
    rows = len(maps[0])
    if len(maps[1]) != rows:
        raise ValueError(f"Expected `reference_map` to be {rows} maps, as `query_map` is, but got {len(maps[1])}.")
    sides = [pictures("query", query, rows, mean, std), pictures("reference", reference, rows, mean, std)]
    titles = as_titles(titles, rows)
    figure = new_figure(4, rows, use_pyplot)
    axes = figure.subplots(rows, 4, squeeze=False)
    for row in range(rows):
        for side, name in enumerate(("query", "reference")):
            caption = f"{name}\n{titles[row]}" if titles[row] and not side else name
            show(axes[row, 2 * side], sides[side][row], caption)
    draw_maps(
        figure,
        [*axes[:, 1], *axes[:, 3]],
        [*sides[0], *sides[1]],
        maps[0] + maps[1],
        [f"map of the {name}" for name in ("query", "reference") for _ in range(rows)],
        label,
    )
    return figure, axes


def visualize_comparison(
    images: Pictures,
    attributions: Mapping[str, Values],
    *,
    titles: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, NDArray[Any]]:
    r"""
    Draws the maps of several methods for the same images: a row for each image, a column for
    each method.

    Methods have units of their own, so each one's values are divided by its largest absolute
    value in the figure; on that one colour scale all maps are drawn, as in
    :func:`visualize_pair`. The range of each map's own values is written under it. Methods
    that failed in :func:`~captum_fam.compare_attributions` are named at the foot, with the
    reason.

    Args:
        images (Tensor, array, PIL.Image or a list of them): B images, as in
                    :func:`visualize_pair`.
        attributions (dict): Maps by the names of their methods, as
                    :func:`~captum_fam.compare_attributions` returns them: (B, 1, h, w),
                    (B, h, w) or (h, w), any size.
        titles (list of str, optional): One for each image.
                    Default: None
        mean, std, use_pyplot: As in :func:`visualize_pair`.

    Returns:
        *tuple*: the Figure and its Axes, an array (B, 1 + number of methods).

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> images, maps = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64)
        >>> figure, axes = visualize_comparison(images, {"FAM": maps, "signed": maps - 0.5}, use_pyplot=False)
        >>> axes.shape
        (2, 3)
    """
    if not isinstance(attributions, Mapping) or not attributions:
        raise TypeError(f"Expected `attributions` to be a dict of maps by name, but got {describe(attributions)}.")
    maps = {name: _maps(f"attributions[{name!r}]", values) for name, values in attributions.items()}
    counts = {name: len(values) for name, values in maps.items()}
    rows = next(iter(counts.values()))
    if set(counts.values()) != {rows}:
        raise ValueError(f"Expected `attributions` to hold as many maps of each method, but got {counts}.")
    shown, titles = pictures("images", images, rows, mean, std), as_titles(titles, rows)
    failures = attributions.failures if isinstance(attributions, Comparison) else {}
    foot = [
        line
        for name, why in failures.items()
        for line in textwrap.wrap(f"{name} has no map: {why}", int(CHARACTERS * _width(1 + len(maps))))
    ]
    figure = new_figure(1 + len(maps), rows, use_pyplot, foot)
    figure.supxlabel("\n".join(foot), fontsize="small", x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(rows, 1 + len(maps), squeeze=False)
    for axis, picture, title in zip(axes[:, 0], shown, titles):
        show(axis, picture, title)
    relative, captions = [], []
    for column, (name, values) in enumerate(maps.items(), 1):
        axes[0, column].set_title(name, fontsize="medium", parse_math=False)
        largest = max((_finite(v).abs().max().item() for v in values), default=0) or 1.0
        relative += [v / largest for v in values]
        captions += [_range(v) for v in values]
    draw_maps(
        figure,
        axes[:, 1:].T.flat,
        shown * len(maps),
        relative,
        captions,
        "share of the largest value",
    )
    return figure, axes


def draw_maps(
    figure: Figure,
    axes: Iterable[Axes],
    images: Sequence[Image.Image],
    maps: Sequence[Tensor],
    captions: Sequence[str],
    label: str,
) -> None:
    """Draws maps (h, w) over images on one colour scale, with its bar, and says what a map lacks."""
    axes = list(axes)
    limit = max((_finite(m).abs().max().item() for m in maps), default=0) or 1.0
    signed = any(bool((_finite(m) < 0).any()) for m in maps)
    scale = ScalarMappable(Normalize(-limit if signed else 0, limit), SIGNED if signed else "turbo")
    for axis, image, values, caption in zip(axes, images, maps, captions):
        height, width = show(axis, image.convert("L"), "\n".join(filter(None, [caption, *_lacks(values)])))
        # Where a map is larger than its picture, every value counts: antialiased.
        shown = F.interpolate(_finite(values)[None, None], (height, width), mode="bilinear", antialias=True)
        resized = shown[0, 0].numpy()
        strength = np.abs(resized) / limit
        if signed:
            colours, opacity = SIGNED((resized > 0).astype(float)), strength
        else:
            colours, opacity = scale.to_rgba(resized), np.sqrt(strength)
        # In the image: matplotlib before 3.11 leaves out an array of opacities without a word.
        axis.imshow(np.dstack([colours[..., :3], STRONGEST * opacity.clip(0, 1)]))
    colour_bar(figure, axes, scale, label)


def colour_bar(figure: Figure, axes: Sequence[Axes], scale: ScalarMappable, label: str) -> None:
    bar = figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.01, aspect=30)
    bar.set_label(label, parse_math=False, fontsize="small")


def show(axis: Axes, image: Image.Image, caption: str) -> tuple[int, int]:
    """Draws an image with a caption below it; returns its height and width as drawn."""
    width, height = max(image.width, image.height / NARROWEST), max(image.height, image.width / NARROWEST)
    scale = LONGEST / max(width, height)
    drawn = image.resize((round(width * scale), round(height * scale)))
    axis.imshow(np.asarray(drawn), cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(caption, parse_math=False)
    return drawn.height, drawn.width


def explanation_figure(
    query: Image.Image,
    references: Sequence[Image.Image],
    maps: Mapping[str, Tensor],
    reference_maps: Mapping[str, Tensor],
    captions: Sequence[str],
    reference_captions: Sequence[str],
) -> Figure:
    """
    The query, its maps (K, h, w) for K references in rows by their labels, and below these the references with their
    own.
    """
    query, references = as_rgb(query), [as_rgb(image) for image in references]
    columns, rows = len(references) + 1, len(maps) + len(reference_maps)
    figure = new_figure(columns, rows, use_pyplot=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    show(axes[0, 0], query, "query")
    for axis in axes[1:, 0]:
        axis.axis("off")
    for row, (label, values) in enumerate(maps.items()):
        draw_maps(figure, axes[row, 1:], [query] * len(references), list(values), captions, label)
    for row, (label, values) in enumerate(reference_maps.items(), len(maps)):
        draw_maps(figure, axes[row, 1:], references, list(values), reference_captions, label)
    return figure


def new_figure(columns: int, rows: int, use_pyplot: bool, foot: Sequence[str] = ()) -> Figure:
    size = (_width(columns), 2.9 * rows + 0.2 * len(foot))
    if not use_pyplot:
        return Figure(figsize=size, layout="constrained")
    from matplotlib import pyplot

    return pyplot.figure(figsize=size, layout="constrained")


def _width(columns: int) -> float:
    """In inches."""
    return 2.6 * columns + 0.6


def _each_channel(name: str, values: Sequence[float] | None, default: float, channels: int) -> NDArray[Any]:
    numbers = np.atleast_1d(np.asarray(default if values is None else values, np.float32))
    if numbers.shape not in ((1,), (channels,)):
        raise ValueError(
            f"Expected `mean` and `std` to have one number for each of {channels} channels, but got {name} {values!r}."
        )
    return numbers


def _range(values: Tensor) -> str:
    finite = values[values.isfinite()]
    return f"{finite.min():.3g} to {finite.max():.3g}" if len(finite) else ""


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


def _lacks(values: Tensor) -> list[str]:
    """What should be known of a map (h, w) before it is read."""
    finite = values.isfinite()
    said = []
    if finite.any() and not finite.all():
        said.append(f"{int((~finite).sum())} of {values.numel()} values are not finite")
    if not finite.any():
        said.append("no value is finite")
    elif not _finite(values).any():
        said.append("the map is zero")
    elif values.min() == values.max():
        said.append("the map is constant")
    if min(values.shape) <= COARSE:
        said.append(f"the map has {values.shape[0]} x {values.shape[1]} locations")
    return [f"({line})" for line in said]


def as_titles(titles: Sequence[str] | None, rows: int) -> Sequence[str]:
    if titles is None:
        return [""] * rows
    if isinstance(titles, str) or len(titles) != rows:
        raise ValueError(f"Expected `titles` to be a list of {rows}, one for each row, but got {titles!r}.")
    return titles


def _maps(name: str, values: Values) -> list[Tensor]:
    """Maps (h, w), in float64 on the CPU."""
    if not isinstance(values, (Tensor, np.ndarray)):
        raise TypeError(f"Expected `{name}` to be a real tensor or array, but got {describe(values)}.")
    maps = torch.from_numpy(np.array(real(name, values), np.float64, order="C"))  # without negative strides
    if maps.ndim == 2:
        maps = maps[None]
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    if maps.ndim != 3 or not maps.numel():
        raise ValueError(
            f"Expected `{name}` to be maps (B, 1, h, w), (B, h, w) or (h, w), but got {describe(maps)}; sum"
            " attributions over their channels first."
        )
    return list(maps)


def pictures(
    name: str, images: Pictures, rows: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[Image.Image]:
    """One image for each row."""
    batch = isinstance(images, Sequence) or (isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4)
    one_by_one: Any = images if batch else [images]
    found = [_picture(name, image, mean, std) for image in one_by_one]
    if len(found) not in (1, rows):
        raise ValueError(f"Expected `{name}` to be one image or {rows}, one for each row, but got {len(found)}.")
    return found * (rows // len(found))


def _picture(name: str, image: Picture, mean: Sequence[float] | None, std: Sequence[float] | None) -> Image.Image:
    if isinstance(image, Image.Image):
        try:
            return as_rgb(image)
        except ValueError as error:
            raise ValueError(f"Cannot draw `{name}`: {error}.") from error
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"Expected `{name}` to be a tensor, an array or a PIL image, but got {describe(image)}.")
    pixels = real(name, image)
    white = WHITE.get(pixels.dtype.name, 1 if pixels.dtype.kind in "fb" else 255)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = [axis for axis in (0, -1) if pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4)]
    if not channels or not pixels.size:
        raise ValueError(
            f"Expected `{name}` to be images (C, H, W), (H, W, C) or (H, W) with 1, 3 or 4 channels, but got one of"
            f" shape {tuple(image.shape)}."
        )
    # Where both ends could be the channels, tensors have them first, arrays last.
    pixels = np.moveaxis(pixels, channels[0 if isinstance(image, Tensor) else -1], -1)
    scale, shift = (_each_channel(n, v, d, pixels.shape[2]) for n, v, d in (("std", std, 1), ("mean", mean, 0)))
    is_float = pixels.dtype.kind == "f"
    pixels = pixels.astype(np.float64)
    if is_float:
        pixels = pixels * scale + shift
    finite = np.isfinite(pixels)
    low, high = pixels.min(where=finite, initial=np.inf), pixels.max(where=finite, initial=-np.inf)
    if low < -ROUNDING or high > white + ROUNDING or (white > 255 >= high > 0):  # 16 bits, or perhaps 8
        warn(
            f"`{name}` has values from {low:.6g} to {high:.6g}, not from 0 to {white}; they are stretched to be seen."
            f" Pass {'the mean and std that it was normalised with' if is_float else 'uint8, or values from 0 to 1'}."
        )
        pixels = (pixels - low) / (high - low or 1)
    else:
        pixels = pixels / white
    levels = to_bytes(np.where(finite, pixels, 0))
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels[..., :3]).convert("RGB")


def real(name: str, values: Values) -> NDArray[Any]:
    """Real numbers as an array."""
    if isinstance(values, Tensor):
        given = values.detach().cpu().as_subclass(Tensor)
        values = (given.double() if given.is_floating_point() else given).numpy()
    if values.dtype.kind not in "fiub":
        raise TypeError(f"Expected `{name}` to be a real tensor or array, but got values of {values.dtype}.")
    return values
