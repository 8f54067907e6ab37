"""What is known of a search that was explained."""

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
    Why a search returned its hits, k for each of B queries; made by :func:`~captum_fam.explain_hits` and
    :func:`~captum_fam.explain_retrieval`.

    Attributes:
        ids (list of lists): Of the hits, best first, B x k; None where fewer were found.
        scores (Tensor or None): What the search returned, (B, k).
        similarities (Tensor): What is explained: the sums of the contributions, (B, k); -inf where nothing
                    was found.
        constants (Tensor): The part of them that no place of a query has, (B, k): minus the squared
                    length of the hit, for SimilarityDecomposition of squared distances, else zero.
        maps (Tensor): The map of each query for each of its hits, (B, k, \*spatial).
        signed_maps (Tensor): Maps of the terms themselves, signed, in at least single precision;
                    their differences are the contrast maps.
        explainable (Tensor): Which hits have embeddings that are finite and not zero, (B, k).
        hit_maps (Tensor or None): The map of each hit for its query, (B, k, \*spatial), if there were images
                    of the hits, and the maps explain no contrast with other hits.
        route (str): ``"aligned"`` or ``"jacobian"``; of a method without, ``""``.

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
        Why the hit of one rank is nearer than that of another: the map of the contributions to
        the difference of their similarities, signed.

        Args:
            rank (int): Of the hit, from 0.
                        Default: 0
            other (int or str): Rank of the hit to contrast with; ``"rest"`` for the mean over all the others; or
                        ``"self"``, what the query has in common with the hit beyond what it has with itself, which
                        needs one more pass.
                        Default: ``"rest"``
            threshold (float, optional): Instead of ``other``: why the similarity lies above or below it. One more pass.
                        Default: None

        Returns:
            *Tensor*: maps (B, 1, \*spatial); zero where there was no such hit.

        Raises:
            ValueError: there is no such rank, or no other hit; or the similarity, or the method, has no ``"self"`` and
                        no threshold.

        Warns where a map and the margin that it explains have opposite signs.
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
        A page of a query and its hits, on which one points at a place and sees what it matches, as that of
        :func:`~captum_fam.explore_pair`. It prints the ``similarities``: of an index of L2 distances, minus the
        squared distance. The hits' images are embedded again. Where the search held
        another vector than the image's embedding, as a lossy index does, the difference is printed as missing.

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
                        Default: None, as ``"1: image 17"``, rank and id
            mean, std (sequence of float, optional): As in :func:`~captum_fam.visualize_pair`.
                        Default: None

        Returns:
            *PairExplorer*: the page, with ``save(path)``.

        Raises:
            TypeError, ValueError: an argument is not as described above, there were no images of the hits, nothing was
                        found for the query, or the method makes no pairs of places.

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
        A figure of a query and its hits, a row for each: both images, and the map of each over it, with the
        similarity. Without maps of the hits, the query with its map for each of them.

        Args:
            query (int): Number of the query, from 0.
                        Default: 0
            photos (list of pictures, optional): What is shown of the query and its hits, in this order.
                        Default: None, the images themselves
            titles (list of str, optional): One for each hit, in place of its rank, id and similarity.
                        Default: None, rank, id and similarity
            mean, std, scale, use_pyplot: As in :func:`~captum_fam.visualize_pair`.

        Returns:
            *Figure*

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
    """For a place under a picture."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
