"""What all explanations of a decision among references share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from captum_fam._checks import check_internal_batch_size, describe, warn_once
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.question import Question, less_of
from captum_fam.methods.by_name import explain_references, matched
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.dimension_attribution import DimensionAttribution
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.label_free_activation_map import LabelFreeActivationMap
from captum_fam.methods.layer_explanation import Explained
from captum_fam.methods.margins import ADD_UP_TO_NOTHING, ROUNDING
from captum_fam.methods.similarity_attribution import SimilarityAttribution
from captum_fam.similarity import widen

_CLOSE = 0.05  # how far a map, with the part of the references, may be from adding up to a margin


@dataclass(frozen=True)
class Origin:
    """
    What an explanation was made of: the method, the queries, the embeddings of the references (K, D) or (B, K, D), what
    else a page of its task shows, and what the maps explain.
    """

    method: SimilarityAttribution
    queries: Tensors
    references: Tensor
    internal_batch_size: int | None
    others: Any
    explains: str = "in common"


@dataclass(frozen=True, repr=False, eq=False)
class Explanation:
    r"""
    The maps of B queries for K references each.

    Attributes:
        similarities (Tensor): The score that the maps explain: the sums of the contributions, (B, K).
        constants (Tensor): The part of the similarities that belongs to the references alone, (B, K): minus the squared
                    length of the reference for SimilarityDecomposition of the squared distance, else zero. What biases,
                    or the baseline of ``n_steps``, contribute is neither on a map nor here.
        maps (Tensor): The map of each query for each of its references, (B, K, \*spatial).
        signed_maps (Tensor): Maps of the terms themselves, signed, in at least single precision,
                    (B, K, \*spatial); their differences are the contrast maps.
        explainable (Tensor): Which pairs have embeddings that are finite and not zero, (B, K).
        route (str): ``"aligned"`` or ``"jacobian"``, as in
                    :meth:`~captum_fam.FeatureActivationMap.route`; ``""`` for a method without routes.
    """

    similarities: Tensor
    constants: Tensor
    maps: Tensor
    signed_maps: Tensor
    explainable: Tensor
    route: str

    _origin: ClassVar[Origin | None] = None  # no field: neither copies nor files have the encoder and the images

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_origin"}

    def _remember(self, origin: Origin) -> None:
        object.__setattr__(self, "_origin", origin)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(maps={tuple(self.maps.shape)}, route={self.route!r})"

    def _made_of(self, what: str) -> Origin:
        """What this was made of; an error if that is gone."""
        if self._origin is None:
            raise ValueError(
                f"A copy of an explanation, or one from a file, has no images and no encoder, which {what} needs; take"
                " the one that the call returned."
            )
        return self._origin

    def _explored(self, query: int, what: str = "explore") -> tuple[Origin, Tensors]:
        """What this was made of, and the image (1, C, H, W) of a query."""
        origin, B = self._made_of(what), len(self.maps)
        if not isinstance(query, int) or isinstance(query, bool) or query not in range(B):
            raise ValueError(f"Expected `query` to be the number of one of {B} queries, from 0, but got {query!r}.")
        return origin, tuple(x[query : query + 1] for x in origin.queries)

    def _counted(self) -> Tensor:
        """Which references (B, K) count among "the rest"."""
        return torch.ones_like(self.explainable)

    def _difference(self, values: Tensor, own: Tensor, other: Tensor | Literal["rest"]) -> Tensor:
        """Values (B, K, ...) of the references ``own`` (B,), less those of ``other``, (B, ...)."""
        rows = torch.arange(len(values), device=values.device)
        mine = values[rows, own]
        if isinstance(other, Tensor):
            return mine - values[rows, other]
        rest = self._counted().clone()
        rest[rows, own] = False
        shape = (*rest.shape, *[1] * (values.ndim - 2))
        others = torch.where(rest.reshape(shape), values, torch.zeros_like(values)).sum(1)
        return mine - others / rest.sum(1).reshape(-1, *shape[2:])

    def _contrast(self, own: Tensor, other: Tensor | Literal["rest"]) -> Tensor:
        """Contrast maps (B, 1, *spatial), zero where they mean nothing."""
        maps, told = self._contrasted(own, other)
        warn_once([told] if told else [])
        return maps

    def _contrasted(self, own: Tensor, other: Tensor | Literal["rest"]) -> tuple[Tensor, str]:
        """Contrast maps (B, 1, *spatial), and the warnings about them."""
        if self._origin is not None:
            check_asked(self._origin.method, other, None)
        rows = torch.arange(len(own), device=own.device)
        valid = self.explainable[rows, own]
        if isinstance(other, Tensor):
            valid = valid & self.explainable[rows, other]
        found = self._difference(self.signed_maps, own, other)
        valid = valid & found.flatten(1).isfinite().all(1)
        shown = torch.where(valid.reshape(-1, *[1] * (found.ndim - 1)), found, torch.zeros_like(found))
        margins, constants = (self._difference(v, own, other) for v in (self.similarities, self.constants))
        return shown[:, None].to(self.maps.dtype), self._opposite(shown, margins, constants)

    def _opposite(self, maps: Tensor, margins: Tensor, constants: Tensor) -> str:
        """The warning if means of maps (B, *spatial) and the margins (B,) that they explain have opposite signs."""
        method = None if self._origin is None else self._origin.method
        if not len(maps) or isinstance(method, (CorrespondenceMap, *ADD_UP_TO_NOTHING)):
            return ""
        means = maps.flatten(1).mean(1).to(margins)
        least = ROUNDING * torch.where(self.similarities.isfinite(), self.similarities, 0).abs().amax(1)
        opposite = (margins * means < 0) & (margins.abs() > least) & (means.abs() > least) & margins.isfinite()
        if not opposite.any():
            return ""
        first = int(opposite.nonzero()[0])
        mean, constant, margin = (float(v[first]) for v in (means, constants, margins))
        if constant and abs(mean + constant - margin) < _CLOSE * (abs(mean) + abs(constant)):
            reason = f"the rest, {constant:.3g}, belongs to the references alone"
        elif isinstance(method, FeatureActivationMap):
            reason = "FAM's places do not add up to it; those of SimilarityDecomposition do, pass it as `method`"
        else:
            reason = "its places do not add up to the margin"
        return (
            f"The mean of a contrast map and the margin that it explains have opposite signs (queries"
            f" {opposite.nonzero().flatten().tolist()}; the first: {mean:.3g} and {margin:.3g}): {reason}."
        )

    def _beyond(self, own: Tensor, contrast: str | None, threshold: float | None) -> Tensor:
        """Maps (B, 1, *spatial) of the references ``own`` (B,), less a share of the query's own."""
        maps, told = beyond(self, own[:, None], contrast, threshold)
        warn_once(told[:1])
        return maps


