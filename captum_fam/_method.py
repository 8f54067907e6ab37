"""
The formulas of Feature Activation Map (Liao, Gao, Zhang, https://arxiv.org/abs/2307.05017).

B inputs with embeddings z (B, D), K references s (K, D), P of them for each input, and a
layer's activations A (B, C, *spatial). First c and w (captum_fam/similarity.py), then alpha:

    aligned     alpha_k = w_k
    jacobian    alpha_k = sum over locations of d(w.z) / dA_k, w held constant

and the map M = sum over k of alpha_k A_k.
"""

import math

import torch
from torch import Tensor

from captum_fam._recording import Recording
from captum_fam.similarity import Similarity, channel_contributions, nonzero, norm, unit, widen

# How far unit vectors may differ that are equal but for the rounding of a mean in their dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# How much of that may be put down to values that cancel in the mean, at most.
_CANCELLED = 1e-3
# Contributions made at once: on a CPU as many as fit its cache, where they are made several times faster.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**18, 2**24


def contributions(z: Tensor, own: Tensor, similarity: Similarity, other: Tensor | None = None) -> Tensor:
    """c (B, P, D) with the references ``own`` (B, P, D), less those with ``other`` (B, 1, D) if it is given."""
    with exact(z):
        c = channel_contributions(z[:, None], own, similarity)
        return c if other is None else c - channel_contributions(z[:, None], other, similarity)


def contrast_with_rest(c: Tensor, total: Tensor, K: int) -> Tensor:
    """c (B, P, D) less the mean over the other references, where all K add up to ``total`` (B, 1, D)."""
    return c - (total - c) / (K - 1)


def total_contributions(z: Tensor, s: Tensor, similarity: Similarity) -> Tensor:
    """The sum of c over all references (B, 1, D), made of a few at a time."""
    total = torch.zeros_like(z)[:, None]
    for part in s.split(at_once(z)):
        total += contributions(z, part.to(z), similarity).sum(1, keepdim=True)
    return total


def at_once(z: Tensor) -> int:
    """How many references are compared with the embeddings z (B, D) at once."""
    return max(1, (_AT_ONCE if z.device.type == "cpu" else _AT_ONCE_ELSEWHERE) // max(1, z.numel()))


def is_aligned(z: Tensor, A: Tensor) -> bool:
    """Dimension k of z is channel k of A: z is a positive multiple of A's spatial mean, for every z but zeros."""
    if z.shape[1] != A.shape[1]:
        return False
    flat = places(A)
    mean, magnitude = flat.mean(2), flat.abs().mean(2).norm(dim=1)
    rounding = max(_ROUNDING.get(z.dtype, 0), _ROUNDING.get(A.dtype, 0))
    # Where positive and negative values cancel in the mean, its relative error is larger.
    cancellation = magnitude / mean.norm(dim=1).clamp(min=torch.finfo(mean.dtype).tiny)
    close = (unit(widen(z)) - unit(mean)).norm(dim=1) <= (rounding * cancellation).clamp(max=max(rounding, _CANCELLED))
    aside = ~z.isfinite().all(1) | (z == 0).all(1)
    return bool((close | aside).all())


def aligned_scale(z: Tensor, A: Tensor) -> Tensor | None:
    """Where z is a positive multiple of A's spatial mean, for every z but zeros: that multiple, (B, 1)."""
    return norm(widen(z)) / nonzero(norm(places(A).mean(2))) if is_aligned(z, A) else None


def jacobian_weights(recording: Recording, w: Tensor, references: int) -> list[list[Tensor]]:
    """alpha (B, P, C) for w (B, P, D), for each tensor of each layer; w may be some of that many references'."""
    D = w.shape[2]

    def of(rows: Tensor) -> list[list[Tensor]]:
        sums = [[[places(g).sum(2) for g in layer] for layer in recording.gradients(row)] for row in rows.unbind(1)]
        return [[torch.stack(parts, 1) for parts in zip(*layer)] for layer in zip(*sums)]

    if 0 < references <= D:
        return of(w)
    # alpha is linear in w: for more references than dimensions (or none), one gradient a dimension serves all.
    jacobians = recording.once("jacobian", lambda: of(unit_vectors(widen(recording.embedding))))
    with exact(w):
        return [[w @ jacobian for jacobian in layer] for layer in jacobians]


def unit_vectors(z: Tensor) -> Tensor:
    """One for each dimension of the embeddings z (B, D), for all of them: (B, D, D)."""
    return torch.eye(z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)


def activation_maps(alpha: Tensor, A: Tensor) -> Tensor:
    """M (B, P, *spatial) = sum over k of alpha_k A_k."""
    with exact(A):
        return (alpha @ places(A)).reshape(*alpha.shape[:2], *A.shape[2:])


def weighted_activations(alpha: Tensor, A: Tensor) -> Tensor:
    """The terms alpha_k A_k of the one map of each input, (B, C, *spatial)."""
    return (alpha.mT * places(A)).reshape(A.shape)


def exact(x: Tensor) -> torch.autocast:
    """Without the half precision that autocast would choose for products of matrices."""
    return torch.autocast(x.device.type, enabled=False)


def places(A: Tensor) -> Tensor:
    """A (B, C, *spatial) as (B, C, N), in at least single precision."""
    return widen(A).reshape(*A.shape[:2], math.prod(A.shape[2:]))
