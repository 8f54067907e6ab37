"""
Whether the places of a layer lie where its map says.

A shape alone cannot tell: tokens may be shuffled, a class token may come last, what looks like a map may be windows, or
an attention. So where it leaves doubt, the encoder is asked: one cell of the input is changed after another, and each
time the place that the map has there must be the one that answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from captum_fam.engine.chunks import Tensors, cut, cut_arguments
from captum_fam.engine.untouched import model_of, roots_of
from captum_fam.similarity import widen
from captum_fam.tokens import Patches, channels_last, fit, images_of, patch_tokens, patches_of, to_map

if TYPE_CHECKING:
    from captum_fam.engine.recording import Recording


class Doubt(Enum):
    """What is not known of a layer's layout: whether its channels come last, or where its places lie."""

    CHANNELS = "channels"
    PLACES = "places"


# Changes of the input, about: so many cells of a map, or all cells of a small one, several times if they are few.
_CHANGES = 8
# How far from a cell the places that answer may lie, beside all places (benchmarks/order.md).
_NEAR = 0.5
# Cells of a map that tell little.
_FEW = 4

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


class Layouts:
    """How the activations of an encoder's layers lie on its inputs: by its own words, or by their shape."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self._forward_func = forward_func

    @cached_property
    def _said(self) -> dict[Patches, set[nn.Module]]:
        """What the vision transformers in an encoder say, of these modules."""
        said: dict[Patches, set[nn.Module]] = {}
        for module in (m for root in roots_of(self._forward_func) for m in root.modules()):
            if (patches := patches_of(module)) is not None:
                said.setdefault(patches, set()).update(module.modules())
        return said

    def to_map(self, activation: Tensor, inputs: Tensors, dimensions: int | None) -> Tensor | None:
        """As (B, C, *spatial), for an embedding of so many dimensions; None where several layouts fit."""
        images = images_of(inputs)
        for patches in self._said if activation.ndim == 3 else ():
            if (grid := patches.grid(activation, images)) is not None:
                return patch_tokens(*grid)(activation)
        return to_map(activation, images, dimensions)

    def doubt(self, layer: nn.Module, activation: Tensor, inputs: Tensors) -> Doubt | None:
        """What is to be asked of the encoder before what a layer gave is taken for ``to_map`` of it."""
        images = images_of(inputs)
        if activation.ndim < 3 or activation.shape[2:].numel() == 1:
            return None
        if activation.ndim == 3 and any(layer in of and p.grid(activation, images) for p, of in self._said.items()):
            return None
        if activation.ndim != images.ndim or self._is_attention(layer):
            return Doubt.PLACES
        if images.ndim < 4:
            return None if _is_channels_first(layer) else Doubt.CHANNELS
        first, last = (fit(grid, images.shape[2:]) for grid in (activation.shape[2:], activation.shape[1:-1]))
        return None if first != last else Doubt.CHANNELS if first else Doubt.PLACES

    def _is_attention(self, layer: nn.Module) -> bool:
        model = model_of(self._forward_func)
        name = next((n for n, m in model.named_modules() if m is layer and n), None) if model is not None else None
        if model is None or name is None:
            return isinstance(layer, nn.Softmax) or _names_attention([type(layer).__name__])
        return isinstance(layer, nn.Softmax) or in_attention(model, name)


def in_attention(model: nn.Module, name: str) -> bool:
    """Whether the module of that name is an attention, or a part of one."""
    parts = name.split(".")
    classes = [type(model.get_submodule(".".join(parts[: i + 1]))).__name__ for i in range(len(parts))]
    # A ResidualAttentionBlock is more than its attention.
    return _names_attention([*parts, *(c for c in classes if not c.endswith(("Block", "Layer")))])


def _names_attention(words: list[str]) -> bool:
    return any(word in written.lower() for word in ("attn", "attention") for written in words)


def _is_channels_first(layer: nn.Module) -> bool:
    """Whether a layer's own type says that dimension 1 of what it takes and gives is its channels."""
    while isinstance(layer, nn.Sequential) and len(layer):
        layer = layer[-1]
    return isinstance(layer, _CHANNELS_FIRST)


