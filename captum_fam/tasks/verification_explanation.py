"""What the explanation of a verification holds, and its figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from captum_fam._checks import describe
from captum_fam.engine.chunks import Tensors
from captum_fam.similarity import widen
from captum_fam.visualization import Scale, visualize_pair

_ROWS = 50  # of a figure


@dataclass(frozen=True, repr=False, eq=False)
class VerificationExplanation:
    r"""
    Why was each of B pairs accepted or rejected? Made by :func:`~captum_fam.explain_verification`.

    Attributes:
        measure (str): What is compared with the threshold: ``"cosine"``, ``"dot product"``, ``"distance"``
                    or ``"score"``.
        scores (Tensor): The measure of each pair, (B,), in at least single precision.
        thresholds (Tensor): The threshold of each pair, (B,).
        margins (Tensor): How far a pair is from the other decision, (B,): score - threshold; for distances, threshold²
                    - distance².
        accepted (Tensor): Which pairs are accepted, those whose margin is not negative, (B,), bool.
        maps (Tensor): What each place of the images contributes to the margin, (B, 1, \*spatial), signed:
                    positive values speak for "the same", negative ones against.
        other_maps (Tensor): The same of the other images.
        explainable (Tensor): Which pairs have embeddings that are finite and not zero, (B,).
        adds_up (bool): Whether the mean of a map and what is ``missing`` add up to the margin, as with
                    :class:`~captum_fam.SimilarityDecomposition`.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images, others = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
        >>> found = explain_verification(images, others, encoder, encoder[1], threshold=0.9)
        >>> torch.allclose(found.maps.mean((1, 2, 3)), found.scores - 0.9, atol=1e-5)
        True
        >>> here, there = found.supporting
        >>> here.shape, there.shape
        (torch.Size([4, 1, 14, 14]), torch.Size([4, 1, 14, 14]))
    """

    measure: str
    scores: Tensor
    thresholds: Tensor
    margins: Tensor
    maps: Tensor
    other_maps: Tensor
    explainable: Tensor
    adds_up: bool

    _origin: ClassVar[tuple[Tensors, Tensors] | None] = None  # no field: neither copies nor files have the images

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_origin"}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.margins)} pairs, {int(self.accepted.sum())} accepted,"
            f" maps={tuple(self.maps.shape)})"
        )

    @property
    def accepted(self) -> Tensor:
        return self.margins >= 0

    @property
    def supporting(self) -> tuple[Tensor, Tensor]:
        r"""What speaks for "the same" on both images? The positive parts of the maps, each (B, 1, \*spatial)."""
        return self.maps.clamp(min=0), self.other_maps.clamp(min=0)

    @property
    def opposing(self) -> tuple[Tensor, Tensor]:
        r"""What speaks against it? The negative parts, without the minus, each (B, 1, \*spatial)."""
        return (-self.maps).clamp(min=0), (-self.other_maps).clamp(min=0)

    @property
    def missing(self) -> tuple[Tensor, Tensor]:
        """
        How much of the margin belongs to no place? The margins less the means of the maps, for each side (B,). It means
        something only if ``adds_up``, and is zero, up to rounding, if the places add up to the embedding.
        """
        return self.margins - mean_of(self.maps), self.margins - mean_of(self.other_maps)

    def visualize(
        self,
        indices: int | Sequence[int] | Tensor | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: Scale = "all",
        use_pyplot: bool = True,
    ) -> tuple[Figure, NDArray[Any]]:
        r"""
        Which parts of a pair speak for "the same", and which against? Draws pairs, a row for each: both images and
        their maps, red for "the same" and blue against. Under the first image stand the score, the threshold and the
        decision; under each map, what its places contribute for and against, and what belongs to no place. These add up
        to the margin.

        Args:
            indices (int, sequence of int or Tensor, optional): Numbers of the pairs, from 0.
                        Default: None, all of them
            mean, std, scale, use_pyplot: As in :func:`~captum_fam.visualize_pair`.

        Returns:
            *tuple*: the Figure and its Axes, an array (rows, 4).

        Raises:
            TypeError, ValueError: there is no such pair, there are too many for a figure, the inputs cannot be drawn,
                        or this is a copy or comes from a file, which has no images.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> images, others = torch.rand(9, 3, 16, 16), torch.rand(9, 3, 16, 16)
            >>> found = explain_verification(images, others, encoder, encoder[1], threshold=0.9)
            >>> nearest = found.margins.abs().argsort()[:3]  # to the threshold
            >>> figure, axes = found.visualize(nearest, use_pyplot=False)
            >>> axes.shape
            (3, 4)
        """
        rows = self._rows(indices)
        if self._origin is None:
            raise ValueError(
                "A copy of an explanation, or one from a file, has no images to show; draw them with"
                " visualize_pair(images, others, found.maps, found.other_maps)."
            )
        maps = [M[rows] for M in (self.maps, self.other_maps)]
        figure, axes = visualize_pair(
            *(inputs[0][rows] for inputs in self._origin),
            *maps,
            titles=[self._said(number) for number in rows],
            mean=mean,
            std=std,
            label=f"contribution to {'threshold² - distance²' if self.measure == 'distance' else 'score - threshold'}",
            scale=scale,
            signed=True,
            use_pyplot=use_pyplot,
        )
        for column, side, missing in zip(axes[:, 1::2].T, maps, self.missing):
            for axis, M, rest in zip(column, side, missing[rows].tolist()):
                axis.set_xlabel(f"{axis.get_xlabel()}\n{self._parts(M, rest)}", parse_math=False)
        return figure, axes

    def _said(self, number: int) -> str:
        score, threshold = self.scores[number].item(), self.thresholds[number].item()
        decision = "accepted" if self.accepted[number] else "rejected"
        return f"pair {number}: {decision}\n{self.measure} {score:.4g}, threshold {threshold:.4g}"

    def _parts(self, M: Tensor, missing: float) -> str:
        """How much the places of a map speak for and against, and how much belongs to no place, in words."""
        positive, negative = (widen(part).mean().item() for part in (M.clamp(min=0), (-M).clamp(min=0)))
        counts = self.adds_up and abs(missing) > rounding_of(M[None]).item()
        return f"for {positive:.3g}, against {negative:.3g}" + (f"\nno place {missing:.3g}" if counts else "")

    def _rows(self, indices: int | Sequence[int] | Tensor | None) -> list[int]:
        B = len(self.margins)
        rows: list[Any] = list(range(B)) if indices is None else torch.as_tensor(indices).flatten().tolist()
        if any(type(i) is not int or i not in range(B) for i in rows):
            raise ValueError(
                f"Expected `indices` to be numbers of {B} pairs, from 0, but got {describe(indices)}; for a mask, pass"
                " mask.nonzero()."
            )
        if not 0 < len(rows) <= _ROWS:
            raise ValueError(
                f"A figure shows 1 to {_ROWS} pairs, but {len(rows)} are to be drawn; pass `indices`, such as"
                " found.margins.abs().argsort()[:8], the pairs nearest to the threshold."
            )
        return rows


def mean_of(maps: Tensor) -> Tensor:
    """(B,), in at least single precision"""
    return widen(maps).flatten(1).mean(1)


def rounding_of(maps: Tensor) -> Tensor:
    """How far totals (B,) of maps may be off by rounding: a share of what their places contribute."""
    return max(1e-4, 4 * torch.finfo(maps.dtype).eps) * mean_of(maps.abs())
