"""Matches the places of an image with those of many stored images."""

from collections.abc import Sequence
from itertools import chain
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_fam._checks import check_positive, describe, warn
from captum_fam.similarity import exact, widen
from captum_fam.tasks._stored import stored_parts

# How many values of stored vectors are read at a time, and multiplied at a time: on a CPU as many as fit its cache.
_READ_AT_ONCE = 2**24
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**19, 2**24


class PlaceMatches(NamedTuple):
    r"""
    Where in each of G stored images are the strongest matches of a query's places? Made by
    :func:`~captum_fam.match_places`.

    Attributes:
        ids (sequence): The ids of the images: those of a Parquet file, else the numbers of their rows.
        scores (Tensor): The mean value of the best matches of all places of the query, (G,).
        values (Tensor): The values of the n strongest matches, strongest first, (G, n); zero where there are fewer.
        places (Tensor): For each match the place of the query and the place of the stored image, as numbers in
                    row-major order, (G, n, 2); -1 where there are fewer.
        maps (Tensor): The value of the best match of each of the query's places, (G, h, w), or None.

    Examples::

        >>> found = match_places(torch.eye(4).reshape(2, 2, 4), torch.eye(4).flip(0).reshape(1, 2, 2, 4), n=2)
        >>> found
        PlaceMatches(images=1, n=2)
        >>> found.values, found.places, found.scores
        (tensor([[1., 0.]]), tensor([[[ 0,  3],
                 [-1, -1]]]), tensor([1.]))
    """

    ids: Sequence[Any]
    scores: Tensor
    values: Tensor
    places: Tensor
    maps: Tensor | None = None

    def __repr__(self) -> str:
        return f"PlaceMatches(images={self.values.shape[0]}, n={self.values.shape[1]})"


def match_places(query: Any, stored: Any, n: int = 8, *, return_maps: bool = False) -> PlaceMatches:
    r"""
    Which stored images have places like those of this image, and where? Stored images are read a few at a time: only
    the result takes memory that grows with their number.

    The value of a match is the product of two vectors, an entry of ``attribute_matrix``: with a
    :class:`~captum_fam.CorrespondenceMap` the cosine of two places, with a :class:`~captum_fam.SimilarityDecomposition`
    what the two contribute to the similarity. The matches of an image are those that
    :func:`~captum_fam.visualize_matches` would draw: mutual, positive, and if the places of two matches touch, only the
    stronger. Of equal values, the two functions may choose different ones.

    Args:
        query (Tensor or array): Vectors of one image's places, (h, w, C), or (N, C) of a square grid, as
                    :func:`~captum_fam.place_vectors` gives them. Matches are computed in its dtype, at least float32,
                    and on its device.
        stored (str, Path, array or Tensor): Vectors of the places of G images, (G, h, w, C), or (G, N, C) of square
                    grids: a file of :func:`~captum_fam.store_places` or ``numpy.save``; a memory map, or another object
                    with a shape and a dtype that gives an array for ``stored[start:stop]``; or a Parquet file, or a
                    folder of them, with the columns ``id`` and ``places``, lists of floats.
        n (int): How many matches of an image are returned at most.
                    Default: 8
        return_maps (bool): Whether to return the values of the best matches of the query's places, (G, h, w), too.
                    Default: False

    Returns:
        *PlaceMatches*: ids, scores and matches, on the CPU.

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Warns if stored vectors are not finite: these images have no matches, and their scores are zero.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> correspondence = CorrespondenceMap(encoder, encoder[1])
        >>> stored = place_vectors(correspondence, torch.rand(5, 3, 9, 9)).half()
        >>> found = match_places(place_vectors(correspondence, torch.rand(1, 3, 9, 9)), stored, n=4)
        >>> found.scores.shape, found.values.shape, found.places.shape
        (torch.Size([5]), torch.Size([5, 4]), torch.Size([5, 4, 2]))
    """
    check_positive("n", n)
    Q, grid = _query(query)
    ids: list[Sequence[Any]] = []
    parts: list[tuple[Tensor, ...]] = []
    there, bad = None, list[Any]()
    with torch.no_grad(), exact(Q):
        for names, part in stored_parts(stored, _READ_AT_ONCE, Q.shape[1]):
            S, of_part = _places("stored", part)
            if S.shape[2] != Q.shape[1] or there not in (None, of_part):
                raise ValueError(
                    f"Expected `stored` to be places of {Q.shape[1]} values, as `query` has them, all on one grid, but"
                    f" got shape {tuple(part.shape[1:])}; store them with the same encoder and layer."
                )
            there = of_part
            best, partners, mutual, known = _best(S, Q)
            matches = _strongest(best.where(mutual, 0), partners, n, grid, there)
            maps = [best.reshape(-1, *grid)] if return_maps else []
            parts.append(tuple(t.cpu() for t in (best.mean(1), *matches, *maps)))
            ids.append(names)
            bad += [name for name, fine in zip(names, known.tolist()) if not fine]
    if there is None:
        raise ValueError("Expected `stored` to hold places of images, but it is empty.")
    if bad:
        which = f"{bad[:5]}"[:-1] + (", ...]" if len(bad) > 5 else "]")
        warn(f"Stored places are not finite ({which}): these images have no matches, and their scores are zero.")
    found = [torch.cat(tensors) for tensors in zip(*parts)]
    names = range(len(found[0])) if isinstance(ids[0], range) else [*chain(*ids)]
    return PlaceMatches(names, *found)


