"""The explanation of a few-shot decision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from captum_fam._checks import check_labels
from captum_fam.explorer import PairExplorer, check_titles, explore_groups
from captum_fam.similarity import widen
from captum_fam.tasks._easyfsl import Decision
from captum_fam.tasks._explanation import Explanation, check_beyond
from captum_fam.visualization import Pictures

Labels = int | Sequence[int] | Tensor | None

_SAME = 0.01  # how far a reference may be from a mean of embeddings, in units of its length


@dataclass(frozen=True, repr=False, eq=False)
class EpisodeExplanation(Explanation):
    r"""
    Why was each of B queries given its class, one of K? Made by :func:`~captum_fam.explain_episode`.

    Attributes:
        classes (Tensor): The labels of the K classes, sorted.
        predicted (Tensor): The label of the highest score of each query, (B,).
        scores (Tensor): Scores (B, K), those of the few-shot library where it decides.
        similarities (Tensor): The score that the maps explain: the sums of the contributions, (B, K). They are the
                    ``scores``, unless the library goes on from them (softmax).
        constants (Tensor): The part of the similarities that belongs to no place of a query, (B, K): minus the squared
                    length of the prototype for SimilarityDecomposition of squared distances, else zero.
        maps (Tensor): The map of each query for each class, (B, K, \*spatial).
        signed_maps (Tensor): Maps of the terms themselves, signed, in at least single precision;
                    their differences are the contrast maps.
        explainable (Tensor): Which pairs have embeddings that are finite and not zero, (B, K).
        route (str): ``"aligned"`` or ``"jacobian"``.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> support, queries = torch.rand(6, 3, 16, 16), torch.rand(2, 3, 16, 16)
        >>> episode = explain_episode(encoder, encoder[1], queries, support, [0, 0, 1, 1, 2, 2])
        >>> episode.predicted.shape, episode.margin(0, "rest").shape
        (torch.Size([2]), torch.Size([2]))
    """

    classes: Tensor
    scores: Tensor

    @property
    def predicted(self) -> Tensor:
        return self.classes[self.scores.argmax(1)]

    def map(self, label: Labels = None) -> Tensor:
        r"""
        What in each query is like a class?

        Args:
            label (int, sequence of int or Tensor, optional): Label of a class, for all queries or
                        one for each.
                        Default: None, the predicted class

        Returns:
            *Tensor*: maps (B, 1, \*spatial).

        Raises:
            ValueError: there is no such class.
        """
        rows = torch.arange(len(self.maps), device=self.maps.device)
        return self.maps[rows, self._index(label)][:, None]

    def contrast(
        self,
        label: Labels = None,
        other: Labels | Literal["rest", "self"] | str = None,
        *,
        threshold: float | None = None,
    ) -> Tensor:
        r"""
        Why one class rather than another? The map of the difference of their similarities, signed (see ``contrast`` in
        :meth:`~captum_fam.FeatureActivationMap.attribute`).

        Args:
            label: As in :meth:`map`.
            other (int, sequence of int, Tensor or str, optional): The class to contrast with, in the same forms;
                        ``"rest"`` for the mean over all the others; or ``"self"``: what the query has in common with
                        the class beyond what it has with itself, which takes one more pass.
                        Default: None, the class with the highest score among the others
            threshold (float, optional): Instead of ``other``: why does the similarity lie above or below this value? It
                        takes one more pass.
                        Default: None

        Returns:
            *Tensor*: maps (B, 1, \*spatial).

        Raises:
            ValueError: there is no such class, or no other one; or the similarity or the method allows neither
                        ``"self"`` nor a threshold.

        Warns if the mean of a map and the margin that it explains have opposite signs.
        """
        if check_beyond(other, threshold):
            if self._origin is not None:
                check_own_share(self._origin.others[0])
            return self._beyond(self._index(label), None if threshold is not None else "self", threshold)
        return self._contrast(*self._pair(label, other))

    def margin(
        self,
        label: Labels = None,
        other: Labels | Literal["rest", "self"] | str = None,
        *,
        threshold: float | None = None,
    ) -> Tensor:
        r"""
        How large is the difference that :meth:`contrast` explains, of two similarities, or of a similarity and a
        threshold? It is 0 for ``"self"``.

        Args:
            label, other, threshold: As in :meth:`contrast`.

        Returns:
            *Tensor*: (B,).

        Raises:
            ValueError: As in :meth:`contrast`.
        """
        if check_beyond(other, threshold):
            own = self.similarities.gather(1, self._index(label)[:, None])[:, 0]
            return own - own if threshold is None else own - threshold
        return self._difference(self.similarities, *self._pair(label, other))

    def constant(self, label: Labels = None, other: Labels | Literal["rest"] = None) -> Tensor:
        r"""
        Which part of :meth:`margin` belongs to the prototypes alone? With :class:`~captum_fam.SimilarityDecomposition`,
        this and the mean of :meth:`contrast` add up to the margin, if the places add up to the embedding.

        Args:
            label, other: As in :meth:`contrast`.

        Returns:
            *Tensor*: (B,); zero except for squared distances.

        Raises:
            ValueError: As in :meth:`contrast`.
        """
        return self._difference(self.constants, *self._pair(label, other))

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
        Which places of the support images does a place of the query match? Makes a page of the query and the classes,
        the most similar first, as :func:`~captum_fam.explore_pair` does: point at a place to see its matches. The page
        shows each class as all of its support images, side by side. Its score is a sum over them, because the product
        with a mean is the mean of the products. The page prints the ``similarities``. Each image adds up to 0.2 MB, at
        14 by 14 places.

        It works for encoders, for SimpleShot, and for PrototypicalNetworks with ``method=SimilarityDecomposition``,
        which explains the squared distance. The references of other classifiers are no means of the support embeddings.

        Args:
            query (int): Number of the query, from 0.
                        Default: 0
            control (Tensor, optional): One image (1, C, H, W) of the support's size that has nothing to do with
                        the query.
                        Default: None
            photos (list of pictures, optional): The pictures to show of the query, each of the support images and the
                        control, in this order.
                        Default: None, the images themselves
            titles (list of str, optional): Names of the query, of the ``classes`` in their order, and of the
                        control.
                        Default: None, as ``"class 3, predicted"``
            mean, std (sequence of float, optional): As in :func:`~captum_fam.visualize_pair`.
                        Default: None

        Returns:
            *PairExplorer*: the page, with ``save(path)``.

        Raises:
            TypeError, ValueError: an argument is not as described above, the support images were not passed, or
                        the score is no sum over them; the message says what to do.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> support, queries = torch.rand(6, 3, 16, 16), torch.rand(2, 3, 16, 16)
            >>> episode = explain_episode(encoder, encoder[1], queries, support, [0, 0, 1, 1, 2, 2])
            >>> episode.explore(query=1)  # doctest: +ELLIPSIS
            PairExplorer(3 references, ... MB)
        """
        origin, image = self._explored(query)
        method, (decision, support, labels) = origin.method, origin.others
        if support is None:
            raise ValueError("A page shows the support images: pass them and their labels to explain_episode.")
        groups = groups_of(self.classes, labels)
        _check_means(decision, method.embed(image), method.embed(support), groups)
        if decision.decomposed not in (None, method._similarity()):
            raise ValueError(
                "The scores of this classifier are distances, which cannot be split over places. Pass"
                " method=SimilarityDecomposition to explain_episode: it explains the squared distance, which gives the"
                " same order."
            )
        count = 1 + len(groups) + (control is not None)
        if titles is None:
            names = [f"class {c}" + ", predicted" * (c == self.predicted[query].item()) for c in self.classes.tolist()]
            titles = [f"query {query}", *names, *["control"] * (control is not None)]
        check_titles(titles, count)
        order = self.similarities[query].argsort(descending=True, stable=True).tolist()
        return explore_groups(
            image,
            support,
            [method],
            [groups[k] for k in order],
            self.similarities[query, order].tolist(),
            control=control,
            photos=photos,
            titles=[titles[0], *(titles[1 + k] for k in order), *titles[1 + len(groups) :]],
            mean=mean,
            std=std,
        )

    def _pair(self, label: Labels, other: Labels | str) -> tuple[Tensor, Tensor | Literal["rest"]]:
        if len(self.classes) < 2:
            raise ValueError("A contrast needs at least two classes, but the episode has one.")
        own = self._index(label)
        if isinstance(other, str):
            if other != "rest":
                raise ValueError(f'Expected `other` to be a label or "rest", but got {other!r}.')
            return own, "rest"
        if other is None:
            scores = self.scores.scatter(1, own[:, None], -torch.inf)
            best = scores == scores.amax(1, keepdim=True)  # if probabilities round to zero, the similarities decide
            similarities = self.similarities.scatter(1, own[:, None], -torch.inf)
            return own, similarities.masked_fill(~best, -torch.inf).argmax(1)
        return own, self._index(other)

    def _index(self, label: Labels) -> Tensor:
        if label is None:
            return self.scores.argmax(1)
        B, known, device = len(self.scores), self.classes.tolist(), self.classes.device
        one = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
        wanted = torch.tensor(int(label)) if one else label  # type: ignore[arg-type]  # it is a number
        if not isinstance(wanted, Tensor) or wanted.ndim:
            wanted = check_labels("label", wanted, B, "the queries", device)
        unknown = sorted(set(wanted.reshape(-1).tolist()) - set(known))
        if unknown:
            raise ValueError(f"Expected labels among {known}, but got {unknown}.")
        return (wanted.to(device).expand(B)[:, None] == self.classes).int().argmax(1)


