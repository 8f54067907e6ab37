"""What is drawn under a map: a picture, the lines of a signal, or slices of a volume."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

LONGEST = 512  # pixels of an image's longer side in a figure
NARROWEST = 4  # the largest ratio of the sides of an image, as it is drawn
STRONGEST = 0.85  # opacity of a figure's largest map value over its image, in grey
LANES = 16  # channels of a signal, at most
STRIP = 0.15  # of their height, below them: there no line hides the map
FLAT = 0.75  # height of a signal's axes, of their width
SLICES = 9  # of a volume, at most
GAP = 4  # pixels between slices

# Red speaks for, blue against; opacity carries the value, so that zero is clear.
SIGNED = LinearSegmentedColormap.from_list("signed", ["#0033dd", "white", "#dd1100"])


@dataclass(frozen=True)
class Colours:
    """The colours of values up to a limit, and from minus the limit if signed; values beyond it look like the limit."""

    limit: float
    signed: bool

    @property
    def bar(self) -> ScalarMappable:
        low = -self.limit if self.signed else 0
        return ScalarMappable(Normalize(low, self.limit), SIGNED if self.signed else "turbo")

    def clipped(self, values: Tensor) -> Tensor:
        """Values clipped to the limit: interpolated unclipped, a value beyond it would colour its neighbours."""
        return finite(values).clamp(-self.limit, self.limit)

    def __call__(self, values: Tensor, size: tuple[int, int]) -> NDArray[Any]:
        """A map (h, w) in RGBA, interpolated to another size."""
        shown = resized(self.clipped(values), size).numpy()
        strength = (np.abs(shown) / self.limit).clip(0, 1)
        rgba = SIGNED((shown > 0).astype(float)) if self.signed else self.bar.to_rgba(shown)
        return np.dstack([rgba[..., :3], STRONGEST * (strength if self.signed else np.sqrt(strength))])


class Panel(Protocol):
    def draw(self, axis: Axes, caption: str, values: Tensor | None = None, colours: Colours | None = None) -> None:
        """Draws it with a caption below it and, where there are values, a map in its colours."""


@dataclass(frozen=True)
class Photo:
    image: Image.Image

    def draw(self, axis: Axes, caption: str, values: Tensor | None = None, colours: Colours | None = None) -> None:
        size = show(axis, self.image if values is None else self.image.convert("L"), caption)
        if values is not None and colours is not None:
            # The opacity is in the image: matplotlib before 3.11 silently ignores an array of opacities.
            axis.imshow(colours(values, size))


@dataclass(frozen=True)
class Signal:
    """Channels (C, T), each a line in its lane, on its own scale, and the map behind and below them."""

    channels: NDArray[np.float64]

    def draw(self, axis: Axes, caption: str, values: Tensor | None = None, colours: Colours | None = None) -> None:
        C, T = self.channels.shape
        shown = np.linspace(0, C - 1, min(C, LANES)).round().astype(int)
        places, lines = _lanes(self.channels[shown])
        edges = (-0.5, T - 0.5, 0.4 - len(shown) * (1 + STRIP), 0.6)
        if values is not None and colours is not None:
            axis.imshow(colours(values[None], (1, LONGEST)), extent=edges, aspect="auto", zorder=0)
        axis.plot(
            places, lines.T, color="black", linewidth=0.7, path_effects=[withStroke(linewidth=1.7, foreground="w")]
        )
        axis.set(xlim=edges[:2], ylim=edges[2:], yticks=[])
        axis.set_box_aspect(FLAT)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.tick_params(labelsize="x-small")
        said = self._said() if values is None else []
        axis.set_xlabel("\n".join(filter(None, [caption, *(f"({line})" for line in said)])), parse_math=False)

    def _said(self) -> list[str]:
        C, T = self.channels.shape
        said = [f"{C if C <= LANES else f'{LANES} of {C}'} channels, own scales"] if C > 1 else []
        if T < C:
            said.append(f"more channels than values: {T}")  # time and channels may have been mixed up
        empty = int((~np.isfinite(self.channels)).all(1).sum())
        if empty:
            said.append("no value is finite" + (f" in {empty} of {C} channels" if empty < C else ""))
        return said


def _lanes(channels: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Places (n,) and heights (C, n) of lines, each over all of its lane of height one, the first on top."""
    values = np.where(np.isfinite(channels), channels, np.nan)
    lows, highs = np.fmin.reduce(values, 1), np.fmax.reduce(values, 1)
    T, places = values.shape[1], np.arange(values.shape[1])
    if T > 2 * LONGEST:  # of each column the lowest and the highest value, so that no peak is lost
        starts = np.linspace(0, T, LONGEST, endpoint=False).astype(int)
        places = np.repeat(starts, 2)
        values = np.stack([np.fmin.reduceat(values, starts, 1), np.fmax.reduceat(values, starts, 1)], -1)
        values = values.reshape(len(values), -1)
    middle, span = lows / 2 + highs / 2, highs / 2 - lows / 2
    heights = (values - middle[:, None]) / np.where(span > 0, span, 1)[:, None] / 2
    return places, heights - np.arange(len(values))[:, None]


