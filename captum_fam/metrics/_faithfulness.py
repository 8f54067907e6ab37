"""Does the score depend on what the map shows? Metrics that change the input and look at the score."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_fam._captum import TargetType
from captum_fam._checks import check_positive
from captum_fam.metrics._perturbed import Baselines, baseline_of, column, maps_for, ranks, scores_of, unit_range


class PerturbationCurve(NamedTuple):
    """
    How does the score change while an input is changed step by step?

    Attributes:
        auc (Tensor): The area under the curve, (B,), over fractions from 0 to 1: a mean score.
        scores (Tensor): The curve, (B, n_steps + 1).
        fractions (Tensor): The fraction of the locations changed at each step, (n_steps + 1,).

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> curve = deletion(score, inputs, torch.rand(2, 1, 16, 16), target=0, n_steps=4)
        >>> curve.fractions
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])
    """

    auc: Tensor
    scores: Tensor
    fractions: Tensor


def deletion(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    baselines: Baselines = "blur",
    additional_forward_args: object | None = None,
    target: TargetType = None,
    n_steps: int = 20,
    seed: int = 0,
    max_examples_per_batch: int | None = None,
) -> PerturbationCurve:
    r"""
    Does the score fall when what the map shows is taken away? Deletion (RISE, Petsiuk et al.,
    https://arxiv.org/abs/1806.07421) is the score while the locations with the largest
    attributions are replaced by a baseline first. A good map makes it fall early: the smaller the
    area, the better.

    .. math:: AUC = \int_0^1 f(x_{(p)}) \, dp

    with :math:`x_{(p)}` the input without the fraction p of largest attributions, by the
    trapezoidal rule. The score is not normalised. So compare areas between maps of one input, not
    between inputs or encoders.

    Args:
        forward_func (Callable): A function from inputs to scores (B, K) or (B,), such as a
                    :class:`~captum_fam.SimilarityScore`.
        inputs (Tensor): The explained inputs, (B, C, \*spatial), floating point.
        attributions (Tensor): Maps of the inputs, (B, C', \*spatial). Channels are summed; maps of
                    another size are resized linearly to that of the inputs.
        baselines (str, float or Tensor): What replaces the input: ``"blur"`` (images only; a
                    Gaussian of 10 pixels for images of 224, in proportion for others, so it changes
                    tiny images little), ``"mean"`` (of each input and channel), ``"zero"``, or a
                    value that expands to the shape of ``inputs``.
                    Default: ``"blur"``
        additional_forward_args (Any, optional): More arguments of ``forward_func``; tensors with a
                    row for each input are split with the inputs.
                    Default: None
        target (int, list or Tensor, optional): Which of the K scores, for all inputs or for each
                    one.
                    Default: None, if there is one score, or if K = B references are paired with the
                    inputs
        n_steps (int): Steps from fraction 0 to 1, each with the same number of locations.
                    Default: 20
        seed (int): Seed of the order of equal attributions.
                    Default: 0
        max_examples_per_batch (int, optional): How many inputs one forward pass takes at most.
                    Default: None, as many as ``inputs``

    Returns:
        *PerturbationCurve*: ``auc`` (B,), ``scores`` (B, n_steps + 1) and ``fractions``
        (n_steps + 1,), in at least single precision.

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> maps = FeatureActivationMap(score, encoder[1]).attribute(inputs, 3)
        >>> deletion(score, inputs, maps, target=3).auc.shape
        torch.Size([2])
    """
    return curve(
        False,
        forward_func,
        inputs,
        maps_for(inputs, attributions),
        baseline_of(inputs, baselines),
        additional_forward_args,
        target,
        n_steps,
        seed,
        max_examples_per_batch,
    )


def insertion(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    baselines: Baselines = "blur",
    additional_forward_args: object | None = None,
    target: TargetType = None,
    n_steps: int = 20,
    seed: int = 0,
    max_examples_per_batch: int | None = None,
) -> PerturbationCurve:
    r"""
    Does the score rise when what the map shows is shown first? Insertion (RISE, Petsiuk et al.,
    https://arxiv.org/abs/1806.07421) is the score while the locations with the largest
    attributions are the first to appear on a baseline. A good map makes it rise early: the larger
    the area, the better.

    .. math:: AUC = \int_0^1 f(b_{(p)}) \, dp

    with :math:`b_{(p)}` the baseline with the fraction p of largest attributions taken from
    the input.

    The arguments are those of :func:`deletion`.

    Returns:
        *PerturbationCurve*: As in :func:`deletion`.

    Raises:
        TypeError, ValueError: As in :func:`deletion`.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> maps = FeatureActivationMap(score, encoder[1]).attribute(inputs, 3)
        >>> insertion(score, inputs, maps, "zero", target=3, n_steps=10).scores.shape
        torch.Size([2, 11])
    """
    return curve(
        True,
        forward_func,
        inputs,
        maps_for(inputs, attributions),
        baseline_of(inputs, baselines),
        additional_forward_args,
        target,
        n_steps,
        seed,
        max_examples_per_batch,
    )


def curve(
    shown: bool,
    forward_func: Callable[..., Any],
    inputs: Tensor,
    maps: Tensor,
    nothing: Tensor,
    additional_forward_args: object | None,
    target: TargetType,
    n_steps: int,
    seed: int,
    max_examples_per_batch: int | None,
) -> PerturbationCurve:
    """Scores while the first locations of the maps (B, *spatial) are shown alone on ``nothing``, or replaced by it."""
    check_positive("n_steps", n_steps)
    place = ranks(maps, seed)
    fractions = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64, device=inputs.device)
    counts = (fractions * maps[:1].numel()).round().long()

    def perturb(row: Tensor, step: Tensor) -> Tensor:
        first = place[row] < column(counts[step], maps)
        return torch.where((first if shown else ~first)[:, None], inputs[row], nothing[row])

    scores = scores_of(
        forward_func, inputs, perturb, n_steps + 1, {"target": target}, additional_forward_args, max_examples_per_batch
    )[0]
    return PerturbationCurve(torch.trapezoid(scores, fractions.to(scores)), scores, fractions.to(scores))


def average_drop(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    baselines: Baselines = "zero",
    additional_forward_args: object | None = None,
    target: TargetType = None,
    max_examples_per_batch: int | None = None,
) -> Tensor:
    r"""
    How much does the score drop when the input is seen through its map? The mean over inputs is the
    *average drop* of Grad-CAM++ (Chattopadhay et al., https://arxiv.org/abs/1710.11063), here

    .. math:: \min\left(1, \frac{\max(0, f(x) - f(x \circ m))}{|f(x) - f(b)|}\right)

    with m the positive part of the map, scaled from its smallest value to its largest, and
    :math:`x \circ m = m x + (1 - m) b` for a baseline b. The published formula divides by
    f(x), which means nothing if a similarity can be zero or negative. Here the drop is divided by
    what the whole input adds to the baseline. Where f(b) = 0 and f(x) > 0, both are the same up to
    the limit of 1. Adding a constant to the score, or multiplying it by a positive factor, changes
    nothing. Where f(x) = f(b), any drop counts as 1. A flat map shows nothing of the input.

    The larger the area of a map, the smaller its drop: a map that shows nearly everything does
    best. Read it together with :func:`average_increase` and the area of the maps.

    The other arguments are those of :func:`deletion`.

    Args:
        baselines (str, float or Tensor): As in :func:`deletion`.
                    Default: ``"zero"``, as published

    Returns:
        *Tensor*: drops in [0, 1], (B,); the smaller, the better.

    Raises:
        TypeError, ValueError: As in :func:`deletion`.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> maps = FeatureActivationMap(score, encoder[1]).attribute(inputs, 3)
        >>> average_drop(score, inputs, maps, target=3).shape
        torch.Size([2])
    """
    whole, seen, nothing = _seen(
        forward_func, inputs, attributions, baselines, additional_forward_args, target, max_examples_per_batch
    )
    drop, span = (whole - seen).clamp(min=0), (whole - nothing).abs()
    return torch.where(drop < span, drop / torch.where(span > 0, span, 1), (drop > 0).to(drop))


def average_increase(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    baselines: Baselines = "zero",
    additional_forward_args: object | None = None,
    target: TargetType = None,
    max_examples_per_batch: int | None = None,
) -> Tensor:
    r"""
    Does the score rise when the input is seen through its map? The mean over inputs is the
    *average increase* (increase in confidence) of Grad-CAM++ (Chattopadhay et al.,
    https://arxiv.org/abs/1710.11063).

    .. math:: 1[f(x \circ m) > f(x)]

    The arguments are those of :func:`average_drop`.

    Returns:
        *Tensor*: 1 if the score rises, else 0, (B,); the larger their mean, the better.

    Raises:
        TypeError, ValueError: As in :func:`deletion`.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> maps = FeatureActivationMap(score, encoder[1]).attribute(inputs, 3)
        >>> average_increase(score, inputs, maps, target=3).shape
        torch.Size([2])
    """
    whole, seen, _ = _seen(
        forward_func, inputs, attributions, baselines, additional_forward_args, target, max_examples_per_batch
    )
    return (seen > whole).to(whole)


def _seen(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    baselines: Baselines,
    additional_forward_args: object | None,
    target: TargetType,
    max_examples_per_batch: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B,) of the inputs, of the inputs through their maps, and of the baseline."""
    mask = unit_range(maps_for(inputs, attributions))
    amount = torch.stack([torch.ones_like(mask), mask, torch.zeros_like(mask)])[:, :, None].to(inputs.dtype)
    nothing = baseline_of(inputs, baselines)

    def perturb(row: Tensor, step: Tensor) -> Tensor:
        return torch.lerp(nothing[row], inputs[row], amount[step, row].expand_as(inputs[row]))

    scores = scores_of(
        forward_func, inputs, perturb, 3, {"target": target}, additional_forward_args, max_examples_per_batch
    )
    whole, seen, empty = scores[0].unbind(1)
    return whole, seen, empty
