"""What the attribution methods share: the rules of references, one recorded pass, and results in Captum's forms."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from captum.attr import Attribution, LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_fam import _method, _recording
from captum_fam._captum import TargetType
from captum_fam._checks import (
    check_callable,
    check_dimensions,
    check_internal_batch_size,
    check_reference_embedding,
    check_rows_fit,
    check_same_form,
    describe,
    format_inputs,
    reference_index,
    warn_once,
)
from captum_fam._distances import canonical
from captum_fam._layers import last_map
from captum_fam._recording import NOT_AT_ALL, OFF_THE_MAP, Call, Recording, RoutesDifferError, Tensors
from captum_fam.score import SimilarityScore
from captum_fam.similarity import Similarity, check_similarity, largest, widen

Inputs: TypeAlias = Tensor | Tensors
Maps: TypeAlias = Tensor | Tensors | list[Tensor | Tensors]
Other: TypeAlias = Tensor | Literal["rest"] | None
Selector: TypeAlias = Callable[[Any], Tensor] | None
Once: TypeAlias = Callable[[object, Callable[[], Tensor]], Tensor]
SIDES = ("inputs", "references")


@dataclass(frozen=True)
class References:
    """K references, as embeddings (K, D) or as inputs of the encoder, and the similarity to them."""

    tensors: Tensors
    are_inputs: bool
    similarity: Similarity
    are_classes: bool = False

    def __len__(self) -> int:
        return len(self.tensors[0])


@dataclass(frozen=True)
class Question:
    """
    Which similarities are explained.

    Attributes:
        s: embeddings (K, D) of the references.
        own: the numbers (B, P) of the references that each input is compared with.
        other: the references to contrast with, (B, 1), "rest" or none.
        similarity: as in channel_contributions.
    """

    s: Tensor
    own: Tensor
    other: Other
    similarity: Similarity

    def of(self, rows: Tensor | slice) -> "Question":
        """The question about the inputs of these rows."""
        rows = rows.to(self.own.device) if isinstance(rows, Tensor) else rows
        own = self.own if len(self.own) == 1 else self.own[rows]
        return replace(self, own=own, other=self.other[rows] if isinstance(self.other, Tensor) else self.other)

    def contributions(self, z: Tensor, similarity: Similarity | None = None, once: Once = lambda _, f: f()) -> Tensor:
        """c (B, P, D) for embeddings z (B, D); ``once`` keeps what all parts of a question share."""
        check_dimensions(z, self.s)
        rule, own = similarity or self.similarity, self.s[self.own].to(z)
        if self.other != "rest":
            other = None if self.other is None else self.s[self.other].to(z)
            return _method.contributions(z, own, rule, other)
        # By its identity, for it need not be hashable; it lives as long as the question.
        total = once(("total", id(rule)), lambda: _method.total_contributions(z, self.s, rule))
        return _method.contrast_with_rest(_method.contributions(z, own, rule), total, len(self.s))

    def scores(self, z: Tensor, once: Once = lambda _, f: f()) -> Tensor:
        """The sums (B, P) of the contributions."""
        if self.other != "rest":
            return self.contributions(z).sum(2)
        total = once("total", lambda: _method.total_contributions(z, self.s, self.similarity).sum(2))
        return _method.contrast_with_rest(replace(self, other=None).contributions(z).sum(2), total, len(self.s))


class Pairs:
    """
    A question about recorded inputs.

    Attributes:
        recording: of the inputs' forward pass.
        question: about them.
        references: how many each input has over all, where the question is a part of another.
        z: embeddings (B, D) of the inputs.
        c: contributions (B, P, D).
    """

    def __init__(self, recording: Recording, question: Question, references: int) -> None:
        self.recording = recording
        self.question = question
        self.references = references
        self.z = widen(recording.embedding)
        self.c = self.contributions(question.similarity)

    def contributions(self, similarity: Similarity) -> Tensor:
        """c (B, P, D) by a similarity."""
        return self.question.contributions(self.z, similarity, self.recording.once)

    def explainable(self) -> Tensor:
        """Which pairs (B, P) have a similarity that can be explained: their embeddings are finite and not zero."""
        question = self.question
        indices = [question.own, question.other] if isinstance(question.other, Tensor) else [question.own]
        valid = usable(self.z)[:, None] & largest(self.c)[..., 0].isfinite()
        for index in indices:
            valid = valid & usable(question.s[index].to(self.z))
        return valid


class SimilarityAttribution(Attribution):
    """A method that explains the similarity of the inputs' embeddings to references."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *captum_args: Any,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
    ) -> None:
        check_callable("forward_func", forward_func)
        if similarity is not None:
            check_similarity(similarity)
        if output_selector is not None:
            check_callable("output_selector", output_selector)
        super().__init__(forward_func, *captum_args)
        self.similarity = similarity
        self.output_selector = output_selector

    def embed(self, inputs: Inputs, additional_forward_args: object | None = None) -> Tensor:
        r"""
        The embeddings that :meth:`attribute` compares.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of the encoder, batch first.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
                        Default: None

        Returns:
            *Tensor*: embeddings (B, D), detached.

        Raises:
            TypeError, ValueError: the encoder does not return (B, D) and no ``output_selector``
                        takes its output there.
        """
        return _recording.embed(
            self._encoder(), "inputs", format_inputs("inputs", inputs), additional_forward_args, self._selector()
        )

    def attribute_future(self) -> None:
        r"""This method is not implemented."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _references(
        self,
        inputs: Tensors,
        reference: Inputs | None,
        reference_embedding: Tensor | None,
        additional_forward_args: object | None,
    ) -> References:
        """The references from the one place that gives them."""
        score = self._score()
        given = [
            name
            for name, value in (
                ("reference", reference),
                ("reference_embedding", reference_embedding),
                ("the references of the SimilarityScore", score),
            )
            if value is not None
        ]
        if not given and self._explains_classifiers():
            classes = self.embed(inputs, additional_forward_args).shape[1]
            return References((self._classes(classes),), False, "dot", are_classes=True)
        if len(given) != 1:
            raise ValueError(
                "Expected exactly one of `reference`, `reference_embedding` and the references of a SimilarityScore,"
                f" but got {' and '.join(given) or 'none; pass them by these names (the second argument is `target`)'}."
            )
        similarity = self._similarity()
        if reference is not None:
            tensors = format_inputs("reference", reference)
            check_same_form(tensors, inputs)
            return References(tensors, True, similarity)
        if score is not None:
            return References((score.reference_embedding,), False, similarity)
        check_reference_embedding(reference_embedding)
        return References((reference_embedding,), False, similarity)  # type: ignore[arg-type]  # checked

    def _explains_classifiers(self) -> bool:
        """Whether references may be left out: the outputs are then an embedding, a class is one dimension of it."""
        return self.similarity is None

    def _embedded(
        self, references: References, inputs: Tensors, additional_forward_args: object | None, most: int | None
    ) -> Tensor:
        """s (K, D), made of at most so many references at once"""
        if not references.are_inputs:
            return references.tensors[0].detach()
        B, K = len(inputs[0]), len(references)
        check_rows_fit(additional_forward_args, B, K)
        parts = [
            _recording.embed(
                self._encoder(),
                "reference",
                cut(references.tensors, rows),
                cut_arguments(additional_forward_args, rows, B) if B == K else additional_forward_args,
                self._selector(),
            )
            for rows in slices(K, most)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _question(
        self,
        inputs: Tensors,
        target: TargetType,
        additional_forward_args: object | None,
        reference: Inputs | None,
        reference_embedding: Tensor | None,
        contrast: TargetType | str,
        most: int | None = None,
    ) -> Question:
        """The question about one reference for each input."""
        B, rows = len(inputs[0]), slice(0, most)
        references = self._references(
            cut(inputs, rows), reference, reference_embedding, cut_arguments(additional_forward_args, rows, B)
        )
        own, other = self._own(target, references, B)[:, None], _other(contrast, len(references), B)
        s = self._embedded(references, inputs, additional_forward_args, most)
        other = other.to(s.device) if isinstance(other, Tensor) else other
        return Question(s, own.to(s.device), other, references.similarity)

    def _embed_changed(self, changed: Tensor, rows: Tensor, inputs: int, additional_forward_args: Any) -> Tensor:
        """Embeddings (N, D) of changed inputs (N, ...), each made from the input of that row."""
        args = cut_arguments(additional_forward_args, rows, inputs)
        return widen(_recording.embed(self._encoder(), "inputs", (changed,), args, self._selector()))

    def _scores(
        self, z: Tensor, rows: Tensor, question: Question, doubts: list[str], once: Once = lambda _, f: f()
    ) -> Tensor:
        """Scores (N, P) of the embeddings z (N, D) of changed inputs; ``once`` as in Question."""
        scores = question.of(rows).scores(z, once)
        if scores.isfinite().all():
            return scores
        doubts.append("Scores of masked inputs are not finite; they count as zero.")
        return torch.where(scores.isfinite(), scores, torch.zeros_like(scores))

    def _classes(self, classes: int) -> Tensor:
        """Embeddings (K, D) that stand for the classes of a classifier."""
        return torch.eye(classes)

    def _own(self, target: TargetType, references: References, inputs: int) -> Tensor:
        """The number of the reference that each input takes, (B,)."""
        if target is None and references.are_classes and len(references) > 1:
            raise ValueError(
                f"`target` is needed: a class, 0 to {len(references) - 1}, for all inputs, or a list of {inputs}."
                " (For the similarity to a reference, pass it as `reference` or in a SimilarityScore.)"
            )
        return reference_index("target", target, len(references), inputs)

    def _score(self) -> SimilarityScore | None:
        func = uncompiled(self.forward_func)
        if getattr(func, "__name__", "") in ("forward", "_wrapped_call_impl"):  # score.forward, score.__call__
            func = getattr(func, "__self__", func)
        module = func.module if isinstance(func, nn.DataParallel) else func
        return module if isinstance(module, SimilarityScore) else None

    def _encoder(self) -> Callable[..., Any]:
        score, func = self._score(), uncompiled(self.forward_func)
        if score is None:
            encoder = func
        elif isinstance(func, nn.DataParallel) and func.device_ids:
            encoder = nn.DataParallel(func.module.encoder, func.device_ids, func.output_device, func.dim)
        else:
            encoder = uncompiled(score.encoder)
        return encoder  # type: ignore[no-any-return]  # what the user gave

    def _similarity(self) -> Similarity:
        score = self._score()
        given = score.similarity if score is not None and self.similarity is None else self.similarity
        return "cosine" if given is None else canonical(given)

    def _selector(self) -> Selector:
        if self.output_selector is not None:
            return self.output_selector
        score = self._score()
        return None if score is None else score.output_selector


class ChannelAttribution(SimilarityAttribution, LayerAttribution):
    r"""
    A method whose map is a weighted sum of a layer's activations,
    :math:`M = \sum_k \alpha_k A_k`: a method is its weights, :meth:`_channel_weights`.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        _check_layer(layer)
        if reshape_transform is not None:
            check_callable("reshape_transform", reshape_transform)
        super().__init__(forward_func, layer, device_ids, similarity=similarity, output_selector=output_selector)
        self.reshape_transform = reshape_transform

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        *,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        contrast: TargetType | Literal["rest"] | str = None,
        internal_batch_size: int | None = None,
    ) -> Maps:
        r"""
        Explains each input's similarity to one reference.

        The references are exactly one of ``reference``, ``reference_embedding`` and those of
        a SimilarityScore. With ``target``, each input takes the reference that its target
        numbers. Without, one reference is shared by the batch, as many references as inputs
        are paired with them, and anything else is an error. (The methods that say that they
        explain classifiers too need no references then: ``target`` is a class.)

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs to explain, batch first.
            target (int, list, Tensor, optional): Number of the reference, in Captum's forms:
                        an int for all inputs, or a list or 1D tensor with one for each.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of forward_func, as for
                        other Captum methods. They are also given to the forward pass of
                        ``reference``, which must then have as many rows as tensors among them.
                        Default: None
            attribute_to_layer_input (bool, optional): Explains the layer's input instead of
                        its output. In the jacobian case, the gradient is that through the
                        layer: other paths of the same tensor, around the layer, do not count.
                        Default: False
            relu_attributions (bool, optional): Drops the negative part of the maps.
                        Default: False
            attr_dim_summation (bool, optional): Whether to sum over the channels.
                        Default: True
            reference (Tensor or tuple[Tensor, ...], optional): K references in the form of
                        ``inputs``; embedded before any hook is set.
                        Default: None
            reference_embedding (Tensor, optional): K references as embeddings (K, D).
                        Default: None
            contrast (int, list, Tensor or str, optional): Number of the reference to contrast
                        with, in the forms of ``target``, or ``"rest"`` for the mean over all
                        the others. The weights are then signed, whatever ``normalize``. Default: None
            internal_batch_size (int, optional): The inputs, and the references, go through the
                        encoder at most so many at a time, one chunk after another; the maps are
                        the same, the memory needed is that of one chunk. As in Captum, tensors
                        among the further arguments with as many rows as there are inputs are
                        cut with them.
                        Default: None, all at once

        Where Captum repeats the inputs (NoiseTunnel, sensitivity_max), it expands ``target`` but
        not the references or ``contrast``: there, choose among the references with ``target``,
        and pass an int or ``"rest"`` as ``contrast``.

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list* of **attributions**:
            - maps (B, 1, \*spatial), or (B, C, \*spatial) without the sum over channels, in the
              dtype of the layer's activations, detached; a tuple for a layer that gives several
              tensors, and a list of results for a list of layers.

        Raises:
            TypeError, ValueError: an argument is not as described above; the message names it.
            RuntimeError: the jacobian is needed under ``torch.inference_mode()``.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> support, labels = torch.rand(6, 3, 16, 16), [0, 0, 1, 1, 2, 2]
            >>> score = SimilarityScore(encoder, prototypes(encoder(support), labels), "euclidean")
            >>> fam = FeatureActivationMap(score, encoder[1])
            >>> fam.attribute(torch.rand(4, 3, 16, 16), target=2).shape
            torch.Size([4, 1, 14, 14])
        """
        inputs = format_inputs("inputs", inputs)
        check_internal_batch_size(internal_batch_size)
        question = self._question(
            inputs, target, additional_forward_args, reference, reference_embedding, contrast, internal_batch_size
        )
        return self._explain(
            inputs,
            additional_forward_args,
            question,
            internal_batch_size,
            layer_input=attribute_to_layer_input,
            relu=relu_attributions,
            summed=attr_dim_summation,
        )

    def attribute_all(
        self,
        inputs: Inputs,
        additional_forward_args: object | None = None,
        *,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        relu_attributions: bool = False,
        contrast: Literal["rest"] | str | None = None,
        internal_batch_size: int | None = None,
    ) -> Maps:
        r"""
        Explains each input's similarity to every reference, from one recorded forward pass of the inputs.

        Args:
            inputs, additional_forward_args, reference, reference_embedding, relu_attributions:
                        As in :meth:`attribute`.
            contrast (str, optional): ``"rest"`` contrasts each reference with the mean over
                        all the others.
                        Default: None
            internal_batch_size (int, optional): As in :meth:`attribute`; at most so many references
                        are also compared at a time. Without it, their number at a time is chosen
                        such that the memory needed beside the maps does not grow with K.
                        Default: None

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list*: maps (B, K, \*spatial), otherwise as
            :meth:`attribute`.

        Raises:
            TypeError, ValueError, RuntimeError: As in :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> fam = FeatureActivationMap(encoder, encoder[1])
            >>> fam.attribute_all(torch.rand(2, 3, 16, 16), reference_embedding=torch.rand(100, 8)).shape
            torch.Size([2, 100, 14, 14])
        """
        inputs = format_inputs("inputs", inputs)
        check_internal_batch_size(internal_batch_size)
        B, rows = len(inputs[0]), slice(0, internal_batch_size)
        references = self._references(
            cut(inputs, rows), reference, reference_embedding, cut_arguments(additional_forward_args, rows, B)
        )
        K = len(references)
        if not K:
            raise ValueError("Expected at least one reference, but got none; pass embeddings (K, D) with K > 0.")
        if contrast not in (None, "rest"):
            raise ValueError(
                f'Expected `contrast` to be "rest" or None, but got {describe(contrast)}; `attribute` takes a number.'
            )
        other = _other(contrast, K, B)
        s = self._embedded(references, inputs, additional_forward_args, internal_batch_size)
        question = Question(s, torch.arange(K, device=s.device)[None], other, references.similarity)
        return self._explain(inputs, additional_forward_args, question, internal_batch_size, relu=relu_attributions)

    @_recording.eagerly
    def attribute_pair(self, inputs: Inputs, reference: Inputs) -> tuple[Maps, Maps]:
        r"""
        Explains a similarity on both sides, with one forward pass of each.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): B inputs.
            reference (Tensor or tuple[Tensor, ...]): In the form of ``inputs``: B references,
                        paired with the inputs, or one that they share.

        Returns:
            *tuple*: maps of the inputs, and maps of the reference, each (B, 1, \*spatial),
            otherwise as :meth:`attribute`.

        Raises:
            TypeError, ValueError, RuntimeError: As in :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> fam = FeatureActivationMap(encoder, encoder[1])
            >>> here, there = fam.attribute_pair(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 24, 24))
            >>> here.shape, there.shape
            (torch.Size([2, 1, 14, 14]), torch.Size([2, 1, 22, 22]))
        """
        inputs, reference = format_inputs("inputs", inputs), format_inputs("reference", reference)
        check_same_form(reference, inputs)
        B, K = len(inputs[0]), len(reference[0])
        own, similarity = pair_index(B, K), self._similarity()
        with self._record(inputs, None) as one, self._record(reference, None) as two:
            maps = self._maps(one, Question(two.embedding, own, None, similarity))
            # A shared reference has one map for each input: its P maps become B of one.
            back = Question(one.embedding, own if K == B else torch.arange(B)[None], None, similarity)
            reference_maps = [
                tuple(M if K == B else M.transpose(0, 1).contiguous() for M in layer)
                for layer in self._maps(two, back, sides=("references", "inputs"))
            ]
        doubts = self._doubts(one) + self._doubts(two)
        warn_once(doubts)
        return self._result(maps), self._result(reference_maps)

    def _needs_graph(self) -> bool:
        """Whether the weights may need the gradient of the embedding with respect to the layer."""
        return False

    @abstractmethod
    def _channel_weights(self, pairs: Pairs, valid: Tensor) -> list[list[Tensor]]:
        """
        alpha (B, P, C) for each tensor of each layer. What it is for pairs that are not valid
        (B, P) does not matter.
        """

    def _weighted(self, pairs: Pairs, valid: Tensor, summed: bool) -> list[list[Tensor]]:
        """M (B, P, *spatial) for each tensor of each layer; not summed, for P = 1, its terms (B, C, *spatial)."""
        combine = _method.activation_maps if summed else _method.weighted_activations
        layers = zip(self._channel_weights(pairs, valid), pairs.recording.layers)
        return [[combine(alpha, A) for alpha, A in zip(*layer)] for layer in layers]

    @_recording.eagerly
    def _explain(
        self,
        inputs: Tensors,
        additional_forward_args: object | None,
        question: Question,
        most: int | None,
        *,
        layer_input: bool = False,
        relu: bool = False,
        summed: bool = True,
    ) -> Maps:
        """The maps of inputs, of which at most so many at a time go through the encoder."""
        # DataParallel's threads would not see the constants.
        B, call = (
            len(inputs[0]),
            Call(constants=self.device_ids is None and not isinstance(self._encoder(), nn.DataParallel)),
        )
        while True:
            parts = Parts(B, question.own.shape[1], summed)
            try:
                for rows in slices(B, most):
                    args = cut_arguments(additional_forward_args, rows, B)
                    with self._record(cut(inputs, rows), args, layer_input, call) as recording:
                        for columns, maps in self._parts(recording, question.of(rows), relu, summed, most, rows.start):
                            parts.put(rows, columns, maps)
            except RoutesDifferError:
                continue
            except RuntimeError:  # perhaps of an encoder that takes gradients of its weights, or checkpoints
                if not call.constants:
                    raise
                call.constants = False
                continue
            warn_once(self._doubts(recording))
            return self._result(parts.maps)

    def _maps(self, recording: Recording, question: Question, sides: tuple[str, str] = SIDES) -> list[Tensors]:
        """The maps (B, P, *spatial) of recorded inputs."""
        parts = Parts(len(recording.embedding), question.own.shape[1])
        for columns, maps in self._parts(recording, question, sides=sides):
            parts.put(slice(0, len(recording.embedding)), columns, maps)
        return parts.maps

    def _parts(
        self,
        recording: Recording,
        question: Question,
        relu: bool = False,
        summed: bool = True,
        most: int | None = None,
        first: int = 0,
        sides: tuple[str, str] = SIDES,
    ) -> Iterator[tuple[slice, list[Tensors]]]:
        """The maps of recorded inputs, for some references at a time; ``first`` is the number of the first input."""
        P = question.own.shape[1]
        at_once = min(most or P, _method.at_once(recording.embedding))
        valid = []
        for columns in slices(P, at_once):
            pairs = Pairs(recording, replace(question, own=question.own[:, columns]), P)
            maps, known = self._masked(pairs, relu, summed)
            valid.append(known)
            yield columns, maps
        note_unusable(recording, question, torch.cat(valid, 1), first, sides)

    def _masked(self, pairs: Pairs, relu: bool = False, summed: bool = True) -> tuple[list[Tensors], Tensor]:
        """
        For each layer the maps, as _weighted, zero where they mean nothing, in the dtype of the activations; and
        which (B, P) mean something.
        """
        maps: list[Tensors] = []
        with torch.no_grad():
            valid = self._valid(pairs)
            for found, layer in zip(self._weighted(pairs, valid, summed), pairs.recording.layers):
                shown = [valid.reshape(*valid.shape, *[1] * (M.ndim - 2)) for M in found]
                kept = [torch.where(v, F.relu(M) if relu else M, torch.zeros_like(M)) for v, M in zip(shown, found)]
                maps.append(tuple(M.to(A.dtype) for M, A in zip(kept, layer)))
        return maps, valid

    def _valid(self, pairs: Pairs) -> Tensor:
        """Which maps (B, P) mean something; the others are zero."""
        return pairs.explainable()

    def _doubts(self, recording: Recording) -> list[str]:
        """What a user should be warned of after a call, or an error with the layer to choose instead."""
        call = recording.call
        doubts = call.doubts + ([unexplained(call.unusable)] if call.unusable else [])
        for name, dependence in call.dependence.items():
            if dependence == OFF_THE_MAP:
                layer = last_map(self._encoder(), recording.inputs, recording.additional_forward_args, self._selector())
                raise ValueError(
                    f"The embedding depends on layer {name} only through tokens that are no patches, such as the class"
                    " token after the last attention, so it has no map; choose a layer before the last attention"
                    + (f", such as {layer!r}." if layer else ", such as the normalisation at its input.")
                )
            if dependence == NOT_AT_ALL:
                doubts.append(
                    f"The embedding does not depend on layer {name}, or the encoder cuts the gradient between them"
                    " (detach, torch.no_grad): its map is zero. Choose a layer on the way to the embedding, after any"
                    " such cut."
                )
        return doubts

    def _record(
        self,
        inputs: Tensors,
        additional_forward_args: object | None,
        layer_input: bool = False,
        call: Call | None = None,
    ) -> AbstractContextManager[Recording]:
        _check_layer(self.layer)
        return _recording.record(
            self._encoder(),
            self.layer if isinstance(self.layer, list) else [self.layer],
            inputs,
            additional_forward_args,
            output_selector=self._selector(),
            reshape_transform=self.reshape_transform,
            layer_input=layer_input,
            graph=self._needs_graph() and not torch.is_inference_mode_enabled(),
            device_ids=self.device_ids,
            call=call or Call(),
        )

    def _result(self, maps: list[Tensors]) -> Maps:
        """Captum's form: a tuple for several tensors, a list for a list of layers."""
        results = [layer if len(layer) > 1 else layer[0] for layer in maps]
        return results if isinstance(self.layer, list) else results[0]


