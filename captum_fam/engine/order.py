"""
Whether the places of a layer lie where its map says.

A shape alone cannot tell: tokens may be shuffled, a class token may come last, what looks like a map may be windows, or
an attention. So where it leaves doubt, the encoder is asked: one cell of the input is changed after another, and each
time the place that the map has there must be the one that answers.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import combinations, product, takewhile
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


# Cells of a map that are changed: all of a small one, several times if they are few, or so many of them.
_CHANGES = 16
# How far from a cell the places that answer may lie, beside all places, and of how many cells one at its place or the
# next must answer most (benchmarks/order.md).
_NEAR, _MOST = 0.5, 0.75
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
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention, nn.Embedding, nn.RNNBase)


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
                own = [m for name, m in module.named_modules() if "pool" not in name and "ln_post" not in name]
                said.setdefault(patches, set()).update(own)  # what a pooler gives are no patches
        return said

    def to_map(self, activation: Tensor, inputs: Tensors, dimensions: int | None) -> Tensor | None:
        """As (B, C, *spatial), for an embedding of so many dimensions; None where several layouts fit."""
        images = images_of(inputs)
        for patches in self._said if activation.ndim == 3 else ():
            if (grid := patches.grid(activation, images)) is not None:
                return patch_tokens(*grid)(activation)
        return to_map(activation, images, dimensions)

    def doubt(self, layer: nn.Module, activation: Tensor, inputs: Tensors, dimensions: int | None) -> Doubt | None:
        """What is to be asked of the encoder before what a layer gave is taken for ``to_map`` of it."""
        images = images_of(inputs)
        if activation.ndim < 3 or activation.shape[2:].numel() == 1:
            return None
        if activation.ndim == 3 and any(layer in of and p.grid(activation, images) for p, of in self._said.items()):
            return None
        if activation.ndim != images.ndim or self._is_attention(layer, activation):
            return Doubt.PLACES
        if images.ndim != 4:  # one stride for all sides is no rule there
            return None if channels_first(layer.modules()) else Doubt.CHANNELS
        A = to_map(activation, images, dimensions)
        if A is None:
            return Doubt.PLACES
        if A.shape != activation.shape:  # channels last; or so many blocks of so many places, both of a square
            blocks, each = activation.shape[1:3]
            may_be_pieces = math.isqrt(blocks) ** 2 == blocks and math.isqrt(each) ** 2 == each
            return Doubt.PLACES if may_be_pieces and blocks * each > _CHANGES else None
        first, last = (fit(grid, images.shape[2:]) for grid in (activation.shape[2:], activation.shape[1:-1]))
        return None if first > last else Doubt.CHANNELS if first else Doubt.PLACES

    def _is_attention(self, layer: nn.Module, activation: Tensor) -> bool:
        """Whether a layer gives what each place takes from each other: (B, heads, N, N)."""
        if activation.ndim != 4 or activation.shape[2] != activation.shape[3] or channels_first(layer.modules()):
            return False
        model = model_of(self._forward_func)
        name = next((n for n, m in model.named_modules() if m is layer and n), None) if model is not None else None
        named = model is not None and name is not None and in_attention(model, name)
        return isinstance(layer, nn.Softmax) or named


def in_attention(model: nn.Module, name: str) -> bool:
    """Whether the module of that name is an attention, or a part of one."""
    parts = name.split(".")
    classes = [type(model.get_submodule(".".join(parts[: i + 1]))).__name__ for i in range(len(parts))]
    # A ResidualAttentionBlock is more than its attention.
    words = [*parts, *(c for c in classes if not c.endswith(("Block", "Layer")))]
    return any(word in written.lower() for word in ("attn", "attention") for written in words)


def channels_first(modules: Iterable[nn.Module]) -> bool | None:
    """Whether dimension 1 of what modules take and give is the channels, if their types say so."""
    said = {isinstance(m, _CHANNELS_FIRST) for m in modules if isinstance(m, _CHANNELS_FIRST + _CHANNELS_LAST)}
    return None if not said else said == {True}


def check_order(
    recording: "Recording",
    layers: Sequence[nn.Module],
    called: Iterable[nn.Module],
    again: Collection[nn.Module],
    activations: Callable[[Tensors, Any], list[Tensor]],
) -> None:
    """
    Raises an error where the places of a layer do not lie where its map says. Where that is not known, the encoder is
    asked, once for inputs of a shape: ``activations`` runs it and gives what the layers gave. ``called`` are the
    modules in the order of their first calls; those called ``again``, perhaps with another input, have a warning.
    """
    encoder, inputs, args = recording.encoder, recording.inputs, recording.additional_forward_args
    of = [layer for layer, size in zip(layers, recording.sizes) for _ in range(size)]
    D = recording.embedding.shape[1]
    doubts = [
        None if layer in again else encoder.layouts.doubt(layer, a, inputs, D) for layer, a in zip(of, recording.given)
    ]
    sizes = [t.shape[1:] if images_of(inputs).ndim > 3 else t.ndim for t in inputs]  # a signal may have any length
    asked = (id(encoder.forward_func), recording.layer_input, *layers, *sizes)
    if not any(doubts) or not len(inputs[0]) or asked in encoder.confirmed:
        return
    convolved = [follows_convolution(layer, called) for layer in of]
    answers, failure = ask(activations, doubts, convolved, encoder.layouts, inputs, args, D)
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


def follows_convolution(layer: nn.Module, called: Iterable[nn.Module]) -> bool:
    """Whether the last module whose type tells, in a layer or else before it, has its channels first."""
    own = list(layer.modules())
    before = takewhile(lambda m: m is not layer, called)
    told = [first for m in (*before, *own) if (first := channels_first([m])) is not None]
    return bool(told and told[-1])


def ask(
    activations: Callable[[Tensors, Any], Sequence[Tensor | None]],
    doubts: Sequence[Doubt | None],
    convolved: Sequence[bool],
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
            outputs = activations((*given[:at], x, *given[at + 1 :]), args)
            return [
                a if d is not None and a is not None and len(a) == len(x) else None for a, d in zip(outputs, doubts)
            ]

        places = _answers(run, lambda a: layouts.to_map(a, inputs, dimensions), given[at])
        channels = _answers(run, channels_last, given[at]) if Doubt.CHANNELS in doubts else places
        return [
            d is None
            or (d is Doubt.CHANNELS and _are_places(a, b, c if given[at].ndim < 4 else None))
            or (d is Doubt.PLACES and (a.is_local if a.of_tokens else a.is_near or (c and a.mean < _NEAR)))
            for d, a, b, c in zip(doubts, places, channels, convolved)
        ]

    failure = None
    for rows in (slice(1), slice(None)):  # an encoder may need the whole batch
        try:
            return found(rows), None
        except Exception as error:
            failure = error
    return [doubt is None for doubt in doubts], failure


def _are_places(places: "_Answer", channels: "_Answer", of_convolution: bool | None) -> bool:
    """Whether the places of a map are its places, and not its channels; None of images, whose channels lie nowhere."""
    if places.is_near and channels.is_near and of_convolution is not None:  # residual paths leave both where they were
        return of_convolution
    return places.mean <= channels.mean or (places.cells <= _FEW and not channels.is_near)


@dataclass(frozen=True)
class _Answer:
    """
    How places have answered to changes of an input.

    Attributes:
        cells: that were changed.
        mean: how far from the changed cells the places that answer lie, beside all places: about 1 by chance.
        is_near: whether that holds for all cells.
        is_local: whether the cells themselves answer, too, and the right tokens were left out.
        of_tokens: whether the map was made of tokens; others may be blurred by large kernels.
    """

    cells: int = 0
    mean: float = math.inf
    of_tokens: bool = False
    is_near: bool = False
    is_local: bool = False


def _answers(
    run: Callable[[Tensor], Sequence[Tensor | None]], to_map: Callable[[Tensor], Tensor | None], x: Tensor
) -> list[_Answer]:
    """For each of the layers whose activations ``run`` gives, as maps, how they answer to changes of x (B, ...)."""
    x = x.detach().nan_to_num(0, 0, 0) if x.is_floating_point() else x.detach()
    state, is_random = _random_state(), True
    try:
        given = run(x)
        is_random = not all(map(torch.equal, state, _random_state()))
        if is_random:  # what it draws is to be the same each time
            _set_random_state(state)
            given = run(x)

        def changed_run(changed: Tensor) -> Sequence[Tensor | None]:
            if is_random:
                _set_random_state(state)
            return run(changed)

        return _answers_to(changed_run, given, to_map, x)
    finally:
        if is_random:
            _set_random_state(state)


def _answers_to(
    run: Callable[[Tensor], Sequence[Tensor | None]],
    given: Sequence[Tensor | None],
    to_map: Callable[[Tensor], Tensor | None],
    x: Tensor,
) -> list[_Answer]:
    """The same, of activations that are given for x."""

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
                    a = cast(Tensor, given[i])
                    answer = _answer(changed, spatial, cells, A.numel() < a.numel())
                    answer = replace(answer, of_tokens=A.ndim != a.ndim)
                    answers[i] = min(answers[i], answer, key=lambda a: a.mean)
    return answers


def _random_state() -> list[Tensor]:
    """Of torch on the CPU, and on the GPUs if it has been there."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def _cells(spatial: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All cells of a small map; of others the corners, the second along each axis, and some by chance."""
    places = math.prod(spatial)
    corners = list(product(*((0, n - 1) for n in spatial)))
    seconds = [tuple(int(axis == i and n > 1) for i, n in enumerate(spatial)) for axis in range(len(spatial))]
    by_chance = torch.randperm(places, generator=torch.Generator().manual_seed(0))[: 2 * _CHANGES].tolist()
    others = [tuple(int(i) for i in torch.unravel_index(torch.tensor(n), spatial)) for n in by_chance]
    cells = list(dict.fromkeys([*corners, *seconds, *others]))
    return cells[: max(_CHANGES, len(corners) + len(seconds))]


