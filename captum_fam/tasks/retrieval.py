"""Image retrieval: why a search returned these hits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from captum_fam._checks import check_positive, describe, format_inputs, warn_once
from captum_fam._distances import canonical
from captum_fam.engine.question import Question
from captum_fam.engine.untouched import eagerly
from captum_fam.methods.dimension_attribution import DimensionAttribution
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.similarity import Similarity, unit, widen
from captum_fam.tasks._explanation import Explanation, explained, method_of

_INNER_PRODUCT, _L2 = 0, 1  # faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2
_CLOSE = 1e-3  # how far lengths and scores may be from what they should be
_ROUNDING = 1e-5  # the same for scores, in units of the squared lengths
_LOSSY = 0.2  # how far the median length of normalised vectors may be from one, in an index that is lossy
_SAME = 0.05  # how far an image's embedding may be from that in the index, in units of its length


class Gallery(Protocol):
    """Images by their number in the index: a tensor (N, C, H, W), a list, a data set."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, repr=False, eq=False)
class RetrievalExplanation(Explanation):
    r"""
    Why a search returned its hits, k for each of B queries; made by
    :func:`~captum_fam.explain_retrieval`.

    Attributes:
        indices (Tensor): Numbers of the hits in the index, best first, (B, k); -1 where the index
                    found fewer.
        scores (Tensor): What the index returned, (B, k): inner products, or squared distances.
        similarities (Tensor): What is explained: the sums of the contributions, (B, k). The scores,
                    a distance with a minus; -inf where nothing was found.
        constants (Tensor): The part of them that no place of a query has, (B, k): minus the squared
                    length of the hit, for SimilarityDecomposition of squared distances, else zero.
        maps (Tensor): The map of each query for each of its hits, (B, k, \*spatial).
        signed_maps (Tensor): Maps of the terms themselves, signed, in at least single precision;
                    their differences are the contrast maps.
        explainable (Tensor): Which hits have embeddings that are finite and not zero, (B, k).
        hit_maps (Tensor or None): The map of each hit for its query, (B, k, \*spatial), if there was a
                    gallery.
        route (str): ``"aligned"`` or ``"jacobian"``.

    Examples::

        >>> import faiss
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> gallery, index = torch.rand(20, 3, 16, 16), faiss.IndexFlatL2(8)
        >>> index.add(encoder(gallery).detach().numpy())
        >>> found = explain_retrieval(gallery[:2], index, encoder, encoder[1], k=3)
        >>> found.contrast(0, 1).shape  # why the first hit rather than the second
        torch.Size([2, 1, 14, 14])
    """

    indices: Tensor
    scores: Tensor
    hit_maps: Tensor | None

    def contrast(self, rank: int = 0, other: int | Literal["rest"] = "rest") -> Tensor:
        r"""
        Why the hit of one rank is nearer than that of another: the map of the contributions to
        the difference of their similarities, signed.

        Args:
            rank (int): Of the hit, from 0.
                        Default: 0
            other (int or str): Rank of the hit to contrast with, or ``"rest"`` for the mean over
                        all the others.
                        Default: ``"rest"``

        Returns:
            *Tensor*: maps (B, 1, \*spatial); zero where there was no such hit.

        Raises:
            ValueError: there is no such rank, or no other hit.
        """
        (B, k), device = self.scores.shape, self.signed_maps.device
        if k < 2:
            raise ValueError("A contrast needs at least two hits, but there is one; search with k=2 or more.")
        for name, value in (("rank", rank), ("other", other)):
            number = isinstance(value, int) and not isinstance(value, bool) and value in range(k)
            if not number and not (name == "other" and value == "rest"):
                raise ValueError(f"Expected `{name}` to be a rank from 0 to {k - 1}, but got {value!r}.")
        against = other if isinstance(other, str) else torch.full((B,), other, device=device)
        return self._contrast(torch.full((B,), rank, device=device), against)

    def _counted(self) -> Tensor:
        return self.indices >= 0


