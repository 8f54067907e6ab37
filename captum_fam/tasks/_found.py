"""What a search found, explained on both sides, and the images of its hits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from captum_fam._checks import describe, warn_once
from captum_fam.engine.question import Question, less_of
from captum_fam.methods.by_name import explain_references
from captum_fam.methods.layer_explanation import Explained
from captum_fam.methods.margins import texts_of
from captum_fam.similarity import unit, widen
from captum_fam.tasks._explanation import Origin, check_asked, contrasted, explained, words_of
from captum_fam.tasks.retrieval_explanation import RetrievalExplanation

_SAME = 0.05  # how far an image's embedding may be from the one that was searched, in units of its length

Contrast = int | Literal["rest", "self"] | str | None


class Gallery(Protocol):
    """Images by their ids: a tensor (N, C, H, W), a list, a dict, a data set."""

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Found:
    """Hits of some queries, the vectors s (B, k, D) that they are compared by, and which hits exist (B, k)."""

    ids: list[list[Any]]
    scores: Tensor | None
    there: Tensor
    s: Tensor


def explain_found(
    method: Any,
    query: Tensor,
    search: Callable[[Tensor, slice], Found],
    images: Callable[[int, list[int]], Tensor] | None,
    check: Callable[[RetrievalExplanation, Tensor, Tensor], list[str]],
    contrast: Contrast,
    threshold: float | None,
    internal_batch_size: int | None,
) -> RetrievalExplanation:
    """
    Explains what ``search`` finds for the embeddings (B, D) of queries in some rows. ``images`` returns the images of a
    query's hits of these ranks; ``check`` returns warnings about a result, its embeddings (B, D) and those of the hits.
    """
    check_asked(method, contrast, threshold)
    parts: dict[int, Found] = {}

    def ask(z: Tensor, rows: slice) -> Tensor:
        part = parts[rows.start] = search(z, rows)
        return torch.where(part.there[..., None].to(part.s.device), part.s, torch.ones_like(part.s))

    def ranks() -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for part in parts.values() for row in part.there]

    def match() -> Tensor:
        if images is None:
            raise ValueError(
                "CorrespondenceMap compares places: pass the images of the hits, or a `gallery` that has them."
            )
        most: Any = {"internal_batch_size": internal_batch_size}
        best = [
            method.attribute_all(query[b : b + 1], reference=images(b, own).to(query), **most)[0] if own else None
            for b, own in enumerate(ranks())
        ]
        like = method.attribute(query, reference=query, **most)[:, 0]
        return _laid_out(best, ranks(), parts[0].there.shape[1], like)

    attributes, explanation, s = explained(method, (query,), ask, internal_batch_size, match)
    own = contrast if threshold is None and isinstance(contrast, str) and contrast == "self" else None
    z, warned = explanation.embedding, texts_of(explanation.report, own)
    given = [part.scores for part in parts.values() if part.scores is not None]
    there = torch.cat([part.there for part in parts.values()]).to(z.device)
    shown = there.reshape(*there.shape, *[1] * (attributes["maps"].ndim - 2))
    for name in ("maps", "signed_maps"):
        attributes[name] = torch.where(shown, attributes[name], torch.zeros_like(attributes[name]))
    attributes["similarities"] = torch.where(there, attributes["similarities"], -torch.inf)
    attributes["constants"] = torch.where(there, attributes["constants"], 0)
    attributes["explainable"] = attributes["explainable"] & there
    result = RetrievalExplanation(
        **attributes,
        ids=[row for part in parts.values() for row in part.ids],
        scores=torch.cat(given).to(query.device) if given else None,
        hit_maps=None,
    )
    warned += check(result, widen(z), s)
    origin = Origin(method, (query.detach(),), s, internal_batch_size, images)
    result._remember(origin)
    if contrast is not None or threshold is not None:
        other = None if own or threshold is not None else result._other(contrast, "contrast")
        rank = contrast if isinstance(contrast, (str, type(None))) else result._rank("contrast", contrast) + 1
        origin = replace(origin, explains=words_of(rank, threshold, "hit"))
        maps = contrasted(result, other, contrast, threshold)
        result = replace(result, maps=torch.where(shown, maps, torch.zeros_like(maps)))
    if images is not None and (contrast is None or own or threshold is not None):
        hit_maps, strange = [], []
        for b, row in enumerate(ranks()):
            side = _of_hits(method, query[b : b + 1], images, b, row, z[b : b + 1], own, threshold, internal_batch_size)
            hit_maps.append(None if side is None else side.maps[0][:, 0])
            if side is not None:
                warned += texts_of(side.report, own)
                far = _distances(side.embedding, s[b, row], method._similarity() == "cosine")
                strange += [result.ids[b][k] for k, d in zip(row, far) if d > _SAME]
        result = replace(result, hit_maps=_laid_out(hit_maps, ranks(), there.shape[1], attributes["maps"][:, 0]))
        warned += _warnings_of_images(strange)
    warn_once(warned)
    result._remember(origin)
    return result


def _of_hits(
    method: Any,
    query: Tensor,
    images: Callable[[int, list[int]], Tensor],
    number: int,
    ranks: list[int],
    z: Tensor,
    contrast: str | None,
    threshold: float | None,
    internal_batch_size: int | None,
) -> Explained | None:
    """The maps (n, 1, *spatial) of the hits of these ranks for one query, with its embedding z (1, D)."""
    if not ranks:
        return None
    less = less_of(contrast, threshold, method._similarity(), 1, len(ranks))
    question = Question(z, torch.zeros(1, 1, dtype=torch.long, device=z.device), less)
    return explain_references(
        method,
        (images(number, ranks).to(query),),
        lambda _, rows: question,
        (query,),
        internal_batch_size=internal_batch_size,
        sides=("hits", "queries"),
    )


def _laid_out(rows: list[Tensor | None], ranks: list[list[int]], k: int, like: Tensor) -> Tensor:
    """Maps (B, k, *spatial): each query's maps (n, *spatial) at their ranks, zero elsewhere."""
    shape = next((row.shape[1:] for row in rows if row is not None), like.shape[1:])
    maps = like.new_zeros(len(rows), k, *shape)
    for b, (row, own) in enumerate(zip(rows, ranks)):
        if row is not None:
            maps[b, own] = row
    return maps


