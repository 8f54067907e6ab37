"""The layer of a model whose map explains its embedding, found in one forward and one backward pass."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_fam.engine.checkpoints import checkpointing_named
from captum_fam.engine.chunks import Tensors, cut, cut_arguments
from captum_fam.engine.order import Layouts, ask, channels_first, follows_convolution, in_attention
from captum_fam.engine.untouched import buffers_restored, compiled_parts_off, has_batch_statistics, model_of, run
from captum_fam.score import select_embedding
from captum_fam.tokens import images_of, may_be_map

# The least number of places along a side of a map for integrated explanations.
_PLACES = 14


def last_map(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    additional_forward_args: Any = None,
    output_selector: Callable[[Any], Tensor] | None = None,
) -> str | None:
    """
    The dotted name of the last of the maps (see maps_on_the_way); None if there is none.

    In a transformer pooled by its class token, that is the normalisation before the last attention: later modules still
    return patches, but the embedding no longer uses them.
    """
    found = maps_on_the_way(forward_func, inputs, additional_forward_args, output_selector)
    return next(reversed(found), None)


def early_map(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    additional_forward_args: Any = None,
    output_selector: Callable[[Any], Tensor] | None = None,
) -> str | None:
    """
    The dotted name of the layer at which integrated maps were the most faithful (benchmarks/integrated.md); None if
    there is no map.

    Of the maps that are smaller than the image, it is the smallest with at least 14 places a side, or else the largest:
    the end of a stage in the middle of a convolutional network. Where all have one size, as in a vision transformer, it
    is the first of them. Modules that hold others come before their parts, because residual paths may lead around the
    parts.
    """
    found = maps_on_the_way(forward_func, inputs, additional_forward_args, output_selector)
    image = images_of(inputs).shape[2:].numel()
    places: dict[str, int] = {}
    for name, size in found.items():  # one that grows again, in its module or around it, is padded or on a way back up
        before = [n for other, n in places.items() if f".{name}".startswith(f".{other}".rpartition(".")[0] + ".")]
        if math.prod(size) < image and all(math.prod(size) <= n for n in before):
            places[name] = math.prod(size)
    stages = {name: size for name, size in found.items() if name in places} or found
    if not stages:
        return None
    sizes = sorted(set(stages.values()), key=lambda size: (min(size), size))
    chosen = next((size for size in sizes if min(size) >= _PLACES), sizes[-1])
    names = [name for name, size in stages.items() if size == chosen]
    outermost = min(name.count(".") for name in names)
    names = [name for name in names if name.count(".") == outermost]
    return names[0] if len(sizes) == 1 else names[-1]


def maps_on_the_way(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    additional_forward_args: Any = None,
    output_selector: Callable[[Any], Tensor] | None = None,
) -> dict[str, tuple[int, ...]]:
    """
    The dotted names of the modules that give a map, and the sizes of the maps, in the order of their calls. Their
    output is a map, or the tokens of one (see to_map), with more than one location, and the embedding of the first
    example depends on it.

    Modules that are called once are preferred to others. Modules inside an attention count only where there are no
    others, because they hold only parts of what the attention passes on. Modules whose places do not lie where their
    map says (see order.py) do not count. If the encoder has cut the gradient of the embedding itself (torch.no_grad),
    it is taken to depend on each of them.

    Any hook of the caller's must be gone; the model is left as it was.
    """
    model = model_of(forward_func)
    modules = {} if model is None else {name: module for name, module in model.named_modules() if name}
    outputs: dict[str, Tensor] = {}  # of each module's last call, in their order
    again: set[str] = set()  # modules that were called several times

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1 and len(output) == rows:
            if outputs.pop(name, None) is not None:
                again.add(name)
            outputs[name] = output

    # Gradients from the inputs reach every output, even with frozen parameters; a leaf must not change in place.
    few = slice(0, len(inputs[0]) if has_batch_statistics(forward_func) else 1)
    given = cut(inputs, few) if len(inputs[0]) else tuple(t.new_zeros(1, *t.shape[1:]) for t in inputs)
    leaves, rows = [t.detach().clone() for t in given], len(given[0])
    arguments = cut_arguments(additional_forward_args, few, len(inputs[0]))
    images = tuple(t.requires_grad_().clone() if t.is_floating_point() else t for t in leaves)
    hooks = [
        m.register_forward_hook(lambda *call, n=n: note(n, call[-1]))
        for n, m in modules.items()
        if not isinstance(m, torch.jit.ScriptModule)  # which takes no hooks
    ]
    with buffers_restored(forward_func), torch.enable_grad():  # backward must come before that: it may need the buffers
        try:
            with compiled_parts_off():
                output = run(forward_func, images, arguments)
        finally:
            for hook in hooks:
                hook.remove()
        z = select_embedding(output, output_selector)[:1]

        on, layouts = images_of(inputs), Layouts(forward_func)
        # Strides that differ by axis give maps of any size: those count that a convolution, norm or pooling gives.
        convolved = {a.shape[2:] for name, a in outputs.items() if channels_first(modules[name].modules())}

        def places(activation: Tensor) -> Tensor | None:
            """The map of an output, or of its gradient, if it has more than one place."""
            A = layouts.to_map(activation, images, z.shape[1])
            if A is None or A.ndim != max(on.ndim, 3) or A.shape[2:].numel() == 1:
                return None
            if A.ndim != 4 or A.shape[2:] in convolved:
                return A
            return A if may_be_map((A.shape[2], A.shape[3]), (on.shape[2], on.shape[3])) else None

        sizes = {name: tuple(A.shape[2:]) for name, a in outputs.items() if (A := places(a)) is not None}
        found = {name: outputs[name] for name in sizes}
        if z.requires_grad:
            found = {name: A for name, A in found.items() if A.requires_grad}
            w = torch.linspace(1, 2, z.shape[1], dtype=z.dtype, device=z.device)  # no two alike: none cancel
            with checkpointing_named():
                gradients = (
                    torch.autograd.grad(z, list(found.values()), w.expand(z.shape), allow_unused=True) if found else ()
                )
            maps = [None if g is None else places(g) for g in gradients]
            found = {name: outputs[name] for name, g in zip(found, maps) if g is not None and g.any()}
        outside = [name for name in found if model is not None and not in_attention(model, name)]
        chosen = outside or list(found)
        chosen = [name for name in chosen if name not in again] or chosen
        doubts = {name: layouts.doubt(modules[name], outputs[name], images, z.shape[1]) for name in chosen}
        doubts = {name: doubt for name, doubt in doubts.items() if doubt is not None}
        doubtful = [modules[name] for name in doubts]

        def activations(images: Tensors, arguments: Any) -> list[Tensor | None]:
            kept: dict[nn.Module, Tensor] = {}
            hooks = [m.register_forward_hook(lambda m, _, output: kept.update({m: output})) for m in doubtful]
            try:
                with torch.no_grad(), compiled_parts_off():
                    run(forward_func, images, arguments)
            finally:
                for hook in hooks:
                    hook.remove()
            return [kept.get(m) for m in doubtful]

        after = [follows_convolution(m, modules.values()) for m in doubtful]
        answers, _ = ask(activations, list(doubts.values()), after, layouts, given, arguments, z.shape[1])
    wrong = {name for name, answer in zip(doubts, answers) if not answer}
    return {name: sizes[name] for name in chosen if name not in wrong}
