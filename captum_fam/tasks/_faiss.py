"""What an index of faiss finds, and whether its scores are those of its vectors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_fam._checks import describe
from captum_fam._distances import canonical
from captum_fam.similarity import Similarity, unit, widen

_INNER_PRODUCT, _L2 = 0, 1  # faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2
_CLOSE = 1e-3  # how far lengths and scores may be from what they should be
_ROUNDING = 1e-5  # the same for scores, in units of the squared lengths
_LOSSY = 0.2  # how far the median length of normalised vectors may be from one in a lossy index
_OWN = (
    "take explain_hits(query, from_faiss(index.search(z, k), embeddings), encoder, layer, similarity=...), where z are"
    " the embeddings of the queries and `embeddings` those of the gallery"
)


def searched(z: Tensor, similarity: str) -> Tensor:
    """The vectors that an index is searched with."""
    return unit(widen(z)) if similarity == "cosine" else widen(z)


def _is_lossy(index: Any) -> bool:
    """Whether an index is lossy: it does not keep vectors in single precision."""
    if hasattr(index, "id_map"):
        import faiss

        return _is_lossy(faiss.downcast_index(index.index))
    try:
        size: int = getattr(index, "storage", index).sa_code_size()  # of HNSW, the storage has the vectors
    except (AttributeError, RuntimeError):
        return False
    return bool(size < 4 * index.d)


def similarity_of(index: Any, similarity: Similarity | None) -> str:
    """The similarity that an index searches by."""
    metric = getattr(index, "metric_type", None)
    binary = type(index).__name__.startswith("IndexBinary")  # says L2, and means differing bits
    if metric not in (_INNER_PRODUCT, _L2) or not hasattr(index, "reconstruct") or binary:
        got = type(index).__name__ if metric is None or binary else f"{type(index).__name__} with metric {metric}"
        raise ValueError(f"Expected `index` to be a faiss index of inner products or L2 distances, but got {got}.")
    possible = ("dot", "cosine") if metric == _INNER_PRODUCT else ("euclidean", "cosine")
    similarity = possible[0] if similarity is None else canonical(similarity)
    if similarity not in possible:
        kind = "inner products" if metric == _INNER_PRODUCT else "L2 distances"
        raise ValueError(
            f"The index searches by {kind}, so `similarity` may be {' or '.join(map(repr, possible))}, but got"
            f" {describe(similarity)}; leave it out."
        )
    return str(similarity)


def search_index(index: Any, z: Tensor, k: int, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, k), numbers (B, k) and vectors (B, k, D) of the hits."""
    if z.shape[1] != index.d:
        raise ValueError(
            f"The index holds vectors of {index.d} dimensions, but the embeddings of `query` have {z.shape[1]};"
            " embed both with the same encoder."
        )
    if not index.ntotal:
        raise ValueError("Expected `index` to hold vectors, but it is empty; call index.add(embeddings) first.")
    found, numbers, vectors = _search(index, _array(z), k)
    scores, indices = torch.from_numpy(found), torch.from_numpy(numbers)
    s = torch.from_numpy(vectors)
    s[indices < 0] = 1  # nothing was found
    off = (s.norm(dim=2) - 1).abs()[indices >= 0]
    lossy = similarity == "cosine" and _is_lossy(index)
    if similarity == "cosine" and len(off) and (off.median() > _LOSSY if lossy else off.max() > _CLOSE):
        raise ValueError(
            'similarity="cosine" needs an index of normalised vectors: call faiss.normalize_L2(vectors) before'
            " index.add(vectors), or leave out `similarity`."
            + f" This index is lossy: if the vectors were normalised, {_OWN}."
            * lossy
        )
    return scores, indices, s


def _search(index: Any, z: Any, k: int) -> tuple[Any, Any, Any]:
    """Scores (B, k), numbers (B, k) and vectors (B, k, D) of the hits, as arrays; the index is left as it is."""
    if hasattr(index, "id_map"):
        import faiss

        # An IndexIDMap does not return vectors by its numbers; the index inside returns them by position.
        scores, places, vectors = _search(index.index, z, k)
        numbers = faiss.rev_swig_ptr(index.id_map.data(), index.ntotal)  # a view
        return scores, np.where(places < 0, -1, numbers[places]), vectors
    try:
        found: tuple[Any, Any, Any] = index.search_and_reconstruct(z, k)  # works without a direct map
    except RuntimeError:
        scores, numbers = index.search(z, k)
        return scores, numbers, _vectors(index, numbers)
    return found


def _vectors(index: Any, numbers: Any) -> Any:
    """The stored vectors (B, k, D), one by one."""
    vectors = np.ones((*numbers.shape, index.d), np.float32)
    try:
        for place in zip(*np.nonzero(numbers >= 0)):
            vectors[place] = index.reconstruct(int(numbers[place]))
    except RuntimeError as error:
        raise ValueError(f"{type(index).__name__} does not give back its vectors. With your own: {_OWN}.") from error
    return vectors


def similarities_of(scores: Tensor, index: Any, similarity: str) -> Tensor:
    """The similarities that the scores of an index stand for."""
    if index.metric_type == _INNER_PRODUCT:
        return scores
    return 1 - scores / 2 if similarity == "cosine" else -scores  # |z - s|^2 = 2 - 2 cos for vectors of unit length


def warnings_of_scores(scores: Tensor, similarities: Tensor, there: Tensor, z: Tensor, s: Tensor) -> list[str]:
    """The warning about hits whose similarity is not the score of the index."""
    similar = similarities.cpu().float()
    lengths = z.cpu().float().norm(dim=1)[:, None] ** 2 + s.norm(dim=2) ** 2
    off = ((similar - scores).abs() > _CLOSE * scores.abs() + _ROUNDING * lengths) & there
    if not off.any():
        return []
    here, found = scores[off][0].item(), similar[off][0].item()
    return [
        f"The index gave a score of {here:.4g}, but the similarity to the vector that it holds is {found:.4g}: it is"
        f" lossy or transforms vectors. The maps explain this similarity. With your own vectors: {_OWN}."
    ]


def warnings_of_lengths(s: Tensor, z: Tensor, similarity: Similarity | None) -> list[str]:
    """The warning about an index of normalised vectors that is searched with another embedding."""
    lengths = z.norm(dim=1)
    if similarity == "cosine" or not len(s) or ((s.norm(dim=1) - 1).abs() > _CLOSE).any():
        return []
    if ((lengths - 1).abs() <= _CLOSE).all():
        return []
    return [
        f"The index holds vectors of unit length, but the embedding of a query has length {lengths.max():.3g}: its"
        ' scores are not those of a search with normalised queries; for these, pass similarity="cosine".'
    ]


def _array(z: Tensor) -> Any:
    return np.ascontiguousarray(z.detach().cpu().float().numpy())
