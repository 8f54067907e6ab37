"""The contents of a page: matrices and pictures as text, in little room."""

import base64
from collections.abc import Sequence
from io import BytesIO
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_fam.matches import strongest_matches

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"  # base64's
SIDE = 512  # pixels of a square picture's side; no other picture has more pixels
WHOLE = 1 << 16  # a matrix of more entries is stored as two factors, where these are smaller
RANKS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
CLOSE = 0.02  # of the largest entry: how far an entry of the product may be from the matrix
SHORT = 1_000_000  # numbers of an array that gets one digit each, instead of two
SHOWN = 5  # matches that are numbered before anybody points at a place

Array = NDArray[np.float64]


def picture(image: Image.Image) -> str:
    """An RGB image as the data address of a JPEG, which holds the whole picture."""
    scale = min(1, SIDE / sqrt(image.width * image.height))
    drawn = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    content = BytesIO()
    drawn.save(content, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def digits(values: Array) -> tuple[dict[str, Any], Array]:
    """
    Numbers as text, and the values that a page reads there. Each is a level of one or two digits of base 64; the square
    of the level is the share of the largest number. So small numbers, many of which make a sum, are kept more exactly.
    The last level stands for a value that is not finite.
    """
    count = 1 if values.size > SHORT else 2
    top = (64**count - 2) // 2
    finite = np.isfinite(values)
    largest = float(np.abs(values, where=finite, out=np.zeros_like(values)).max(initial=0)) or 1.0
    shares = np.where(finite, values, 0) / largest
    level = np.rint(top * np.sign(shares) * np.sqrt(np.abs(shares))).astype(int)
    read = np.where(finite, largest * np.sign(level) * (level / top) ** 2, np.nan)
    codes = np.where(finite, level + top, 2 * top + 1)
    places = np.stack([codes // 64**power % 64 for power in reversed(range(count))], -1)
    text = np.array(list(ALPHABET))[places].ravel()
    return {"digits": count, "largest": largest, "text": "".join(text)}, read


def matrix(values: Tensor) -> dict[str, Any]:
    """
    A matrix (h, w, h', w') with what a page says about it: the largest entry of each row and column and where it is,
    and the strongest matches. All these are found before rounding.
    """
    h, w, h2, w2 = values.shape
    entries = values.reshape(h * w, h2 * w2).numpy()
    finite = np.isfinite(entries)
    largest = float(np.abs(entries, where=finite, out=np.zeros_like(entries)).max(initial=0))
    stored, read = _smallest(entries, largest)
    error = float(np.abs(read - entries, where=finite, out=np.zeros_like(entries)).max())
    return {
        "query": [h, w],
        "reference": [h2, w2],
        **stored,
        "largest": _short(largest),
        "unknown": int((~finite).sum()),
        "error": _short(error),
        "rows": _bests(entries),
        "columns": _bests(entries.T),
        "strongest": strongest_matches(values, SHOWN),
    }


def grid(values: Tensor) -> dict[str, Any]:
    """A map (h, w)."""
    return {"shape": list(values.shape), "values": numbers(values)}


def numbers(values: Tensor) -> list[float | None]:
    return [_short(value) for value in values.flatten().tolist()]


def _smallest(entries: Array, largest: float) -> tuple[dict[str, Any], Array]:
    """The whole matrix, or two factors (N, r) and (N', r), and the values that a page reads there."""
    if entries.size > WHOLE and np.isfinite(entries).all():
        for rank in (r for r in RANKS if 2 * r * sum(entries.shape) < entries.size):
            (left, here), (right, there) = map(digits, _factors(entries, rank))
            read = here @ there.T
            if np.abs(read - entries).max() <= CLOSE * largest:
                return {"rank": rank, "left": left, "right": right}, read
    stored, read = digits(entries)
    return {"whole": stored}, read


def _factors(entries: Array, rank: int) -> tuple[Array, Array]:
    """
    Factors (N, r) and (N', r) whose product is nearly the best of that rank, by randomised subspace iteration (Halko,
    Martinsson, Tropp, https://arxiv.org/abs/0909.4061, algorithm 4.4); the same each time.
    """
    M = torch.from_numpy(entries)
    Q = torch.randn(M.shape[1], rank, dtype=M.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        Q = torch.linalg.qr(M.T @ torch.linalg.qr(M @ Q)[0])[0]
    U, S, V = torch.linalg.svd(M @ Q, full_matrices=False)
    return (U * S.sqrt()).numpy(), (Q @ V.T * S.sqrt()).numpy()


def _bests(entries: Array) -> dict[str, Sequence[float | None]]:
    finite = np.isfinite(entries)
    best = np.where(finite, entries, -np.inf).argmax(1)
    values = numbers(torch.from_numpy(entries[np.arange(len(entries)), best]))
    return {
        "best": [None if value is None else place for place, value in zip(best.tolist(), values)],
        "value": values,
        "sum": numbers(torch.from_numpy(np.where(finite, entries, 0).sum(1))),
    }


def _short(value: float) -> float | None:
    """A number in few characters; JSON has no infinities."""
    return float(f"{value:.5g}") if np.isfinite(value) else None
