"""Metrics of both images: do their places find each other, and does their similarity need what two maps show?"""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_fam._checks import check_callable, check_positive, check_rows, check_square, describe, warn_once
from captum_fam.engine.question import pair_index
from captum_fam.engine.untouched import buffers_restored, warnings_of_training
from captum_fam.metrics._faithfulness import PerturbationCurve, curve
from captum_fam.metrics._localisation import at_middles, check_masks, inside_of
from captum_fam.metrics._perturbed import Baselines, baseline_of, check_inputs, maps_for
from captum_fam.score import SimilarityScore, select_embedding
from captum_fam.similarity import Similarity, channel_contributions, check_similarity, widen


def pair_pointing_game(matrix: Tensor, masks: Tensor, reference_masks: Tensor) -> Tensor:
    r"""
    Is the strongest pair of places on the shared object in both images? The pointing game of two images:

    .. math:: \frac{|\{(i, j) \in T : i \in m, j \in m'\}|}{|T|}, \quad
              T = \{(i, j) : P_{ij} = \max P\}

    with the places m of the object in the image, and m' in the reference. Usually one pair is the strongest, and the
    result is 1 or 0; of several equally strong pairs, it is the share. As in :func:`pointing_game`, a place is on the
    object if its middle pixel is in the mask. If the object is too small for that, the places that hold most of it
    count.

    A matrix without structure gets the share of the image's places on the object, times that of the reference's: a
    sixteenth if both are a quarter. Compare with that, and with the matrix of an untrained encoder. Cosines are often
    largest, and equal for many places, where plain background looks like plain background.

    The pointing game is that of Zhang et al. (https://arxiv.org/abs/1608.00507); the one of two images is ours.

    Args:
        matrix (Tensor): A value for each place of the images with each place of their references, floating point:
                    (B, N, N') where both grids are square, else (B, h, w, h', w').
                    :meth:`.CorrespondenceMap.attribute_matrix` and :meth:`.SimilarityDecomposition.attribute_matrix`
                    return it.
        masks (Tensor): Where the shared object is in the images, (B, H, W) or (B, 1, H, W), bool; :func:`box_masks`
                    makes them of boxes.
        reference_masks (Tensor): Where it is in the references, in the same form, of any size.

    Returns:
        *Tensor*: shares in [0, 1], (B,), on the matrix's device.

    Raises:
        TypeError, ValueError: an argument is not as described above, or a mask is empty.

    Examples::

        >>> masks = torch.tensor([[[True, False], [False, False]]])
        >>> reference_masks = torch.tensor([[[False, False], [False, True]]])
        >>> matrix = torch.zeros(1, 4, 4)
        >>> matrix[0, 0, 3] = 1  # the upper left place with the lower right one
        >>> pair_pointing_game(matrix, masks, reference_masks)
        tensor([1.])
    """
    values, here, there = _pairs(matrix, masks, reference_masks)
    top = values == values.amax((1, 2), keepdim=True)
    hit = top & here[:, :, None] & there[:, None]
    return hit.sum((1, 2)) / top.sum((1, 2))


def matching_accuracy(matrix: Tensor, masks: Tensor, reference_masks: Tensor) -> Tensor:
    r"""
    Do the places of the shared object find it in the other image? The share of the image's places on the object whose
    best match in the reference is on the object, too:

    .. math:: \frac{1}{|m|} \sum_{i \in m} 1\left[\arg\max_j P_{ij} \in m'\right]

    with the places m of the object in the image, and m' in the reference, as in :func:`pair_pointing_game`. Where
    several places match a place equally well, the share of them counts.

    A matrix without structure gets the share of the reference's places on the object. Compare with that, and with the
    matrix of an untrained encoder. For the other direction, what the reference's places find in the image, transpose
    the matrix and exchange the masks: ``matching_accuracy(matrix.mT, reference_masks, masks)``, or
    ``matrix.permute(0, 3, 4, 1, 2)`` for a matrix (B, h, w, h', w').

    Args:
        matrix, masks, reference_masks (Tensor): As in :func:`pair_pointing_game`.

    Returns:
        *Tensor*: shares in [0, 1], (B,), on the matrix's device.

    Raises:
        TypeError, ValueError: As in :func:`pair_pointing_game`.

    Examples::

        >>> masks = torch.tensor([[[True, True], [False, False]]])
        >>> matrix = torch.eye(4)[None]  # each place looks like the one at its own position
        >>> matching_accuracy(matrix, masks, masks), matching_accuracy(matrix, masks, masks.mT)
        (tensor([1.]), tensor([0.5000]))
    """
    values, here, there = _pairs(matrix, masks, reference_masks)
    top = values == values.amax(2, keepdim=True)
    found = (top & there[:, None]).sum(2) / top.sum(2)
    return (found * here).sum(1) / here.sum(1)


