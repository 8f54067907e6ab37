"""How a layer's maps are made: inputs recorded in chunks, references compared a few at a time, results put together."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from captum_fam._checks import check_callable, describe
from captum_fam.engine.chunks import Assembled, Tensors, cut, cut_arguments, slices
from captum_fam.engine.constants import WeightsNeededError
from captum_fam.engine.question import Pairs, Question, at_once, note_unusable
from captum_fam.engine.recording import Encoder, Recording, record
from captum_fam.engine.report import SIDES, Report
from captum_fam.engine.untouched import eagerly
from captum_fam.methods.similarity_attribution import Selector, SimilarityAttribution
from captum_fam.similarity import Similarity

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


class LayerExplanation(SimilarityAttribution):
    """A method whose map lies on a layer. Its family says how the map is made (:meth:`_maps`)."""

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
                sizes = recording.sizes
                del recording, question  # the next chunk needs the memory
            return Explained(
                embeddings.tensors[0],
                maps.tensors,
                signed_maps.tensors,
                valid.tensors[0],
                agreed or [],
                sizes,
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
        For some references at a time the maps of recorded inputs, zero where they mean nothing, all signed maps if they
        are wanted, and which pairs mean something. ``first`` is the number of the first input in its call.
        """
        P, valid = question.own.shape[1], []
        for columns in slices(P, min(most or P, at_once(recording.embedding))):
            with torch.no_grad():
                pairs = Pairs(recording, replace(question, own=question.own[:, columns]), P, self)
                known = self._valid(pairs)
                found = [masked(M, known) for M in self._maps(pairs, aligned, plain=True, summed=summed)]
                of_terms = self._maps(pairs, aligned, plain=False, summed=summed) if signed else []
            layers = recording.activations
            found, of_terms = (
                [M.reshape(*M.shape[:2], *A.shape[2:]) for M, A in zip(maps, layers)] for maps in (found, of_terms)
            )
            valid.append(known)
            yield columns, [(F.relu(M) if relu else M).to(A.dtype) for M, A in zip(found, layers)], of_terms, known
        note_unusable(recording, question, torch.cat(valid, 1), first, sides)

    @abstractmethod
    def _maps(self, pairs: Pairs, aligned: list[bool], plain: bool, summed: bool) -> list[Tensor]:
        """
        M (B, P, N) for each of the recorded activations, or, not summed, the terms (B, C, N) that add up to it. Not
        ``plain``, the map of the terms themselves. What it is for pairs that are not valid does not matter.
        """

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
