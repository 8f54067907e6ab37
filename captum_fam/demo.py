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
from captum_fam.images import to_tensor
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition

# What both images have in common, and what is particular to the match: only the decomposition's adds up to zero.
_ROWS: tuple[tuple[Any, str | None], ...] = ((FeatureActivationMap, None), (SimilarityDecomposition, "self"))
UNTRAINED = 3  # encoders with random weights that the figures of the untrained encoder are a mean of


@dataclass(frozen=True)
class Shares:
    """Share of the positive map inside the reference's part of the collage, for each case: FAM, contrast="self"."""

    fam: Tensor
    contrast: Tensor


def photographs() -> dict[str, Image.Image]:
    """
    All colour photographs of everyday things that scikit-image and matplotlib install, as centre squares.

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
    A square photograph in another crop and size, mirrored, and in brighter light.

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
    Squares of ``side`` pixels, in rows of ``columns``.

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
    squares = _tensors(encoder, parts)
    rows = [torch.cat(list(squares[i : i + columns]), 2) for i in range(0, len(parts), columns)]
    query, s = torch.cat(rows, 1)[None], _views(encoder, parts)
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
        explainer = method(encoder, encoder.features)
        halves = [
            shares(explainer.attribute(queries, target, reference_embedding=s, contrast=contrast)[:, 0], 1, 2)[:, half]
            for half, target in enumerate((left, right))
        ]
        found.append(torch.cat(halves))
    return Shares(*found)


def _views(encoder: BundledEncoder, photos: Sequence[Image.Image]) -> Tensor:
    """Embeddings of another view of each photo."""
    return embed(encoder, "photos", (_tensors(encoder, [another_view(p) for p in photos]),), None, None)


def _tensors(encoder: BundledEncoder, photos: Sequence[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(p, encoder.size, encoder.mean, encoder.std) for p in photos])


def untrained_encoder(seed: int) -> BundledEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BundledEncoder().eval()


def demo_figure() -> tuple[Figure, list[str]]:
    """The figure of the demonstration and the lines of its table."""
    photos = photographs()
    names = list(photos)[:4]
    parts = [photos[name] for name in names]
    encoder = bundled_encoder()
    plain, own = explain(encoder, parts, 2)
    inside = Shares(*(shares(maps, 2, 2).diagonal() for maps in (plain, own)))

    query = collage(parts, 2)
    columns = len(names) + 1
    figure = Figure(figsize=(2.6 * columns + 0.6, 8.4), layout="constrained")
    axes = figure.subplots(3, columns)
    visualization.show(axes[0, 0], query, "query: a collage")
    axes[1, 0].axis("off")
    axes[2, 0].axis("off")
    for axis, name in zip(axes[0, 1:], names):
        visualization.show(axis, another_view(photos[name]), f"reference: {name}")
    for row, maps, share, label in (
        (1, plain, inside.fam, "in common: FAM"),
        (2, own, inside.contrast, 'particular to this match: "self"'),
    ):
        captions = [f"{s:.0%} inside (chance 25%)" for s in share.tolist()]
        visualization.draw_maps(figure, axes[row, 1:], [query] * len(names), list(maps), captions, label)

    every = list(photos.values())
    ours = all_pairs(encoder, every)
    random = [all_pairs(untrained_encoder(seed), every) for seed in range(UNTRAINED)]
    untrained = Shares(*(torch.cat([getattr(s, field) for s in random]) for field in ("fam", "contrast")))
    return figure, [
        "Share of the positive map inside the reference's part of the collage",
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
