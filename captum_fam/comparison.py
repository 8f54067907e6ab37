"""Several attribution methods on one similarity."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import captum.attr
from captum.attr import LRP, Attribution, Occlusion
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_fam._captum import TargetType
from captum_fam._checks import (
    check_callable,
    check_same_form,
    describe,
    did_you_mean,
    format_inputs,
    reference_index,
    warn,
)
from captum_fam._distances import canonical
from captum_fam.adapters import resize
from captum_fam.engine.untouched import attributes_restored, buffers_restored
from captum_fam.methods import DEFAULT
from captum_fam.methods.by_name import OF_SIMILARITIES
from captum_fam.methods.class_activation_map import ClassActivationMap
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.shared_parts import SharedParts
from captum_fam.score import SimilarityScore

Method: TypeAlias = str | type[Attribution] | Attribution | Callable[[Tensor, Any], Any]

_OF_PLACES = (CorrespondenceMap, SharedParts)  # these compare places, which embeddings do not have
_OURS: tuple[type[Attribution], ...] = (ClassActivationMap, SharedParts, *OF_SIMILARITIES.values())


class Comparison(dict[str, Tensor]):
    """
    Maps (B, 1, *spatial) at the size of the inputs, by the names of their methods.

    Attributes:
        failures: why methods have no map, by their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, str] = {}


def compare_attributions(
    score: Callable[..., Any],
    layer: nn.Module,
    inputs: Tensor,
    target: TargetType = None,
    methods: Iterable[Method] | Mapping[str, Method] | None = None,
    *,
    reference: Tensor | None = None,
    additional_forward_args: object | None = None,
    show_progress: bool = True,
) -> Comparison:
    r"""
    How do several attribution methods explain the same similarity? Their maps, at one size.

    Args:
        score (SimilarityScore): An encoder and its references, as one function for all methods. For
                    methods that explain classifiers, a classifier.
        layer (torch.nn.Module): The layer that layer methods explain.
        inputs (Tensor): Inputs to explain, (B, C, \*spatial).
        target (int, list, Tensor, optional): Number of the reference, as in
                    :meth:`FeatureActivationMap.attribute`.
                    Default: None
        methods (list or dict, optional): Methods, or a dict of names and methods. Each method is

                    - the name of a class of captum_fam or ``captum.attr``,
                    - a class, which gets ``score`` and, if it needs one, ``layer``,
                    - an instance, to set other arguments,
                    - a function ``(inputs, target) -> attributions``, to set other arguments of
                      ``attribute``.

                    Default: FeatureActivationMap, SimilarityDecomposition, IntegratedDecomposition
                    (at a layer of its own), LabelFreeActivationMap, LayerGradCam, RelevanceCam and
                    Relax (whose 1,000 passes take the most time). The decompositions only for a
                    cosine, dot product or Euclidean distance; with a ``reference``,
                    CorrespondenceMap, too
        reference (Tensor, optional): The K inputs whose embeddings are the references of the score.
                    CorrespondenceMap and SharedParts need them, because they compare places.
                    Default: None, no maps of these two
        additional_forward_args (Any, optional): As for other Captum methods; not given to
                    functions.
                    Default: None
        show_progress (bool): Shows a progress bar.
                    Default: True

    Returns:
        *dict*: maps (B, 1, \*spatial) at the size of the inputs, by name. Layer maps are
        interpolated linearly; attributions of several channels are added up. Methods that cannot
        explain this encoder are missing; a warning gives the reason for each, and ``.failures`` has
        the reasons by name. If a method needs other arguments, pass an instance or a function.
        Captum's Occlusion gets windows of an eighth of the input's size that overlap by half.

    Raises:
        TypeError, ValueError: an argument is not as described above, or no method succeeded.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score = SimilarityScore(encoder, torch.rand(5, 8))
        >>> methods = ["FeatureActivationMap", "LayerGradCam", "Occlusion"]
        >>> maps = compare_attributions(score, encoder[1], torch.rand(2, 3, 16, 16), 3, methods, show_progress=False)
        >>> {name: tuple(map.shape) for name, map in maps.items()}
        {'FeatureActivationMap': (2, 1, 16, 16), 'LayerGradCam': (2, 1, 16, 16), 'Occlusion': (2, 1, 16, 16)}
    """
    check_callable("score", score)
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"Expected `layer` to be a module, such as model.get_submodule(name), but got {describe(layer)}."
        )
    if not isinstance(inputs, Tensor) or inputs.ndim < 3:
        raise TypeError(f"Expected `inputs` to be one tensor (B, C, *spatial), but got {describe(inputs)}.")
    if reference is not None:
        check_same_form(format_inputs("reference", reference), (inputs,))
        if isinstance(score, SimilarityScore) and len(reference) != len(score.reference_embedding):
            raise ValueError(
                f"Expected `reference` to hold the {len(score.reference_embedding)} inputs whose embeddings are the"
                f" references of the score, but got {len(reference)}."
            )
    if isinstance(score, SimilarityScore):
        target = reference_index("target", target, len(score.reference_embedding), len(inputs)).tolist()
    if methods is None:
        methods = [name for name in DEFAULT if not name.endswith("Decomposition") or _is_decomposable(score)]
        methods += ["CorrespondenceMap"] if reference is not None else []
    named = _named(methods)
    comparison = Comparison()
    with tqdm(named.items(), desc="compare_attributions", unit="method", disable=not show_progress) as progress:
        for name, method in progress:
            progress.set_postfix_str(name)
            try:
                with _undisturbed(score):
                    attribute = _function(method, score, layer, reference, additional_forward_args, show_progress)
                    comparison[name] = _map(attribute(inputs.detach().clone(), target), inputs)
            except Exception as error:  # whatever a method raises for an encoder that it does not fit
                comparison.failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name, reason in comparison.failures.items():
        warn(f"{name} has no map: {reason}")
    if named and not comparison:
        raise ValueError(f"No method has a map. {'; '.join(f'{n}: {r}' for n, r in comparison.failures.items())}")
    return comparison


