"""The methods that explain similarities, by class or by name, and their maps for any references."""

import inspect
from collections.abc import Callable
from typing import Any

import captum.attr
import torch
from torch import Tensor, nn

from captum_fam._checks import check_internal_batch_size, describe, did_you_mean
from captum_fam.engine.chunks import Tensors, cut, slices
from captum_fam.engine.correspondence import Call
from captum_fam.engine.question import Question, usable
from captum_fam.engine.report import SIDES, Report
from captum_fam.methods.class_activation_map import ClassActivationMap
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.fame import Fame
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.feature_factorization_activation_map import FeatureFactorizationActivationMap
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.methods.label_free_activation_map import LabelFreeActivationMap
from captum_fam.methods.layer_explanation import Ask, Explained
from captum_fam.methods.relax import Relax
from captum_fam.methods.relevance_cam import RelevanceCam
from captum_fam.methods.score_cam import ScoreCam
from captum_fam.methods.shared_parts import SharedParts
from captum_fam.methods.similarity_attribution import SimilarityAttribution
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import Similarity, check_similarity

OF_SIMILARITIES: dict[str, type[SimilarityAttribution]] = {
    kind.__name__: kind
    for kind in (
        CorrespondenceMap,
        Fame,
        FeatureActivationMap,
        FeatureFactorizationActivationMap,
        IntegratedDecomposition,
        LabelFreeActivationMap,
        Relax,
        RelevanceCam,
        ScoreCam,
        SimilarityDecomposition,
    )
}


def method_named(method: Any, function: str) -> type[SimilarityAttribution]:
    """
    The class of a method that explains similarities, from the class or its name. ``function`` is the one that the user
    called, for messages.

    Raises:
        ValueError: there is no such method; the message lists those that there are.
    """
    if isinstance(method, str) and method in OF_SIMILARITIES:
        return OF_SIMILARITIES[method]
    others = (ClassActivationMap, SharedParts)
    if isinstance(method, type) and issubclass(method, SimilarityAttribution) and method not in others:
        return method
    name = method.__name__ if isinstance(method, type) else method if isinstance(method, str) else describe(method)
    known = f"Expected `method` of {function} to be one of {', '.join(OF_SIMILARITIES)}, but got {name}."
    if isinstance(method, SimilarityAttribution):
        raise ValueError(f"{known} That is an instance: pass its class, and its options to {function}.")
    if name == ClassActivationMap.__name__:
        raise ValueError(f"{known} It explains classifiers; SimilarityDecomposition is the same for similarities.")
    if name == SharedParts.__name__:
        raise ValueError(f"{known} It explains pairs of images: SharedParts(encoder, layer).explain(query, reference).")
    if hasattr(captum.attr, name):
        raise ValueError(
            f"{known} It is Captum's: compare_attributions, or {name}(SimilarityScore(encoder, embeddings), ...), runs"
            " it on a similarity."
        )
    raise ValueError(known + did_you_mean(name, OF_SIMILARITIES))


def make_method(
    method: Any,
    function: str,
    forward_func: Any,
    layer: nn.Module | None,
    similarity: Similarity | None = None,
    **options: Any,
) -> SimilarityAttribution:
    """
    Makes a method for an encoder, with further options of its own. ``layer`` is not used where the method takes none,
    and may be None where the method finds one.

    Raises:
        TypeError: the method has no such option; the message names the function that was called.
        ValueError: there is no such method, or an argument is not as its class describes.
    """
    kind = method_named(method, function)
    parameters = inspect.signature(kind).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # of a class of the user's own
    own = [name for name in parameters if name not in ("forward_func", "layer", "similarity")]
    for name in options:
        if name not in own and not takes_any:
            raise TypeError(
                f"{function} got an option {name!r} that {kind.__name__} does not have; it has {', '.join(own)}."
                f"{did_you_mean(name, own)}"
            )
    where = (layer,) if "layer" in parameters or takes_any else ()
    if "similarity" in parameters or takes_any:
        return kind(forward_func, *where, similarity=similarity, **options)
    made = kind(forward_func, *where, **options)
    if similarity is not None:  # only for the scores: the map is not made of them
        check_similarity(similarity)
        made.similarity = similarity
    return made


def explain_references(
    method: Any,
    inputs: Tensors,
    ask: Ask,
    images: Tensors | None = None,
    *,
    internal_batch_size: int | None = None,
    signed: bool = False,
    sides: tuple[str, str] = SIDES,
) -> Explained:
    """
    What a method finds for inputs and their references, as LayerExplanation.explain returns it. ``images`` are the
    references themselves, for a method that compares places.

    Raises:
        ValueError: the method compares places, and there are no images; or it has no map of one layer.
    """
    check_internal_batch_size(internal_batch_size)

    def asked(z: Tensor, rows: slice) -> Question:
        question = ask(z, rows)
        less = question.less if question.other is None else None
        if less is not None and not (isinstance(less, str) and less == "rest"):
            method.check_own_share(less, None if isinstance(less, str) else less)
        return question

    if isinstance(method, CorrespondenceMap):

        def match(question: Question) -> Any:
            if images is None:
                raise ValueError(
                    "CorrespondenceMap compares places, and embeddings have none: it needs the references' images; pass"
                    " them, or another method."
                )
            less = question.less[:, 0] if isinstance(question.less, Tensor) else question.less
            call = Call(len(inputs[0]), None, internal_batch_size)
            return method.match(inputs, images, question.own, less, False, call)

        found = matched(method, inputs, asked, match, internal_batch_size)
    else:
        found = method.explain(inputs, asked, internal_batch_size=internal_batch_size, signed=signed, sides=sides)
    if len(found.sizes) > 1 or len(found.maps) > 1:
        raise ValueError("Expected `layer` to be one module that returns one tensor; explain several one by one.")
    return found


def matched(
    method: CorrespondenceMap,
    inputs: Tensors,
    ask: Ask,
    match: Callable[[Question], Any],
    internal_batch_size: int | None = None,
) -> Explained:
    """The same for maps (B, P, *spatial) of best matches, which ``match`` makes of the question."""
    B = len(inputs[0])
    parts = [method.embed(cut(inputs, rows)) for rows in slices(B, internal_batch_size)]
    z = torch.cat(parts) if len(parts) > 1 else parts[0]
    question = ask(z, slice(0, B))
    maps = match(question)
    valid = usable(z)[:, None] & usable(question.s.to(z))[question.own.to(z.device)]
    return Explained(z, [maps], [maps], valid, [], [1], Report(), [])
