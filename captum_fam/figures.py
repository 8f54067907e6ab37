"""Figures of maps over the images that they explain."""

from collections.abc import Iterable, Sequence

import numpy as np
from captum.attr import LayerAttribution
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

STRONGEST = 0.85  # opacity of a figure's largest map value over its image, in grey
LONGEST = 512  # pixels of an image's longer side in a figure
NARROWEST = 4  # an image is drawn at no more than this ratio of its sides
# Red speaks for, blue against; opacity carries the value, so that zero is clear.
SIGNED = LinearSegmentedColormap.from_list("signed", ["#0033dd", "white", "#dd1100"])


def map_row(
    figure: Figure,
    axes: Iterable[Axes],
    images: Sequence[Image.Image],
    maps: Tensor,
    captions: Sequence[str],
    label: str,
) -> None:
    """
    Draws maps (N, h, w) over N images on one colour scale, with its bar.

    Maps without negative values run from blue to red, their opacity with the root of the
    value; signed ones are red for positive and blue for negative values. A map of zeros is
    said to be one.
    """
    axes = list(axes)
    limit = maps.abs().max().item() or 1.0
    signed = bool((maps < 0).any())
    scale = ScalarMappable(Normalize(-limit if signed else 0, limit), SIGNED if signed else "turbo")
    for axis, image, values, caption in zip(axes, images, maps, captions):
        height, width = show(axis, image.convert("L"), caption if values.any() else f"{caption}\n(the map is zero)")
        resized = LayerAttribution.interpolate(values[None, None].float(), (height, width), "bilinear")[0, 0].numpy()
        strength = np.abs(resized) / limit
        if signed:
            axis.imshow(SIGNED((resized > 0).astype(float))[..., :3], alpha=STRONGEST * strength.clip(0, 1))
        else:
            axis.imshow(scale.to_rgba(resized)[..., :3], alpha=STRONGEST * np.sqrt(strength).clip(0, 1))
    figure.colorbar(scale, ax=axes, label=label, fraction=0.02, pad=0.01, aspect=30)


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
    maps: Tensor,
    reference_maps: Tensor,
    captions: Sequence[str],
    reference_captions: Sequence[str],
    label: str,
) -> Figure:
    """
    The query, its maps (K, h, w) for K references, and below each the reference with its own map.
    """
    columns = len(references) + 1
    figure = Figure(figsize=(2.6 * columns + 0.6, 5.8), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    show(axes[0, 0], query, "query")
    axes[1, 0].axis("off")
    map_row(figure, axes[0, 1:], [query] * len(references), maps, captions, label)
    map_row(figure, axes[1, 1:], references, reference_maps, reference_captions, "FAM")
    return figure
