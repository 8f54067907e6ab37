"""The explanation of a search."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_fam.explorer import PairExplorer, explore_groups
from captum_fam.tasks._explanation import Explanation, Origin, check_beyond
from captum_fam.visualization import Pictures, Scale, visualize_comparison, visualize_pair

LONGEST = 30  # letters of a name under a picture


@dataclass(frozen=True, repr=False, eq=False)
class RetrievalExplanation(Explanation):
    r"""
    Why did a search return these hits, k for each of B queries? Made by :func:`~captum_fam.explain_hits` and
    :func:`~captum_fam.explain_retrieval`.

    Attributes:
        ids (list of lists): The ids of the hits, best first, in B lists of k; None where fewer were found.
        scores (Tensor or None): The scores that the search returned, (B, k).
        similarities (Tensor): The score that the maps explain: the sums of the contributions, (B, k); -inf where
                    nothing was found.
        constants (Tensor): The part of the similarities that belongs to no place of a query, (B, k): minus the squared
                    length of the hit for SimilarityDecomposition of squared distances, else zero.
        maps (Tensor): The map of each query for each of its hits, (B, k, \*spatial).
        signed_maps (Tensor): Maps of the terms themselves, signed, in at least single precision;
                    their differences are the contrast maps.
        explainable (Tensor): Which hits have embeddings that are finite and not zero, (B, k).
        hit_maps (Tensor or None): The map of each hit for its query, (B, k, \*spatial); None if there were no images of
                    the hits, or the maps explain a contrast with other hits.
        route (str): ``"aligned"`` or ``"jacobian"``; ``""`` for a method without routes.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> query, hits = torch.rand(1, 3, 16, 16), torch.rand(3, 3, 16, 16)
        >>> found = explain_hits(query, hits, encoder, encoder[1])
        >>> found.contrast(0, 1).shape  # why the first hit rather than the second
        torch.Size([1, 1, 14, 14])
    """

    ids: list[list[Any]]
    scores: Tensor | None
    hit_maps: Tensor | None

    @property
    def indices(self) -> Tensor:
        """The ids as numbers, (B, k); -1 where fewer were found."""
        numbers = [[-1 if number is None else number for number in row] for row in self.ids]
        if not all(isinstance(number, int) for row in numbers for number in row):
            raise ValueError("The ids of these hits are no numbers; take `ids`.")
        return torch.tensor(numbers, dtype=torch.long, device=self.similarities.device).reshape(self.similarities.shape)

    def contrast(
        self, rank: int = 0, other: int | Literal["rest", "self"] | str = "rest", *, threshold: float | None = None
    ) -> Tensor:
        r"""
        Why is the hit of one rank nearer than that of another? The map of the difference of their similarities, signed.

        Args:
            rank (int): Rank of the hit, from 0.
                        Default: 0
            other (int or str): Rank of the hit to contrast with; ``"rest"`` for the mean over all the others; or
                        ``"self"``: what the query has in common with the hit beyond what it has with itself, which
                        takes one more pass.
                        Default: ``"rest"``
            threshold (float, optional): Instead of ``other``: why does the similarity lie above or below this value? It
                        takes one more pass.
                        Default: None

        Returns:
            *Tensor*: maps (B, 1, \*spatial); zero where there was no such hit.

        Raises:
            ValueError: there is no such rank, or no other hit; or the similarity or the method allows neither
                        ``"self"`` nor a threshold.

        Warns if the mean of a map and the margin that it explains have opposite signs.
        """
        (B, _), device = self.similarities.shape, self.signed_maps.device
        own = torch.full((B,), self._rank("rank", rank), device=device)
        if check_beyond(other, threshold):
            return self._known(self._beyond(own, None if threshold is not None else "self", threshold), own[:, None])
        return self._contrast(own, self._other(other))

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
        Which places of the hits does a place of the query match? Makes a page of the query and its hits, as
        :func:`~captum_fam.explore_pair` does: point at a place to see its matches. The page prints the
        ``similarities``, which for an index of L2 distances are minus the squared distance. The hits' images are
        embedded again. If the search held another vector than an image's embedding, as a lossy index does, the page
        prints the difference as missing.

        Args:
            query (int): Number of the query, from 0.
                        Default: 0
            control (Tensor, optional): One image (1, C, H, W) of the hits' size that has nothing to do with the
                        query.
                        Default: None
            photos (list of pictures, optional): The pictures to show of the query, its hits and the control, in this
                        order.
                        Default: None, the images themselves
            titles (list of str, optional): Names of the query, its hits and the control, in this order.
                        Default: None, as ``"1: image 17"``, rank and id
            mean, std (sequence of float, optional): As in :func:`~captum_fam.visualize_pair`.
                        Default: None

        Returns:
            *PairExplorer*: the page, with ``save(path)``.

        Raises:
            TypeError, ValueError: an argument is not as described above, there were no images of the hits, nothing was
                        found for the query, or the method does not compare pairs of places.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> query, hits = torch.rand(1, 3, 16, 16), torch.rand(3, 3, 16, 16)
            >>> explain_hits(query, hits, encoder, encoder[1]).explore()  # doctest: +ELLIPSIS
            PairExplorer(3 references, ... MB)
        """
        origin, image, images, there = self._shown(query, "explore")
        if titles is None:
            titles = [f"query {query}", *self._names(query, there)] + ["control"] * (control is not None)
        return explore_groups(
            image,
            images,
            [origin.method],
            scores=self.similarities[query, there].tolist(),
            control=control,
            photos=photos,
            titles=titles,
            mean=mean,
            std=std,
        )

    def visualize(
        self,
        query: int = 0,
        *,
        photos: Pictures | None = None,
        titles: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: Scale = "all",
        use_pyplot: bool = True,
    ) -> Figure:
        r"""
        What in the query and in each hit speaks for the match? Draws a query and its hits, a row for each hit: both
        images with their maps, and the similarity. Without maps of the hits, only the query is drawn, with its map for
        each hit.

        Args:
            query (int): Number of the query, from 0.
                        Default: 0
            photos (list of pictures, optional): The pictures to show of the query and its hits, in this order.
                        Default: None, the images themselves
            titles (list of str, optional): One for each hit, instead of its rank, id and similarity.
                        Default: None, rank, id and similarity
            mean, std, scale, use_pyplot: As in :func:`~captum_fam.visualize_pair`.

        Returns:
            *Figure*: of matplotlib.

        Raises:
            TypeError, ValueError: an argument is not as described above, nothing was found for the query, or this is a
                        copy or from a file.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> query, hits = torch.rand(1, 3, 16, 16), torch.rand(3, 3, 16, 16)
            >>> figure = explain_hits(query, hits, encoder, encoder[1]).visualize(use_pyplot=False)
        """
        origin, (image,) = self._explored(query, "visualize")
        there = self._there(query)
        similar, maps = self.similarities[query, there].tolist(), self.maps[query, there][:, None]
        names = [f"{_short(name)}\nsimilarity {s:.4g}" for name, s in zip(self._names(query, there), similar)]
        signed = bool((self.maps < 0).any())  # of any query: all figures read alike
        given: Any = photos
        shown = None if photos is None else list(given)
        if shown is not None and len(shown) != 1 + len(there):
            raise ValueError(f"Expected `photos` to be {1 + len(there)}, query and hits, but got {len(shown)}.")
        first = image if shown is None else shown[:1]
        options: Any = {"mean": mean, "std": std, "scale": scale, "use_pyplot": use_pyplot}
        if origin.others is None and shown is None:
            return visualize_comparison(first, {origin.explains: maps}, titles=titles or names, **options)[0]
        return visualize_pair(
            first,
            origin.others(query, there) if shown is None else shown[1:],
            maps,
            None if self.hit_maps is None else self.hit_maps[query, there][:, None],
            reference_titles=titles or names,
            label=origin.explains,
            signed=signed,
            **options,
        )[0]

    def _shown(self, query: int, what: str) -> tuple[Origin, Any, Tensor, list[int]]:
        origin, image = self._explored(query, what)
        if origin.others is None:
            raise ValueError("A page shows the images of the hits: pass them, or a `gallery` that has them.")
        there = self._there(query)
        return origin, image, origin.others(query, there).to(image[0]), there

    def _there(self, query: int) -> list[int]:
        """The ranks of what was found for a query."""
        there = [k for k, number in enumerate(self.ids[query]) if number is not None]
        if not there:
            raise ValueError(f"The search found nothing for query {query}, so there is nothing to show.")
        return there

    def _names(self, query: int, there: list[int]) -> list[str]:
        return [f"{rank}: image {self.ids[query][k]}" for rank, k in enumerate(there, 1)]

    def _counted(self) -> Tensor:
        there = [[number is not None for number in row] for row in self.ids]
        return torch.tensor(there, dtype=torch.bool, device=self.similarities.device).reshape(self.similarities.shape)

    def _known(self, maps: Tensor, own: Tensor) -> Tensor:
        """Maps (B, P, *spatial) of these hits (B, P), zero where there is none."""
        there = self._counted().gather(1, own).to(maps.device)
        return torch.where(there.reshape(*there.shape, *[1] * (maps.ndim - 2)), maps, torch.zeros_like(maps))

    def _rank(self, name: str, value: Any) -> int:
        k = self.similarities.shape[1]
        try:
            number = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = -1
        if number not in range(k):
            raise ValueError(f"Expected `{name}` to be a rank from 0 to {k - 1}, but got {value!r}.")
        return number

    def _other(self, other: Any, name: str = "other") -> Tensor | Literal["rest"]:
        B, k = self.similarities.shape
        if k < 2:
            raise ValueError("A contrast needs at least two hits, but there is one; search with k=2 or more.")
        if isinstance(other, str) and other == "rest":
            return "rest"
        return torch.full((B,), self._rank(name, other), device=self.signed_maps.device)


def _short(name: str) -> str:
    """A name short enough to stand under a picture."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
