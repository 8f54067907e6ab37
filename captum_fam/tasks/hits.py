"""Why a search returned its hits, whatever searched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_fam._checks import check_internal_batch_size, describe, format_inputs
from captum_fam.engine.chunks import slices
from captum_fam.engine.untouched import eagerly
from captum_fam.methods.by_name import make_method
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.similarity_attribution import SimilarityAttribution
from captum_fam.similarity import Similarity
from captum_fam.tasks._found import Contrast, Found, Gallery, explain_found, images_by_id
from captum_fam.tasks.retrieval_explanation import RetrievalExplanation

_ROUNDING = 1e-3  # how far scores and similarities may be out of order, as a share of their range


@dataclass(frozen=True, eq=False, repr=False)
class Hits:
    r"""
    What did a search find? k hits for each of B queries, best first, for :func:`~captum_fam.explain_hits`. Make it by
    hand, or from a store's answer with the functions ``from_...`` of ``captum_fam.tasks.stores``. Pass at least one
    argument.

    Args:
        ids (list of lists, optional): The ids of the hits, numbers or strings, in B lists of k; None or -1 where fewer
                    were found.
                    Default: None, their ranks
        scores (Tensor, optional): The scores that the search returned, similarities or distances, (B, k).
                    Default: None
        embeddings (Tensor, optional): The embeddings of the hits, (B, k, D), floating point.
                    Default: None, made of the images
        images (Tensor, optional): The images of the hits, (B, k, C, \*spatial), ready for the encoder.
                    Default: None, taken from a gallery

    Raises:
        TypeError, ValueError: the arguments are not as described above, or do not fit each other.

    Examples::

        >>> Hits(ids=[["a", "b", "c"]], embeddings=torch.rand(1, 3, 8))
        Hits(queries=1, hits=3)
    """

    ids: Sequence[Sequence[Any]] | None = None
    scores: Tensor | None = None
    embeddings: Tensor | None = None
    images: Tensor | None = None

    def __post_init__(self) -> None:
        least = {"scores": 2, "embeddings": 3, "images": 4}
        for name, ndim in least.items():
            value = getattr(self, name)
            if value is None:
                continue
            value = torch.as_tensor(value) if isinstance(value, (np.ndarray, list, tuple)) else value
            right = isinstance(value, Tensor) and (value.ndim == ndim if ndim < 4 else value.ndim >= ndim)
            if not right or (name != "scores" and not value.is_floating_point()):
                form = {
                    "scores": "(B, k)",
                    "embeddings": "(B, k, D), floating point",
                    "images": "(B, k, C, *spatial), floating point, ready for the encoder",
                }
                raise ValueError(f"Expected `{name}` of hits to be {form[name]}, but got {describe(value)}.")
            object.__setattr__(self, name, value)
        if self.ids is not None:
            rows = self.ids.tolist() if isinstance(self.ids, (Tensor, np.ndarray)) else self.ids
            if isinstance(rows, str) or any(isinstance(row, str) or not isinstance(row, Sequence) for row in rows):
                raise ValueError(
                    "Expected `ids` of hits to be a list for each query, [[id, id, ...]], but got"
                    f" {describe(self.ids)} of {[describe(row) for row in rows][:3]}."
                )
            object.__setattr__(self, "ids", [[_plain(number) for number in row] for row in rows])
        sizes = {name: tuple(getattr(self, name).shape[:2]) for name in least if getattr(self, name) is not None}
        if self.ids is not None:
            lengths = {len(row) for row in self.ids}
            if len(lengths) > 1:
                raise ValueError(
                    f"Expected `ids` of hits to be equally many for each query, but got {sorted(lengths)}."
                )
            sizes["ids"] = len(self.ids), lengths.pop() if lengths else 0
        if not sizes:
            raise ValueError(
                "Expected at least one of `ids`, `scores`, `embeddings` and `images` of hits, but got none."
            )
        if len(set(sizes.values())) != 1:
            raise ValueError(f"Expected the same B queries and k hits in all arguments of Hits, but got {sizes}.")

    @property
    def shape(self) -> tuple[int, int]:
        """B and k"""
        tensor = next((t for t in (self.scores, self.embeddings, self.images) if t is not None), None)
        if tensor is not None:
            return len(tensor), tensor.shape[1]
        rows: Any = self.ids
        return len(rows), len(rows[0]) if rows else 0

    def __repr__(self) -> str:
        return f"Hits(queries={self.shape[0]}, hits={self.shape[1]})"


def _plain(number: Any) -> Any:
    """An id as a Python value; None for -1, which faiss gives where it found nothing."""
    number = number.item() if isinstance(number, (np.generic, Tensor)) else number
    return None if isinstance(number, int) and number == -1 else number


@eagerly
def explain_hits(
    query: Tensor,
    hits: Hits | Tensor,
    forward_func: Callable[..., Any],
    layer: nn.Module | None,
    gallery: Gallery | Sequence[Any] | None = None,
    *,
    similarity: Similarity | None = None,
    method: type[SimilarityAttribution] | str = FeatureActivationMap,
    contrast: Contrast = None,
    threshold: float | None = None,
    internal_batch_size: int | None = None,
    **options: Any,
) -> RetrievalExplanation:
    r"""
    Why did a search return these hits? Explains the hits of any search: a store, an index, a service, or a list made by
    hand.

    Args:
        query (Tensor): B inputs of the encoder, (B, C, \*spatial).
        hits (Hits or Tensor): What was found: :class:`~captum_fam.Hits`; or the images of the hits,
                    (B, k, C, \*spatial), or (k, C, \*spatial) of one query.
        forward_func (Callable or torch.nn.Module): The encoder, from images to embeddings (B, D).
        layer (torch.nn.Module): As in :class:`~captum_fam.FeatureActivationMap`. None for
                    IntegratedDecomposition, which finds one, and Relax, which needs none.
        gallery (optional): The images of the hits by their ids, ready for the encoder: a dict, a tensor, a
                    ``torch.utils.data.Dataset``, or another object whose ``gallery[id]`` is an image (C, \*spatial), or
                    a tuple that begins with it.
                    Default: None, the images of the hits, if there are any
        similarity (str or Callable, optional): What the search ranks by, as in
                    :func:`~captum_fam.channel_contributions`.
                    Default: None, ``"cosine"``
        method (type or str): A method of this package that explains similarities, or its name.
                    :class:`~captum_fam.CorrespondenceMap` needs images of the hits.
                    Default: FeatureActivationMap
        contrast (int or str, optional): What the maps show. ``"self"``: what query and hit have in common beyond what
                    each has with itself, on both sides; this takes one more pass. The rank of another hit, from 0: why
                    each hit rather than that one. ``"rest"``: rather than the mean of the others. There are
                    no ``hit_maps`` then, because a hit is compared with the query alone.
                    Default: None, what query and hit have in common
        threshold (float, optional): The maps show why each similarity lies above or below this value, on both sides;
                    this takes one more pass.
                    Default: None
        internal_batch_size (int, optional): How many images go through the encoder at a time.
                    Default: None, all queries at once, and all hits of a query
        **options (Any): Further options of the method.

    Returns:
        *RetrievalExplanation*: ids, scores, similarities, the maps of the query and, where there are images,
        of the hits.

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.
        RuntimeError: the jacobian is needed under ``torch.inference_mode()``.

    Warns if the similarities order the hits in another way than the scores of the search, and if an image's embedding
    is not that of its hit.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> query, photos = torch.rand(1, 3, 16, 16), {"shoe": torch.rand(3, 16, 16), "hat": torch.rand(3, 16, 16)}
        >>> found = explain_hits(query, Hits(ids=[["hat", "shoe"]]), encoder, encoder[1], photos, contrast="self")
        >>> found.ids, found.maps.shape, found.hit_maps.shape
        ([['hat', 'shoe']], torch.Size([1, 2, 14, 14]), torch.Size([1, 2, 14, 14]))
    """
    check_internal_batch_size(internal_batch_size)
    explainer: Any = make_method(method, "explain_hits", forward_func, layer, similarity, **options)
    query = one_batch(query)
    given = _as_hits(hits, query)
    B, k = given.shape
    if len(query) != B:
        raise ValueError(f"Expected hits for each of the {len(query)} queries, but got those of {B}.")
    if B and not k:
        raise ValueError("Expected at least one hit of a query, but got none; look at what was searched.")
    k = k or 1  # of no query
    ids = [list(row) for row in given.ids] if given.ids is not None else [list(range(k)) for _ in range(B)]
    there = torch.tensor([[number is not None for number in row] for row in ids], dtype=torch.bool).reshape(B, k)
    if gallery is not None and (given.ids is None or given.images is not None):
        raise ValueError(
            "Expected a `gallery` for hits with ids and without images, but got hits"
            f" {'without ids' if given.ids is None else 'with images'}; pass Hits(ids=...), or leave the gallery out."
        )
    images = images_by_id(gallery, given.images, ids, query.ndim - 1)
    s = given.embeddings
    if s is None:
        if images is None:
            raise ValueError(
                "Expected images or embeddings of the hits: pass a `gallery` that has them by their ids, or"
                " Hits(embeddings=...)."
            )
        s = _embedded(explainer, images, there, query, internal_batch_size)

    def search(z: Tensor, rows: slice) -> Found:
        return Found(ids[rows], None if given.scores is None else given.scores[rows], there[rows], s[rows])

    def check(result: RetrievalExplanation, z: Tensor, s: Tensor) -> list[str]:
        return _warnings_of_order(result)

    return explain_found(explainer, query, search, images, check, contrast, threshold, internal_batch_size)


def one_batch(query: Any) -> Tensor:
    (batch,) = format_inputs("query", query)
    if batch.ndim < 3:
        raise ValueError(f"Expected `query` to be inputs (B, C, *spatial), but got {describe(batch)}.")
    return batch


def _as_hits(hits: Any, query: Tensor) -> Hits:
    if isinstance(hits, Hits):
        return hits
    if not isinstance(hits, Tensor) or hits.ndim not in (query.ndim, query.ndim + 1):
        raise TypeError(
            f"Expected `hits` to be Hits, or images {'(k, C, *spatial) or ' if len(query) == 1 else ''}(B, k, C,"
            f" *spatial), but got {describe(hits)}; embeddings go in as Hits(embeddings=...)."
        )
    if hits.ndim == query.ndim:
        if len(query) != 1:
            raise ValueError(
                f"Expected the images of `hits` for each of {len(query)} queries, (B, k, C, *spatial), but got"
                f" {describe(hits)}; a single query has a batch dimension, query[None]."
            )
        hits = hits[None]
    return Hits(images=hits)


def _embedded(
    method: Any,
    images: Callable[[int, list[int]], Tensor],
    there: Tensor,
    query: Tensor,
    internal_batch_size: int | None,
) -> Tensor:
    """The embeddings (B, k, D) of the hits, made of their images."""
    s: Tensor | None = None
    for b, row in enumerate(there):
        ranks = row.nonzero().flatten().tolist()
        for some in slices(len(ranks), internal_batch_size) if ranks else ():
            embedded = method.embed(images(b, ranks[some]).to(query))
            s = embedded.new_ones(*there.shape, embedded.shape[1]) if s is None else s
            s[b, ranks[some]] = embedded
    return method.embed(query)[:, None].expand(-1, there.shape[1], -1) if s is None else s


def _warnings_of_order(found: RetrievalExplanation) -> list[str]:
    """The warning if scores order the hits of a query neither as their similarities nor as distances do."""
    if found.scores is None:
        return []
    for scores, similarities in zip(found.scores.cpu().double(), found.similarities.cpu().double()):
        known = scores.isfinite() & similarities.isfinite()
        x, y = scores[known], similarities[known]
        if len(x) < 2:
            continue
        best_first = (x.diff() <= 0).all() or (x.diff() >= 0).all()  # as searches return them
        if best_first:  # ranks, that of equals the same
            x = -F.pad((x.diff() != 0).cumsum(0), (1, 0)).to(y)
        steps = [v[:, None] - v for v in (x, y)]
        clear = [step.abs() > _ROUNDING * v.abs().max() for step, v in zip(steps, (x, y))]
        signs = set((steps[0] * steps[1]).sign()[clear[0] & clear[1]].tolist())
        if len(signs) > 1 or (best_first and -1 in signs):
            return [
                "The similarities that are explained order the hits in another way than the scores of the search. Pass"
                " the search's own `similarity`, the same encoder, and its embeddings. With a lossy index, this can"
                " happen though all is right."
            ]
    return []
