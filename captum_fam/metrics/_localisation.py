"""Does the map lie where it should? Metrics that need to know where: masks or boxes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_fam._checks import describe
from captum_fam.metrics._perturbed import maps_of, unit_range


def pointing_game(attributions: Tensor, masks: Tensor, tolerance: int = 0) -> Tensor:
    r"""
    Is the map's largest value in the mask? The pointing game of Zhang et al.
    (https://arxiv.org/abs/1608.00507).

    A map smaller than the mask points at the middle of its largest cell, because interpolation
    would move the largest value of a border cell to the border. If several places have the largest
    value, the result is the share of them in the mask.

    A map that always points at the middle does well on photographs, because people put their
    subject there: compare with such a map.

    Args:
        attributions (Tensor): Maps (B, C, h, w), floating point, of any size; channels are
                    summed.
        masks (Tensor): Where the map should lie, (B, H, W) or (B, 1, H, W), bool; :func:`box_masks`
                    makes them of boxes.
        tolerance (int): How many pixels from the mask, along each axis, still count as a hit. The
                    paper allows 15.
                    Default: 0

    Returns:
        *Tensor*: 1 for a hit, 0 for a miss, (B,), on the maps' device.

    Raises:
        TypeError, ValueError: an argument is not as described above, or a mask is empty.

    Examples::

        >>> masks = torch.tensor([[[True, False], [False, False]]])
        >>> pointing_game(torch.tensor([[[[3.0, 1.0], [0.0, 2.0]]]]), masks)
        tensor([1.])
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, int) or tolerance < 0:
        raise ValueError(f"Expected `tolerance` to be a number of pixels, 0 or more, but got {describe(tolerance)}.")
    inside = inside_of(masks)
    maps = maps_of(attributions)
    if maps.ndim != 3:
        raise ValueError(
            "Expected `attributions` (B, C, h, w) with 2 spatial dimensions, but got maps of shape"
            f" {(len(maps), 1, *maps.shape[1:])}."
        )
    check_masks(len(maps), inside)
    if tolerance:
        inside = F.max_pool2d(inside[:, None].float(), 2 * tolerance + 1, 1, tolerance)[:, 0] > 0
    hit = at_middles(inside, maps.shape[1:]).to(maps.device)
    top = maps == maps.amax((1, 2), keepdim=True)
    return (top & hit).sum((1, 2)) / top.sum((1, 2))


def energy_pointing_game(attributions: Tensor, masks: Tensor) -> Tensor:
    r"""
    How much of the map lies in the mask? The energy-based pointing game (Score-CAM, Wang et al.,
    https://arxiv.org/abs/1910.01279) is the share of the map's positive part in the mask,

    .. math:: \frac{\sum_{i \in mask} \max(M_i, 0)}{\sum_i \max(M_i, 0)}

    A map without structure gets the mask's share of the image; a map without positive values gets
    0.

    Args:
        attributions (Tensor): Maps (B, C, h, w), floating point. Channels are summed; maps of
                    another size are resized bilinearly to that of the masks.
        masks (Tensor): As in :func:`pointing_game`.

    Returns:
        *Tensor*: shares in [0, 1], (B,), on the maps' device.

    Raises:
        TypeError, ValueError: As in :func:`pointing_game`.

    Examples::

        >>> masks = torch.tensor([[[True, False], [False, False]]])
        >>> energy_pointing_game(torch.tensor([[[[3.0, 1.0], [-5.0, 0.0]]]]), masks)
        tensor([0.7500])
    """
    maps, inside = _places(attributions, masks)
    energy = maps.clamp(min=0)
    energy = energy / _or_one(energy.amax(1, keepdim=True))  # so that no sum overflows or vanishes
    return (energy * inside).sum(1) / _or_one(energy.sum(1))


def relevance_rank_accuracy(attributions: Tensor, masks: Tensor) -> Tensor:
    r"""
    Do the largest values of the map lie in the mask? Relevance rank accuracy (Arras et al.,
    https://arxiv.org/abs/2003.07258) is the share in the mask of the K largest values, with K the
    size of the mask.

    If values tie at the border of the K largest, the result is the mean over their possible orders.
    A map without structure gets the mask's share of the image.

    Args:
        attributions, masks (Tensor): As in :func:`energy_pointing_game`.

    Returns:
        *Tensor*: shares in [0, 1], (B,), on the maps' device.

    Raises:
        TypeError, ValueError: As in :func:`pointing_game`.

    Examples::

        >>> masks = torch.tensor([[[True, True], [False, False]]])
        >>> relevance_rank_accuracy(torch.tensor([[[[3.0, 1.0], [2.0, 0.0]]]]), masks)
        tensor([0.5000])
    """
    maps, inside = _places(attributions, masks)
    K = inside.sum(1, keepdim=True)
    border = maps.sort(1, descending=True).values.gather(1, K - 1)
    above, level = maps > border, maps == border
    share = (K - above.sum(1, keepdim=True)) / level.sum(1, keepdim=True)  # of those level with the border
    hits = (above & inside).sum(1, keepdim=True) + share * (level & inside).sum(1, keepdim=True)
    return (hits / K)[:, 0]