def _changed(x: Tensor, axes: tuple[int, ...], spatial: tuple[int, ...], cell: tuple[int, ...], number: int) -> Tensor:
    """The input with random values, between its smallest and its largest, in the part that a cell of the map covers."""
    where: list[slice] = [slice(None)] * x.ndim
    for axis, n, i in zip(axes, spatial, cell):
        begin, end = i * x.shape[axis] // n, -(-(i + 1) * x.shape[axis] // n)
        where[axis] = slice(begin, max(end, begin + 1))
    changed = x.clone()
    part = changed[tuple(where)]
    random = torch.rand(part.shape, generator=torch.Generator().manual_seed(number), dtype=torch.double).to(x.device)
    if x.is_floating_point():
        low, high = x.double().min(), x.double().max()
        part.copy_(low + random * torch.where(high > low, high - low, torch.ones_like(low)))
    elif x.is_complex():
        part.copy_(part * torch.polar(torch.ones_like(random), 2 * math.pi * random).to(x.dtype))
    else:  # others of the values that there are
        low, high = x.long().min(), x.long().max()
        values = (high - low).clamp(min=1) + 1
        part.copy_((low + (part.long() - low + 1 + (random * (values - 1)).long()) % values).to(x.dtype))
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
    is_near = bool((ratios < _NEAR).all())
    # An order of windows or of every second row is near at the corners; what answers most lies elsewhere.
    first = torch.stack(torch.unravel_index(own.argmax(1), spatial), 1)
    beside = float(((first - torch.tensor(cells)).abs() <= 1).all(1).double().mean())
    is_local = is_near and beside >= _MOST and not (partial and int(better.sum()) > 1)
    return _Answer(len(cells), float(ratios.mean()), is_near=is_near, is_local=is_local)
