"""The decomposition of a similarity into places, as a Captum layer attribution."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_fam._checks import check_callable, check_same_form, describe, format_inputs, warn_once
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.formula import DECOMPOSITION
from captum_fam.engine.path import Baseline
from captum_fam.engine.places import place_embeddings
from captum_fam.engine.question import Pairs, Question, note_unusable, pair_index
from captum_fam.engine.recording import Recording
from captum_fam.engine.report import Report
from captum_fam.engine.untouched import eagerly
from captum_fam.engine.ways import Way, by_the_cheapest_way
from captum_fam.methods.dimension_attribution import DimensionAttribution, check_sum
from captum_fam.methods.layer_explanation import masked
from captum_fam.methods.similarity_attribution import Inputs, Selector
from captum_fam.similarity import Similarity, exact, nonzero, norm, widen


class SimilarityDecomposition(DimensionAttribution):
    r"""
    What does each place of an input contribute to its similarity to a reference? The mean of the map is the similarity
    itself (Stylianou, Souvenir, Pless, https://arxiv.org/abs/1901.00536; Zhu, Yang, Chen,
    https://arxiv.org/abs/1909.12977).

    Place i of the layer's N places gives the embedding its part :math:`v_i`, to first order. The map is

    .. math:: M_i = N \, f \cdot v_i, \quad v_i = \sum_k A_{ki} \, \partial z / \partial A_{ki}

    with the layer's activations A and weights f. f is held constant, and :math:`f \cdot z` is the similarity of the
    embedding z and the reference s:

    ================  ==========================  =========================================
    similarity        f                           mean of the map
    ================  ==========================  =========================================
    ``"cosine"``      :math:`\hat s / \|z\|`      the cosine
    ``"dot"``         :math:`s`                   the dot product
    ``"euclidean"``   :math:`2 s - z`             :math:`-\|z - s\|^2 + \|s\|^2`, as no place of
                                                  the input has :math:`\|s\|^2`
    your own          a function of z and s       :math:`f \cdot z`
    ================  ==========================  =========================================

    If z is a positive multiple a of the spatial mean of A (*aligned*), the map is :math:`M_i = a \sum_k f_k A_{ki}` and
    needs no gradient. The places add up to the embedding if everything between is homogeneous of degree one (linear
    layers without bias, ReLU, mean, maximum and generalised mean). With biases, a normalisation or a class token they
    do not; a warning says so if more than a twentieth is missing.

    With ``n_steps``, v is integrated along a straight path from a ``baseline`` B of the layer to its
    activations (for pairs: Möller et al., https://arxiv.org/abs/2408.14153),

    .. math:: v_i = \sum_k (A_{ki} - B_{ki}) \int_0^1 \frac{\partial z}{\partial A_{ki}} (B + t (A - B)) \, dt

    Then the places add up to z - z(B) for every network, with the embedding z(B) of the baseline, and the mean of the
    map is :math:`f \cdot (z - z(B))`. It takes ``n_steps`` forward and backward passes of what comes after the layer,
    and one of what comes before it. Use it at early and middle layers: at the last layer before the pooling there is
    nothing to integrate.

    With ``contrast`` or ``threshold``, the mean of the map is the difference: the margin of two references a and b (of
    distances, plus :math:`\|a\|^2 - \|b\|^2`); 0 for ``"self"``; score - threshold. For a cosine, the map of
    ``contrast="self"`` is the gradient of the cosine by place, as in Grad-CAM. :meth:`attribute_matrix` decomposes the
    similarity on both sides at once.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial) make the map, or a list of layers.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        similarity (str, optional): ``"cosine"``, ``"dot"`` or ``"euclidean"``. For others, pass ``dimension_weights``.
                    Default: None, that of the SimilarityScore, else ``"cosine"``
        dimension_weights (Callable, optional): Your own function f(z, s), instead of a similarity. It takes embeddings
                    and references of one shape (..., D) and returns weights of that shape.
                    Default: None
        channel_weights, n_steps, baseline: As in :class:`~captum_fam.FeatureActivationMap`.
        output_selector, reshape_transform (Callable, optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> decomposition = SimilarityDecomposition(encoder, encoder[1])
        >>> queries, reference = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16)
        >>> map = decomposition.attribute(queries, reference=reference)
        >>> torch.allclose(map.mean((1, 2, 3)), torch.cosine_similarity(encoder(queries), encoder(reference)))
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        dimension_weights: Callable[[Tensor, Tensor], Tensor] | None = None,
        channel_weights: Literal["auto", "aligned", "jacobian"] | str = "auto",
        n_steps: int | None = None,
        baseline: Baseline = "mean",
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if dimension_weights is not None:
            check_callable("dimension_weights", dimension_weights)
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
        if dimension_weights is not None and similarity is not None:
            raise ValueError(
                "Expected `similarity` or `dimension_weights`, but got both; a similarity has its own weights."
            )
        self.dimension_weights = dimension_weights

    def _similarity(self) -> Similarity:
        return super()._similarity() if self.dimension_weights is None else self.dimension_weights

    def terms(self, z: Tensor, s: Tensor) -> Tensor:
        if self.dimension_weights is not None:
            shape = torch.broadcast_shapes(z.shape, s.shape)
            f = self.dimension_weights(z.expand(shape), s.expand(shape))
            if not isinstance(f, Tensor) or f.shape != shape:
                raise ValueError(
                    f"Expected `dimension_weights` to return weights of shape {tuple(shape)}, one for each embedding"
                    f" dimension, but got {describe(f)}."
                )
            return f
        similarity = self._similarity()
        if not isinstance(similarity, str):
            raise ValueError(
                f"Expected `similarity` to be one of {sorted(DECOMPOSITION)}, but got {describe(similarity)}, which has"
                ' no such decomposition; pass similarity="cosine", or a function f(z, s) as `dimension_weights`.'
            )
        return DECOMPOSITION[similarity](z, s)

    def constant(self, s: Tensor) -> Tensor:
        return -s.square().sum(1) if self._similarity() == "euclidean" else super().constant(s)

    @eagerly
    def attribute_matrix(
        self, inputs: Inputs, reference: Inputs, *, return_baselines: bool = False
    ) -> Tensor | Tensors | list[Tensor] | list[Tensors]:
        r"""
        What does each pair of places, one of the input and one of the reference, contribute to their similarity?
        (Zhu, Yang, Chen.) With place embeddings v(i) and v'(j), which add up to z and s,

        .. math:: P_{ij} = \frac{v(i) \cdot v'(j)}{\|z\| \|s\|}

        (without the norms for ``"dot"``). Where the places add up to the embeddings, all entries add up to the score,
        and a warning says where they do not. The sum of a row, times the number of rows, is the value of
        :meth:`attribute` at that place. Row i, laid out as the reference's grid, shows what matches place i. Unless z
        is a spatial mean, it takes a gradient for each embedding dimension or for each place, whichever are fewer.

        With ``n_steps``, the v(i) add up to z - z(B), and the v'(j) to s - s(B). The rest of the score belongs to a
        place and the other side's baseline, or to both baselines. ``return_baselines`` returns these as well; all four
        add up to the score:

        .. math:: z \cdot s = \sum_{ij} v(i) \cdot v'(j) + \sum_i v(i) \cdot s(B)
                  + \sum_j v'(j) \cdot z(B) + z(B) \cdot s(B)

        Args:
            inputs (Tensor or tuple[Tensor, ...]): B inputs.
            reference (Tensor or tuple[Tensor, ...]): In the form of ``inputs``: B references,
                        paired with the inputs, or one that they share.
            return_baselines (bool, optional): Whether to return what the baselines of ``n_steps`` contribute, too.
                        Default: False

        Returns:
            *Tensor* or *list*: (B, h·w, h'·w'), places in row-major
            order: ``matrix.reshape(B, h, w, h', w')``. In the dtype of the activations; a list
            for a list of layers. With ``return_baselines`` a tuple of four: this matrix; the inputs' places with the
            reference's baseline (B, h·w); the reference's places with the inputs' baseline (B, h'·w'); and both
            baselines (B, 1).

        Raises:
            TypeError, ValueError, RuntimeError: As in :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> decomposition = SimilarityDecomposition(encoder, encoder[1])
            >>> decomposition.attribute_matrix(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 24, 24)).shape
            torch.Size([2, 196, 484])
        """
        inputs, reference = format_inputs("inputs", inputs), format_inputs("reference", reference)
        check_same_form(reference, inputs)
        if return_baselines and self.n_steps is None:
            raise ValueError(
                "return_baselines=True needs a path from a baseline: pass n_steps to SimilarityDecomposition."
            )
        own = pair_index(len(inputs[0]), len(reference[0]))
        if self._similarity() not in ("cosine", "dot"):
            raise ValueError(
                'attribute_matrix needs a similarity that is a sum over pairs of places, "cosine" or "dot", but got'
                f" {'`dimension_weights`' if self.dimension_weights is not None else describe(self._similarity())}."
            )

        def matrices(layers: list[nn.Module], way: Way) -> tuple[list[tuple[Tensor, ...]], Report]:
            report, path = Report(), self._paths(None, return_baselines)[0]
            with (
                self._record(inputs, None, report, way=way, path=path, layers=layers) as one,
                self._record(reference, None, report, way=way, path=path, layers=layers) as two,
                torch.no_grad(),
            ):
                question = Question(two.embedding, own)
                pairs = Pairs(one, question, 1, self)
                note_unusable(one, question, pairs.valid)
                for name, size in zip(one.names, one.sizes):
                    if size > 1:
                        raise ValueError(f"attribute_matrix needs a layer with one tensor, but {name} has {size}.")
                found = []
                for name, partial_map, A, v, v_reference in zip(
                    one.names, one.partial, one.activations, *map(self._place_embeddings, (one, two))
                ):
                    v_reference = v_reference.expand(len(v), -1, -1)
                    with exact(v):
                        parts = [v.mT @ v_reference]
                        if return_baselines:
                            z0, s0 = (self._of_unit(r, self._of_baseline(r))[..., None] for r in (one, two))
                            parts += [v.mT @ s0, v_reference.mT @ z0, (z0 * s0).sum(1, keepdim=True)]
                    parts = [masked(part, pairs.valid) for part in parts]
                    if self.n_steps is None:
                        check_sum(parts[0].sum((1, 2))[:, None], pairs, name, partial_map)
                    found.append(tuple(part.to(A.dtype) for part in (parts[0], *(p.flatten(1) for p in parts[1:]))))
            return found, report

        groups = [by_the_cheapest_way(partial(matrices, layers)) for layers in self._together(inputs)]
        warn_once([text for _, report in groups for text in report.texts()])
        found: list[Any] = [parts if return_baselines else parts[0] for group, _ in groups for parts in group]
        return found if isinstance(self.layer, list) else found[0]

    def _of_unit(self, recording: Recording, values: Tensor) -> Tensor:
        """What embeddings (B, D, ...) are parts of: the embedding, or for the cosine its unit vector."""
        if self._similarity() != "cosine":
            return values
        length = nonzero(norm(widen(recording.embedding)))
        return values / length.reshape(*length.shape, *[1] * (values.ndim - 2))

    def _place_embeddings(self, recording: Recording) -> list[Tensor]:
        """v (B, D, N), which add up to the embedding; for the cosine, to its unit vector."""
        found = place_embeddings(recording, self._multiples(recording, self._aligned(recording)))
        return [self._of_unit(recording, v) for v in found]
