"""The strongest matches of two images' places."""

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from captum_fam._checks import describe
from captum_fam.visualization import Values, real


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
            f" (h, w, h', w'), but got shape {tuple(matrix.shape)}; places of other grids are told by"
            f" {name}.reshape(-1, h, w, h', w')."
        )
    return list(values)


def strongest_matches(values: Tensor, n: int) -> list[tuple[int, int]]:
    """
    At most n pairs (place of the query, place of the reference), numbers in row-major order, strongest first: each
    the largest, finite and positive, of both its row and its column in values (h, w, h', w'). Of two pairs whose
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
