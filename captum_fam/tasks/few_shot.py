"""Few-shot episodes: why this class, and why not that one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_fam._checks import check_internal_batch_size, check_labels, format_inputs, warn_once
from captum_fam.engine.chunks import cut, slices
from captum_fam.engine.untouched import eagerly
from captum_fam.methods.by_name import make_method, method_named
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.margins import texts_of
from captum_fam.methods.similarity_attribution import Inputs, SimilarityAttribution
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.score import prototypes
from captum_fam.similarity import Similarity
from captum_fam.tasks._easyfsl import Decision, decision_of, is_classifier
from captum_fam.tasks._explanation import Origin, check_asked, contrasted, explained, words_of
from captum_fam.tasks.episode_explanation import EpisodeExplanation, check_own_share, groups_of


@eagerly
def explain_episode(
    forward_func: Callable[..., Any],
    layer: nn.Module | None,
    query_images: Inputs,
    support_images: Inputs | None = None,
    support_labels: Tensor | Sequence[int] | None = None,
    *,
    similarity: Similarity | None = None,
    method: type[SimilarityAttribution] | str = FeatureActivationMap,
    contrast: int | Literal["rest", "self"] | str | None = None,
    threshold: float | None = None,
    internal_batch_size: int | None = None,
    **options: Any,
) -> EpisodeExplanation:
    r"""
    Why was each query given this class, and not that one? Explains the decisions of a few-shot episode, from one pass
    over the queries.

    With an encoder, the references are the prototypes of the support images (their mean
    embeddings, https://arxiv.org/abs/1703.05175). With a classifier of easyfsl, the decision is the library's own, and
    ``scores`` are what it returns:

    ======================  ==============================================================
    classifier              what is explained
    ======================  ==============================================================
    PrototypicalNetworks,   :math:`-\|z - p\|`, shared among the dimensions as the squares
    FEAT                    are: :math:`c_k = -(z_k - p_k)^2 / \|z - p\|`
    SimpleShot              the cosine to the prototypes
    BDCSPN                  the cosine to the prototypes that it rectifies with all the
                            queries of the call, held constant
    MatchingNetworks        the dot product with the support embeddings of a class, weighted
                            by their attention, held constant. With one shot, differences of
                            these are those of the scores.
    LaplacianShot           :math:`-\|z - p\|^2`, with ``lambda_regularization=0`` or
                            ``knn=1`` only: otherwise the scores mix in the neighbours'
    ======================  ==============================================================

    Other classifiers are an error, because their score is no sum over embedding dimensions: RelationNetworks (a network
    scores each pair of feature maps) and methods that fine-tune on the episode (Finetune, TIM, TransductiveFinetuning,
    PTMAP). ``LayerGradCam(classifier, layer)`` explains RelationNetworks.

    Args:
        forward_func (Callable or torch.nn.Module): An encoder, from images to embeddings (B, D), or
                    a ``FewShotClassifier`` of easyfsl.
        layer (torch.nn.Module): As in :class:`~captum_fam.FeatureActivationMap`; for a classifier, a module of its
                    ``backbone``. None for IntegratedDecomposition, which finds one, and Relax, which needs none.
        query_images (Tensor or tuple[Tensor, ...]): B images to explain.
        support_images (Tensor or tuple[Tensor, ...], optional): N labelled images.
                    Default: None, those of the last ``process_support_set`` of a classifier
        support_labels (Tensor or sequence of int, optional): N integers; for easyfsl from 0 to
                    K - 1.
                    Default: None
        similarity (str or Callable, optional): For an encoder, as in :func:`~captum_fam.channel_contributions`;
                    ``"euclidean"`` for a ProtoNet.
                    Default: None, ``"cosine"``
        method (type or str): A method of this package that explains similarities, or its name. With
                    :class:`~captum_fam.SimilarityDecomposition`, contrast maps add up to the margin (of squared
                    distances, with the difference of the ``constants``). :class:`~captum_fam.CorrespondenceMap` shows
                    what looks like some place of the support images of a class.
                    Default: FeatureActivationMap
        contrast (int or str, optional): What ``maps`` show. A label: why each class rather than this one. ``"rest"``:
                    why each class rather than the mean of all the others. ``"self"``: what the query has in common with
                    each class beyond what it has with itself; this takes one more pass.
                    Default: None, what the query has in common with each class
        threshold (float, optional): ``maps`` show why each similarity lies above or below this value; this takes one
                    more pass.
                    Default: None
        internal_batch_size (int, optional): How many images go through the encoder at a time.
                    Default: None, all at once
        **options (Any): Further options of the method.

    Returns:
        *EpisodeExplanation*: classes, scores, the predicted class, and the maps of every class. The classifier is left
        as it was.

    Raises:
        TypeError, ValueError: an argument is not as described above, or the classifier cannot be
                    explained; the message says why.
        RuntimeError: the jacobian is needed under ``torch.inference_mode()``.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> support, labels = torch.rand(10, 3, 16, 16), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        >>> queries = torch.rand(2, 3, 16, 16)
        >>> episode = explain_episode(encoder, encoder[1], queries, support, labels, similarity="euclidean")
        >>> episode.scores.shape, episode.map().shape
        (torch.Size([2, 5]), torch.Size([2, 1, 14, 14]))
        >>> why_2_not_4 = episode.contrast(2, 4)
    """
    check_internal_batch_size(internal_batch_size)
    if (support_images is None) != (support_labels is None):
        raise ValueError("Expected `support_images` and `support_labels` together, but got one of them.")
    make: Any = partial(make_method, method, "explain_episode")
    if is_classifier(forward_func):
        if similarity is not None:
            raise ValueError(f"Expected no `similarity`, because {type(forward_func).__name__} has its own.")
        decision = decision_of(forward_func, support_images, support_labels)
        decomposed = issubclass(method_named(method, "explain_episode"), SimilarityDecomposition)
        similarity = decision.decomposed or decision.similarity if decomposed else decision.similarity
        explainer = make(decision.encoder, layer, similarity=similarity, **options)
    else:
        explainer = make(forward_func, layer, similarity=similarity, **options)
        decision = _of_prototypes(explainer, support_images, support_labels, internal_batch_size)
    check_asked(explainer, contrast, threshold)
    if threshold is not None or (isinstance(contrast, str) and contrast == "self"):
        check_own_share(decision, forward_func)

    queries = format_inputs("query_images", query_images)
    references = decision.references
    if decision.of_all_queries and internal_batch_size is not None:
        z = torch.cat([explainer.embed(cut(queries, rows)) for rows in slices(len(queries[0]), internal_batch_size)])
        rectified = references(z)
        references = lambda z: rectified  # noqa: E731

    def match() -> Tensor:
        if support_images is None:
            raise ValueError(
                "CorrespondenceMap compares places: pass the support images and their labels to explain_episode."
            )
        support = format_inputs("support_images", support_images)
        maps = explainer.attribute_all(queries, reference=support, internal_batch_size=internal_batch_size)
        groups = groups_of(decision.classes, support_labels)
        return torch.stack([maps[:, group].amax(1) for group in groups], 1)

    found, explanation, s = explained(explainer, queries, lambda z, rows: references(z), internal_batch_size, match)
    with torch.no_grad():
        z = explanation.embedding
        scores = decision.scores(z) if decision.scores is not None else found["similarities"].to(z.dtype)
    warn_once(texts_of(explanation.report, contrast if isinstance(contrast, str) and contrast == "self" else None))
    result = EpisodeExplanation(**found, classes=decision.classes, scores=scores)
    origin = Origin(
        explainer,
        tuple(x.detach() for x in queries),
        s,
        internal_batch_size,
        (decision, support_images, support_labels),
        words_of(contrast, threshold, "class"),
    )
    result._remember(origin)
    if contrast is not None or threshold is not None:
        other = None if threshold is not None or contrast == "self" else result._pair(None, contrast)[1]
        result = replace(result, maps=contrasted(result, other, contrast, threshold))
        result._remember(origin)
    return result


def _of_prototypes(
    method: SimilarityAttribution, images: Inputs | None, labels: Any, internal_batch_size: int | None
) -> Decision:
    if images is None:
        raise ValueError(
            "Expected `support_images` and `support_labels`, to make the prototypes of; a fitted"
            " classifier of easyfsl goes without."
        )
    support = format_inputs("support_images", images)
    embeddings = torch.cat([method.embed(cut(support, rows)) for rows in slices(len(support[0]), internal_batch_size)])
    labels = check_labels("support_labels", labels, len(embeddings), "`support_images`", embeddings.device)
    s = prototypes(embeddings, labels)
    return Decision(method.forward_func, "", labels.unique(sorted=True), lambda z: s)
