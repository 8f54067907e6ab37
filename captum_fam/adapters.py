"""Layer maps in the forms that Captum's metrics take."""

from collections.abc import Callable, Sequence
from typing import Any

from captum.attr import Attribution, LayerAttribution
from torch import Tensor

from captum_fam._checks import describe, format_inputs

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def explanation_func(attribution: Attribution) -> Callable[..., tuple[Tensor, ...]]:
    r"""
    How do I measure a method with Captum's ``sensitivity_max``? Wrap it with this function.
    ``sensitivity_max`` mistakes a single tensor from its explanation function for a tuple with one
    tensor per example. It then fails for several examples, and for one it normalises by a part of
    the map. The function that this returns always gives a tuple.

    Args:
        attribution (Attribution): A Captum attribution method.

    Returns:
        *Callable*: a function that takes the arguments of ``attribution.attribute`` and returns its
        attributions as a tuple of contiguous tensors.

    Raises:
        TypeError: ``attribution`` has no ``attribute`` method.

    Examples::

        >>> from captum.metrics import sensitivity_max
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> fam = FeatureActivationMap(SimilarityScore(encoder, torch.rand(5, 8)), encoder[1])
        >>> sensitivity_max(explanation_func(fam), torch.rand(2, 3, 16, 16), target=3).shape
        torch.Size([2])
    """
    if not callable(getattr(attribution, "attribute", None)):
        raise TypeError(f"Expected `attribution` to be a Captum attribution method, but got {describe(attribution)}.")

    def explain(inputs: Tensor | tuple[Tensor, ...], **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(a.contiguous() for a in _flat(attribution.attribute(inputs, **kwargs)))

    return explain


def to_input_space(
    attributions: Tensor | tuple[Tensor, ...],
    inputs: Tensor | tuple[Tensor, ...],
    mode: str = "bilinear",
) -> Tensor | tuple[Tensor, ...]:
    r"""
    How do I measure a map with Captum's ``infidelity``? Resize it with this function to the shape
    of the inputs. Each of the C input channels gets map / C, so that the sum over channels is the
    map.

    Args:
        attributions (Tensor or tuple[Tensor, ...]): Maps (B, 1, \*spatial), one for each tensor
                    of ``inputs``.
        inputs (Tensor or tuple[Tensor, ...]): The explained inputs, (B, C, \*spatial), with as
                    many spatial dimensions as the maps.
        mode (str): Interpolation of ``torch.nn.functional.interpolate``; ``"bilinear"`` and
                    ``"linear"`` mean linear in each dimension, also for 1D and 3D maps.
                    Default: ``"bilinear"``

    Returns:
        *Tensor* or *tuple[Tensor, ...]*: attributions of the shapes of ``inputs``, in the
        maps' dtype; a tuple where ``inputs`` is one.

    Raises:
        TypeError: an argument is neither a tensor nor a tuple of tensors.
        ValueError: numbers of tensors, batch sizes or spatial dimensions differ, or a map has
                    more than one channel.

    Examples::

        >>> to_input_space(torch.rand(2, 1, 7, 7), torch.rand(2, 3, 224, 224)).shape
        torch.Size([2, 3, 224, 224])
    """
    maps, images = format_inputs("attributions", attributions), format_inputs("inputs", inputs)
    if len(maps) != len(images):
        raise ValueError(f"Expected a map for each tensor of `inputs`, but got {len(maps)} maps for {len(images)}.")
    resized = tuple(_resize(m, i, mode) for m, i in zip(maps, images))
    return resized if isinstance(inputs, tuple) else resized[0]


def _resize(maps: Tensor, inputs: Tensor, mode: str) -> Tensor:
    if maps.ndim != inputs.ndim or maps.ndim < 3 or maps.shape[1] != 1 or len(maps) != len(inputs):
        raise ValueError(
            "Expected `attributions` (B, 1, *spatial) for `inputs` (B, C, *spatial), but got shapes"
            f" {tuple(maps.shape)} and {tuple(inputs.shape)}."
        )
    channels = inputs.shape[1]
    return (resize(maps, inputs.shape[2:], mode) / channels).expand(-1, channels, *inputs.shape[2:])


def resize(maps: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Maps (N, C, *spatial) at another spatial size; N may be 0."""
    if mode in ("linear", "bilinear", "trilinear"):
        mode = _LINEAR.get(maps.ndim - 2, mode)
    if not len(maps):
        return maps.new_empty(*maps.shape[:2], *size)
    resized: Tensor = LayerAttribution.interpolate(maps, tuple(size), mode)
    return resized


def _flat(attributions: Any) -> list[Tensor]:
    if isinstance(attributions, Tensor):
        return [attributions]
    return [tensor for part in attributions for tensor in _flat(part)]
