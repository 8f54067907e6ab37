"""Ways to run a forward pass, from the cheapest to the safest; the first that an encoder allows is taken."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch.utils.checkpoint import CheckpointError

from captum_fam.engine.constants import WeightsNeededError

T = TypeVar("T")


class NotInOneBatchError(Exception):
    """The encoder cannot take all points of a path in one batch, or does not treat them as independent examples."""


@dataclass(frozen=True)
class Way:
    """
    Attributes:
        constants: weights are constants, so that torch keeps nothing that only their gradients would need.
        one_batch: what comes after a layer takes all points of a path in one batch, instead of a pass for each.
    """

    constants: bool = True
    one_batch: bool = True


def by_the_cheapest_way(run: Callable[[Way], T]) -> T:
    """The result of the first way that the encoder allows."""
    way = Way()
    while True:
        try:
            return run(way)
        except (WeightsNeededError, CheckpointError):
            if not way.constants:
                raise
            way = replace(way, constants=False)
        except NotInOneBatchError as error:
            if not way.one_batch:
                raise RuntimeError(
                    "The embeddings of a forward pass depend on the pass before it, so `n_steps` cannot tell their"
                    " points apart; switch off what the encoder keeps from one pass to the next."
                ) from error
            way = replace(way, one_batch=False)
