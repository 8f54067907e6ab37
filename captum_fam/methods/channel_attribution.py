"""The methods that weigh the channels of a layer: a method is its alpha."""

from abc import abstractmethod

from torch import Tensor

from captum_fam.engine.places import by_place, channel_maps
from captum_fam.engine.question import Pairs
from captum_fam.methods.layer_attribution import LayerSimilarityAttribution


class ChannelAttribution(LayerSimilarityAttribution):
    r"""
    A method that weighs the channels of the layer, :math:`M = \sum_k \alpha_k A_k`. A method is its
    :meth:`alpha`.
    """

    @abstractmethod
    def alpha(self, pairs: Pairs) -> list[Tensor]:
        """
        alpha (B, P, C) for each of the recorded activations. Values for pairs that are not valid are ignored.
        """

    def _maps(self, pairs: Pairs, aligned: list[bool], plain: bool, summed: bool) -> list[Tensor]:
        alpha = self.alpha(pairs)
        if summed:
            return channel_maps(pairs.recording, alpha)
        return [alpha_k.mT * by_place(A) for alpha_k, A in zip(alpha, pairs.recording.activations)]