def _is_decomposable(score: Callable[..., Any]) -> bool:
    return not isinstance(score, SimilarityScore) or canonical(score.similarity) in ("cosine", "dot", "euclidean")


@contextmanager
def _undisturbed(score: Callable[..., Any]) -> Iterator[None]:
    """Restores the model, so that one method's failure harms no other, and hides Captum's notes on how it works."""
    with attributes_restored(score), buffers_restored(score), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"captum\.")
        yield


def _named(methods: Iterable[Method] | Mapping[str, Method]) -> dict[str, Method]:
    """The methods by name; a name that comes twice gets a number."""
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise TypeError(f"Expected `methods` to be a list or a dict of methods, but got {describe(methods)}.")
    if isinstance(methods, Mapping):
        return {name: _lookup(method) for name, method in methods.items()}
    named: dict[str, Method] = {}
    for method in map(_lookup, methods):
        kind = method if inspect.isroutine(method) or isinstance(method, type) else type(method)
        name, same = kind.__name__, sum(n.partition(" ")[0] == kind.__name__ for n in named)
        named[f"{name} {same + 1}" if same else name] = method
    return named


def _lookup(method: Method) -> Method:
    if not isinstance(method, str):
        fits = issubclass(method, Attribution) if isinstance(method, type) else callable(method)
        if not fits and not callable(getattr(method, "attribute", None)):
            raise TypeError(
                "Expected `methods` to hold names, classes, instances of Captum attribution methods or functions, but"
                f" got {describe(method)}."
            )
        return method
    known = {n: m for n, m in vars(captum.attr).items() if isinstance(m, type) and issubclass(m, Attribution)}
    known |= {ours.__name__: ours for ours in _OURS}
    if method not in known:
        hint = did_you_mean(method, known)
        raise ValueError(f"Neither captum_fam nor captum.attr has a method {method!r}.{hint}")
    return known[method]


def _function(
    method: Method,
    score: Callable[..., Any],
    layer: nn.Module,
    reference: Tensor | None,
    additional_forward_args: object | None,
    progress: bool,
) -> Callable[[Tensor, Any], Any]:
    """A method as a function of inputs and target."""
    if isinstance(method, type):
        parameters = inspect.signature(method).parameters
        where = (layer,) if "layer" in parameters and parameters["layer"].default is inspect.Parameter.empty else ()
        method = method(score, *where, **({"show_progress": progress} if "show_progress" in parameters else {}))
    if isinstance(method, _OF_PLACES) and reference is None:
        raise ValueError(
            "it compares places, and embeddings have none: pass compare_attributions the references themselves as"
            " reference="
        )
    if isinstance(method, LRP) and isinstance(method.forward_func, SimilarityScore):
        raise ValueError(
            "LRP takes the gradient of a similarity for the relevance to start from; RelevanceCam starts from the"
            " contributions to the score"
        )
    explain: Any = getattr(method, "attribute", None)
    if explain is None:
        return method  # type: ignore[return-value]  # _lookup has seen that it is a function

    def attribute(inputs: Tensor, target: Any) -> Any:
        arguments: dict[str, Any] = {"target": target, "additional_forward_args": additional_forward_args}
        if isinstance(method, _OF_PLACES):
            arguments["reference"] = reference
        if isinstance(method, Occlusion):
            size = [max(1, n // 8) for n in inputs.shape[2:]]
            arguments["sliding_window_shapes"] = (inputs.shape[1], *size)
            arguments["strides"] = (inputs.shape[1], *(max(1, n // 2) for n in size))
        return explain(inputs, **arguments)

    return attribute


def _map(attributions: Any, inputs: Tensor) -> Tensor:
    """One map (B, 1, *spatial) at the size of the inputs."""
    while isinstance(attributions, (tuple, list)) and len(attributions) == 1:
        attributions = attributions[0]
    if (
        not isinstance(attributions, Tensor)
        or attributions.ndim != inputs.ndim
        or len(attributions) != len(inputs)
        or not attributions.is_floating_point()
    ):
        raise ValueError(
            f"its attributions ({describe(attributions)}) are no maps (B, C, *spatial) of inputs of shape"
            f" {tuple(inputs.shape)}"
        )
    return resize(attributions.detach().sum(1, keepdim=True), inputs.shape[2:])
