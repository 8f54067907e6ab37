"""Leaves the model as it was, whatever runs it."""

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from types import FunctionType, ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from captum_fam import _captum
from captum_fam._checks import check_rows
from captum_fam._misfit import in_plain_words
from captum_fam.score import select_embedding

P = ParamSpec("P")
T = TypeVar("T")

# How many objects around a forward function are searched for its modules.
_SHOWN = 1000


def eagerly(function: Callable[P, T]) -> Callable[P, T]:
    """A function that torch.compile runs uncompiled, even within compiled code: hooks cannot be compiled."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():  # only then: what disable() imports takes seconds
            return cast(T, torch.compiler.disable(function)(*args, **kwargs))
        return function(*args, **kwargs)

    return run


class _Shared:
    """Contexts that calls in several threads share. Of calls that overlap, the first enters and the last leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[object, tuple[AbstractContextManager[Any], list[int]]] = {}

    def enter(self, key: object, make: Callable[[], AbstractContextManager[Any]]) -> Any:
        with self._lock:
            if key not in self._held:
                context = make()
                context.__enter__()
                self._held[key] = context, []
            context, users = self._held[key]
            users.append(threading.get_ident())
            return context

    def leave(self, key: object) -> None:
        with self._lock:
            context, users = self._held[key]
            users.remove(threading.get_ident())
            if not users:
                del self._held[key]
                context.__exit__(None, None, None)

    @contextmanager
    def hold(self, key: object, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        self.enter(key, make)
        try:
            yield
        finally:
            self.leave(key)

    def is_alone(self, key: object) -> bool:
        """Whether no other thread is in the context of this key."""
        with self._lock:
            return set(self._held[key][1]) == {threading.get_ident()}


_SHARED = _Shared()


def compiled_parts_off() -> AbstractContextManager[Any]:
    """Runs compiled parts of a model uncompiled: compiled code ignores hooks that are set after its first call."""
    # Importing Dynamo takes seconds; where it has not been imported, nothing is compiled.
    set_stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    return nullcontext() if set_stance is None else _SHARED.hold(set_stance, partial(_eager, set_stance))


@contextmanager
def _eager(set_stance: Callable[..., Any]) -> Iterator[None]:
    dynamo, ours = sys.modules["torch._dynamo.eval_frame"], set_stance("force_eager")
    try:
        yield
    finally:
        if getattr(dynamo, "_stance", ours.stance) is ours.stance:  # a stance that was set in the meantime stays
            ours.__exit__(None, None, None)


def run(forward_func: Callable[..., Any], inputs: tuple[Tensor, ...], additional_forward_args: Any) -> Any:
    """What an encoder returns, or an error that says in plain words that it does not take these inputs."""
    with in_plain_words(forward_func, inputs):
        return _captum.run_forward(forward_func, inputs, None, additional_forward_args)


def embed(
    forward_func: Callable[..., Any],
    name: str,
    inputs: tuple[Tensor, ...],
    additional_forward_args: Any,
    output_selector: Callable[[Any], Tensor] | None,
    warned: list[str] | None = None,
) -> Tensor:
    """
    The embeddings (B, D) of the argument of that name, without a graph. Warnings about a model in training mode are
    added to ``warned``, if it lacks them.
    """
    with torch.no_grad(), buffers_restored(forward_func) as guard:
        output = run(forward_func, inputs, additional_forward_args)
        if warned is not None:
            warned += [w for w in warnings_of_training(forward_func, guard.called) if w not in warned]
        return check_rows(name, inputs, select_embedding(output, output_selector)).detach().clone()


def model_of(forward_func: Callable[..., Any]) -> nn.Module | None:
    """The model behind a forward function: itself, or the object of a bound method."""
    owner = getattr(forward_func, "__self__", forward_func)
    return owner if isinstance(owner, nn.Module) else None


def name_of(forward_func: Callable[..., Any], layer: nn.Module) -> str:
    """What messages call a layer."""
    model = model_of(forward_func)
    names = {m: n for n, m in model.named_modules()} if model is not None else {}
    return f"{names[layer]!r} ({type(layer).__name__})" if names.get(layer) else type(layer).__name__


def roots_of(forward_func: Callable[..., Any]) -> list[nn.Module]:
    """
    The modules that can be found in a forward function before it runs: itself, or what it binds, encloses, names and
    keeps. The nearest come first, and the search ends after a fixed number of objects.
    """
    found: list[nn.Module] = []
    met: dict[int, Any] = {}  # kept, so that no other object takes its number
    waiting = deque[Any]([forward_func])
    while waiting and len(met) < _SHOWN:
        value = waiting.popleft()
        if id(value) in met:
            continue
        met[id(value)] = value
        if issubclass(type(value), nn.Module):  # isinstance would ask a proxy about the object behind it
            found.append(value)
        waiting += filter(gc.is_tracked, _held_by(value))  # what is not tracked holds nothing
    return found


def _held_by(value: Any) -> Iterable[Any]:
    kind = type(value)
    if issubclass(kind, (type, ModuleType, Tensor)):
        return ()
    if issubclass(kind, (dict, list, tuple, set, frozenset)) and len(value) > _SHOWN:
        return ()
    if issubclass(kind, nn.Module):  # whose children are found by its own list of modules
        return [held for name, held in vars(value).items() if not name.startswith("_")]
    if issubclass(kind, FunctionType):
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value), *named]
    return gc.get_referents(value)


