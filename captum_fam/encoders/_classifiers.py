"""Classifiers of torchvision and timm, without their last layer."""

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from captum_fam.encoders._loaded import LoadedEncoder, resampling
from captum_fam.encoders._loading import first_sentence, load_state, near, one_line, optional, quiet


def torchvision_models() -> Any:
    """torchvision.models, imported where it is used: it takes a second or two."""
    return importlib.import_module("torchvision.models")


def torchvision(name: str, architecture: str, weights: Path | None) -> LoadedEncoder:
    models = torchvision_models()
    names = models.list_models(module=models)
    if architecture not in names:
        raise ValueError(f"torchvision has no model {architecture!r}{near(architecture, names)}")
    if weights and architecture in ("googlenet", "inception_v3"):
        raise ValueError(
            f"{name} normalises its pretrained weights' images in its own way: write a factory that loads them"
        )
    default = models.get_model_weights(architecture).DEFAULT
    try:
        with quiet():
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
        load_state(model, weights, optional=f"{head}.")
    parent, _, attribute = head.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    transforms = default.transforms()
    return LoadedEncoder(
        model.eval(),
        transforms.crop_size[0],
        tuple(transforms.mean),
        tuple(transforms.std),
        resampling(transforms.interpolation.value),
    )


def timm_models() -> list[str]:
    """The names that timm has, if it is there."""
    try:
        timm = optional("timm")
    except ValueError:
        return []
    return [*timm.list_models(), *timm.list_pretrained()]


def of_timm(name: str, architecture: str, weights: Path | None, size: int | None) -> LoadedEncoder:
    timm = optional("timm")
    names = [*timm.list_models(), *timm.list_pretrained()]
    if architecture not in names and ":" not in architecture:  # as in timm's own hf-hub:NAME and local-dir:PATH
        raise ValueError(f"timm has no model {architecture!r}{near(architecture, names)}")
    try:
        with quiet():
            model = timm.create_model(architecture, pretrained=weights is None, num_classes=0)
    except Exception as error:  # of timm, the hub or its client
        raise ValueError(
            f"cannot download the weights of {name} ({first_sentence(error)}): pass a state dict as --weights FILE"
        ) from error
    if weights is not None:
        classifier = model.pretrained_cfg.get("classifier") or ()
        load_state(
            model, weights, tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier))
        )
    settings = timm.data.resolve_model_data_config(model)
    native = settings["input_size"][-1]
    if size not in (None, native) and hasattr(model, "set_input_size"):  # position embeddings are interpolated
        try:
            model.set_input_size(img_size=(size, size))
        except Exception as error:
            raise ValueError(
                f"{name} cannot take images of {size} pixels ({one_line(error)}): try another --size, such as {native}"
            ) from error
    return LoadedEncoder(
        model.eval(),
        size or native,
        tuple(settings["mean"]),
        tuple(settings["std"]),
        resampling(settings["interpolation"]),
    )
