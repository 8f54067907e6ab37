"""Checks of arguments before the model runs; the errors say what came and what would work."""

import operator
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import isqrt
from typing import Any

import torch
from torch import Tensor


def describe(value: object) -> str:
    """An argument in words, for error messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def embeddings_in(value: object) -> list[str]:
    """How to write each value of a mapping or a sequence that may be embeddings (B, D): "['z']", "[0]"."""
    several = enumerate(value) if isinstance(value, (tuple, list)) else ()
    return [
        f"[{key!r}]"
        for key, v in (value.items() if isinstance(value, Mapping) else several)
        if isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 2
        # Lengths and scores are none.
        if v.shape[1] > 1 and not str(key).startswith("logits")
    ]


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """The end of a message about a value that is not among the names: a question with the names that are close."""
    near = get_close_matches(value, list(names), 3, 0.5) if isinstance(value, str) else []
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def warn(message: str) -> None:
    """Gives a UserWarning that points at the caller's line, outside this package and Captum."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "captum_fam",
        "captum",
        "contextlib",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_once(messages: list[str]) -> None:
    """Gives each message as a warning, once."""
    for message in dict.fromkeys(messages):
        warn(message)


def check_callable(name: str, value: object) -> None:
    if isinstance(value, type) and issubclass(value, torch.nn.Module):
        raise TypeError(
            f"Expected `{name}` to be a module or a function, but got the class {value.__name__}; pass an instance,"
            f" {value.__name__}(...)."
        )
    if not callable(value):
        raise TypeError(f"Expected `{name}` to be a module or a function, but got {describe(value)}.")


def check_hookable(name: str, value: object) -> None:
    """Raises an error for TorchScript, whose modules ignore hooks or take none."""
    if isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction, torch._C.ScriptMethod)):
        raise TypeError(
            f"Expected `{name}` to be a module or a function of Python, but got TorchScript ({type(value).__name__}),"
            " in which hooks do not work; pass the Python model and a layer of it, or take Relax, which needs no layer."
        )


def check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        error = TypeError if not isinstance(value, int) or isinstance(value, bool) else ValueError
        raise error(f"Expected `{name}` to be a positive int, but got {describe(value)}.")


def check_square(name: str, side: str, places: int, size: Sequence[int]) -> None:
    """Raises an error where a number of places is square, but another grid has the form of the image, (H, W)."""
    height, width = size
    for h in range(1, places + 1):
        w = places // h
        if h * w == places and h != w and max(abs(h - w * height / width), abs(w - h * width / height)) < 1:
            raise ValueError(
                f"Cannot tell the grid of the {side}'s {places} places in `{name}`: {isqrt(places)} x"
                f" {isqrt(places)}, or {h} x {w}, as the image of {height} x {width} pixels suggests. Pass"
                f" {name}.reshape(-1, h, w, h', w')."
            )


def check_internal_batch_size(value: object) -> None:
    if value is not None:
        check_positive("internal_batch_size", value)


def format_inputs(name: str, value: Any) -> tuple[Tensor, ...]:
    """A tensor or a tuple of tensors, as a tuple."""
    tensors = value if isinstance(value, tuple) else (value,)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        got = f"a tuple of {[type(t).__name__ for t in tensors]}" if isinstance(value, tuple) else describe(value)
        cure = "apply the encoder's transform to pictures and torch.stack to a list of tensors"
        if isinstance(value, Mapping):
            cure = f"pass one of its values, {name}[key] with one of the keys {list(value)}"
        raise TypeError(f"Expected `{name}` to be a tensor or a tuple of tensors, but got {got}; {cure}.")
    if any(not t.ndim for t in tensors):
        raise ValueError(
            f"Expected `{name}` to have a batch dimension, but got a tensor without dimensions; pass {name}[None]."
        )
    return tensors


