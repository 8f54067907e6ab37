"""How a layer's maps are made: inputs recorded in chunks, references compared a few at a time, all put together."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_fam.engine.chunks import Assembled, Tensors, cut, cut_arguments, slices
from captum_fam.engine.path import Path
from captum_fam.engine.question import Pairs, Question, at_once, note_unusable
from captum_fam.engine.recording import Recording
from captum_fam.engine.report import SIDES, Report
from captum_fam.engine.untouched import eagerly
from captum_fam.engine.ways import Way, by_the_cheapest_way
from captum_fam.methods.on_layer import OnLayer

# The question about recorded inputs, from their embeddings and their rows in the call.
Ask: TypeAlias = Callable[[Tensor, slice], Question]
T = TypeVar("T")


_OF_ONE_DIMENSION = (
    "The embeddings have one dimension, so every cosine is 1 or -1, whatever the inputs. If the encoder returns a"
    ' score, pass the part of it that embeds; for a classifier of one output take similarity="dot".'
)


class _RoutesDifferError(Exception):
    """A chunk of inputs is not aligned, but those before it were."""


@dataclass(frozen=True)
class Explained:
    """
    The maps of B inputs for P references each.

    Attributes:
        embedding: of the inputs (B, D).
        maps: of each tensor that the layers gave (B, P, *spatial); if not summed, its terms (B, C, *spatial).
        signed: the maps of the terms themselves, if asked for; differences of these maps are contrasts.
        valid: which pairs (B, P) can be explained; the maps of the others are zero.
        aligned: for each of those tensors, whether no gradient was taken.
        sizes: how many of them each layer gave.
        report: what to tell the user.
        missed: how far each layer's map is from what it should add up to (B, P), if asked for.
    """

    embedding: Tensor
    maps: list[Tensor]
    signed: list[Tensor]
    valid: Tensor
    aligned: list[bool]
    sizes: list[int]
    report: Report
    missed: list[Tensor]


class LayerExplanation(OnLayer):
    """A method that explains scores on a layer. Its family says how the map is made (:meth:`_maps`)."""

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
        delta: bool = False,
    ) -> Explained:
        """
        The maps of inputs; ``internal_batch_size`` of them go through the encoder at a time. All calls are made of
        this. ``ask`` returns the question about some of the inputs, from their embeddings and their rows. It warns
        nobody: see ``report``.
        """
        B = len(inputs[0])

        def attempt(layers: list[nn.Module], aligned: list[bool] | None, way: Way) -> Explained:
            report, agreed, paths = Report(), aligned, self._paths(internal_batch_size, delta)
            embeddings, maps, signed_maps, invalid, missed = (Assembled(B) for _ in range(5))
            for rows in slices(B, self._inputs_at_once(internal_batch_size, delta)):
                args = cut_arguments(additional_forward_args, rows, B)
                for number, path in enumerate(paths):
                    path = path and replace(path, rows=rows, inputs=B)
                    with self._record(cut(inputs, rows), args, report, layer_input, way, path, layers) as recording:
                        here = self._aligned(recording)
                        both = here if agreed is None else [a and b for a, b in zip(agreed, here)]
                        if (rows.start or number) and both != agreed:
                            raise _RoutesDifferError(both)
                        agreed, question = both, ask(recording.embedding, rows)
                        if recording.embedding.shape[1] == 1 and self._similarity() == "cosine":
                            report.warnings.append(_OF_ONE_DIMENSION)
                        P = question.own.shape[1]
                        if not number:
                            embeddings.put(rows, None, [recording.embedding])
                        for columns, part in self._explain(
                            recording,
                            question,
                            agreed,
                            rows.start,
                            relu=relu,
                            summed=summed,
                            signed=signed,
                            most=internal_batch_size,
                            sides=sides,
                            whole=len(paths) == 1,
                            delta=delta,
                        ):
                            add = bool(number)
                            maps.put(rows, columns if summed else None, part.maps, P, add)
                            signed_maps.put(rows, columns, part.signed, P, add)
                            missed.put(rows, columns, part.missed, P, add)
                            invalid.put(rows, columns, [~part.valid], P, add)
                    sizes, dtypes = recording.sizes, [A.dtype for A in recording.activations]
                    del recording, question  # the next chunk needs the memory
            valid = ~invalid.tensors[0]
            if len(paths) > 1:  # a pair that is invalid in one part of the path is zero in all
                maps.tensors = [
                    M.masked_fill(~valid.reshape(*valid.shape, *[1] * (M.ndim - 2)), 0) for M in maps.tensors
                ]
                missed.tensors = [m.masked_fill(~valid, 0) for m in missed.tensors]
            return Explained(
                embeddings.tensors[0],
                [_shown(M, dtype, relu) for M, dtype in zip(maps.tensors, dtypes)],
                signed_maps.tensors,
                valid,
                agreed or [],
                sizes,
                report,
                missed.tensors,
            )

        found = []
        for layers in self._together(inputs, additional_forward_args):
            aligned = None
            while True:
                try:
                    found.append(by_the_cheapest_way(partial(attempt, layers, aligned)))
                    break
                except _RoutesDifferError as error:
                    aligned = error.args[0]
        return found[0] if len(found) == 1 else _of_several(found)

    def _explain(
        self,
        recording: Recording,
        question: Question,
        aligned: list[bool],
        first: int = 0,
        *,
        relu: bool = False,
        summed: bool = True,
        signed: bool = False,
        most: int | None = None,
        sides: tuple[str, str] = SIDES,
        whole: bool = True,
        delta: bool = False,
    ) -> Iterator[tuple[slice, "_Part"]]:
        """
        Yields the maps of recorded inputs for some references at a time, zero where a map means nothing. If not
        ``whole``, the inputs are part of a path, and there is more to add. ``first`` is the number of the first input
        in its call.
        """
        P, valid = question.own.shape[1], []
        for columns in slices(P, min(most or P, at_once(recording.embedding))):
            with torch.no_grad():
                pairs = Pairs(recording, replace(question, own=question.own[:, columns]), P, self)
                known = self._valid(pairs)
                found = [masked(M, known) for M in self._maps(pairs, aligned, plain=True, summed=summed)]
                of_terms = self._maps(pairs, aligned, plain=False, summed=summed) if signed else []
                missed = self._missed(pairs, found, summed) if delta else []
            layers = recording.activations
            found, of_terms = (
                [M.reshape(*M.shape[:2], *A.shape[2:]) for M, A in zip(maps, layers)] for maps in (found, of_terms)
            )
            valid.append(known)
            if whole:
                found = [_shown(M, A.dtype, relu) for M, A in zip(found, layers)]
            yield columns, _Part(found, of_terms, known, [torch.where(known, m, torch.zeros_like(m)) for m in missed])
        note_unusable(recording, question, torch.cat(valid, 1), first, sides)

    @abstractmethod
    def _maps(self, pairs: Pairs, aligned: list[bool], plain: bool, summed: bool) -> list[Tensor]:
        """
        M (B, P, N) for each of the recorded activations; if not summed, the terms (B, C, N) that add up to it. If not
        ``plain``, the map of the terms themselves. Values for pairs that are not valid are ignored.
        """

    def _valid(self, pairs: Pairs) -> Tensor:
        """Which maps (B, P) mean something; the others are zero."""
        return pairs.valid

    def _aligned(self, recording: Recording) -> list[bool]:
        """Which of the recorded activations need no gradient; empty for methods that take none."""
        return []

    def _together(self, inputs: Tensors, additional_forward_args: object | None = None) -> list[list[nn.Module]]:
        """The layers in groups; one forward pass explains a group."""
        return [self._layers(inputs, additional_forward_args)]

    def _inputs_at_once(self, internal_batch_size: int | None, delta: bool) -> int | None:
        return internal_batch_size

    def _paths(self, internal_batch_size: int | None, delta: bool) -> list[Path | None]:
        """The paths that add up to the maps."""
        return [None]

    def _missed(self, pairs: Pairs, maps: list[Tensor], summed: bool) -> list[Tensor]:
        """How far a part of a path is from what it should add up to (B, P), if it has a baseline's embedding."""
        return []


@dataclass(frozen=True)
class _Part:
    """The maps of some of the references; attributes as in Explained."""

    maps: list[Tensor]
    signed: list[Tensor]
    valid: Tensor
    missed: list[Tensor]


def _shown(M: Tensor, dtype: torch.dtype, relu: bool) -> Tensor:
    return (F.relu(M) if relu else M).to(dtype)


def _of_several(found: list[Explained]) -> Explained:
    """The result for layers that were explained one by one."""
    together = Report()
    for one in found:
        together.include(one.report)
    return Explained(
        found[0].embedding,
        [M for one in found for M in one.maps],
        [M for one in found for M in one.signed],
        torch.stack([one.valid for one in found]).all(0),
        [a for one in found for a in one.aligned],
        [size for one in found for size in one.sizes],
        together,
        [M for one in found for M in one.missed],
    )


def masked(values: Tensor, valid: Tensor) -> Tensor:
    """Values (B, P, ...), or (B, C, ...) for P = 1, zero for pairs (B, P) that are not valid."""
    return torch.where(valid[..., None], values, torch.zeros_like(values))
