"""How the classifiers of easyfsl decide, as similarities of an embedding to references."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_fam._checks import check_labels, format_inputs
from captum_fam._distances import lp_contributions
from captum_fam.engine.untouched import buffers_restored
from captum_fam.similarity import Similarity


@dataclass(frozen=True)
class Decision:
    """
    A few-shot decision.

    Attributes:
        encoder: images to embeddings z (B, D).
        similarity: as in channel_contributions.
        classes: labels of the K classes.
        references: from z to the references, (K, D) for all queries or (B, K, D) for each.
        scores: from z to the scores (B, K), called after ``references``; None if they are the similarities.
        decomposed: if SimilarityDecomposition explains another similarity of the same order, that one.
        of_all_queries: whether the references of a query depend on the other queries.
    """

    encoder: Callable[..., Any]
    similarity: Similarity
    classes: Tensor
    references: Callable[[Tensor], Tensor]
    scores: Callable[[Tensor], Tensor] | None = None
    decomposed: Similarity | None = None
    of_all_queries: bool = False


def is_classifier(value: object) -> bool:
    library = sys.modules.get("easyfsl.methods")
    return library is not None and isinstance(value, library.FewShotClassifier)


def decision_of(classifier: Any, images: Any, labels: Any) -> Decision:
    """
    The decision of a classifier on an episode: that of the images, or the one that it was fitted to. The classifier is
    not changed.

    Raises:
        ValueError: the classifier was not fitted, or does not decide by a similarity.
    """
    make = _decision_maker(classifier)
    classifier = copy.copy(classifier)  # the copy stores its own episode; modules and weights are shared
    classifier._buffers = dict(classifier._buffers)
    if images is not None:
        (images, *others) = format_inputs("support_images", images)
        if others:
            raise ValueError("Expected `support_images` to be one tensor, which is what classifiers of easyfsl take.")
        labels = check_labels("support_labels", labels, len(images), "`support_images`", images.device)
        if labels.unique().tolist() != list(range(len(labels.unique()))):
            raise ValueError(
                f"Expected `support_labels` for easyfsl to be all of 0 to K - 1, but got {labels.unique().tolist()};"
                " number the classes of the episode."
            )
        with torch.no_grad(), buffers_restored(classifier):
            classifier.process_support_set(images, labels)
    return make(classifier)


def _decision_maker(classifier: Any) -> Callable[[Any], Decision]:
    """The rule of a classifier, known by its forward method."""
    library = sys.modules["easyfsl.methods"]
    makers = {
        library.PrototypicalNetworks.forward: _prototypical_networks,
        library.SimpleShot.forward: _simple_shot,
        library.BDCSPN.forward: _bd_cspn,
        library.LaplacianShot.forward: _laplacian_shot,
        library.MatchingNetworks.forward: _matching_networks,
    }
    name, forward = type(classifier).__name__, type(classifier).forward
    compared = ("l2_distance_to_prototypes", "cosine_distance_to_prototypes")
    own = all(getattr(type(classifier), m) is getattr(library.FewShotClassifier, m) for m in compared)
    if forward in makers and own:
        return makers[forward]
    if forward is library.RelationNetworks.forward:
        raise ValueError(
            f"{name} cannot be explained by FAM: its relation module scores a pair of feature maps, and the score is no"
            " sum over embedding dimensions. LayerGradCam(classifier, layer).attribute(query_images, target) of Captum"
            " explains it."
        )
    raise ValueError(
        f"{name} cannot be explained by FAM: its scores are not known to be similarities of a query to references."
        " Explain PrototypicalNetworks, FEAT, SimpleShot, BDCSPN, MatchingNetworks or LaplacianShot with the same"
        " backbone, or the backbone as an encoder with its support images."
    )


class _Embedding(nn.Module):
    """The embedding that a classifier compares, without its decision."""

    def __init__(self, classifier: Any, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier = classifier
        self._embed = embed

    def forward(self, images: Tensor) -> Tensor:
        return self._embed(images)


def _fitted(classifier: Any, references: Tensor) -> Tensor:
    if not references.numel():
        raise ValueError(
            f"{type(classifier).__name__} has not been fitted: pass support_images and support_labels, or call its"
            " process_support_set first."
        )
    return references


def _by_prototypes(classifier: Any, similarity: Similarity, scores: Callable[[Tensor], Tensor]) -> Decision:
    p = _fitted(classifier, classifier.prototypes)
    classes = torch.arange(len(p), device=p.device)
    return Decision(_Embedding(classifier, classifier.compute_features), similarity, classes, lambda z: p, scores)


def _prototypical_networks(classifier: Any) -> Decision:
    """-||z - p||"""

    def scores(z: Tensor) -> Tensor:
        return classifier.softmax_if_specified(classifier.l2_distance_to_prototypes(z))  # type: ignore[no-any-return]

    decision = _by_prototypes(classifier, partial(lp_contributions, p=2, power=1), scores)
    return replace(decision, decomposed="euclidean")


def _simple_shot(classifier: Any) -> Decision:
    """cos(z, p)"""

    def scores(z: Tensor) -> Tensor:
        return classifier.softmax_if_specified(classifier.cosine_distance_to_prototypes(z))  # type: ignore[no-any-return]

    return _by_prototypes(classifier, "cosine", scores)


def _bd_cspn(classifier: Any) -> Decision:
    """cos(z, p), p rectified with all z"""
    decision = _simple_shot(classifier)

    def rectified(z: Tensor) -> Tensor:
        classifier.rectify_prototypes(query_features=z)
        return classifier.prototypes  # type: ignore[no-any-return]

    return replace(decision, references=rectified, of_all_queries=True)


def _laplacian_shot(classifier: Any) -> Decision:
    """softmax(-||z - p||^2), p rectified as in BDCSPN; only without the influence of neighbours"""
    if classifier.lambda_regularization and classifier.knn > 1 and classifier.inference_steps:
        raise ValueError(
            f"LaplacianShot with lambda_regularization={classifier.lambda_regularization} and knn={classifier.knn}"
            " cannot be explained by FAM: its scores mix in those of neighbouring queries. With lambda_regularization=0"
            " they are a similarity; BDCSPN has the same prototypes."
        )

    def scores(z: Tensor) -> Tensor:
        return (-(torch.cdist(z, classifier.prototypes) ** 2)).softmax(1)

    return replace(_bd_cspn(classifier), similarity="euclidean", scores=scores)


def _matching_networks(classifier: Any) -> Decision:
    """log sum over the shots of a class of softmax(z·s), s normalised"""
    support = _fitted(classifier, classifier.contextualized_support_features).detach().clone()
    classifier.contextualized_support_features = (
        support  # may have been made in inference mode, which no graph can hold
    )
    support = F.normalize(support)
    one_hot = classifier.one_hot_support_labels  # (N, K)

    def attended(z: Tensor) -> Tensor:
        """
        The shots of each class, weighted by their attention a: the gradient of log sum exp(z·s) is sum a s; with one
        shot it is s.
        """
        attention = (z @ support.T)[:, None].masked_fill(one_hot.T == 0, -torch.inf).softmax(2)
        return attention @ support

    def scores(z: Tensor) -> Tensor:
        attention = (z @ support.T).softmax(1) @ one_hot
        return classifier.softmax_if_specified((attention + 1e-6).log())  # type: ignore[no-any-return]

    def embed(images: Tensor) -> Tensor:
        return classifier.encode_query_features(classifier.compute_features(images))  # type: ignore[no-any-return]

    classes = torch.arange(one_hot.shape[1], device=support.device)
    return Decision(_Embedding(classifier, embed), "dot", classes, attended, scores)
