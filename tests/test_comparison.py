"""compare_attributions: each map against its method called by hand, and what happens to those that fail."""

import functools
import threading

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from captum.attr import (
    LRP,
    GuidedGradCam,
    IntegratedGradients,
    LayerGradCam,
    LayerGradientXActivation,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from encoders import FlatEncoder, HeadEncoder, PooledEncoder, PowerPooledEncoder, TokenEncoder, random, seeded
from helpers import close, silent
from test_model_untouched import state, users_model
from torch import nn

from captum_fam import (
    ClassActivationMap,
    FeatureActivationMap,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
    compare_attributions,
)

X = random(2, 3, 16, 16)
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
DEFAULT = [
    "FeatureActivationMap",
    "SimilarityDecomposition",
    "IntegratedDecomposition",
    "LabelFreeActivationMap",
    "LayerGradCam",
    "RelevanceCam",
    "Relax",
]


def scored(kind=HeadEncoder, K=3, **arguments):
    """The similarity to K references under a small encoder, and the layer to explain."""
    encoder = seeded(lambda: kind(**arguments))
    D = encoder(random(1, 3, *[16] * arguments.get("dim", 2))).shape[1]
    return SimilarityScore(encoder, random(K, D, seed=2)), encoder.layer


compare = functools.partial(compare_attributions, show_progress=False)


def at_input_size(attributions, inputs=X):
    """What a comparison owes for attributions: the sum of their channels, interpolated."""
    summed = attributions.detach().sum(1, keepdim=True)
    if summed.shape[2:] == inputs.shape[2:]:
        return summed
    return F.interpolate(summed, inputs.shape[2:], mode=MODES[inputs.ndim - 2], align_corners=False)


# Each map is that of the method


def noisy(score, layer):
    return NoiseTunnel(LayerGradCam(score, layer))


def to_the_rest(score, layer):
    return lambda inputs, target: FeatureActivationMap(score, layer).attribute(inputs, target, contrast="rest")


METHODS = {
    "FeatureActivationMap": (None, lambda s, layer: FeatureActivationMap(s, layer).attribute(X, 1)),
    "SimilarityDecomposition": (None, lambda s, layer: SimilarityDecomposition(s, layer).attribute(X, 1)),
    "LabelFreeActivationMap": (None, lambda s, layer: LabelFreeActivationMap(s, layer).attribute(X, 1)),
    "RelevanceCam": (None, lambda s, layer: RelevanceCam(s, layer).attribute(X, 1)),
    "ScoreCam": (None, lambda s, layer: ScoreCam(s, layer).attribute(X, 1)),
    "LayerGradCam": (None, lambda s, layer: LayerGradCam(s, layer).attribute(X, 1)),
    "LayerGradientXActivation": (None, lambda s, layer: LayerGradientXActivation(s, layer).attribute(X, 1)),
    "IntegratedGradients": (None, lambda s, _: IntegratedGradients(s).attribute(X, target=1)),
    "GuidedGradCam": (None, lambda s, layer: GuidedGradCam(s, layer).attribute(X, 1)),
    "Saliency": (None, lambda s, _: Saliency(s).attribute(X, 1)),
    "Occlusion": (None, lambda s, _: Occlusion(s).attribute(X, (3, 2, 2), (3, 1, 1), target=1)),
    "a Relax of few masks": (
        lambda s, _: Relax(s, n_samples=20, seed=3),
        lambda s, _: Relax(s, n_samples=20, seed=3).attribute(X, 1),
    ),
    "a NoiseTunnel": (noisy, lambda s, layer: noisy(s, layer).attribute(X, target=1)),
    "a function": (to_the_rest, lambda s, layer: to_the_rest(s, layer)(X, 1)),
}


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU", "ignore:The places of layer")
@pytest.mark.parametrize(("build", "by_hand"), METHODS.values(), ids=METHODS)
def test_a_map_is_the_methods_own_summed_over_channels_at_the_size_of_the_inputs(request, build, by_hand):
    score, layer = scored()
    name = request.node.callspec.id
    torch.manual_seed(0)
    maps = compare(score, layer, X, 1, {name: name if build is None else build(score, layer)})
    torch.manual_seed(0)
    expected = at_input_size(by_hand(score, layer))
    assert maps[name].shape == (2, 1, 16, 16)
    assert maps[name].any()
    close(maps[name], expected)
    assert maps.failures == {}


def test_a_map_is_interpolated_after_its_channels_are_added_up():
    score, layer = scored()
    function = lambda inputs, target: torch.arange(2 * 2 * 4.0).reshape(1, 2, 2, 4).expand(2, -1, -1, -1)  # noqa: E731
    (maps,) = compare(score, layer, X, 0, [function]).values()
    sums = torch.tensor([[8.0, 10, 12, 14], [16, 18, 20, 22]])
    close(maps[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]], sums[[0, 0, 1, 1], [0, 3, 0, 3]])  # corners stay
    close(maps[1], F.interpolate(sums[None, None], (16, 16), mode="bilinear")[0])


