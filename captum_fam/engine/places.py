"""
v and M = N f.v (see formula.py) of a recorded pass, in the cheapest way. On a path from a baseline B, A - B replaces A,
and the mean gradient over the path replaces the gradient (see path.py).

If dimension k of z is channel k of A (*aligned*), z is the mean of a A, with a number a for each input. Then v_ki = a
A_ki / N, and no gradient is needed.
"""

import math
from collections.abc import Iterator
from itertools import repeat
from typing import TypeAlias

import torch
from torch import Tensor

from captum_fam.engine.formula import place_map
from captum_fam.engine.recording import Recording
from captum_fam.similarity import exact, nonzero, norm, unit, widen

# The multiple a (B, 1, 1) for each of the activations, or None where z is no multiple of its mean.
Multiples: TypeAlias = list[Tensor | float | None]

# How far unit vectors may differ that are equal up to the rounding of a mean in their dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# The most that they may differ where values cancel in the mean.
_CANCELLED = 1e-3
# How far two ways to the same products may differ, as a share of their size.
_AGREE = 1e-3


def place_maps(recording: Recording, f: Tensor, multiples: Multiples, n_references: int) -> list[Tensor]:
    """
    M (B, P, N) of each of the activations, for the f of P of that many references.

    f.v takes no gradient if z is aligned. For a few references it takes a gradient each, which costs little where all
    places share it. For many references it is made of the v_i themselves.
    """
    if _aligned(multiples):
        return [_of_channels(f, A).mul_(a) for a, A in zip(multiples, recording.moved) if a is not None]
    N = [math.prod(A.shape[2:]) for A in recording.activations]
    if 0 < n_references <= f.shape[2] and (found := _of_means(recording, f, multiples)) is not None:
        return [M.mul_(n) for M, n in zip(found, N)]
    if 0 < n_references <= min(f.shape[2], max(N)):
        rows = [[term.sum(1) for term in terms] for terms in place_terms(recording, f, multiples)]
        return [torch.stack(maps, 1) for maps in zip(*rows)]
    with exact(f):
        return [place_map(f, v) for v in recording.once("v", lambda: place_embeddings(recording, multiples))]


def place_terms(recording: Recording, f: Tensor, multiples: Multiples) -> Iterator[list[Tensor]]:
    """For each of P references N f.dz/dA_ki A_ki (B, C, N) of each of the activations, which add up to M_i over k."""
    gradients = repeat(recording.activations) if _aligned(multiples) else recording.gradients(f)
    for f_of_one, g in zip(f.unbind(1), gradients):
        yield [
            by_place(A) * (by_place(g_k) * math.prod(A.shape[2:]) if a is None else f_of_one[..., None] * a)
            for A, g_k, a in zip(recording.moved, g, multiples)
        ]


def place_embeddings(recording: Recording, multiples: Multiples) -> list[Tensor]:
    """v (B, D, N) of each of the activations: by N forward-mode or D vector-Jacobian products, whichever cost less."""
    z = widen(recording.embedding)
    N = [math.prod(A.shape[2:]) for A in recording.activations]
    if _aligned(multiples):
        return [by_place(A) * (a / n) for A, a, n in zip(recording.moved, multiples, N) if a is not None]
    if (of_means := _of_means(recording, unit_vectors(z), multiples)) is not None:
        return of_means
    if max(N) < z.shape[1] and z.dtype == recording.embedding.dtype and not any(a is not None for a in multiples):
        found = recording.place_products()
        if found is not None and _is_right(recording, found, multiples):
            return found
    rows = [[term.sum(1) for term in terms] for terms in place_terms(recording, unit_vectors(z), multiples)]
    return [torch.stack(v, 1) / n for v, n in zip(zip(*rows), N)]


def _of_means(recording: Recording, u: Tensor, multiples: Multiples) -> list[Tensor] | None:
    """u.v (B, R, N) for u (B, R, D), where z is made of the means of all activations."""
    shared = None if any(a is not None for a in multiples) else recording.shared_gradients(u)
    return shared and [_of_channels(g, A) for g, A in zip(shared, recording.moved)]


def _is_right(recording: Recording, v: list[Tensor], multiples: Multiples) -> bool:
    """
    Whether forward-mode products agree with a gradient. They need the second derivative, and an operation may lack it
    without an error (once_differentiable).
    """
    z = widen(recording.embedding)
    u = torch.linspace(1, 2, z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), 1, -1)
    expected = [term.sum(1) for term in next(place_terms(recording, u, multiples))]
    found = [place_map(u, v_of_one)[:, 0] for v_of_one in v]
    return all(bool((a - b).norm() <= _AGREE * b.norm()) for a, b in zip(found, expected))


def channel_maps(recording: Recording, alpha: list[Tensor]) -> list[Tensor]:
    """sum over k of alpha_k A_k (B, P, N), for the methods that weigh channels: alpha (B, P, C)."""
    return [_of_channels(alpha_k, A) for alpha_k, A in zip(alpha, recording.activations)]


def _aligned(multiples: Multiples) -> bool:
    return all(a is not None for a in multiples)


def _of_channels(weights: Tensor, values: Tensor) -> Tensor:
    with exact(weights):
        return weights @ by_place(values)


def unit_vectors(z: Tensor) -> Tensor:
    """One for each dimension of the embeddings z (B, D), for all of them: (B, D, D)."""
    return torch.eye(z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)


def is_aligned(z: Tensor, A: Tensor) -> bool:
    """Dimension k of z is channel k of A: z is a positive multiple of A's spatial mean, for every z but zeros."""
    if z.shape[1] != A.shape[1]:
        return False
    flat = by_place(A)
    mean, magnitude = flat.mean(2), flat.abs().mean(2).norm(dim=1)
    rounding = max(_ROUNDING.get(z.dtype, 0), _ROUNDING.get(A.dtype, 0))
    # Where positive and negative values cancel in the mean, its relative error is larger.
    cancellation = magnitude / mean.norm(dim=1).clamp(min=torch.finfo(mean.dtype).tiny)
    close = (unit(widen(z)) - unit(mean)).norm(dim=1) <= (rounding * cancellation).clamp(max=max(rounding, _CANCELLED))
    aside = ~z.isfinite().all(1) | (z == 0).all(1)
    return bool((close | aside).all())


def stays_aligned(recording: Recording, A: Tensor, moved: Tensor) -> bool:
    """Whether z stays the same multiple of the mean of aligned A at all points of the path."""
    if recording.path is None:
        return True
    mean, way = by_place(A).mean(2), by_place(moved).mean(2)
    a, rounding = multiple_of_mean(recording.embedding, A)[..., 0], _ROUNDING.get(A.dtype, 0)
    size = a * by_place(A).abs().mean(2).norm(dim=1, keepdim=True)
    points = zip(recording.path.nodes, widen(recording.on_path))
    return all(bool(((z - a * (mean - (1 - t) * way)).abs() <= rounding * size).all()) for t, z in points)


def multiple_of_mean(z: Tensor, A: Tensor) -> Tensor:
    """The a (B, 1, 1) of aligned z = a mean(A)."""
    return (norm(widen(z)) / nonzero(norm(by_place(A).mean(2))))[..., None]


def by_place(A: Tensor) -> Tensor:
    """A (B, C, *spatial) as (B, C, N), in at least single precision."""
    return widen(A).reshape(*A.shape[:2], math.prod(A.shape[2:]))
