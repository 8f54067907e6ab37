"""The decomposition of a similarity into locations, as a Captum layer attribution."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from captum_fam import _method
from captum_fam._attribution import (
    ChannelAttribution,
    Inputs,
    Maps,
    Pairs,
    Question,
    note_unusable,
    pair_index,
)
from captum_fam._checks import check_same_form, describe, format_inputs, warn_once
from captum_fam._recording import Recording, Tensors, eagerly
from captum_fam.similarity import Similarity, nonzero, norm, unit, widen


def _cosine(z: Tensor, s: Tensor) -> Tensor:
    return unit(s) / nonzero(norm(z))


def _dot(z: Tensor, s: Tensor) -> Tensor:
    return s


# f of a similarity f.z: what each embedding dimension is multiplied by.
_FACTORS: dict[Similarity, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "dot": _dot}


class SimilarityDecomposition(ChannelAttribution):
    r"""
    Decomposition of a similarity (Stylianou, Souvenir, Pless,
    https://arxiv.org/abs/1901.00536; Zhu, Yang, Chen, https://arxiv.org/abs/1909.12977):
    what each location contributes to it. The mean of the map is the similarity itself.

    Where the embedding z is the spatial mean of the activations A, the cosine to a reference
    s is a mean over locations of

    .. math:: M = \sum_k \alpha_k A_k, \quad \alpha_k = \frac{\hat s_k}{\|z\|}, \quad \hat s = s / \|s\|

    and :math:`\alpha = s` for the dot product. Where z is a positive multiple of that mean,
    :math:`\|z\|` is the norm of the mean. For every other encoder and layer (flattening,
    projection heads, GeM), the factor differs between locations: it is the gradient of the
    score, with :math:`\|z\|` held constant, times the number of locations. Where all that
    lies between is homogeneous of degree one (linear layers without bias, ReLU, mean, maximum
    and generalised mean), the mean of the map is still the similarity; with biases or a
    normalisation it is not, and a warning gives both numbers.

    With ``contrast``, the map is the difference of two, and its mean the margin.
    :meth:`attribute_matrix` decomposes the similarity on both sides at once.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial) make the map, or a list of layers.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        similarity (str, optional): ``"cosine"`` or ``"dot"``; others have no such
                    decomposition.
                    Default: None, that of the SimilarityScore, else ``"cosine"``
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

    @eagerly
    def attribute_matrix(self, inputs: Inputs, reference: Inputs) -> Maps:
        r"""
        What each location of the inputs, with each location of the reference, contributes to
        their similarity (Zhu, Yang, Chen): with location embeddings v(i) and v'(j), which add
        up to z and s,

        .. math:: P_{ij} = \frac{v(i) \cdot v'(j)}{\|z\| \|s\|}

        (without the norms for ``"dot"``). Where the locations add up to the similarity (else a
        warning says so), all entries add up to the score, and the sum of a row, times the number
        of rows, is the value of :meth:`attribute` at that location. Row i is the map over the
        reference of what matches location i. Encoders other than a spatial mean need one
        gradient for each embedding dimension.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): B inputs.
            reference (Tensor or tuple[Tensor, ...]): In the form of ``inputs``: B references,
                        paired with the inputs, or one that they share.

        Returns:
            *Tensor* or *list*: (B, h·w, h'·w'), locations in row-major
            order: ``matrix.reshape(B, h, w, h', w')``. In the dtype of the activations; a list
            for a list of layers.

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
        own, similarity = pair_index(len(inputs[0]), len(reference[0])), self._similarity()
        _check(similarity)
        with self._record(inputs, None) as one, self._record(reference, None) as two, torch.no_grad():
            question = Question(two.embedding, own, None, similarity)
            pairs = Pairs(one, question, 1)
            valid = pairs.explainable()
            note_unusable(one, question, valid)
            matrices: list[Tensors] = []
            for name, tensors in zip(one.names, one.layers):
                if len(tensors) > 1:
                    raise ValueError(f"attribute_matrix needs a layer with one tensor, but {name} has {len(tensors)}.")
            for layers in zip(one.layers, self._locations(one, similarity), self._locations(two, similarity)):
                (A,), (v,), (v_reference,) = layers
                with _method.exact(v):
                    matrix = v.mT @ v_reference.expand(len(v), -1, -1)
                matrix = torch.where(valid[..., None], matrix, torch.zeros_like(matrix))
                _note_remainder(matrix.sum((1, 2))[:, None], pairs, valid, (A,))
                matrices.append((matrix.to(A.dtype),))
        warn_once(self._doubts(one) + self._doubts(two))
        return self._result(matrices)

    def _explains_classifiers(self) -> bool:
        return False

    def _needs_graph(self) -> bool:
        return True

    def _channel_weights(self, pairs: Pairs, valid: Tensor) -> list[list[Tensor]]:
        f = _factors(pairs)
        return [[f * scale[..., None] for scale in layer if scale is not None] for layer in _scales(pairs.recording)]

    def _weighted(self, pairs: Pairs, valid: Tensor, summed: bool) -> list[list[Tensor]]:
        recording, f = pairs.recording, _factors(pairs)
        scales = _scales(recording)
        if _aligned(scales):
            return super()._weighted(pairs, valid, summed)
        # Weights that differ between locations would be large, (B, P, C, *spatial): they are used as they come.
        found = _location_sums(recording, f, pairs.references) if summed else _products(recording, f[:, 0], scales)
        maps: list[list[Tensor]] = []
        for terms, layer in zip(found, recording.layers):
            total = torch.stack([t.sum(2) if summed else t.sum((1, 2))[:, None] for t in terms]).sum(0)
            _note_remainder(total, pairs, valid, layer)
            places = [A.shape[2:] for A in layer]
            maps.append([t.unflatten(2, p) * p.numel() if p else t[..., 0] for t, p in zip(terms, places)])
        recording.note(f, valid, maps)
        return maps

    def _locations(self, recording: Recording, similarity: Similarity) -> list[list[Tensor]]:
        """v (B, D, N), which add up to the embedding; for the cosine, to its unit vector."""
        z = widen(recording.embedding)
        length = nonzero(norm(z))[..., None] if similarity == "cosine" else 1
        return [[v / length for v in layer] for layer in _location_sums(recording, _method.unit_vectors(z))]


def _factors(pairs: Pairs) -> Tensor:
    """f (B, P, D)"""
    _check(pairs.question.similarity)
    return pairs.contributions(_FACTORS[pairs.question.similarity])


def _scales(recording: Recording) -> list[list[Tensor | None]]:
    """Of each tensor of each layer, as in aligned_scale, where there is one in every chunk of the call."""
    found = recording.once(
        "scales", lambda: [[_method.aligned_scale(recording.embedding, A) for A in layer] for layer in recording.layers]
    )
    aligned = recording.call.agree([[scale is not None for scale in layer] for layer in found])
    return [[scale if flag else None for scale, flag in zip(*layer)] for layer in zip(found, aligned)]


def _aligned(scales: list[list[Tensor | None]]) -> TypeGuard[list[list[Tensor]]]:
    return all(scale is not None for layer in scales for scale in layer)


def _products(recording: Recording, row: Tensor, scales: list[list[Tensor | None]]) -> list[list[Tensor]]:
    """Each activation's part of row·z, for row (B, D), to first order: (B, C, N) for each tensor of each layer."""
    return [
        [
            _method.places(A) * (_method.places(g) if scale is None else (row * scale)[..., None] / A.shape[2:].numel())
            for A, g, scale in zip(*layer)
        ]
        for layer in zip(recording.layers, recording.gradients(row), scales)
    ]