def note_unusable(
    recording: Recording, question: Question, valid: Tensor, first: int = 0, sides: tuple[str, str] = SIDES
) -> None:
    """Remembers why pairs (B, P) are not valid; the first of the inputs has this number in its call."""
    if valid.all():
        return
    z = widen(recording.embedding)
    inputs, references = ~usable(z), ~usable(question.s.to(z.dtype))
    if question.other is None:
        compared = torch.zeros_like(references)
        compared[question.own] = True
        references &= compared
    for side, bad, start in zip(sides, (inputs, references), (first, 0)):
        rows = (bad.nonzero().flatten() + start).tolist()
        recording.call.unusable.setdefault(side, set()).update(rows)


def unexplained(unusable: dict[str, set[int]]) -> str:
    """The doubt about embeddings that are not usable, by the numbers of their rows."""
    which = [f"{side} {sorted(rows)}" for side, rows in sorted(unusable.items()) if rows]
    return (
        f"Embeddings are zero or not finite ({', '.join(which) or 'their contributions overflow'}): the maps that"
        " depend on them are zero."
    )


def usable(x: Tensor) -> Tensor:
    """Which embeddings (..., D) are finite and not zero."""
    size = largest(x)[..., 0]
    return size.isfinite() & (size > 0)


def slices(length: int, most: int | None) -> list[slice]:
    """Of at most so many, one after another; one empty slice of nothing."""
    step = most or max(1, length)
    return [slice(i, min(i + step, length)) for i in range(0, max(1, length), step)]


