"""Words under images."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_fam._checks import describe

Titles: TypeAlias = Iterable[Any] | None
Scores: TypeAlias = Tensor | NDArray[Any] | Sequence[float] | float | None

SIDES = ("query", "reference")


def as_titles(titles: Titles, rows: int, name: str = "titles") -> list[str]:
    if titles is None:
        return [""] * rows
    if isinstance(titles, (Tensor, np.ndarray)):
        titles = titles.tolist()
    found = list(titles) if isinstance(titles, Iterable) and not isinstance(titles, str) else []
    if len(found) != rows:
        raise ValueError(f"Expected `{name}` to be a list of {rows}, one for each row, but got {titles!r}.")
    return ["" if title is None else str(title) for title in found]


def side_captions(titles: Titles, reference_titles: Titles, scores: Scores, rows: int) -> list[list[str]]:
    """The captions of the queries and of the references."""
    named = as_titles(titles, rows), as_titles(reference_titles, rows, "reference_titles")
    numbers = ["" for _ in range(rows)] if scores is None else [f"score {s:.4g}" for s in _as_scores(scores, rows)]
    said = named[0], ["\n".join(filter(None, pair)) for pair in zip(named[1], numbers)]
    return [["\n".join(filter(None, [side, words])) for words in each] for side, each in zip(SIDES, said)]


def _as_scores(scores: Any, rows: int) -> list[float]:
    given = scores.detach().cpu().tolist() if isinstance(scores, Tensor) else scores
    try:
        if isinstance(given, (list, tuple)):
            given = [s.item() if isinstance(s, Tensor) else s for s in given]
        numbers = np.atleast_1d(np.asarray(given)).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected `scores` to be {rows} real numbers, but got {describe(scores)}.") from error
    if numbers.shape != (rows,):
        raise ValueError(
            f"Expected `scores` to be {rows} numbers, one for each row, but got shape {tuple(numbers.shape)}."
        )
    found: list[float] = numbers.tolist()
    return found
