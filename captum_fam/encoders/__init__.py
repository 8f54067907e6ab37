"""Encoders by name for the command line, and the layer to explain."""

import importlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_fam._files import FOLDER, irregular
from captum_fam.bundled import BundledEncoder, bundled_encoder
from captum_fam.engine.layers import last_map

IMAGENET_SIZE, IMAGENET_MEAN, IMAGENET_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadedEncoder:
    """
    An encoder in eval mode and the images that it was trained on, from :func:`load_encoder`.

    Attributes:
        model: from images to embeddings (B, D).
        size: of the images, in pixels.
        mean: of their RGB channels in [0, 1].
        std: the same.

    Examples::

        >>> from captum_fam.encoders import load_encoder
        >>> loaded = load_encoder("bundled")
        >>> loaded.size, loaded.model.training
        (128, False)
    """

    model: nn.Module
    size: int = IMAGENET_SIZE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def load_encoder(name: str, weights: Path | None = None, size: int | None = None) -> LoadedEncoder:
    """
    The encoder of a name: ``bundled``, ``torchvision:NAME`` or ``timm:NAME`` without its
    classifier, ``hf:PATH`` (of a folder or of huggingface.co, for transformers), or
    ``module.path:factory``, a function without arguments that returns a module. Its module's code
    is run, that of a module in the current folder first.

    ``size`` is that of the images that it will get, if they are not of its own: some models
    must be told.

    Raises:
        ValueError: there is no such encoder, or the weights cannot be had or do not fit.

    Examples::

        >>> from captum_fam.encoders import load_encoder
        >>> load_encoder("bundled").model(torch.rand(2, 3, 128, 128)).shape
        torch.Size([2, 512])
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
    if kind == "timm" and rest:
        return _timm(name, rest, weights, size)
    if kind == "hf" and rest:
        return _transformers(name, rest, weights)
    if kind and rest:
        model = _from_factory(kind, rest)
        if weights is not None:
            _load(model, weights)
        return LoadedEncoder(model.eval())
    models = _models()
    known = ["bundled", *(f"torchvision:{n}" for n in models.list_models(module=models))]
    near = "" if ":" in name else _near(name, known) or _near(f"torchvision:{name}", known)
    kinds = "pass bundled, torchvision:NAME, timm:NAME, hf:PATH or, for your own, module.path:factory"
    raise ValueError(f"no encoder {name!r}{f'{near} Else' if near else ':'} {kinds}")


def _models() -> Any:
    """torchvision.models, imported where it is used: it takes a second or two."""
    return importlib.import_module("torchvision.models")


def _torchvision(name: str, architecture: str, weights: Path | None) -> LoadedEncoder:
    models = _models()
    names = models.list_models(module=models)
    if architecture not in names:
        raise ValueError(f"torchvision has no model {architecture!r}{_near(architecture, names)}")
    if weights and architecture in ("googlenet", "inception_v3"):
        raise ValueError(
            f"{name} normalises its pretrained weights' images in its own way: write a factory that loads them"
        )
    default = models.get_model_weights(architecture).DEFAULT
    try:
        with _quiet():
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


def _timm(name: str, architecture: str, weights: Path | None, size: int | None) -> LoadedEncoder:
    timm = _optional("timm")
    names = [*timm.list_models(), *timm.list_pretrained()]
    if architecture not in names and ":" not in architecture:  # as in timm's own hf-hub:NAME and local-dir:PATH
        raise ValueError(f"timm has no model {architecture!r}{_near(architecture, names)}")
    try:
        with _quiet():
            model = timm.create_model(architecture, pretrained=weights is None, num_classes=0)
    except Exception as error:  # of timm, the hub or its client
        raise ValueError(
            f"cannot download the weights of {name} ({_first_sentence(error)}): pass a state dict as --weights FILE"
        ) from error
    if weights is not None:
        classifier = model.pretrained_cfg.get("classifier") or ()
        _load(model, weights, tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier)))
    settings = timm.data.resolve_model_data_config(model)
    native = settings["input_size"][-1]
    if size not in (None, native) and hasattr(model, "set_input_size"):  # position embeddings are interpolated
        try:
            model.set_input_size(img_size=(size, size))
        except Exception as error:
            raise ValueError(
                f"{name} cannot take images of {size} pixels ({one_line(error)}): try another --size, such as {native}"
            ) from error
    return LoadedEncoder(model.eval(), size or native, tuple(settings["mean"]), tuple(settings["std"]))


class _TransformersEncoder(nn.Module):
    """A model of transformers, from images (B, 3, H, W) to embeddings (B, D); its modules keep their names."""

    def __init__(self, model: Any, has_pooler: bool) -> None:
        super().__init__()
        # Not a submodule but the same module in another form: names and state dicts get no prefix.
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        embeds = hasattr(model, "get_image_features")
        self._function: Any = (model.get_image_features if embeds else model,)  # in a tuple, or it is a submodule
        self._has_pooler = has_pooler
        parameters = inspect.signature(model.get_image_features if embeds else model.forward).parameters
        # Positions for images of another size; it changes nothing for those of the model's own.
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}

    def forward(self, images: Tensor) -> Tensor:
        try:
            output = self._function[0](pixel_values=images, **self._options)
        except ValueError as error:  # in the words of transformers, without advice
            raise RuntimeError(str(error)) from error
        if isinstance(output, Tensor):  # get_image_features before transformers 5
            return output
        names = ("image_embeds", "pooler_output") if self._has_pooler else ()
        for value in (getattr(output, name, None) for name in names):
            if isinstance(value, Tensor):
                return value.flatten(1)
        tokens: Any = getattr(output, "last_hidden_state", None)
        if self._has_pooler or tokens is None or tokens.ndim != 3:
            raise ValueError(f"its output has no image_embeds or pooler_output, only {', '.join(output)}")
        return tokens[:, 0]  # type: ignore[no-any-return]


def _transformers(name: str, path: str, weights: Path | None) -> LoadedEncoder:
    transformers = _optional("transformers")
    for file in Path(path).iterdir() if Path(path).is_dir() else ():
        if file.exists() and irregular(file) not in ("", FOLDER):
            raise ValueError(
                f"cannot load {name}: {file} is {irregular(file)}, pass a folder that save_pretrained wrote"
            )
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            if weights is None:
                model, info = transformers.AutoModel.from_pretrained(
                    path, config=config, trust_remote_code=False, output_loading_info=True
                )
            else:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # of transformers, the hub or its client
        cure = "a folder that save_pretrained wrote, or a model's name on huggingface.co"
        if "trust_remote_code" in str(error):  # no option of ours
            cure = "module.path:factory, for a factory of your own that runs it"
        raise ValueError(f"cannot load {name} ({_first_sentence(error)}): pass {cure}") from error
    if model.main_input_name != "pixel_values" and not hasattr(model, "get_image_features"):
        raise ValueError(f"{name} is a {type(model).__name__}, which takes no images: pass a model that does")
    pooler = "pooler.dense."  # of checkpoints without one, transformers makes a random one
    missing = sorted(info["missing_keys"]) if weights is None else _load(model, weights, pooler)
    if not all(key.startswith(pooler) for key in missing):
        raise ValueError(
            f"{name} lacks weights of its {type(model).__name__} ({missing[0]}, ...): pass a state dict as --weights"
            " FILE"
        )
    encoder = _TransformersEncoder(model.eval(), has_pooler=not missing).eval()
    try:
        with _quiet():
            settings = transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=False).to_dict()
    except (ImportError, OSError, ValueError):
        warnings.warn(
            f"{name} has no image processor, so its images are normalised as ImageNet's: see --mean and --std",
            stacklevel=2,
        )
        settings = {}
    own = getattr(getattr(config, "vision_config", config), "image_size", None)
    size = _side(settings.get("crop_size" if settings.get("do_center_crop") else "size")) or _side(own)
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean") or IMAGENET_MEAN, settings.get("image_std") or IMAGENET_STD
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return LoadedEncoder(encoder, size or IMAGENET_SIZE, tuple(mean), tuple(std))


def _first_sentence(error: Exception) -> str:
    """Without the advice of a library to those who call it, which is not for users of the command."""
    return re.split(r"(?<=[.!]) ", one_line(error))[0]


def _side(size: Any) -> int | None:
    """The side of a square, in any of the forms in which transformers keeps sizes."""
    if isinstance(size, Mapping):
        size = next((size[key] for key in ("height", "shortest_edge", "longest_edge") if size.get(key)), None)
    side: int | None = size[0] if isinstance(size, (list, tuple)) else size
    return side


def _optional(package: str) -> Any:
    try:
        with _quiet():
            return importlib.import_module(package)
    except ImportError as error:
        what = (
            f"{package} is not installed" if error.name == package else f"cannot import {package} ({one_line(error)})"
        )
        raise ValueError(f"{what}: pip install 'captum-fam[transformers]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars, log lines and warnings of a library: what fails is one line of ours."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _from_factory(module_name: str, factory_name: str) -> nn.Module:
    sys.path.insert(0, "")  # modules of the current folder, as with python -m
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        dotted = ".".join(Path(module_name).with_suffix("").parts)
        hint = f"; write {dotted}:{factory_name}" if module_name.endswith(".py") else ""
        raise ValueError(f"cannot import {module_name}: {one_line(error)}{hint}") from error
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


def _load(model: nn.Module, file: Path, optional: str | tuple[str, ...] = ()) -> list[str]:
    """Loads a state dict; keys that start with ``optional`` may be missing, and are returned, or too many."""
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


def find_layer(model: nn.Module, name: str | None, image: Tensor) -> tuple[str, nn.Module]:
    """
    The layer of a dotted name; without a name, the last module in a forward pass of ``image``
    (1, 3, H, W) that returns a map, or the tokens of one, with more than one location on which
    the embedding depends.

    Raises:
        ValueError: there is no such layer.
    """
    modules = dict(model.named_modules())
    del modules[""]
    if name is None:
        name = last_map(model, (image,))
        if name is None:
            raise ValueError(
                "no layer of the encoder returns a map (B, C, h, w), or tokens of patches, on which the embedding"
                " depends: name one with --layer"
            )
    if name not in modules:
        raise ValueError(f"the encoder has no layer {name!r}{_near(name, modules)}")
    return name, modules[name]


def _near(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), 3, 0.5)
    return f": did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