@contextmanager
def buffers_restored(forward_func: Callable[..., Any]) -> Iterator["Guard"]:
    """
    Lets a forward pass change only copies of a model's buffers (running statistics, counters, queues): a backward pass
    of the caller's that still needs the originals finds them untouched.
    """
    with ExitStack() as stack:
        guard, roots = Guard(), roots_of(forward_func)
        stack.callback(guard.end)
        for root in roots:
            guard.hold(root)
        if any("_orig_mod" in module._modules for module in guard.held):  # torch.compile warns of hooks on all modules
            guard.called.update(dict.fromkeys(roots))
        else:
            stack.enter_context(compiled_parts_off())  # a part that is compiled in the meantime would keep the hook
            stack.callback(register_module_forward_pre_hook(guard.before).remove)
        yield guard


class Guard:
    """
    The buffers of the modules that are known, or that are called.

    Attributes:
        held: the modules whose buffers are copies; None for those that have none.
        called: modules that this thread has called; modules behind a function may be found only then.
    """

    def __init__(self) -> None:
        self.held: dict[nn.Module, _Buffers | None] = {}
        self.called: dict[nn.Module, None] = {}
        self._thread, self._is_new = threading.get_ident(), True
        self._copies: dict[int, Tensor] = {}

    def before(self, module: nn.Module, _: Any) -> None:
        """The hook before the forward pass of any module."""
        if threading.get_ident() == self._thread and module not in self.called:
            self.called[module] = None
            if module not in self.held:
                self.hold(module)

    def hold(self, model: nn.Module) -> None:
        for module in model.modules():
            if module not in self.held:
                self.held[module] = None
                if len(module._buffers):
                    held = self.held[module] = _SHARED.enter(module, partial(_Buffers, module, self._copies))
                    if held.copies is not self._copies:  # an outer call of this thread has run a pass
                        self._copy(module, held)

    def begin(self) -> None:
        """Called before each pass: undoes what the pass before has changed in the buffers."""
        if not self._is_new:
            self._copies.clear()
            for module, held in self.held.items():
                if held is not None:
                    self._copy(module, held)
        self._is_new = False

    def end(self) -> None:
        for module, held in self.held.items():
            if held is not None:
                _SHARED.leave(module)

    def _copy(self, module: nn.Module, held: "_Buffers") -> None:
        if _SHARED.is_alone(module):
            held.copy(self._copies)


