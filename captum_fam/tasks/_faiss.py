"""What an index of faiss finds, and whether it is what it says."""

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
_LOSSY = 0.2  # how far the median length of normalised vectors may be from one, in an index that is lossy


def searched(z: Tensor, similarity: str) -> Tensor:
    """What an index is searched with."""
    return unit(widen(z)) if similarity == "cosine" else widen(z)


def _is_lossy(index: Any) -> bool:
    """Whether an index keeps less of a vector than its numbers in single precision."""
    try:
        size: int = getattr(index, "storage", index).sa_code_size()  # of HNSW, the storage has the vectors
    except (AttributeError, RuntimeError):
        return False
    return bool(size < 4 * index.d)


def similarity_of(index: Any, similarity: Similarity | None) -> str:
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


def search_index(index: Any, z: Tensor, k: int, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
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


def warnings_of_scores(scores: Tensor, similarities: Tensor, there: Tensor, z: Tensor, s: Tensor) -> list[str]:
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


def warnings_of_lengths(s: Tensor, z: Tensor, similarity: Similarity | None) -> list[str]:
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


def _array(z: Tensor) -> Any:
    return np.ascontiguousarray(z.detach().cpu().float().numpy())