def _query(query: Any) -> tuple[Tensor, tuple[int, int]]:
    """Vectors (N, C), at least in single precision, and their grid."""
    given = torch.from_numpy(np.array(query)) if isinstance(query, np.ndarray) else query
    if not isinstance(given, Tensor) or not given.is_floating_point() or not given.numel():
        raise TypeError(f"Expected `query` to be a tensor or array (h, w, C) of floats, but got {describe(query)}.")
    vectors, grid = _places("query", given if given.ndim == 4 else given[None])
    if len(vectors) > 1:
        raise ValueError(f"Expected `query` to be places of one image, but got those of {len(vectors)}; pass query[0].")
    if not vectors.isfinite().all():
        raise ValueError("Expected `query` to be finite, but it is not; embed the image in float32.")
    return widen(vectors[0]), grid


def _places(name: str, given: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Vectors (b, N, C) of images' places, and their grid."""
    if given.ndim == 4:
        return given.flatten(1, 2), (given.shape[1], given.shape[2])
    if given.ndim != 3 or isqrt(given.shape[1]) ** 2 != given.shape[1]:
        raise ValueError(
            f"Expected places (h, w, C) of each image of `{name}`, or (N, C) of a square grid, but got shape"
            f" {tuple(given.shape[1:])}; leave out tokens that are no patches, and give the grid by"
            f" {name}.reshape({'-1, ' * (name == 'stored')}h, w, C)."
        )
    return given, (isqrt(given.shape[1]),) * 2


def _best(S: Tensor, Q: Tensor) -> tuple[Tensor, ...]:
    """
    For each of the query's places (b, N): its largest product with a place of the stored image, that place, and whether
    that place has no larger product. And which images (b,) have finite products; for the others, all values are zero.
    """
    at_once = _AT_ONCE if Q.device.type == "cpu" else _AT_ONCE_ELSEWHERE
    found = []
    for part in S.split(max(1, at_once // (S.shape[1] * max(Q.shape)))):
        P = (part.to(Q).flatten(0, 1) @ Q.mT).reshape(*part.shape[:2], len(Q))
        found.append((*P.max(1), P.amax(2)))
    best, partners, back = (torch.cat(parts) for parts in zip(*found))
    known = back.isfinite().all(1)
    return best.masked_fill(~known[:, None], 0), partners, back.gather(1, partners) == best, known


def _strongest(
    best: Tensor, partners: Tensor, n: int, grid: tuple[int, int], there: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """
    Values (b, n) and places (b, n, 2) of the n strongest of matches (b, N) above zero. They are chosen one after
    another; each rules out those whose places touch its own.
    """
    values, places = best.new_zeros(len(best), n), partners.new_full((len(best), n, 2), -1)
    near, near_there = (_touching(*sides).to(best.device) for sides in (grid, there))
    for k in range(n):
        strongest, here = best.max(1, keepdim=True)
        match = torch.cat([here, partners.gather(1, here)], 1)
        values[:, k] = strongest[:, 0].clamp(min=0)
        places[:, k] = match.masked_fill(strongest <= 0, -1)
        best = best.masked_fill(near[match[:, 0]] | near_there[match[:, 1]].gather(1, partners), 0)
    return values, places


def _touching(h: int, w: int) -> Tensor:
    """Which places (N, N) of a grid are the same or neighbours."""
    rows, columns = ((torch.arange(side)[:, None] - torch.arange(side)).abs() <= 1 for side in (h, w))
    return (rows[:, None, :, None] & columns[None, :, None]).reshape(h * w, h * w)