@eagerly
def explain_retrieval(
    query: Tensor,
    index: Any,
    forward_func: Callable[..., Any],
    layer: nn.Module,
    gallery: Gallery | Sequence[Any] | None = None,
    k: int = 5,
    *,
    similarity: Similarity | None = None,
    method: type[DimensionAttribution] = FeatureActivationMap,
    internal_batch_size: int | None = None,
    **options: Any,
) -> RetrievalExplanation:
    r"""
    Searches a faiss index and explains its hits, from one pass over the query.

    The references are the embeddings that the index holds; the gallery's images are embedded
    only for the maps of the hits themselves.

    Args:
        query (Tensor): B images, (B, C, H, W).
        index (faiss.Index): Of the gallery's embeddings, with inner products or L2 distances, such as
                    ``IndexFlatIP``, ``IndexFlatL2``, ``IndexHNSWFlat`` or ``IndexIDMap2``; it must
                    give back its vectors (``reconstruct``).
        forward_func (Callable or torch.nn.Module): The encoder, from images to embeddings (B, D).
        layer (torch.nn.Module): As in :class:`~captum_fam.FeatureActivationMap`.
        gallery (optional): The images by their number in the index, ready for the encoder: a tensor
                    (N, C, H, W), or whatever gives an image (C, H, W), or a tuple that begins with
                    it, for ``gallery[i]``, such as a ``torch.utils.data.Dataset``.
                    Default: None, no maps of the hits
        k (int): Hits for each query.
                    Default: 5
        similarity (str, optional): ``"cosine"`` for an index of inner products that holds normalised
                    vectors: the query's embedding is normalised, too. (For L2 distances between
                    normalised vectors, the encoder must return them so.)
                    Default: None, ``"dot"`` for inner products and ``"euclidean"`` for L2
        method (type): :class:`~captum_fam.FeatureActivationMap` or
                    :class:`~captum_fam.SimilarityDecomposition`.
                    Default: FeatureActivationMap
        internal_batch_size (int, optional): At most so many queries, and hits, go through the encoder at
                    a time.
                    Default: None, all at once
        **options (Any): Further options of the method.

    Returns:
        *RetrievalExplanation*: hits, faiss's scores, the maps of the query and of the hits.

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.
        RuntimeError: the jacobian is needed under ``torch.inference_mode()``.

    Warns where the similarity to a stored vector is not the score of the index (a lossy one), and
    where an image of the gallery has another embedding than the index holds for it.

    Examples::

        >>> import faiss
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> gallery, index = torch.rand(20, 3, 16, 16), faiss.IndexFlatL2(8)
        >>> index.add(encoder(gallery).detach().numpy())
        >>> found = explain_retrieval(gallery[:2], index, encoder, encoder[1], gallery, k=3)
        >>> found.indices[:, 0], found.maps.shape
        (tensor([0, 1]), torch.Size([2, 3, 14, 14]))
    """
    check_positive("k", k)
    similarity = _similarity(index, similarity)
    explainer = method_of(method, "explain_retrieval", forward_func, layer, similarity=similarity, **options)
    (query,) = format_inputs("query", query)
    if query.ndim != 4:
        raise ValueError(
            f"Expected `query` to be images (B, C, H, W), but got {describe(query)}; give a single image a batch"
            " dimension, query[None]."
        )
    hits: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def search(z: Tensor, rows: slice) -> Tensor:
        hits[rows.start] = _search(index, _searched(z, similarity), k, similarity)
        return hits[rows.start][2]

    found, explanation = explained(explainer, (query,), search, internal_batch_size)
    scores, indices, s = map(torch.cat, zip(*hits.values()))
    z, there = widen(explanation.embedding), indices >= 0
    similarity_scores = -scores if similarity == "euclidean" else scores
    warned = explanation.report.texts() + _warnings_of_lengths(s[there], z, similarity)
    warned += _warnings_of_scores(similarity_scores, found["similarities"], there, _searched(z, similarity), s)
    there = there.to(z.device)
    shown = there.reshape(*there.shape, *[1] * (found["maps"].ndim - 2))
    for name in ("maps", "signed_maps"):
        found[name] = torch.where(shown, found[name], torch.zeros_like(found[name]))
    found["similarities"] = torch.where(there, found["similarities"], -torch.inf)
    found["constants"] = torch.where(there, found["constants"], 0)
    found["explainable"] = found["explainable"] & there
    hit_maps = None
    if gallery is not None:
        far = torch.zeros(indices.shape)
        rows = [
            _hit_maps(explainer, query, gallery, *row, warned, internal_batch_size) for row in zip(z, indices, s, far)
        ]
        empty = next((torch.zeros_like(r) for r in rows if r is not None), torch.zeros_like(found["maps"][:1].sum(0)))
        hit_maps = torch.stack([empty if r is None else r for r in rows]) if rows else found["maps"]
        warned += _warnings_of_gallery(indices[far > _SAME])
    warn_once(warned)
    to = query.device
    return RetrievalExplanation(**found, indices=indices.to(to), scores=scores.to(to), hit_maps=hit_maps)


