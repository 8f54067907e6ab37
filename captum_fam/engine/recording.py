"""One forward pass that records layers, and the gradients of its embedding."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from captum_fam import _captum
from captum_fam._checks import check_rows, describe
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.constants import ConstantWeights, WeightsNeededError
from captum_fam.engine.layers import last_map
from captum_fam.engine.report import Dependence, Report
from captum_fam.engine.untouched import buffers_restored, compiled_parts_off, name_of, warnings_of_training
from captum_fam.score import select_embedding
from captum_fam.similarity import widen
from captum_fam.tokens import images_of, to_map

T = TypeVar("T")

_NO_GRAPH = (
    "The embedding's dimensions are not the layer's channels, so the weights need a gradient, which"
    " torch.inference_mode() rules out; use torch.no_grad() instead."
)
# Values of a layer's gradients that are computed in one batch: more are no faster, but need more memory.
_AT_ONCE = 2**20

# A DataParallel model calls the layer in threads of its own, so its calls are recorded one at a time.
_PARALLEL = threading.Lock()


@dataclass(frozen=True)
class Encoder:
    """A forward function, and how its embeddings and its layers' activations are read."""

    forward_func: Callable[..., Any]
    output_selector: Callable[[Any], Tensor] | None = None
    reshape_transform: Callable[[Tensor], Tensor] | None = None
    device_ids: list[int] | None = None


