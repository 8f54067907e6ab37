"""CAM, for classifiers that pool their last map and have one linear layer after it."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_fam._captum import TargetType
from captum_fam._checks import describe
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.places import is_aligned, multiple_of_mean
from captum_fam.engine.question import Pairs, References
from captum_fam.engine.untouched import model_of
from captum_fam.methods.channel_attribution import ChannelAttribution
from captum_fam.methods.layer_attribution import Maps
from captum_fam.methods.similarity_attribution import Inputs, uncompiled


class ClassActivationMap(ChannelAttribution):
    r"""
    Which places of an image speak for a class of a classifier? Class Activation Map (CAM; Zhou, Khosla, Lapedriza,
    Oliva, Torralba, https://arxiv.org/abs/1512.04150, equation 2), for classifiers whose logits are a linear layer of
    the spatial mean of the activations A:

    .. math:: M = \sum_k W_{tk} A_k

    with the linear layer's weight W and the class t, the ``target``. The mean of the map is the logit less its bias.
    This also holds where the linear layer takes a positive multiple of the mean, such as an L2-normalised one. For
    these classifiers, LayerGradCam gives M / (h·w). For any other classifier this method raises an error: use
    LayerGradCam there. An encoder without a classifier has no W; :class:`~captum_fam.SimilarityDecomposition` puts the
    reference in its place.

    ``attribute`` takes no references: they are the rows of W. ``contrast`` is a class, too, or ``"rest"``. ``embed``
    returns what the linear layer takes.

    Args:
        forward_func (Callable or torch.nn.Module): The classifier.
        layer (torch.nn.Module or list of torch.nn.Module): Its last layer with activations
                    (B, C, \*spatial).
        device_ids (list[int]): As for other Captum layer methods; a DataParallel model is
                    run on its first device, where the inputs must be.
                    Default: None
        classifier (torch.nn.Linear, optional): The linear layer.
                    Default: None, the last torch.nn.Linear of the model
        reshape_transform (Callable, optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above, or, in ``attribute``, the
                    input of the linear layer is not the spatial mean of the activations.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> ClassActivationMap(model, model[0]).attribute(torch.rand(2, 3, 16, 16), target=3).shape
        torch.Size([2, 1, 14, 14])
    """

    _of_terms = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        classifier: nn.Linear | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, reshape_transform=reshape_transform)
        if classifier is not None and not isinstance(classifier, nn.Linear):
            raise TypeError(f"Expected `classifier` to be a torch.nn.Linear, but got {describe(classifier)}.")
        if self._score() is not None:
            raise ValueError(
                "A SimilarityScore has no linear layer whose weight could be taken; use SimilarityDecomposition, which"
                " is CAM with the reference in its place."
            )
        model = model_of(uncompiled(forward_func))
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)] if model is not None else []
        if classifier is None and not linear:
            raise ValueError(
                "Expected `forward_func` to be a classifier with a torch.nn.Linear; pass it as classifier=, or use"
                " LayerGradCam."
            )
        self.classifier = linear[-1] if classifier is None else classifier
        self._several = classifier is None and len(linear) > 1

    def attribute_pair(self, inputs: Inputs, reference: Inputs, **_: Any) -> tuple[Maps, Maps]:
        r"""This method is not implemented: a class has no other side."""
        raise NotImplementedError("ClassActivationMap explains classes; use SimilarityDecomposition for pairs.")

    def terms(self, z: Tensor, s: Tensor) -> Tensor:
        return s.expand(torch.broadcast_shapes(z.shape, s.shape))

    def alpha(self, pairs: Pairs) -> list[Tensor]:
        recording, z = pairs.recording, pairs.recording.embedding
        for name, A in zip(recording.names, recording.activations):
            if not is_aligned(z, A):
                raise ValueError(
                    f"The classifier's input is not the spatial mean of layer {name}; pass the last layer before the"
                    " global average pooling, or use LayerGradCam, which explains other classifiers too."
                )
        return [pairs.t * multiple_of_mean(z, A) for A in recording.activations]

    def _encoder(self) -> Callable[..., Any]:
        func = uncompiled(self.forward_func)
        model = func.module if isinstance(func, nn.DataParallel) else func
        return InputOf(self.classifier, model, self._several)

    def _references(self, inputs: Tensors, reference: Inputs | None, reference_embedding: Tensor | None) -> References:
        if reference is not None or reference_embedding is not None:
            raise ValueError("ClassActivationMap takes no references; pass a class as `target`.")
        return References((self.classifier.weight.detach(),))

    def _own(self, target: TargetType, references: References, inputs: int) -> Tensor:
        if target is None and len(references) > 1:
            raise ValueError(f"`target` is needed: a class, 0 to {len(references) - 1}, or a list of {inputs}.")
        return super()._own(target, references, inputs)


class InputOf(nn.Module):
    """Returns what one module of a model takes. If the module was only guessed, its output must be the model's."""

    def __init__(self, module: nn.Module, model: Callable[..., Any], in_doubt: bool) -> None:
        super().__init__()
        self.in_doubt = in_doubt
        self.module = module
        self.model = model
        self.owner = model_of(model)  # a bound method's, so that it is among the modules

    def forward(self, *args: Any) -> Tensor:
        found: list[tuple[Tensor, Tensor]] = []
        thread = threading.get_ident()

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if threading.get_ident() == thread:
                found.append((args[0], output))

        handle = self.module.register_forward_hook(keep)
        try:
            output = self.model(*args)
        finally:
            handle.remove()
        if not found:
            raise ValueError("Expected `classifier` to be a module that the forward pass calls, but it was not called.")
        taken, given = found[-1]
        if self.in_doubt and isinstance(output, Tensor) and not torch.equal(output.nan_to_num(), given.nan_to_num()):
            raise ValueError(
                "The model has several linear layers, and its output is not that of the last; pass classifier=, the one"
                " that gives the classes."
            )
        return taken
