"""The demonstration: collages of photographs, explained with the bundled encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from skimage import data
from skimage.io import imread
from torch import Tensor

from captum_fam import visualization
from captum_fam.bundled import BundledEncoder, bundled_encoder
from captum_fam.engine.untouched import embed
from captum_fam.explorer import PairExplorer, explore_pair
from captum_fam.images import to_tensor
from captum_fam.matches import as_matrices, draw_boxes, strongest_matches
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition

# What both images have in common, and what is particular to the match: only that of the decomposition adds up to zero.
_ROWS: tuple[tuple[Any, str | None], ...] = ((FeatureActivationMap, None), (SimilarityDecomposition, "self"))
PARTS, COLUMNS = 4, 2  # of the collage
_MOST_SIMILAR_FIRST = ("coffee", "astronaut", "cat", "rocket")  # to the collage
BATCH = 5  # collages at once: more are slower, as the first layers take much memory
MATCHES = 3  # that are numbered in the figure
UNTRAINED = 3  # encoders with random weights that the figures of the untrained encoder are a mean of


@dataclass(frozen=True)
class Shares:
    """The share of the positive map inside the reference's part, for each case: by FAM, and with "self"."""

    fam: Tensor
    contrast: Tensor


def photographs() -> dict[str, Image.Image]:
    """
    Which photographs can I try without a download? The colour photographs of everyday things that
    scikit-image and matplotlib install.

    Returns:
        *dict*: square RGB images (``PIL.Image.Image``) by name, each the centre of its photograph.

    Examples::

        >>> from captum_fam.demo import photographs
        >>> list(photographs())
        ['astronaut', 'cat', 'coffee', 'rocket', 'motorcycle', 'admiral']
    """
    hopper = imread(get_sample_data("grace_hopper.jpg", asfileobj=False))
    arrays = {
        "astronaut": data.astronaut(),
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "motorcycle": data.stereo_motorcycle()[0],
        "admiral": hopper,
    }
    return {name: ImageOps.fit(Image.fromarray(a), (min(a.shape[:2]),) * 2) for name, a in arrays.items()}


