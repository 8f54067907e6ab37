"""Steps along the gradient by the pixels that lower or raise a score (see methods/fame.py)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_fam._checks import check_dimensions, check_rows
from captum_fam.engine.chunks import cut_arguments
from captum_fam.engine.question import Terms, usable
from captum_fam.engine.untouched import buffers_restored, run, warnings_of_training
from captum_fam.score import select_embedding
from captum_fam.similarity import exact, largest, nonzero, norm, widen

STEP = 1 / 255  # of the range of pixels
# Relative changes of an embedding that count as rounding: in single precision or better, and in units of half.
_ROUNDING, _HALF_ROUNDING = 1e-5, 4


class Descent:
    """
    Attributes:
        unusable: which of the inputs (B,) have embeddings that are zero or not finite; they do not move.
        flat: the pairs of input and reference, by their numbers, whose score has no gradient; they do not move.
        warnings: what a user should know.
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        output_selector: Callable[[Any], Tensor] | None,
        method: Terms,
        x: Tensor,
        s: Tensor,
        additional_forward_args: Any,
        std: Any,
        n_steps: int,
        progress: Any,
    ) -> None:
        """Inputs x (B, C, *spatial), what they were divided by, and references s (K, D)."""
        self.unusable = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.flat: set[tuple[int, int]] = set()
        self.warnings: list[str] = []
        self._encoder, self._selector, self._method = encoder, output_selector, method
        self._x, self._s, self._args = x.detach(), s, additional_forward_args
        scales = torch.as_tensor(std, dtype=widen(self._x).dtype, device=x.device)
        self._std = scales.reshape(-1, *[1] * (x.ndim - 2))
        self._n_steps, self._progress = n_steps, progress

    def moved(self, sign: int, rows: Tensor, numbers: Tensor) -> Tensor:
        """
        How far all steps move the pixels (n, C, *spatial) of the inputs with these ``rows``, each for the reference
        with its number, in parts of the pixel range. The steps lower sign times the score.
        """
        start, s = widen(self._x[rows]), self._s[numbers]
        args = cut_arguments(self._args, rows, len(self._x))
        one_each = (-1, *[1] * (start.ndim - 1))
        moved = torch.zeros_like(start)
        with buffers_restored(self._encoder) as guard:
            for step in range(self._n_steps):
                guard.begin()
                # In half precision, small steps count once they have added up.
                x = (start + moved / self._std).to(self._x.dtype).requires_grad_()
                with torch.enable_grad():
                    output = run(self._encoder, (x.clone(),), args)
                    z = check_rows("inputs", (x,), select_embedding(output, self._selector))
                u = self._gradient(z, s)
                g = _pulled_back(u, z, x) / self._std
                size = largest(g.flatten(1))[:, 0]
                if not step:
                    self.warnings += warnings_of_training(self._encoder, guard.called)
                    known = usable(z.detach()).to(x.device)
                    moves = known & usable(s) & (size != 0) & ~self._is_rounding(u, z, s).to(x.device)
                    self.unusable[rows[~known]] = True
                    flat = known & usable(s) & ~moves
                    self.flat.update(zip(rows[flat].tolist(), numbers[flat].tolist()))
                if not size[moves].isfinite().all():
                    self.warnings.append("Gradients are not finite: the maps that depend on them end at that step.")
                moves = moves & size.isfinite()
                g = torch.where(moves.reshape(one_each), g, torch.zeros_like(g))
                moved -= sign * STEP * g / nonzero(size).reshape(one_each)
                self._progress.update(len(x))
        return moved

    def _gradient(self, z: Tensor, s: Tensor) -> Tensor:
        """The gradient (n, D) of the scores with s by z."""
        check_dimensions(z, s)
        wide = widen(z.detach()).requires_grad_()
        with torch.enable_grad(), exact(wide):
            (u,) = torch.autograd.grad(self._method.terms(wide, s.to(wide)).sum(), wide)
        return u

    def _is_rounding(self, u: Tensor, z: Tensor, s: Tensor) -> Tensor:
        """Whether the gradient u is only rounding: it changes by its own length where z changes by rounding, (n,)."""
        wide, error = widen(z.detach()), _ROUNDING
        if wide.dtype != z.dtype:
            error = _HALF_ROUNDING * torch.finfo(z.dtype).eps
        signs = torch.ones_like(wide)
        signs[:, ::2] = -1
        nearby = self._gradient(wide + error * norm(wide) * signs / math.sqrt(wide.shape[1]), s)
        return (norm(nearby - u) >= norm(u))[:, 0]


def _pulled_back(u: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """The gradient of u.z by x, times a positive factor that keeps it in the range of half precision."""
    found = None
    if z.requires_grad:
        (found,) = torch.autograd.grad(z, x, (u / nonzero(largest(u))).to(z.dtype), allow_unused=True)
    return widen(torch.zeros_like(x) if found is None else found)
