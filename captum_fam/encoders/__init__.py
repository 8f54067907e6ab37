"""Encoders by name for the command line and for notebooks, and the layer to explain."""

from dataclasses import replace
from pathlib import Path

from captum_fam.bundled import BundledEncoder, bundled_encoder
from captum_fam.encoders._classifiers import of_timm, timm_models, torchvision, torchvision_models
from captum_fam.encoders._factory import from_factory
from captum_fam.encoders._layer import find_layer
from captum_fam.encoders._loaded import LoadedEncoder
from captum_fam.encoders._loading import load_state, near, one_line
from captum_fam.encoders._open_clip import open_clip
from captum_fam.encoders._transformers import hugging_face, sentence_transformers

__all__ = ["LoadedEncoder", "find_layer", "load_encoder", "one_line"]


def load_encoder(name: str, weights: str | Path | None = None, size: int | None = None) -> LoadedEncoder:
    """
    How do I get an encoder by its name? Loads what ``--encoder`` of the command line loads: an encoder, the layer to
    explain, and the transform of its pictures.

    Args:
        name (str): ``"bundled"``; ``"torchvision:NAME"`` or ``"timm:NAME"``, without the classifier; ``"hf:PATH"``, a
                    folder of transformers or a name on huggingface.co; ``"open_clip:NAME/PRETRAINED"``, or
                    ``open_clip:`` before open_clip's own ``hf-hub:NAME`` or ``local-dir:PATH``;
                    ``"sentence-transformers:PATH"``, a folder or a name on huggingface.co; or
                    ``"module.path:factory"``, a function without arguments that returns a module. This runs the code of
                    that module, which is looked for in the current folder first.
        weights (str or Path, optional): A file with a state dict, instead of the pretrained weights.
                    Default: None
        size (int, optional): Side of the images in pixels, if it is not the model's own: some models must know it.
                    Default: None, the model's own

    Returns:
        *LoadedEncoder*: the encoder in eval mode, on the CPU; it unpacks as ``encoder, layer, transform, mean, std``.

    Raises:
        ValueError: there is no such encoder, or its weights cannot be loaded or do not fit.

    Examples::

        >>> from captum_fam import FeatureActivationMap
        >>> from captum_fam.demo import photographs
        >>> from captum_fam.encoders import load_encoder
        >>> encoder, layer, transform, mean, std = load_encoder("bundled")
        >>> query, reference = (transform(photographs()[name])[None] for name in ("cat", "coffee"))
        >>> FeatureActivationMap(encoder, layer).attribute(query, reference=reference).shape
        torch.Size([1, 1, 10, 10])
    """
    weights = None if weights is None else Path(weights)
    loaded = _load(name, weights, size)
    return replace(loaded, name=name, size=size or loaded.size)


def _load(name: str, weights: Path | None, size: int | None) -> LoadedEncoder:
    kind, _, rest = name.partition(":")
    if name == "bundled":
        model = bundled_encoder()
        if weights is not None:
            load_state(model, weights)
        return LoadedEncoder(model, BundledEncoder.size, BundledEncoder.mean, BundledEncoder.std)
    if kind == "torchvision":
        return torchvision(name, rest, weights)
    if kind == "timm" and rest:
        return of_timm(name, rest, weights, size)
    if kind == "hf" and rest:
        return hugging_face(name, rest, weights)
    if kind == "open_clip" and rest:
        return open_clip(name, rest, weights, size)
    if kind == "sentence-transformers" and rest:
        return sentence_transformers(name, rest, weights)
    if kind and rest:
        own = from_factory(kind, rest)
        if weights is not None:
            load_state(own, weights)
        return LoadedEncoder(own.eval())
    models = torchvision_models()
    known = ["bundled", *(f"torchvision:{n}" for n in models.list_models(module=models))]
    known += [f"timm:{n}" for n in (timm_models() if ":" not in name else ())]
    same = [n for n in known if n.partition(":")[2] == name]
    close = f": did you mean {' or '.join(same)}?" if same and name else ""
    if not close and ":" not in name:
        close = near(name, known) or near(f"torchvision:{name}", known)
    kinds = (
        "pass bundled, torchvision:NAME, timm:NAME, hf:PATH, open_clip:NAME/PRETRAINED, sentence-transformers:PATH or,"
        " for your own, module.path:factory"
    )
    raise ValueError(f"no encoder {name!r}{f'{close} Else' if close else ':'} {kinds}")
