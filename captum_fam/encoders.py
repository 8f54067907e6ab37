"""Encoders by name for the command line, and the layer to explain."""

import importlib
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from captum_fam.bundled import BundledEncoder, bundled_encoder

IMAGENET_SIZE, IMAGENET_MEAN, IMAGENET_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder in eval mode and the images that it was trained on."""

    model: nn.Module
    size: int = IMAGENET_SIZE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def load_encoder(name: str, weights: Path | None = None) -> LoadedEncoder:
    """
    The encoder of a name: ``bundled``, ``torchvision:NAME`` without its classifier, or
    ``module.path:factory``, a function without arguments that returns a module.

    Raises:
        ValueError: there is no such encoder, or the weights cannot be had or do not fit.
    """
    kind, _, rest = name.partition(":")
    model: nn.Module
    if name == "bundled":
        model = bundled_encoder()
        if weights is not None:
            _load(model, weights)
        return LoadedEncoder(model, BundledEncoder.size, BundledEncoder.mean, BundledEncoder.std)
    if kind == "torchvision":
        return _torchvision(name, rest, weights)
    if kind and rest:
        model = _from_factory(kind, rest)
        if weights is not None:
            _load(model, weights)
        return LoadedEncoder(model.eval())
    known = ["bundled", *(f"torchvision:{n}" for n in models.list_models(module=models))]
    near = "" if ":" in name else _near(name, known) or _near(f"torchvision:{name}", known)
    raise ValueError(f"no encoder {name!r}{near or ': pass bundled, torchvision:NAME or module.path:factory'}")


def _torchvision(name: str, architecture: str, weights: Path | None) -> LoadedEncoder:
    names = models.list_models(module=models)
    if architecture not in names:
        raise ValueError(f"torchvision has no model {architecture!r}{_near(architecture, names)}")
    if weights and architecture in ("googlenet", "inception_v3"):
        raise ValueError(
            f"{name} normalises its pretrained weights' images in its own way: write a factory that loads them"
        )
    default = models.get_model_weights(architecture).DEFAULT
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # a failed download is one line, below
            model = models.get_model(architecture, weights=None if weights else default)
    except OSError as error:
        raise ValueError(
            f"cannot download the weights of {name} ({one_line(error)}): pass a state dict as --weights FILE"
        ) from error
    classifiers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not classifiers:
        raise ValueError(f"{name} has no linear classifier to take off: write a factory that returns its encoder")
    head = classifiers[-1]
    if weights is not None:
        _load(model, weights, optional=f"{head}.")
    parent, _, attribute = head.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    transforms = default.transforms()
    return LoadedEncoder(model.eval(), transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))


def _from_factory(module_name: str, factory_name: str) -> nn.Module:
    sys.path.insert(0, "")  # modules of the current folder, as with python -m
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ValueError(f"cannot import {module_name}: {one_line(error)}") from error
    finally:
        sys.path.remove("")
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        near = _near(factory_name, [n for n in dir(module) if callable(getattr(module, n))])
        raise ValueError(f"{module_name} has no function {factory_name!r}{near}")
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{module_name}:{factory_name}() failed: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module_name}:{factory_name}() returned {type(model).__name__}: return a torch.nn.Module")
    return model


def _load(model: nn.Module, file: Path, optional: str = "\0") -> None:
    """Loads a state dict; keys that start with ``optional`` may be missing from it."""
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"there is no weights file {file}") from error
    except Exception as error:  # the unpickler raises many kinds
        raise ValueError(
            f"cannot read {file} as a state dict: save one with torch.save(model.state_dict(), file)"
        ) from error
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
    missing = [k for k in keys.missing_keys if not k.startswith(optional)]
    if missing or keys.unexpected_keys:
        wrong = [
            f"{len(k)} keys {w} ({k[0]}, ...)"
            for w, k in (("missing", missing), ("unknown", keys.unexpected_keys))
            if k
        ]
        prefixed = state and all(k.startswith("module.") for k in state)
        hint = ": save the state dict of the .module in the DataParallel model" if prefixed else ""
        raise ValueError(f"the weights in {file} do not fit the encoder: {' and '.join(wrong)}{hint}")


def find_layer(model: nn.Module, name: str | None, image: Tensor) -> tuple[str, nn.Module]:
    """
    The layer of a dotted name; without a name, the last module in a forward pass of ``image``
    (1, 3, H, W) that returns a map with more than one location.

    Raises:
        ValueError: there is no such layer.
    """
    modules = dict(model.named_modules())
    del modules[""]
    if name is not None:
        if name not in modules:
            raise ValueError(f"the encoder has no layer {name!r}{_near(name, modules)}")
        return name, modules[name]
    spatial: list[str] = []
    tokens: list[str] = []  # since the last map

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            spatial.append(name)
            tokens.clear()
        elif isinstance(output, Tensor) and output.ndim == 3:
            tokens.append(name)

    hooks = [m.register_forward_hook(lambda _, __, out, n=n: note(n, out)) for n, m in modules.items()]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not spatial:
        raise ValueError("no layer of the encoder returns a map (B, C, h, w): name one with --layer")
    if tokens:
        raise ValueError(
            f"the encoder goes on with tokens after its last map, {spatial[-1]}: name a layer with --layer, or explain"
            " a layer of tokens in Python with FeatureActivationMap(..., reshape_transform=...)"
        )
    return spatial[-1], modules[spatial[-1]]


def _near(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), 3, 0.5)
    return f": did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
