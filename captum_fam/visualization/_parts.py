"""Figures of the parts that two images share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from captum_fam._checks import describe
from captum_fam.methods.shared_parts import SharedPartsExplanation
from captum_fam.visualization._captions import SIDES, Titles, side_captions
from captum_fam.visualization._forms import Numbers, Pictures, pictures
from captum_fam.visualization._panels import STRONGEST, resized, show
from captum_fam.visualization._scales import new_figure

WITH_OTHERS = 0.4  # opacity of the bar of what a part contributes with other parts
ROWS = 50  # of a figure

# Those of Okabe and Ito (Color Universal Design, 2008), which colour-blind people tell apart, without black.
FEW = to_rgba_array(["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"])


def visualize_parts(
    query: Pictures,
    reference: Pictures,
    parts: SharedPartsExplanation,
    *,
    titles: Titles = None,
    reference_titles: Titles = None,
    mean: Numbers = None,
    std: Numbers = None,
    use_pyplot: bool = True,
) -> tuple[Figure, NDArray[Any]]:
    r"""
    Which parts do two images share, and what does each add to the score? Draws pairs of images side by side, each place
    in the colour of its strongest part, and beside them what each part contributes: a row for each pair.

    The opacity of a place is the root of its part's strength, relative to the largest of the pair. Each part has a dark
    bar, its share with itself; a light bar, half of its shares with other parts; and a number, what it contributes in
    all. The bar "no part" is the residual. All bars of a pair add up to its score. Colours belong to one pair: part 1
    of another pair is another part.

    Args:
        query, reference (Tensor, array, PIL.Image or a list of them): B images each, as in
                    :func:`visualize_pair`.
        parts (SharedPartsExplanation): The explanation of these pairs, from :meth:`.SharedParts.explain`.
        titles, reference_titles, mean, std, use_pyplot: As in :func:`visualize_pair`.

    Returns:
        *tuple*: the Figure and its Axes, an array (B, 3).

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images = torch.rand(2, 3, 16, 16)
        >>> parts = SharedParts(encoder, encoder[1], n_parts=3).explain(images, images.flip(0))
        >>> figure, axes = visualize_parts(images, images.flip(0), parts, use_pyplot=False)
        >>> axes.shape
        (2, 3)
    """
    if not isinstance(parts, SharedPartsExplanation):
        raise TypeError(f"Expected `parts` to be what SharedParts.explain returns, but got {describe(parts)}.")
    rows = len(parts.maps)
    if parts.maps.ndim != 4 or not 0 < rows <= ROWS:
        raise ValueError(
            f"Expected `parts` to be those of 1 to {ROWS} pairs of images, (B, n, h, w), but got maps of shape"
            f" {tuple(parts.maps.shape)}."
        )
    sides = [pictures(name, images, rows, mean, std) for name, images in zip(SIDES, (query, reference))]
    captions = side_captions(titles, reference_titles, None, rows)
    maps = [M.detach().double().cpu() for M in (parts.maps, parts.reference_maps)]
    colours = part_colours(maps[0].shape[1])
    figure = new_figure(3, rows, use_pyplot)
    axes = figure.subplots(rows, 3, squeeze=False)
    for row in range(rows):
        strongest = max(float(M[row].max()) for M in maps) or 1.0
        for side in (0, 1):
            size = show(axes[row, side], sides[side][row].convert("L"), captions[side][row])
            axes[row, side].imshow(_coloured(maps[side][row] / strongest, size, colours))
        _bars(axes[row, 2], parts.shares[row], float(parts.residual[row]), float(parts.score[row]), colours)
    return figure, axes


def part_colours(n: int) -> NDArray[Any]:
    """Colours (n, 4), without grey, in which the images are drawn."""
    return FEW[:n] if n <= len(FEW) else np.asarray(colormaps["hsv"](np.arange(n) / n))


def _coloured(maps: Tensor, size: tuple[int, int], colours: NDArray[Any]) -> NDArray[Any]:
    """Maps (n, h, w) of parts in RGBA, interpolated to another size."""
    strength, part = torch.stack([resized(M, size) for M in maps]).max(0)
    rgba: NDArray[Any] = colours[part.numpy()]
    rgba[..., 3] = STRONGEST * np.sqrt(strength.clamp(0, 1).numpy())
    return rgba


def _bars(axis: Axes, shares: Tensor, residual: float, score: float, colours: NDArray[Any]) -> None:
    """Draws bars: what each part contributes with itself, and with others."""
    own: Sequence[float] = shares.diagonal().tolist()
    totals: Sequence[float] = ((shares.sum(0) + shares.sum(1)) / 2).tolist()
    n = len(own)
    for part, (alone, total, colour) in enumerate(zip(own, totals, colours)):
        rest = total - alone
        axis.barh(part, alone, color=colour)
        axis.barh(part, rest, left=alone if rest * alone > 0 else 0, color=colour, alpha=WITH_OTHERS)
    axis.barh(n, residual, color="0.7", hatch="//", edgecolor="white")
    axis.axvline(0, color="black", linewidth=0.8)
    said = [f"part {part + 1}: {_said(total, score)}" for part, total in enumerate(totals)]
    axis.set_yticks(range(n + 1), [*said, f"no part: {_said(residual, score)}"], fontsize="small")
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize="x-small")
    for edge in ("top", "right", "left"):
        axis.spines[edge].set_visible(False)
    axis.set_xlabel(f"contribution to the score, {score:.4g}\n(light: with other parts)", parse_math=False)


def _said(value: float, score: float) -> str:
    """A value as a share of the score; the value itself if the score is not positive."""
    return f"{round(100 * value / score)} %" if score > 0 else f"{value:.3g}"
