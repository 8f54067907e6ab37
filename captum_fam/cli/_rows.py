"""The rows of ``captum-fam explain``: maps of the query for each reference, and of the references for the query."""

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import captum.attr
import torch
from torch import Tensor, nn

from captum_fam._checks import did_you_mean, warn_once
from captum_fam.encoders import one_line
from captum_fam.engine.question import Less, Question, less_of
from captum_fam.methods.by_name import OF_SIMILARITIES, explain_references, make_method
from captum_fam.methods.correspondence_map import CorrespondenceMap, less_the_others
from captum_fam.methods.label_free_activation_map import LabelFreeActivationMap
from captum_fam.methods.margins import are_opposite, texts_of

USUAL = ("map", "self", "alike")  # the rows where no method is named

Maps: TypeAlias = list[Tensor | None]  # (h, w) each, or None for a sentence, which has no places


@dataclass(frozen=True)
class Asked:
    """
    What is subtracted from each score: the score of another reference, by its index, the mean of the rest, the share
    that the query has with itself, a threshold, or nothing.
    """

    contrast: int | str | None = None
    threshold: float | None = None
    option: str = ""  # as the user gave it
    words: str = ""

    @property
    def of_each_side(self) -> bool:
        """Whether references are explained alike; a contrast with other references explains the query alone."""
        return self.contrast == "self" or self.threshold is not None

    def less(self, similarity: str, references: int) -> Less:
        return less_of(self.contrast, self.threshold, similarity, references, 1)

    def margins(self, scores: Sequence[float]) -> list[float]:
        """What the maps explain: each score less what is subtracted. Empty if that is the score itself, or nothing."""
        if self.threshold is not None:
            return [score - self.threshold for score in scores]
        if isinstance(self.contrast, int):
            return [score - scores[self.contrast] for score in scores]
        if self.contrast == "rest":
            return [score - (sum(scores) - score) / (len(scores) - 1) for score in scores]
        return []


NOTHING, ITSELF = Asked(), Asked("self", option="--contrast self", words='"self"')


@dataclass(frozen=True)
class Compared:
    """
    A query (1, 3, H, W) and its K references, which have numbers: images (n, 3, H, W), then sentences, which have only
    embeddings.
    """

    model: nn.Module
    layer: nn.Module
    layer_name: str
    similarity: str
    query: Tensor
    images: Tensor
    z: Tensor
    s: Tensor
    numbers: Sequence[int]


@dataclass(frozen=True)
class Row:
    """The maps of one method, on both sides."""

    name: str
    method: Any
    asked: Asked
    route: str | None
    label: str
    here: Maps
    there_label: str
    there: Maps

    def against(self, margins: Sequence[float], scores: Sequence[float], there: bool = False) -> list[int]:
        """The references whose map, here or there, adds up to the opposite sign of the margin that it explains."""
        largest = max((abs(score) for score in scores if math.isfinite(score)), default=0)
        means = [0.0 if M is None else M.mean().item() for M in (self.there if there else self.here)]
        kind = type(self.method)
        return [k for k, (mean, margin) in enumerate(zip(means, margins)) if are_opposite(kind, mean, margin, largest)]


def check_method(name: str, asked: Asked, similarity: str, images: int) -> None:
    """
    Checks that a method can answer what is asked.

    Raises:
        ValueError: there is no such method, or it cannot answer this; ``images`` is the number of references that are
            images.
    """
    if name not in OF_SIMILARITIES:
        of_captum = isinstance(getattr(captum.attr, name, None), type)
        hint = " captum-fam compare has those of Captum." if of_captum else did_you_mean(name, OF_SIMILARITIES)
        short = {"".join(filter(str.isupper, full)): full for full in OF_SIMILARITIES}  # FAM, as the figure says
        if name.upper() in short:
            hint = f" Did you mean {short[name.upper()]!r}?"
        raise ValueError(f"--method must be one of {', '.join(OF_SIMILARITIES)}, but got {name}.{hint}")
    kind, option = OF_SIMILARITIES[name], asked.option
    if asked.of_each_side and (kind is CorrespondenceMap or not kind._of_terms):
        raise ValueError(
            f"{name} has no {option}: take --method FeatureActivationMap, SimilarityDecomposition or"
            " IntegratedDecomposition"
        )
    if asked.of_each_side and similarity == "euclidean":
        raise ValueError(f"{option} needs --similarity cosine or dot: by euclidean, an image's score with itself is 0")
    if kind is LabelFreeActivationMap and option:
        raise ValueError(f"{name} knows of no reference, so it has no {option}: take another --method")
    if kind is CorrespondenceMap:
        needed = 2 if asked.contrast == "rest" else asked.contrast + 1 if isinstance(asked.contrast, int) else 1
        if images < needed:
            what = "two images" if asked.contrast == "rest" else "an image"
            raise ValueError(
                f"{name} needs {what}{' for ' + option if option else ''}: a sentence has no places that could look"
                " alike; take another --method"
            )