def cut(inputs: Tensors, rows: slice) -> Tensors:
    """Some rows of tensors; one that has not as many as the first is shared by all."""
    return tuple(t[rows] if len(t) == len(inputs[0]) else t for t in inputs)


def cut_arguments(additional_forward_args: Any, rows: Tensor | slice, inputs: int) -> Any:
    """Those of some inputs: tensors with a row for each of them are cut, as Captum does."""
    if additional_forward_args is None:
        return None
    given = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
    return tuple(a[rows] if isinstance(a, Tensor) and a.ndim and len(a) == inputs else a for a in given)


class Parts:
    """Maps of B inputs for P references each, put together from those of chunks."""

    def __init__(self, inputs: int, references: int, summed: bool = True) -> None:
        self.maps: list[Tensors] = []
        self._size = (inputs, references)
        self._summed = summed

    def put(self, rows: slice, columns: slice, maps: list[Tensors]) -> None:
        if (rows.stop - rows.start, columns.stop - columns.start) == self._size:
            self.maps = maps
            return
        if not self.maps:
            sizes = [[(self._size[0], self._size[1] if self._summed else M.shape[1]) for M in layer] for layer in maps]
            self.maps = [
                tuple(M.new_empty(*size, *M.shape[2:]) for M, size in zip(*layer)) for layer in zip(maps, sizes)
            ]
        for filled, layer in zip(self.maps, maps):
            for whole, M in zip(filled, layer):
                whole[rows, columns if self._summed else slice(None)] = M


