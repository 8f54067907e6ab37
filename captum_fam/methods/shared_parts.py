"""The parts that two images share, and the share of their similarity that belongs to each pair of parts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_fam._captum import TargetType
from captum_fam._checks import (
    check_internal_batch_size,
    check_rows_fit,
    check_same_form,
    describe,
    format_inputs,
    reference_index,
    references_given,
    warn_once,
)
from captum_fam.engine.chunks import cut, cut_arguments, slices
from captum_fam.engine.path import Baseline
from captum_fam.engine.places import by_place
from captum_fam.engine.question import Pairs, Question, note_unusable, pair_index
from captum_fam.engine.recording import Recording
from captum_fam.engine.report import Report
from captum_fam.engine.untouched import eagerly
from captum_fam.engine.ways import Way, by_the_cheapest_way
from captum_fam.methods.dimension_attribution import check_sum
from captum_fam.methods.factorisation import check_n_parts, factorised, parts_of
from captum_fam.methods.on_layer import OnLayer
from captum_fam.methods.similarity_attribution import Inputs, Selector
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import Similarity, exact, nonzero


@dataclass(frozen=True, repr=False, eq=False)
class SharedPartsExplanation:
    r"""
    Which parts do B pairs of images share, and what does each contribute? n parts for each pair, the one with the
    largest of the ``totals`` first; made by :meth:`SharedParts.explain`.

    Attributes:
        maps (Tensor): How strong each part is at each place of the inputs, (B, n, \*spatial), not negative, in the unit
                    of the activations.
        reference_maps (Tensor): The same of the references.
        shares (Tensor): What part a of the input and part b of the reference contribute together to the score,
                    (B, n, n), in at least single precision.
        residual (Tensor): What is left of the score, (B,): the share of no place or no part.
        score (Tensor): The similarity of each pair, (B,). It is the sum of its shares and the residual.
        totals (Tensor): What each part contributes in all, (B, n): its share with itself, and half of its shares with
                    other parts. They and the residual add up to the score, too.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> found = SharedParts(encoder, encoder[1], 3).explain(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))
        >>> found
        SharedPartsExplanation(2 pairs, 3 parts, maps=(2, 3, 14, 14))
        >>> torch.allclose(found.totals.sum(1) + found.residual, found.score)
        True
    """

    maps: Tensor
    reference_maps: Tensor
    shares: Tensor
    residual: Tensor
    score: Tensor

    @property
    def totals(self) -> Tensor:
        return (self.shares.sum(1) + self.shares.sum(2)) / 2

    def __repr__(self) -> str:
        B, n = self.maps.shape[:2]
        return f"{type(self).__name__}({B} pairs, {n} parts, maps={tuple(self.maps.shape)})"


class SharedParts(OnLayer, LayerAttribution):
    r"""
    Which parts do two images share, and what does each pair of parts contribute to their similarity?

    The activations of both images, a row for each place, are factorised together into n parts, by non-negative matrix
    factorisation (NMF), as in Deep Feature Factorization (Collins, Achanta, Süsstrunk,
    https://arxiv.org/abs/1806.10206) and in FFAM (Liu et al., https://arxiv.org/abs/2405.12601):

    .. math:: \binom{A}{R} \approx W H, \quad W, H \ge 0

    where row a of H, of length one, is what part a looks like to the encoder, and W (N + N', n) says how strong each
    part is at each place. Place i belongs to the parts in the proportions :math:`p_{ia} = W_{ia} / \sum_b W_{ib}`. What
    the place contributes is divided in the same way. With the place embeddings v(i) and v'(j) of
    :meth:`SimilarityDecomposition.attribute_matrix`, part a of the input and part b of the reference have the share

    .. math:: S_{ab} = \sum_{ij} p_{ia} \, p'_{jb} \, \frac{v(i) \cdot v'(j)}{\|z\| \|s\|}

    of the score (without the norms for ``"dot"``). All shares and the residual add up to the score, for any
    factorisation. The residual is what belongs to no place. It is zero where the places add up to the embedding.
    Otherwise it is what biases, a LayerNorm or a class token contribute, and with ``n_steps`` the baselines. Places
    whose activations are zero belong to no part; what they contribute is in the residual, too.

    The shares are ours. One could also split the activations of each place by the parts' share of W H. The residual
    would then hold the error of the factorisation and the shift of signed activations, which are factorised less each
    channel's minimum. Here places are split: the shares are exact for every encoder, and the factorisation only says
    which place belongs to which part.

    Often most of a score is in shares of different parts: where activations are not negative, all places have something
    in common. ``totals`` gives half of such a share to each of the two parts.

    As a Captum attribution, :meth:`attribute` shows what each place contributes with its own part in the reference. It
    needs scikit-learn (the extra ``parts``). It costs as much as ``attribute_matrix`` and a factorisation for each
    pair. :func:`~captum_fam.visualize_parts` draws the parts, and :func:`~captum_fam.explore_pair` makes a page where
    you point at them.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, or a :class:`~captum_fam.SimilarityScore`, whose
                    encoder is used.
        layer (torch.nn.Module): Layer whose activations (B, C, \*spatial) are factorised; one tensor.
        n_parts (int, optional): The number of parts n: at most the layer's channels, and the places of both images.
                    Default: None, 6, or fewer if there are fewer channels or places
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        similarity (str, optional): ``"cosine"`` or ``"dot"``: only these are sums over pairs of places.
                    Default: None, that of the SimilarityScore, else ``"cosine"``
        n_steps, baseline: As in :class:`~captum_fam.FeatureActivationMap`.
        output_selector, reshape_transform (Callable, optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above, or scikit-learn is not installed.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> parts = SharedParts(encoder, encoder[1], n_parts=3)
        >>> found = parts.explain(torch.rand(2, 3, 16, 16), torch.rand(1, 3, 24, 24))
        >>> found.maps.shape, found.reference_maps.shape, found.shares.shape
        (torch.Size([2, 3, 14, 14]), torch.Size([2, 3, 22, 22]), torch.Size([2, 3, 3]))
        >>> torch.allclose(found.shares.sum((1, 2)) + found.residual, found.score)
        True
    """

    _of_terms = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module,
        n_parts: int | None = None,
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        n_steps: int | None = None,
        baseline: Baseline = "mean",
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_n_parts(n_parts)
        if isinstance(layer, list):
            raise TypeError(
                f"Expected `layer` to be one module, but got a list of {len(layer)}; parts are those of one layer."
            )
        super().__init__(
            forward_func,
            layer,
            device_ids,
            similarity=similarity,
            output_selector=output_selector,
            reshape_transform=reshape_transform,
        )
        self.n_parts = n_parts
        self.n_steps = n_steps
        self.baseline = baseline
        self._decomposition()  # or an error

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        *,
        reference: Inputs | None = None,
        reference_embedding: None = None,
        internal_batch_size: int | None = None,
    ) -> Tensor:
        r"""
        What does each place contribute to the similarity together with its own part in the reference?

        .. math:: M_i = N \sum_a p_{ia} \, v(i) \cdot \sum_j p'_{ja} \, v'(j) / (\|z\| \|s\|)

        Its mean is the sum of the shares of equal parts, :math:`\sum_a S_{aa}`.

        Args:
            inputs, target, additional_forward_args, attribute_to_layer_input, relu_attributions: As in
                        :meth:`FeatureActivationMap.attribute`.
            reference (Tensor or tuple[Tensor, ...]): K references in the form of ``inputs``.
            reference_embedding: An error: embeddings have no places.
            internal_batch_size (int, optional): As in :meth:`explain`.
                        Default: None

        Returns:
            *Tensor* of **attributions**:
            - maps (B, 1, \*spatial) in the dtype of the layer's activations.

        Raises:
            TypeError, ValueError, RuntimeError: As in :meth:`explain`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> images, shelf = torch.rand(2, 3, 16, 16), torch.rand(5, 3, 16, 16)
            >>> SharedParts(encoder, encoder[1]).attribute(images, [3, 0], reference=shelf).shape
            torch.Size([2, 1, 14, 14])
        """
        inputs = format_inputs("inputs", inputs)
        references, B = references_given("SharedParts", reference, reference_embedding), len(inputs[0])
        K = len(references[0])
        self._before_target(target, K, inputs, additional_forward_args)
        own = reference_index("target", target, K, B)
        if K > 1:
            references = tuple(t[own.to(t.device)] for t in references)
        found = self._found(inputs, references, internal_batch_size, additional_forward_args, attribute_to_layer_input)
        return F.relu(found[1]) if relu_attributions else found[1]

    def attribute_pair(
        self, inputs: Inputs, reference: Inputs, *, internal_batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""
        What does each place of both images contribute together with its own part in the other image?

        Args:
            inputs, reference, internal_batch_size: As in :meth:`explain`.

        Returns:
            *tuple*: maps of the inputs, and maps of the reference, each (B, 1, \*spatial).

        Raises:
            TypeError, ValueError, RuntimeError: As in :meth:`explain`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> parts = SharedParts(encoder, encoder[1])
            >>> here, there = parts.attribute_pair(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 24, 24))
            >>> here.shape, there.shape
            (torch.Size([2, 1, 14, 14]), torch.Size([2, 1, 22, 22]))
        """
        _, here, there = self._found(inputs, reference, internal_batch_size)
        return here, there

    def explain(
        self, inputs: Inputs, reference: Inputs, *, internal_batch_size: int | None = None
    ) -> SharedPartsExplanation:
        r"""
        Which parts do pairs of images share, and what is each part's share of the score?

        Args:
            inputs (Tensor or tuple[Tensor, ...]): B inputs.
            reference (Tensor or tuple[Tensor, ...]): In the form of ``inputs``: B references,
                        paired with the inputs, or one that they share.
            internal_batch_size (int, optional): How many pairs go through the encoder at a time.
                        Default: None, all at once

        Returns:
            *SharedPartsExplanation*

        Raises:
            TypeError, ValueError: an argument is not as described above, there are more parts than channels, or the
                        similarity is no sum over pairs of places.
            RuntimeError: the jacobian is needed under ``torch.inference_mode()``.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> found = SharedParts(encoder, encoder[1]).explain(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))
            >>> largest = found.totals[:, 0] / found.score  # the share of the first part
        """
        return self._found(inputs, reference, internal_batch_size)[0]

    @eagerly
    def _found(
        self,
        inputs: Inputs,
        reference: Inputs,
        most: int | None,
        additional_forward_args: object | None = None,
        layer_input: bool = False,
    ) -> tuple[SharedPartsExplanation, Tensor, Tensor]:
        """The explanation, and maps (B, 1, *spatial) of both sides: what places contribute with their own part."""
        inputs, reference = format_inputs("inputs", inputs), format_inputs("reference", reference)
        check_internal_batch_size(most)
        check_same_form(reference, inputs)
        B, K = len(inputs[0]), len(reference[0])
        pair_index(B, K)  # or an error
        check_rows_fit(additional_forward_args, B, K)
        if self._similarity() not in ("cosine", "dot"):
            raise ValueError(
                'SharedParts needs a similarity that is a sum over pairs of places, "cosine" or "dot", but got'
                f" {describe(self._similarity())}."
            )
        method = self._decomposition()

        def chunks(way: Way) -> tuple[list[tuple[Tensor, ...]], Report]:
            report, parts = Report(), []
            path = method._paths(None, False)[0]
            for rows in slices(B, most):
                args, across = cut_arguments(additional_forward_args, rows, B), rows if K == B else slice(0, 1)
                here, there = (path and replace(path, rows=r, inputs=n) for r, n in ((rows, B), (across, K)))
                with (
                    method._record(cut(inputs, rows), args, report, layer_input, way, here) as one,
                    method._record(cut(reference, across), args, report, layer_input, way, there) as two,
                    torch.no_grad(),
                ):
                    parts.append(self._of_recorded(method, one, two, rows.start))
            return parts, report

        parts, report = by_the_cheapest_way(chunks)
        warn_once(report.texts())
        *fields, same, back = (torch.cat(column) for column in zip(*parts))
        return SharedPartsExplanation(*fields), same, back

    def _of_recorded(
        self, method: SimilarityDecomposition, one: Recording, two: Recording, first: int
    ) -> tuple[Tensor, ...]:
        """The fields of the explanation of recorded pairs, and the maps of both sides."""
        for name, size in zip(one.names, one.sizes):
            if size > 1:
                raise ValueError(f"SharedParts needs a layer with one tensor, but {name} has {size}.")
        question = Question(two.embedding, pair_index(len(one.embedding), len(two.embedding)))
        pairs = Pairs(one, question, 1, method)
        (A,), (R,) = one.activations, two.activations
        finite = [a.flatten(1).isfinite().all(1) for a in (A, R)]
        valid = pairs.valid[:, 0] & finite[0] & finite[1]
        note_unusable(one, question, pairs.valid, first)
        if (pairs.valid[:, 0] & ~valid).any():
            one.report.warnings.append("Activations are not finite: the shares of these pairs are zero.")
        (v,), (v_reference,) = method._place_embeddings(one), method._place_embeddings(two)
        v_reference = v_reference.expand(len(v), -1, -1)
        with exact(v):
            if self.n_steps is None:
                check_sum((v.sum(2) * v_reference.sum(2)).sum(1)[:, None], pairs, one.names[0], one.partial[0])
            W, W_reference = (w.to(v) for w in self._factors(by_place(A), by_place(R).expand(len(A), -1, -1), valid))
            p, p_reference = (w / nonzero(w.sum(2, keepdim=True)) for w in (W, W_reference))
            z, s = v.nan_to_num() @ p, v_reference.nan_to_num() @ p_reference  # of each part, (B, D, n)
            shares = z.mT @ s
            order = (shares.sum(1) + shares.sum(2)).argsort(dim=1, descending=True, stable=True)
            shares = shares.gather(1, order[..., None].expand_as(shares)).gather(2, order[:, None].expand_as(shares))
            same = (
                (v.nan_to_num() * (p @ s.mT).mT).sum(1),
                (v_reference.nan_to_num() * (p_reference @ z.mT).mT).sum(1),
            )
        maps = [w.gather(2, order[:, None].expand_as(w)).mT for w in (W, W_reference)]
        score = pairs.c.sum(2)[:, 0]
        of_parts = [w.reshape(*w.shape[:2], *a.shape[2:]).to(a.dtype) for w, a in zip(maps, (A, R))]
        of_places = [(m * m.shape[1]).reshape(len(m), 1, *a.shape[2:]).to(a.dtype) for m, a in zip(same, (A, R))]
        return *of_parts, shares, score - shares.sum((1, 2)), score, *of_places

    def _factors(self, A: Tensor, R: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """W (B, N, n) of both sides of pairs with activations (B, C, N), zero where they are not valid."""
        N, n = A.shape[2], parts_of(self.n_parts, A.shape[2] + R.shape[2], A.shape[1])
        both = torch.cat([A, R], 2).mT
        W = torch.zeros(*both.shape[:2], n, dtype=torch.float64)
        for number in valid.nonzero().flatten().tolist():
            W[number] = factorised(both[number], n)
        return W[:, :N], W[:, N:]

    def _decomposition(self) -> SimilarityDecomposition:
        """A decomposition at the same layer, with the options as they are now."""
        method = SimilarityDecomposition(
            self.forward_func,
            self.layer,
            self.device_ids,
            similarity=self.similarity,
            n_steps=self.n_steps,
            baseline=self.baseline,
            output_selector=self.output_selector,
            reshape_transform=self.reshape_transform,
        )
        method._confirmed = self._confirmed
        return method
