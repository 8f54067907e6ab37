"""Image retrieval with faiss: why a search returned these hits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_fam._checks import check_positive
from captum_fam.engine.untouched import eagerly
from captum_fam.methods.by_name import make_method
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.similarity_attribution import SimilarityAttribution
from captum_fam.similarity import Similarity
from captum_fam.tasks._faiss import (
    search_index,
    searched,
    similarities_of,
    similarity_of,
    warnings_of_lengths,
    warnings_of_scores,
)
from captum_fam.tasks._found import Contrast, Found, Gallery, explain_found, images_by_id
from captum_fam.tasks.hits import one_batch
from captum_fam.tasks.retrieval_explanation import RetrievalExplanation


@eagerly
def explain_retrieval(
    query: Tensor,
    index: Any,
    forward_func: Callable[..., Any],
    layer: nn.Module | None,
    gallery: Gallery | Sequence[Any] | None = None,
    k: int = 5,
    *,
    similarity: Similarity | None = None,
    method: type[SimilarityAttribution] | str = FeatureActivationMap,
    contrast: Contrast = None,
    threshold: float | None = None,
    internal_batch_size: int | None = None,
    **options: Any,
) -> RetrievalExplanation:
    r"""
    Why did a faiss index return these hits? Searches it, and explains the hits from one pass over
    the query.

    The references are the embeddings that the index holds. The gallery's images are embedded only
    for the maps of the hits.

    Args:
        query (Tensor): B images, (B, C, H, W).
        index (faiss.Index): An index of the gallery's embeddings, with inner products or L2
                    distances, that can return its vectors, such as ``IndexFlatIP``, ``IndexFlatL2``,
                    ``IndexHNSWFlat``, ``IndexIVFFlat`` or ``IndexIDMap``. For a lossy index, the
                    maps explain the vectors that it holds; to explain your own vectors, take
                    :func:`~captum_fam.tasks.stores.from_faiss`.
        forward_func (Callable or torch.nn.Module): The encoder, from images to embeddings (B, D).
        layer (torch.nn.Module): As in :func:`~captum_fam.explain_hits`.
        gallery (optional): The images by their number in the index, ready for the encoder: a tensor
                    (N, C, H, W), a ``torch.utils.data.Dataset``, or another object whose
                    ``gallery[i]`` is an image (C, H, W), or a tuple that begins with it.
                    Default: None, no maps of the hits
        k (int): Hits for each query.
                    Default: 5
        similarity (str, optional): ``"cosine"`` for an index of normalised vectors: the query's
                    embedding is then normalised, too.
                    Default: None, ``"dot"`` for inner products and ``"euclidean"`` for L2
        method, contrast, threshold: As in :func:`~captum_fam.explain_hits`.
        internal_batch_size (int, optional): How many queries, or hits, go through the encoder at a
                    time.
                    Default: None, all at once
        **options (Any): Further options of the method.

    Returns:
        *RetrievalExplanation*: hits, faiss's scores, the maps of the query and of the hits.

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.
        RuntimeError: the jacobian is needed under ``torch.inference_mode()``.

    Warns if the similarity to a stored vector is not the score of the index, as in a lossy one, and
    if an image of the gallery has another embedding than the index holds for it.

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
    explainer: Any = make_method(method, "explain_retrieval", forward_func, layer, similarity, **options)
    query = one_batch(query)
    stored: list[Tensor] = []

    def search(z: Tensor, rows: slice) -> Found:
        scores, indices, s = search_index(index, searched(z, similarity), k, similarity)
        stored.append(s)
        numbers = [[None if number < 0 else number for number in row] for row in indices.tolist()]
        ids.extend(numbers)
        return Found(numbers, scores, indices >= 0, s)

    def check(found: RetrievalExplanation, z: Tensor, s: Tensor) -> list[str]:
        there, s = found.indices.cpu() >= 0, torch.cat(stored)
        scores: Any = found.scores
        texts = warnings_of_lengths(s[there], z, similarity)
        scores = similarities_of(scores.cpu(), index, similarity)
        return texts + warnings_of_scores(scores, found.similarities, there, searched(z, similarity), s)

    ids: list[list[Any]] = []
    images = images_by_id(gallery, None, ids, query.ndim - 1)
    return explain_found(explainer, query, search, images, check, contrast, threshold, internal_batch_size)
