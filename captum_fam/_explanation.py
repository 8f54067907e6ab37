"""What explanations of a decision among references have in common."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from captum_fam._attribution import Pairs, Question, note_unusable
from captum_fam._recording import Recording
from captum_fam.feature_activation_map import FeatureActivationMap


@dataclass(frozen=True, repr=False, eq=False)
class Explanation:
    r"""
    FAM of B queries for K references each.

    Attributes:
        similarities (Tensor): What is explained: the sums of the contributions, (B, K).
        maps (Tensor): FAM of each query for each of its references, (B, K, \*spatial).
        signed_maps (Tensor): Maps with weights w = c in at least single precision,
                    (B, K, \*spatial); their differences are the contrast maps.
        explainable (Tensor): Which pairs have embeddings that are finite and not zero, (B, K).
        route (str): ``"aligned"`` or ``"jacobian"``, as in
                    :meth:`~captum_fam.FeatureActivationMap.route`.
    """

    similarities: Tensor
    maps: Tensor
    signed_maps: Tensor
    explainable: Tensor
    route: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}(maps={tuple(self.maps.shape)}, route={self.route!r})"

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


def explained(fam: FeatureActivationMap, recording: Recording, question: Question) -> dict[str, Any]:
    """The attributes of an Explanation of recorded queries."""
    if isinstance(fam.layer, list) or len(recording.layers[0]) > 1:
        raise ValueError("Expected `layer` to be one module that returns one tensor; explain several one by one.")
    pairs = Pairs(recording, question, question.own.shape[1])
    ((maps,),), valid = fam._masked(pairs)
    note_unusable(recording, question, valid)
    signed = copy.copy(fam)
    signed.normalize = None
    with torch.no_grad():
        ((signed_maps,),) = signed._weighted(pairs, valid, True)
    return {
        "similarities": pairs.c.sum(2),
        "maps": maps,
        "signed_maps": signed_maps,
        "explainable": valid,
        "route": fam._routes(recording)[0],
    }