def iou(attributions: Tensor, masks: Tensor, threshold: float | None = 0.5) -> Tensor:
    r"""
    Do the map and the mask cover the same places? The intersection over union (IoU) of the mask and
    the places where the map is at or above a threshold. A fixed threshold applies to the positive
    part of the map, scaled from its smallest value to its largest.

    ``threshold=None`` chooses the best threshold among all values of each map, negative ones too,
    with the mask in view. That is an upper bound: any map gets the mask's share of the image or
    more.

    Args:
        attributions, masks (Tensor): As in :func:`energy_pointing_game`.
        threshold (float, optional): In (0, 1]; None for the best of all thresholds.
                    Default: 0.5

    Returns:
        *Tensor*: in [0, 1], (B,), on the maps' device. A flat map, and one without positive
        values, gets 0 at a fixed threshold.

    Raises:
        TypeError, ValueError: As in :func:`pointing_game`, or ``threshold`` is outside (0, 1].

    Examples::

        >>> masks = torch.tensor([[[True, True], [False, False]]])
        >>> maps = torch.tensor([[[[4.0, 1.0], [2.0, 0.0]]]])
        >>> iou(maps, masks), iou(maps, masks, threshold=None)
        (tensor([0.3333]), tensor([0.6667]))
    """
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if threshold is not None and not (is_number and 0 < threshold <= 1):
        raise ValueError(f"Expected `threshold` to be in (0, 1], or None for the best, but got {describe(threshold)}.")
    maps, inside = _places(attributions, masks)
    if threshold is not None:
        chosen = unit_range(maps) >= threshold
        return (chosen & inside).sum(1) / (chosen | inside).sum(1)
    ordered, order = maps.sort(1, descending=True)
    hits = inside.gather(1, order).cumsum(1)
    count = torch.arange(1, maps.shape[1] + 1, device=maps.device)
    ratio = hits / (inside.sum(1, keepdim=True) + count - hits)
    ends = F.pad(ordered[:, 1:] < ordered[:, :-1], (0, 1), value=True)  # equal values are chosen together
    return torch.where(ends, ratio, 0).amax(1)


def box_masks(boxes: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    r"""
    Which pixels are in the boxes? Makes masks; a pixel belongs to a box that holds its centre.

    Args:
        boxes (sequence of Tensor): The boxes of each image, (N, 4), or one box (4,), as
                    x1, y1, x2, y2 in pixels: the form of ``torchvision.ops``.
        size (sequence of int): Height and width of the images in pixels.

    Returns:
        *Tensor*: masks (B, 1, H, W), bool, the union of each image's boxes.

    Raises:
        ValueError: boxes or size are not as described above.

    Examples::

        >>> box_masks([torch.tensor([1.0, 0.0, 3.0, 1.0])], (2, 4)).int()
        tensor([[[[0, 1, 1, 0],
                  [0, 0, 0, 0]]]], dtype=torch.int32)
    """
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"Expected `size` to be a height and a width, but got {size!r}.")
    masks = []
    for one in boxes:
        if not isinstance(one, Tensor) or one.ndim not in (1, 2) or one.shape[-1] != 4:
            raise ValueError(f"Expected `boxes` to be a tensor (N, 4) for each image, but got {describe(one)}.")
        x1, y1, x2, y2 = one.reshape(-1, 4).float().T[..., None]
        y, x = (torch.arange(n, device=one.device) + 0.5 for n in size)
        rows, columns = (y1 <= y) & (y < y2), (x1 <= x) & (x < x2)
        masks.append((rows[:, :, None] & columns[:, None]).any(0, keepdim=True))
    return torch.stack(masks) if masks else torch.zeros(0, 1, *size, dtype=torch.bool)


def _places(attributions: Any, masks: Any) -> tuple[Tensor, Tensor]:
    """Maps and masks, (B, H * W)."""
    inside = inside_of(masks)
    maps = maps_of(attributions, inside.shape[1:])
    check_masks(len(maps), inside)
    return maps.flatten(1), inside.flatten(1).to(maps.device)


def inside_of(masks: Any, name: str = "masks") -> Tensor:
    """Masks (B, H, W)."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise TypeError(f"Expected `{name}` to be a bool tensor (B, H, W), but got {describe(masks)}; pass {name} > 0.")
    if masks.ndim not in (3, 4) or (masks.ndim == 4 and masks.shape[1] != 1):
        raise ValueError(f"Expected `{name}` (B, H, W) or (B, 1, H, W), but got shape {tuple(masks.shape)}.")
    return masks.flatten(0, -3)


def check_masks(maps: int, inside: Tensor, name: str = "masks") -> None:
    if len(inside) != maps:
        raise ValueError(f"Expected `{name}` with a mask for each map, but got {len(inside)} masks for {maps} maps.")
    if not inside.any(2).any(1).all():
        empty = (~inside.any(2).any(1)).nonzero().flatten().tolist()
        raise ValueError(f"Expected `{name}` to show where the map should lie, but masks {empty} are empty.")


def at_middles(inside: Tensor, grid: Sequence[int]) -> Tensor:
    """Whether the middle pixel of each place of a grid is in the mask, (B, *grid)."""
    y, x = (((torch.arange(n) + 0.5) * size / n).long() for n, size in zip(grid, inside.shape[1:]))
    return inside[:, y[:, None], x]


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
