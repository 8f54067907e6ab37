"""Verification: why a pair was accepted or rejected at a threshold."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_fam._checks import check_internal_batch_size, check_same_form, describe, format_inputs, warn_once
from captum_fam.engine.chunks import Tensors, cut, slices
from captum_fam.engine.question import Question
from captum_fam.engine.untouched import eagerly
from captum_fam.methods.by_name import explain_references, make_method
from captum_fam.methods.label_free_activation_map import LabelFreeActivationMap
from captum_fam.methods.layer_explanation import Explained
from captum_fam.methods.similarity_attribution import Inputs, SimilarityAttribution
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import Similarity, channel_contributions, norm, widen
from captum_fam.tasks.verification_explanation import VerificationExplanation, rounding_of

_MEASURES = {"cosine": "cosine", "dot": "dot product", "euclidean": "distance"}
_NAMED = 10  # pairs in a warning
_UNIT = 1e-3  # how far the lengths of normalised embeddings may be from one


@eagerly
def explain_verification(
    images: Inputs,
    others: Inputs,
    forward_func: Callable[..., Any],
    layer: nn.Module | None,
    threshold: float | Sequence[float] | Tensor,
    *,
    similarity: Similarity | None = None,
    method: type[SimilarityAttribution] | str = SimilarityDecomposition,
    internal_batch_size: int | None = 32,
    **options: Any,
) -> VerificationExplanation:
    r"""
    Why was each pair of images accepted as the same, or rejected? Explains the decisions of a verification (faces,
    re-identification, signatures) on both images.

    The maps explain the margin, score - threshold. With :class:`~captum_fam.SimilarityDecomposition`, the map of each
    image adds up to it, if the places add up to the embedding: the mean of the map is the margin. So you can compare
    what speaks for "the same" with what speaks against it, and one pair with another.

    Args:
        images, others (Tensor or tuple[Tensor, ...]): The pairs: B inputs each, ready for the encoder. A single input
                    is paired with all of the other side.
        forward_func (Callable or torch.nn.Module): The encoder, from one image to its embedding; for a siamese network,
                    its branch.
        layer (torch.nn.Module): As in :class:`~captum_fam.FeatureActivationMap`; None for a method that finds
                    its own.
        threshold (float, sequence of float or Tensor): You accept a pair if its score reaches this. One for
                    all pairs, or one for each. For ``"euclidean"``, the distance up to which you accept, not squared.
        similarity (str or Callable, optional): ``"cosine"``, ``"dot"``, or ``"euclidean"`` for a decision
                    by the distance :math:`\|z - s\|`; or another similarity that the method takes.
                    Default: None, ``"cosine"``
        method (type or str): A method that explains thresholds, by class or name:
                    :class:`~captum_fam.SimilarityDecomposition`, :class:`~captum_fam.IntegratedDecomposition`,
                    :class:`~captum_fam.FeatureActivationMap` or :class:`~captum_fam.RelevanceCam`. The last two do not
                    explain distances.
                    Default: SimilarityDecomposition
        internal_batch_size (int, optional): How many images go through the encoder at a time.
                    Default: 32
        **options (Any): Further options of the method.

    For a distance, the margin is :math:`\theta^2 - \|z - s\|^2 = f \cdot z` with the threshold :math:`\theta` and
    :math:`f = 2 s - z + (\theta^2 - \|s\|^2) z / \|z\|^2`. If embeddings have length 1, the map is twice that of the
    cosine with the threshold :math:`1 - \theta^2 / 2`, which is the same decision.

    Returns:
        *VerificationExplanation*: scores, decisions, and signed maps of both images.

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.
        RuntimeError: the jacobian is needed under ``torch.inference_mode()``.

    Warns of pairs whose map speaks for the other decision, or lacks more than half of the margin.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images, others = torch.rand(100, 3, 16, 16), torch.rand(100, 3, 16, 16)
        >>> found = explain_verification(images, others, encoder, encoder[1], threshold=0.9)
        >>> found.accepted.shape, found.maps.shape
        (torch.Size([100]), torch.Size([100, 1, 14, 14]))
    """
    check_internal_batch_size(internal_batch_size)
    explainer = _explainer(method, forward_func, layer, similarity, options)
    sides = _paired(format_inputs("images", images), format_inputs("others", others))
    B = len(sides[0][0])
    measure = explainer._similarity()
    theta = _thresholds(threshold, measure, B)
    s = torch.cat([explainer.embed(cut(sides[1], rows)) for rows in slices(B, internal_batch_size)])
    here = _explained(explainer, sides[0], s, theta, internal_batch_size, ("images", "others"))
    z = here.embedding
    there = _explained(explainer, sides[1], z, theta, internal_batch_size, ("others", "images"))
    with torch.no_grad():
        score = channel_contributions(widen(z), widen(s).to(z.device), measure).sum(1)
    theta = theta.to(score)
    is_distance = measure == "euclidean"
    result = VerificationExplanation(
        measure=_MEASURES.get(measure, "score") if isinstance(measure, str) else "score",
        scores=score.abs().sqrt() if is_distance else score,
        thresholds=theta,
        margins=score + theta.square() if is_distance else score - theta,
        maps=here.maps[0],
        other_maps=there.maps[0],
        explainable=(here.valid & there.valid)[:, 0],
        adds_up=isinstance(explainer, SimilarityDecomposition),
    )
    warn_once(here.report.texts() + there.report.texts() + _warnings_of_totals(result, explainer, z))
    object.__setattr__(result, "_origin", tuple(tuple(x.detach() for x in side) for side in sides))
    return result


def _explainer(
    method: Any, forward_func: Any, layer: nn.Module | None, similarity: Any, options: dict[str, Any]
) -> SimilarityAttribution:
    if options.get("dimension_weights") is not None:
        raise ValueError("Expected no `dimension_weights`: a decision needs a score that is the same for both images.")
    made = make_method(method, "explain_verification", forward_func, layer, similarity, **options)
    made.check_own_share(None, 0.0)
    measure, of_distances = made._similarity(), isinstance(made, SimilarityDecomposition)
    if not isinstance(similarity, (str, type(None))) and (
        measure == "euclidean" or of_distances > isinstance(measure, str)
    ):
        raise ValueError(
            f'Expected `similarity` to be "cosine", "dot" or "euclidean", but got {describe(similarity)}. For'
            " embeddings of length 1, a distance d is a cosine of 1 - d * d / 2."
        )
    if isinstance(made, LabelFreeActivationMap):
        raise ValueError("LabelFreeActivationMap has no threshold, as it does not use the score; pass another method.")
    if measure == "euclidean" and not of_distances:
        raise ValueError(
            f"{type(made).__name__} has no threshold for distances: the score of an image with itself is 0. Pass"
            " method=SimilarityDecomposition. For embeddings of length 1, a distance d is a cosine of 1 - d * d / 2."
        )
    return made


def _paired(images: Tensors, others: Tensors) -> tuple[Tensors, Tensors]:
    """Both sides with equal numbers of rows; a single input is paired with all of the other side."""
    check_same_form(others, images, "others")
    B, K = len(images[0]), len(others[0])
    if B != K and 1 not in (B, K):
        raise ValueError(f"Expected `others` to be {B} images, one for each of `images`, or one, but got {K}.")

    def repeated(side: Tensors) -> Tensors:
        return tuple(x.expand(K if B == 1 else B, *x.shape[1:]) if len(x) == 1 else x for x in side)

    return repeated(images), repeated(others)


def _thresholds(threshold: Any, similarity: Any, pairs: int) -> Tensor:
    """Thresholds (B,), in double precision."""
    try:
        values = threshold.detach() if isinstance(threshold, Tensor) else torch.as_tensor(np.asarray(threshold))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected `threshold` to be numbers, but got {describe(threshold)}.") from error
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"Expected `threshold` to be numbers, but got {describe(threshold)}.")
    if values.shape not in ((), (1,), (pairs,)):
        raise ValueError(
            f"Expected `threshold` to be one number or {pairs}, one for each pair, but got shape {tuple(values.shape)}."
        )
    values = values.cpu().double().expand(pairs)
    if not values.isfinite().all():
        raise ValueError("Expected `threshold` to be finite, but got nan or infinity.")
    if similarity == "cosine" and (values.abs() > 1).any():
        t = values[values.abs() > 1][0].item()
        cosines = f": {t:g} is the cosine {1 - t * t / 2:.3g}, or {1 - t / 2:.3g} if it is squared" if 0 < t < 2 else ""
        raise ValueError(
            f"Expected `threshold` to be a cosine, from -1 to 1, but got {t:g}; for a distance pass"
            f' similarity="euclidean", or, for embeddings of length 1, the cosine 1 - threshold² / 2{cosines}.'
        )
    if similarity == "euclidean" and (values <= 0).any():
        raise ValueError(
            f'Expected `threshold` of similarity="euclidean" to be a distance above 0, but got {values.min():g}.'
        )
    return values


def _explained(
    method: SimilarityAttribution,
    inputs: Tensors,
    s: Tensor,
    theta: Tensor,
    internal_batch_size: int | None,
    sides: tuple[str, str],
) -> Explained:
    """The maps of inputs for their references s (B, D), less their thresholds."""
    if method._similarity() == "euclidean":  # f.z - |s|² is minus the squared distance
        theta = s.detach().cpu().double().square().sum(1) - theta.square()
    numbers = torch.arange(len(s))[:, None]
    return explain_references(
        method,
        inputs,
        lambda z, rows: Question(s, numbers[rows], theta[rows, None]),
        internal_batch_size=internal_batch_size,
        sides=sides,
    )


def _warnings_of_totals(found: VerificationExplanation, method: SimilarityAttribution, z: Tensor) -> list[str]:
    """The warning about maps whose mean speaks for the other decision, or lacks much of the margin."""
    to_first_order = isinstance(method, SimilarityDecomposition) and method.n_steps is None
    wrong, size = torch.zeros_like(found.accepted), found.scores.abs() + found.thresholds.abs()
    for maps, missing in zip((found.maps, found.other_maps), found.missing):
        total, rounding = found.margins - missing, rounding_of(maps) + 8 * torch.finfo(size.dtype).eps * size
        wrong |= (total * found.margins < 0) & (total.abs() > rounding)
        if to_first_order:
            wrong |= missing.abs() > torch.maximum(rounding, found.margins.abs() / 2)
    pairs = (wrong & found.explainable).nonzero().flatten().tolist()
    if not pairs:
        return []
    if not isinstance(method, SimilarityDecomposition):
        reason = f"the values of {type(method).__name__} add up to no score. Pass method=SimilarityDecomposition."
    elif method.n_steps is not None:
        reason = "the rest belongs to the baseline, see `missing`. The map shows what else speaks for and against."
    elif ((norm(widen(z)) - 1).abs() < _UNIT).all():
        reason = (
            "the encoder ends in a normalisation, and then the threshold's share belongs to no place. Leave the"
            " normalisation out: the cosine is the same without it."
        )
    else:
        reason = (
            "the rest belongs to no place, see `missing`: it comes from biases or another such step behind the layer."
        )
    named = f"{pairs[:_NAMED]}" + (f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else "")
    return [
        f"The maps of pairs {named} do not add up to score - threshold: their mean has the opposite"
        f" sign{', or they lack more than half of it' if to_first_order else ''}; {reason}"
    ]
