"""FAME, the pixels that change a similarity, as a Captum attribution."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import PerturbationAttribution
from captum.log import log_usage
from torch import Tensor
from tqdm.auto import tqdm

from captum_fam._captum import TargetType
from captum_fam._checks import (
    check_internal_batch_size,
    check_positive,
    describe,
    format_inputs,
    warn_once,
)
from captum_fam.engine.chunks import Tensors, cut, slices
from captum_fam.engine.descent import Descent
from captum_fam.engine.question import Question, usable
from captum_fam.engine.report import SIDES, Report
from captum_fam.methods.layer_explanation import Ask, Explained
from captum_fam.methods.similarity_attribution import Inputs, Selector, SimilarityAttribution
from captum_fam.similarity import Similarity, exact, widen

_LUMA = (0.2989, 0.587, 0.114)
# The blur, in pixels: the shorter side that it is for, its sigma, and how far the kernel reaches to each side.
_SIDE, _SIGMA, _REACH = 224, 7.7, 24


class Fame(SimilarityAttribution, PerturbationAttribution):
    r"""
    Which pixels would have to change to change the similarity? FAME (Zhang, Günther, "Feature
    Activation Map Explanation on Image Classification and Face Recognition",
    https://arxiv.org/abs/2605.12017) shows them. It repeats a step of LOTS (Rozsa, Günther, Boult,
    "LOTS about attacking deep features", IJCB 2017), and shows how far each pixel has come after n
    steps,

    .. math:: x_{t+1} = x_t - \frac{1}{255} \frac{g_t}{\max |g_t|}, \quad
              M = \mathrm{blur} \, |\mathrm{grey}(x_n) - \mathrm{grey}(x_0)|

    with the pixels x in [0, 1] and g the gradient of a loss by x. The reference is held constant.
    The *similar* map lowers the score: it shows which pixels must change for the match to be lost,
    which is what speaks for it. The *dissimilar* map raises the score (it lowers the complement):
    it shows what keeps the two apart. :meth:`attribute` returns the first, :meth:`attribute_both`
    both.

    Grey is luma (0.2989, 0.587, 0.114) of three channels, and the mean of any other number. The
    blur is a Gaussian with sigma 7.7 and a kernel of 49 where the shorter side has 224 pixels, in
    proportion elsewhere, with mirrored borders. The unit of a map is the pixel range: 0 where
    nothing changed, at most ``n_steps`` / 255. Pixels may leave their range.

    The steps, the signs of the losses, grey and blur are those of the authors' code. It takes 500
    steps, and says that maps are stable from 75 to 200. It also stretches each map to [0, 1]; here
    the figure does that. For classifiers, it steps in units of the normalised input, as here
    without ``std``. Steps in pixels, ``signed`` and ``contrast`` are ours. We have not repeated the
    paper's measurements; their README says that their code has not, either.

    Each map takes ``n_steps`` forward and backward passes for each input and reference. Nothing is
    random. To explain the logit of a classifier, pass
    ``SimilarityScore(model, torch.eye(n), "dot")``.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`.
        similarity, output_selector (optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None
        n_steps (int): Number of steps n.
                    Default: 100
        std (float or sequence of float): What the inputs were divided by when they were normalised:
                    the standard deviation, one for all channels or one for each. For inputs from 0
                    to 255, pass 1 / 255.
                    Default: 1.0
        signed (bool): :meth:`attribute` gives the similar map less the dissimilar one, for twice
                    the passes.
                    Default: False
        show_progress (bool): Shows a progress bar.
                    Default: False

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score = SimilarityScore(encoder, torch.rand(5, 8))
        >>> fame = Fame(score, n_steps=10, std=(0.229, 0.224, 0.225))
        >>> fame.attribute(torch.rand(2, 3, 16, 16), target=3).shape
        torch.Size([2, 1, 16, 16])
    """

    _of_terms = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
        n_steps: int = 100,
        std: float | Sequence[float] | Tensor = 1.0,
        signed: bool = False,
        show_progress: bool = False,
    ) -> None:
        super().__init__(forward_func, similarity=similarity, output_selector=output_selector)
        check_positive("n_steps", n_steps)
        _check_std(std)
        self.n_steps = n_steps
        self.std = std
        self.signed = signed
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
        internal_batch_size: int | None = None,
    ) -> Tensor:
        r"""
        Which pixels speak for each input's similarity to one reference?

        Args:
            inputs (Tensor): Images to explain, (B, C, \*spatial), floating point.
            target, additional_forward_args, reference, reference_embedding, internal_batch_size: As in
                        :meth:`FeatureActivationMap.attribute`.
            contrast (int, list, Tensor or str, optional): Number of a reference whose map is
                        subtracted, or ``"rest"`` for the mean of the maps of all others.
                        Default: None

        Returns:
            *Tensor* of **attributions**: maps (B, 1, \*spatial) at the size of the inputs and in
            their dtype; not negative unless ``contrast`` or ``signed`` is given.

        Raises:
            TypeError, ValueError: an argument is not as described above; the message names it.
        """
        signs = (1, -1) if self.signed else (1,)
        asked = {"reference": reference, "reference_embedding": reference_embedding, "contrast": contrast}
        found = self._asked(signs, inputs, additional_forward_args, internal_batch_size, target=target, **asked)
        return found[0] - found[1] if self.signed else found[0]

    def attribute_both(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        contrast: TargetType | str = None,
        internal_batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""
        Which pixels speak for each input's similarity to one reference, and which against it?

        Args:
            inputs, target, additional_forward_args, reference, reference_embedding, contrast: As in
                        :meth:`attribute`.
            internal_batch_size (int, optional): As in :meth:`attribute`.
                        Default: None

        Returns:
            *tuple* of the similar and the dissimilar maps, each as :meth:`attribute` gives them.

        Raises:
            TypeError, ValueError: as :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> images, reference = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16)
            >>> similar, dissimilar = Fame(encoder, n_steps=10).attribute_both(images, reference=reference)
            >>> similar.shape, dissimilar.shape
            (torch.Size([2, 1, 16, 16]), torch.Size([2, 1, 16, 16]))
        """
        asked = {"reference": reference, "reference_embedding": reference_embedding, "contrast": contrast}
        found = self._asked((1, -1), inputs, additional_forward_args, internal_batch_size, target=target, **asked)
        return found[0], found[1]

    def explain(
        self,
        inputs: Tensors,
        ask: Ask,
        *,
        internal_batch_size: int | None = None,
        signed: bool = False,
        sides: tuple[str, str] = SIDES,
    ) -> Explained:
        """As LayerExplanation.explain: maps (B, P, *spatial) for P references each."""
        self._check(inputs)
        parts = [self.embed(cut(inputs, rows)) for rows in slices(len(inputs[0]), internal_batch_size)]
        z = torch.cat(parts) if len(parts) > 1 else parts[0]
        question, report = ask(z, slice(0, len(z))), Report()
        signs = (1, -1) if self.signed else (1,)
        found = self._maps(signs, inputs[0], question, None, internal_batch_size, report, sides)
        maps = found[0] - found[1] if self.signed else found[0]
        valid = usable(z)[:, None] & usable(question.s.to(z))[question.own.to(z.device)]
        return Explained(z, [maps.to(inputs[0].dtype)], [maps], valid, [], [1], report, [])

    def _asked(
        self, signs: Sequence[int], inputs: Inputs, additional_forward_args: Any, most: int | None, **asked: Any
    ) -> list[Tensor]:
        """What attribute returns, once for each sign of the loss."""
        tensors = format_inputs("inputs", inputs)
        check_internal_batch_size(most)
        self._check(tensors)
        question, report = self._question(tensors, additional_forward_args, most, **asked), Report()
        found = self._maps(signs, tensors[0], question, additional_forward_args, most, report)
        warn_once(report.texts())
        return [maps.to(tensors[0].dtype) for maps in found]

    def _check(self, tensors: Tensors) -> None:
        if len(tensors) != 1 or tensors[0].ndim < 3:
            raise ValueError(
                "Fame changes one input (B, C, *spatial), but got inputs of shapes"
                f" {[tuple(t.shape) for t in tensors]}; bind other inputs in the encoder."
            )
        if not tensors[0].is_floating_point():
            raise TypeError(
                f"Fame needs floating-point inputs, as it takes gradients, but got {describe(tensors[0])}; pass"
                " inputs.float()."
            )
        scales, C = torch.as_tensor(self.std), tensors[0].shape[1]
        if scales.ndim and len(scales) != C:
            raise ValueError(
                f"Expected `std` to be one number, or {C} of them, one for each channel of `inputs`, but got"
                f" {len(scales)}."
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Fame needs a gradient, which torch.inference_mode() rules out; use torch.no_grad().")

    def _maps(
        self,
        signs: Sequence[int],
        x: Tensor,
        question: Question,
        additional_forward_args: Any,
        most: int | None,
        report: Report,
        sides: tuple[str, str] = SIDES,
    ) -> list[Tensor]:
        """Maps (B, P, *spatial) for each of the signs, less those of the contrast."""
        B, K, s = len(x), len(question.s), question.s.to(x.device)
        own, rows = question.own.to(x.device).expand(B, -1), torch.arange(B, device=x.device)[:, None]
        is_rest = isinstance(question.less, str)
        asked = [torch.arange(K, device=x.device).expand(B, K) if is_rest else own]
        if question.other is not None:
            asked.append(question.other.to(x.device))
        compared = torch.zeros(K, dtype=torch.bool, device=x.device)
        for numbers in asked:
            compared[numbers] = True
        zero = torch.stack([~usable(s)[n].expand(own.shape) for n in (own, *asked[1:])]).any(0)
        found, total = [], len(signs) * self.n_steps * sum(n.numel() for n in asked)
        with (
            torch.no_grad(),
            tqdm(total=total, desc="Fame", unit="pass", leave=None, disable=not self.show_progress) as progress,
        ):
            descent = Descent(
                self._encoder(),
                self._selector(),
                self,
                x,
                s,
                additional_forward_args,
                self.std,
                self.n_steps,
                progress,
            )
            for sign in signs:
                maps, *other = (_maps_of(descent, sign, numbers, x, most) for numbers in asked)
                if is_rest:
                    every, maps = maps, maps[rows, own]
                    maps = maps - (every.sum(1, keepdim=True) - maps) / (K - 1)
                elif other:
                    maps = maps - other[0]
                found.append(maps.masked_fill(zero.reshape(*zero.shape, *[1] * (x.ndim - 2)), 0))
        _tell(descent, report, sides, compared & ~usable(s), sum(n.numel() for n in asked))
        return found


def _maps_of(descent: Descent, sign: int, numbers: Tensor, x: Tensor, most: int | None) -> Tensor:
    """Maps (B, P, *spatial) for the references with these numbers (B, P), of ``most`` pairs at a time."""
    B, P = numbers.shape
    maps = torch.zeros(B * P, *x.shape[2:], dtype=widen(x).dtype, device=x.device)
    for pairs in torch.arange(B * P, device=x.device).split(most or max(1, B)) if B else ():
        moved = descent.moved(sign, pairs // P, numbers.flatten()[pairs])
        maps[pairs] = blurred(grey(moved).abs())[:, 0]
    return maps.reshape(B, P, *x.shape[2:])


def _tell(descent: Descent, report: Report, sides: tuple[str, str], bad: Tensor, pairs: int) -> None:
    """Reports unusable inputs, the references that are ``bad`` (K,), and pairs without a gradient."""
    for side, unusable in zip(sides, (descent.unusable, bad)):
        if unusable.any():
            report.note_unusable(side, unusable)
    report.warnings += descent.warnings
    if descent.flat:
        report.warnings.append(
            f"The similarity has no gradient by the pixels in {len(descent.flat)} of {pairs} pairs of input and"
            " reference, as where an image is compared with itself, or where the encoder cuts the gradient (detach,"
            " torch.no_grad): their maps are zero."
        )


def grey(x: Tensor) -> Tensor:
    """(n, 1, *spatial) of (n, C, *spatial): luma of three channels, the mean of any other number."""
    if x.shape[1] != len(_LUMA):
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(_LUMA).reshape(-1, *[1] * (x.ndim - 2))).sum(1, keepdim=True)


def blurred(maps: Tensor) -> Tensor:
    """Maps (n, 1, *spatial) under a Gaussian, whose width is a share of their shorter side, with mirrored borders."""
    side = min(maps.shape[2:])
    sigma, reach = _SIGMA * side / _SIDE, round(_REACH * side / _SIDE)
    if not reach:
        return maps
    at = torch.arange(-reach, reach + 1).to(maps)
    kernel = torch.exp(-at.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    with exact(maps):
        for axis in range(2, maps.ndim):
            lines = maps.movedim(axis, -1)
            padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="reflect")
            maps = F.conv1d(padded, kernel[None, None]).reshape(lines.shape).movedim(-1, axis)
    return maps


def _check_std(std: object) -> None:
    try:
        values = torch.as_tensor(std, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        values = None
    if values is None or values.ndim > 1 or isinstance(std, (bool, str)):
        raise TypeError(f"Expected `std` to be a number, or one for each channel, but got {describe(std)}.")
    if not (values > 0).all() or not values.isfinite().all():
        raise ValueError(f"Expected `std` to be positive and finite, but got {std!r}.")
