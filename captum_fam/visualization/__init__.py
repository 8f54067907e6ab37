"""Figures of maps over the images that they explain."""

import textwrap
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

from captum_fam._checks import describe
from captum_fam.comparison import Comparison
from captum_fam.visualization._captions import SIDES, Scores, Titles, as_titles, side_captions
from captum_fam.visualization._forms import Listed, Numbers, Pictures, Values, as_maps, panels, pictures
from captum_fam.visualization._panels import show
from captum_fam.visualization._parts import visualize_parts
from captum_fam.visualization._scales import (
    CHARACTERS,
    Scale,
    check_scale,
    draw_maps,
    draw_rows,
    limit_of,
    new_figure,
    value_range,
    width_of,
)

__all__ = [
    "Numbers",
    "Pictures",
    "Scale",
    "Scores",
    "Titles",
    "Values",
    "draw_maps",
    "new_figure",
    "pictures",
    "show",
    "visualize_comparison",
    "visualize_pair",
    "visualize_parts",
]

_LARGEST = {"all": "largest value", "row": "largest value of each row"}


def visualize_pair(
    query: Pictures,
    reference: Pictures,
    query_map: Listed,
    reference_map: Listed | None,
    *,
    titles: Titles = None,
    reference_titles: Titles = None,
    scores: Scores = None,
    mean: Numbers = None,
    std: Numbers = None,
    label: str = "attribution",
    scale: Scale = "all",
    signed: bool = False,
    use_pyplot: bool = True,
) -> tuple[Figure, NDArray[Any]]:
    r"""
    What in each of two images does a map show? Draws pairs of images side by side, each with its map over it: a row for
    each pair.

    All maps of the figure share one colour scale, unless ``scale`` says otherwise. Maps without negative values run
    from blue to red, and their opacity is the root of the value. If any map has negative values, all maps are red for
    positive and blue for negative ones. Maps are interpolated linearly to the size of their image. If a map is zero,
    constant, very coarse or not finite everywhere, a note under it says so.

    The shape of the maps tells whether these are images, signals or volumes. A signal is drawn as a line for each of
    its channels, 16 at most, with the map behind and below them. A volume is drawn as slices along D, 9 at most, and
    one of them has the map's largest absolute value.

    Args:
        query, reference (Tensor, array, PIL.Image or a list of them): B images each; a single one is drawn in every
                    row. One image is (C, H, W), (H, W, C) or (H, W), with 1, 3 or 4 channels; a batch has one dimension
                    more. An array (B, H, W) with B maps holds B images. Values are floats in [0, 1], or integers in
                    [0, 255], for uint16 in [0, 65535]; an array that leaves that range, or is all below 2 % of it, is
                    stretched, with a warning. PIL images may have any mode; mode I needs 16 bits, mode F values in
                    [0, 1]. Signals are (B, C, T), of any range. Volumes are (B, C, D, H, W), with one channel, or three
                    for colours; of other numbers the first channel is drawn. If a shape allows two of these, the error
                    says what to pass.
        query_map, reference_map (Tensor, array or a list of them): Their maps, as ``attribute_pair`` returns them:
                    (B, 1, h, w), (B, h, w) or (h, w), any size; (B, 1, t) for signals, (B, 1, d, h, w) for volumes; or
                    a list with the map of each image, such as :func:`~captum_fam.batch.read_maps` gives. Pass None as
                    ``reference_map`` if the references have none.
        titles (list, optional): One for each pair, written under its query.
                    Default: None
        reference_titles (list, optional): One for each pair, written under its reference.
                    Default: None
        scores (Tensor, array or list of float, optional): The similarity of each pair, (B,), written
                    under its reference with four digits.
                    Default: None
        mean, std (sequence of float, optional): Mean and standard deviation of each channel that the images were
                    normalised with. The figure undoes this, except for uint8 and PIL images.
                    Default: None
        label (str): Label of the colour scale.
                    Default: ``"attribution"``
        scale (str or float): Which value has the strongest colour: the largest absolute value of ``"all"`` maps, or of
                    the maps of each ``"row"``, or a percentile from 1 to 100 of all absolute values that are not zero.
                    The bar says which. Values beyond a percentile have the strongest colour, too; the bar and their map
                    say how many there are. A percentile keeps one extreme map from hiding the others, if it is below
                    the share of the other maps: of 8 pairs, below 87.
                    Default: ``"all"``
        signed (bool): Red for positive and blue for negative values even if no value is negative, for maps of a
                    difference.
                    Default: False
        use_pyplot (bool): Makes the figure with pyplot, so that a notebook shows it. This function itself never shows
                    it.
                    Default: True

    Returns:
        *tuple*: the Figure and its Axes, an array (B, 4), or (B, 3) without a ``reference_map``.

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> images, maps = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 7, 7)
        >>> figure, axes = visualize_pair(images, images.flip(0), maps, maps.flip(0), use_pyplot=False)
        >>> axes.shape
        (2, 4)
        >>> signals, maps = torch.randn(2, 22, 500), torch.rand(2, 1, 30)
        >>> figure, axes = visualize_pair(
        ...     signals, signals.flip(0), maps, maps.flip(0), scores=[0.8, 0.3], scale="row", use_pyplot=False
        ... )
    """
    check_scale(scale)
    given = [as_maps("query_map", query_map, query)]
    rows = len(given[0])
    given.append(given[0] if reference_map is None else as_maps("reference_map", reference_map, reference))
    if len(given[1]) != rows:
        raise ValueError(f"Expected `reference_map` to be {rows} maps, as `query_map` is, but got {len(given[1])}.")
    sides, maps = [], []
    for name, images, one in zip(SIDES, (query, reference), given):
        pictured, (values,) = panels(name, images, [one], mean, std)
        sides.append(pictured)
        maps.append(values)
    captions = side_captions(titles, reference_titles, scores, rows)
    mapped = 2 if reference_map is not None else 1  # sides
    figure = new_figure(2 + mapped, rows, use_pyplot)
    axes = figure.subplots(rows, 2 + mapped, squeeze=False)
    for side in (0, 1):
        for axis, panel, caption in zip(axes[:, 2 * side], sides[side], captions[side]):
            panel.draw(axis, caption)
    words = [[f"map of the {name}" for name in SIDES[:mapped]]] * rows
    shown, drawn = list(zip(*sides[:mapped])), list(zip(*maps[:mapped]))
    draw_rows(figure, axes[:, 1::2].tolist(), shown, drawn, words, label, scale, signed)
    return figure, axes


