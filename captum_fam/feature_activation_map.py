"""Feature Activation Map as a Captum layer attribution."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from captum_fam._attribution import ChannelAttribution, Inputs, Pairs
from captum_fam._checks import format_inputs
from captum_fam._method import is_aligned, jacobian_weights
from captum_fam._recording import Recording, eagerly
from captum_fam.similarity import Normalize, Similarity, check_normalize, contribution_weights


class FeatureActivationMap(ChannelAttribution):
    r"""
    Feature Activation Map (FAM): which parts of an input make its embedding similar to a
    reference's, for models that have no classifier (few-shot, contrastive, retrieval).

    Each embedding dimension's contribution :math:`c_k` to the similarity of the embedding z
    and the reference s (see :func:`~captum_fam.channel_contributions`) gives its weight
    :math:`w_k` (see :func:`~captum_fam.contribution_weights`), and the map is

    .. math:: M = \sum_k \alpha_k A_k

    over the channels of the layer's activations A, with :math:`\alpha` the weights carried
    to these channels:

    - *aligned*: :math:`\alpha = w`, where dimension k of z is channel k of A (z is a positive
      multiple of the spatial mean of A, for every input). No gradient is taken. This is the
      case of the paper, https://arxiv.org/abs/2307.05017.
    - *jacobian*: :math:`\alpha_k = \sum_{locations} \partial (w \cdot z) / \partial A_k`, with w
      held constant, for every other encoder and layer. Ours, not the paper's; where z is
      exactly the spatial mean of A, it equals the aligned case.

    With ``contrast``, the map says why reference a rather than b: :math:`\alpha` carries
    :math:`c(z, s_a) - c(z, s_b)`, signed, which adds up to the difference of the two scores.
    Ours, not the paper's.

    FAM says what two images have in common in absolute terms and depends only weakly on the
    reference; contrast says what decides. No ReLU is applied by default, because negative
    values are evidence too where activations or weights are signed; pass
    ``relu_attributions=True`` to drop them. Under ``"euclidean"``, channels near zero in
    both images get weights near one, and the map drifts to the plain sum of activations.

    The weights tell how much a dimension contributes, not which way it must go: where z has
    negative dimensions (behind a projection head, in transformers), the map, and its contrast,
    have the wrong sign for these. Use :class:`~captum_fam.SimilarityDecomposition` there.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`, whose encoder,
                    references and similarity are used.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial) make the map; any number of spatial dimensions.
                    A list of layers gives a list of results from one forward pass.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        similarity (str or Callable, optional): As in
                    :func:`~captum_fam.channel_contributions`.
                    Default: None, that of the SimilarityScore, else ``"cosine"``
        normalize (str, optional): ``"minmax"``, or None for signed weights w = c.
                    Default: ``"minmax"``
        channel_weights (str): ``"auto"`` takes *aligned* where it holds for every input of
                    the call (those with a zero embedding aside), else *jacobian*;
                    ``"aligned"`` and ``"jacobian"`` force one.
                    Default: ``"auto"``
        output_selector (Callable, optional): Takes the encoder's output (a dict, a
                    ``ModelOutput``, a tuple, ...) to the embeddings (B, D).
                    Default: None, that of the SimilarityScore, else the output itself
        reshape_transform (Callable, optional): Takes the layer's activations (tokens,
                    channels last) to (B, C, \*spatial) by selecting and reordering; it is
                    applied to their gradient as well.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> fam = FeatureActivationMap(encoder, encoder[1])
        >>> queries, reference = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16)
        >>> fam.attribute(queries, reference=reference).shape
        torch.Size([2, 1, 14, 14])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        normalize: Normalize = "minmax",
        channel_weights: Literal["auto", "aligned", "jacobian"] | str = "auto",
        output_selector: Callable[[Any], Tensor] | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_normalize(normalize)
        if channel_weights not in ("auto", "aligned", "jacobian"):
            raise ValueError(
                f'Expected `channel_weights` to be "auto", "aligned" or "jacobian", but got {channel_weights!r}.'
            )
        super().__init__(
            forward_func,
            layer,
            device_ids,
            similarity=similarity,
            output_selector=output_selector,
            reshape_transform=reshape_transform,
        )
        self.normalize = normalize
        self.channel_weights = channel_weights

    @eagerly
    def route(self, inputs: Inputs, additional_forward_args: object | None = None) -> str | list[str]:
        r"""
        The way that the weights take to the layer's channels for these inputs, from one forward
        pass.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of the encoder, batch first.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
                        Default: None

        Returns:
            *str* or *list*: ``"aligned"`` or ``"jacobian"``; a list for a list of layers.

        Raises:
            TypeError, ValueError: As in :meth:`attribute`.

        Examples::

            >>> features, head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            >>> encoder = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
            >>> images = torch.rand(2, 3, 16, 16)
            >>> FeatureActivationMap(encoder[:3], features).route(images)
            'aligned'
            >>> FeatureActivationMap(encoder, features).route(images)
            'jacobian'
        """
        with self._record(format_inputs("inputs", inputs), additional_forward_args) as recording:
            routes = self._routes(recording)
        return routes if isinstance(self.layer, list) else routes[0]

    def _explains_classifiers(self) -> bool:
        return False

    def _needs_graph(self) -> bool:
        return self.channel_weights != "aligned"

    def _channel_weights(self, pairs: Pairs, valid: Tensor) -> list[list[Tensor]]:
        w = contribution_weights(pairs.c, self.normalize) if pairs.question.other is None else pairs.c
        aligned = self._aligned(pairs.recording)
        if all(map(all, aligned)):
            return [[w] * len(layer) for layer in aligned]
        jacobian = jacobian_weights(pairs.recording, w, pairs.references)
        pairs.recording.note(w, valid, jacobian)
        return [[w if flag else alpha for flag, alpha in zip(*layer)] for layer in zip(aligned, jacobian)]

    def _aligned(self, recording: Recording) -> list[list[bool]]:
        """Of each tensor of each layer."""
        found = recording.once(
            "aligned", lambda: [[self._is_aligned(recording.embedding, A) for A in layer] for layer in recording.layers]
        )
        return recording.call.agree(found)

    def _routes(self, recording: Recording) -> list[str]:
        return ["aligned" if all(layer) else "jacobian" for layer in self._aligned(recording)]

    def _is_aligned(self, z: Tensor, A: Tensor) -> bool:
        if self.channel_weights == "aligned" and A.shape[1] != z.shape[1]:
            raise ValueError(
                'channel_weights="aligned" needs a channel for each embedding dimension, but the layer has'
                f' {A.shape[1]} and the embedding {z.shape[1]}; pass channel_weights="auto" or "jacobian".'
            )
        return self.channel_weights == "aligned" or (self.channel_weights == "auto" and is_aligned(z, A))