def _searched(z: Tensor, similarity: str) -> Tensor:
    """What an index is searched with."""
    return unit(widen(z)) if similarity == "cosine" else widen(z)


def _is_lossy(index: Any) -> bool:
    """Whether an index keeps less of a vector than its numbers in single precision."""
    try:
        size: int = getattr(index, "storage", index).sa_code_size()  # of HNSW, the storage has the vectors
    except (AttributeError, RuntimeError):
        return False
    return bool(size < 4 * index.d)


def _similarity(index: Any, similarity: Similarity | None) -> str:
    """The similarity that an index searches by."""
    metric = getattr(index, "metric_type", None)
    if metric not in (_INNER_PRODUCT, _L2) or not hasattr(index, "reconstruct"):
        got = type(index).__name__ if metric is None else f"{type(index).__name__} with metric {metric}"
        raise ValueError(f"Expected `index` to be a faiss index of inner products or L2 distances, but got {got}.")
    possible = ("dot", "cosine") if metric == _INNER_PRODUCT else ("euclidean",)
    similarity = possible[0] if similarity is None else canonical(similarity)
    if similarity not in possible:
        kind = "inner products" if metric == _INNER_PRODUCT else "L2 distances"
        raise ValueError(
            f"The index searches by {kind}, so `similarity` may be {' or '.join(map(repr, possible))}, but got"
            f" {describe(similarity)}; leave it out."
        )
    return str(similarity)


