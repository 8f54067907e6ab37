"""Which value of an image is black, and which is white."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from captum_fam._checks import warn
from captum_fam.images import to_bytes

Numbers: TypeAlias = Sequence[float] | None

ROUNDING = 0.01  # how far values may leave [0, 1], or black, when a normalisation is undone
WHITE = {"uint16": 65535}  # of dtypes, where it is not 255, or 1 for floats
DARK = 0.02  # of white: images with no larger value would be seen as black


@dataclass(frozen=True)
class Pixels:
    """Values (..., C) as they were given, how many of the channels are drawn, and how they were normalised."""

    given: NDArray[Any]
    mean: Numbers = None
    std: Numbers = None
    drawn: int | None = None

    @property
    def white(self) -> int:
        return WHITE.get(self.given.dtype.name, 1 if self.given.dtype.kind in "fb" else 255)

    @property
    def black(self) -> float:
        """The largest value that black may have after its normalisation was undone."""
        if self.mean is None or self.given.dtype.kind != "f":
            return 0.0
        return ROUNDING * float(np.abs(np.asarray(self.mean, np.float64)).max())

    def values(self) -> NDArray[np.float64]:
        return undone(self.given, self.mean, self.std)[..., : self.drawn]

    def range(self) -> tuple[float, float]:
        """The lowest and the highest finite value; (inf, -inf) if there is none."""
        ends = self.given.reshape(-1, self.given.shape[-1])
        if ends.dtype.kind == "f":
            known = np.isfinite(ends)
            ends = np.stack([ends.min(0, where=known, initial=np.inf), ends.max(0, where=known, initial=-np.inf)])
        else:
            ends = np.stack([ends.min(0), ends.max(0)])
        low, high = undone(ends, self.mean, self.std)[:, : self.drawn]
        return float(low.min()), float(high.max())


def undone(values: NDArray[Any], mean: Numbers, std: Numbers) -> NDArray[np.float64]:
    """Values (..., C) before they were normalised; integers never were."""
    scale, shift = (_each_channel(n, v, d, values.shape[-1]) for n, v, d in (("std", std, 1), ("mean", mean, 0)))
    wide: NDArray[np.float64] = values.astype(np.float64)
    return wide * scale + shift if values.dtype.kind == "f" else wide


def _each_channel(name: str, values: Numbers, default: float, channels: int) -> NDArray[Any]:
    numbers = np.atleast_1d(np.asarray(default if values is None else values, np.float32))
    if numbers.shape not in ((1,), (channels,)):
        raise ValueError(
            f"Expected `mean` and `std` to have one number for each of {channels} channels, but got {name} {values!r}."
        )
    return numbers


def levels(name: str, images: Sequence[Pixels], together: bool) -> list[NDArray[np.uint8]]:
    """
    Images as bytes. Values outside the range of their dtype are stretched, and so are images that
    are all black there; of images in one array, only if all of them are black.
    """
    groups = [list(images)] if together else [[image] for image in images]
    return [level for group in groups for level in _levels_of_one_scale(name, group)]


def _levels_of_one_scale(name: str, images: Sequence[Pixels]) -> list[NDArray[np.uint8]]:
    ranges, white = [image.range() for image in images], images[0].white
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if max(image.black for image in images) < max(abs(low), abs(high)) < DARK * white:
        warn(
            f"`{name}` has values from {low:.6g} to {high:.6g}, not from 0 to {white}: all are below {DARK:.0%} of"
            " white; they are stretched to be seen. Pass them divided by the value of white, or uint8 up to 255."
        )
        low, high = min(low, 0), max(high, 0)
        return [_bytes(image.values(), low, high) for image in images]
    return [_levels(name, image, *ends) for image, ends in zip(images, ranges)]


def _levels(name: str, image: Pixels, low: float, high: float) -> NDArray[np.uint8]:
    if image.given.dtype == np.uint8:
        return image.given[..., : image.drawn]
    if low > high:
        warn(f"`{name}` has no finite value; it is drawn black.")
    elif low < -ROUNDING or high > image.white + ROUNDING:
        cure = (
            "the mean and std that it was normalised with"
            if image.given.dtype.kind == "f"
            else "uint8, or values from 0 to 1"
        )
        warn(
            f"`{name}` has values from {low:.6g} to {high:.6g}, not from 0 to {image.white}; they are stretched to be"
            f" seen. Pass {cure}."
        )
        return _bytes(image.values(), low, high)
    return _bytes(image.values(), 0, image.white)


def _bytes(values: NDArray[np.float64], black: float, white: float) -> NDArray[np.uint8]:
    known = np.isfinite(values)
    return to_bytes(np.where(known, (np.where(known, values, black) - black) / (white - black or 1), 0))
