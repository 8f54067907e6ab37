"""What a page shows: the matrices and maps of a query and its references, by the methods of the package."""

import warnings
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_fam._checks import describe
from captum_fam.engine.layers import last_map
from captum_fam.engine.question import Question
from captum_fam.matches import as_matrices, check_squares
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.dimension_attribution import DimensionAttribution
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.methods.shared_parts import SharedParts, SharedPartsExplanation
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import channel_contributions, nonzero, norm, widen

# If the user has named no decomposition: along this path, the parts add up to the score for every encoder. It changes
# nothing for a spatial mean.
STEPS, BASELINE = 8, "zero"

SCORE, ALIKE, SHARED = "score", "alike", "shared parts"  # modes with words of their own
OWN, COMMON, MADE, REST = "own", "common", "made", "rest"  # maps, with "alike"

Method = SimilarityDecomposition | CorrespondenceMap | FeatureActivationMap | SharedParts


@dataclass
class Mode:
    """
    A matrix (h, w, h', w') of places, and the rest of the score: what places of the query (h, w), or of the reference
    (h', w'), contribute by themselves, and what belongs to no place.
    """

    values: Tensor
    query_rest: Tensor | None = None
    reference_rest: Tensor | None = None
    rest: dict[str, float] = field(default_factory=dict)


@dataclass
class Found:
    """
    The results for one reference: its score, and its modes and maps by name. Maps are (h, w), of the query and the
    reference. The parts of the pair make one more mode.
    """

    score: float | None = None
    modes: dict[str, Mode] = field(default_factory=dict)
    maps: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    parts: SharedPartsExplanation | None = None


def of_matrices(given: Any, shown: list[Image.Image]) -> list[Found]:
    """
    The results that a user has computed for a query and K references, shown as these pictures: matrices
    (K, h, w, h', w'), or several kinds of them by name.
    """
    found = [Found() for _ in shown[1:]]
    by_name = given if isinstance(given, Mapping) else {"matches": given}
    for name, values in by_name.items():
        argument = f"method[{name!r}]" if isinstance(given, Mapping) else "method"
        matrices = as_matrices(argument, values)
        if len(matrices) != len(found):
            raise ValueError(
                f"Expected one matrix for each of {len(found)} references, the control with them, but got"
                f" {len(matrices)}."
            )
        check_squares(argument, values, [shown[:1], shown[1:]])
        for one, matrix in zip(found, matrices):
            one.modes[str(name)] = Mode(matrix)
    if not by_name:
        raise ValueError("Expected `method` to hold matrices, but it is empty.")
    return found


