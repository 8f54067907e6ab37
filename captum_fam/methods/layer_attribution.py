"""What the methods have in common that explain a layer: Captum's attribute, from one recorded pass."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from captum_fam._captum import TargetType
from captum_fam._checks import (
    check_callable,
    check_internal_batch_size,
    check_same_form,
    describe,
    format_inputs,
    warn_once,
)
from captum_fam.engine.chunks import Assembled, Tensors, cut, cut_arguments, slices
from captum_fam.engine.question import Pairs, Question, at_once, note_unusable, pair_index
from captum_fam.engine.recording import Encoder, Recording, WeightsNeededError, record
from captum_fam.engine.report import SIDES, Report
from captum_fam.engine.untouched import eagerly
from captum_fam.methods.similarity_attribution import Inputs, Selector, SimilarityAttribution
from captum_fam.similarity import Similarity

Maps: TypeAlias = Tensor | Tensors | list[Tensor | Tensors]
# The question about recorded inputs, from their embeddings and their rows in the call.
Ask: TypeAlias = Callable[[Tensor, slice], Question]
T = TypeVar("T")


class _RoutesDifferError(Exception):
    """A chunk of inputs is not aligned where those before it were."""


@dataclass(frozen=True)
class Explained:
    """
    The maps of B inputs for P references each.

    Attributes:
        embedding: of the inputs (B, D).
        maps: of each tensor that the layers gave (B, P, *spatial), or its terms (B, C, *spatial).
        signed: the maps of the terms themselves, if they were asked for; their differences are contrasts.
        valid: which pairs (B, P) can be explained; the maps of the others are zero.
        aligned: for each of those tensors, whether no gradient was taken.
        sizes: how many of them each layer gave.
        report: what the user is to be told.
    """

    embedding: Tensor
    maps: list[Tensor]
    signed: list[Tensor]
    valid: Tensor
    aligned: list[bool]
    sizes: list[int]
    report: Report


class LayerSimilarityAttribution(SimilarityAttribution, LayerAttribution):
    """A method whose map lies on a layer: its family, below, says how it is made (:meth:`_maps`)."""

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
        contrast: TargetType | Literal["rest", "self"] | str = None,
        threshold: float | None = None,
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
        ask = self._ask(
            inputs,
            target,
            additional_forward_args,
            reference,
            reference_embedding,
            contrast,
            threshold,
            internal_batch_size,
        )
        found = self.explain(
            inputs,
            ask,
            additional_forward_args,
            internal_batch_size=internal_batch_size,
            layer_input=attribute_to_layer_input,
            relu=relu_attributions,
            summed=attr_dim_summation,
        )
        warn_once(found.report.texts())
        return self._result(found.maps, found.sizes)  # type: ignore[no-any-return]

    def attribute_all(
        self,
        inputs: Inputs,
        additional_forward_args: object | None = None,
        *,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        relu_attributions: bool = False,
        contrast: Literal["rest", "self"] | str | None = None,
        threshold: float | None = None,
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
        if contrast is not None and not isinstance(contrast, str):
            raise ValueError(
                f'Expected `contrast` to be "rest", "self" or None, but got {describe(contrast)}; `attribute` takes a'
                " number."
            )
        ask = self._ask(
            inputs,
            None,
            additional_forward_args,
            reference,
            reference_embedding,
            contrast,
            threshold,
            internal_batch_size,
            every=True,
        )
        found = self.explain(
            inputs,
            ask,
            additional_forward_args,
            internal_batch_size=internal_batch_size,
            relu=relu_attributions,
        )
        warn_once(found.report.texts())
        return self._result(found.maps, found.sizes)  # type: ignore[no-any-return]

    @eagerly
    def attribute_pair(
        self,
        inputs: Inputs,
        reference: Inputs,
        *,
        contrast: Literal["self"] | str | None = None,
        threshold: float | None = None,
    ) -> tuple[Maps, Maps]:
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
        if contrast not in (None, "self"):
            raise ValueError(
                f'Expected `contrast` of a pair to be "self" or None, but got {describe(contrast)}; `attribute` takes'
                " the number of another reference."
            )
        B, K = len(inputs[0]), len(reference[0])
        own, less = pair_index(B, K), self._less(contrast, threshold, K, B)

        def both_sides(constants: bool) -> tuple[Maps, Maps]:
            report = Report()
            with (
                self._record(inputs, None, report, constants=constants) as one,
                self._record(reference, None, report, constants=constants) as two,
            ):
                maps, back = Assembled(B), Assembled(K)
                for columns, found, _, _ in self._explain(one, Question(two.embedding, own, less), self._aligned(one)):
                    maps.put(slice(0, B), columns, found, 1)
                # A shared reference has one map for each input: its P maps become B of one.
                turned = Question(one.embedding, own if K == B else torch.arange(B)[None], less)
                for columns, found, _, _ in self._explain(two, turned, self._aligned(two), sides=SIDES[::-1]):
                    back.put(slice(0, K), columns, found, turned.own.shape[1])
            warn_once(report.texts())
            other = [M if K == B else M.transpose(0, 1).contiguous() for M in back.tensors]
            return self._result(maps.tensors, one.sizes), self._result(other, two.sizes)

        return with_constants(both_sides)

    @eagerly
    def explain(
        self,
        inputs: Tensors,
        ask: Ask,
        additional_forward_args: object | None = None,
        *,
        internal_batch_size: int | None = None,
        layer_input: bool = False,
        relu: bool = False,
        summed: bool = True,
        signed: bool = False,
        sides: tuple[str, str] = SIDES,
    ) -> Explained:
        """
        The maps of inputs, of which at most so many at a time go through the encoder: what all calls are made of.

        ``ask`` gives the question about some of the inputs, from their embeddings and their rows. Nobody is warned:
        see ``report``.
        """

        B, aligned = len(inputs[0]), None

        def attempt(constants: bool) -> Explained:
            report, agreed = Report(), aligned
            embeddings, maps, signed_maps, valid = (Assembled(B) for _ in range(4))
            for rows in slices(B, internal_batch_size):
                args = cut_arguments(additional_forward_args, rows, B)
                with self._record(cut(inputs, rows), args, report, layer_input, constants) as recording:
                    here = self._aligned(recording)
                    both = here if agreed is None else [a and b for a, b in zip(agreed, here)]
                    if rows.start and both != agreed:
                        raise _RoutesDifferError(both)
                    agreed, question = both, ask(recording.embedding, rows)
                    P = question.own.shape[1]
                    embeddings.put(rows, None, [recording.embedding])
                    for columns, plain, of_terms, known in self._explain(
                        recording, question, agreed, rows.start, relu, summed, signed, internal_batch_size, sides
                    ):
                        maps.put(rows, columns if summed else None, plain, P)
                        signed_maps.put(rows, columns, of_terms, P)
                        valid.put(rows, columns, [known], P)
            return Explained(
                embeddings.tensors[0],
                maps.tensors,
                signed_maps.tensors,
                valid.tensors[0],
                agreed or [],
                recording.sizes,
                report,
            )

        while True:
            try:
                return with_constants(attempt)
            except _RoutesDifferError as error:
                aligned = error.args[0]

    def _explain(
        self,
        recording: Recording,
        question: Question,
        aligned: list[bool],
        first: int = 0,
        relu: bool = False,
        summed: bool = True,
        signed: bool = False,
        most: int | None = None,
        sides: tuple[str, str] = SIDES,
    ) -> Iterator[tuple[slice, list[Tensor], list[Tensor], Tensor]]:
        """
        For some references at a time the maps of recorded inputs, zero where they mean nothing, the signed maps if
        they are wanted, and which pairs mean something. ``first`` is the number of the first input in its call.
        """
        P, valid = question.own.shape[1], []
        for columns in slices(P, min(most or P, at_once(recording.embedding))):
            with torch.no_grad():
                pairs = Pairs(recording, replace(question, own=question.own[:, columns]), P, self)
                known = self._valid(pairs)
                found = [self._maps(pairs, aligned, plain, summed) for plain in ((True, False) if signed else (True,))]
                shaped = [
                    [masked(M, known).reshape(*M.shape[:2], *A.shape[2:]) for M, A in zip(maps, recording.activations)]
                    for maps in found
                ]
            maps = [(F.relu(M) if relu else M).to(A.dtype) for M, A in zip(shaped[0], recording.activations)]
            valid.append(known)
            yield columns, maps, shaped[-1] if signed else [], known
        note_unusable(recording, question, torch.cat(valid, 1), first, sides)

    @abstractmethod
    def _maps(self, pairs: Pairs, aligned: list[bool], plain: bool, summed: bool) -> list[Tensor]:
        """
        M (B, P, N) for each of the recorded activations, or, not summed, the terms (B, C, N) that add up to it. Not
        ``plain``, the map of the terms themselves. What it is for pairs that are not valid does not matter.
        """

    def _ask(
        self,
        inputs: Tensors,
        target: TargetType,
        additional_forward_args: object | None,
        reference: Inputs | None,
        reference_embedding: Tensor | None,
        contrast: Any,
        threshold: float | None,
        most: int | None,
        every: bool = False,
    ) -> Ask:
        """The question about one reference for each input, or about every reference."""
        question = self._question(
            inputs, target, additional_forward_args, reference, reference_embedding, contrast, threshold, most, every
        )
        return lambda z, rows: question.of(rows)

    def _valid(self, pairs: Pairs) -> Tensor:
        """Which maps (B, P) mean something; the others are zero."""
        return pairs.valid

    def _aligned(self, recording: Recording) -> list[bool]:
        """Which of the recorded activations need no gradient; nothing where that is no question."""
        return []

    def _needs_graph(self) -> bool:
        """Whether the maps may need the gradient of the embedding with respect to the layer."""
        return False

    def _record(
        self,
        inputs: Tensors,
        additional_forward_args: object | None,
        report: Report,
        layer_input: bool = False,
        constants: bool = False,
    ) -> AbstractContextManager[Recording]:
        _check_layer(self.layer)
        return record(
            Encoder(self._encoder(), self._selector(), self.reshape_transform, self.device_ids),
            self.layer if isinstance(self.layer, list) else [self.layer],
            inputs,
            additional_forward_args,
            report,
            layer_input=layer_input,
            graph=self._needs_graph() and not torch.is_inference_mode_enabled(),
            constants=constants,
        )

    def _result(self, tensors: list[T], sizes: list[int]) -> Any:
        """Captum's form of what each tensor has: a tuple for a layer of several, a list for a list of layers."""
        rest = iter(tensors)
        layers = [tuple(next(rest) for _ in range(size)) for size in sizes]
        results = [layer if len(layer) > 1 else layer[0] for layer in layers]
        return results if isinstance(self.layer, list) else results[0]


def masked(values: Tensor, valid: Tensor) -> Tensor:
    """Values (B, P, ...), or (B, C, ...) for P = 1, zero for pairs (B, P) that are not valid."""
    return torch.where(valid[..., None], values, torch.zeros_like(values))


def with_constants(run: Callable[[bool], T]) -> T:
    """run(True): with constant weights, which spares memory; where the encoder needs their gradients, run(False)."""
    try:
        return run(True)
    except (WeightsNeededError, CheckpointError):
        pass
    return run(False)


def _check_layer(layer: object) -> None:
    layers = layer if isinstance(layer, list) else [layer]
    if not layers or not all(isinstance(m, nn.Module) for m in layers):
        hint = "; pass model.get_submodule(name)" if any(isinstance(m, str) for m in layers) else ""
        got = f"a list of {[type(m).__name__ for m in layers]}" if isinstance(layer, list) else describe(layer)
        raise TypeError(f"Expected `layer` to be a module or a list of modules, but got {got}{hint}.")
