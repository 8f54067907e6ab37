"""
Which places look alike: for the activations A of an image and R of another,

    M_i = max_j cos(A_i, R_j)

The mean of this over other images may be subtracted.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from captum_fam._checks import check_rows_fit, check_same_form
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.places import by_place
from captum_fam.engine.report import Report
from captum_fam.similarity import exact, unit

# Cosines that are held at once.
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Places:
    """
    The activations of n images as vectors of unit length (n, N, C), for each tensor that the layers gave; nan for
    images whose activations are not finite.
    """

    units: list[Tensor]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    sizes: list[int]


@dataclass
class Call:
    """What the forward passes of a call share: the further arguments of so many inputs, and what they find out."""

    inputs: int
    additional_forward_args: object | None = None
    most: int | None = None
    layer_input: bool = False
    report: Report = field(default_factory=Report)
    unusable: dict[str, set[int]] = field(default_factory=dict)

    def check(self, images: Tensors, name: str, inputs: Tensors) -> None:
        """Checks that these images can go through the encoder as the inputs do."""
        check_same_form(images, inputs, name)
        check_rows_fit(
            self.additional_forward_args,
            self.inputs,
            len(images[0]),
            name,
            "pass arguments that all images share, or an encoder that has them (functools.partial)",
            paired=name == "reference",
        )

    def note_unusable(self, side: str, bad: set[int], compared: set[int] | None) -> None:
        self.unusable.setdefault(side, set()).update(bad if compared is None else bad & compared)

    def warnings(self) -> list[str]:
        which = [f"{side} {sorted(rows)}" for side, rows in self.unusable.items() if rows]
        bad = [f"Activations are not finite ({', '.join(which)}): the maps that depend on them are zero."]
        return self.report.texts() + (bad if which else [])


def places_of(activations: list[Tensor], sizes: list[int]) -> tuple[Places, set[int]]:
    """The places of recorded activations, and the numbers of the images whose activations are not all finite."""
    finite = [A.flatten(1).isfinite().all(1) for A in activations]
    units = [unit(by_place(A).mT).masked_fill(~f[:, None, None], torch.nan) for A, f in zip(activations, finite)]
    places = Places(units, [A.shape[2:] for A in activations], [A.dtype for A in activations], sizes)
    return places, {int(n) for f in finite for n in (~f).nonzero()}


def joined(parts: list[Places]) -> Places:
    return replace(parts[0], units=[torch.cat(layer) for layer in zip(*(part.units for part in parts))])


def best_match(A: Tensor, R: Tensor) -> Tensor:
    """max_j cos(A_i, R_j) (n, N), for unit vectors A (n, N, C) and R (N', C)."""
    with exact(A):
        rows = A.flatten(0, 1).split(max(1, _AT_ONCE // max(1, len(R))))
        return torch.cat([(part @ R.mT.to(A)).amax(1) for part in rows]).clamp(-1, 1).reshape(A.shape[:2])


def match_pairs(A: Tensor, R: Tensor) -> Tensor:
    """The same for an R (n, N', C) for each of the n."""
    best = A.new_zeros(A.shape[:2])
    for number, image in enumerate(R):
        best[number : number + 1] = best_match(A[number : number + 1], image)
    return best


def known(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The values, zero wherever one of them over these dimensions is nan."""
    return values.masked_fill(values.isnan().any(dim, keepdim=True), 0)