def of_methods(
    query: Tensor, images: Tensor, groups: list[list[int]], methods: list[Method], control: bool
) -> tuple[list[Found], str]:
    """
    The results of the methods for a query (1, C, H, W) and K references, the last of which may be the control; and the
    name of the similarity. A reference is the mean embedding of a group of images, given by their numbers among all
    (N, C, H, W); their places are side by side, in rows. Methods that are not given are made for the same encoder and
    layer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The places of layer")  # the page says what is missing from the sum
        decomposition, correspondence, fam, match, parts = _all_of(methods, query)
        z, s = widen(match.embed(query)), widen(match.embed(images))
        p = torch.stack([s[group].mean(0) for group in groups])
        similarity: Any = match.similarity
        scores = channel_contributions(z, p, similarity).sum(1)
        found = [Found(score.item()) for score in scores]
        with warnings.catch_warnings():
            # These call the query a reference; the maps below give the same warning about the right side.
            warnings.filterwarnings("ignore", "Embeddings are zero or not finite")
            if parts is not None:  # only explore_pair passes it, and then each group is one image
                for one, image in zip(found, images):
                    one.parts = parts.explain(query, image[None])
            _decompose(decomposition, query, images, groups, (z, s, p), found)
        _compare(correspondence, query, images, groups, found)
        K = len(groups) - control
        for name, method, contrast in ((OWN, match, "self"), (COMMON, fam, None)):
            if contrast is None or similarity != "euclidean":  # a distance has no "self"
                here = method.attribute_all(query, reference_embedding=p, contrast=contrast)
                there = _of_groups(method, images, groups, p, z, contrast)
                for one, plane, group in zip(found, planes(here, 1), groups):
                    one.maps[name] = plane, _side_by_side(there, group)
        if K > 1:
            rest = match.attribute_all(query, reference_embedding=p[:K], contrast="rest")
            for one, plane in zip(found[:K], planes(rest, 1)):
                one.maps[REST] = plane, None
    return found, similarity


def _all_of(
    methods: list[Method], query: Tensor
) -> tuple[
    SimilarityDecomposition, CorrespondenceMap, FeatureActivationMap, SimilarityDecomposition, SharedParts | None
]:
    """
    The two methods that give matrices; FAM and the decomposition of the first order, for maps; and shared parts, if
    given.
    """
    types = SimilarityDecomposition, CorrespondenceMap, FeatureActivationMap, SharedParts
    given: dict[type, list[Any]] = {type_: [m for m in methods if isinstance(m, type_)] for type_ in types}
    if (
        not methods
        or any(len(of_type) > 1 for of_type in given.values())
        or sum(map(len, given.values())) < len(methods)
    ):
        raise TypeError(
            "Expected `method` to be a SimilarityDecomposition, an IntegratedDecomposition, a CorrespondenceMap, a"
            " FeatureActivationMap or a SharedParts, a list of different ones, or matrices, but got"
            f" {[type(m).__name__ for m in methods]}."
        )
    first = methods[0]
    layer = next((m.layer for m in methods if m.layer is not None and not isinstance(m, IntegratedDecomposition)), None)
    if layer is None:
        layer = first.layer if first.layer is not None else _last(first, query)
    if isinstance(layer, list):
        raise ValueError("Expected a method with one layer, but got a list of layers; explore them one by one.")
    if any(m._encoder() != first._encoder() for m in methods):
        raise ValueError("Expected methods of one encoder, but got several encoders; explore them one by one.")
    args: Any = (first._encoder(), layer, first.device_ids)
    options: Any = {"output_selector": first._selector(), "reshape_transform": first.reshape_transform}
    scored = [m for m in methods if not isinstance(m, CorrespondenceMap)] or methods
    similarity: Any = scored[0]._similarity()
    if any(m._similarity() != similarity for m in scored):
        raise ValueError("Expected methods of one similarity, but got several; explore them one by one.")
    if similarity not in ("cosine", "dot", "euclidean"):
        raise ValueError(
            f'The explorer needs a similarity that is a sum over pairs of places, "cosine", "dot" or "euclidean", but'
            f" got {describe(similarity)}; pass matrices of your own."
        )
    (decomposition,) = given[SimilarityDecomposition] or [
        SimilarityDecomposition(*args, similarity=similarity, n_steps=STEPS, baseline=BASELINE, **options)
    ]
    (correspondence,) = given[CorrespondenceMap] or [CorrespondenceMap(*args, **options)]
    fam = FeatureActivationMap(*args, similarity=similarity, **options)
    for own in given[FeatureActivationMap]:
        fam = copy(own)  # one of a SimilarityScore would have references of its own
        fam.forward_func, fam.similarity, fam.output_selector = args[0], similarity, options["output_selector"]
    first_order = SimilarityDecomposition(*args, similarity=similarity, **options)
    return decomposition, correspondence, fam, first_order, next(iter(given[SharedParts]), None)


def _last(method: Method, query: Tensor) -> Any:
    """The layer for the other methods, if this one finds its own."""
    name = last_map(method._encoder(), (query,), None, method._selector())
    model: Any = method._behind()
    return model.get_submodule(name)


def _decompose(
    method: SimilarityDecomposition,
    query: Tensor,
    images: Tensor,
    groups: list[list[int]],
    embeddings: tuple[Tensor, Tensor, Tensor],
    found: list[Found],
) -> None:
    """
    Splits each score over pairs of places. The product with a mean is the mean of the products, so the images of a
    group share its score. The cosine of an image has its own length; that of the group has the mean's.
    """
    z, s, p = (of.cpu().double() for of in embeddings)
    similarity = method._similarity()
    if similarity == "euclidean":  # -|z - p|^2 = 2 z.p - |z|^2 - |p|^2, and pairs of places make the first
        method = copy(method)
        method.similarity = "dot"
    times = torch.full((len(s),), 2.0 if similarity == "euclidean" else 1.0).double()
    for mean, group in zip(p, groups):
        times[group] /= len(group)
        if similarity == "cosine":
            times[group] *= norm(s[group])[:, 0] / nonzero(norm(mean))

    def shares(parts: Tensor, *shape: int) -> Tensor:
        return (times[:, None] * parts.cpu().double().flatten(1)).reshape(len(s), *shape)

    there, here = (planes(maps).shape[1:] for maps in method.attribute_pair(images, query))  # the grids
    integrated = method.n_steps is not None
    made: Any = method.attribute_matrix(images, query, return_baselines=integrated)
    matrices, *rests = made if integrated else [made]
    values = shares(matrices.mT, *here, *there)
    shapes: Any = there, here, ()
    rests = [shares(part, *shape) for part, shape in zip(rests, shapes)]
    for one, group, mean in zip(found, groups, p):
        mode = Mode(_side_by_side(values, group))
        if any(part[group].any() for part in rests):  # no baseline has an embedding
            of_reference, of_query, both = rests
            mode.query_rest, mode.reference_rest = of_query[group].sum(0), _side_by_side(of_reference, group)
            mode.rest["rest"] = both[group].sum().item()
        if similarity == "euclidean":
            mode.rest["lengths"] = -(z.square().sum() + mean.square().sum()).item()
        one.modes[SCORE] = mode
        # Rows and columns add up to it, also where they do not add up to the score.
        one.maps[MADE] = (
            mode.values.sum((2, 3)) + (0 if mode.query_rest is None else mode.query_rest),
            mode.values.sum((0, 1)) + (0 if mode.reference_rest is None else mode.reference_rest),
        )


def _compare(
    method: CorrespondenceMap, query: Tensor, images: Tensor, groups: list[list[int]], found: list[Found]
) -> None:
    """Finds which places look alike; the best match of a group is the best of its images."""

    def best(maps: Any) -> Tensor:
        """The best matches with each group (n, K, h, w), from those with each image (n, N, h, w)."""
        return torch.stack([maps[:, group].amax(1) for group in groups], 1).cpu().double()

    there = planes(method.attribute(images, reference=query))
    here = best(method.attribute_all(query, reference=images))
    cosines: Any = method.attribute_matrix(images, query)
    if len(groups) > 1 and method.background is None:
        here = here - (here.sum(1, keepdim=True) - here) / (len(groups) - 1)
        matches = best(method.attribute_all(images, reference=images))
        for k, group in enumerate(groups):
            there[group] -= torch.cat([matches[group, :k], matches[group, k + 1 :]], 1).mean(1)
    values = cosines.cpu().double().mT.reshape(len(images), *here.shape[2:], *there.shape[1:])
    for one, group, plane in zip(found, groups, here[0]):
        one.maps[ALIKE] = plane, _side_by_side(there, group)
        one.modes[ALIKE] = Mode(_side_by_side(values, group))


def _of_groups(
    method: DimensionAttribution, images: Tensor, groups: list[list[int]], p: Tensor, z: Tensor, contrast: Any
) -> Tensor:
    """The maps (N, h, w) of the images for the query, with the weights of the mean embedding of their group."""
    t = Question(z, torch.zeros(1, 1, dtype=torch.long), contrast).terms(p, method)
    f = method.weights(p[:, None], t, contrast is None)
    owners = torch.empty(len(images), dtype=torch.long)
    for k, group in enumerate(groups):
        owners[group] = k
    method = copy(method)
    method.weights = lambda *_: f[owners]  # type: ignore[method-assign]
    return planes(method.attribute(images, reference_embedding=z))


def _side_by_side(parts: Tensor, group: list[int]) -> Tensor:
    """The parts of a group's images, as of one large image, from those of all images (N, ..., h, w)."""
    return torch.cat([torch.cat([*row], -1) for row in parts[group].split(columns(len(group)))], -2)


def columns(count: int) -> int:
    """How many images of a group stand in a row: all rows are equally long, and there are no more rows than columns."""
    return next(n for n in range(1, count + 1) if count % n == 0 and n * n >= count)


def planes(maps: Any, at: int = 0) -> Tensor:
    """Maps (K, h, w), in double precision on the CPU, of (K, 1, h, w), or with ``at=1`` of (1, K, h, w)."""
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise ValueError(f"Expected a layer that gives one map (B, C, h, w), but got attributions {describe(maps)}.")
    return maps.select(1 - at, 0).cpu().double()
