"""Feature Activation Map as a Captum layer attribution."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from captum_fam.engine import formula
from captum_fam.engine.path import Baseline
from captum_fam.engine.places import Multiples
from captum_fam.engine.recording import Recording
from captum_fam.methods.dimension_attribution import DimensionAttribution
from captum_fam.methods.similarity_attribution import Selector
from captum_fam.similarity import Normalize, Similarity, channel_contributions, check_normalize


class FeatureActivationMap(DimensionAttribution):
    r"""
    Which parts of an input make its embedding similar to a reference's? Feature Activation Map
    (FAM), for models that have no classifier (few-shot, contrastive, retrieval).

    Each dimension of the embedding contributes :math:`c_k` to the similarity of the embedding z and
    the reference s (see :func:`~captum_fam.channel_contributions`). Its weight :math:`w_k` is made
    of that (see :func:`~captum_fam.contribution_weights`). Place i of the layer's N places gives
    the embedding its part :math:`v_i`, to first order. The map is

    .. math:: M_i = N \, f \cdot v_i, \quad f = w \odot sign(z), \quad
              v_i = \sum_k A_{ki} \, \partial z / \partial A_{ki}

    with the layer's activations A; f is held constant. There are two routes to it:

    - *aligned*: :math:`M_i = \sum_k f_k A_{ki}`, where dimension k of z is channel k of A (for
      every input, z is a positive multiple of the spatial mean of A). It needs no gradient. Where z
      is not negative, this is the case of the paper, https://arxiv.org/abs/2307.05017.
    - *jacobian*: the formula above, for every other encoder and layer. Where z is exactly the
      spatial mean of A, both routes give the same map.

    The signs, a gradient for each place and the contrasts are ours, not the paper's. :math:`c_k` says how much
    dimension k contributes, and :math:`sign(z_k)` in which direction. So flipping the sign of a
    dimension of all embeddings, which changes no score, changes no map. ``contrast`` and
    ``threshold`` replace w by the signed terms that add up to the difference.

    With ``n_steps``, v is integrated along a path from a ``baseline`` of the layer. The parts then
    add up to z - z(B) for every network, with the embedding z(B) of the baseline. Use this with
    :class:`~captum_fam.SimilarityDecomposition`, whose map it makes the most faithful.

    FAM shows what two images have in common, and depends only weakly on the reference; ``contrast``
    shows what decides between references. No ReLU is applied by default, because negative values
    are evidence, too, where activations or weights are signed; pass ``relu_attributions=True`` to
    drop them. Under ``"euclidean"``, dimensions near zero in both images get weights near one, and
    the map approaches the plain sum of activations.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`, whose encoder,
                    references and similarity are used.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial) make the map; any number of spatial dimensions. A list of
                    layers gives a list of results, from one forward pass for all of them; with
                    ``n_steps``, from one for each.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        similarity (str or Callable, optional): As in
                    :func:`~captum_fam.channel_contributions`.
                    Default: None, that of the SimilarityScore, else ``"cosine"``
        normalize (str, optional): ``"minmax"``, or None for signed weights w = c.
                    Default: ``"minmax"``
        channel_weights (str): The route. ``"auto"`` takes *aligned* where it holds for every input
                    of the call (except zero embeddings), else *jacobian*; ``"aligned"`` and
                    ``"jacobian"`` force one.
                    Default: ``"auto"``
        n_steps (int, optional): Steps of the integral along the path from the baseline: nodes of
                    the Gauss-Legendre rule. 8 are enough for a picture; take more for a small
                    ``return_convergence_delta``.
                    Default: None, no path: to first order, at the activations
        baseline (str or Tensor): Where the path of ``n_steps`` starts: ``"mean"``, each channel's
                    mean over the places of the same input; ``"zero"``; or a tensor that broadcasts
                    to the activations (B, C, \*spatial). Tokens that are no places, such as a class
                    token, keep their values.
                    Default: ``"mean"``
        output_selector (Callable, optional): Takes the encoder's output (a dict, a
                    ``ModelOutput``, a tuple, ...) to the embeddings (B, D).
                    Default: None, that of the SimilarityScore, else the output itself
        reshape_transform (Callable, optional): Takes the layer's activations (tokens, channels
                    last) to (B, C, \*spatial) by selecting and reordering. It is applied to their
                    gradient as well.
                    Default: None, the layout that the model declares or the shape suggests. Where
                    the shape allows several layouts, the encoder must confirm it: it runs a few
                    more times on one example, once for each shape of inputs

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> fam = FeatureActivationMap(encoder, encoder[1])
        >>> queries, reference = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16)
        >>> fam.attribute(queries, reference=reference).shape
        torch.Size([2, 1, 14, 14])
    """

    _adds_up = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        normalize: Normalize = "minmax",
        channel_weights: Literal["auto", "aligned", "jacobian"] | str = "auto",
        n_steps: int | None = None,
        baseline: Baseline = "mean",
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_normalize(normalize)
        super().__init__(
            forward_func,
            layer,
            device_ids,
            similarity=similarity,
            channel_weights=channel_weights,
            n_steps=n_steps,
            baseline=baseline,
            output_selector=output_selector,
            reshape_transform=reshape_transform,
        )
        self.normalize = normalize

    def terms(self, z: Tensor, s: Tensor) -> Tensor:
        return channel_contributions(z, s, self._similarity())

    def contributions(self, z: Tensor, t: Tensor) -> Tensor:
        return t

    def weights(self, z: Tensor, t: Tensor, plain: bool) -> Tensor:
        return formula.fam(z, t, self.normalize if plain else None)

    def _multiples(self, recording: Recording, aligned: list[bool]) -> Multiples:
        if self.n_steps is not None:
            return super()._multiples(recording, aligned)
        return [1.0 if a else None for a in aligned]  # as the paper has it
