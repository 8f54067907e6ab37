"""What explanations of a decision among references have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from captum_fam._checks import check_internal_batch_size, describe
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.question import Question
from captum_fam.methods.dimension_attribution import DimensionAttribution
from captum_fam.methods.layer_explanation import Explained
from captum_fam.similarity import widen


@dataclass(frozen=True)
class Origin:
    """What an explanation was made of: the method, the queries, and what else a page of its task shows."""

    method: DimensionAttribution
    queries: Tensors
    others: Any


@dataclass(frozen=True, repr=False, eq=False)
class Explanation:
    r"""
    The maps of B queries for K references each.

    Attributes:
        similarities (Tensor): What is explained: the sums of the contributions, (B, K).
        constants (Tensor): The part of them that no place of a query has, (B, K): minus the
                    squared length of the reference, for SimilarityDecomposition of the squared distance, else zero.
        maps (Tensor): The map of each query for each of its references, (B, K, \*spatial).
        signed_maps (Tensor): Maps of the terms themselves, signed, in at least single precision,
                    (B, K, \*spatial); their differences are the contrast maps.
        explainable (Tensor): Which pairs have embeddings that are finite and not zero, (B, K).
        route (str): ``"aligned"`` or ``"jacobian"``, as in
                    :meth:`~captum_fam.FeatureActivationMap.route`.
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

    def _remember(self, method: DimensionAttribution, queries: Tensors, others: Any) -> None:
        object.__setattr__(self, "_origin", Origin(method, tuple(x.detach() for x in queries), others))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(maps={tuple(self.maps.shape)}, route={self.route!r})"

    def _explored(self, query: int) -> tuple[Origin, Tensors]:
        """What this was made of, and the image (1, C, H, W) of a query."""
        if self._origin is None:
            raise ValueError(
                "A copy of an explanation, or one from a file, has no images to show; explore the one that the call"
                " returned."
            )
        B = len(self.maps)
        if not isinstance(query, int) or isinstance(query, bool) or query not in range(B):
            raise ValueError(f"Expected `query` to be the number of one of {B} queries, from 0, but got {query!r}.")
        return self._origin, tuple(x[query : query + 1] for x in self._origin.queries)

    def _counted(self) -> Tensor:
        """Which references (B, K) are among "the rest"."""
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
        rows = torch.arange(len(own), device=own.device)
        valid = self.explainable[rows, own]
        if isinstance(other, Tensor):
            valid = valid & self.explainable[rows, other]
        found = self._difference(self.signed_maps, own, other)
        valid = valid & found.flatten(1).isfinite().all(1)
        shown = torch.where(valid.reshape(-1, *[1] * (found.ndim - 1)), found, torch.zeros_like(found))
        return shown[:, None].to(self.maps.dtype)


def method_of(method: type[DimensionAttribution], function: str, *args: Any, **options: Any) -> DimensionAttribution:
    """The method that a task explains with."""
    if not isinstance(method, type) or not issubclass(method, DimensionAttribution):
        raise ValueError(
            f"Expected `method` of {function} to be FeatureActivationMap or SimilarityDecomposition, but got"
            f" {method.__name__ if isinstance(method, type) else describe(method)}."
        )
    made = method(*args, **options)
    if isinstance(made.layer, list):
        raise ValueError("Expected `layer` to be one module that returns one tensor; explain several one by one.")
    return made


def explained(
    method: DimensionAttribution,
    queries: Tensors,
    references: Callable[[Tensor, slice], Tensor],
    internal_batch_size: int | None,
) -> tuple[dict[str, Any], Explained]:
    """
    The attributes of an Explanation, and what they are made of. ``references`` gives those (K, D), or (B, K, D), of
    the queries with embeddings (B, D) in these rows.
    """
    check_internal_batch_size(internal_batch_size)
    scores: dict[int, tuple[Tensor, Tensor]] = {}

    def ask(z: Tensor, rows: slice) -> Question:
        with torch.no_grad():
            s = references(z, rows)
            own = torch.arange(s.shape[:-1].numel(), device=s.device).reshape(-1, s.shape[-2])
            question = Question(s.flatten(0, -2), own)
            constants = method.constant(widen(question.s.to(z)))[own].expand(len(z), -1)
            scores[rows.start] = question.scores(widen(z), method) + constants, constants
        return question

    found = method.explain(queries, ask, internal_batch_size=internal_batch_size, signed=True)
    if len(found.maps) > 1:
        raise ValueError("Expected `layer` to be one module that returns one tensor; explain several one by one.")
    similarities, constants = map(torch.cat, zip(*scores.values()))
    attributes = {
        "similarities": similarities,
        "constants": constants,
        "maps": found.maps[0],
        "signed_maps": found.signed[0],
        "explainable": found.valid,
        "route": method.routes(found.aligned, found.sizes),
    }
    return attributes, found