def beyond(found: Explanation, own: Tensor, contrast: str | None, threshold: float | None) -> tuple[Tensor, list[str]]:
    """
    Maps (B, P, *spatial) of the references with these numbers (B, P), less the query's own share or a threshold, and
    the warnings about them.
    """
    origin = found._made_of('contrast with "self"' if threshold is None else "a threshold")
    check_asked(origin.method, contrast, threshold)
    s, (B, P) = origin.references, own.shape
    less = less_of(contrast, threshold, origin.method._similarity(), s.shape[-2], B)
    numbers = own  # of each query its own references
    if s.ndim == 3:
        numbers = own + s.shape[1] * torch.arange(B, device=own.device)[:, None]
    question = Question(s.flatten(0, -2), numbers.to(s.device), less)
    maps = explain_references(
        origin.method,
        origin.queries,
        lambda z, rows: question.of(rows),
        internal_batch_size=origin.internal_batch_size,
    ).maps[0]
    if threshold is None:
        return maps, []
    margins = (found.similarities - threshold).gather(1, own.to(found.similarities.device))
    nothing = torch.zeros_like(margins[:, 0])
    told = [found._opposite(maps[:, p], margins[:, p], nothing) for p in range(P)]
    return maps, [text for text in told if text]


def contrasted(found: Explanation, other: Any, contrast: Any, threshold: float | None) -> Tensor:
    """The contrast map of each reference (B, K, *spatial): with others (B,), "rest", "self" or a threshold."""
    (B, K), device = found.similarities.shape, found.maps.device
    if threshold is not None or (isinstance(contrast, str) and contrast == "self"):
        maps, told = beyond(found, torch.arange(K, device=device).expand(B, K), contrast, threshold)
    else:
        each = [found._contrasted(torch.full((B,), k, device=device), other) for k in range(K)]
        maps, told = torch.cat([one for one, _ in each], 1), [text for _, text in each if text]
    warn_once(
        [told[0] + (f" This holds for {len(told)} of the {K} references." if len(told) > 1 else "")] if told else []
    )
    return maps


