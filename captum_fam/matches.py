"""The strongest matches between the places of two images, and their figure."""

from collections.abc import Iterable, Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_fam._checks import check_positive, check_square, describe
from captum_fam.visualization._captions import SIDES, Scores, Titles, side_captions
from captum_fam.visualization._forms import Listed, Numbers, Pictures, Values, as_one, pictures, real
from captum_fam.visualization._panels import Colours, show
from captum_fam.visualization._scales import Scale, beyond, check_scale, colour_bar, limit_of, new_figure

DIMMED = 0.65  # opacity of the white over what is outside the boxes
WIDTH, HEIGHT = 8.0, 3.6  # of a row, in inches
MARGIN = 0.13  # around images, in inches: the numbers of boxes at their edges are beyond them
GAP = 0.2  # between the images, where lines are seen best
NUMBER, BESIDE = 7, 3.5  # points: the size of a number, and from a box's corner to its middle, either way
STROKE: dict[str, Any] = {  # of boxes and lines: outlined, as yellow is not seen on white paper
    "linewidth": 1.5,
    "path_effects": [withStroke(linewidth=2.2, foreground="0.3")],
}


def visualize_matches(
    query: Pictures,
    reference: Pictures,
    matrix: Listed,
    n: int = 8,
    *,
    titles: Titles = None,
    reference_titles: Titles = None,
    scores: Scores = None,
    mean: Numbers = None,
    std: Numbers = None,
    label: str = "match",
    scale: Scale = "all",
    use_pyplot: bool = True,
) -> tuple[Figure, NDArray[Any]]:
    r"""
    Which place of one image matches which place of the other? Draws pairs of images side by side, a row for each pair,
    with their strongest matches: numbered boxes, joined by lines in the colour of the match's value. The rest of the
    images is dimmed.

    A match is mutual: its value is positive, and no other value of its two places is larger. If the places of two
    matches touch, in one of the images or in both, only the stronger match is drawn. All matches of the figure share
    one colour scale, from zero, unless ``scale`` says otherwise. If a pair of images has no match, a note under it says
    so.

    Args:
        query, reference (Tensor, array, PIL.Image or a list of them): B images each, as in
                    :func:`visualize_pair`.
        matrix (Tensor, array or a list of them): A value for each place of the query with each place of the reference:
                    (B, N, N') or (N, N') where both grids are square, else (B, h, w, h', w') or (h, w, h', w').
                    :meth:`.SimilarityDecomposition.attribute_matrix` returns what they contribute to the score,
                    :meth:`.CorrespondenceMap.attribute_matrix` how much they look alike.
        n (int): How many matches of a pair are drawn at most.
                    Default: 8
        titles, reference_titles, scores, mean, std, use_pyplot: As in :func:`visualize_pair`.
        label (str): Label of the colour scale.
                    Default: ``"match"``
        scale (str or float): As in :func:`visualize_pair`, for the matches that are drawn.
                    Default: ``"all"``

    Returns:
        *tuple*: the Figure and its Axes, an array (B, 2).

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> images, matrix = torch.rand(2, 3, 64, 64), torch.rand(2, 49, 49)
        >>> figure, axes = visualize_matches(images, images.flip(0), matrix, use_pyplot=False)
        >>> axes.shape
        (2, 2)
    """
    check_positive("n", n)
    check_scale(scale)
    matrix = as_one("matrix", matrix, batches=(3, 5))
    matrices = as_matrices("matrix", matrix)
    rows = len(matrices)
    images = [pictures(name, given, rows, mean, std) for name, given in zip(SIDES, (query, reference))]
    check_squares("matrix", matrix, images)
    captions = side_captions(titles, reference_titles, scores, rows)
    found = [strongest_matches(values, n) for values in matrices]
    strengths = [
        values.flatten(2).flatten(0, 1)[tuple(zip(*pairs))] if pairs else values.new_empty(0)
        for values, pairs in zip(matrices, found)
    ]
    groups = [[row] for row in range(rows)] if scale == "row" else [list(range(rows))]
    each = [torch.cat([strengths[row] for row in group]) for group in groups]
    colours = [Colours(limit_of([values], scale), signed=False) for values in each]
    figure = new_figure(2, rows, use_pyplot)
    figure.set_size_inches(WIDTH, HEIGHT * rows)
    figure.set_layout_engine("constrained", w_pad=MARGIN, h_pad=MARGIN)
    axes = figure.subplots(rows, 2, squeeze=False, gridspec_kw={"wspace": GAP})
    for row, (values, pairs, strength) in enumerate(zip(matrices, found, strengths)):
        boxes = []
        bar = colours[row if scale == "row" else 0].bar
        for side in (0, 1):
            lines = [captions[side][row], *_lacks(values, pairs)]
            size = show(axes[row, side], images[side][row], "\n".join(filter(None, lines)))
            grid, places = values.shape[2 * side : 2 * side + 2], [pair[side] for pair in pairs]
            _dim(axes[row, side], size, grid, places)
            boxes.append(draw_boxes(axes[row, side], size, grid, places, bar.to_rgba(strength.numpy())))
        for number, pair in enumerate(zip(*boxes), 1):
            _join(figure, str(number), axes[row], pair)
    for group, values, colour in zip(groups, each, colours):
        colour_bar(figure, list(axes[group].flat), colour, label, scale, beyond(values, colour.limit), len(values))
    return figure, axes


