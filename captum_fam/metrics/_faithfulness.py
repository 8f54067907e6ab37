"""Does the score depend on what the map shows? Metrics that change the input and look at the score."""

from collections.abc import Callable, Iterable
from itertools import product
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_array
from scipy.sparse.linalg import splu
from torch import Tensor

from captum_fam._captum import TargetType
from captum_fam._checks import check_positive, describe
from captum_fam.metrics._perturbed import Baselines, baseline_of, maps_for, ranks, scores_of, unit_range


class PerturbationCurve(NamedTuple):
    """
    Scores while an input is changed step by step.

    Attributes:
        auc: area under the curve (B,), over fractions from 0 to 1: a mean score.
        scores: the curve (B, n_steps + 1).
        fractions: of the locations that are changed at each step, (n_steps + 1,).

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


class Road(NamedTuple):
    """
    Scores after the removal of locations in the order of a map.

    Attributes:
        score: half the mean of ``lerf - morf``, (B,); above zero for a map that knows what
            matters.
        morf: with the most relevant locations removed first, (B, number of percentages).
        lerf: with the least relevant locations removed first, the same shape.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> found = road(score, inputs, torch.rand(2, 1, 16, 16), target=0, percentages=[50])
        >>> torch.allclose(found.score, (found.lerf - found.morf).mean(1) / 2)
        True
    """

    score: Tensor
    morf: Tensor
    lerf: Tensor


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
    Deletion (RISE, Petsiuk et al., https://arxiv.org/abs/1806.07421): the score while the
    locations with the largest attributions are replaced by a baseline first. A map that knows
    what matters makes it fall early: the smaller the area, the better.

    .. math:: AUC = \int_0^1 f(x_{(p)}) \, dp

    with :math:`x_{(p)}` the input without the fraction p of largest attributions, by the
    trapezoidal rule. The score is not divided by anything, so areas compare maps of one
    input, not inputs or encoders.

    Args:
        forward_func (Callable): Inputs to scores (B, K) or (B,): a
                    :class:`~captum_fam.SimilarityScore`.
        inputs (Tensor): The explained inputs, (B, C, \*spatial), floating point.
        attributions (Tensor): Their maps, (B, C', \*spatial); channels are summed, and other
                    sizes resized to the inputs, linearly.
        baselines (str, float or Tensor): What stands for nothing: ``"blur"`` (images only; a
                    Gaussian of 10 pixels for images of 224, and in proportion: next to nothing
                    for images of a few pixels), ``"mean"``
                    (of each input and channel), ``"zero"``, or a value that expands to the
                    shape of ``inputs``.
                    Default: ``"blur"``
        additional_forward_args (Any, optional): More arguments of ``forward_func``; tensors
                    with a row for each input go with their inputs.
                    Default: None
        target (int, list or Tensor, optional): Which of the K scores, for all inputs or for
                    each.
                    Default: None, for one score, or for K = B references, paired
        n_steps (int): Steps from 0 to 1, of equal numbers of locations.
                    Default: 20
        seed (int): Of the order of equal attributions.
                    Default: 0
        max_examples_per_batch (int, optional): Most inputs in one forward pass.
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
    return _curve(
        False,
        forward_func,
        inputs,
        attributions,
        baselines,
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
    Insertion (RISE, Petsiuk et al., https://arxiv.org/abs/1806.07421): the score while the
    locations with the largest attributions are the first to appear on a baseline. A map that
    knows what matters makes it rise early: the larger the area, the better.

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
    return _curve(
        True,
        forward_func,
        inputs,
        attributions,
        baselines,
        additional_forward_args,
        target,
        n_steps,
        seed,
        max_examples_per_batch,
    )


def _curve(
    shown: bool,
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    baselines: Baselines,
    additional_forward_args: object | None,
    target: TargetType,
    n_steps: int,
    seed: int,
    max_examples_per_batch: int | None,
) -> PerturbationCurve:
    """Scores while the first locations of the map are shown alone, or hidden."""
    maps = maps_for(inputs, attributions)
    check_positive("n_steps", n_steps)
    place, nothing = ranks(maps, seed), baseline_of(inputs, baselines)
    fractions = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64, device=inputs.device)
    counts = (fractions * maps[:1].numel()).round().long()

    def perturb(row: Tensor, step: Tensor) -> Tensor:
        first = place[row] < _column(counts[step], maps)
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
    The drop of the score when the input is seen through its map; its mean over inputs is the
    *average drop* of Grad-CAM++ (Chattopadhay et al., https://arxiv.org/abs/1710.11063), here

    .. math:: \min\left(1, \frac{\max(0, f(x) - f(x \circ m))}{|f(x) - f(b)|}\right)

    with m the positive part of the map, scaled from its smallest value to its largest, and
    :math:`x \circ m = m x + (1 - m) b` for a baseline b. The published formula divides by
    f(x), which says nothing where a similarity can be zero or negative; here the drop is
    measured against what the whole input adds to the baseline. Where f(b) = 0 and f(x) > 0
    they are the same up to the limit of 1. Adding a constant to the score changes nothing,
    nor does a positive factor. Where f(x) = f(b), any drop counts as 1. A flat map shows
    nothing.

    The wider a map, the smaller its drop: a map that shows nearly everything does best. Read
    it beside :func:`average_increase` and the area of the maps.

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
        *Tensor*: 1 or 0, (B,); the larger their mean, the better.

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


def road(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    additional_forward_args: object | None = None,
    target: TargetType = None,
    percentages: Iterable[float] = (10, 20, 30, 40, 50, 60, 70, 80, 90),
    noise: float = 0.01,
    seed: int = 0,
    max_examples_per_batch: int | None = None,
) -> Road:
    r"""
    Remove and debias, ROAD (Rong et al., https://arxiv.org/abs/2202.00449): scores after the
    most and the least relevant pixels were removed, where a removed pixel becomes the
    weighted mean of its neighbours (noisy linear imputation), so that the shape of what was
    removed is hard to see.

    .. math:: ROAD = \frac{1}{2 |P|} \sum_{p \in P} f(x_{LeRF, p}) - f(x_{MoRF, p})

    The combination is that of pytorch-grad-cam. Direct neighbours weigh 1/6, diagonal ones
    1/12; at the border the weights are those of the neighbours that exist. SciPy solves the
    linear equations, for one image after the other on the CPU.

    The other arguments are those of :func:`deletion`, for images (B, C, H, W) only.

    Args:
        percentages (iterable of float): Which percentages of the pixels are removed, each
                    above 0 and below 100.
                    Default: 10, 20, ... 90
        noise (float): Standard deviation of the noise on removed pixels, in the unit of the
                    inputs. 0.01 is that of the authors' code.
                    Default: 0.01
        seed (int): Of the noise, and of the order of equal attributions.
                    Default: 0

    Returns:
        *Road*: ``score`` (B,), ``morf`` and ``lerf`` (B, number of percentages).

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> maps = FeatureActivationMap(score, encoder[1]).attribute(inputs, 3)
        >>> road(score, inputs, maps, target=3, percentages=[25, 50, 75]).morf.shape
        torch.Size([2, 3])
    """
    maps = maps_for(inputs, attributions)
    if maps.ndim != 3:
        raise ValueError(f"road removes pixels of images (B, C, H, W), but got inputs of shape {tuple(inputs.shape)}.")
    levels = [*percentages] if isinstance(percentages, Iterable) else []
    if not levels or not all(isinstance(p, Real) and 0 < p < 100 for p in levels):
        raise ValueError(f"Expected `percentages` to be numbers above 0 and below 100, but got {percentages!r}.")
    if not isinstance(noise, (int, float)) or not noise >= 0:
        raise ValueError(f"Expected `noise` to be 0 or more, but got {describe(noise)}.")
    place, pixels = ranks(maps, seed), maps[:1].numel()
    counts = torch.tensor([round(p / 100 * pixels) for p in levels], device=inputs.device)
    counts = counts.clamp(max=pixels - 1)
    drawn = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed)).to(inputs) * noise

    def perturb(row: Tensor, step: Tensor) -> Tensor:
        count = _column(counts[step % len(counts)], maps)
        most = _column(step < len(counts), maps)
        missing = torch.where(most, place[row] < count, place[row] >= pixels - count)
        filled = torch.stack([imputed(image, hole) for image, hole in zip(inputs[row], missing)])
        return torch.where(missing[:, None], filled + drawn[row], inputs[row])

    scores = scores_of(
        forward_func,
        inputs,
        perturb,
        2 * len(counts),
        {"target": target},
        additional_forward_args,
        max_examples_per_batch,
    )
    morf, lerf = scores[0].split(len(counts), 1)
    return Road((lerf - morf).mean(1) / 2, morf, lerf)


def imputed(image: Tensor, missing: Tensor) -> Tensor:
    """An image (C, H, W) with each pixel that is missing (H, W) the weighted mean of its neighbours."""
    H, W = missing.shape
    number = np.full((H + 2, W + 2), -1)  # of the unknowns; with a border, whose pixels are no neighbours
    number[1:-1, 1:-1][missing.cpu().numpy()] = np.arange(int(missing.sum()))
    value = np.pad(image.double().cpu().numpy(), ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    y, x = np.nonzero(number >= 0)
    degree, right = np.zeros(len(y)), np.zeros((len(y), len(image)))
    entries = []
    for dy, dx in product((-1, 0, 1), repeat=2):
        if dy or dx:
            weight = 1 / 12 if dy and dx else 1 / 6
            there, colour = number[y + dy, x + dx], value[:, y + dy, x + dx].T
            exists, unknown = ~np.isnan(colour[:, 0]), there >= 0
            degree += weight * exists
            right += weight * np.where((exists & ~unknown)[:, None], colour, 0)
            entries.append((np.full(unknown.sum(), -weight), np.nonzero(unknown)[0], there[unknown]))
    entries.append((degree, np.arange(len(y)), np.arange(len(y))))
    weights, rows, columns = map(np.concatenate, zip(*entries))
    # The matrix is symmetric and diagonally dominant: it needs no pivots.
    system = csc_array((weights, (rows, columns)), shape=(len(y), len(y)))
    solver = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    filled = image.clone()
    filled[:, missing] = torch.as_tensor(solver.solve(right).T).to(image)
    return filled


def _column(values: Tensor, maps: Tensor) -> Tensor:
    """Values (n,) against maps (n, *spatial)."""
    return values.reshape(-1, *[1] * (maps.ndim - 1))
