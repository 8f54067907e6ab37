"""What a page shows: the matrices and maps of a query and its references, by the methods of the package."""

import warnings
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from captum_fam._checks import describe
from captum_fam.engine.layers import last_map
from captum_fam.matches import as_matrices
from captum_fam.methods.correspondence_map import CorrespondenceMap, less_the_others
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import channel_contributions, widen

# Where the user has named no decomposition: along this path, the parts add up to the score for every encoder, and those
# of a spatial mean are what they are without it.
STEPS, BASELINE = 8, "zero"

SCORE, ALIKE = "score", "alike"  # modes with words of their own
OWN, COMMON, MADE, REST = "own", "common", "made", "rest"  # maps, with "alike"

Method = SimilarityDecomposition | CorrespondenceMap


@dataclass
class Mode:
    """
    A matrix (h, w, h', w') of places, and what belongs to a score beside it: what places of the query, or of the
    reference, contribute by themselves (h, w), (h', w'), and what no place does.
    """

    values: Tensor
    query_rest: Tensor | None = None
    reference_rest: Tensor | None = None
    rest: dict[str, float] = field(default_factory=dict)


@dataclass
class Found:
    """Of one reference: its score, modes and maps by their names; maps are (h, w) of the query and the reference."""

    score: float | None = None
    modes: dict[str, Mode] = field(default_factory=dict)
    maps: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


def of_matrices(given: Any, references: int) -> list[Found]:
    """What a user has computed: matrices (K, h, w, h', w'), or several kinds of them by name."""
    found = [Found() for _ in range(references)]
    for name, values in (given if isinstance(given, Mapping) else {"matches": given}).items():
        matrices = as_matrices(f"method[{name!r}]" if isinstance(given, Mapping) else "method", values)
        if len(matrices) != references:
            raise ValueError(
                f"Expected one matrix for each of {references} references, the control with them, but got"
                f" {len(matrices)}."
            )
        for one, matrix in zip(found, matrices):
            one.modes[str(name)] = Mode(matrix)
    if not found[0].modes:
        raise ValueError("Expected `method` to hold matrices, but it is empty.")
    return found