def groups_of(classes: Tensor, labels: Any) -> list[list[int]]:
    """The numbers of the support images, for each class."""
    labels = torch.as_tensor(labels).tolist()
    return [[n for n, label in enumerate(labels) if label == own] for own in classes.tolist()]


def _check_means(decision: Decision, z: Tensor, support: Tensor, groups: list[list[int]]) -> None:
    """Raises an error if the references are not the means of the support embeddings, because a page needs sums."""
    means = torch.stack([widen(support[group]).mean(0) for group in groups])
    with torch.no_grad():
        s = widen(decision.references(z)).reshape(means.shape)
    if ((s - means).norm(dim=1) > _SAME * means.norm(dim=1)).any():
        raise ValueError(
            "The references of this episode are not the means of its support images' embeddings, so the scores are no"
            " sums over these: the classifier rectifies or weighs them (FEAT, BDCSPN, LaplacianShot, MatchingNetworks),"
            " or the encoder has changed since. Pass the encoder itself to explain_episode, with its `similarity`."
        )


def check_own_share(decision: Decision, classifier: Any = None) -> None:
    """Raises an error for "self" and thresholds if a classifier decides by a distance."""
    if decision.scores is not None and decision.similarity not in ("cosine", "dot"):
        name = "This classifier" if classifier is None else type(classifier).__name__
        raise ValueError(
            f"{name} decides by a distance, so it has neither"
            ' contrast="self" nor a threshold: contrast with another class, or explain SimpleShot, or its encoder with'
            ' similarity="cosine".'
        )
