"""The pairs of a part: the order in which their images go through the encoder, and the result of each pair."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_fam._checks import warn_once
from captum_fam.encoders._ready import ReadyEncoder, planes
from captum_fam.engine.question import Less, Question, usable
from captum_fam.methods.by_name import explain_references
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.margins import are_opposite, texts_of
from captum_fam.methods.similarity_attribution import SimilarityAttribution
from captum_fam.similarity import channel_contributions, widen

QUERY, REFERENCE = 0, 1
NAMES = ("query", "reference")
# The sides that are explained, by what users call them.
SIDES = {"query": (QUERY,), "reference": (REFERENCE,), "both": (QUERY, REFERENCE)}
_SCORED_AT_ONCE = 1024


class Failure(NamedTuple):
    """Why a pair has neither score nor map."""

    kind: str
    text: str


NO_SIMILARITY = Failure(
    "no similarity", "no similarity to explain: an embedding is zero or not finite, or they overflow"
)
Key: TypeAlias = str | int  # of an embedding: the path of its image, or its row in a file of embeddings
Images: TypeAlias = dict[str, "Tensor | Failure"]
Group: TypeAlias = tuple[str, list[int]]  # an image to explain, and the numbers of its pairs
Reading: TypeAlias = dict[str, "Future[Tensor | Failure]"]
Stored: TypeAlias = tuple[NDArray[Any], float]


class Step(NamedTuple):
    """One step of work: what is done with a few images at a time."""

    paths: Iterable[str]
    run: Callable[[Images], None]


_NOTHING = Step((), lambda _: None)


def in_turn(steps: Iterable[Step], read: Callable[[str], "Tensor | Failure"], threads: int) -> None:
    """Runs steps while the images of the next step are read. An image of two successive steps is read once."""
    with ThreadPoolExecutor(threads) as pool:

        def reading(step: Step, before: Reading) -> Reading:
            return {path: before.get(path) or pool.submit(read, path) for path in dict.fromkeys(step.paths)}

        images: Reading = {}
        for step, after in pairwise(chain([_NOTHING], steps, [_NOTHING])):
            following = reading(after, images)  # while the model is at work
            step.run({path: image.result() for path, image in images.items()})
            images = following


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


@dataclass(frozen=True)
class Explaining:
    """How pairs are explained: a method on a loaded encoder, what is subtracted from scores, and how many at a time."""

    encoder: ReadyEncoder
    layer: str
    method: SimilarityAttribution
    less: Less
    batch_size: int
    running: Callable[[], AbstractContextManager[None]]

    @property
    def needs_images(self) -> bool:
        """Whether the images of the references are needed, not only their embeddings."""
        return isinstance(self.method, CorrespondenceMap)


class Work:
    """
    Explains pairs. An image of the side that is explained goes through the encoder once for all of its pairs, wherever
    they are in the list.

    Attributes:
        scores: of the pairs by their numbers.
        maps: of the pairs by side and number, as float16 with a scale.
        opposite: the pairs, by side, whose map adds up to the other sign than its margin, score - threshold.
    """

    def __init__(
        self, explaining: Explaining, keys: tuple[Sequence[Key | None], Sequence[Key | None]], stored: dict[Key, Tensor]
    ) -> None:
        """``keys`` of the queries and references of the pairs; ``stored`` embeddings of the latter, if they have no
        images."""
        self.by, self.keys = explaining, keys
        self.embeddings: tuple[dict[Key, Tensor], dict[Key, Tensor]] = ({}, dict(stored))
        self.scores: dict[int, float] = {}
        self.maps: tuple[dict[int, Stored], dict[int, Stored]] = ({}, {})
        self.opposite: tuple[set[int], set[int]] = (set(), set())
        self._whole = [n for n, both in enumerate(zip(*keys)) if None not in both]
        self._unreadable: dict[Key, Failure] = {}
        self._unlike: set[int] = set()

    def steps(self, sides: Sequence[int], stored: bool) -> list[Step]:
        """The steps in their order: the embeddings of one side, the maps of the other, and perhaps of both."""
        steps = [] if stored else self.embedding(1 - sides[0])
        for side in sides:
            steps += self._explaining(side)
        return steps

    def failure(self, number: int) -> Failure | None:
        """Why a pair whose sides are both known has no map."""
        for keys in self.keys:
            key = keys[number]
            if key is not None and key in self._unreadable:
                return self._unreadable[key]
        return NO_SIMILARITY if number in self._unlike else None

    def embedding(self, side: int) -> list[Step]:
        """The embeddings of one side's images."""

        def embed(images: Images) -> None:
            tensors = self._readable(images)
            if tensors:
                with self.by.running():
                    z = self.by.encoder.embed(self.by.encoder.batch(list(tensors.values())))
                self.embeddings[side].update(zip(tensors, z))

        paths: list[Any] = list(dict.fromkeys(self.keys[side][n] for n in self._whole))
        return [Step(some, embed) for some in chunks(paths, self.by.batch_size)]

    def _explaining(self, side: int) -> list[Step]:
        """Steps that explain one side. Images with about equally many pairs share a step, to fill the batches."""
        pairs: dict[Any, list[int]] = {}
        for number in self._whole:
            pairs.setdefault(self.keys[side][number], []).append(number)
        groups: list[Group] = list(pairs.items())
        if self.by.needs_images:  # all at once, they would not fit in memory
            groups = [(path, list(some)) for path, numbers in groups for some in chunks(numbers, self.by.batch_size)]
        together: list[list[Group]] = []
        for group in sorted(
            groups, key=lambda group: len(group[1])
        ):  # each batch has as many maps for each image as its longest group needs
            if not together or (len(together[-1]) + 1) * len(group[1]) > self.by.batch_size:
                together.append([])
            together[-1].append(group)
        return [self._step(side, some) for some in together]

    def _step(self, side: int, groups: list[Group]) -> Step:
        paths = [path for path, _ in groups]
        if self.by.needs_images:
            paths += [str(self.keys[1 - side][n]) for _, numbers in groups for n in numbers]
        return Step(paths, lambda images: self._explain(side, groups, images))

    def _explain(self, side: int, groups: list[Group], images: Images) -> None:
        """The maps of images for the other sides of their pairs, from one pass over them."""
        other, there, tensors = self.keys[1 - side], self.embeddings[1 - side], self._readable(images)
        known = tensors if self.by.needs_images else there
        found_of = {
            path: [n for n in numbers if other[n] in there and other[n] in known]
            for path, numbers in groups
            if path in tensors
        }
        some = [(path, numbers) for path, numbers in found_of.items() if numbers]
        if not some:
            return
        place = {key: k for k, key in enumerate(dict.fromkeys(other[n] for _, numbers in some for n in numbers))}
        own = torch.zeros(len(some), max(len(numbers) for _, numbers in some), dtype=torch.long)
        for row, (_, numbers) in zip(own, some):
            row[: len(numbers)] = torch.tensor([place[other[n]] for n in numbers])
        with self.by.running():
            found = self._found(
                [tensors[path] for path, _ in some],
                torch.stack([there[key] for key in place]),  # type: ignore[index]  # known
                own,
                [tensors[str(key)] for key in place] if self.by.needs_images else None,
            )
        for (path, numbers), z, scores, maps in zip(some, *found):
            self.embeddings[side][path] = z
            for number, score, values in zip(numbers, scores.tolist(), maps.numpy()):
                if np.isfinite(score) and np.isfinite(values).all():
                    self.scores.setdefault(number, score)
                    self.maps[side][number] = half(values)
                    if self._is_opposite(score, values):
                        self.opposite[side].add(number)
                else:
                    self._unlike.add(number)

    def _is_opposite(self, score: float, values: NDArray[Any]) -> bool:
        by = self.by
        if not isinstance(by.less, float):
            return False
        mean = float(values.mean(dtype=np.float64))
        return are_opposite(type(by.method), mean, score - by.less, max(abs(score), abs(by.less)))

    def _found(
        self, tensors: list[Tensor], s: Tensor, own: Tensor, others: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Embeddings (B, D) of images, their scores (B, P) for the references of the numbers own (B, P), and maps
        (B, P, h, w); scores that cannot be explained are not finite.
        """
        by, method = self.by, self.by.method
        found = explain_references(
            method,
            (by.encoder.batch(tensors),),
            lambda _, rows: Question(s, own[rows].to(s.device), by.less),
            None if others is None else (by.encoder.batch(others),),
            internal_batch_size=by.batch_size,
        )
        found.report.unusable.clear()  # those have an error each
        warn_once(texts_of(found.report, by.less))
        z, similarity = widen(found.embedding), method.similarity or "cosine"
        wide = s.to(z)
        row, column = torch.arange(own.numel()) // own.shape[1], own.flatten()
        scores = torch.cat(
            [
                channel_contributions(z[b], wide[k], similarity).sum(1)
                for b, k in zip(row.split(_SCORED_AT_ONCE), column.split(_SCORED_AT_ONCE))
            ]
        ).reshape(own.shape)
        valid = usable(z)[:, None] & usable(wide)[own] & found.valid
        scores = torch.where(valid, scores, torch.nan).cpu()
        return found.embedding, scores, planes(found.maps[0], by.layer).unflatten(0, own.shape)

    def _readable(self, images: Images) -> dict[str, Tensor]:
        self._unreadable |= {path: image for path, image in images.items() if isinstance(image, Failure)}
        return {path: image for path, image in images.items() if isinstance(image, Tensor)}


def half(values: NDArray[Any]) -> Stored:
    """Values as float16, and the scale to multiply them with."""
    largest = float(np.abs(values).max(initial=0))
    fits = largest == 0 or 2**-3 <= largest <= 2**15
    scale = 1.0 if fits else 2.0 ** (np.frexp(largest)[1] - 1)
    return (values / scale).astype(np.float16), scale
