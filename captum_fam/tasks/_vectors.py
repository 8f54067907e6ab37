"""Embeddings of many vectors each, as libraries and stores give them."""

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captum_fam._checks import describe
from captum_fam.similarity import widen

Vectors: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]


def as_vectors(name: str, given: Any, mask_name: str, mask: Any) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """Embeddings (N, T, D), at least in single precision; which count (N, T), if it is said; and (N,) of a batch."""
    x, lengths = as_batch(name, given)
    if x.ndim not in (2, 3) or not x.numel() or x.dtype == torch.bool or x.is_complex():
        raise ValueError(
            f"Expected `{name}` to be numbers (tokens, dimensions), or a batch or list of them, but got {describe(x)}."
        )
    if x.ndim == 2 and lengths is not None:  # a list of tokens, no batch
        if not lengths.all():
            raise ValueError(
                f"Expected `{name}` of one number of dimensions, but got {lengths.sum(1).unique().tolist()}."
            )
        lengths = None
    x = widen(x if x.is_floating_point() else x.float())
    batch = tuple(x.shape[:-2])
    x = x.reshape(-1, *x.shape[-2:])
    if mask is None:
        return x, lengths, batch
    flags, _ = as_batch(mask_name, mask)
    if flags.shape not in (x.shape[:2], x.shape[1:2]) or not ((flags == 0) | (flags == 1)).all():
        raise ValueError(
            f"Expected `{mask_name}` to be a mask of ones and zeros for the tokens of `{name}`, {tuple(x.shape[:2])},"
            f" but got {describe(flags)}."
        )
    return x, flags.to(x.device, torch.bool).expand(x.shape[:2]), batch


def as_batch(name: str, given: Any) -> tuple[Tensor, Tensor | None]:
    """What is given as one tensor. A list of parts is padded; the second result says which rows are no padding."""
    try:
        if not isinstance(given, (list, tuple)) or not given:
            return _as_tensor(given), None
        parts = [_as_tensor(part) for part in given]
        if not parts[0].ndim:
            return torch.stack(parts), None
        padded = pad_sequence(parts, batch_first=True)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise TypeError(f"Expected `{name}` to be a tensor, or a list of tensors of one form, but: {error}.") from error
    ends = torch.tensor([len(part) for part in parts], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < ends[:, None]


def _as_tensor(given: Any) -> Tensor:
    return torch.as_tensor(np.array(given) if isinstance(given, np.ndarray) else given)  # also of read-only arrays


def as_grid(name: str, grid: Any) -> tuple[int, int]:
    try:
        h, w = (operator.index(side) for side in grid)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Expected `{name}` to be two numbers, rows and columns, but got {describe(grid)}.") from error
    if min(h, w) < 1:
        raise ValueError(f"Expected `{name}` of at least one row and column, but got {h} x {w}.")
    return h, w


def as_places(patches: Any, tokens: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Tensor:
    """The numbers of the tokens (K, h w) that are the places of K pages, row by row."""
    (K, P), (h, w) = tokens, grid
    mask = torch.ones(P, dtype=torch.bool) if patches is None else as_batch("patches", patches)[0]
    cure = "pass patches=input_ids == image_token_id, or embed without pooling tokens"
    if mask.dtype == torch.bool:
        if mask.shape not in ((K, P), (P,)):
            raise ValueError(f"Expected `patches` to be a mask of shape {(K, P)} or {(P,)}, but got {describe(mask)}.")
        counts = sorted(set(mask.sum(-1).reshape(-1).tolist()))
        if counts != [h * w]:
            raise ValueError(
                f"Expected {h * w} patches of a page, for a grid of {h} x {w}, but got"
                f" {' or '.join(map(str, counts))} of {P} tokens; {cure}."
            )
        return mask.to(device).expand(K, P).nonzero()[:, 1].reshape(K, h * w)
    numbers = mask.to(device)
    if (
        numbers.is_floating_point()
        or numbers.is_complex()
        or numbers.shape not in ((K, h, w), (h, w), (K, h * w), (h * w,))
    ):
        raise ValueError(
            f"Expected `patches` to be a bool mask of the tokens, or their numbers {(K, h, w)} or {(h, w)}, but got"
            f" {describe(mask)}."
        )
    numbers = numbers.long().reshape(-1, h * w).expand(K, h * w)
    ordered = numbers.sort(1).values
    if ordered[:, 0].min() < 0 or ordered[:, -1].max() >= P or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError(
            f"Expected `patches` to number each token once, from 0 to {P - 1}; for a mask, pass patches.bool()."
        )
    return numbers