def check_labels(name: str, labels: Any, count: int, of: str, device: torch.device) -> Tensor:
    """Labels as integers (count,), one for each of what they label."""
    if isinstance(labels, str) or (
        isinstance(labels, Iterable) and any(isinstance(label, (str, bytes)) for label in labels)
    ):
        cure = f"number them: `names, {name} = numpy.unique({name}, return_inverse=True)`; names[i] is that of label i"
        if isinstance(labels, str):
            cure = "pass the number of that name"
        raise TypeError(f"Expected `{name}` to be integers, but got {_some(labels)}; {cure}.")
    try:
        found = torch.as_tensor(labels, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected `{name}` to be integers, but got {describe(labels)}: {error}.") from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"Expected `{name}` to be integers, but got {describe(found)}; pass {name}.long().")
    if found.shape != (count,):
        cure = f"; for one-hot labels pass {name}.argmax(1)" if found.ndim == 2 and len(found) == count else ""
        raise ValueError(
            f"Expected `{name}` to be {count} integers, one for each of {of}, but got shape {tuple(found.shape)}{cure}."
        )
    return found


def _some(labels: Any) -> str:
    """The first of the labels, for a message."""
    if isinstance(labels, str):
        return repr(labels)
    first = [str(label) if isinstance(label, str) else label for label, _ in zip(labels, range(4))]
    return f"{first[:3]!r}" if len(first) < 4 else f"{first[:3]!r}"[:-1] + ", ...]"


def check_reference_embedding(value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        inside = [f"output{key}" for key in embeddings_in(value)]  # for an output of a model of transformers
        cure = f"the embeddings in it, {' or '.join(inside)}" if inside else "embeddings here"
        raise TypeError(
            f"Expected `reference_embedding` to be a floating-point tensor (K, D), but got {describe(value)};"
            f" pass {cure}, or inputs of the encoder as `reference`."
        )
    if value.ndim != 2:
        raise ValueError(
            f"Expected `reference_embedding` of shape (K, D), but got {tuple(value.shape)}; one reference is (1, D)."
        )


def reference_index(name: str, target: Any, references: int, inputs: int) -> Tensor:
    """
    The number of the reference that each input takes, (B,), for a target in one of Captum's forms.
    Without a target, one reference is shared, and B references are paired with the B inputs.
    """
    if target is None:
        if references == 1:
            return torch.zeros(inputs, dtype=torch.long)
        if references == inputs:
            return torch.arange(inputs)
        raise ValueError(
            f"`{name}` is needed to choose among {references} references for {inputs} inputs: pass {name}=<int> for one"
            f" reference shared by all, or a list of {inputs} numbers; attribute_all explains every reference."
        )
    index = _indices(name, target)
    if index.ndim == 0 or (index.ndim == 1 and len(index) == 1 and isinstance(target, Tensor)):
        index = index.reshape(1).expand(inputs)
    if index.shape != (inputs,):
        raise ValueError(
            f"Expected `{name}` to be one int, or {inputs} of them, one for each input, but got shape"
            f" {tuple(index.shape)}."
        )
    outside = index[(index < -references) | (index >= references)]
    if len(outside):
        raise ValueError(
            f"Expected `{name}` to number one of {references} references, 0 to {references - 1}, but got"
            f" {int(outside[0])}."
        )
    return index % max(references, 1)


def _indices(name: str, target: Any) -> Tensor:
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"Expected `{name}` to hold integers, but got {describe(target)}.")
        return target.detach().cpu().long()
    try:
        if isinstance(target, list):
            return torch.tensor([_integer(t) for t in target], dtype=torch.long)
        return torch.tensor(_integer(target))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Expected `{name}` to be an int, a list of ints or an integer tensor, but got {describe(target)}."
        ) from error


def _integer(value: Any) -> int:
    if isinstance(value, tuple):  # Captum also writes the index of one output dimension as a tuple
        (value,) = value
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def check_rows(name: str, tensors: tuple[Tensor, ...], embedding: Tensor) -> Tensor:
    """The embeddings, if there is one for each of the tensors' examples."""
    if len(embedding) != len(tensors[0]):
        raise ValueError(
            f"Expected one embedding for each of the {len(tensors[0])} examples of `{name}`, but got embeddings of"
            f" shape {tuple(embedding.shape)}; pass an output_selector that returns (B, D), and a single"
            " example with a batch dimension, x[None]."
        )
    return embedding


def check_dimensions(embedding: Tensor, references: Tensor) -> None:
    if embedding.shape[1] != references.shape[1]:
        raise ValueError(
            f"The reference embeddings have {references.shape[1]} dimensions, but those of `inputs` have"
            f" {embedding.shape[1]}; embed the references with the same encoder, or pass them as `reference`."
        )


def references_given(method: str, reference: object, reference_embedding: object) -> tuple[Tensor, ...]:
    """The references of a method that compares the places of images."""
    if reference is None or reference_embedding is not None:
        raise ValueError(
            f"{method} compares places, and embeddings have none: pass the references as inputs of the encoder, by"
            " name, reference=images."
        )
    return format_inputs("reference", reference)


def check_same_form(reference: tuple[Tensor, ...], inputs: tuple[Tensor, ...], name: str = "reference") -> None:
    if len(reference) != len(inputs):
        raise ValueError(f"Expected `{name}` in the form of `inputs`, {len(inputs)} tensors, but got {len(reference)}.")
    for r, x in zip(reference, inputs):
        if r.ndim == x.ndim - 1 or (r.ndim == 2 < x.ndim):
            cures = [f"pass a batch dimension, {name}[None] for a single one"] * (r.ndim == x.ndim - 1)
            if name == "reference" and r.ndim == 2:
                cures.append("embeddings, of texts too, are no inputs: pass them as reference_embedding")
            raise ValueError(
                f"Expected `{name}` in the form of `inputs`, of {x.ndim} dimensions, but got shape {tuple(r.shape)};"
                f" {'; '.join(cures) or 'pass inputs of the encoder'}."
            )


def check_rows_fit(
    additional_forward_args: object,
    inputs: int,
    references: int,
    name: str = "reference",
    cure: str = "pass reference_embedding=fam.embed(reference, their_own_args) instead",
    paired: bool = True,
) -> None:
    """Raises an error for arguments with a row for each input where there are more, or fewer, references."""
    arguments = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
    if (inputs != references or not paired) and any(
        isinstance(a, Tensor) and a.ndim and len(a) == inputs for a in arguments
    ):
        raise ValueError(
            f"`additional_forward_args` hold a tensor with one row for each of the {inputs} inputs, which does not fit"
            f" the {references} of `{name}`; {cure}."
        )
