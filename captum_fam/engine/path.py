"""
The path along which v is integrated (see formula.py): from a baseline B of a layer straight to its activations A,

    v_i = sum_k (A_ki - B_ki) integral_0^1 dz/dA_ki (B + t (A - B)) dt

The v_i add up to z - z(B) for every network. The integral is a sum of gradients at nodes t, times weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from captum_fam.engine.chunks import slices

# Each channel's mean over the places of the same input, zero, or values that broadcast to the activations.
Baseline: TypeAlias = Tensor | Literal["mean", "zero"] | str


@dataclass(frozen=True)
class Path:
    """
    A part of a path.

    Attributes:
        baseline: where it starts.
        nodes: t of the points at which gradients are taken; 0 is the baseline itself.
        weights: of these gradients, which add up to one over all parts.
        rows: which of all ``inputs`` are on it; None for all.
    """

    baseline: Baseline
    nodes: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    rows: slice | None = None
    inputs: int | None = None

    @property
    def baseline_is_mean(self) -> bool:
        return isinstance(self.baseline, str) and self.baseline == "mean"

    def moved(self, A: Tensor) -> Tensor:
        """A - B"""
        if isinstance(self.baseline, Tensor):
            B = self.baseline.to(A)
            fits = B.ndim < A.ndim or len(B) in (1, len(A) if self.inputs is None else self.inputs)
            if fits and B.ndim == A.ndim and len(B) > 1 and self.rows is not None:
                B = B[self.rows]
            try:
                fits = fits and torch.broadcast_shapes(B.shape, A.shape) == A.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(
                    f"Expected `baseline` to broadcast to the layer's activations {tuple(A.shape)}, but got a tensor"
                    f" {tuple(B.shape)}; pass one of shape (1, {A.shape[1]}, {', '.join('1' * (A.ndim - 2))}), a value"
                    ' for each channel, or "mean" or "zero".'
                )
            return A - B
        if self.baseline == "zero":
            return A.clone()
        places = A.reshape(*A.shape[:2], math.prod(A.shape[2:]))
        moved = A - places.mean(2).reshape(*A.shape[:2], *[1] * (A.ndim - 2))
        return moved.nan_to_num(0, 0, 0)  # values that are no activations, such as a mask of the lowest values, stay

    def points(self, activation: Tensor, to_map: Callable[[Tensor], Tensor]) -> Tensor:
        """
        The activations as the layer gave them, and after them those of each node: (1 + nodes) times the batch. What is
        on no map (see ``to_map``) stays as it is.
        """
        with torch.enable_grad():
            a = activation.detach().clone().requires_grad_()
            A = to_map(a)
            if not A.requires_grad:
                raise ValueError(
                    "Expected `reshape_transform` to select and reorder the layer's activations, but what it returned"
                    " does not depend on them; return a view of its argument, without detach."
                )
            # With one dimension it is no map, and an error follows.
            moved = self.moved(A.detach()).to(A.dtype) if A.ndim > 1 else torch.zeros_like(A)
            (back,) = torch.autograd.grad(A, a, moved)  # the gradient of a selection puts values back in their places
            if not torch.allclose(to_map(a - back), A - moved, equal_nan=True):
                raise ValueError(
                    "Expected `reshape_transform` to select and reorder the layer's activations, but it changes them;"
                    " leave out whatever scales, pools or repeats."
                )
        return torch.cat([activation.detach(), *(activation.detach() - (1 - t) * back for t in self.nodes)])


def gauss_legendre(n: int) -> tuple[list[float], list[float]]:
    """The n nodes in (0, 1) and the weights of Gauss and Legendre's rule, as Captum has them."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return ((1 + nodes) / 2).tolist(), (weights / 2).tolist()


def paths(baseline: Baseline, n_steps: int, at_once: int, from_baseline: bool) -> list[Path]:
    """The path in parts of ``at_once`` nodes. ``from_baseline`` adds the baseline's embedding to the first part."""
    nodes, weights = gauss_legendre(n_steps)
    if from_baseline:
        nodes, weights = [0.0, *nodes], [0.0, *weights]
    return [Path(baseline, tuple(nodes[part]), tuple(weights[part])) for part in slices(len(nodes), at_once)]
