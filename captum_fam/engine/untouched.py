"""The model, left as it was by whatever runs it."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from captum_fam import _captum
from captum_fam._checks import check_rows
from captum_fam.score import select_embedding

P = ParamSpec("P")
T = TypeVar("T")


def eagerly(function: Callable[P, T]) -> Callable[P, T]:
    """A function that torch.compile runs as it is, in whatever is compiled around it: hooks cannot be compiled."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():  # only then: what disable() imports takes seconds
            return cast(T, torch.compiler.disable(function)(*args, **kwargs))
        return function(*args, **kwargs)

    return run


class _Shared:
    """Contexts that calls in several threads share: the first of those that overlap enters, the last leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[object, tuple[AbstractContextManager[Any], list[None]]] = {}

    @contextmanager
    def hold(self, key: object, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        with self._lock:
            if key not in self._held:
                context = make()
                context.__enter__()
                self._held[key] = context, []
            context, users = self._held[key]
            users.append(None)
        try:
            yield
        finally:
            with self._lock:
                users.pop()
                if not users:
                    del self._held[key]
                    context.__exit__(None, None, None)


_SHARED = _Shared()


def compiled_parts_off() -> AbstractContextManager[Any]:
    """Compiled parts of a model, run as they are: torch.compile runs past hooks that are set after its first call."""
    # Importing Dynamo takes seconds; where it has not been imported, nothing is compiled.
    set_stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    return nullcontext() if set_stance is None else _SHARED.hold(set_stance, lambda: set_stance("force_eager"))


def embed(
    forward_func: Callable[..., Any],
    name: str,
    inputs: tuple[Tensor, ...],
    additional_forward_args: Any,
    output_selector: Callable[[Any], Tensor] | None,
) -> Tensor:
    """The embeddings (B, D) of the argument of that name, without a graph and without hooks."""
    with torch.no_grad(), buffers_restored(forward_func):
        output = _captum.run_forward(forward_func, inputs, None, additional_forward_args)
        return check_rows(name, inputs, select_embedding(output, output_selector)).detach().clone()


def model_of(forward_func: Callable[..., Any]) -> nn.Module | None:
    """The model behind a forward function: itself, or the object of a bound method."""
    owner = getattr(forward_func, "__self__", forward_func)
    return owner if isinstance(owner, nn.Module) else None


def name_of(forward_func: Callable[..., Any], layer: nn.Module) -> str:
    """What messages call a layer."""
    model = model_of(forward_func)
    names = {m: n for n, m in model.named_modules()} if model is not None else {}
    return f"{names[layer]!r} ({type(layer).__name__})" if layer in names else type(layer).__name__


@contextmanager
def buffers_restored(forward_func: Callable[..., Any]) -> Iterator[None]:
    """
    A model in training mode updates its running statistics in every forward pass: it updates copies, so that a
    backward pass of the caller's that waits for the originals finds them untouched.
    """
    model = model_of(forward_func)
    with ExitStack() as stack:
        for module in model.modules() if model is not None else ():
            if module.training and any(b is not None for b in module._buffers.values()):
                stack.enter_context(_SHARED.hold(module, partial(_copied_buffers, module)))
        yield


@contextmanager
def _copied_buffers(module: nn.Module) -> Iterator[None]:
    originals = dict(module._buffers)
    module._buffers.update({name: None if b is None else b.detach().clone() for name, b in originals.items()})
    try:
        yield
    finally:
        module._buffers.update(originals)


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


def has_batch_statistics(forward_func: Callable[..., Any]) -> bool:
    """Whether the examples of a batch are not independent: some batch norm takes its statistics from them."""
    model = model_of(forward_func)
    norms = [
        m for m in (model.modules() if model is not None else ()) if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    return any(m.training or m.running_mean is None for m in norms)


def warnings_of_training(forward_func: Callable[..., Any]) -> list[str]:
    model = model_of(forward_func)
    training = [m for m in model.modules() if m.training] if model is not None else []
    causes = {
        "batch norm: each map depends on the other inputs of the batch": any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in training
        ),
        "dropout: each call gives other maps": any(map(_drops, training)),
    }
    return [
        f"The model is in training mode and has {cause}. Call model.eval() first." for cause in causes if causes[cause]
    ]


def _drops(module: nn.Module) -> bool:
    """Whether a module drops values, or whole paths as those of timm, transformers and torchvision do."""
    name = type(module).__name__
    if not (isinstance(module, nn.modules.dropout._DropoutNd) or "Drop" in name or name == "StochasticDepth"):
        return False
    return any(
        isinstance(p, (int, float)) and p > 0 for p in (getattr(module, n, 0) for n in ("p", "drop_prob", "prob"))
    )