def _distances(embedded: Tensor, s: Tensor, of_units: bool) -> list[float]:
    """The distances of embeddings (n, D) from others, as shares of their lengths."""
    one, two = (widen(x).cpu().float() for x in (embedded, s))
    if of_units:
        one, two = unit(one), unit(two)
    return ((one - two).norm(dim=1) / two.norm(dim=1)).tolist()  # type: ignore[no-any-return]


def images_by_id(
    gallery: Any, images: Tensor | None, ids: list[list[Any]], ndim: int
) -> Callable[[int, list[int]], Tensor] | None:
    """The images (n, C, *spatial), each of ``ndim`` dimensions, of a query's hits of these ranks."""
    if gallery is None:
        return None if images is None else lambda query, ranks: images[query, ranks]
    return lambda query, ranks: _images(gallery, [ids[query][rank] for rank in ranks], ndim)


def _images(gallery: Any, ids: list[Any], ndim: int) -> Tensor:
    images = [_image(gallery, number, ndim) for number in ids]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"Expected images of one shape in `gallery`, but got {sorted({tuple(i.shape) for i in images})};"
            " resize them as for the encoder."
        )
    return torch.stack(images)


def _image(gallery: Any, number: Any, ndim: int) -> Tensor:
    try:
        if isinstance(number, int) and number < 0 and not isinstance(gallery, Mapping):
            raise IndexError("a negative number counts from the end")
        image = gallery[number]
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected `gallery` to give image {number} as gallery[{number!r}], but that failed:"
            f" {type(error).__name__}: {error}; pass all images, by the ids of the hits, or their numbers in the index."
        ) from error
    image = image[0] if isinstance(image, (tuple, list)) else image
    if isinstance(image, Tensor) and not image.is_floating_point():
        raise TypeError(
            f"Expected gallery[{number!r}] to be floating point, ready for the encoder, but got {describe(image)};"
            " apply the encoder's transform."
        )
    if not isinstance(image, Tensor) or image.ndim != ndim:
        raise TypeError(
            f"Expected gallery[{number!r}] to be an image of {ndim} dimensions, or a tuple that begins with it, but got"
            f" {describe(image)}; apply the encoder's transform, and leave out its batch dimension."
        )
    return image


def _warnings_of_images(strange: list[Any]) -> list[str]:
    """The warning about images whose embeddings are not those that were searched."""
    if not strange:
        return []
    numbers = list(dict.fromkeys(strange))
    return [
        f"The embeddings of the gallery's images {sorted(numbers, key=str)} are not those in the index: their maps"
        " explain other scores. Give the images as they were embedded for the index, in the same order; a lossy index"
        " differs by itself."
    ]
