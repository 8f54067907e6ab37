"""Maps in their colours: what a colour stands for, and notes about maps."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from captum_fam._checks import describe
from captum_fam.visualization._panels import Colours, Panel, Photo, finite

Scale: TypeAlias = Literal["all", "row"] | float

CHARACTERS = 13  # of small text to an inch
COARSE = 3  # a map with so few locations along a side is said to be coarse


def check_scale(scale: Any) -> None:
    if isinstance(scale, str):
        known = scale in ("all", "row")
    else:
        number = isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool)
        known = number and bool(1 <= scale <= 100)
    if not known:
        raise ValueError(
            f'Expected `scale` to be "all", "row" or a percentile from 1 to 100, such as 99, but got {describe(scale)}.'
        )


def limit_of(maps: Iterable[Tensor], scale: Scale) -> float:
    """The absolute value with the strongest colour: the largest, or a percentile of those that are not zero."""
    each = [finite(m).abs().flatten() for m in maps]
    values = torch.cat([m[m > 0] for m in each]).numpy() if each else np.empty(0)
    if not len(values):
        return 1.0
    return float(values.max() if isinstance(scale, str) else np.percentile(values, scale))


def beyond(values: Tensor, limit: float) -> int:
    """How many values are drawn as if they were the limit."""
    return int((finite(values).abs() > limit).sum())


def is_signed(maps: Iterable[Tensor]) -> bool:
    return any(bool((finite(m) < 0).any()) for m in maps)


def draw_rows(
    figure: Figure,
    axes: Sequence[Sequence[Axes]],
    panels: Sequence[Sequence[Panel]],
    maps: Sequence[Sequence[Tensor]],
    captions: Sequence[Sequence[str]],
    label: str,
    scale: Scale,
    signed: bool = False,
) -> None:
    """
    Draws rows of maps over their images on one colour scale, or on one for each row. ``signed``: in
    red and blue even if no value is negative.
    """
    signed = signed or is_signed(chain(*maps))
    if scale == "row":
        for row in zip(axes, panels, maps, captions):
            draw_maps(figure, *row, label, scale=scale, signed=signed)
    else:
        a, p, m, c = (list(chain(*part)) for part in (axes, panels, maps, captions))
        draw_maps(figure, a, p, m, c, label, scale=scale, signed=signed)


def draw_maps(
    figure: Figure,
    axes: Iterable[Axes],
    images: Sequence[Image.Image | Panel],
    maps: Sequence[Tensor],
    captions: Sequence[str],
    label: str,
    *,
    scale: Scale = "all",
    limit: float | None = None,
    signed: bool | None = None,
) -> None:
    """Draws maps over images on one colour scale, with its bar and with notes about maps."""
    axes = list(axes)
    if limit is None:
        limit = limit_of(maps, scale)
    if signed is None:
        signed = is_signed(maps)
    colours = Colours(limit, signed)
    clipped = 0
    for axis, image, values, caption in zip(axes, images, maps, captions):
        panel = Photo(image) if isinstance(image, Image.Image) else image
        panel.draw(axis, "\n".join(filter(None, [caption, *_lacks(values, limit)])), values, colours)
        clipped += beyond(values, limit)
    colour_bar(figure, axes, colours, label, scale, clipped, sum(m.numel() for m in maps))


def colour_bar(
    figure: Figure, axes: Sequence[Axes], colours: Colours, label: str, scale: Scale, clipped: int, values: int
) -> None:
    """The bar beside axes, which says what it is and how many of their values are beyond it."""
    extend = ("both" if colours.signed else "max") if clipped else "neither"
    # Axes that are narrower than their column stay in its middle: beside the bar, their captions would run over it.
    bar = figure.colorbar(colours.bar, ax=axes, fraction=0.02, pad=0.01, aspect=30, extend=extend, panchor=False)
    if scale == "row":
        label += "\n(scale of this row)"
    elif scale != "all":
        label += f"\n(up to percentile {scale:g};\n{clipped} of {values} values are beyond it)"
    bar.set_label(label, parse_math=False, fontsize="small")


def _lacks(values: Tensor, limit: float) -> list[str]:
    """Notes about a map, to know before reading it."""
    known = values.isfinite()
    said = []
    if known.any() and not known.all():
        said.append(f"{int((~known).sum())} of {values.numel()} values are not finite")
    if not known.any():
        said.append("no value is finite")
    elif not finite(values).any():
        said.append("the map is zero")
    elif values.min() == values.max():
        said.append("the map is constant")
    if min(values.shape) <= COARSE:
        size = f"{' x '.join(map(str, values.shape))} locations"
        said.append(size if values.ndim > 2 else f"the map has {size}")  # in the width of a panel
    if count := beyond(values, limit):
        said.append(f"{count} of {values.numel()} beyond the scale")
    return [f"({line})" for line in said]


def value_range(values: Tensor) -> str:
    known = values[values.isfinite()]
    return f"{known.min():.3g} to {known.max():.3g}" if len(known) else ""


def new_figure(columns: int, rows: int, use_pyplot: bool, foot: Sequence[str] = ()) -> Figure:
    size = (width_of(columns), 2.9 * rows + 0.2 * len(foot))
    if not use_pyplot:
        return Figure(figsize=size, layout="constrained")
    from matplotlib import pyplot

    return pyplot.figure(figsize=size, layout="constrained")


def width_of(columns: int) -> float:
    """The width of a figure in inches."""
    return 2.6 * columns + 0.6