def check_asked(method: Any, contrast: Any, threshold: Any) -> None:
    """Raises an error for what a method cannot answer, before anything is computed."""
    method.check_own_share(contrast, threshold)
    if isinstance(method, LabelFreeActivationMap) and (contrast is not None or threshold is not None):
        raise ValueError(
            "LabelFreeActivationMap knows of no reference, so it has neither a contrast nor a threshold; pass another"
            " `method`."
        )


def check_beyond(other: object, threshold: object) -> bool:
    """Whether a contrast is with the query itself or a threshold, not with other references."""
    if threshold is not None and other not in (None, "rest"):
        raise ValueError(f"Expected `other` or `threshold`, but got {describe(other)} and {describe(threshold)}.")
    return threshold is not None or (isinstance(other, str) and other == "self")


def explained(
    method: Any,
    queries: Tensors,
    references: Callable[[Tensor, slice], Tensor],
    internal_batch_size: int | None,
    match: Callable[[], Tensor],
) -> tuple[dict[str, Any], Explained, Tensor]:
    """
    The attributes of an Explanation, what they are made of, and the references. ``references`` returns the references
    (K, D) or (B, K, D) of queries, from their embeddings (B, D) and rows. ``match`` returns best matches
    (B, K, *spatial), for a method that compares places.
    """
    check_internal_batch_size(internal_batch_size)
    asked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def ask(z: Tensor, rows: slice) -> Question:
        with torch.no_grad():
            s = references(z, rows)
            own = torch.arange(s.shape[:-1].numel(), device=s.device).reshape(-1, s.shape[-2])
            question = Question(s.flatten(0, -2), own)
            wide = widen(question.s.to(z))
            constant = method.constant(wide) if isinstance(method, DimensionAttribution) else wide.new_zeros(len(wide))
            constants = constant[own].expand(len(z), -1)
            asked[rows.start] = question.scores(widen(z), method) + constants, constants, s
        return question

    if isinstance(method, CorrespondenceMap):
        found = matched(method, queries, ask, lambda _: match(), internal_batch_size)
    else:
        found = explain_references(method, queries, ask, internal_batch_size=internal_batch_size, signed=True)
    similarities, constants, s = zip(*asked.values())
    attributes = {
        "similarities": torch.cat(similarities),
        "constants": torch.cat(constants),
        "maps": found.maps[0],
        "signed_maps": found.signed[0],
        "explainable": found.valid,
        "route": method.routes(found.aligned, found.sizes) if isinstance(method, DimensionAttribution) else "",
    }
    return attributes, found, s[0] if s[0].ndim == 2 else torch.cat(s)


def words_of(contrast: Any, threshold: float | None, name: str) -> str:
    """What maps explain, in words for figures; ``name`` is what a number counts."""
    if threshold is not None:
        return f"above {threshold}, or below"
    if contrast is None:
        return "in common"
    if isinstance(contrast, str):
        return 'particular to the match ("self")' if contrast == "self" else f"rather than the {contrast}"
    return f"rather than {name} {contrast}"
