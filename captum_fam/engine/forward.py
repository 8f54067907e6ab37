"""The forward pass that records layers: its hooks, and what they pass on."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from captum_fam import _captum
from captum_fam._checks import check_rows, describe
from captum_fam.engine.checkpoints import in_reentrant_part
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.constants import CAN_BE_CONSTANT, ConstantWeights, WeightsNeededError
from captum_fam.engine.layers import last_map
from captum_fam.engine.order import check_order
from captum_fam.engine.path import Path
from captum_fam.engine.recording import Encoder, Recording
from captum_fam.engine.report import Report
from captum_fam.engine.untouched import (
    Guard,
    buffers_restored,
    compiled_parts_off,
    has_batch_statistics,
    name_of,
    run,
    warnings_of_training,
)
from captum_fam.engine.ways import NotInOneBatchError, Way
from captum_fam.score import select_embedding

# A DataParallel model calls the layer in threads of its own, so its calls are recorded one at a time.
_PARALLEL = threading.Lock()


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
    way: Way | None = None,
    path: Path | None = None,
) -> Iterator[Recording]:
    """
    Runs the forward function once, recording the layers' outputs (or inputs).

    Gradient mode is off until the first layer is reached, so nothing before it is recorded for backward; with ``graph``
    it is on from there. On a ``path`` of one layer, all its points go on from there (see Way). The context begins when
    the hooks are gone. Each thread's hooks ignore the calls of other threads.
    """
    way = way or Way(constants=False)
    forward = _Forward(encoder, layers, inputs, additional_forward_args, layer_input, graph, way, path)
    with buffers_restored(encoder.forward_func) as guard:
        embedding = forward.run(guard)
        report.warnings += warnings_of_training(encoder.forward_func, guard.called)
        names = [name_of(encoder.forward_func, layer) for layer in layers]
        tensors = forward.tensors(names, report)
        has_graph = forward.graph and not embedding.is_inference()
        recording = Recording(
            encoder, inputs, additional_forward_args, layer_input, embedding, names, tensors, has_graph, report, path
        )
        recording.checkpointed = forward.checkpointed
        yield recording
        if encoder.reshape_transform is None:  # comes last: another pass may change what the gradients need

            def activations(inputs: Tensors, arguments: Any) -> list[Tensor]:
                again = _Forward(encoder, layers, inputs, arguments, layer_input, False, Way(constants=False), None)
                again.run(guard)
                return [a for devices in again.tensors(names, Report()) for a in devices[0]]

            check_order(recording, layers, guard.called, forward.again, activations)
        recording.settle()


class _Forward:
    """
    The forward passes of one call, and what their hooks have found.

    Attributes:
        graph: whether what comes after the layers is recorded for backward.
        again: the layers that were called several times.
        checkpointed: whether a layer lies in a checkpointed part, which keeps no graph.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: Sequence[nn.Module],
        inputs: Tensors,
        additional_forward_args: Any,
        layer_input: bool,
        graph: bool,
        way: Way,
        path: Path | None,
    ) -> None:
        func = encoder.forward_func
        self.graph = graph
        self.checkpointed = False
        self._encoder = encoder
        self._layers = layers
        self._inputs = inputs
        self._args = additional_forward_args
        self._layer_input = layer_input
        self._path = path if path is not None and path.nodes else None
        self._points = 1 if self._path is None else 1 + len(self._path.nodes)
        self._parallel = func if isinstance(func, nn.DataParallel) else None
        self._in_threads = self._parallel is not None or encoder.device_ids is not None
        self._constants = way.constants and CAN_BE_CONSTANT and not self._in_threads  # which would not see them
        may_be_one = self._path is not None and way.one_batch and not self._in_threads
        self._one_batch = may_be_one and not has_batch_statistics(func)
        self._thread, self._lock = threading.get_ident(), threading.Lock()
        self._dimensions: int | None = None  # of the embedding, which tell channels from places
        self._begin(None)

    def _begin(self, point: int | None) -> None:
        self._point = point  # the one that goes on from the layer; None for all
        self._found: dict[nn.Module, dict[torch.device, Tensors]] = {}
        self.again: set[nn.Module] = set()

    def run(self, guard: Guard) -> Tensor:
        """The embeddings (B, D); on a path those of all points, one after another."""
        self._guard = guard
        if self._path is None:
            return self._pass()
        embedding = self._all_points()
        guessed, self._dimensions = self._layouts(), embedding.shape[1]
        if guessed != self._layouts():
            embedding = self._all_points()
        return embedding

    def _all_points(self) -> Tensor:
        if self._one_batch:
            self._begin(None)
            try:
                return self._pass()
            except (WeightsNeededError, CheckpointError):
                raise
            except Exception as error:
                if not self._calls:
                    raise  # it never came to the points
                raise NotInOneBatchError from error
        self._begin(0)
        embeddings = [self._pass()]
        last = self._calls
        for point in range(1, self._points):
            self._point = point
            embeddings.append(self._pass(last))
        with torch.set_grad_enabled(self.graph):
            return torch.cat(embeddings)

    def _in_one_batch(self) -> bool:
        return self._path is not None and self._point is None

    def tensors(self, names: list[str], report: Report) -> list[list[Tensors]]:
        """What each of the layers gave, by device, in the order of the batch."""
        for layer, name in dict(zip(self._layers, names)).items():
            if layer not in self._found:
                raise ValueError(
                    f"Expected `layer` to be a module that the forward pass calls, but {name} was not called; pass a"
                    " module of this very model that its forward pass calls (an element of a ModuleList, not the list)."
                    + self._why_not_called(layer)
                )
            if layer in self.again:
                report.warnings.append(
                    f"Layer {name} was called several times in one forward pass; its last call is explained. Name the"
                    " module around the call that you mean, or give that call a module of its own."
                )
        ids = _captum.extract_device_ids(self._encoder.forward_func, self._found, self._encoder.device_ids)
        found = [self._found[m] for m in self._layers]
        return [[devices[d] for d in _captum.sort_key_list(list(devices), ids)] for devices in found]

    def _why_not_called(self, layer: nn.Module) -> str:
        names = {m: n for n, m in layer.named_modules()}
        called = [names[m] for m in self._guard.called if names.get(m)]
        if called:
            depth = min(n.count(".") for n in called)
            last = [n for n in called if n.count(".") == depth][-1]
            return (
                f" Parts of it were called, {last!r} the last of them: pass that one, or switch gradient checkpointing"
                " off, if that is on (timm: model.set_grad_checkpointing(False)), which runs a stage part by part."
            )
        if any(isinstance(m, torch.jit.ScriptModule) for m in self._guard.held):
            return " Hooks do not work in its TorchScript parts: pass the Python model."
        encoder = self._encoder
        try:
            other = last_map(encoder.forward_func, self._inputs, self._args, encoder.output_selector)
        except Exception:  # the search needs more than the pass did, such as a gradient
            return ""
        return f" The last of its layers with a map is {other!r}." if other else ""

    def _pass(self, last: dict[Any, int] | None = None) -> Tensor:
        """The embeddings of one pass; ``last`` numbers the calls of the layer in which the point goes on from it."""
        encoder, inputs = self._encoder, self._inputs
        self._guard.begin()
        self._calls: dict[Any, int] = {}
        self._last = last
        self._weights: list[ConstantWeights] = []
        with ExitStack() as stack, torch.set_grad_enabled(self._in_threads and self.graph):  # to record the gathering
            self._stack = stack
            if self._in_threads:
                stack.enter_context(_PARALLEL)
            if self._parallel is not None:  # the first modules of its replicas need no record
                stack.callback(self._parallel.module.register_forward_pre_hook(_gradients_off).remove)
            for layer in dict.fromkeys(self._layers):
                register = layer.register_forward_pre_hook if self._layer_input else layer.register_forward_hook
                stack.callback(register(self._hook_of(layer)).remove)
            if self.graph:  # tensors made under inference mode cannot be part of a graph
                inputs = tuple(t.clone() if t.is_inference() else t for t in inputs)
            with compiled_parts_off():
                output = run(encoder.forward_func, inputs, self._args)
            if any(w.asked for w in self._weights):  # the encoder may have caught the error
                raise WeightsNeededError
            with torch.set_grad_enabled(self.graph):
                embedding = select_embedding(output, encoder.output_selector)
        if not self._in_one_batch():
            return check_rows("inputs", inputs, embedding)
        mixed = has_batch_statistics(encoder.forward_func, self._guard.called)
        if mixed or len(embedding) != self._points * len(inputs[0]):
            raise NotInOneBatchError
        return embedding

    def _hook_of(self, layer: nn.Module) -> Callable[..., Any]:
        # A DataParallel model calls the hook with a replica of the layer.
        return lambda _, *values: self._hook(layer, *values)

    def _hook(self, layer: nn.Module, args: Any, output: Any = None) -> Any:
        if threading.get_ident() != self._thread and not self._in_threads:
            return None
        if torch.is_inference_mode_enabled():
            self.graph = False
        if self.graph:
            torch.set_grad_enabled(True)
            self.checkpointed |= in_reentrant_part()
        value = args if self._layer_input else output
        items = list(value) if isinstance(value, (tuple, list)) else [value]
        chosen = [i for i, a in enumerate(items) if isinstance(a, Tensor) and a.is_floating_point() and a.ndim]
        if not chosen:
            raise TypeError(
                f"Expected layer {name_of(self._encoder.forward_func, layer)} to"
                f" {'take' if self._layer_input else 'return'} floating-point tensors (B, C, *spatial), but got"
                f" {describe(value)}; choose a layer that does."
            )
        passed_on = self._passed_on(layer, [items[i] for i in chosen])
        if self.graph and self._constants and not self._weights:
            self._weights.append(self._stack.enter_context(ConstantWeights()))
        if passed_on is None:
            return None
        replaced = dict(zip(chosen, passed_on))
        filled = [replaced.get(i, a) for i, a in enumerate(items)]
        if not isinstance(value, (tuple, list)):
            return filled[0]
        return type(value)(*filled) if hasattr(value, "_fields") else type(value)(filled)

    def _passed_on(self, layer: nn.Module, activations: list[Tensor]) -> list[Tensor] | None:
        """What the pass goes on with in place of a layer's activations, which are kept; None to go on with these."""
        device = activations[0].device
        with self._lock:
            number = self._calls[layer, device] = self._calls.get((layer, device), 0) + 1
        if self._last is not None:
            if number < self._last[layer, device]:
                return None
        else:
            if self._in_one_batch() and (number > 1 or any(len(a) != len(self._inputs[0]) for a in activations)):
                raise NotInOneBatchError
            if number > 1:
                self.again.add(layer)
            kept = tuple(self._kept(a) for a in activations)
            with self._lock:
                self._found.setdefault(layer, {})[device] = kept
        if not self.graph and self._path is None:
            return None
        # A copy, because the encoder may change its tensor in place.
        found, point = self._found[layer][device], self._point
        if point is None:
            return [a.clone() for a in found]
        return [a.unflatten(0, (self._points, len(a) // self._points))[point].clone() for a in found]

    def _kept(self, activation: Tensor) -> Tensor:
        """A layer's activations, as they are kept to explain, with all points of the path."""
        if self._path is not None:
            points = self._path.points(activation, lambda a: self._encoder.to_map(a, self._inputs, self._dimensions))
            return points.requires_grad_(self.graph)
        if self.graph and activation.requires_grad:
            return activation.clone()
        return activation.detach().clone().requires_grad_(self.graph)

    def _layouts(self) -> list[Any]:
        """How the recorded activations lie, where that is told from their shape."""
        if self._encoder.reshape_transform is not None:
            return []
        tensors = [a.detach() for devices in self._found.values() for t in devices.values() for a in t]
        maps = [self._encoder.to_map(a, self._inputs, self._dimensions) for a in tensors]
        return [(A.shape, A.stride()) for A in maps]


def _gradients_off(*_: Any) -> None:
    torch.set_grad_enabled(False)
