"""ROAD: remove and debias."""

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
from captum_fam._checks import describe
from captum_fam.metrics._perturbed import column, maps_for, ranks, scores_of


class Road(NamedTuple):
    """
    Which removal hurts the score more, of the most or of the least relevant pixels?

    Attributes:
        score (Tensor): Half the mean of ``lerf - morf``, (B,); above zero for a good map.
        morf (Tensor): Scores with the most relevant pixels removed, (B, number of percentages).
        lerf (Tensor): Scores with the least relevant pixels removed, in the same shape.

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
    Does the score need what the map shows, if removed pixels leave no trace? Remove and debias,
    ROAD (Rong et al., https://arxiv.org/abs/2202.00449), compares the scores after removing the
    most and the least relevant pixels. A removed pixel becomes the weighted mean of its neighbours
    (noisy linear imputation).

    .. math:: ROAD = \frac{1}{2 |P|} \sum_{p \in P} f(x_{LeRF, p}) - f(x_{MoRF, p})

    The combination of both scores is that of pytorch-grad-cam. Direct neighbours weigh 1/6,
    diagonal ones 1/12; at the border, neighbours that do not exist are left out. SciPy solves the
    linear equations on the CPU, one image after another.

    The other arguments are those of :func:`deletion`, for images (B, C, H, W) only.

    Args:
        percentages (iterable of float): Which percentages of the pixels are removed, each
                    above 0 and below 100.
                    Default: 10, 20, ... 90
        noise (float): Standard deviation of the noise on removed pixels, in the unit of the
                    inputs. 0.01 is that of the authors' code.
                    Default: 0.01
        seed (int): Seed of the noise, and of the order of equal attributions.
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
        count = column(counts[step % len(counts)], maps)
        most = column(step < len(counts), maps)
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
    number = np.full((H + 2, W + 2), -1)  # the numbers of the unknowns, with a border whose pixels are no neighbours
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
