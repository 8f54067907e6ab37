"""Errors for an encoder that cannot take its inputs: they name the part of it that can."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from captum_fam import _captum

# How encoders call the methods that embed one input, and the parts that may do so.
_METHODS = (
    "get_image_features",
    "encode_image",
    "forward_once",
    "forward_one",
    "get_embedding",
    "get_embeddings",
    "embed",
    "encode",
)
_PARTS = re.compile(
    "encoder|backbone|embed|branch|tower|net|student|teacher|online|trunk|visual|vision|feature|extract|base|model"
)
_OF_TORCH = nn.modules.module.__file__


@contextmanager
def in_plain_words(forward_func: Callable[..., Any], inputs: tuple[Any, ...]) -> Iterator[None]:
    """
    Put around a call of an encoder. If the encoder takes other arguments, or compares images with texts, the error says
    so, and what to pass instead. Any other error inside stays as it is.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("captum_fam."):  # our own signal to run the call in another way
            raise
        frames = list(_frames(error))
        text = _of_texts(frames)
        if text is None and isinstance(error, (TypeError, NotImplementedError)):
            text = _of_signature(forward_func, inputs, error, frames)
        if text is None:
            raise
        raise TypeError(text) from error


def _frames(error: Exception) -> Iterator[FrameType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _of_texts(frames: list[FrameType]) -> str | None:
    """If a model with towers for images and texts failed: a message about the tower that got what it cannot take."""
    for frame in frames:
        values = frame.f_locals
        model = values.get("self")
        of_images = [n for n in _METHODS[:2] if hasattr(model, n)] if isinstance(model, nn.Module) else []
        if not of_images:
            continue
        name = type(model).__name__
        texts, images = (
            next((values[n] for n in names if n in values), None)
            for names in (("input_ids", "text"), ("pixel_values", "image"))
        )
        # transformers needs both; open_clip does not.
        no_texts = "input_ids" in values and texts is values.get("inputs_embeds") is None and isinstance(images, Tensor)
        if isinstance(images, Tensor) and images.ndim == 2 and images.dtype in (torch.int32, torch.int64):
            return (
                f"Expected images, but {name} got integers of shape {tuple(images.shape)}, which look like tokens of"
                " texts; embed texts by the model's own function, and pass their embeddings as `reference_embedding`."
            )
        as_texts = isinstance(texts, Tensor) and texts.is_floating_point() and texts.ndim > 2
        if as_texts or no_texts:
            got = "took images for texts" if as_texts else "compares images with texts and got no texts"
            return (
                f"Expected the encoder to embed images, but {name} {got}; pass model.{of_images[0]}, which embeds"
                " images alone. Embeddings of texts may be its `reference_embedding`."
            )
    return None


def _of_signature(
    forward_func: Callable[..., Any], inputs: tuple[Any, ...], error: Exception, frames: list[FrameType]
) -> str | None:
    """
    If the encoder's own arguments do not fit, or it has no forward pass: a message that names the part to pass, where
    one is found.
    """
    modules = [f.f_locals["self"] for f in frames if f.f_code.co_filename == _OF_TORCH and "self" in f.f_locals]
    modules = [m for m in modules if not isinstance(m, nn.DataParallel) and not hasattr(m, "_orig_mod")]
    called: Any = modules[0].forward if modules else forward_func
    while isinstance(called, partial):
        called = called.func
    caller = (_OF_TORCH,) if modules else (_captum.run_forward.__code__.co_filename, __file__)
    own = frames[-1].f_code.co_filename in caller and (not modules or frames[-1].f_locals.get("self") is modules[0])
    model = getattr(called, "__self__", None)
    if own and 'is missing the required "forward" function' in str(error):
        parts = _branches(model, inputs)
        return f"The encoder cannot be called: {error}. Pass {_written(parts) or 'the part of it that embeds'}."
    if not own or not str(error).startswith(f"{getattr(called, '__qualname__', None)}() "):
        return None
    met = f"The encoder cannot take the {_tensors(inputs)} that it is given: {error}."
    if "missing" in str(error):
        one = _written(_branches(model, inputs)) or "the part of it that embeds one"
        return (
            f"{met} If it compares several inputs, pass {one}, and the other input as `reference`; if not, pass the"
            " missing arguments as `additional_forward_args`."
        )
    by_name = [p.name for p in signature(called).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    if by_name:
        return f"{met} It takes {', '.join(by_name)} by name: pass lambda x: model({by_name[0]}=x)."
    return f"{met} Pass only the inputs that it embeds, and the inputs to compare with as `reference`."


def _written(parts: list[str]) -> str:
    return " or ".join(f"model.{name}" for name in parts)


def _tensors(inputs: tuple[Any, ...]) -> str:
    return "tensor" if len(inputs) == 1 else f"{len(inputs)} tensors"


def _branches(model: object, inputs: tuple[Any, ...]) -> list[str]:
    """The names of the encoder's methods, or else of its parts, that map these inputs to embeddings (B, D)."""
    if not isinstance(model, nn.Module):
        return []
    methods = [n for n in _METHODS if callable(getattr(type(model), n, None))]
    parts = [n for n, _ in model.named_children() if _PARTS.search(n.lower())]
    for names in (methods, parts):
        found = [n for n in names if _embeds(getattr(model, n), inputs)]
        if found:
            return found
    return []


@torch.no_grad()
def _embeds(function: Callable[..., Any], inputs: tuple[Any, ...]) -> bool:
    try:
        z = function(*inputs)
    except Exception:  # of any kind: the function does not take these inputs
        return False
    return isinstance(z, Tensor) and z.is_floating_point() and z.ndim == 2