def _search(index: Any, z: Tensor, k: int, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, k), numbers (B, k) and vectors (B, k, D) of the hits."""
    if z.shape[1] != index.d:
        raise ValueError(
            f"The index holds vectors of {index.d} dimensions, but the embeddings of `query` have {z.shape[1]};"
            " embed both with the same encoder."
        )
    if not index.ntotal:
        raise ValueError("Expected `index` to hold vectors, but it is empty; call index.add(embeddings) first.")
    scores, indices = map(torch.from_numpy, index.search(_array(z), k))
    s = _vectors(index, indices)
    off = (s.norm(dim=2) - 1).abs()[indices >= 0]
    if similarity == "cosine" and len(off) and (off.median() > _LOSSY if _is_lossy(index) else off.max() > _CLOSE):
        raise ValueError(
            'similarity="cosine" needs an index of normalised vectors: call faiss.normalize_L2(vectors) before'
            " index.add(vectors), or leave out `similarity`."
        )
    return scores, indices, s


def _vectors(index: Any, indices: Tensor) -> Tensor:
    """The stored vectors (B, k, D); ones for what was not found."""
    s = torch.ones(*indices.shape, index.d)
    for place in (indices >= 0).nonzero().tolist():
        number = int(indices[tuple(place)])
        try:
            s[tuple(place)] = torch.from_numpy(np.asarray(index.reconstruct(number)))
        except RuntimeError as error:
            raise ValueError(
                f"{type(index).__name__} does not give back its vectors: for an IndexIDMap use IndexIDMap2, for an"
                " inverted file call index.make_direct_map() first."
            ) from error
    return s


def _hit_maps(
    method: DimensionAttribution,
    query: Tensor,
    gallery: Any,
    z: Tensor,
    indices: Tensor,
    s: Tensor,
    far: Tensor,
    warned: list[str],
    internal_batch_size: int | None,
) -> Tensor | None:
    """
    The hits' own maps for the embedding z (D,) of one query, (k, *spatial), or None without hits. Notes how far
    (k,) their embeddings are from the stored ones.
    """
    there = (indices >= 0).nonzero().flatten()
    numbers = indices[there].tolist()
    if not numbers:
        return None
    images = [_image(gallery, number) for number in numbers]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"Expected images of one shape in `gallery`, but got {sorted({tuple(i.shape) for i in images})};"
            " resize them as for the encoder."
        )
    found = method.explain(
        (torch.stack(images).to(query),),
        lambda _, rows: Question(z[None], torch.zeros(1, 1, dtype=torch.long)),
        internal_batch_size=internal_batch_size,
        sides=("hits", "queries"),
    )
    (maps,) = found.maps
    embedded = _searched(found.embedding, str(method.similarity)).cpu().float()
    far[there] = (embedded - s[there]).norm(dim=1) / s[there].norm(dim=1)
    warned += found.report.texts()
    shown = torch.zeros(len(indices), *maps.shape[2:], dtype=maps.dtype, device=maps.device)
    shown[there.to(maps.device)] = maps[:, 0]
    return shown


def _image(gallery: Any, number: int) -> Tensor:
    try:
        image = gallery[number]
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected `gallery` to give image {number} of the index as gallery[{number}], but that failed:"
            f" {type(error).__name__}: {error}; pass all images, by their numbers in the index."
        ) from error
    image = image[0] if isinstance(image, (tuple, list)) else image
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise TypeError(
            f"Expected gallery[{number}] to be an image (C, H, W) or a tuple that begins with it, but got"
            f" {describe(image)}; apply the encoder's transform."
        )
    return image


def _warnings_of_scores(scores: Tensor, similarities: Tensor, there: Tensor, z: Tensor, s: Tensor) -> list[str]:
    """Of hits whose similarity is not the score of the index."""
    similar = similarities.cpu().float()
    lengths = z.cpu().float().norm(dim=1)[:, None] ** 2 + s.norm(dim=2) ** 2
    off = ((similar - scores).abs() > _CLOSE * scores.abs() + _ROUNDING * lengths) & there
    if not off.any():
        return []
    here, found = scores[off][0].item(), similar[off][0].item()
    return [
        f"The index gave a score of {here:.4g}, but the similarity to the vector that it holds is {found:.4g}: it is"
        " lossy or transforms vectors. The maps explain the latter."
    ]


def _warnings_of_lengths(s: Tensor, z: Tensor, similarity: Similarity | None) -> list[str]:
    """Of an index of normalised vectors that is searched with another embedding."""
    lengths = z.norm(dim=1)
    if similarity == "cosine" or not len(s) or ((s.norm(dim=1) - 1).abs() > _CLOSE).any():
        return []
    if ((lengths - 1).abs() <= _CLOSE).all():
        return []
    advice = 'pass similarity="cosine"' if similarity == "dot" else "let the encoder end with F.normalize"
    return [
        f"The index holds vectors of unit length, but the embedding of a query has length {lengths.max():.3g}: its"
        f" scores are not those of a search with normalised queries; for these, {advice}."
    ]


def _warnings_of_gallery(strange: Tensor) -> list[str]:
    """Of images whose embeddings are not those in the index."""
    if not len(strange):
        return []
    return [
        f"The embeddings of the gallery's images {strange.unique().tolist()} are not those in the index: their maps"
        " explain other scores. Give the images as they were embedded for the index, in the same order; a lossy index"
        " differs by itself."
    ]


def _array(z: Tensor) -> Any:
    return np.ascontiguousarray(z.detach().cpu().float().numpy())