@pytest.mark.filterwarnings("ignore:The places of layer")
def test_the_default_methods_are_those_of_the_documentation_in_its_order():
    score, layer = scored()
    maps = compare(score, layer, X, 2)
    assert list(maps) == DEFAULT
    assert maps.failures == {}
    for name, method in (
        ("FeatureActivationMap", FeatureActivationMap(score, layer)),
        ("SimilarityDecomposition", SimilarityDecomposition(score, layer)),
        ("LabelFreeActivationMap", LabelFreeActivationMap(score, layer)),
        ("LayerGradCam", LayerGradCam(score, layer)),
        ("RelevanceCam", RelevanceCam(score, layer)),
        ("Relax", Relax(score)),
    ):
        close(maps[name], at_input_size(method.attribute(X, target=2)))


@pytest.mark.parametrize("size", [8, 20, 7, 16, 33])
def test_occlusion_has_windows_of_an_eighth_of_the_size_half_overlapping(size):
    encoder = seeded(PooledEncoder)
    score, x = SimilarityScore(encoder, random(1, 6, seed=2)), random(1, 3, size, size + 9)
    windows = [max(1, n // 8) for n in x.shape[2:]]
    by_hand = Occlusion(score).attribute(x, (3, *windows), (3, *(max(1, w // 2) for w in windows)), target=0)
    close(compare(score, encoder.layer, x, 0, ["Occlusion"])["Occlusion"], at_input_size(by_hand, x))


@pytest.mark.parametrize("dim", [1, 3])
def test_sequences_and_volumes_are_explained(dim):
    score, layer = scored(HeadEncoder, dim=dim)
    x = random(2, 3, *[16] * dim) if dim == 1 else random(2, 3, 6, 8, 5)
    relax = Relax(score, n_samples=5, grid=2)
    maps = compare(score, layer, x, [2, 0], ["FeatureActivationMap", LayerGradCam, relax, "Occlusion"])
    assert {m.shape for m in maps.values()} == {(2, 1, *x.shape[2:])}
    for name, method in (
        ("FeatureActivationMap", FeatureActivationMap(score, layer)),
        ("LayerGradCam", LayerGradCam(score, layer)),
        ("Relax", relax),
    ):
        close(maps[name], at_input_size(method.attribute(x, target=[2, 0]), x))
    windows = [max(1, n // 8) for n in x.shape[2:]]
    strides = [max(1, w // 2) for w in windows]
    by_hand = Occlusion(score).attribute(x, (3, *windows), (3, *strides), target=[2, 0])
    close(maps["Occlusion"], at_input_size(by_hand, x))


@pytest.mark.parametrize("kind", [PooledEncoder, FlatEncoder])
@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_the_similarity_is_that_of_the_score(kind, similarity):
    encoder = seeded(kind)
    references = random(3, encoder(X).shape[1], seed=2)
    score = SimilarityScore(encoder, references, similarity)
    maps = compare(score, encoder.layer, X, 1, ["FeatureActivationMap", "LayerGradCam"])
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=similarity)
    close(maps["FeatureActivationMap"], at_input_size(fam.attribute(X, 1, reference_embedding=references)))
    close(maps["LayerGradCam"], at_input_size(LayerGradCam(score, encoder.layer).attribute(X, 1)))


def test_a_classifier_is_a_score():
    classifier = seeded(HeadEncoder)
    maps = compare(classifier, classifier.layer, X, [3, 0], ["ClassActivationMap", "LayerGradCam", "Saliency", "LRP"])
    cam = ClassActivationMap(classifier, classifier.layer).attribute(X, [3, 0])
    close(maps["ClassActivationMap"], at_input_size(cam))
    close(maps["LayerGradCam"] * 64, maps["ClassActivationMap"])  # 8 x 8 locations
    close(maps["Saliency"], at_input_size(Saliency(classifier).attribute(X, [3, 0])))
    close(maps["LRP"], at_input_size(LRP(classifier).attribute(X, [3, 0])))


@pytest.mark.filterwarnings("ignore:.*has no map", "ignore:The places of layer")
def test_a_bare_classifier_has_no_references_and_with_those_of_the_advice_it_has():
    classifier, names = (
        seeded(HeadEncoder),
        ["FeatureActivationMap", "SimilarityDecomposition", "ScoreCam", "RelevanceCam", "Relax"],
    )
    maps = compare(classifier, classifier.layer, X, 1, [*names, "LayerGradCam"])
    assert list(maps) == ["LayerGradCam"]
    assert list(maps.failures) == names
    for reason in maps.failures.values():
        assert "SimilarityScore(model, torch.eye(n), 'dot')" in reason
    score = SimilarityScore(classifier, torch.eye(4).double(), "dot")
    close(score(X).detach(), classifier(X).detach())
    with_classes = compare(score, classifier.layer, X, 1, [*names, "LayerGradCam"])
    assert list(with_classes) == [*names, "LayerGradCam"]
    close(with_classes["LayerGradCam"], maps["LayerGradCam"])
    # Of the class's own dimension there is the gradient alone: with a linear head, Grad-CAM by place.
    close(with_classes["SimilarityDecomposition"], 64 * with_classes["LayerGradCam"])


# Targets


@pytest.mark.parametrize(
    ("K", "target", "numbers"),
    [
        (1, None, [0, 0]),
        (2, None, [0, 1]),
        (1, 0, [0, 0]),
        (3, 2, [2, 2]),
        (3, -1, [2, 2]),
        (3, [2, 0], [2, 0]),
        (3, (1,), [1, 1]),
        (3, torch.tensor(1), [1, 1]),
        (3, torch.tensor([1]), [1, 1]),
        (3, torch.tensor([1, 2]), [1, 2]),
        (3, torch.tensor([1, 2], dtype=torch.int32), [1, 2]),
        (3, np.int64(1), [1, 1]),
        (3, [np.int64(2), np.int64(0)], [2, 0]),
    ],
    ids=repr,
)
def test_each_input_is_explained_for_the_reference_that_its_target_picks(K, target, numbers):
    score, layer = scored(K=K)

    def function(inputs, target):
        return LayerGradCam(score, layer).attribute(inputs, target)

    maps = compare(score, layer, X, target, ["FeatureActivationMap", LayerGradCam, "Saliency", function])
    fam, grad_cam = FeatureActivationMap(score, layer), LayerGradCam(score, layer)
    for b, number in enumerate(numbers):
        one = X[b : b + 1]
        close(maps["FeatureActivationMap"][b : b + 1], at_input_size(fam.attribute(one, number)))
        close(maps["LayerGradCam"][b : b + 1], at_input_size(grad_cam.attribute(one, number)))
        close(maps["function"][b : b + 1], at_input_size(grad_cam.attribute(one, number)))
        close(maps["Saliency"][b : b + 1], at_input_size(Saliency(score).attribute(one, number)))


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (3, ValueError),
        ([0, -4], ValueError),
        ([0, 1, 2], ValueError),
        (torch.tensor([[0], [1]]), ValueError),
        (None, ValueError),
        (True, TypeError),
        (1.0, TypeError),
        ("rest", TypeError),
        (torch.tensor([0.0, 1.0]), TypeError),
    ],
    ids=str,
)
def test_a_bad_target_is_refused_before_anything_runs(target, error):
    score, layer = scored()
    calls = []
    score.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match="target"):
        compare(score, layer, X, target, ["LayerGradCam", lambda inputs, target: calls.append(1)])
    assert not calls


# Names and methods


def test_names_are_those_of_the_methods_and_duplicates_are_numbered():
    score, layer = scored()

    def mine(inputs, target):
        return inputs

    class Callable:
        def __call__(self, inputs, target):
            return 2 * inputs

    maps = compare(
        score,
        layer,
        X,
        0,
        [
            "LayerGradCam",
            mine,
            LayerGradCam,
            FeatureActivationMap(score, layer, normalize=None),
            LayerGradCam(score, score.encoder.conv1),
            Callable(),
            FeatureActivationMap,
            mine,
            FeatureActivationMap(score, layer).attribute,
        ],
    )
    assert list(maps) == [
        "LayerGradCam",
        "mine",
        "LayerGradCam 2",
        "FeatureActivationMap",
        "LayerGradCam 3",
        "Callable",
        "FeatureActivationMap 2",
        "mine 2",
        "attribute",
    ]
    raw = FeatureActivationMap(score, layer, normalize=None)
    close(maps["FeatureActivationMap"], at_input_size(raw.attribute(X, 0)))
    close(maps["FeatureActivationMap 2"], at_input_size(FeatureActivationMap(score, layer).attribute(X, 0)))
    close(maps["attribute"], maps["FeatureActivationMap 2"])
    close(maps["LayerGradCam 2"], maps["LayerGradCam"])
    close(maps["LayerGradCam 3"], at_input_size(LayerGradCam(score, score.encoder.conv1).attribute(X, 0)))
    close(maps["Callable"], 2 * maps["mine"])


def test_a_dict_keeps_its_own_names_and_order():
    score, layer = scored()
    methods = {"z": "LayerGradCam", "LayerGradCam": "FeatureActivationMap", "a": LayerGradCam, "map of $x$": Saliency}
    maps = compare(score, layer, X, 0, methods)
    assert list(maps) == list(methods)
    close(maps["z"], maps["a"])
    close(maps["LayerGradCam"], at_input_size(FeatureActivationMap(score, layer).attribute(X, 0)))


@pytest.mark.parametrize("methods", [("LayerGradCam", "Saliency"), iter(["LayerGradCam", "Saliency"])], ids=type)
def test_any_iterable_holds_methods(methods):
    assert list(compare(*scored(), X, 0, methods)) == ["LayerGradCam", "Saliency"]


def test_no_methods_give_no_maps():
    maps = compare(*scored(), X, 0, [])
    assert (maps, maps.failures) == ({}, {})


@pytest.mark.parametrize(
    ("name", "near"),
    [("FeatureActivationMaps", "FeatureActivationMap"), ("GradCam", "LayerGradCam"), ("relax", "Relax")],
)
@pytest.mark.parametrize("wrap", [lambda m: [Saliency, m], lambda m: {"mine": m}], ids=["list", "dict"])
def test_an_unknown_name_is_refused_with_a_close_one_before_anything_runs(name, near, wrap):
    score, layer = scored()
    score.encoder.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=rf"{name}.*Did you mean .*\b{near}\b"):
        compare(score, layer, X, 0, wrap(name))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"score": 5}, "score"),
        ({"score": None}, "score"),
        ({"layer": "layer"}, "layer"),
        ({"layer": []}, "layer"),
        ({"inputs": [X]}, "inputs"),
        ({"inputs": X.numpy()}, "inputs"),
        ({"inputs": (X, X)}, "inputs"),
        ({"inputs": X[0, 0]}, "inputs"),
        ({"methods": "LayerGradCam"}, "methods"),
        ({"methods": LayerGradCam}, "methods"),
        ({"methods": 5}, "methods"),
        ({"methods": [None]}, "methods"),
        ({"methods": ["LayerGradCam", 3]}, "methods"),
        ({"methods": {"mine": None}}, "methods"),
    ],
    ids=str,
)
def test_a_wrong_type_is_refused_by_its_name(change, argument):
    score, layer = scored()
    arguments = {"score": score, "layer": layer, "inputs": X, "target": 0, "methods": [Saliency]}
    with pytest.raises(TypeError, match=f"`{argument}`"):
        compare(**{**arguments, **change})


def test_additional_arguments_of_the_encoder_are_passed_on():
    score, layer = scored(PowerPooledEncoder)
    methods = ["FeatureActivationMap", LayerGradCam, Relax(score, n_samples=20), "Occlusion", "Saliency"]
    maps, plain = (compare(score, layer, X, 1, methods, additional_forward_args=a) for a in (2.0, None))
    for name, method in (
        ("FeatureActivationMap", FeatureActivationMap(score, layer)),
        ("LayerGradCam", LayerGradCam(score, layer)),
        ("Relax", Relax(score, n_samples=20)),
        ("Saliency", Saliency(score)),
    ):
        close(maps[name], at_input_size(method.attribute(X, target=1, additional_forward_args=2.0)))
    assert not any(torch.allclose(maps[name], plain[name]) for name in maps)


# Failures


def broken(inputs, target):
    raise KeyError("no such\n  weight")


def test_a_method_that_fails_is_named_with_its_reason_and_the_others_come_back():
    score, layer = scored()
    alone = compare(score, layer, X, 1, ["LayerGradCam", "Saliency"])
    with pytest.warns(UserWarning, match="has no map") as caught:
        maps = compare(score, layer, X, 1, ["LayerGradCam", broken, "Saliency", "GradientShap"])
    warned = [w for w in caught if "has no map" in str(w.message)]
    assert list(maps) == ["LayerGradCam", "Saliency"]
    assert list(maps.failures) == ["broken", "GradientShap"]
    assert maps.failures["broken"].startswith("KeyError: ")
    assert "no such" in maps.failures["broken"]
    assert "\n" not in maps.failures["broken"]
    assert "baselines" in maps.failures["GradientShap"]
    assert [str(w.message).partition(" ")[0] for w in warned] == ["broken", "GradientShap"]
    assert [maps.failures[str(w.message).partition(" ")[0]] in str(w.message) for w in warned] == [True, True]
    assert {w.filename for w in warned} == {__file__}
    for name in alone:
        close(maps[name], alone[name])


@pytest.mark.parametrize(
    "method", ["LRP", LRP, "LayerLRP", lambda score: LRP(score)], ids=["name", "class", "layer", "instance"]
)
def test_lrp_is_refused_on_a_similarity_and_its_substitute_named(method):
    score, layer = scored()
    method = method if isinstance(method, (str, type)) else method(score)
    with pytest.warns(UserWarning, match="LRP has no map.*RelevanceCam"):
        maps = compare(score, layer, X, 1, {"mine LRP": method, "RelevanceCam": "RelevanceCam"})
    assert list(maps) == ["RelevanceCam"]
    assert "gradient" in maps.failures["mine LRP"]


@pytest.mark.parametrize(
    "attributions",
    [
        lambda x: None,
        lambda x: x.numpy(),
        lambda x: x[0],
        lambda x: x[:1],
        lambda x: x.flatten(2),
        lambda x: x.int(),
        lambda x: (x, x),
        lambda x: {"map": x},
    ],
    ids=["none", "array", "one", "fewer", "flat", "integers", "two", "dict"],
)
def test_attributions_that_are_no_maps_are_a_failure(attributions):
    score, layer = scored()
    with pytest.warns(UserWarning, match="mine has no map.*no maps"):
        maps = compare(score, layer, X, 1, {"mine": lambda x, target: attributions(x), "Saliency": Saliency})
    assert list(maps) == ["Saliency"]


@pytest.mark.parametrize("wrap", [lambda m: (m,), lambda m: [m], lambda m: [(m,)]])
def test_a_map_in_a_tuple_or_list_is_a_map(wrap):
    score, layer = scored()
    maps = compare(score, layer, X, 1, {"mine": lambda x, target: wrap(x)})
    close(maps["mine"], X.sum(1, keepdim=True))


def test_layers_without_a_map_leave_the_methods_that_need_none():
    encoder = seeded(TokenEncoder)
    x = random(2, 3, 12, 12)
    score = SimilarityScore(encoder, random(1, 6, seed=2))
    with pytest.warns(UserWarning, match="has no map"):
        maps = compare(score, encoder.layer, x, methods=["FeatureActivationMap", LayerGradCam, Saliency, "Occlusion"])
    assert list(maps) == ["FeatureActivationMap", "Saliency", "Occlusion"]  # FAM finds the patches
    assert list(maps.failures) == ["LayerGradCam"]


@pytest.mark.filterwarnings("ignore:.*has no map")
def test_an_error_names_every_reason_where_all_methods_fail():
    score, layer = scored()
    with pytest.raises(ValueError, match=r"broken.*no such.*GradientShap.*baselines"):
        compare(score, layer, X, 1, [broken, "GradientShap"])


def test_an_interrupt_is_no_failure_of_a_method():
    def stopped(inputs, target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(*scored(), X, 1, [stopped, Saliency])


# The model and the inputs are as they were

LEAVING = [
    "FeatureActivationMap",
    "SimilarityDecomposition",
    "LabelFreeActivationMap",
    "RelevanceCam",
    "Relax",
    "ScoreCam",
    "LayerGradCam",
    "LayerActivation",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerConductance",
    "LayerDeepLift",
    "LayerFeatureAblation",
    "InternalInfluence",
    "GuidedGradCam",
    "GuidedBackprop",
    "Deconvolution",
    "DeepLift",
    "Saliency",
    "InputXGradient",
    "IntegratedGradients",
    "FeatureAblation",
    "Occlusion",
    "LRP",
    "LayerLRP",
    "NoiseTunnel",
    "GradientShap",
]


def attributes(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("classifies", [False, True], ids=["similarity", "classifier"])
@pytest.mark.parametrize("name", LEAVING)
def test_a_method_leaves_the_model_and_the_inputs_as_they_were(name, classifies):
    model = users_model(HeadEncoder)
    score = model if classifies else SimilarityScore(model, random(3, 4, seed=2))
    x = random(2, 3, 8, 8).requires_grad_()
    before, had = state(score, x), attributes(score)
    maps = compare(score, model.layer, x, 1, {name: name, "other": Saliency})
    assert "other" in maps
    assert state(score, x) == before
    assert attributes(score) == had


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", [n for n in LEAVING if n not in ("LRP", "LayerLRP")])
def test_a_method_that_an_encoder_breaks_leaves_it_as_it_was(name, call):
    model = users_model(HeadEncoder)
    score = SimilarityScore(model, random(3, 4, seed=2))
    x = random(2, 3, 8, 8)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyError("broken")

    model.head.register_forward_pre_hook(fail)
    before, had = state(score, x), attributes(score)
    compare(score, model.layer, x, 1, {name: name, "other": lambda inputs, target: inputs})
    assert state(score, x) == before
    assert attributes(score) == had


def test_training_mode_stays_on():
    score, layer = scored()
    score.train()
    compare(score, layer, X, 1, ["LayerGradCam", "FeatureActivationMap", "DeepLift"])
    assert all(m.training for m in score.modules())


@pytest.mark.filterwarnings("ignore:.*has no map")
def test_what_a_method_does_to_its_inputs_reaches_no_other():
    score, layer = scored()
    x = X.clone()

    def spoiling(inputs, target):
        inputs.zero_()
        raise RuntimeError

    maps = compare(score, layer, x, 1, [spoiling, lambda inputs, target: inputs.zero_(), "Saliency"])
    assert torch.equal(x, X)
    close(maps["Saliency"], at_input_size(Saliency(score).attribute(X, 1)))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_maps_are_detached_and_need_no_gradient_mode(grad):
    score, layer = scored()
    x = X.clone().requires_grad_()
    methods = {name: name for name in ("FeatureActivationMap", "LayerGradCam", "Saliency", "IntegratedGradients")}
    with torch.set_grad_enabled(grad):
        maps = compare(score, layer, x, 1, {**methods, "mine": lambda inputs, target: inputs * x})
    assert list(maps) == [*methods, "mine"]
    assert not any(m.requires_grad for m in maps.values())
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_are_in_the_dtype_of_the_inputs(dtype):
    score, layer = scored()
    maps = compare(score.to(dtype), layer, X.to(dtype), 1, ["FeatureActivationMap", "LayerGradCam", "Saliency"])
    assert {m.dtype for m in maps.values()} == {dtype}
    assert len(maps) == 3


@pytest.mark.filterwarnings("ignore:The places of layer")
def test_one_comparison_after_another_gives_the_same():
    score, layer = scored()
    first, second = (compare(score, layer, X, 1) for _ in range(2))
    for name in first:
        close(first[name], second[name])


# Progress


@pytest.mark.parametrize("show", [{}, {"show_progress": True}, {"show_progress": False}], ids=str)
def test_progress_is_shown_on_stderr_unless_declined(capsys, show):
    score, layer = scored()
    methods = ["LayerGradCam", "Relax", "ScoreCam"]
    compare_attributions(score, layer, random(1, 3, 8, 8), 1, methods, **show)
    out, err = capsys.readouterr()
    assert out == ""
    if show.get("show_progress", True):
        assert "compare_attributions" in err
        assert "3/3" in err
        assert all(name in err for name in methods)
    else:
        assert err == ""


def test_a_comparison_without_doubts_warns_of_nothing():
    score, layer = scored(PooledEncoder)
    with silent():
        assert list(compare(score, layer, X, 1)) == DEFAULT


def test_inputs_that_already_require_gradients_spare_captums_warning_that_they_do_not():
    score, layer = scored()
    with silent():
        maps = compare(score, layer, X.clone().requires_grad_(), 1, ["Saliency", "InputXGradient"])
    assert len(maps) == 2


# What one method does is not another's


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_the_decomposition_is_a_default_for_the_similarities_that_have_one(similarity):
    encoder, x = seeded(PooledEncoder), random(1, 3, 8, 8)
    score = SimilarityScore(encoder, random(1, 6, seed=2), similarity)
    with silent():
        maps = compare(score, encoder.layer, x)
    assert list(maps) == DEFAULT
    z, s = encoder(x)[0].detach().numpy(), score.reference_embedding.numpy()
    f = oracle.decomposition_weights(z, s, 0, similarity)
    own = oracle.aligned_map(f, encoder.features(x)[0].detach().numpy())
    close(maps["SimilarityDecomposition"], at_input_size(torch.from_numpy(own)[None, None], x))


def test_the_decomposition_is_no_default_where_the_score_has_none():
    encoder = seeded(PooledEncoder)
    score = SimilarityScore(encoder, random(1, 6, seed=2), lambda z, s: -(z - s).abs())
    with silent():
        maps = compare(score, encoder.layer, random(1, 3, 8, 8))
    assert list(maps) == [name for name in DEFAULT if not name.endswith("Decomposition")]
    assert maps.failures == {}


def test_hooks_that_go_meanwhile_stay_away_and_those_of_a_failure_go():
    encoder = seeded(HeadEncoder)
    score = SimilarityScore(encoder, random(1, 4, seed=2))
    of_another_thread = encoder.layer.register_forward_hook(lambda *_: None)

    def done(inputs, target):
        of_another_thread.remove()
        return inputs

    def fails(inputs, target):
        encoder.layer.register_forward_hook(lambda *_: None)
        raise RuntimeError

    with pytest.warns(UserWarning, match="fails has no map"):
        compare(score, encoder.layer, random(1, 3, 8, 8), methods=[done, fails])
    assert not encoder.layer._forward_hooks


def test_a_failure_leaves_the_hook_of_a_call_of_this_package_in_another_thread():
    encoder = seeded(HeadEncoder)
    score, x, inside, done = SimilarityScore(encoder, random(1, 4, seed=2)), random(1, 3, 8, 8), *events(2)

    def wait(*_):
        if threading.current_thread() is other:
            inside.set()
            assert done.wait(10)

    def explain():
        found.append(FeatureActivationMap(score, encoder.layer).attribute(x))

    def fails(inputs, target):
        other.start()
        assert inside.wait(10)
        raise RuntimeError

    found, other = [], threading.Thread(target=explain)
    alone = FeatureActivationMap(score, encoder.layer).attribute(x)
    encoder.early.register_forward_hook(wait)
    with pytest.warns(UserWarning, match="fails has no map"):
        compare(score, encoder.layer, x, methods=["FeatureActivationMap", fails])
    done.set()
    other.join()
    close(found[0], alone)


def events(n):
    return [threading.Event() for _ in range(n)]


def test_what_a_model_writes_down_itself_stays():
    class Counting(HeadEncoder):
        calls = 0

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    encoder = seeded(Counting)
    encoder.calls = 0
    compare(SimilarityScore(encoder, random(1, 4, seed=2)), encoder.layer, random(1, 3, 8, 8), methods=["LayerGradCam"])
    assert encoder.calls > 0


@pytest.mark.filterwarnings("ignore:The model is in training mode")
def test_running_statistics_stay():
    encoder = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    score = SimilarityScore(encoder.train(), random(1, 4, seed=2))
    before = encoder[1].running_mean.clone()
    compare(score, encoder[0], random(2, 3, 8, 8), 0, ["LayerGradCam", "Saliency"])
    assert torch.equal(encoder[1].running_mean, before)