def visualize_comparison(
    images: Pictures,
    attributions: Mapping[str, Listed],
    *,
    titles: Titles = None,
    mean: Numbers = None,
    std: Numbers = None,
    scale: Scale = "all",
    use_pyplot: bool = True,
) -> tuple[Figure, NDArray[Any]]:
    r"""
    What do several methods show for the same images? Draws their maps: a row for each image, a column for each method.

    Methods have different units, so the values of each method are divided by its largest absolute value in the figure,
    or by what ``scale`` says. All maps then share one colour scale, as in :func:`visualize_pair`. Under each map stands
    the range of its own values. Methods that failed in :func:`~captum_fam.compare_attributions` are named at the foot,
    with the reason.

    Args:
        images (Tensor, array, PIL.Image or a list of them): B images, signals or volumes, as in
                    :func:`visualize_pair`.
        attributions (dict): Maps by the names of their methods, as
                    :func:`~captum_fam.compare_attributions` returns them: (B, 1, h, w),
                    (B, h, w) or (h, w), any size; (B, 1, t) for signals, (B, 1, d, h, w) for volumes; or a list with
                    the map of each image.
        titles (list, optional): One for each image.
                    Default: None
        scale (str or float): As in :func:`visualize_pair`, for each method by itself.
                    Default: ``"all"``
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
    check_scale(scale)
    given = {name: as_maps(f"attributions[{name!r}]", values, images) for name, values in attributions.items()}
    counts = {name: len(values) for name, values in given.items()}
    rows = next(iter(counts.values()))
    if set(counts.values()) != {rows}:
        raise ValueError(f"Expected `attributions` to hold equally many maps of each method, but got {counts}.")
    shown, maps = panels("images", images, list(given.values()), mean, std)
    titles = as_titles(titles, rows)
    failures = attributions.failures if isinstance(attributions, Comparison) else {}
    foot = [
        line
        for name, why in failures.items()
        for line in textwrap.wrap(f"{name} has no map: {why}", int(CHARACTERS * width_of(1 + len(maps))))
    ]
    figure = new_figure(1 + len(maps), rows, use_pyplot, foot)
    figure.supxlabel("\n".join(foot), fontsize="small", x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(rows, 1 + len(maps), squeeze=False)
    for axis, panel, title in zip(axes[:, 0], shown, titles):
        panel.draw(axis, title)
    for axis, name in zip(axes[0, 1:], given):
        axis.set_title(name, fontsize="medium", parse_math=False)
    relative = []
    for values in maps:
        limits = [limit_of([v], "all") for v in values] if scale == "row" else [limit_of(values, scale)] * rows
        relative += [v / limit for v, limit in zip(values, limits)]
    draw_maps(
        figure,
        axes[:, 1:].T.flat,
        shown * len(maps),
        relative,
        [value_range(v) for values in maps for v in values],
        f"share of the {_LARGEST.get(str(scale), 'limit of its method')}",
        scale="all" if scale == "row" else scale,
        limit=1.0,
    )
    return figure, axes
