"""What a call finds out about its inputs and its model. It tells the user once, at its end."""

from collections.abc import Callable
from enum import IntEnum

from torch import Tensor

SIDES = ("inputs", "references")


class Dependence(IntEnum):
    """How an embedding depends on a layer: not at all, by what is not on its map, or by its map."""

    NONE, OFF_THE_MAP, BY_THE_MAP = range(3)


class Report:
    """
    What all chunks of a call find out together.

    Attributes:
        warnings: what a user should know.
        unusable: numbers of the inputs, and of the references, whose embeddings are zero or not finite.
        dependence: of the embeddings on each layer, by its number and name.
        pooled: the layers that have one place.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.unusable: dict[str, set[int]] = {}
        self.dependence: dict[tuple[int, str], Dependence] = {}
        self.pooled: dict[str, None] = {}

    def note_unusable(self, side: str, bad: Tensor, first: int = 0) -> None:
        """Notes which embeddings, ``bad`` (N,), cannot be explained; the first of them has this number in its call."""
        self.unusable.setdefault(side, set()).update((bad.nonzero().flatten() + first).tolist())

    def note_dependence(self, layer: tuple[int, str], found: Dependence, elsewhere: Callable[[], str | None]) -> None:
        """Notes how a layer is used, and how to find another one that has a map."""
        self.dependence[layer] = max(found, self.dependence.get(layer, Dependence.NONE))
        self._elsewhere = elsewhere

    def note_pooled(self, layer: str, elsewhere: Callable[[], str | None]) -> None:
        """Notes a layer with one place, and how to find another one that has a map."""
        self.pooled[layer] = None
        self._elsewhere = elsewhere

    def include(self, other: "Report") -> None:
        """Adds what another pass of the same call has found out about other layers."""
        self.warnings += other.warnings
        for side, rows in other.unusable.items():
            self.unusable.setdefault(side, set()).update(rows)
        for layer in other.pooled:
            self.note_pooled(layer, other._elsewhere)
        for (_, layer), found in other.dependence.items():
            self.note_dependence((len(self.dependence), layer), found, other._elsewhere)

    def texts(self) -> list[str]:
        """
        The warnings for the user.

        Raises:
            ValueError: there is no map; the message names the layer to choose instead.
        """
        texts = list(dict.fromkeys(self.warnings))
        if self.unusable:
            texts.append(of_unusable(self.unusable))
        for layer in self.pooled:
            other = self._elsewhere()
            texts.append(
                f"Layer {layer} has one place, as after a pooling, so its map is one number and shows no part of the"
                " input. Choose a layer before that" + (f", such as {other!r}." if other else ".")
            )
        for (_, layer), dependence in self.dependence.items():
            if dependence == Dependence.OFF_THE_MAP:
                other = self._elsewhere()
                raise ValueError(
                    f"The embedding depends on layer {layer} only through tokens that are no patches, such as the class"
                    " token after the last attention, so it has no map; choose a layer before the last attention"
                    + (f", such as {other!r}." if other else ", such as the normalisation at its input.")
                )
            if dependence == Dependence.NONE:
                texts.append(
                    f"The embedding does not depend on layer {layer}, or the encoder cuts the gradient between them"
                    " (detach, torch.no_grad): its map is zero. Choose a layer on the way to the embedding, after any"
                    " such cut."
                )
        return texts


def of_unusable(unusable: dict[str, set[int]]) -> str:
    """The warning about embeddings that are zero or not finite, by the numbers of their rows."""
    which = [f"{side} {sorted(rows)}" for side, rows in sorted(unusable.items()) if rows]
    return (
        f"Embeddings are zero or not finite ({', '.join(which) or 'their contributions overflow'}): the maps that"
        " depend on them are zero."
    )