def _location_sums(recording: Recording, rows: Tensor, references: int = 0) -> list[list[Tensor]]:
    """The same for rows (B, R, D), which may be some of that many references', summed over the channels: (B, R, N)."""
    scales = _scales(recording)
    with _method.exact(rows):
        if _aligned(scales):
            return [
                [(rows * scale[..., None]) @ _method.places(A) / A.shape[2:].numel() for A, scale in zip(*layer)]
                for layer in zip(recording.layers, scales)
            ]
        if references > rows.shape[2]:  # the sums are linear in the rows
            each = recording.once(
                "locations", lambda: _location_sums(recording, _method.unit_vectors(widen(recording.embedding)))
            )
            return [[rows @ v for v in layer] for layer in each]
    sums = [[[p.sum(1) for p in layer] for layer in _products(recording, row, scales)] for row in rows.unbind(1)]
    return [[torch.stack(parts, 1) for parts in zip(*layer)] for layer in zip(*sums)]


def _check(similarity: Similarity) -> None:
    if not isinstance(similarity, str) or similarity not in _FACTORS:
        raise ValueError(
            f'Expected `similarity` to be "cosine" or "dot", but got {describe(similarity)}, which is no mean over'
            ' locations; pass similarity="cosine".'
        )


def _note_remainder(found: Tensor, pairs: Pairs, valid: Tensor, layer: Tensors) -> None:
    """A doubt, once, about a layer's maps whose totals (B, P) are not the similarities."""
    half = any(t.dtype in (torch.float16, torch.bfloat16) for t in (*layer, pairs.recording.embedding))
    score = pairs.c.sum(2)
    off = torch.where(valid, (found - score).abs() / nonzero(pairs.c.abs().sum(2)), torch.zeros_like(score))
    if not off.numel() or off.max() <= (5e-2 if half else 1e-3):
        return
    i = off.argmax()
    reason = (
        "the embeddings have length 1, by a final normalisation that makes these maps wrong. Leave it out of the"
        " encoder: the cosine is the same without it."
        if ((norm(pairs.z) - 1).abs() < 1e-3).all()
        else "the rest comes from biases, a LayerNorm, a class token or another such step between the layer and the"
        " embedding, which no location has."
    )
    pairs.recording.call.doubt_worst(
        "The locations add up to",
        off.max().item(),
        f"{found.flatten()[i]:.3g}, but the similarity is {score.flatten()[i]:.3g}: {reason}",
    )
