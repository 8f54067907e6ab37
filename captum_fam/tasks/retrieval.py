"""Image retrieval: why a search returned these hits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from captum_fam._checks import check_positive, describe, format_inputs, warn_once
from captum_fam.engine.question import Question
from captum_fam.engine.untouched import eagerly
from captum_fam.explorer import PairExplorer, explore_groups
from captum_fam.methods.by_name import make_method
from captum_fam.methods.dimension_attribution import DimensionAttribution
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.similarity import Similarity, widen
from captum_fam.tasks._explanation import Explanation, Origin, explained
from captum_fam.tasks._faiss import search_index, searched, similarity_of, warnings_of_lengths, warnings_of_scores
from captum_fam.visualization import Pictures

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

    def explore(
        self,
        query: int = 0,
        *,
        control: Pictures | None = None,
        photos: Pictures | None = None,
        titles: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> PairExplorer:
        r"""
        A page of a query and its hits, on which one points at a place and sees what it matches, as that of
        :func:`~captum_fam.explore_pair`. It prints the ``similarities``: of an index of L2 distances, minus the
        squared distance. The hits' images are taken from the gallery again and embedded. Where the index holds
        another vector than the image's embedding, as a lossy one does, the difference is printed as missing.

        Args:
            query (int): Number of the query, from 0.
                        Default: 0
            control (Tensor, optional): One image (1, C, H, W) of the hits' size that has nothing to do with the
                        query.
                        Default: None
            photos (list of pictures, optional): What is shown of the query, its hits and the control, in
                        this order.
                        Default: None, the images themselves
            titles (list of str, optional): Names of the query, its hits and the control, in this order.
                        Default: None, as ``"1: image 17"``, rank and number in the index
            mean, std (sequence of float, optional): As in :func:`~captum_fam.visualize_pair`.
                        Default: None

        Returns:
            *PairExplorer*: the page, with ``save(path)``.

        Raises:
            TypeError, ValueError: an argument is not as described above, there was no gallery, or nothing was
                        found for the query.

        Examples::

            >>> import faiss
            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> gallery, index = torch.rand(20, 3, 16, 16), faiss.IndexFlatL2(8)
            >>> index.add(encoder(gallery).detach().numpy())
            >>> found = explain_retrieval(gallery[:2], index, encoder, encoder[1], gallery, k=3)
            >>> found.explore(query=1)  # doctest: +ELLIPSIS
            PairExplorer(3 references, ... MB)
        """
        origin, image = self._explored(query)
        if origin.others is None:
            raise ValueError("A page shows the images of the hits: pass `gallery` to explain_retrieval.")
        there = self.indices[query] >= 0
        numbers = self.indices[query, there].tolist()
        if not numbers:
            raise ValueError(f"The index found nothing for query {query}, so there is nothing to show.")
        if titles is None:
            titles = [f"query {query}", *(f"{rank}: image {number}" for rank, number in enumerate(numbers, 1))]
            titles += ["control"] * (control is not None)
        return explore_groups(
            image,
            _images(origin.others, numbers).to(image[0]),
            [origin.method],
            scores=self.similarities[query, there].tolist(),
            control=control,
            photos=photos,
            titles=titles,
            mean=mean,
            std=std,
        )

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
    similarity = similarity_of(index, similarity)
    explainer: Any = make_method(method, "explain_retrieval", forward_func, layer, similarity=similarity, **options)
    (query,) = format_inputs("query", query)
    if query.ndim != 4:
        raise ValueError(
            f"Expected `query` to be images (B, C, H, W), but got {describe(query)}; give a single image a batch"
            " dimension, query[None]."
        )
    hits: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def search(z: Tensor, rows: slice) -> Tensor:
        hits[rows.start] = search_index(index, searched(z, similarity), k, similarity)
        return hits[rows.start][2]

    found, explanation, references = explained(explainer, (query,), search, internal_batch_size, lambda: query)
    scores, indices, s = map(torch.cat, zip(*hits.values()))
    z, there = widen(explanation.embedding), indices >= 0
    similarity_scores = -scores if similarity == "euclidean" else scores
    warned = explanation.report.texts() + warnings_of_lengths(s[there], z, similarity)
    warned += warnings_of_scores(similarity_scores, found["similarities"], there, searched(z, similarity), s)
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
    result = RetrievalExplanation(**found, indices=indices.to(to), scores=scores.to(to), hit_maps=hit_maps)
    result._remember(Origin(explainer, (query.detach(),), references, internal_batch_size, gallery))
    return result


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
    found = method.explain(
        (_images(gallery, numbers).to(query),),
        lambda _, rows: Question(z[None], torch.zeros(1, 1, dtype=torch.long)),
        internal_batch_size=internal_batch_size,
        sides=("hits", "queries"),
    )
    (maps,) = found.maps
    embedded = searched(found.embedding, str(method.similarity)).cpu().float()
    far[there] = (embedded - s[there]).norm(dim=1) / s[there].norm(dim=1)
    warned += found.report.texts()
    shown = torch.zeros(len(indices), *maps.shape[2:], dtype=maps.dtype, device=maps.device)
    shown[there.to(maps.device)] = maps[:, 0]
    return shown


def _images(gallery: Any, numbers: list[int]) -> Tensor:
    images = [_image(gallery, number) for number in numbers]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"Expected images of one shape in `gallery`, but got {sorted({tuple(i.shape) for i in images})};"
            " resize them as for the encoder."
        )
    return torch.stack(images)


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


def _warnings_of_gallery(strange: Tensor) -> list[str]:
    """Of images whose embeddings are not those in the index."""
    if not len(strange):
        return []
    return [
        f"The embeddings of the gallery's images {strange.unique().tolist()} are not those in the index: their maps"
        " explain other scores. Give the images as they were embedded for the index, in the same order; a lossy index"
        " differs by itself."
    ]
