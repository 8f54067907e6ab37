"""One forward pass that records layers, and leaves the model as it was."""

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_fam import _captum
from captum_fam._checks import check_rows, describe
from captum_fam.score import select_embedding
from captum_fam.similarity import widen
from captum_fam.tokens import images_of, to_map

Tensors = tuple[Tensor, ...]
P = ParamSpec("P")
T = TypeVar("T")

_NO_GRAPH = (
    "The embedding's dimensions are not the layer's channels, so the weights need a gradient, which"
    " torch.inference_mode() rules out; use torch.no_grad() instead."
)

# A DataParallel model calls the layer in threads of its own, so its calls are recorded one at a time.
_PARALLEL = threading.Lock()


def eagerly(function: Callable[P, T]) -> Callable[P, T]:
    """A function that torch.compile runs as it is, in whatever is compiled around it: hooks cannot be compiled."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():  # only then: what disable() imports takes seconds
            return cast(T, torch.compiler.disable(function)(*args, **kwargs))
        return function(*args, **kwargs)

    return run


class RoutesDifferError(Exception):
    """A chunk has changed what held for those before it."""


# How an embedding may depend on a layer: not at all, through parts of it that are not on its map, or through its map.
NOT_AT_ALL, OFF_THE_MAP, BY_THE_MAP = range(3)


class Call:
    """
    What is found out over the chunks of a call.

    Attributes:
        doubts: what a user should be warned of.
        unusable: numbers of the inputs, and of the references, whose embeddings are zero or not finite.
        dependence: how the embeddings depend on each layer, by its name.
        constants: whether weights after the layers may be constants, which an encoder may not bear.
    """

    def __init__(self, constants: bool = False) -> None:
        self.constants = constants
        self.doubts: list[str] = []
        self._worst: dict[str, float] = {}
        self.unusable: dict[str, set[int]] = {}
        self.dependence: dict[str, int] = {}
        self._aligned: list[list[bool]] | None = None

    def doubt_worst(self, kind: str, off: float, text: str) -> None:
        """Of doubts that begin alike, keeps the one that is the furthest off."""
        if off > self._worst.get(kind, 0):
            self._worst[kind] = off
            self.doubts[:] = [d for d in self.doubts if not d.startswith(kind)] + [f"{kind} {text}"]

    def agree(self, aligned: list[list[bool]]) -> list[list[bool]]:
        """Which tensors of which layers are aligned in every chunk: in this one and in those before."""
        before = self._aligned or aligned
        self._aligned = [[a and b for a, b in zip(*layer)] for layer in zip(aligned, before)]
        if self._aligned != before:
            raise RoutesDifferError
        return self._aligned


class Recording:
    """
    The embeddings of one forward pass and the activations of its layers.

    Attributes:
        inputs, additional_forward_args: of the forward pass.
        layer_input: whether the layers' inputs were recorded, instead of their outputs.
        embedding: z (B, D), detached.
        names: of the layers.
        layers: for each layer the tensors that it returned, as (B, C, *spatial), detached.
        has_graph: whether the pass was recorded for backward, from the layers on.
        call: that the pass is a part of.
    """

    def __init__(
        self,
        inputs: Tensors,
        additional_forward_args: Any,
        layer_input: bool,
        embedding: Tensor,
        names: list[str],
        tensors: list[list[Tensors]],
        has_graph: bool,
        call: Call,
        reshape_transform: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.inputs = inputs
        self.additional_forward_args = additional_forward_args
        self.layer_input = layer_input
        self.embedding = embedding.detach()
        self.names = names
        self.has_graph = has_graph
        self.call = call
        self._embedding = embedding
        self._tensors = tensors  # of each layer, by device (one, but for DataParallel)
        self._reshape_transform = reshape_transform
        self.layers = [
            tuple(self._layout(a, name) for a in _captum.reduce_list([tuple(a.detach() for a in t) for t in devices]))
            for name, devices in zip(names, tensors)
        ]
        self._shared: dict[object, Any] = {}
        self._asked: Tensor | None = None
        self._on_map: list[Tensor] = []

    @property
    def doubts(self) -> list[str]:
        """What a user should be warned of."""
        return self.call.doubts

    def once(self, what: object, compute: Callable[[], T]) -> T:
        """What the chunks of references share, computed for the first of them."""
        if what not in self._shared:
            self._shared[what] = compute()
        return cast(T, self._shared[what])

    def note(self, w: Tensor, valid: Tensor, weights: list[list[Tensor]]) -> None:
        """Remembers whether weights of the layers come of w (B, P, D) of the embedding, for valid pairs (B, P)."""
        # One row for all: its terms do not cancel by chance.
        shares = valid * torch.linspace(1, 2, w.shape[1], dtype=w.dtype, device=w.device)
        mixed = torch.where(valid[..., None], shares[..., None] * w, torch.zeros_like(w)).sum(1)
        shown = [
            [valid.reshape(*valid.shape, *[1] * (alpha.ndim - 2)) & (alpha != 0) for alpha in layer]
            for layer in weights
        ]
        found = [torch.stack([alpha.any() for alpha in layer]).any() for layer in shown]
        self._asked = mixed if self._asked is None else self._asked + mixed
        self._on_map = [a | b for a, b in zip(found, self._on_map or found)]

    def settle(self) -> None:
        """Finds how the embeddings depend on the layers, from all that was noted."""
        for i, (name, on_map) in enumerate(zip(self.names, self._on_map)):
            if on_map:
                self.call.dependence[name] = BY_THE_MAP
            elif self._asked is not None and self._asked.any():
                found = OFF_THE_MAP if self._is_used(i, self._asked) else NOT_AT_ALL
                self.call.dependence[name] = max(found, self.call.dependence.get(name, NOT_AT_ALL))

    def gradients(self, w: Tensor) -> list[Tensors]:
        """The gradient of w·z, for w (B, D), with respect to each layer's activations, in their layout."""
        if not self.has_graph:
            raise RuntimeError(_NO_GRAPH)
        flat = [a for devices in self._tensors for tensors in devices for a in tensors]
        found, scale = self._gradients(w, flat)
        rest = iter(zip(flat, found))
        gradients = []
        for devices in self._tensors:
            pairs = [[next(rest) for _ in tensors] for tensors in devices]
            filled = [tuple(torch.zeros_like(a) if g is None else g for a, g in tensors) for tensors in pairs]
            laid_out = [widen(self.reshape(g)) for g in _captum.reduce_list(filled)]
            gradients.append(tuple(scale.reshape(-1, *[1] * (g.ndim - 1)) * g for g in laid_out))
        return gradients

    def _gradients(self, w: Tensor, tensors: list[Tensor]) -> tuple[Sequence[Tensor | None], Tensor]:
        """Gradients of a multiple of w·z in a range that half precision holds, and the scale (B, 1) that undoes it."""
        largest = w.abs().amax(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        if not self._embedding.requires_grad:
            return [None] * len(tensors), largest
        half = any(t.dtype == torch.float16 for t in (self._embedding, *tensors))
        for gain in (4096.0, 1.0) if half else (1.0,):  # float16 rounds to zero below 6e-8 and overflows at 65504
            v = (w / largest * gain).to(self._embedding.dtype)
            found = torch.autograd.grad(self._embedding, tensors, v, retain_graph=True, allow_unused=True)
            if gain == 1 or all(g is None or bool(g.isfinite().all()) for g in found):
                break
        return found, largest / gain

    def _is_used(self, layer: int, w: Tensor) -> bool:
        """Whether w·z, for w (B, D), depends on any part of a layer's activations, before their reshaping."""
        flat = [a for tensors in self._tensors[layer] for a in tensors]
        return any(g is not None and bool(g.any()) for g in self._gradients(w, flat)[0])

    def reshape(self, activation: Tensor) -> Tensor:
        """The layer's activations, or whatever has their shape, as (B, C, *spatial)."""
        if self._reshape_transform is not None:
            return self._reshape_transform(activation)
        found = to_map(activation, images_of(self.inputs), self.embedding.shape[1])
        return activation if found is None else found

    def _layout(self, activation: Tensor, name: str) -> Tensor:
        """Activations as (B, C, *spatial), or an error that says how to make them so."""
        B = len(self.embedding)
        fits = self._reshape_transform is not None or len(activation) == B
        A = self.reshape(activation) if fits else activation
        if not isinstance(A, Tensor) or A.ndim < 2 or len(A) != B:
            origin = f"layer {name} to give" if self._reshape_transform is None else "`reshape_transform` to return"
            raise ValueError(
                f"Expected {origin} activations (B, C, *spatial) with B = {B}, but got {describe(A)}; choose another"
                " layer, or pass a reshape_transform that returns that layout."
            )
        images = images_of(self.inputs)
        if self._reshape_transform is None and to_map(activation, images, self.embedding.shape[1]) is None:
            raise ValueError(
                f"The activations {tuple(A.shape)} of layer {name} look like tokens or channels-last maps, but how they"
                f" lie on inputs {tuple(images.shape)} cannot be told from their shape. Pass"
                " reshape_transform=patch_tokens(height, width) with the grid of the patches,"
                " reshape_transform=channels_last for maps (B, h, w, C), or, if dimension 1 is the channels after all,"
                " reshape_transform=lambda a: a."
            )
        return A


@contextmanager
def record(
    forward_func: Callable[..., Any],
    layers: Sequence[nn.Module],
    inputs: Tensors,
    additional_forward_args: Any,
    *,
    output_selector: Callable[[Any], Tensor] | None,
    reshape_transform: Callable[[Tensor], Tensor] | None,
    layer_input: bool,
    graph: bool,
    device_ids: list[int] | None,
    call: Call,
) -> Iterator[Recording]:
    """
    Runs the forward function once, recording the layers' outputs (or inputs).

    Gradient mode is off until the first layer is reached, so nothing before it is
    recorded for backward; with ``graph`` it is on from there. The hooks are gone when the
    context is entered. Each thread's hooks ignore the calls of the other threads.
    """
    parallel = forward_func if isinstance(forward_func, nn.DataParallel) else None
    in_threads = parallel is not None or device_ids is not None
    thread, lock = threading.get_ident(), threading.Lock()
    found: dict[nn.Module, dict[torch.device, Tensors]] = defaultdict(dict)
    repeated: set[nn.Module] = set()
    constants: list[_Constants] = []

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
            if call.constants and not constants:
                constants.append(stack.enter_context(_Constants()))
        value = args if layer_input else output
        items = list(value) if isinstance(value, (tuple, list)) else [value]
        kept = {i: keep(a) for i, a in enumerate(items) if isinstance(a, Tensor) and a.is_floating_point() and a.ndim}
        if not kept:
            raise TypeError(
                f"Expected layer {_name(forward_func, layer)} to {'take' if layer_input else 'return'} floating-point"
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
            with _eager():
                output = _captum.run_forward(forward_func, inputs, None, additional_forward_args)
            with torch.set_grad_enabled(graph):
                embedding = check_rows("inputs", inputs, select_embedding(output, output_selector))
        call.doubts += doubts_of_training(forward_func)
        names = [_name(forward_func, layer) for layer in layers]
        for layer, name in dict(zip(layers, names)).items():
            if layer not in found:
                raise ValueError(
                    f"Expected `layer` to be a module that the forward pass calls, but {name} was not called; pass a"
                    " module of this very model that its forward pass calls (an element of a ModuleList, not the list)."
                )
            if layer in repeated:
                call.doubts.append(
                    f"Layer {name} was called several times in one forward pass; its last call is explained. Name the"
                    " module around the call that you mean, or give that call a module of its own."
                )
        ids = _captum.extract_device_ids(forward_func, found, device_ids)
        tensors = [[found[m][d] for d in _captum.sort_key_list(list(found[m]), ids)] for m in layers]
        has_graph = graph and not embedding.is_inference()
        recording = Recording(
            inputs,
            additional_forward_args,
            layer_input,
            embedding,
            names,
            tensors,
            has_graph,
            call,
            reshape_transform,
        )
        yield recording
        recording.settle()


class _Constants(TorchFunctionMode):
    """
    Weights as constants where an activation goes through linear layers, convolutions and norms: what only their
    gradients would need is not kept for backward. Batch norm in evaluation, whose input torch keeps all the same, is
    the affine map that it is.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _WEIGHED or not args or not args[0].requires_grad or isinstance(args[0], nn.Parameter):
            return func(*args, **kwargs)
        args = tuple(a.detach() if isinstance(a, nn.Parameter) else a for a in args)
        kwargs = {name: a.detach() if isinstance(a, nn.Parameter) else a for name, a in kwargs.items()}
        return _batch_norm(*args, **kwargs) if func is F.batch_norm else func(*args, **kwargs)


_WEIGHED = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.group_norm, F.batch_norm}


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.batch_norm; in evaluation, without its input for backward."""
    given = [v for v in (running_mean, running_var, weight, bias) if v is not None]
    usual = x.dtype in (torch.float32, torch.float64) and all(v.shape == x.shape[1:2] for v in given)
    mixed = any(v.dtype != x.dtype for v in given)
    if training or running_mean is None or running_var is None or not usual or mixed:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - running_mean * scale
    channels = (-1, *[1] * (x.ndim - 2))
    return (x * scale.reshape(channels)).add_(shift.reshape(channels))


def embed(
    forward_func: Callable[..., Any],
    name: str,
    inputs: Tensors,
    additional_forward_args: Any,
    output_selector: Callable[[Any], Tensor] | None,
) -> Tensor:
    """The embeddings (B, D) of the argument of that name, without a graph and without hooks."""
    with torch.no_grad(), buffers_restored(forward_func):
        output = _captum.run_forward(forward_func, inputs, None, additional_forward_args)
        return check_rows(name, inputs, select_embedding(output, output_selector)).detach()


def _eager() -> AbstractContextManager[Any]:
    """Compiled parts of a model, run as they are: torch.compile runs past hooks that are set after its first call."""
    # Importing Dynamo takes seconds; where it has not been imported, nothing is compiled.
    set_stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _gradients_off(*_: Any) -> None:
    torch.set_grad_enabled(False)


def model_of(forward_func: Callable[..., Any]) -> nn.Module | None:
    """The model behind a forward function: itself, or the object of a bound method."""
    owner = getattr(forward_func, "__self__", forward_func)
    return owner if isinstance(owner, nn.Module) else None


def _name(forward_func: Callable[..., Any], layer: nn.Module) -> str:
    model = model_of(forward_func)
    names = {m: n for n, m in model.named_modules()} if model is not None else {}
    return f"{names[layer]!r} ({type(layer).__name__})" if layer in names else type(layer).__name__


@contextmanager
def buffers_restored(forward_func: Callable[..., Any]) -> Iterator[None]:
    """A model in training mode updates its running statistics in every forward pass: put them back."""
    model = model_of(forward_func)
    modules = [m for m in model.modules() if m.training] if model is not None else []
    saved = [(m, name, b, b.detach().clone()) for m in modules for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in saved:
                module._buffers[name] = buffer.copy_(value)


@contextmanager
def attributes_restored(forward_func: Callable[..., Any]) -> Iterator[None]:
    """
    Attributes that other code leaves on a model's modules, or takes from them, are put right;
    after a failure, so are the hooks that it left.
    """
    model = model_of(forward_func)
    modules = list(model.modules()) if model is not None else []
    saved = [(m, dict(vars(m)), {n: set(v) for n, v in vars(m).items() if n.endswith("_hooks")}) for m in modules]
    try:
        yield
    except BaseException:
        for module, _, hooks in saved:
            for name, were in hooks.items():
                left = vars(module)[name]
                for key in [k for k in left if k not in were and not _is_ours(left[k])]:
                    del left[key]
        raise
    finally:
        for module, attributes, _ in saved:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            for name in attributes.keys() - vars(module).keys():
                vars(module)[name] = attributes[name]


def _is_ours(hook: Any) -> bool:
    """Whether a hook belongs to a call of this package, in another thread, which will remove it."""
    return str(getattr(hook, "__module__", "")).startswith("captum_fam.")


def doubts_of_training(forward_func: Callable[..., Any]) -> list[str]:
    model = model_of(forward_func)
    training = [m for m in model.modules() if m.training] if model is not None else []
    doubts = {
        "batch norm: each map depends on the other inputs of the batch": any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in training
        ),
        "dropout: each call gives other maps": any(map(_drops, training)),
    }
    return [
        f"The model is in training mode and has {doubt}. Call model.eval() first." for doubt in doubts if doubts[doubt]
    ]


def _drops(module: nn.Module) -> bool:
    """Whether a module drops values, or whole paths as those of timm, transformers and torchvision do."""
    name = type(module).__name__
    if not (isinstance(module, nn.modules.dropout._DropoutNd) or "Drop" in name or name == "StochasticDepth"):
        return False
    return any(
        isinstance(p, (int, float)) and p > 0 for p in (getattr(module, n, 0) for n in ("p", "drop_prob", "prob"))
    )