def check_order(
    recording: "Recording", layers: Sequence[nn.Module], activations: Callable[[Tensors, Any], list[Tensor]]
) -> None:
    """
    Raises an error where the places of a layer do not lie where its map says. Where that is not known, the encoder is
    asked, once for inputs of a shape: ``activations`` runs it and gives what the layers gave.
    """
    encoder, inputs, args = recording.encoder, recording.inputs, recording.additional_forward_args
    of = [layer for layer, size in zip(layers, recording.sizes) for _ in range(size)]
    doubts = [encoder.layouts.doubt(layer, a, inputs) for layer, a in zip(of, recording.given)]
    asked = (encoder.forward_func, recording.layer_input, *layers, *(t.shape[1:] for t in inputs))
    if not any(doubts) or not len(inputs[0]) or asked in encoder.confirmed:
        return
    answers, failure = ask(activations, doubts, encoder.layouts, inputs, args, recording.embedding.shape[1])
    for name, given, answer in zip(recording.names, recording.given, answers):
        if not answer:
            found = (
                "when a part of an input was changed, other places of the map answered than the one there, or all alike"
            )
            if failure is not None:
                found = f"the encoder failed when a part of an input was changed ({type(failure).__name__}: {failure})"
            raise ValueError(
                f"The activations {tuple(given.shape)} of layer {name} do not lie on inputs"
                f" {tuple(images_of(inputs).shape)} as their shape suggests: {found}. That is so where tokens are in an"
                " order of their own (a class token that is not the first, windows, a shuffle, the batch second), where"
                " the channels come last, and inside attentions. Choose another layer, or pass a reshape_transform that"
                " returns (B, C, *spatial) in the order of the input, such as patch_tokens(height, width),"
                " channels_last, or lambda a: a to take them as they are."
            ) from failure
    encoder.confirmed.add(asked)


def ask(
    activations: Callable[[Tensors, Any], Sequence[Tensor | None]],
    doubts: Sequence[Doubt | None],
    layouts: Layouts,
    inputs: Tensors,
    additional_forward_args: Any,
    dimensions: int,
) -> tuple[list[bool], Exception | None]:
    """
    For each of the layers whose activations the function gives, whether it lies as its layout says: whether the places
    of its map answer where the input changes, or, if that is the doubt, whether they do so better than its channels.
    None does where the encoder fails on a changed input; its error comes second.
    """
    if not any(doubts):
        return [True] * len(doubts), None
    B, at = len(inputs[0]), next(i for i, t in enumerate(inputs) if t is images_of(inputs))

    def found(rows: slice) -> list[bool]:
        given, args = cut(inputs, rows), cut_arguments(additional_forward_args, rows, B)

        def run(x: Tensor) -> list[Tensor | None]:
            with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
                torch.manual_seed(0)  # what is random is the same each time
                outputs = activations((*given[:at], x, *given[at + 1 :]), args)
            return [
                a if d is not None and a is not None and len(a) == len(x) else None for a, d in zip(outputs, doubts)
            ]

        places = _answers(run, lambda a: layouts.to_map(a, inputs, dimensions), given[at])
        if Doubt.CHANNELS not in doubts:
            return [d is None or a.is_local for d, a in zip(doubts, places)]
        channels = _answers(run, channels_last, given[at])
        return [
            d is None or (a.is_local if d is Doubt.PLACES else a.mean <= b.mean or (a.cells <= _FEW and not b.is_local))
            for d, a, b in zip(doubts, places, channels)
        ]

    failure = None
    for rows in (slice(1), slice(None)):  # an encoder may need the whole batch
        try:
            return found(rows), None
        except Exception as error:
            failure = error
    return [doubt is None for doubt in doubts], failure


@dataclass(frozen=True)
class _Answer:
    """
    How places have answered to changes of an input.

    Attributes:
        cells: that were changed.
        mean: how far from the changed cells the places that answer lie, beside all places: about 1 by chance.
        is_local: whether all cells were answered nearby, and where tokens were left out, none of the others should be.
    """

    cells: int = 0
    mean: float = math.inf
    is_local: bool = False