def another_view(photo: Image.Image) -> Image.Image:
    """
    How do I make a match without a second photograph? Another view of the first: cropped, mirrored
    and brighter.

    Args:
        photo (PIL.Image.Image): A square RGB photograph.

    Returns:
        *PIL.Image.Image*: the view, with 80 % of the photograph's width and 85 % of its height.

    Examples::

        >>> from captum_fam.demo import another_view, photographs
        >>> cat = photographs()["cat"]
        >>> cat.size, another_view(cat).size
        ((300, 300), (240, 255))
    """
    side = photo.width
    crop = photo.crop((side // 10, side // 20, side - side // 10, side - side // 10))
    return ImageOps.mirror(crop).point(lambda value: min(255, round(1.25 * value)))


def collage(photos: Sequence[Image.Image], columns: int, side: int = 256) -> Image.Image:
    """
    How do I make a query that shows several things? One image of several photographs, side by side.

    Args:
        photos (sequence of PIL.Image.Image): Square photographs, row by row; only full rows are
                    drawn.
        columns (int): How many stand in a row.
        side (int): Width and height of each in pixels.
                    Default: 256

    Returns:
        *PIL.Image.Image*: the collage, columns · side pixels wide and rows · side pixels high.

    Examples::

        >>> from captum_fam.demo import collage, photographs
        >>> collage(list(photographs().values()), columns=3, side=100).size
        (300, 200)
    """
    rows = len(photos) // columns
    canvas = Image.new("RGB", (columns * side, rows * side))
    for i, photo in enumerate(photos):
        canvas.paste(photo.resize((side, side)), (i % columns * side, i // columns * side))
    return canvas


def shares(maps: Tensor, rows: int, columns: int) -> Tensor:
    """The share of each positive map (N, h, w) inside each part of a collage: (N, rows * columns)."""
    height, width = maps.shape[1] // rows, maps.shape[2] // columns
    parts = maps.clamp(min=0).reshape(-1, rows, height, columns, width).sum((2, 4)).flatten(1)
    return parts / parts.sum(1, keepdim=True)


def explain(encoder: BundledEncoder, parts: Sequence[Image.Image], columns: int) -> tuple[Tensor, Tensor]:
    """What a collage has in common with another view of each of its parts, and what is particular to the match."""
    query, s = _collage(encoder, parts, columns), _views(encoder, parts)
    maps = [
        method(encoder, encoder.features).attribute_all(query, reference_embedding=s, contrast=contrast)[0]
        for method, contrast in _ROWS
    ]
    return maps[0], maps[1]


def all_pairs(encoder: BundledEncoder, photos: Sequence[Image.Image]) -> Shares:
    """Shares over the collages of all ordered pairs of photos, each with both its references."""
    squares, s = _tensors(encoder, photos), _views(encoder, photos)
    left, right = (list(side) for side in zip(*permutations(range(len(photos)), 2)))
    queries = torch.cat([squares[left], squares[right]], 3)
    found = []
    for method, contrast in _ROWS:
        explainer, halves = method(encoder, encoder.features), []
        for half, target in enumerate((left, right)):
            parts = zip(queries.split(BATCH), torch.tensor(target).split(BATCH))
            maps = torch.cat(
                [explainer.attribute(x, own, reference_embedding=s, contrast=contrast) for x, own in parts]
            )
            halves.append(shares(maps[:, 0], 1, 2)[:, half])
        found.append(torch.cat(halves))
    return Shares(*found)


def _collage(encoder: BundledEncoder, parts: Sequence[Image.Image], columns: int) -> Tensor:
    """A collage as the encoder sees it, each part as large as the encoder sees a photo, (1, 3, H, W)."""
    squares = _tensors(encoder, parts)
    rows = [torch.cat(list(squares[i : i + columns]), 2) for i in range(0, len(parts), columns)]
    return torch.cat(rows, 1)[None]


def _views(encoder: BundledEncoder, photos: Sequence[Image.Image]) -> Tensor:
    """Embeddings of another view of each photo."""
    return embed(encoder, "photos", (_tensors(encoder, [another_view(p) for p in photos]),), None, None)


def _tensors(encoder: BundledEncoder, photos: Sequence[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(p, encoder.size, encoder.mean, encoder.std) for p in photos])


def untrained_encoder(seed: int) -> BundledEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BundledEncoder().eval()


def demo_page() -> PairExplorer:
    """The page of the demonstration: the collage, another view of each of its parts, and a photo that is not in it."""
    photos, encoder = photographs(), bundled_encoder()
    parts, name = list(photos)[:PARTS], list(photos)[PARTS]
    views = {part: another_view(photos[part]) for part in _MOST_SIMILAR_FIRST}
    query, control = [photos[part] for part in parts], photos[name]
    return explore_pair(
        _collage(encoder, query, COLUMNS),
        _tensors(encoder, list(views.values())),
        SimilarityDecomposition(encoder, encoder.features),
        control=_tensors(encoder, [control]),
        photos=[collage(query, COLUMNS), *views.values(), control],
        titles=["a collage", *(f"another view of the {part}" for part in views), name],
    )


def _draw_matches(axes: tuple[Any, Any], sizes: tuple[Any, Any], values: Tensor) -> None:
    """Numbers the strongest matches in both images."""
    pairs = strongest_matches(values, MATCHES)
    for side, (axis, size) in enumerate(zip(axes, sizes)):
        grid = values.shape[2 * side : 2 * side + 2]
        boxes = draw_boxes(axis, size, grid, [pair[side] for pair in pairs], ["white"] * len(pairs))
        for number, box in enumerate(boxes, 1):
            corner = (box.get_x(), box.get_y())
            label = {"boxstyle": "circle,pad=0.15", "facecolor": "black", "edgecolor": "white", "linewidth": 0.5}
            axis.annotate(
                str(number),
                corner,
                (-3, 3),
                textcoords="offset points",
                color="white",
                fontsize=6,
                ha="center",
                va="center",
                bbox=label,
            )


def demo_figure() -> tuple[Figure, list[str]]:
    """The figure of the demonstration and the lines of its table."""
    photos = photographs()
    names = list(photos)[:PARTS]
    parts = [photos[name] for name in names]
    encoder = bundled_encoder()
    plain, own = explain(encoder, parts, COLUMNS)
    inside = Shares(*(shares(maps, PARTS // COLUMNS, COLUMNS).diagonal() for maps in (plain, own)))

    query, views = collage(parts, COLUMNS), [another_view(photo) for photo in parts]
    columns = len(names) + 1
    figure = Figure(figsize=(2.6 * columns + 0.6, 8.4), layout="constrained")
    figure.suptitle("Why is the collage similar to each reference? Numbers mark the strongest matches of places.")
    axes = figure.subplots(3, columns)
    here = visualization.show(axes[0, 0], query, "query: a collage")
    axes[1, 0].axis("off")
    axes[2, 0].axis("off")
    for row, (maps, share, label) in enumerate(
        ((own, inside.contrast, 'particular to this match: "self"'), (plain, inside.fam, "in common: FAM")), 1
    ):
        captions = [f"{s:.0%} on the {name} (chance 25%)" for name, s in zip(names, share.tolist())]
        visualization.draw_maps(figure, axes[row, 1:], [query] * len(names), list(maps), captions, label)
    # A pair of places is a part of the score.
    match, z = SimilarityDecomposition(encoder, encoder.features), _collage(encoder, parts, COLUMNS)
    for column, (name, view) in enumerate(zip(names, views), 1):
        there = visualization.show(axes[0, column], view, f"reference: {name}")
        (matrix,) = as_matrices("matrix", match.attribute_matrix(z, _tensors(encoder, [view])))  # type: ignore[arg-type]
        _draw_matches((axes[1, column], axes[0, column]), (here, there), matrix)

    every = list(photos.values())
    ours = all_pairs(encoder, every)
    random = [all_pairs(untrained_encoder(seed), every) for seed in range(UNTRAINED)]
    untrained = Shares(*(torch.cat([getattr(s, field) for s in random]) for field in ("fam", "contrast")))
    return figure, [
        "How much of the positive map lies on the reference's part of the collage?",
        "FAM: what both images have in common. self: what is particular to this match.",
        "",
        f"{'the figure':<34}{'FAM':>8}{'self':>10}{'chance':>8}",
        *(
            f"{name:<34}{f:>8.2f}{c:>10.2f}{0.25:>8.2f}"
            for name, f, c in zip(names, inside.fam.tolist(), inside.contrast.tolist())
        ),
        "",
        f"{f'{len(ours.fam)} cases: all ordered pairs of {len(every)}':<34}{'FAM':>8}{'self':>10}{'chance':>8}",
        *(
            f"{name:<34}{s.fam.mean():>8.2f}{s.contrast.mean():>10.2f}{0.5:>8.2f}"
            for name, s in (("bundled encoder, mean", ours), (f"untrained, mean of {UNTRAINED} seeds", untrained))
        ),
        *(
            f"{name:<34}{above(s.fam):>8.0%}{above(s.contrast):>10.0%}"
            for name, s in (("bundled encoder, above chance", ours), ("untrained, above chance", untrained))
        ),
    ]


def above(share: Tensor, chance: float = 0.5) -> float:
    return (share > chance).float().mean().item()