def of_methods(query: Tensor, references: Tensor, methods: list[Method], control: bool) -> tuple[list[Found], str]:
    """
    What the methods find of a query (1, C, H, W) and K references (K, C, H, W), of which the last may be the control;
    and the name of the similarity. What was not given is made for the same encoder and layer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The places of layer")  # the page says what is missing from the sum
        decomposition, correspondence, fam, match = _all_of(methods, query)
        z, s = widen(match.embed(query)), widen(match.embed(references))
        similarity: Any = match.similarity
        scores = channel_contributions(z, s, similarity).sum(1)
        found = [Found(score.item()) for score in scores]
        _decompose(decomposition, query, references, found, scores)
        _compare(correspondence, query, references, found)
        K = len(references) - control
        for name, method, contrast in ((OWN, match, "self"), (COMMON, fam, None)):
            if contrast is None or similarity != "euclidean":  # by which nothing is particular to a match
                there, here = method.attribute_pair(references, query, contrast=contrast)
                _put(found, name, here, there)
        if K > 1:
            rest: Any = match.attribute_all(query, reference=references[:K], contrast="rest")
            for one, plane in zip(found[:K], _planes(rest.transpose(0, 1))):
                one.maps[REST] = plane, None
    return found, similarity


def _all_of(
    methods: list[Method], query: Tensor
) -> tuple[SimilarityDecomposition, CorrespondenceMap, FeatureActivationMap, SimilarityDecomposition]:
    """
    The two methods that give matrices, FAM, and the decomposition of the first order, or the user's own, for maps.
    """
    given = {
        type_: [m for m in methods if isinstance(m, type_)] for type_ in (SimilarityDecomposition, CorrespondenceMap)
    }
    if (
        not methods
        or any(len(of_type) > 1 for of_type in given.values())
        or sum(map(len, given.values())) < len(methods)
    ):
        raise TypeError(
            "Expected `method` to be a SimilarityDecomposition, an IntegratedDecomposition or a CorrespondenceMap, a"
            " list of one of the former and one of the latter, or matrices, but got"
            f" {[type(m).__name__ for m in methods]}."
        )
    first = methods[0]
    layer = next((m.layer for m in methods if m.layer is not None and not isinstance(m, IntegratedDecomposition)), None)
    if layer is None:
        layer = first.layer if first.layer is not None else _last(first, query)
    if isinstance(layer, list):
        raise ValueError("Expected a method with one layer, but got a list of layers; explore them one by one.")
    args: Any = (first._encoder(), layer, first.device_ids)
    options: Any = {"output_selector": first._selector(), "reshape_transform": first.reshape_transform}
    similarity: Any = (given[SimilarityDecomposition] or methods)[0]._similarity()
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
    return decomposition, correspondence, fam, SimilarityDecomposition(*args, similarity=similarity, **options)


def _last(method: Method, query: Tensor) -> Any:
    """The layer that other methods explain, where this one looks for its own."""
    name = last_map(method._encoder(), (query,), None, method._selector())
    model: Any = method._behind()
    return model.get_submodule(name)


def _decompose(
    method: SimilarityDecomposition, query: Tensor, references: Tensor, found: list[Found], scores: Tensor
) -> None:
    """The parts of each score, by pairs of places."""
    euclidean = method._similarity() == "euclidean"
    if euclidean:  # -|z - s|^2 = 2 z.s - |z|^2 - |s|^2, and pairs of places make the first
        method = copy(method)
        method.similarity = "dot"
    times = 2 if euclidean else 1
    there, here = method.attribute_pair(references, query)
    _put(found, MADE, here, there, times)
    integrated = method.n_steps is not None
    made: Any = method.attribute_matrix(references, query, return_baselines=integrated)
    matrices = made[0] if integrated else made
    z, s = widen(method.embed(query)), widen(method.embed(references))
    for k, one in enumerate(found):
        here_k, there_k = one.maps[MADE]
        assert there_k is not None
        turned = times * matrices[k].double().cpu().T
        mode = Mode(turned.reshape(*here_k.shape, *there_k.shape))
        if integrated:
            of_reference, of_query, both = (times * part[k].double().cpu() for part in made[1:])
            if any(part.any() for part in (of_reference, of_query, both)):  # no baseline has an embedding
                mode.query_rest, mode.reference_rest = (
                    of_query.reshape(here_k.shape),
                    of_reference.reshape(there_k.shape),
                )
                mode.rest["rest"] = both.item()
        if euclidean:
            mode.rest["lengths"] = -(z.square().sum() + s[k].square().sum()).item()
        one.modes[SCORE] = mode
        # The map's mean is the score; on the page its sum is, as that of the matrix.
        one.maps[MADE] = here_k / here_k.numel(), there_k / there_k.numel()


def _compare(method: CorrespondenceMap, query: Tensor, references: Tensor, found: list[Found]) -> None:
    """Which places look alike."""
    here, there = less_the_others(method, query, references)
    _put(found, ALIKE, here.transpose(0, 1), there)
    cosines: Any = method.attribute_matrix(references, query)
    for matrix, one in zip(cosines, found):
        here_k, there_k = one.maps[ALIKE]
        assert there_k is not None
        one.modes[ALIKE] = Mode(matrix.double().cpu().T.reshape(*here_k.shape, *there_k.shape))


def _put(found: list[Found], name: str, here: Any, there: Any, times: float = 1) -> None:
    """Maps (K, 1, h, w) of the query and the references."""
    here, there = _planes(here), _planes(there)
    for k, one in enumerate(found):
        one.maps[name] = times * here[k], times * there[k]


def _planes(maps: Any) -> Tensor:
    """Maps (K, h, w), in double precision on the CPU."""
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise ValueError(f"Expected a layer that gives one map (B, C, h, w), but got attributions {describe(maps)}.")
    return maps[:, 0].double().cpu()
