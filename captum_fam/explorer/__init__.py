"""A page, in one file, that shows which places of two images match."""

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_fam._checks import check_same_form, describe, format_inputs
from captum_fam.explorer._computed import (
    ALIKE,
    COMMON,
    MADE,
    OWN,
    REST,
    SCORE,
    SHARED,
    Found,
    Method,
    Mode,
    columns,
    of_matrices,
    of_methods,
    planes,
)
from captum_fam.explorer._stored import digits, grid, matrix, numbers, picture
from captum_fam.images import write_whole
from captum_fam.methods.shared_parts import SharedPartsExplanation
from captum_fam.similarity import nonzero
from captum_fam.visualization import Pictures, Values, pictures
from captum_fam.visualization._parts import part_colours

# The whole maps, in the order in which the page offers them; it opens with the first.
_MAPS = (OWN, REST, COMMON, MADE, ALIKE)
_INSERTED = ("page.css", "parts.js", "page.js")  # in page.html
_HEIGHT = 860  # pixels of the page in a notebook
_FULL = 0.999  # the quantile of a mode's entries at which their colour is full


class PairExplorer:
    """
    Which places of two images match? A page where you point at a place to see, made by
    :func:`~captum_fam.explore_pair`. A notebook shows it; :meth:`save` writes it as one file, which needs no server, no
    network and no other file.

    Examples::

        >>> page = explore_pair(torch.rand(3, 32, 32), torch.rand(3, 32, 32), torch.rand(1, 16, 16))
        >>> page.html.startswith("<!doctype html>")
        True
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    @property
    def html(self) -> str:
        """The whole page, as text (str)."""
        page, *parts = ((files(__package__) / name).read_text(encoding="utf-8") for name in ("page.html", *_INSERTED))
        # Text of others is only in the data, where no < can end it. Names of files that are no text are escaped.
        data = json.dumps(self._data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        for name, content in zip([*_INSERTED, "data"], [*parts, data]):
            page = page.replace(f"/* {name} */", content, 1)
        return page

    def save(self, path: str | PathLike[str]) -> None:
        """
        Writes the page to a file, whole or not at all.

        Args:
            path (str or PathLike): File to write, such as ``pair.html``.

        Raises:
            ValueError: the file cannot be written.
        """
        write_whole(self.html.encode(), Path(path))

    def _repr_html_(self) -> str:
        page = html.escape(self.html)
        # In a frame of its own, so that the styles of the notebook and of the page do not mix.
        return (
            f'<iframe srcdoc="{page}" title="Pair explorer" sandbox="allow-scripts" width="100%" height="{_HEIGHT}"'
            ' style="border: 0"></iframe>'
        )

    def __repr__(self) -> str:
        return f"PairExplorer({len(self._data['references'])} references, {len(self.html) / 1e6:.2f} MB)"


def explore_pair(
    query: Pictures,
    reference: Pictures,
    method: Method | Sequence[Method] | Values | Mapping[str, Values],
    *,
    control: Pictures | None = None,
    photos: Pictures | None = None,
    titles: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> PairExplorer:
    r"""
    What does this place of an image match in the other? Makes a page where you point at a place to see.

    The page has two modes. *Explains the score* shows the pairs of places that make the score, from
    :meth:`SimilarityDecomposition.attribute_matrix`: a row of the matrix adds up to what its place contributes, and all
    rows to the score. The page prints the sums and what is missing. *Looks alike* shows the cosines of
    :meth:`CorrespondenceMap.attribute_matrix`, which do not make the score. The page also has whole maps of both
    images, the scores of all references, and a control to compare with. With :class:`~captum_fam.SharedParts` it has a
    third mode, *shared parts*: both images in the colours of their parts, as :func:`~captum_fam.visualize_parts` draws
    them, and what each part adds to the score.

    Args:
        query (Tensor): One image (1, C, H, W), ready for the encoder. With matrices, any picture, as in
                    :func:`~captum_fam.visualize_pair`.
        reference (Tensor): K images of one size (K, C, H', W'). The page shows the matches of one at a time. With
                    matrices, any K pictures.
        method (a method, a list of them, Tensor, array or dict): A method or a list of methods: a
                    :class:`~captum_fam.SimilarityDecomposition` or :class:`~captum_fam.IntegratedDecomposition` for the
                    first mode, a :class:`~captum_fam.CorrespondenceMap` for the second, a
                    :class:`~captum_fam.SharedParts` for the third, a :class:`~captum_fam.FeatureActivationMap` for its
                    map. Those that you leave out are made with the same encoder and layer, except shared parts. With
                    ``n_steps``, the parts of the score add up to it for every encoder.

                    Or your own matrices, (K, N, N') of square grids or (K, h, w, h', w'), or a dict of such matrices by
                    the names of their modes.
        control (Tensor, optional): One image (1, C, H', W') that has nothing to do with the query. If an explanation is
                    as strong for it, it does not explain the match.
                    Default: None
        photos (list of pictures, optional): The pictures to show of the query, the references and the control, in this
                    order, in any size. Each must show exactly what the encoder was given.
                    Default: None, the images themselves
        titles (list of str, optional): Names of the query, the references and the control, in this order.
                    Default: None
        mean, std (sequence of float, optional): As in :func:`~captum_fam.visualize_pair`.
                    Default: None

    Returns:
        *PairExplorer*: the page, which a notebook shows, with ``save(path)``.

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> query, shelf = torch.rand(1, 3, 16, 16), torch.rand(2, 3, 16, 16)
        >>> explore_pair(query, shelf, SimilarityDecomposition(encoder, encoder[1]))  # doctest: +ELLIPSIS
        PairExplorer(2 references, ... MB)
    """
    given: list[Any] = list(method) if isinstance(method, (list, tuple)) else [method]
    shown: dict[str, Any] = {"control": control, "photos": photos, "titles": titles, "mean": mean, "std": std}
    if len(given) != 1 or not isinstance(given[0], (Tensor, np.ndarray, Mapping)):
        return explore_groups(query, reference, given, **shown)
    first = _listed(query)
    if len(first) != 1:
        raise ValueError(f"Expected `query` to be one picture, but got {len(first)}; explore them one by one.")
    images = [*first, *_listed(reference), *([] if control is None else _listed(control))]
    drawn = _drawn(images, photos, mean, std)
    return _explorer(drawn, titles, of_matrices(given[0], drawn), None, control is not None)


def explore_groups(
    query: Any,
    images: Any,
    methods: list[Any],
    groups: list[list[int]] | None = None,
    scores: list[float] | None = None,
    *,
    control: Any = None,
    photos: Pictures | None = None,
    titles: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> PairExplorer:
    """
    The page of a query and of references that are groups of the images (N, C, H, W), each with the mean of their
    embeddings; without ``groups``, each image is a reference. ``scores`` are the references' scores, as the caller has
    them.
    """
    given = _images(query, images, control)
    if groups is None:
        groups = [[n] for n in range(len(given[1]))]
    groups = groups + [[len(given[1])]] * (control is not None)
    if titles is not None:
        check_titles(titles, 1 + len(groups))
    each = [image for part in given for image in part]
    first, *others = _drawn(each, photos, mean, std)
    found, similarity = of_methods(given[0], torch.cat(given[1:]), groups, methods, control is not None)
    for one, score in zip(found, scores or []):
        one.score = score
    drawn = [first, *(_side_by_side([others[n] for n in group]) for group in groups)]
    return _explorer(drawn, titles, found, similarity, control is not None)


def _drawn(
    images: list[Any], photos: Pictures | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[Image.Image]:
    """The pictures to show: the images themselves, or a photo of each."""
    shown = images if photos is None else _listed(photos)
    if len(shown) != len(images):
        raise ValueError(f"Expected `photos` to be {len(images)} pictures, one for each image, but got {len(shown)}.")
    return pictures("photos", shown, len(shown), mean, std)


def _side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images side by side, in one size, as their places are in the matrix."""
    if len(images) == 1:
        return images[0]
    width, height = (max(sizes) for sizes in zip(*(image.size for image in images)))
    across = columns(len(images))
    whole = Image.new("RGB", (width * across, height * (len(images) // across)))
    for n, image in enumerate(images):
        whole.paste(image.resize((width, height)), (n % across * width, n // across * height))
    return whole


def _explorer(
    shown: list[Image.Image], titles: Sequence[str] | None, found: list[Found], similarity: str | None, control: bool
) -> PairExplorer:
    if titles is not None:
        check_titles(titles, len(shown))
    else:
        many = len(found) - control > 1
        titles = ["query", *(f"reference {k + 1}" if many else "reference" for k in range(len(found) - control))]
        titles += ["control"] * control
    judged = found[: len(found) - control]  # these set the scales, and the control is drawn on them
    scales: dict[str, Any] = {name: _scale(name, [one.modes[name].values for one in judged]) for name in found[0].modes}
    if found[0].parts is not None:
        scales[SHARED] = {"colours": _colours(found[0].parts.maps.shape[1])}
    maps = [name for name in _MAPS if name in found[0].maps]
    return PairExplorer(
        {
            "similarity": similarity,
            "query": _pictured(titles[0], shown[0]),
            "names": list(scales),  # the modes in their order; JavaScript would put numbers first
            "modes": scales,
            "maps": maps,
            "limits": {name: _limit(name, judged) for name in maps},
            "control": len(found) - 1 if control else None,
            "references": [
                {
                    **_pictured(title, image),
                    "score": None if one.score is None or not isfinite(one.score) else float(f"{one.score:.6g}"),
                    "modes": {name: _mode(name, mode, one.score) for name, mode in one.modes.items()}
                    | ({} if one.parts is None else {SHARED: _parts(one.parts, one.score)}),
                    "maps": {
                        name: {"query": grid(here), "reference": None if there is None else grid(there)}
                        for name, (here, there) in one.maps.items()
                    },
                }
                for title, image, one in zip(titles[1:], shown[1:], found)
            ],
        }
    )


def check_titles(titles: Sequence[str], count: int) -> None:
    if isinstance(titles, str) or len(titles) != count:
        raise ValueError(f"Expected `titles` to be a list of {count}, one for each image, but got {titles!r}.")


def _pictured(title: str, image: Image.Image) -> dict[str, Any]:
    return {"name": str(title), "picture": picture(image), "width": image.width, "height": image.height}


def _scale(name: str, matrices: list[Tensor]) -> dict[str, float]:
    """The value that is white, and how far from it colours are full, for all references except the control."""
    values = np.concatenate([m.flatten().numpy() for m in matrices])
    values = values[np.isfinite(values)]
    centre = float(values.mean()) if name == ALIKE and len(values) else 0.0  # all places look alike a little
    away = np.abs(values - centre)  # if a matrix is nearly all zero, the quantile is zero
    limit = float(np.quantile(away, _FULL) or away.max()) if len(values) else 0.0
    return {"centre": centre, "limit": limit or 1.0}


def _limit(name: str, found: list[Found]) -> float:
    """
    The largest value of a map: all references share one colour scale. A difference of scores below a thousandth of them
    is nearly white: for an image with itself, it is rounding.
    """
    values = torch.cat([side.flatten() for one in found for side in one.maps[name] if side is not None])
    values = values[values.isfinite()]
    largest = values.abs().amax().item() if len(values) else 0.0
    least = max((abs(one.score) for one in found if one.score is not None and isfinite(one.score)), default=0.0)
    return max(largest, 1e-3 * least if name in (OWN, REST) else 0.0) or 1.0


def _mode(name: str, mode: Mode, score: float | None) -> dict[str, Any]:
    """A matrix, and the numbers that the page prints about it."""
    known = mode.values[mode.values.isfinite()]
    sums = {"pairs": known.sum().item()}
    if name == ALIKE:
        sums = {"average": known.mean().item(), "largest": known.max().item()} if len(known) else {}
    rests = {"query_rest": mode.query_rest, "reference_rest": mode.reference_rest}
    sums |= {side: rest.sum().item() for side, rest in rests.items() if rest is not None}
    sums |= mode.rest
    return {
        **matrix(mode.values),
        **{side: None if rest is None else numbers(rest) for side, rest in rests.items()},
        "sums": _added_up(sums, score if name == SCORE else None),
    }


def _parts(found: SharedPartsExplanation, score: float | None) -> dict[str, Any]:
    """How strong the parts of a pair are, with 1 for the strongest place of both images, and their shares."""
    sides = [planes(maps, 1) for maps in (found.maps, found.reference_maps)]
    strengths = torch.cat([side.flatten(1) for side in sides], 1)
    shares = found.shares[0].double()
    own = shares.diagonal()
    sums = {f"part {n}": share for n, share in enumerate(own.tolist(), start=1)}
    sums |= {"others": (shares.sum() - own.sum()).item(), "no_part": found.residual.item()}
    return {
        "query": list(sides[0].shape[1:]),
        "reference": list(sides[1].shape[1:]),
        "whole": digits((strengths / nonzero(strengths.max())).numpy())[0],
        "totals": numbers(found.totals[0]),
        "sums": _added_up(sums, score),
    }


def _colours(n_parts: int) -> list[list[int]]:
    """Red, green and blue of each part, up to 255."""
    colours: list[list[int]] = (part_colours(n_parts)[:, :3] * 255).round().astype(int).tolist()
    return colours


def _added_up(sums: dict[str, float], score: float | None) -> dict[str, float]:
    """The parts of a score, if there is one, with their sum and what is missing."""
    if score is not None:
        together = sum(sums.values())
        sums = {**sums, "sum": together, "score": score, "remainder": score - together}
    return {part: value for part, value in sums.items() if isfinite(value)}


def _listed(given: Pictures) -> list[Any]:
    """Pictures one by one."""
    several = isinstance(given, (list, tuple)) or (isinstance(given, (Tensor, np.ndarray)) and given.ndim == 4)
    return list(given) if several else [given]  # type: ignore[arg-type]


def _images(query: Any, reference: Any, control: Any) -> list[Tensor]:
    """The encoder's inputs (1, C, H, W), (K, C, H, W) and, if there is one, the control (1, C, H, W)."""
    given = {"query": query, "reference": reference} | ({} if control is None else {"control": control})
    images = {}
    for name, value in given.items():
        images[name], *others = tensors = format_inputs(name, value)
        count = "one image (1, C, H, W)" if name != "reference" else "images (K, C, H, W)"
        if not others:
            check_same_form(tensors, (images["query"],))
        if others or images[name].ndim != 4 or not len(images[name]) or (name != "reference" and len(images[name]) > 1):
            got = describe(value if others else tensors[0])
            raise ValueError(f"Expected `{name}` to be {count}, ready for the encoder, but got {got}.")
    if control is not None and images["control"].shape[1:] != images["reference"].shape[1:]:
        raise ValueError(
            f"Expected `control` to have the size of `reference`, {tuple(images['reference'].shape[1:])}, but got"
            f" {describe(control)}; resize it as for the encoder."
        )
    return list(images.values())
