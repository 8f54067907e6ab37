"""Contributions to the distances of pytorch-metric-learning, and to the Lp distances of other libraries."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def lp_contributions(z: Tensor, s: Tensor, p: float, power: float) -> Tensor:
    """
    What each dimension contributes to minus a power of the distance. The dimensions share the
    distance as they share the sum under its root,

        c_k = -d^power |z_k - s_k|^p / d^p    with    d = ||z - s||_p
    """
    difference = (z - s).abs()
    d = torch.linalg.vector_norm(difference, p, dim=-1, keepdim=True)
    ratio: Tensor = difference / torch.where(d > 0, d, torch.ones_like(d))
    share = _shares_of_largest(ratio) if p == float("inf") else ratio**p
    c: Tensor = -(d**power) * share
    return c


def _shares_of_largest(ratio: Tensor) -> Tensor:
    """Only the largest dimensions make the distance; where all are zero, so are their shares."""
    largest = (ratio == 1).to(ratio.dtype)
    return largest / largest.sum(-1, keepdim=True).clamp(min=1)


def _product_contributions(z: Tensor, s: Tensor, power: float) -> Tensor:
    """c_k = z_k s_k (z·s)^(power - 1), which add up to (z·s)^power"""
    c: Tensor = z * s
    if power == 1:
        return c
    total = c.sum(-1, keepdim=True)
    return c * torch.where(total == 0, torch.zeros_like(total), total ** (power - 1))


def of_distance(distance: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """
    The contributions (z, s) -> c to a distance of pytorch-metric-learning; None if it is no such
    distance.

    A distance counts as its negative, so that more is always more similar.

    Raises:
        ValueError: the distance has no known contributions.
    """
    library: Any = sys.modules.get("pytorch_metric_learning.distances")
    names = ("BaseDistance", "BatchedDistance")  # old versions have only the former
    kinds: Any = tuple(getattr(library, name) for name in names if hasattr(library, name))
    if not isinstance(distance, kinds):
        return None
    known = isinstance(distance, library.BaseDistance) and type(distance).forward is library.BaseDistance.forward
    mat = type(distance).compute_mat if known else None
    if mat not in (library.DotProductSimilarity.compute_mat, library.LpDistance.compute_mat):
        raise ValueError(
            "Expected `similarity` to be CosineSimilarity, DotProductSimilarity or LpDistance of"
            f" pytorch-metric-learning, but got {type(distance).__name__}, whose terms are not known; pass a function"
            " (z, s) -> contributions that add up to it."
        )
    if distance.power <= 0 or distance.p <= 0:
        raise ValueError(
            f"Expected `similarity` to be a distance with positive p and power, but got {type(distance).__name__} with"
            f" p={distance.p} and power={distance.power}; pass a function (z, s) -> contributions."
        )

    def contributions(z: Tensor, s: Tensor) -> Tensor:
        z, s = (distance.maybe_normalize(x, dim=-1) for x in (z, s))
        if mat is library.LpDistance.compute_mat:
            return lp_contributions(z, s, distance.p, distance.power)
        return _product_contributions(z, s, distance.power)

    return contributions


def canonical(similarity: Any) -> Any:
    """The name of a similarity that is one of ours by another name; otherwise itself."""
    if of_distance(similarity) is None:
        return similarity
    own = sys.modules["pytorch_metric_learning.distances"].BaseDistance
    if any(getattr(type(similarity), name) is not getattr(own, name) for name in ("normalize", "maybe_normalize")):
        return similarity
    product = similarity.is_inverted
    form = (similarity.normalize_embeddings, similarity.p, similarity.power)
    if product and form[2] == 1:
        return "dot" if not form[0] else "cosine" if form[1] == 2 else similarity
    return "euclidean" if not product and form == (False, 2, 2) else similarity
