"""Which similarities a call explains, and the terms that they are made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from captum_fam._checks import check_dimensions, describe, reference_index, warn
from captum_fam.engine import formula
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.recording import Recording
from captum_fam.engine.report import SIDES
from captum_fam.similarity import Similarity, exact, largest, widen

# What is subtracted from a score: that to another reference, by its number (B, 1), the mean of those to the rest, the
# share that the input has with itself, a threshold, for all or for each input (B, 1) in floating point, or nothing.
Less: TypeAlias = Tensor | Literal["rest", "self"] | float | None
Once: TypeAlias = Callable[[object, Callable[[], Tensor]], Tensor]

# How many terms are made at a time: on a CPU as many as fit its cache, which is several times faster.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**18, 2**24


class Terms(Protocol):
    """The terms that a method makes of a pair of embeddings, and what they contribute to the score."""

    def terms(self, z: Tensor, s: Tensor) -> Tensor: ...
    def contributions(self, z: Tensor, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class References:
    """K references, as embeddings (K, D) or as inputs of the encoder."""

    tensors: Tensors
    are_inputs: bool = False

    def __len__(self) -> int:
        return len(self.tensors[0])


@dataclass(frozen=True)
class Question:
    """
    Which similarities are explained.

    Attributes:
        s: embeddings (K, D) of the references.
        own: the numbers (B, P), or (1, P) for all inputs, of the references that each input is compared with.
        less: what is subtracted from these similarities.
    """

    s: Tensor
    own: Tensor
    less: Less = None

    @property
    def other(self) -> Tensor | None:
        """The numbers (B, 1) of the references whose scores are subtracted; None if something else is."""
        return self.less if isinstance(self.less, Tensor) and not self.less.is_floating_point() else None

    def of(self, rows: Tensor | slice) -> "Question":
        """The question about the inputs of these rows."""
        rows = rows.to(self.own.device) if isinstance(rows, Tensor) else rows
        own = self.own if len(self.own) == 1 else self.own[rows]
        return replace(self, own=own, less=self.less[rows] if isinstance(self.less, Tensor) else self.less)

    def terms(self, z: Tensor, method: Terms, once: Once = lambda _, compute: compute()) -> Tensor:
        """
        The method's t (B, P, D) for embeddings z (B, D), less the terms of what is subtracted. ``once`` keeps what all
        parts of a question share.
        """
        check_dimensions(z, self.s)
        with exact(z):
            return self._terms(z, method, once)

    def _terms(self, z: Tensor, method: Terms, once: Once) -> Tensor:
        t = method.terms(z[:, None], self.s[self.own].to(z))
        if self.less is None:
            return t
        if self.other is not None:
            return formula.less_reference(t, method.terms(z[:, None], self.s[self.other].to(z)))
        share: Tensor | float
        if isinstance(self.less, Tensor):
            share = self.less.to(z)[..., None]
        elif isinstance(self.less, float):
            share = self.less
        elif self.less == "rest":
            return formula.less_rest(t, once("total", lambda: self._total(z, method)), len(self.s))
        else:
            share = method.contributions(z[:, None], t).sum(2, keepdim=True)
        return formula.less_own(t, once("own", lambda: self._own(z, method)), share)

    def scores(self, z: Tensor, method: Terms, once: Once = lambda _, compute: compute()) -> Tensor:
        """The sums of what the terms contribute, (B, P)."""
        return method.contributions(z[:, None], self.terms(z, method, once)).sum(2)

    def _total(self, z: Tensor, method: Terms) -> Tensor:
        """The sum (B, 1, D) of t over all references, made of a few at a time."""
        total = torch.zeros_like(z)[:, None]
        for part in self.s.split(at_once(z)):
            total += method.terms(z[:, None], part.to(z)).sum(1, keepdim=True)
        return total

    def _own(self, z: Tensor, method: Terms) -> Tensor:
        """t(z, z) / score(z, z) (B, 1, D); its score is one."""
        wide = z[:, None] if z.device.type == "mps" else z[:, None].double()  # for squares that underflow
        t = method.terms(wide, wide)
        score = method.contributions(wide, t).sum(2, keepdim=True)
        if (usable(z) & (score[:, 0, 0] == 0)).any():
            raise ValueError(
                f"{'contrast=' + repr(self.less) if isinstance(self.less, str) else '`threshold`'} compares with the"
                ' score of an input with itself, but here that is 0, as for a distance. Pass similarity="cosine" or'
                ' "dot", or contrast with another reference.'
            )
        return (t / torch.where(score == 0, torch.ones_like(score), score)).to(z.dtype)


class Pairs:
    """
    A question about recorded inputs.

    Attributes:
        recording: of the inputs' forward pass.
        question: about them.
        n_references: how many references each input has in all, if this question is a part of a larger one.
        z: embeddings (B, D) of the inputs.
        t: the method's terms (B, P, D).
        c: what they contribute to the score (B, P, D).
        valid: which pairs (B, P) can be explained: z, t and c are finite, and the embeddings are not zero.
    """

    def __init__(self, recording: Recording, question: Question, n_references: int, method: Terms) -> None:
        self.recording = recording
        self.question = question
        self.n_references = n_references
        self.z = widen(recording.embedding)
        self.t = question.terms(self.z, method, recording.once)
        self.c = method.contributions(self.z[:, None], self.t)
        others = [] if question.other is None else [question.other]
        self.valid = usable_inputs(recording)[:, None] & largest(self.c)[..., 0].isfinite()
        for index in (question.own, *others):
            self.valid = self.valid & usable(question.s[index].to(self.z))


def at_once(z: Tensor) -> int:
    """How many references are compared with the embeddings z (B, D) at once."""
    return max(1, (_AT_ONCE if z.device.type == "cpu" else _AT_ONCE_ELSEWHERE) // max(1, z.numel()))


def usable(x: Tensor) -> Tensor:
    """Which embeddings (..., D) are finite and not zero."""
    size = largest(x)[..., 0]
    return size.isfinite() & (size > 0)


def usable_inputs(recording: Recording) -> Tensor:
    """Which inputs (B,) have embeddings that are finite and not zero, and finite ones all along their path."""
    weights = () if recording.path is None else recording.path.weights
    on_path = recording.on_path[[n for n, weight in enumerate(weights) if weight]]
    return usable(widen(recording.embedding)) & on_path.isfinite().all(2).all(0)


def note_unusable(
    recording: Recording, question: Question, valid: Tensor, first: int = 0, sides: tuple[str, str] = SIDES
) -> None:
    """Reports why pairs (B, P) are not valid; the first of the inputs has this number in its call."""
    if valid.all():
        return
    z = widen(recording.embedding)
    references = ~usable(question.s.to(z.dtype))
    if isinstance(question.less, Tensor) or question.less != "rest":
        compared = torch.zeros_like(references)
        for index in (question.own, question.other):
            if index is not None:
                compared[index] = True
        references &= compared
    recording.report.note_unusable(sides[0], ~usable_inputs(recording), first)
    recording.report.note_unusable(sides[1], references)


def pair_index(inputs: int, references: int) -> Tensor:
    """The reference of each input (B, 1), where they are paired or share one."""
    if references not in (1, inputs):
        raise ValueError(
            f"Expected `reference` to hold one reference or {inputs}, one for each input, but got {references}."
        )
    return reference_index("reference", None, references, inputs)[:, None]


def less_of(contrast: Any, threshold: Any, similarity: Similarity | None, references: int, inputs: int) -> Less:
    """What ``contrast`` or ``threshold`` subtracts from the scores."""
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, Real):
            raise TypeError(f"Expected `threshold` to be a number, a score, but got {describe(threshold)}.")
        if not math.isfinite(threshold):
            raise ValueError(f"Expected `threshold` to be a finite score, but got {threshold}.")
        if contrast is not None:
            raise ValueError("Expected `contrast` or `threshold`, but got both; pass one of them.")
    if contrast is None and threshold is None:
        return None
    if isinstance(contrast, str) and contrast not in ("rest", "self"):
        raise ValueError(
            f'Expected `contrast` to be the number of a reference, "rest" or "self", but got {contrast!r}.'
        )
    if threshold is not None or (isinstance(contrast, str) and contrast == "self"):
        what = "`threshold`" if contrast is None else 'contrast="self"'
        if similarity == "euclidean":
            raise ValueError(
                f'{what} compares with the score of an input with itself, but for "euclidean" that is 0. Pass'
                ' similarity="cosine" or "dot", or contrast with another reference.'
            )
        if threshold is not None and similarity == "cosine" and abs(threshold) > 1:
            warn(
                f"A cosine lies between -1 and 1, so a threshold of {threshold:g} decides nothing. For embeddings"
                " of length 1, a distance d is a cosine of 1 - d * d / 2."
            )
        return "self" if contrast is not None else float(threshold)
    if references < 2:
        raise ValueError(
            f"contrast={contrast!r} needs at least two references, but there is {references}; pass more of them, such"
            ' as reference=torch.cat([match, other]), contrast="self" for one alone, or leave `contrast` out.'
        )
    if isinstance(contrast, str):
        return "rest"
    return reference_index("contrast", contrast, references, inputs)[:, None]
