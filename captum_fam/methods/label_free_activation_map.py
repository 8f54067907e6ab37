"""LaFAM, the mean of a layer's activation maps, as a Captum layer attribution."""

from typing import Any

import torch
from torch import Tensor

from captum_fam._captum import TargetType
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.question import Pairs, Question, References
from captum_fam.methods.channel_attribution import ChannelAttribution
from captum_fam.methods.layer_explanation import Ask


class LabelFreeActivationMap(ChannelAttribution):
    r"""
    Where is the encoder active at all, whatever the reference? Label-Free Activation Map (LaFAM,
    https://arxiv.org/abs/2407.06059) is the plain mean of the layer's C activation maps,

    .. math:: M = \frac{1}{C} \sum_k A_k

    It ignores the reference, so it is a baseline: it shows what the weights of other methods add.
    References and ``target`` may be left out; they are accepted, so that it can stand in for other
    methods, and change nothing. The map of a ``contrast`` is zero. The paper's min-max
    normalisation is for display, so the figure does it.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), a classifier, or a :class:`~captum_fam.SimilarityScore`.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial) make the map, or a list of layers.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        similarity (str or Callable, optional): As for other methods; changes nothing.
                    Default: None
        output_selector, reshape_transform (Callable, optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> LabelFreeActivationMap(encoder, encoder[1]).attribute(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 1, 14, 14])
    """

    def alpha(self, pairs: Pairs) -> list[Tensor]:
        weight = 1.0 if pairs.question.less is None else 0.0
        return [
            pairs.z.new_full((*pairs.valid.shape, A.shape[1]), weight / A.shape[1]) for A in pairs.recording.activations
        ]

    def _ask(self, inputs: Tensors, additional_forward_args: object | None, most: int | None, **asked: Any) -> Ask:
        if self._score() is None and asked["reference"] is None and asked["reference_embedding"] is None:
            less = self._less(asked["contrast"], asked["threshold"], 1, len(inputs[0]))
            return lambda z, rows: Question(z.new_zeros(1, z.shape[1]), torch.zeros(1, 1, dtype=torch.long), less)
        return super()._ask(inputs, additional_forward_args, most, **asked)

    def _valid(self, pairs: Pairs) -> Tensor:
        return torch.ones_like(pairs.valid)

    def _own(self, target: TargetType, references: References, inputs: int) -> Tensor:
        return torch.zeros(inputs, dtype=torch.long) if target is None else super()._own(target, references, inputs)
