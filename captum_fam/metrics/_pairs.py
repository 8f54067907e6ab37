"""Do two images' places find each other where they should? Metrics of a matrix of pairs of places."""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_fam._checks import check_square, describe
from captum_fam.metrics._localisation import at_middles, check_masks, inside_of


def pair_pointing_game(matrix: Tensor, masks: Tensor, reference_masks: Tensor) -> Tensor:
    r"""
    The pointing game of two images: is the strongest pair of places on the shared object in both?

    .. math:: \frac{|\{(i, j) \in T : i \in m, j \in m'\}|}{|T|}, \quad
              T = \{(i, j) : P_{ij} = \max P\}

    with the places m of the object in the image, and m' in the reference. One pair is the rule, and then it is 1 or 0;
    of several that are equally strong it is the share. As in :func:`pointing_game`, a place is on the object where
    its middle pixel is in the mask. If that is true of no place, as the object is too small, those are that hold most
    of it.

    For a matrix without structure it is the share of the image's places on the object, times that of the
    reference's: a sixteenth where both are a quarter. Compare with that, and with the matrix of an untrained
    encoder. The pointing game is that of Zhang et al. (https://arxiv.org/abs/1608.00507); that of two images is ours.

    Args:
        matrix (Tensor): A value for each place of the images with each place of their references, floating
                    point, as :meth:`.CorrespondenceMap.attribute_matrix` and
                    :meth:`.SimilarityDecomposition.attribute_matrix` return it: (B, N, N') where both grids are
                    square, else (B, h, w, h', w').
        masks (Tensor): Where the shared object is in the images, (B, H, W) or (B, 1, H, W), bool; for boxes see
                    :func:`box_masks`.
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
    Do the places of the shared object find it in the other image? Of the image's places on it, the share whose best
    match in the reference is on it, too:

    .. math:: \frac{1}{|m|} \sum_{i \in m} 1\left[\arg\max_j P_{ij} \in m'\right]

    with the places m of the object in the image, and m' in the reference, as in :func:`pair_pointing_game`. Where
    several places match a place equally well, the share of them.

    For a matrix without structure it is the share of the reference's places on the object. Compare with that, and
    with the matrix of an untrained encoder. The other direction, what the reference's places find in the image, is
    that of the transposed matrix with the masks exchanged:
    ``matching_accuracy(matrix.mT, reference_masks, masks)``, or ``matrix.permute(0, 3, 4, 1, 2)`` of a matrix
    (B, h, w, h', w').

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


def _pairs(matrix: Any, masks: Any, reference_masks: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values (B, N, N'), and which places are on the object, of the images (B, N) and the references (B, N')."""
    if isinstance(matrix, (tuple, list)) and len(matrix) == 1:
        matrix = matrix[0]
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        raise TypeError(f"Expected `matrix` to be a floating-point tensor (B, N, N'), but got {describe(matrix)}.")
    told = matrix.ndim == 5
    grids = [matrix.shape[1:3], matrix.shape[3:]] if told else [[isqrt(n)] * 2 for n in matrix.shape[1:]]
    if not (told or (matrix.ndim == 3 and all(h * w == n for (h, w), n in zip(grids, matrix.shape[1:])))) or not all(
        h * w for h, w in grids
    ):
        raise ValueError(
            "Expected `matrix` to be a matrix (B, N, N') of square grids, or (B, h, w, h', w'), but got shape"
            f" {tuple(matrix.shape)}; places of other grids are told by matrix.reshape(-1, h, w, h', w'), and one"
            " matrix is matrix[None]."
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
            check_square("matrix", side, grid[0] * grid[1], inside.shape[1:])
        on.append(_on_object(inside, grid).to(matrix.device))
    here, there = on
    return matrix.detach().reshape(len(matrix), here.shape[1], there.shape[1]), here, there


def _on_object(inside: Tensor, grid: Sequence[int]) -> Tensor:
    """The places (B, N) of a grid whose middle pixel is in the mask; if there is none, those that hold most of it."""
    middle = at_middles(inside, grid).flatten(1)
    y, x = (
        F.one_hot((2 * torch.arange(size, device=inside.device) + 1) * n // (2 * size), n).float()
        for n, size in zip(grid, inside.shape[1:])
    )  # which place each row and each column of pixels belongs to
    held = (y.T @ inside.float() @ x).flatten(1)
    return torch.where(middle.any(1, keepdim=True), middle, held == held.amax(1, keepdim=True))
