"""Encoders of open_clip, of images and of sentences."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from captum_fam._files import irregular
from captum_fam.encoders._loaded import LoadedEncoder, SameModules, resampling
from captum_fam.encoders._loading import first_sentence, load_tokenizer, near, one_line, optional, quiet

_SCHEMES = ("hf-hub:", "local-dir:")


class _OpenClipEncoder(SameModules):
    def __init__(self, model: Any, architecture: str) -> None:
        super().__init__(model)
        self._architecture, self._tokenizer = architecture, None

    def forward(self, images: Tensor) -> Any:
        return self.model.encode_image(images)

    def embed_text(self, sentences: list[str]) -> Any:
        if self._tokenizer is None:  # images need none, and some are on a hub
            load = optional("open_clip", "open-clip").get_tokenizer
            self._tokenizer = load_tokenizer(f"open_clip:{self._architecture}", lambda: load(self._architecture))
        tokenizer: Any = self._tokenizer
        return self.model.encode_text(tokenizer(sentences).to(self.device))


def open_clip(name: str, rest: str, weights: Path | None, size: int | None) -> LoadedEncoder:
    """``ARCHITECTURE/PRETRAINED``, or open_clip's own ``hf-hub:NAME`` and ``local-dir:PATH``"""
    library = optional("open_clip", "open-clip")
    architecture, tag = _parted(library, name, rest, weights is not None)
    preprocess = library.get_pretrained_cfg(architecture, tag) if tag else {}
    if tag and bool(preprocess.get("quick_gelu")) != bool(library.get_model_config(architecture).get("quick_gelu")):
        quick = f"open_clip:{architecture}-quickgelu/{tag}"
        other = quick if preprocess.get("quick_gelu") else f"open_clip:{architecture.removesuffix('-quickgelu')}/{tag}"
        warnings.warn(
            f"{name} was trained with another activation function than its architecture has, as open_clip warns:"
            f" {other} has it",
            stacklevel=2,
        )
    try:
        with quiet():
            model = library.create_model(
                architecture,
                pretrained=tag if weights is None else None,  # or it would be downloaded
                load_weights=weights is None,
                force_preprocess_cfg=preprocess,
                pretrained_image=False,
                pretrained_text=False,
                require_pretrained=weights is None,
                force_image_size=size,
            )
    except Exception as error:  # of open_clip, the hub or its client
        raise ValueError(
            f"cannot load {name} ({first_sentence(error)}): pass its checkpoint as --weights FILE, or"
            " open_clip:local-dir:PATH of a folder with open_clip_config.json"
        ) from error
    if weights is not None:
        _load_checkpoint(library, model, weights)
    settings = model.visual.preprocess_cfg
    side = settings["size"][0] if isinstance(settings["size"], (tuple, list)) else settings["size"]
    return LoadedEncoder(
        _OpenClipEncoder(model, architecture),
        side,
        tuple(settings["mean"]),
        tuple(settings["std"]),
        resampling(settings["interpolation"]),
    )


def _parted(library: Any, name: str, rest: str, has_weights: bool) -> tuple[str, str | None]:
    """The architecture and the name of its pretrained weights. The user must choose these, because they differ."""
    if rest.startswith(_SCHEMES):
        return rest, None
    architectures = library.list_models()
    whole, (architecture, _, tag) = rest.replace("/", "-"), rest.rpartition("/")
    if whole in architectures:  # as in ViT-B/32
        architecture, tag = whole, ""
    architecture = architecture.replace("/", "-")
    if architecture not in architectures and Path(rest).is_dir():
        raise ValueError(f"open_clip takes a folder by another name: open_clip:local-dir:{rest}")
    if architecture not in architectures:
        raise ValueError(f"open_clip has no model {architecture or rest!r}{near(architecture or rest, architectures)}")
    tags = library.list_pretrained_tags_by_model(architecture)
    if not tag and (len(tags) == 1 or (tags and has_weights)):  # which say how images are normalised
        tag = tags[0]
    others = f"one of {', '.join(tags)}" if tags else ""
    if tag and not library.get_pretrained_cfg(architecture, tag):
        raise ValueError(
            f"open_clip has no weights {tag!r} for {architecture}: pass {others or 'a file as --weights FILE'}"
        )
    if not tag and not has_weights:
        cure = f"write open_clip:{architecture}/TAG, with TAG {others}" if tags else "pass a file as --weights FILE"
        raise ValueError(f"{name} does not say which weights: {cure}")
    return architecture, tag or None


def _load_checkpoint(library: Any, model: Any, file: Path) -> None:
    """Loads a checkpoint of open_clip's training, a state dict, or safetensors, as open_clip reads them."""
    try:
        other = irregular(file)
    except OSError as error:
        raise ValueError(f"there is no weights file {file}") from error
    if other:
        raise ValueError(f"cannot read {file} as a state dict: it is {other}, pass a file that open_clip wrote")
    try:
        with quiet():
            library.load_checkpoint(model, str(file))
    except Exception as error:
        raise ValueError(f"the weights in {file} do not fit the encoder: {one_line(error)}") from error