def _answers(
    run: Callable[[Tensor], Sequence[Tensor | None]], to_map: Callable[[Tensor], Tensor | None], x: Tensor
) -> list[_Answer]:
    """For each of the layers whose activations ``run`` gives, as maps, how they answer to changes of x (B, ...)."""
    x = x.detach().nan_to_num(0, 0, 0) if x.is_floating_point() else x
    given = run(x)

    def maps(activations: Sequence[Tensor | None]) -> list[Tensor | None]:
        found = [None if a is None else to_map(a) for a in activations]
        return [None if A is None or A.ndim < 3 else A for A in found]

    before = maps(given)
    answers = [_Answer()] * len(before)
    for spatial in dict.fromkeys(tuple(A.shape[2:]) for A in before if A is not None):
        cells = _cells(spatial)
        times = -(-_CHANGES // len(cells))
        # The axes that a map may lie on; the channels of images are none.
        for axes in reversed(list(combinations(range(1 if x.ndim < 4 else 2, x.ndim), len(spatial)))):
            asked = {i: A for i, A in enumerate(before) if A is not None and A.shape[2:] == spatial}
            asked = {i: A for i, A in asked.items() if not answers[i].is_local}
            changes: dict[int, list[Tensor]] = {i: [] for i in asked}
            for number, cell in enumerate(cells * times if asked else ()):
                after = maps(run(_changed(x, axes, spatial, cell, number)))
                for i, A in asked.items():
                    if (B := after[i]) is not None and A.shape == B.shape:
                        changes[i].append((widen(B) - widen(A))[0].norm(dim=0).flatten())
            for i, A in asked.items():
                if len(changes[i]) == times * len(cells):
                    changed = torch.stack(changes[i]).double().cpu().unflatten(0, (times, len(cells))).mean(0)
                    answer = _answer(changed, spatial, cells, A.numel() < cast(Tensor, given[i]).numel())
                    answers[i] = min(answers[i], answer, key=lambda a: a.mean)
    return answers


def _cells(spatial: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All cells of a small map; of others the corners, the second along each axis, and a few by chance."""
    places = math.prod(spatial)
    corners = list(product(*((0, n - 1) for n in spatial)))
    seconds = [tuple(int(axis == i and n > 1) for i, n in enumerate(spatial)) for axis in range(len(spatial))]
    by_chance = torch.randperm(places, generator=torch.Generator().manual_seed(0))[: 2 * _CHANGES].tolist()
    others = [tuple(int(i) for i in torch.unravel_index(torch.tensor(n), spatial)) for n in by_chance]
    cells = list(dict.fromkeys([*corners, *seconds, *others]))
    return cells if places <= 2 * _CHANGES else cells[: max(_CHANGES, len(corners) + len(seconds))]


def _changed(x: Tensor, axes: tuple[int, ...], spatial: tuple[int, ...], cell: tuple[int, ...], number: int) -> Tensor:
    """The input with random values, between its smallest and its largest, in the part that a cell of the map covers."""
    where: list[slice] = [slice(None)] * x.ndim
    for axis, n, i in zip(axes, spatial, cell):
        begin, end = i * x.shape[axis] // n, -(-(i + 1) * x.shape[axis] // n)
        where[axis] = slice(begin, max(end, begin + 1))
    changed = x.clone()
    part = changed[tuple(where)]
    random = torch.rand(part.shape, generator=torch.Generator().manual_seed(number)).to(x.device)
    low, high = x.min(), x.max()
    if x.is_floating_point():
        part.copy_(low + random * torch.where(high > low, high - low, torch.ones_like(low)))
    else:
        part.copy_(low + (random * (high - low + 1)).to(x.dtype))
    return changed


def _answer(changes: Tensor, spatial: tuple[int, ...], cells: list[tuple[int, ...]], partial: bool) -> _Answer:
    """
    Where the changes (cells, places) of a map lie, of which tokens may have been left out.

    What changes whichever cell was changed, as a class token does, is taken away; what is left is a weight for the
    distance from the cell.
    """
    if not changes.isfinite().all():
        return _Answer()
    mean_of_others = (changes.sum(0) - changes) / max(1, len(cells) - 1)
    own = (changes - mean_of_others).clamp(min=0)
    largest = own.amax(1, keepdim=True)
    if not (largest > 0).all():
        return _Answer()
    weights = (own / largest).square()
    sizes = torch.tensor(spatial, dtype=torch.double)
    number = torch.arange(math.prod(spatial))

    def distances(places: Tensor) -> Tensor:
        where = torch.stack(torch.unravel_index(places % len(number), spatial), 1) / sizes
        return torch.cdist(torch.tensor(cells, dtype=torch.double) / sizes, where, p=1)

    def found(places: Tensor) -> Tensor:
        return (weights * distances(places)).sum(1) / weights.sum(1)

    near = found(number)
    # Of tokens, the wrong ones may have been left out: then all lie better one further, or those of one side do.
    better = near > torch.stack([found(number - 1), found(number + 1)]).amin(0) + 1e-9
    ratios = near / distances(number).mean(1)
    is_local = bool((ratios < _NEAR).all()) and not (partial and int(better.sum()) > 1)
    return _Answer(len(cells), float(ratios.mean()), is_local)