class _Buffers:
    """
    A module's buffers, restored after a pass. If a pass replaces a buffer, as a cache that grows does, what the module
    notes beside it is restored, too.

    Attributes:
        copies: the copies in use, by the ids of their originals, which modules may share.
    """

    def __init__(self, module: nn.Module, copies: dict[int, Tensor]) -> None:
        self._module, self._attributes, self.copies = module, dict(vars(module)), copies
        self._own = self._originals = dict(module._buffers.items())

    def __enter__(self) -> None:
        self._copy(self.copies)

    def copy(self, copies: dict[int, Tensor]) -> None:
        self.__exit__()
        self._copy(copies)

    def _copy(self, copies: dict[int, Tensor]) -> None:
        for b in self._originals.values():
            if b is not None and id(b) not in copies:
                copies[id(b)] = b if is_lazy(b) else b.detach().clone()
        self._own = {name: None if b is None else copies[id(b)] for name, b in self._originals.items()}
        self._put(self._own)

    def __exit__(self, *_: object) -> None:
        attributes, left = vars(self._module), self._module._buffers
        if left.keys() != self._own.keys() or any(left[name] is not own for name, own in self._own.items()):
            for name in attributes.keys() - self._attributes.keys():
                del attributes[name]
            attributes.update(self._attributes)
        self._put(self._originals)

    def _put(self, buffers: dict[str, Tensor | None]) -> None:
        if isinstance(self._module, torch.jit.ScriptModule):  # its buffers are elsewhere
            for name, value in buffers.items():
                setattr(self._module, name, value)
        else:
            own = self._attributes["_buffers"]
            vars(self._module)["_buffers"] = own if buffers is self._originals else dict(buffers)


@contextmanager
def attributes_restored(forward_func: Callable[..., Any]) -> Iterator[None]:
    """
    Restores attributes that other code sets on a model's modules, or removes from them. After a failure, it also
    removes the hooks that this code left.
    """
    modules = {m for root in roots_of(forward_func) for m in root.modules()}
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


def has_batch_statistics(forward_func: Callable[..., Any], called: Collection[nn.Module] = ()) -> bool:
    """Whether the examples of a batch depend on each other: some batch norm takes its statistics from them."""
    norms = filter(_is_batch_norm, _modules_of(forward_func, called))
    return any(m.training or m.running_mean is None for m in norms)


def warnings_of_training(forward_func: Callable[..., Any], called: Collection[nn.Module]) -> list[str]:
    """The warnings about a model in training mode; ``called`` has the modules behind a function."""
    training = [m for m in _modules_of(forward_func, called) if getattr(m, "training", False)]  # frozen TorchScript
    causes = {
        "batch norm: each map depends on the other inputs of the batch": any(map(_is_batch_norm, training)),
        "dropout: each call gives other maps": any(map(_drops, training)),
    }
    return [
        f"The model is in training mode and has {cause}. Call model.eval() first." for cause in causes if causes[cause]
    ]


def _modules_of(forward_func: Callable[..., Any], called: Collection[nn.Module]) -> set[nn.Module]:
    model, found = model_of(forward_func), set[nn.Module]()
    for root in called if model is None else (model, *called):
        if root not in found:
            found.update(root.modules())
    return found


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in _name_in_script(module)


def _name_in_script(module: nn.Module) -> str:
    """What a module is called before TorchScript is made of it, if that is so."""
    return str(module.original_name) if isinstance(module, torch.jit.ScriptModule) else ""


def _drops(module: nn.Module) -> bool:
    """Whether a module drops values, or whole paths as those of timm, transformers and torchvision do."""
    name = _name_in_script(module) or type(module).__name__
    if not (isinstance(module, nn.modules.dropout._DropoutNd) or "Drop" in name or name == "StochasticDepth"):
        return False
    return any(
        isinstance(p, (int, float)) and p > 0 for p in (getattr(module, n, 0) for n in ("p", "drop_prob", "prob"))
    )
