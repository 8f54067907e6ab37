"""Late interaction: why a query of many vectors matches a page of many vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from captum_fam._checks import describe, warn
from captum_fam.explorer import PairExplorer, explore_pair
from captum_fam.similarity import exact, norm
from captum_fam.tasks._pages import as_words, check_upright, maxsim_figure, written
from captum_fam.tasks._vectors import Vectors, as_grid, as_places, as_vectors
from captum_fam.visualization import Pictures, pictures

_ROUNDING = 4  # units in the last place of |q||p|: products of the same two rows differ by this much between positions


@dataclass(frozen=True, repr=False, eq=False)
class MaxSimExplanation:
    r"""
    Where did each token of a query find its best match in a page? Made by :func:`~captum_fam.explain_maxsim`. Tensors
    begin with (B,) if the queries were a batch, then with (K,) if the pages were; ``found[k]`` is one of them.

    Attributes:
        query_embeddings (Tensor): The query as it was scored, (\*, T, D): masked rows are zero, and with
                    ``length_normalize`` all are divided by the number of tokens.
        token_scores (Tensor): What each token adds to the score: its similarity with its best match, (\*, T).
        similarities (Tensor): The similarity of each token with each patch, (\*, T, h, w), masked patches included.
        matches (Tensor): The share of each patch in the token's best match, (\*, T, h, w): 1 at the best match, 1 / n
                    at each of n that are equally good, else 0.
        unplaced (Tensor): The share of the best match that is not a patch but another token of the page, (\*, T).
        explains (str): ``"score"``, or ``"difference"`` for a :meth:`contrast`.

    Examples::

        >>> from captum_fam.tasks.late_interaction import explain_maxsim
        >>> query, pages = torch.randn(5, 128), torch.randn(2, 1024, 128)
        >>> found = explain_maxsim(query, pages, (32, 32))
        >>> found.score.shape, found.token_maps.shape, found.map.shape
        (torch.Size([2]), torch.Size([2, 5, 32, 32]), torch.Size([2, 32, 32]))
        >>> difference = found[0].contrast(found[1])  # why the first page rather than the second
        >>> torch.allclose(difference.map.sum(), found.score[0] - found.score[1], atol=1e-4)
        True
    """

    query_embeddings: Tensor
    token_scores: Tensor
    similarities: Tensor
    matches: Tensor
    unplaced: Tensor
    explains: str = "score"

    @property
    def score(self) -> Tensor:
        r"""The score: the sum of ``token_scores``, (\*)."""
        return self.token_scores.sum(-1)

    @property
    def token_maps(self) -> Tensor:
        r"""Where each token adds to the score: the amount, at its best patch, (\*, T, h, w)."""
        return self.token_scores[..., None, None] * self.matches

    @property
    def map(self) -> Tensor:
        r"""The sum of ``token_maps``, (\*, h, w); together with ``rest`` it adds up to the score."""
        return self.token_maps.sum(-3)

    @property
    def rest(self) -> Tensor:
        r"""The part of the score that belongs to no patch, (\*)."""
        return (self.token_scores * self.unplaced).sum(-1)

    def __getitem__(self, index: int | slice) -> "MaxSimExplanation":
        index = int(index) if isinstance(index, np.integer) else index
        if self.token_scores.ndim < 2 or not isinstance(index, (int, slice)):
            raise TypeError(f"Expected the number of one of several pages or queries, but got {index!r} for {self!r}.")
        return self._at(index)

    def __repr__(self) -> str:
        return f"MaxSimExplanation(token_maps={tuple(self.matches.shape)})"

    def contrast(self, other: "MaxSimExplanation") -> "MaxSimExplanation":
        r"""
        Why this page rather than another? What each token finds here, less what it finds there. The score of the result
        is the difference of the scores. Its map lies on this page and, with the rest, adds up to it: red where tokens
        find more than in the other page, blue where they find less. ``other.contrast(self)`` is the map on the other
        page.

        Args:
            other (MaxSimExplanation): An explanation of the same query and another page, of any grid.

        Returns:
            *MaxSimExplanation*: with the places and ``similarities`` of this page.

        Raises:
            TypeError, ValueError: ``other`` is no explanation, or one of another query.

        Examples::

            >>> from captum_fam.tasks.late_interaction import explain_maxsim
            >>> query = torch.eye(2)
            >>> page = explain_maxsim(query, torch.tensor([[3.0, 0], [0, 2]]), (1, 2))
            >>> other = explain_maxsim(query, torch.tensor([[1.0, 4]]), (1, 1))
            >>> page.contrast(other).map  # 3 - 1 and 2 - 4
            tensor([[ 2., -2.]])
        """
        if not isinstance(other, MaxSimExplanation):
            raise TypeError(f"Expected `other` to be a MaxSimExplanation, but got {describe(other)}.")
        if not torch.equal(self.query_embeddings, other.query_embeddings):
            raise ValueError(
                f"Expected `other` to explain the same query, {describe(self.query_embeddings)}, but its query is"
                f" another, {describe(other.query_embeddings)}; choose one page of each, as found[0].contrast(found[1])"
                "."
            )
        return replace(self, token_scores=self.token_scores - other.token_scores, explains="difference")

    def explore(
        self,
        page: Pictures,
        tokens: Sequence[str] | None = None,
        *,
        query: Pictures | None = None,
        query_grid: tuple[int, int] | None = None,
        titles: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> PairExplorer:
        r"""
        Which patch does each token match? Makes a page to explore, as :func:`~captum_fam.explore_pair` does, with the
        query as a list of its tokens: point at a token or a patch to see what each pair adds to the score, and the
        similarities.

        Args:
            page (picture, or a list of them): The page, or K pages.
            tokens (list of str, optional): The T tokens of the query.
                        Default: None, their numbers
            query (picture, optional): The query, if it is an image whose patches are the tokens.
                        Default: None
            query_grid (tuple of int, optional): Rows and columns of that image's patches, T in all.
                        Default: None
            titles (list of str, optional): Names of the query and the pages.
                        Default: None, such as ``"page 1, score 12.3"``, and how much of the score is at no patch
            mean, std (sequence of float, optional): As in :func:`~captum_fam.visualize_pair`.
                        Default: None

        Returns:
            *PairExplorer*: the page, with ``save(path)``.

        Raises:
            TypeError, ValueError: an argument is not as described above, or there are several queries.

        Examples::

            >>> from captum_fam.tasks.late_interaction import explain_maxsim
            >>> found = explain_maxsim(torch.randn(2, 8), torch.randn(12, 8), (4, 3))
            >>> found.explore(torch.rand(3, 40, 30), ["a", "red"])  # doctest: +ELLIPSIS
            PairExplorer(1 references, ... MB)
        """
        one = self if self.matches.ndim == 4 else self._listed()
        K, T = one.token_scores.shape
        if not torch.equal(one.query_embeddings, one.query_embeddings[:1].expand(K, -1, -1)):
            raise ValueError("Expected one query, but this explains several; choose one, as found[0].")
        several: Any = page if isinstance(page, Sequence) or getattr(page, "ndim", 0) == 4 else [page]
        if len(several) != K:
            raise ValueError(f"Expected `page` to be {K} pictures, one for each page, but got {len(several)}.")
        shown = pictures("page", page, K, mean, std)
        check_upright("grid", one.map[0], shown)
        if (query is None) != (query_grid is None):
            raise ValueError("Expected `query` and `query_grid` together, or neither for a query of words.")
        rows, columns = (T, 1) if query_grid is None else as_grid("query_grid", query_grid)
        if rows * columns != T:
            raise ValueError(
                f"Expected `query_grid` of the {T} tokens of the query, but got {rows} x {columns}; explain"
                " query_embeddings[patches] if other tokens are among them."
            )
        words = as_words(tokens, T)
        drawn = written(words) if query is None else pictures("query", query, 1, mean, std)[0]
        if query is not None:
            check_upright("query_grid", one.token_scores[0].reshape(rows, columns), [drawn])
        named = [f"page{f' {k + 1}' * (K > 1)}, {self.explains} {amount}" for k, amount in enumerate(_amounts(one))]
        matrices = {f"adds to the {self.explains}": one.token_maps, "similarity": one.similarities}
        return explore_pair(
            drawn,
            shown,
            {name: values.unflatten(1, (rows, columns)) for name, values in matrices.items()},
            titles=["query", *named] if titles is None else titles,
        )

    def visualize(
        self,
        page: Pictures,
        tokens: Sequence[str] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        use_pyplot: bool = True,
    ) -> tuple[Figure, NDArray[Any]]:
        r"""
        Where on the page is the score? Draws the page with the map of its score and, for each token that counts, its
        similarities with all patches. Boxes mark the best matches, which make the score.

        Args:
            page (Tensor, array or PIL.Image): The page, an image as in :func:`~captum_fam.visualize_pair`.
            tokens (list of str, optional): The T tokens of the query, drawn as titles.
                        Default: None, their numbers
            mean, std, use_pyplot: As in :func:`~captum_fam.visualize_pair`.

        Returns:
            *tuple*: the Figure and its Axes, an array (2 + number of tokens,).

        Raises:
            TypeError, ValueError: an argument is not as described above, or there are several pages.

        Examples::

            >>> from captum_fam.tasks.late_interaction import explain_maxsim
            >>> found = explain_maxsim(torch.randn(2, 8), torch.randn(12, 8), (4, 3))
            >>> figure, axes = found.visualize(torch.rand(3, 40, 30), ["a", "red"], use_pyplot=False)
            >>> axes.shape
            (4,)
        """
        (amount,) = _amounts(self._listed())
        (image,) = pictures("page", page, 1, mean, std)
        words = as_words(tokens, len(self.token_scores))
        check_upright("grid", self.map, [image])
        shown = self.query_embeddings.any(-1).nonzero().flatten().tolist()
        return maxsim_figure(
            image,
            self.map.cpu(),
            self.similarities[shown].cpu(),
            self.matches[shown].cpu(),
            amount,
            [words[t] for t in shown],
            [_amount(self.token_scores[t], self.unplaced[t]) for t in shown],
            self.explains,
            use_pyplot,
        )

    def _listed(self) -> "MaxSimExplanation":
        """One query and one page as a list of one page."""
        if self.token_scores.ndim > 1:
            raise ValueError(
                f"Expected an explanation of one query and one page, but this has {tuple(self.score.shape)}; choose"
                " one, as found[0]."
            )
        return self._at(None)

    def _at(self, index: int | slice | None) -> "MaxSimExplanation":
        return replace(self, **{name: value[index] for name, value in vars(self).items() if name != "explains"})


def explain_maxsim(
    query_embeddings: Vectors,
    page_embeddings: Vectors,
    grid: tuple[int, int],
    *,
    query_mask: Vectors | None = None,
    page_mask: Vectors | None = None,
    patches: Vectors | None = None,
    length_normalize: bool = False,
) -> MaxSimExplanation:
    r"""
    Where does each token of a query find its best match in a page, and what does it add to the score of late
    interaction (MaxSim; `ColBERT <https://arxiv.org/abs/2004.12832>`_, `ColPali <https://arxiv.org/abs/2407.01449>`_)?
    A token adds its dot product with its best match,

    .. math:: \text{score} = \sum_t \max_p \, q_t \cdot p

    so the parts of the score are exact, and belong to the patches that are best matches. Other tokens of the page, such
    as those of its prompt, may be best matches, too; what they add is the ``rest``. Embeddings are taken as they are,
    normalised or not; half precision is computed in float32. Patches that are equally good, up to rounding, share
    equally.

    Args:
        query_embeddings (Tensor): Embeddings of the query's tokens (T, D), or of B queries (B, T, D) or a list of B.
                    Arrays and lists of numbers are fine, too.
        page_embeddings (Tensor): Embeddings of the page's tokens (P, D), or of K pages (K, P, D) or a list of K.
        grid (tuple of int): Rows and columns of patches, (h, w). (``get_n_patches`` of sentence-transformers returns
                    columns first.)
        query_mask, page_mask (Tensor, optional): Which tokens count, (B, T) or (T,), (K, P) or (P,), or lists of
                    them, as ``attention_mask``.
                    Default: None, all. Rows of zeros in a page count, too, as in ``score_retrieval`` of transformers
        patches (Tensor, optional): Which tokens of the page are patches, row by row: a bool mask (K, P) or (P,), such
                    as ``input_ids == image_token_id``; or, if they are in another order, the number of the token at
                    each place, (K, h, w) or (h, w).
                    Default: None, all tokens, which must then be h times w
        length_normalize (bool): Divides the score by the number of the query's tokens, as ``mean_maxsim`` of
                    sentence-transformers does.
                    Default: False

    Returns:
        *MaxSimExplanation*: the score, each token's map, and the map of the score.

    Raises:
        TypeError, ValueError: an argument is not as described above; embeddings are not finite, or no token of a page
                    counts.

    Examples::

        >>> from captum_fam.tasks.late_interaction import explain_maxsim
        >>> query = torch.tensor([[1.0, 0], [0, 1]])
        >>> page = torch.tensor([[0.0, 3], [2, 0], [1, 1], [1, 0], [0, 1]])  # a token of the prompt, then patches
        >>> found = explain_maxsim(query, page, (2, 2), patches=torch.tensor([False, True, True, True, True]))
        >>> found.score, found.map, found.rest
        (tensor(5.), tensor([[2., 0.],
                [0., 0.]]), tensor(3.))
    """
    q, counted, queries = as_vectors("query_embeddings", query_embeddings, "query_mask", query_mask)
    p, there, pages = as_vectors("page_embeddings", page_embeddings, "page_mask", page_mask)
    if q.shape[-1] != p.shape[-1]:
        raise ValueError(
            f"Expected `page_embeddings` of the {q.shape[-1]} dimensions of `query_embeddings`, but got {p.shape[-1]}."
        )
    dtype = torch.promote_types(q.dtype, p.dtype)
    q, p = q.to(p.device, dtype), p.to(dtype)
    (B, T), (K, P) = q.shape[:2], p.shape[:2]
    counts = q.any(-1) if counted is None else counted.to(p.device)
    kept = torch.ones(K, P, dtype=torch.bool, device=p.device) if there is None else there.to(p.device)
    lengths, counts = counts.sum(1), counts & q.any(-1)  # zero rows add nothing
    for name, x, mask in (("query_embeddings", q, counts), ("page_embeddings", p, kept)):
        lost = mask & ~x.isfinite().all(-1)
        if lost.any():
            raise ValueError(
                f"Expected `{name}` to be finite, but the tokens {lost.any(0).nonzero().flatten().tolist()} are not;"
                " mask the padding, or embed in float32."
            )
        if not mask.any(1).all():
            raise ValueError(
                f"Expected a token that counts in each of `{name}`, but all tokens of number"
                f" {mask.any(1).tolist().index(False)} are masked or zero."
            )
    h, w = as_grid("grid", grid)
    places = as_places(patches, (K, P), (h, w), p.device)
    with torch.no_grad(), exact(p):
        q = torch.where(counts[..., None], q, 0)
        if length_normalize:
            q = q / lengths[:, None, None]
        p = torch.where(kept[..., None] | p.isfinite(), p, 0)
        similarities = torch.einsum("btd,kpd->bktp", q, p)
        found = similarities.masked_fill(~kept[:, None], -torch.inf)
        best = found.amax(-1, keepdim=True)
        longest = torch.where(kept[..., None], norm(p), 0).amax(1)[..., None]
        tied = found >= best - _ROUNDING * torch.finfo(dtype).eps * norm(q)[:, None] * longest
        tied = tied & counts[:, None, :, None]
        matches = tied / tied.sum(-1, keepdim=True).clamp(min=1).to(dtype)
        if there is None and (matches * ~p.any(-1)[:, None]).any():
            warn(
                "Rows of zeros in `page_embeddings` are the best matches of tokens whose other similarities are not"
                " above zero. They count, as in score_retrieval of transformers; sentence-transformers takes them for"
                " padding; to do the same, pass page_mask=attention_mask."
            )
        is_patch = torch.zeros_like(kept).scatter(1, places, True)
        at = places[None, :, None].expand(B, K, T, h * w)
        return MaxSimExplanation(
            q[:, None].expand(B, K, *q.shape[1:]).reshape(*queries, *pages, *q.shape[1:]),
            best.reshape(*queries, *pages, T),
            similarities.gather(-1, at).reshape(*queries, *pages, T, h, w),
            matches.gather(-1, at).reshape(*queries, *pages, T, h, w),
            (matches * ~is_patch[:, None]).sum(-1).reshape(*queries, *pages, T),
        )


def _amounts(pages: MaxSimExplanation) -> list[str]:
    """The score of each of K pages, with what of it belongs to no patch."""
    return [
        f"{score:.4g}" + (f", of it {rest:.3g} at no patch" if rest else "")
        for score, rest in zip(pages.score.tolist(), pages.rest.tolist())
    ]


def _amount(score: Tensor, unplaced: Tensor) -> str:
    """What a token adds, and how much of its match is no patch."""
    share = unplaced.item()
    return f"{score.item():+.3g}" + (
        f"\n{share:.0%} at no patch" if 0 < share < 1 else "\nat no patch" if share else ""
    )
