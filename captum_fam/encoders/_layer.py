"""The layer to explain."""

from torch import Tensor, nn

from captum_fam.encoders._loading import near
from captum_fam.engine.layers import last_map


def find_layer(model: nn.Module, name: str | None, image: Tensor) -> tuple[str, nn.Module]:
    """
    The layer of a dotted name. Without a name, the last module in a forward pass of ``image``
    (1, 3, H, W) that returns a map, or the tokens of one, with more than one location on which the
    embedding depends.

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
                " depends: name one with --layer, in Python with model.get_submodule(name)"
            )
    if name not in modules:
        close = near(name, modules)
        last = None if close else last_map(model, (image,))
        raise ValueError(f"the encoder has no layer {name!r}{close}{f': name another, such as {last}' if last else ''}")
    return name, modules[name]
