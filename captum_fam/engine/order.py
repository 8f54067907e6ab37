"""
Whether the places of a layer lie where its map says.

The shape alone cannot tell: tokens may be shuffled, a class token may come last, and what looks like a map may be
windows or an attention. So where the shape leaves doubt, the encoder is asked (see answers.py): one cell of an input
after another is changed, and each time the place at that cell of the map must answer.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from captum_fam.engine.answers import CHANGES, NEAR, Answer, answers_of
from captum_fam.engine.chunks import Tensors, cut, cut_arguments
from captum_fam.engine.untouched import model_of, roots_of
from captum_fam.tokens import Patches, channels_last, fit, images_of, patch_tokens, patches_of, to_map

if TYPE_CHECKING:
    from captum_fam.engine.recording import Recording


class Doubt(Enum):
    """What is in doubt about a layer's layout: whether its channels come last, or where its places lie."""

    CHANNELS = "channels"
    PLACES = "places"


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
    """How the activations of an encoder's layers lie on its inputs: as the model declares it, or by their shape."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self._forward_func = forward_func

    @cached_property
    def _said(self) -> dict[Patches, set[nn.Module]]:
        """What the vision transformers in an encoder declare about these modules."""
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
        """What to ask the encoder before the activations of a layer may be laid out by ``to_map``; None for nothing."""
        images = images_of(inputs)
        if activation.ndim < 3 or activation.shape[2:].numel() == 1:
            return None
        if activation.ndim == 3 and any(layer in of and p.grid(activation, images) for p, of in self._said.items()):
            return None
        if activation.ndim != images.ndim or self._is_attention(layer, activation):
            return Doubt.PLACES
        if images.ndim != 4:  # there, the rule of one stride for all sides does not help
            return None if channels_first(layer.modules()) else Doubt.CHANNELS
        A = to_map(activation, images, dimensions)
        if A is None:
            return Doubt.PLACES
        if A.shape != activation.shape:  # channels last, or blocks of places, where both numbers are squares
            blocks, each = activation.shape[1:3]
            may_be_pieces = math.isqrt(blocks) ** 2 == blocks and math.isqrt(each) ** 2 == each
            return Doubt.PLACES if may_be_pieces and blocks * each > CHANGES else None
        first, last = (fit(grid, images.shape[2:]) for grid in (activation.shape[2:], activation.shape[1:-1]))
        return None if first > last else Doubt.CHANNELS if first else Doubt.PLACES

    def _is_attention(self, layer: nn.Module, activation: Tensor) -> bool:
        """Whether a layer gives attentions (B, heads, N, N): what each place takes from each other."""
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
    """Whether dimension 1 of what modules take and give is the channels; None if their types do not tell."""
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
    Raises an error if the places of a layer do not lie where its map says. If that is in doubt, it asks the encoder,
    once for inputs of a shape: ``activations`` runs it and returns what the layers gave. ``called`` are the modules in
    the order of their first calls; those called ``again``, perhaps with another input, get a warning.
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
        if answer is None:
            raise ValueError(
                f"Cannot tell whether the activations {tuple(given.shape)} of layer {name} lie on inputs"
                f" {tuple(images_of(inputs).shape)} as their shape suggests: when a part of an input was changed, the"
                " place there answered, but so did places far from it. If you know that the layout is right, pass"
                f" reshape_transform={_transform(given, encoder.layouts.to_map(given, inputs, D))}; if not, pass one"
                " that returns (B, C, *spatial) in the order of the input, or choose an earlier layer."
            )
        if not answer:
            found = "when a part of an input was changed, places elsewhere on the map answered, or all places alike"
            if failure is not None:
                found = f"the encoder failed when a part of an input was changed ({type(failure).__name__}: {failure})"
            raise ValueError(
                f"The activations {tuple(given.shape)} of layer {name} do not lie on inputs"
                f" {tuple(images_of(inputs).shape)} as their shape suggests: {found}. This happens where tokens are in"
                " an order of their own (a class token that is not the first, windows, a shuffle, the batch second),"
                " where the channels come last, and inside attentions. Choose another layer, or pass a"
                " reshape_transform that returns (B, C, *spatial) in the order of the input, such as"
                " patch_tokens(height, width), channels_last, or lambda a: a to take them as they are."
            ) from failure
    encoder.confirmed.add(asked)


def _transform(activation: Tensor, A: Tensor | None) -> str:
    """The reshape_transform that makes the map of an activation."""
    if A is None or A.shape == activation.shape:
        return "lambda a: a"
    if activation.ndim == A.ndim:
        return "channels_last"
    tokens_last = activation.shape[1] == A.shape[1] and activation.shape[2] == A.shape[2:].numel()
    return f"lambda a: a.unflatten(2, {tuple(A.shape[2:])})" if tokens_last else f"patch_tokens{tuple(A.shape[2:])}"


def follows_convolution(layer: nn.Module, called: Iterable[nn.Module]) -> bool:
    """Whether channels come first by the last module whose type tells, in a layer or else before it."""
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
) -> tuple[list[bool | None], Exception | None]:
    """
    Whether each of the layers whose activations the function returns lies as its layout says: whether the places of its
    map answer where the input changes, or, if the channels are in doubt, whether they answer better than the channels.
    None where others answer, too, so that it cannot be told. If the encoder fails on a changed input, no layer does;
    that error is returned second.

    The encoder runs ``CHANGES`` + 1 times (a few more for volumes), and twice that for channels; if places are not
    confirmed then, ``NOISES`` times as often in all; and again for maps of each other size.
    """
    if not any(doubts):
        return [True] * len(doubts), None
    B, at = len(inputs[0]), next(i for i, t in enumerate(inputs) if t is images_of(inputs))

    def found(rows: slice) -> list[bool | None]:
        given, args = cut(inputs, rows), cut_arguments(additional_forward_args, rows, B)

        def run(x: Tensor) -> list[Tensor | None]:
            outputs = activations((*given[:at], x, *given[at + 1 :]), args)
            return [
                a if d is not None and a is not None and len(a) == len(x) else None for a, d in zip(outputs, doubts)
            ]

        def lies(i: int, a: Answer) -> bool:
            return a.is_local if a.of_tokens else a.is_near or (convolved[i] and a.mean < NEAR)

        def is_enough(i: int, a: Answer) -> bool:
            return doubts[i] is not Doubt.PLACES or lies(i, a)

        places = answers_of(run, lambda a: layouts.to_map(a, inputs, dimensions), given[at], is_enough)
        channels = answers_of(run, channels_last, given[at], is_enough) if Doubt.CHANNELS in doubts else places
        return [
            d is None
            or (d is Doubt.CHANNELS and _are_places(a, b, c if given[at].ndim < 4 else None))
            or (d is Doubt.PLACES and (lies(i, a) or (None if a.is_open else False)))
            for i, (d, a, b, c) in enumerate(zip(doubts, places, channels, convolved))
        ]

    failure = None
    for rows in (slice(1), slice(None)):  # an encoder may need the whole batch
        try:
            return found(rows), None
        except Exception as error:
            failure = error
    return [doubt is None for doubt in doubts], failure


def _are_places(places: Answer, channels: Answer, of_convolution: bool | None) -> bool:
    """Whether a map's places are places, not channels. ``of_convolution`` is None for images, which need none."""
    if places.is_near and channels.is_near and of_convolution is not None:  # residual paths leave both where they were
        return of_convolution
    return places.mean <= channels.mean or (places.cells <= _FEW and not channels.is_near)
