"""
The formula, in the letters of docs/method.md, for embeddings z and references s (..., D).

An embedding comes from places: place i of a layer's activations A (C, N) gives it the part v_i (D,), to first order.
A method is the weights f (D,) of the dimensions, held constant, and the map is

    M_i = N f.v_i        v_i = sum_k A_ki dz/dA_ki        (found in places.py)

FAM has f = w * sign(z), with the weights w of the contributions c (similarity.py). SimilarityDecomposition has the f
whose f.z is the similarity. A contrast is a difference of terms: those of FAM are c, signed, those of the decomposition
are f.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from captum_fam.similarity import Normalize, contribution_weights, nonzero, norm, unit


def fam(z: Tensor, c: Tensor, normalize: Normalize) -> Tensor:
    """f = w * sign(z): c_k says how much dimension k contributes, sign(z_k) in which direction."""
    return contribution_weights(c, normalize) * z.sign()


# f of SimilarityDecomposition. The squared distance is f.z - |s|^2, and |s|^2 belongs to no place of the input.
DECOMPOSITION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda z, s: unit(s) / nonzero(norm(z)),
    "dot": lambda z, s: s.expand(torch.broadcast_shapes(z.shape, s.shape)),
    "euclidean": lambda z, s: 2 * s - z,
}


def less_reference(t: Tensor, other: Tensor) -> Tensor:
    """t(z, a) - t(z, b): score(a) - score(b)"""
    return t - other


def less_rest(t: Tensor, total: Tensor, K: int) -> Tensor:
    """t(z, a) - the mean of the other terms, where all K terms add up to ``total``"""
    return t - (total - t) / (K - 1)


def less_own(t: Tensor, own: Tensor, share: Tensor | float) -> Tensor:
    """
    t(z, s) - share t(z, z) / score(z, z). With the share score(z, s), it is what this match has beyond the match of the
    input with itself, and adds up to 0. With a threshold as the share, it is what lies above the threshold.
    """
    return t - share * own


def place_map(f: Tensor, v: Tensor) -> Tensor:
    """M (B, P, N) = N f.v for f (B, P, D) and v (B, D, N)"""
    return (f @ v) * v.shape[2]