@dataclass(frozen=True)
class Slices:
    """Some slices of a volume, their numbers, and how many slices the volume has."""

    images: Sequence[Image.Image]
    numbers: Sequence[int]
    depth: int
    note: str

    @classmethod
    def of(cls, volume: Sequence[Image.Image], note: str, maps: Sequence[Tensor]) -> "Slices":
        """Evenly spaced slices, and for each map (d, h, w) the slice with its largest absolute value."""
        depth = len(volume)
        keep = list(dict.fromkeys(s for m in maps if (s := _strongest(m, depth)) is not None))[:SLICES]
        rest = [s for s in np.linspace(0, depth - 1, min(depth, SLICES)).round().astype(int).tolist() if s not in keep]
        rest.sort(key=lambda s: -min((abs(s - k) for k in keep), default=0))
        numbers = sorted(keep + rest[: min(depth, SLICES) - len(keep)])
        return cls([volume[s] for s in numbers], numbers, depth, note)

    def draw(self, axis: Axes, caption: str, values: Tensor | None = None, colours: Colours | None = None) -> None:
        strongest = None if values is None else _strongest(values, self.depth)
        said = [f"slices of {self.depth}, from 0", self.note] if values is None else []
        said += [] if strongest is None else [f"strongest in slice {strongest}"]
        width, height = drawn_size(self.images[0], LONGEST / ceil(sqrt(len(self.images))))
        tiles = [image.resize((width, height)) for image in self.images]
        whole = montage([np.asarray(tile if values is None else tile.convert("L")) for tile in tiles], 255)
        axis.imshow(whole, cmap="gray", vmin=0, vmax=255)
        if values is not None and colours is not None:
            each = _along_depth(colours.clipped(values), self.depth)[list(self.numbers)]
            axis.imshow(montage([colours(part, (height, width)) for part in each], 0))
        across = ceil(sqrt(len(tiles)))
        for n, number in enumerate(self.numbers):
            corner = (n % across * (width + GAP) + 0.03 * LONGEST / across, n // across * (height + GAP))
            axis.text(
                *corner,
                str(number),
                color="white",
                va="top",
                fontsize="x-small",
                fontweight="bold" if number == strongest else "normal",
                path_effects=[withStroke(linewidth=1.5, foreground="black")],
            )
        axis.set(xticks=[], yticks=[])
        lines = [caption, *(f"({line})" for line in said if line)]
        axis.set_xlabel("\n".join(filter(None, lines)), parse_math=False)


def montage(tiles: Sequence[NDArray[Any]], ground: int) -> NDArray[Any]:
    """Tiles of one size (h, w, ...) in rows."""
    across = ceil(sqrt(len(tiles)))
    (h, w), down = tiles[0].shape[:2], ceil(len(tiles) / across)
    size = (down * (h + GAP) - GAP, across * (w + GAP) - GAP, *tiles[0].shape[2:])
    whole = np.full(size, ground, tiles[0].dtype)
    for n, tile in enumerate(tiles):
        y, x = n // across * (h + GAP), n % across * (w + GAP)
        whole[y : y + h, x : x + w] = tile
    return whole


def _along_depth(values: Tensor, depth: int) -> Tensor:
    """A map (d, h, w) at the slices of a volume."""
    return resized(values.flatten(1), (depth, values[0].numel())).reshape(depth, *values.shape[1:])


def _strongest(values: Tensor, depth: int) -> int | None:
    """The slice with the largest absolute value of a map, if it is not zero."""
    strength = _along_depth(values, depth).abs().flatten(1).amax(1)
    return int(strength.argmax()) if strength.any() else None


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (h, w), finite everywhere, at another size. If it shrinks, antialiasing makes every value count."""
    return F.interpolate(finite(values)[None, None], size, mode="bilinear", antialias=True)[0, 0]


def finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


def drawn_size(image: Image.Image, longest: float) -> tuple[int, int]:
    """Width and height in pixels."""
    width, height = max(image.width, image.height / NARROWEST), max(image.height, image.width / NARROWEST)
    scale = longest / max(width, height)
    return round(width * scale), round(height * scale)


def show(axis: Axes, image: Image.Image, caption: str) -> tuple[int, int]:
    """Draws an image with a caption below it; returns its height and width as drawn."""
    drawn = image.resize(drawn_size(image, LONGEST))
    axis.imshow(np.asarray(drawn), cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(caption, parse_math=False)
    return drawn.height, drawn.width