def as_matrices(name: str, matrix: Values) -> list[Tensor]:
    """Matrices (h, w, h', w') of two images' places, in float64 on the CPU."""
    if not isinstance(matrix, (Tensor, np.ndarray)):
        raise TypeError(f"Expected `{name}` to be a real tensor or array, but got {describe(matrix)}.")
    values = torch.from_numpy(np.array(real(name, matrix), np.float64, order="C"))  # without negative strides
    if values.ndim in (2, 3) and values.numel():
        h, h2 = (isqrt(size) for size in values.shape[-2:])
        if values.shape[-2:] == (h * h, h2 * h2):
            values = values.reshape(-1, h, h, h2, h2)
    if values.ndim == 4:
        values = values[None]
    if values.ndim != 5 or not values.numel():
        raise ValueError(
            f"Expected `{name}` to be matrices (B, N, N') or (N, N') of square grids, or (B, h, w, h', w') or"
            f" (h, w, h', w'), but got shape {tuple(matrix.shape)}; for other grids, pass"
            f" {name}.reshape(-1, h, w, h', w')."
        )
    return list(values)


def check_squares(name: str, matrix: Values, images: Sequence[Sequence[Image.Image]]) -> None:
    """Raises an error where the number of places is square, but another grid has the form of their image."""
    if matrix.ndim > 3:
        return
    for side, places, shown in zip(SIDES, matrix.shape[-2:], images):
        for width, height in {image.size for image in shown}:
            check_square(name, side, places, (height, width))


def strongest_matches(values: Tensor, n: int) -> list[tuple[int, int]]:
    """
    At most n pairs (place of the query, place of the reference), as numbers in row-major order, strongest first. Each
    is finite, positive and the largest of both its row and its column in values (h, w, h', w'). Of two pairs whose
    places touch, in one image or the other, only the stronger is kept; of equal ones, the first.
    """
    h, w, h2, w2 = values.shape
    matrix = values.reshape(h * w, h2 * w2).double().numpy()
    matrix = np.where(np.isfinite(matrix), matrix, -np.inf)
    best, back = matrix.argmax(1), matrix.argmax(0)  # of equals the first, which torch does not promise
    largest = matrix[np.arange(h * w), best]
    mutual = np.flatnonzero((back[best] == np.arange(h * w)) & (largest > 0))
    kept: list[tuple[int, int]] = []
    for i in mutual[np.argsort(-largest[mutual], kind="stable")].tolist():
        j = int(best[i])
        if len(kept) < n and not any(_touch(i, a, w) or _touch(j, b, w2) for a, b in kept):
            kept.append((i, j))
    return kept


def _touch(one: int, other: int, width: int) -> bool:
    """Whether two places of a grid are the same or neighbours."""
    (y, x), (v, u) = divmod(one, width), divmod(other, width)
    return max(abs(y - v), abs(x - u)) <= 1


def _dim(axis: Axes, size: tuple[int, int], grid: Sequence[int], places: Sequence[int]) -> None:
    """Dims an image of that height and width, except for some places of the grid."""
    (height, width), (h, w) = size, grid
    veil = np.ones((h * w, 4))
    veil[:, 3] = DIMMED
    veil[places, 3] = 0
    edges = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(veil.reshape(h, w, 4), extent=edges, interpolation="nearest")


def draw_boxes(
    axis: Axes, size: tuple[int, int], grid: Sequence[int], places: Sequence[int], colours: Iterable[Any]
) -> list[Rectangle]:
    """Draws boxes around places of the grid over an image of that height and width."""
    (height, width), (h, w) = size, grid
    boxes = []
    for place, colour in zip(places, colours):
        corner = (place % w * width / w - 0.5, place // w * height / h - 0.5)
        boxes.append(Rectangle(corner, width / w, height / h, fill=False, edgecolor=colour, **STROKE))
        axis.add_patch(boxes[-1])
    return boxes


def _join(figure: Figure, number: str, axes: Sequence[Axes], boxes: Sequence[Rectangle]) -> None:
    """Draws a line between two boxes, and their number at each, on the figure itself: so no axes hide them."""
    (left, top), (right, above), colour = boxes[0].get_xy(), boxes[1].get_xy(), boxes[0].get_edgecolor()
    outer = ((left, top), (right + boxes[1].get_width(), above))
    inner = ((left + boxes[0].get_width(), top + boxes[0].get_height() / 2), (right, above + boxes[1].get_height() / 2))
    line = ConnectionPatch(*inner, "data", "data", axesA=axes[0], axesB=axes[1], edgecolor=colour, **STROKE)
    figure.add_artist(line)
    # Beside the outer corner of its box, which may be smaller than the number, and away from the line.
    for axis, corner, away in zip(axes, outer, (-BESIDE, BESIDE)):
        figure.add_artist(
            Annotation(
                number,
                corner,
                (away, BESIDE),
                xycoords=axis.transData,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=NUMBER,
                zorder=3,
                bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": colour},
            )
        )


def _lacks(values: Tensor, pairs: Sequence[tuple[int, int]]) -> list[str]:
    """What to know of a matrix before reading its matches."""
    missing = int((~values.isfinite()).sum())
    said = [f"{missing} of {values.numel()} values are not finite"] if missing else []
    return [f"({line})" for line in said + ["no mutual matches"] * (not pairs)]