class Recording:
    """
    The embeddings of one forward pass and the activations of its layers.

    Attributes:
        inputs, additional_forward_args: of the forward pass.
        layer_input: whether the layers' inputs were recorded, instead of their outputs.
        embedding: z (B, D), detached.
        activations: all tensors that the layers gave, as (B, C, *spatial), detached.
        names: of the layer of each of them.
        sizes: how many each layer gave.
        partial: for each of them, whether the layer gave more, such as tokens that are no patches.
        has_graph: whether the pass was recorded for backward, from the layers on.
        report: of the call that the pass is a part of.
    """

    def __init__(
        self,
        encoder: Encoder,
        inputs: Tensors,
        additional_forward_args: Any,
        layer_input: bool,
        embedding: Tensor,
        layers: list[str],
        tensors: list[list[Tensors]],
        has_graph: bool,
        report: Report,
    ) -> None:
        self.inputs = inputs
        self.additional_forward_args = additional_forward_args
        self.layer_input = layer_input
        with torch.set_grad_enabled(has_graph):  # a subclass may do as it likes in what follows
            self._embedding = embedding.as_subclass(Tensor)
        self.embedding = self._embedding.detach().clone()  # the encoder may use its tensor again
        self.has_graph = has_graph
        self.report = report
        self._encoder = encoder
        self._tensors = tensors  # of each layer, by device (one, but for DataParallel)
        reduced = [_captum.reduce_list([tuple(a.detach() for a in t) for t in devices]) for devices in tensors]
        self.sizes = [len(layer) for layer in reduced]
        self.names = [name for name, layer in zip(layers, reduced) for _ in layer]
        given = [a.as_subclass(Tensor) for layer in reduced for a in layer]
        self.activations = [self._layout(a, name) for a, name in zip(given, self.names)]
        self.partial = [A.numel() < a.numel() for A, a in zip(self.activations, given)]
        self._shared: dict[object, Any] = {}
        self._asked: Tensor | None = None
        self._on_map: list[Tensor] = []  # whether a gradient by each of the activations is not zero

    def once(self, what: object, compute: Callable[[], T]) -> T:
        """What the chunks of references share, computed for the first of them."""
        if what not in self._shared:
            self._shared[what] = compute()
        return cast(T, self._shared[what])

    def layers(self) -> list[tuple[str, slice]]:
        """The name of each layer, and which of the activations it gave."""
        ends = list(accumulate(self.sizes))
        return [(self.names[end - 1], slice(end - size, end)) for size, end in zip(self.sizes, ends)]

    def gradients(self, u: Tensor) -> Iterator[list[Tensor]]:
        """For each of R rows of u (B, R, D), the gradients of u.z, one (B, C, *spatial) for each of the activations."""
        if not self.has_graph:
            raise RuntimeError(_NO_GRAPH)
        flat = self._flat()
        at_once = max(1, _AT_ONCE // max(1, *(a.numel() for a in flat)))
        for rows in u.split(at_once, 1):
            # One row for all: its terms do not cancel by chance.
            shares = torch.linspace(1, 2, rows.shape[1], dtype=u.dtype, device=u.device)
            mixed = (shares[:, None] * rows).sum(1)
            self._asked = mixed if self._asked is None else self._asked + mixed
            found, scale = self._gradients(rows.transpose(0, 1), flat)
            for r in range(rows.shape[1]):
                laid_out = self._laid_out([None if g is None else g[r] for g in found])
                gradients = [scale[r].reshape(-1, *[1] * (g.ndim - 1)) * widen(g) for g in laid_out]
                self._used_by(gradients)
                yield gradients

    def place_products(self) -> list[Tensor] | None:
        """
        v (B, D, N) for each of the activations, by one forward-mode product for each place: the derivative of
        sum_k A_ki d(u.z)/dA_ki by u. None where the encoder has no second derivative.
        """
        if not self.has_graph:
            raise RuntimeError(_NO_GRAPH)
        flat = self._flat()
        u = torch.zeros_like(self.embedding, requires_grad=True)
        try:
            with torch.enable_grad():
                given = torch.autograd.grad(self._embedding, flat, u, create_graph=True, allow_unused=True)
                sums = [(A * g).sum(1).reshape(len(A), -1) for A, g in zip(self.activations, self._laid_out(given))]
            found = [_derivative(y, u) for y in sums]
        except RuntimeError:
            return None
        self._used_by(found)
        self._asked = torch.linspace(1, 2, u.shape[1], dtype=u.dtype, device=u.device).expand(u.shape)
        return found

    def _used_by(self, gradients: list[Tensor]) -> None:
        found = [g.any() for g in gradients]
        self._on_map = [a | b for a, b in zip(found, self._on_map or found)]

    def settle(self) -> None:
        """Notes how the embeddings depend on the layers, from all that was asked for."""
        if self._asked is None:
            return
        on_map = torch.stack(self._on_map).tolist() if self._on_map else []
        for i, (name, tensors) in enumerate(self.layers()):
            found = Dependence.BY_THE_MAP
            if not any(on_map[tensors]):
                if not self._asked.any():
                    continue
                gradients = self._gradients(self._asked[None], self._flat(self._tensors[i : i + 1]))[0]
                used = any(g is not None and bool(g.any()) for g in gradients)
                found = Dependence.OFF_THE_MAP if used else Dependence.NONE
            encoder = self._encoder
            where = (encoder.forward_func, self.inputs, self.additional_forward_args, encoder.output_selector)
            self.report.note_dependence((i, name), found, partial(last_map, *where))

    def _flat(self, layers: list[list[Tensors]] | None = None) -> list[Tensor]:
        """The tensors of all devices, as the layers gave them."""
        return [a for devices in layers or self._tensors for tensors in devices for a in tensors]

    def _laid_out(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Gradients by the tensors that the layers gave, None for zero, as the activations."""
        rest = iter(values)
        laid_out = []
        for devices in self._tensors:
            filled = [tuple(torch.zeros_like(a) if (g := next(rest)) is None else g for a in t) for t in devices]
            laid_out += [self.reshape(g) for g in _captum.reduce_list(filled)]
        return laid_out

    def _gradients(self, u: Tensor, tensors: list[Tensor]) -> tuple[Sequence[Tensor | None], Tensor]:
        """
        Gradients (R, ...) of a multiple of u.z, for u (R, B, D), in a range that half precision holds, and the scale
        (R, B) that undoes it.
        """
        largest = u.abs().amax(2).clamp(min=torch.finfo(u.dtype).tiny)
        if not self._embedding.requires_grad:
            return [None] * len(tensors), largest
        half = any(t.dtype == torch.float16 for t in (self._embedding, *tensors))
        for gain in (4096.0, 1.0) if half else (1.0,):  # float16 rounds to zero below 6e-8 and overflows at 65504
            v = (u / largest[..., None] * gain).to(self._embedding.dtype)
            found = _vector_jacobian_products(self._embedding, tensors, v)
            if gain == 1 or all(g is None or bool(g.isfinite().all()) for g in found):
                break
        return found, largest / gain

    def reshape(self, activation: Tensor) -> Tensor:
        """The layer's activations, or whatever has their shape, as (B, C, *spatial)."""
        if self._encoder.reshape_transform is not None:
            return self._encoder.reshape_transform(activation)
        found = to_map(activation, images_of(self.inputs), self.embedding.shape[1])
        return activation if found is None else found

    def _layout(self, activation: Tensor, name: str) -> Tensor:
        """Activations as (B, C, *spatial), or an error that says how to make them so."""
        B, given = len(self.embedding), self._encoder.reshape_transform is not None
        A = self.reshape(activation) if given or len(activation) == B else activation
        if not isinstance(A, Tensor) or A.ndim < 2 or len(A) != B:
            origin = "`reshape_transform` to return" if given else f"layer {name} to give"
            raise ValueError(
                f"Expected {origin} activations (B, C, *spatial) with B = {B}, but got {describe(A)}; choose another"
                " layer, or pass a reshape_transform that returns that layout."
            )
        images = images_of(self.inputs)
        if not given and to_map(activation, images, self.embedding.shape[1]) is None:
            raise ValueError(
                f"The activations {tuple(A.shape)} of layer {name} look like tokens or channels-last maps, but how they"
                f" lie on inputs {tuple(images.shape)} cannot be told from their shape. Pass"
                " reshape_transform=patch_tokens(height, width) with the grid of the patches,"
                " reshape_transform=channels_last for maps (B, h, w, C), or, if dimension 1 is the channels after all,"
                " reshape_transform=lambda a: a."
            )
        return A


def _vector_jacobian_products(output: Tensor, by: list[Tensor], rows: Tensor) -> Sequence[Tensor | None]:
    """The gradients (R, ...) of rows (R, *output.shape), in one batch where the operations between can be batched."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if len(rows) > 1:
        try:
            return torch.autograd.grad(output, by, rows, is_grads_batched=True, **options)
        except RuntimeError:  # an operation that torch cannot batch
            pass
    found = [torch.autograd.grad(output, by, row, **options) for row in rows]
    return [None if of_one[0] is None else torch.stack(of_one) for of_one in zip(*found)]


def _derivative(y: Tensor, u: Tensor) -> Tensor:
    """dy/du (B, D, N) for y (B, N), each row of which depends on its own row of u (B, D) alone."""
    rows = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:, None].expand(-1, len(y), -1)
    parts = [_vector_jacobian_products(y, [u], r)[0] for r in rows.split(max(1, _AT_ONCE // max(1, u.numel())))]
    if not parts or any(p is None for p in parts):
        raise RuntimeError("y does not depend on u")
    return torch.cat([p for p in parts if p is not None]).permute(1, 2, 0)


@contextmanager
def record(
    encoder: Encoder,
    layers: Sequence[nn.Module],
    inputs: Tensors,
    additional_forward_args: Any,
    report: Report,
    *,
    layer_input: bool = False,
    graph: bool = False,
    constants: bool = False,
) -> Iterator[Recording]:
    """
    Runs the forward function once, recording the layers' outputs (or inputs).

    Gradient mode is off until the first layer is reached, so nothing before it is
    recorded for backward; with ``graph`` it is on from there, with ``constants`` without what only
    the gradients of weights would need. The hooks are gone when the context is entered. Each
    thread's hooks ignore the calls of the other threads.
    """
    forward_func = encoder.forward_func
    parallel = forward_func if isinstance(forward_func, nn.DataParallel) else None
    in_threads = parallel is not None or encoder.device_ids is not None
    thread, lock = threading.get_ident(), threading.Lock()
    found: dict[nn.Module, dict[torch.device, Tensors]] = defaultdict(dict)
    repeated: set[nn.Module] = set()
    weights: list[ConstantWeights] = []

    def keep(activation: Tensor) -> tuple[Tensor, Tensor]:
        """
        The tensor to explain and the one that the forward pass goes on with; neither shares memory with what the
        encoder may change in place.
        """
        if not graph:
            return activation.detach().clone(), activation
        kept = activation.clone() if activation.requires_grad else activation.detach().clone().requires_grad_()
        return kept, kept.clone()

    def hook(layer: nn.Module, args: Any, output: Any = None) -> Any:
        nonlocal graph
        if threading.get_ident() != thread and not in_threads:
            return None
        if torch.is_inference_mode_enabled():
            graph = False
        if graph:
            torch.set_grad_enabled(True)
            if constants and not weights and not in_threads:  # other threads would not see the constants
                weights.append(stack.enter_context(ConstantWeights()))
        value = args if layer_input else output
        items = list(value) if isinstance(value, (tuple, list)) else [value]
        kept = {i: keep(a) for i, a in enumerate(items) if isinstance(a, Tensor) and a.is_floating_point() and a.ndim}
        if not kept:
            raise TypeError(
                f"Expected layer {name_of(forward_func, layer)} to {'take' if layer_input else 'return'} floating-point"
                f" tensors (B, C, *spatial), but got {describe(value)}; choose a layer that does."
            )
        tensors = tuple(explained for explained, _ in kept.values())
        with lock:
            if tensors[0].device in found[layer]:
                repeated.add(layer)
            found[layer][tensors[0].device] = tensors
        if not graph:
            return None
        replaced = [kept[i][1] if i in kept else a for i, a in enumerate(items)]
        if not isinstance(value, (tuple, list)):
            return replaced[0]
        return type(value)(*replaced) if hasattr(value, "_fields") else type(value)(replaced)

    def hook_of(layer: nn.Module) -> Callable[..., Any]:
        # A DataParallel model calls the hook with a replica in the layer's place.
        return lambda _, *values: hook(layer, *values)

    with buffers_restored(forward_func):
        with ExitStack() as stack, torch.set_grad_enabled(in_threads and graph):  # the gathering must be recorded
            if in_threads:
                stack.enter_context(_PARALLEL)
            if parallel is not None:  # the first modules of its replicas need not be
                stack.callback(parallel.module.register_forward_pre_hook(_gradients_off).remove)
            for layer in dict.fromkeys(layers):
                register = layer.register_forward_pre_hook if layer_input else layer.register_forward_hook
                stack.callback(register(hook_of(layer)).remove)
            if graph:  # tensors made under inference mode cannot be part of a graph
                inputs = tuple(t.clone() if t.is_inference() else t for t in inputs)
            with compiled_parts_off():
                output = _captum.run_forward(forward_func, inputs, None, additional_forward_args)
            if any(w.asked for w in weights):  # the encoder may have caught the error
                raise WeightsNeededError
            with torch.set_grad_enabled(graph):
                embedding = check_rows("inputs", inputs, select_embedding(output, encoder.output_selector))
        report.warnings += warnings_of_training(forward_func)
        names = [name_of(forward_func, layer) for layer in layers]
        for layer, name in dict(zip(layers, names)).items():
            if layer not in found:
                raise ValueError(
                    f"Expected `layer` to be a module that the forward pass calls, but {name} was not called; pass a"
                    " module of this very model that its forward pass calls (an element of a ModuleList, not the list)."
                )
            if layer in repeated:
                report.warnings.append(
                    f"Layer {name} was called several times in one forward pass; its last call is explained. Name the"
                    " module around the call that you mean, or give that call a module of its own."
                )
        ids = _captum.extract_device_ids(forward_func, found, encoder.device_ids)
        tensors = [[found[m][d] for d in _captum.sort_key_list(list(found[m]), ids)] for m in layers]
        has_graph = graph and not embedding.is_inference()
        recording = Recording(
            encoder, inputs, additional_forward_args, layer_input, embedding, names, tensors, has_graph, report
        )
        yield recording
        recording.settle()


def _gradients_off(*_: Any) -> None:
    torch.set_grad_enabled(False)