def pair_deletion(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    reference: Tensor,
    attributions: Tensor,
    reference_attributions: Tensor,
    similarity: Similarity = "cosine",
    baselines: Baselines = "blur",
    n_steps: int = 20,
    seed: int = 0,
    max_examples_per_batch: int | None = None,
    *,
    output_selector: Callable[[Any], Tensor] | None = None,
) -> PerturbationCurve:
    r"""
    Does the similarity fall when what the maps of both images show is taken away? :func:`deletion` for each image of a
    pair by its own map: first the image loses the locations with its largest attributions, then, separately, the
    reference loses those with its own. A good pair of maps makes the similarity fall early: the smaller the area, the
    better.

    .. math:: AUC = \frac12 \int_0^1 f(x_{(p)}, r) + f(x, r_{(p)}) \, dp

    with :math:`x_{(p)}` the image x, and :math:`r_{(p)}` the reference r, without the fraction p of largest
    attributions.

    While one image changes, the other stays whole. If both changed together, they would become alike as both come to
    show nothing (the cosine of two black images is 1), and maps of empty background would do as well as the right ones.

    Always compare with random maps. Everything that is not empty counts: in scenes of objects on plain ground, maps of
    all objects may do better than those of the shared one. This metric does not ask which place of one image belongs to
    which of the other; :func:`pair_pointing_game` and :func:`matching_accuracy` do.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings (B, D).
        inputs (Tensor): The images, (B, C, \*spatial), floating point.
        reference (Tensor): B references, paired with the inputs, or one that they share; of any size.
        attributions (Tensor): Maps of the inputs, (B, C', \*spatial), as in :func:`deletion`: the first result of an
                    ``attribute_pair``.
        reference_attributions (Tensor): Maps of the references, in the same form: the second result.
        similarity (str or Callable): As in :func:`~captum_fam.channel_contributions`.
                    Default: ``"cosine"``
        baselines (str, float or Tensor): As in :func:`deletion`, for both images; a tensor must have no batch
                    dimension.
                    Default: ``"blur"``
        n_steps, seed, max_examples_per_batch: As in :func:`deletion`.
        output_selector (Callable, optional): Takes the encoder's output to the embeddings.
                    Default: None

    Returns:
        *PerturbationCurve*: As in :func:`deletion`; at each fraction the mean of the two scores.

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images, references = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
        >>> maps = SimilarityDecomposition(encoder, encoder[1]).attribute_pair(images, references)
        >>> pair_deletion(encoder, images, references, *maps).auc.shape
        torch.Size([2])
    """
    return _pair_curve(
        False,
        forward_func,
        (inputs, reference),
        (attributions, reference_attributions),
        similarity,
        baselines,
        n_steps,
        seed,
        max_examples_per_batch,
        output_selector,
    )


def pair_insertion(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    reference: Tensor,
    attributions: Tensor,
    reference_attributions: Tensor,
    similarity: Similarity = "cosine",
    baselines: Baselines = "blur",
    n_steps: int = 20,
    seed: int = 0,
    max_examples_per_batch: int | None = None,
    *,
    output_selector: Callable[[Any], Tensor] | None = None,
) -> PerturbationCurve:
    r"""
    Does the similarity rise when what the maps of both images show is shown first? :func:`insertion` for each image of
    a pair by its own map: the locations with the largest attributions are the first to appear on a baseline, first in
    the image, then, separately, in the reference. A good pair of maps makes the similarity rise early: the larger the
    area, the better.

    .. math:: AUC = \frac12 \int_0^1 f(b_{(p)}, r) + f(x, b'_{(p)}) \, dp

    with :math:`b_{(p)}` the baseline of the image x with the fraction p of largest attributions taken from x, and
    :math:`b'_{(p)}` the same for the reference r. While one image changes, the other stays whole, for the reason that
    :func:`pair_deletion` gives.

    The arguments are those of :func:`pair_deletion`.

    Returns:
        *PerturbationCurve*: As in :func:`pair_deletion`.

    Raises:
        TypeError, ValueError: As in :func:`pair_deletion`.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images, references = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
        >>> maps = SimilarityDecomposition(encoder, encoder[1]).attribute_pair(images, references)
        >>> pair_insertion(encoder, images, references, *maps, baselines="mean", n_steps=10).scores.shape
        torch.Size([2, 11])
    """
    return _pair_curve(
        True,
        forward_func,
        (inputs, reference),
        (attributions, reference_attributions),
        similarity,
        baselines,
        n_steps,
        seed,
        max_examples_per_batch,
        output_selector,
    )