def usual_rows(compared: Compared, asked: Asked) -> list[Row]:
    """The default rows: what is in common, what is particular to the match ("self"), and what looks alike."""
    common, own, alike = "in common: FAM", 'particular to this match: "self"', "what looks alike"
    there = f"FAM: {asked.words}" if asked.of_each_side else common
    first = asked.words if asked.option and not asked.of_each_side else there
    rows = [_row("FeatureActivationMap", compared, asked, USUAL[0], (first, there))]
    if compared.similarity != "euclidean":
        rows.append(_row("SimilarityDecomposition", compared, ITSELF, USUAL[1], (own, own)))
    if len(compared.images):
        several = len(compared.images) > 1
        alike += ", less the others" if several else ""
        rest = Asked("rest") if several else NOTHING
        rows.append(_row("CorrespondenceMap", compared, rest, USUAL[2], (alike, alike)))
    return rows


def rows_of(methods: Sequence[str], encoder: str, compared: Compared, asked: Asked, own_layer: bool) -> list[Row]:
    """
    The rows of methods. ``own_layer``: the user has named no layer, so a method may find its own.

    Raises:
        ValueError: one of them cannot explain this encoder.
    """
    rows = []
    for name in methods:
        label = f"{name}:\n{asked.words}" if asked.option else name
        both = asked.of_each_side or name == "CorrespondenceMap"
        try:
            rows.append(_row(name, compared, asked, name, (label, label if both else name), own_layer))
        except Exception as error:  # whatever a method raises for an encoder that it does not fit
            lrp = str(error).startswith("LRP ")  # whose advice is for Python
            if isinstance(error, ValueError) and not lrp:
                raise
            why = str(error).partition(". ")[0] if lrp else one_line(error)
            raise ValueError(f"{name} failed on {encoder} ({why}): take another --method or --layer") from error
    return rows


def _row(
    kind: str, compared: Compared, asked: Asked, name: str, labels: tuple[str, str], own_layer: bool = False
) -> Row:
    layer = None if own_layer and kind == "IntegratedDecomposition" else compared.layer
    takes_progress = "show_progress" in inspect.signature(OF_SIMILARITIES[kind]).parameters
    options = {"show_progress": sys.stderr.isatty()} if takes_progress else {}
    method: Any = make_method(kind, "captum-fam explain", compared.model, layer, compared.similarity, **options)
    query, images, K = compared.query, compared.images, len(compared.s)
    numbers = {"query": [1], "references": compared.numbers}

    def found(inputs: Tensor, s: Tensor, asked: Asked, references: Tensor, sides: tuple[str, str]) -> Any:
        own, less = torch.arange(len(s), device=s.device)[None], asked.less(compared.similarity, len(s))
        question = Question(s, own, less.to(s.device) if isinstance(less, Tensor) else less)
        explained = explain_references(method, (inputs,), lambda *_: question, (references,), sides=sides)
        unusable = explained.report.unusable  # numbered from 0, and without what could not be read
        explained.report.unusable = {side: {numbers[side][n] for n in rows} for side, rows in unusable.items()}
        warn_once(texts_of(explained.report, question.less))
        return explained

    route, matched = None, kind == "CorrespondenceMap"
    if matched and asked.contrast == "rest":
        here, there = less_the_others(method, query, images)
    else:
        s = compared.s[: len(images)] if matched else compared.s
        explained = found(query, s, asked, images, ("query", "references"))
        here = explained.maps[0]
        route = method.routes(explained.aligned, explained.sizes) if hasattr(method, "routes") else None
        if not len(images):
            there = here[:, :0]
        elif matched:
            contrast = images[[asked.contrast]] if isinstance(asked.contrast, int) else None
            there = method.attribute(images, reference=query, contrast=contrast)
            if contrast is not None:
                there[asked.contrast] = 0  # less itself, as on the query
        else:
            there = found(images, compared.z, asked if asked.of_each_side else NOTHING, query, ("references", "query"))
            there = there.maps[0]
    mine, theirs = (_planes(maps, K, compared.layer_name) for maps in (here, there))
    return Row(name, method, asked, route, labels[0], mine, labels[1], theirs)


def _planes(maps: Any, count: int, layer: str) -> Maps:
    """``count`` maps (h, w), in double precision on the CPU, with exactly their numbers."""
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise ValueError(f"layer {layer} does not give one map (B, C, h, w): name another with --layer")
    planes = [*maps.flatten(0, 1).cpu().double()]
    return [*planes, *[None] * (count - len(planes))]
