"""RELAX, a perturbation method for embeddings, as a Captum attribution."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from captum.attr import PerturbationAttribution
from captum.log import log_usage
from torch import Tensor
from tqdm.auto import tqdm

from captum_fam._captum import TargetType
from captum_fam._checks import check_positive, describe, format_inputs, warn_once
from captum_fam.adapters import resize
from captum_fam.engine.chunks import Tensors, cut, slices
from captum_fam.engine.question import Question, usable
from captum_fam.engine.report import SIDES, Report, of_unusable
from captum_fam.methods.layer_explanation import Ask, Explained
from captum_fam.methods.similarity_attribution import Inputs, Selector, SimilarityAttribution
from captum_fam.similarity import Similarity, nonzero, widen


class Relax(SimilarityAttribution, PerturbationAttribution):
    r"""
    Which pixels make the similarity rise when they are seen? RELAX (Wickstrøm et al., https://arxiv.org/abs/2112.10161)
    tries random masks. The importance of a pixel is the mean score of the masked input, weighted by how much each mask
    shows of the pixel. Here the plain mean over all masks is subtracted,

    .. math:: R(i) = \frac{\sum_n f(X \circ M_n) M_n(i)}{\sum_n M_n(i)} - \frac{1}{N} \sum_n f(X \circ M_n)

    with the score f of the input X and N masks :math:`M_n` as in RISE (Petsiuk et al.,
    https://arxiv.org/abs/1806.07421): each cell of a coarse grid is kept with the probability ``keep``; the grid is
    interpolated linearly to the input's size and shifted at random. The paper's score is the cosine to the embedding of
    the unmasked input itself (``reference=inputs``); here it is the similarity to any reference. The quotient is that
    of the authors' code; the paper's mean over masks is the same in expectation up to a factor. The second term is
    ours: it changes no difference between pixels, and gives 0 to a pixel that makes no difference.

    It uses only the outputs of the encoder, so it is a check on methods that look inside. It takes ``n_samples``
    forward passes of each input. The same ``seed`` gives the same masks, for any batch and device. To explain a
    classifier, pass ``SimilarityScore(model, torch.eye(n), "dot")``.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`.
        similarity, output_selector (optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None
        n_samples (int): Number of masks N. The authors' code takes 3,000.
                    Default: 1000
        grid (int): Cells of a mask along each spatial dimension.
                    Default: 7
        keep (float): Probability of keeping a cell, in (0, 1).
                    Default: 0.5
        seed (int): Seed of the random masks.
                    Default: 0
        perturbations_per_eval (int): How many masked inputs go through the encoder at a time.
                    Default: 32
        show_progress (bool): Shows a progress bar.
                    Default: False

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score = SimilarityScore(encoder, torch.rand(5, 8))
        >>> Relax(score, n_samples=100).attribute(torch.rand(2, 3, 16, 16), target=3).shape
        torch.Size([2, 1, 16, 16])
    """

    _of_terms = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
        n_samples: int = 1000,
        grid: int = 7,
        keep: float = 0.5,
        seed: int = 0,
        perturbations_per_eval: int = 32,
        show_progress: bool = False,
    ) -> None:
        super().__init__(forward_func, similarity=similarity, output_selector=output_selector)
        for name, value in (
            ("n_samples", n_samples),
            ("grid", grid),
            ("perturbations_per_eval", perturbations_per_eval),
        ):
            check_positive(name, value)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"Expected `seed` to be an int, but got {describe(seed)}.")
        if not 0 <= seed < 2**63:
            raise ValueError(f"Expected `seed` to be from 0 to 2**63 - 1, but got {seed}.")
        if not isinstance(keep, (int, float)):
            raise TypeError(f"Expected `keep` to be a probability between 0 and 1, but got {describe(keep)}.")
        if not 0 < keep < 1:
            raise ValueError(f"Expected `keep` to be a probability between 0 and 1, but got {keep!r}.")
        self.n_samples = n_samples
        self.grid = grid
        self.keep = keep
        self.seed = seed
        self.perturbations_per_eval = perturbations_per_eval
        self.show_progress = show_progress

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        contrast: TargetType | str = None,
    ) -> Tensor:
        r"""
        Which pixels make each input's similarity to one reference rise when they are seen?

        Args:
            inputs (Tensor): Inputs to explain, (B, C, \*spatial).
            target, additional_forward_args, reference, reference_embedding, contrast: As in
                        :meth:`FeatureActivationMap.attribute`.

        Returns:
            *Tensor* of **attributions**: maps (B, 1, \*spatial) at the size of the inputs and in
            their dtype.

        Raises:
            TypeError, ValueError: an argument is not as described above; the message names it.
        """
        tensors = format_inputs("inputs", inputs)
        _check_image(tensors)
        question = self._question(
            tensors,
            additional_forward_args,
            target=target,
            reference=reference,
            reference_embedding=reference_embedding,
            contrast=contrast,
        )
        warned: list[str] = []
        maps, _ = self._importance(tensors[0], question, additional_forward_args, warned)
        warn_once(warned)
        return maps

    def explain(
        self,
        inputs: Tensors,
        ask: Ask,
        *,
        internal_batch_size: int | None = None,
        signed: bool = False,
        sides: tuple[str, str] = SIDES,
    ) -> Explained:
        """
        As LayerExplanation.explain: maps (B, P, *spatial) for P references each, from one set of masked inputs.
        ``internal_batch_size`` also limits the masked inputs in one forward pass.
        """
        _check_image(inputs)
        parts = [self.embed(cut(inputs, rows)) for rows in slices(len(inputs[0]), internal_batch_size)]
        z = torch.cat(parts) if len(parts) > 1 else parts[0]
        question, report = ask(z, slice(0, len(z))), Report()
        maps, zero = self._importance(inputs[0], question, None, report.warnings, internal_batch_size, sides[1])
        valid = usable(z)[:, None] & ~zero.to(z.device)
        return Explained(z, [maps], [maps.to(widen(maps).dtype)], valid, [], [1], report, [])

    def _importance(
        self,
        x: Tensor,
        question: Question,
        additional_forward_args: object | None,
        warned: list[str],
        most: int | None = None,
        side: str = SIDES[1],
    ) -> tuple[Tensor, Tensor]:
        """Maps (B, P, *spatial), zero where a reference is zero or not finite, and where that is (B, P)."""
        B, P, size = len(x), question.own.shape[1], x.shape[2:]
        bad = ~usable(question.s)
        zero = bad[question.own.to(bad.device)].to(x.device).expand(B, P)
        if not B:
            return x.new_empty(0, P, *size), zero
        if zero.any():
            warned.append(of_unusable({side: set(bad.nonzero().flatten().tolist())}))
            question = replace(question, s=torch.where(bad[:, None], 0, question.s))
        generator = torch.Generator().manual_seed(self.seed)
        cells = torch.rand(self.n_samples, *[self.grid] * len(size), generator=generator) < self.keep
        shifts = torch.rand(self.n_samples, len(size), generator=generator)
        dtype, ones = torch.promote_types(x.dtype, torch.float32), [1] * len(size)
        scored, shown, total = (x.new_zeros(B, *shape, dtype=dtype) for shape in ((P, *size), (1, *size), (P,)))
        at_once = min(self.perturbations_per_eval, most or self.perturbations_per_eval)
        with (
            torch.no_grad(),
            tqdm(
                total=self.n_samples * B, desc="Relax", unit="pass", leave=None, disable=not self.show_progress
            ) as progress,
        ):
            for index in torch.arange(self.n_samples * B).split(at_once):
                mask, rows = index // B, (index % B).to(x.device)
                masks = masks_of(cells[mask], shifts[mask], size).to(shown)[:, None]
                z = self._embed_changed((x[rows] * masks).to(x.dtype), rows, B, additional_forward_args, warned)
                scores = self._scores(z, rows, question, warned).to(masks)
                total.index_add_(0, rows, scores)
                for row, M, f in zip(rows.tolist(), masks, scores):  # not (N, P, *size), which may be large
                    scored[row] += f.reshape(P, *ones) * M
                shown.index_add_(0, rows, masks)
                progress.update(len(index))
        mean = (total / self.n_samples).reshape(B, P, *ones)
        importance = torch.where(shown > 0, scored / nonzero(shown) - mean, torch.zeros_like(scored))
        importance[zero] = 0
        return importance.to(x.dtype if x.is_floating_point() else dtype), zero


def _check_image(tensors: Tensors) -> None:
    if len(tensors) != 1 or tensors[0].ndim < 3:
        raise ValueError(
            "Relax masks one input (B, C, *spatial), but got inputs of shapes"
            f" {[tuple(t.shape) for t in tensors]}; bind other inputs in the encoder."
        )


def masks_of(cells: Tensor, shifts: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (N, *size) in [0, 1] from coarse grids (N, *grid) of kept cells and shifts (N, dimensions) in [0, 1)."""
    cell = [math.ceil(s / g) for s, g in zip(size, cells.shape[1:])]
    large = resize(cells[:, None].float(), [(g + 1) * c for g, c in zip(cells.shape[1:], cell)])[:, 0].clamp(0, 1)
    starts = (shifts * torch.tensor(cell)).long().tolist()
    return torch.stack([m[tuple(slice(a, a + n) for a, n in zip(start, size))] for m, start in zip(large, starts)])