def _pair_curve(
    shown: bool,
    encoder: Callable[..., Any],
    images: tuple[Any, Any],
    attributions: tuple[Any, Any],
    similarity: Similarity,
    baselines: Baselines,
    n_steps: int,
    seed: int,
    max_examples_per_batch: int | None,
    output_selector: Callable[[Any], Tensor] | None,
) -> PerturbationCurve:
    """The mean of the curves of both images, each against the embedding of the other as a whole."""
    check_callable("forward_func", encoder)
    if isinstance(encoder, SimilarityScore):
        raise TypeError(
            "Expected `forward_func` to be the encoder, which embeds both images, but got a SimilarityScore; pass"
            " score.encoder, its similarity and its output_selector."
        )
    check_similarity(similarity)
    for name, value in zip(("inputs", "reference"), images):
        check_inputs(value, name)
    inputs, reference = images
    if isinstance(baselines, Tensor) and baselines.ndim >= inputs.ndim:
        raise ValueError(
            "Expected `baselines` to be one for the images of both sides, a tensor without a batch dimension, but got"
            f" shape {tuple(baselines.shape)}; pass baselines[0]."
        )
    limit = max(len(inputs), 1) if max_examples_per_batch is None else max_examples_per_batch
    check_positive("max_examples_per_batch", limit)
    paired = inputs, reference[pair_index(len(inputs), len(reference))[:, 0].to(reference.device)]
    maps = [
        maps_for(x, m, name) for x, m, name in zip(paired, attributions, ("attributions", "reference_attributions"))
    ]
    nothings = [baseline_of(x, baselines, name) for x, name in zip(paired, ("inputs", "reference"))]

    def embed(name: str, x: Tensor) -> Tensor:
        return widen(check_rows(name, (x,), select_embedding(encoder(x), output_selector)))

    def score_of_input(x: Tensor, s: Tensor) -> Tensor:
        return channel_contributions(embed("inputs", x), s, similarity).sum(-1)

    def score_of_reference(r: Tensor, z: Tensor) -> Tensor:
        return channel_contributions(z, embed("reference", r), similarity).sum(-1)

    with torch.no_grad(), buffers_restored(encoder) as guard:
        z, s = (
            torch.cat([embed(name, part) for part in x.split(limit)]) if len(x) else x
            for name, x in zip(("inputs", "reference"), paired)
        )
    warn_once(warnings_of_training(encoder, guard.called))
    one, two = (
        curve(shown, score, x, m, nothing, (other,), None, n_steps, seed, limit)
        for score, x, m, nothing, other in zip((score_of_input, score_of_reference), paired, maps, nothings, (s, z))
    )
    return PerturbationCurve((one.auc + two.auc) / 2, (one.scores + two.scores) / 2, one.fractions)


def _pairs(matrix: Any, masks: Any, reference_masks: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values (B, N, N'), and which places are on the object, of the images (B, N) and the references (B, N')."""
    if isinstance(matrix, (tuple, list)) and len(matrix) == 1:
        matrix = matrix[0]
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        raise TypeError(f"Expected `matrix` to be a floating-point tensor (B, N, N'), but got {describe(matrix)}.")
    told = matrix.ndim == 5
    grids = [matrix.shape[1:3], matrix.shape[3:]] if told else [[isqrt(n)] * 2 for n in matrix.shape[1:]]
    places = [h * w for h, w in grids]
    if matrix.ndim not in (3, 5) or not all(places) or (not told and places != [*matrix.shape[1:]]):
        raise ValueError(
            "Expected `matrix` to be a matrix (B, N, N') of square grids, or (B, h, w, h', w'), but got shape"
            f" {tuple(matrix.shape)}; pass matrix.reshape(-1, h, w, h', w') for other grids, and matrix[None] for a"
            " single matrix."
        )
    if not matrix.isfinite().all():
        raise ValueError(f"Expected `matrix` to be finite, but {int((~matrix.isfinite()).sum())} values are not.")
    on = []
    for name, side, given, grid in zip(
        ("masks", "reference_masks"), ("image", "reference"), (masks, reference_masks), grids
    ):
        inside = inside_of(given, name)
        check_masks(len(matrix), inside, name)
        if not told:
            check_square("matrix", side, grid[0] ** 2, inside.shape[1:])
        on.append(_on_object(inside, grid).to(matrix.device))
    here, there = on
    return matrix.detach().reshape(len(matrix), here.shape[1], there.shape[1]), here, there


def _on_object(inside: Tensor, grid: Sequence[int]) -> Tensor:
    """The places (B, N) whose middle pixel is in the mask; if there is none, the places that hold most of it."""
    middle = at_middles(inside, grid).flatten(1)
    y, x = (
        F.one_hot((2 * torch.arange(size, device=inside.device) + 1) * n // (2 * size), n).float()
        for n, size in zip(grid, inside.shape[1:])
    )  # which place each row and each column of pixels belongs to
    held = (y.T @ inside.float() @ x).flatten(1)
    return torch.where(middle.any(1, keepdim=True), middle, held == held.amax(1, keepdim=True))