def uncompiled(func: Any) -> Any:
    """The module behind torch.compile, which runs past hooks that are set after its first call."""
    return getattr(func, "_orig_mod", func)


def _check_layer(layer: object) -> None:
    layers = layer if isinstance(layer, list) else [layer]
    if not layers or not all(isinstance(m, nn.Module) for m in layers):
        hint = "; pass model.get_submodule(name)" if any(isinstance(m, str) for m in layers) else ""
        got = f"a list of {[type(m).__name__ for m in layers]}" if isinstance(layer, list) else describe(layer)
        raise TypeError(f"Expected `layer` to be a module or a list of modules, but got {got}{hint}.")


def pair_index(inputs: int, references: int) -> Tensor:
    """The reference of each input (B, 1), where they are paired or share one."""
    if references not in (1, inputs):
        raise ValueError(
            f"Expected `reference` to hold one reference or {inputs}, one for each input, but got {references}."
        )
    return reference_index("reference", None, references, inputs)[:, None]


def _other(contrast: object, references: int, inputs: int) -> Other:
    """The references to contrast with: (B, 1), the rest, or none."""
    if contrast is None:
        return None
    if isinstance(contrast, str) and contrast != "rest":
        raise ValueError(f'Expected `contrast` to be the number of a reference or "rest", but got {contrast!r}.')
    if references < 2:
        raise ValueError(
            f"contrast={contrast!r} needs at least two references, but there is {references}; pass more of them, such"
            " as reference=torch.cat([match, other]), or leave `contrast` out."
        )
    if not isinstance(contrast, str):
        return reference_index("contrast", contrast, references, inputs)[:, None]
    return "rest"
