"""Libraries and weights of others: a failure becomes one line that says what to try."""

import importlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_fam._files import irregular


def optional(package: str, extra: str = "transformers") -> Any:
    """
    Imports a package that is optional.

    Raises:
        ValueError: it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(package)
    except ImportError as error:
        what = (
            f"{package} is not installed" if error.name == package else f"cannot import {package} ({one_line(error)})"
        )
        raise ValueError(f"{what}: pip install 'captum-fam[{extra}]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars, log lines and warnings of a library: a failure becomes one line of ours."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def load_tokenizer(name: str, load: Callable[[], Any]) -> Any:
    """
    Loads a tokenizer.

    Raises:
        ValueError: there is none, or it knows no words, as transformers makes one of a folder without its files.
    """
    try:
        with quiet():
            tokenizer = load()
    except Exception as error:  # of transformers, the hub or its client
        raise ValueError(
            f"cannot load the tokenizer of {name} ({first_sentence(error)}): save it beside the model, or pass a model"
            " that has one"
        ) from error
    own = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip's is around one of transformers
    if hasattr(own, "__len__") and len(own) <= len(own.all_special_ids):
        raise ValueError(f"the tokenizer of {name} knows no words: save its files beside the model")
    return tokenizer


def load_state(model: nn.Module, file: Path, optional: str | tuple[str, ...] = ()) -> list[str]:
    """Loads a state dict; returns its missing keys. Only keys that start with ``optional`` may be missing or extra."""
    try:
        other = irregular(file)
        state: Any = None if other else torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"there is no weights file {file}") from error
    except Exception as error:  # the unpickler raises many kinds
        raise ValueError(
            f"cannot read {file} as a state dict: save one with torch.save(model.state_dict(), file)"
        ) from error
    if other:
        raise ValueError(f"cannot read {file} as a state dict: it is {other}, pass a file that torch.save wrote")
    nested = [k for k, v in state.items() if isinstance(v, dict)] if isinstance(state, dict) else []
    if nested:
        raise ValueError(
            f"{file} is a checkpoint, not a state dict: save its {' or '.join(map(repr, nested))} by itself"
        )
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{file} holds no state dict: save one with torch.save(model.state_dict(), file)")
    try:
        keys = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights in {file} do not fit the encoder: {one_line(error)}") from error
    missing, unknown = (
        [k for k in found if not k.startswith(optional)] for found in (keys.missing_keys, keys.unexpected_keys)
    )
    if missing or unknown:
        wrong = [f"{len(k)} keys {w} ({k[0]}, ...)" for w, k in (("missing", missing), ("unknown", unknown)) if k]
        prefixed = state and all(k.startswith("module.") for k in state)
        hint = ": save the state dict of the .module in the DataParallel model" if prefixed else ""
        raise ValueError(f"the weights in {file} do not fit the encoder: {' and '.join(wrong)}{hint}")
    return list(keys.missing_keys)


def near(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), 3, 0.5)
    return f": did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def first_sentence(error: Exception) -> str:
    """An error without the library's advice to its callers, which does not help users of the command."""
    return re.split(r"(?<=[.!]) ", one_line(error))[0]
