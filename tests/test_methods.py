"""What holds for all methods but FAM: the forms of Captum, references, errors, and the model as it was."""

import contextlib
import inspect
import re
import warnings

import pytest
import torch
from captum.attr import NoiseTunnel
from encoders import (
    CONV,
    HAND_A,
    Classifier,
    HeadEncoder,
    Modified,
    OfActivations,
    OfBytes,
    PooledEncoder,
    Shifted,
    Unbiased,
    pooled,
    random,
    seeded,
)
from helpers import arrays, close, held, run
from test_model_untouched import NormEncoder, state
from torch import nn

from captum_fam import (
    ClassActivationMap,
    Fame,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
)

X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)


def leftovers(model, *tensors):
    """All that a call may leave: ``state``, and what ``held`` finds."""
    return state(model, *tensors), *held(model)


def channels_method(method):
    """The method's name, its explainer for a layer by name, and the model; targets are 0 to 3 in each."""

    def make(layer="layer", model=None, dtype=torch.float64, **options):
        build = Classifier if method is ClassActivationMap else PooledEncoder
        model = seeded(model or build).to(dtype)
        layers = [getattr(model, name) for name in layer] if isinstance(layer, list) else getattr(model, layer)
        if method is not ClassActivationMap:
            return method(SimilarityScore(model, REFERENCES.to(dtype)), layers, **options), model
        return method(model, layers, **options), model

    return make


def relax(layer=None, model=None, dtype=torch.float64, **options):
    model = seeded(model or PooledEncoder).to(dtype)
    return Relax(SimilarityScore(model, REFERENCES.to(dtype)), n_samples=12, grid=3, **options), model


def fame(layer=None, model=None, dtype=torch.float64, **options):
    model = seeded(model or PooledEncoder).to(dtype)
    return Fame(SimilarityScore(model, REFERENCES.to(dtype)), n_steps=3, **options), model


METHODS = [ClassActivationMap, LabelFreeActivationMap, RelevanceCam, ScoreCam, SimilarityDecomposition]
MAKES = {method.__name__: channels_method(method) for method in METHODS}
each_channels = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
OF_INPUTS = {"Fame": fame, "Relax": relax}  # no layer is asked for
each_method = pytest.mark.parametrize("make", [*MAKES.values(), *OF_INPUTS.values()], ids=[*MAKES, *OF_INPUTS])
OF_TERMS = [LabelFreeActivationMap, RelevanceCam, SimilarityDecomposition]
OF_REFERENCES = [*METHODS[1:], lambda encoder, layer: Relax(encoder, n_samples=12, grid=3)]
each_of_references = pytest.mark.parametrize("method", OF_REFERENCES, ids=[*list(MAKES)[1:], "Relax"])
MASKED = {"rtol": 1e-5, "atol": 1e-8}  # masks are float32


def tolerance(explainer):
    return MASKED if isinstance(explainer, Relax) else {}


@each_channels
@pytest.mark.parametrize("dim", CONV)
def test_maps_have_one_channel_and_the_layers_size(dim, make):
    method, model = make(model=lambda: (Classifier if make is MAKES["ClassActivationMap"] else PooledEncoder)(dim))
    x = random(2, 3, *[8, 6, 6][:dim])
    A = arrays(model, x)[1]
    maps = method.attribute(x, 2)
    assert maps.shape == (2, 1, *A.shape[2:])
    terms = method.attribute(x, 2, attr_dim_summation=False)
    assert terms.shape == A.shape
    close(terms.sum(1, keepdim=True), maps)
    assert method.attribute_all(x).shape == (2, 5 if isinstance(method, ClassActivationMap) else 4, *A.shape[2:])


@each_channels
def test_where_the_embedding_is_the_mean_each_term_is_its_channel_times_one_weight(make):
    method, model = make()
    terms, A = method.attribute(X, 2, attr_dim_summation=False), run(model, X)[1]
    alpha = (terms * A).sum((2, 3), keepdim=True) / A.square().sum((2, 3), keepdim=True).clamp(min=1e-30)
    close(terms, alpha * A)


@each_channels
def test_relu_attributions_drop_the_negative_part(make):
    method, _ = make()
    maps = method.attribute(X, 2)
    close(method.attribute(X, 2, relu_attributions=True), maps.clamp(min=0))
    close(method.attribute_all(X, relu_attributions=True)[:, 2:3], maps.clamp(min=0))


@pytest.mark.filterwarnings("ignore:The places of layer")
@each_channels
def test_a_list_of_layers_has_a_list_of_maps(make):
    """Those of CAM are the same map twice, and there are no others: only a layer that is pooled has one."""
    names, build = ["early", "layer"], PooledEncoder
    if make is MAKES["ClassActivationMap"]:
        names, build = ["again", "layer"], Classifier
    if make is MAKES["RelevanceCam"]:
        build = lambda: Unbiased(pooled(), lambda z: z)  # noqa: E731
    method, _ = make(names, build)
    maps = method.attribute(X, 2)
    assert isinstance(maps, list)
    for name, own in zip(names, maps, strict=True):
        close(own, make(name, build)[0].attribute(X, 2))
    assert [m.shape[1] for m in method.attribute_all(X)] in ([4, 4], [5, 5])


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.05)], ids=str
)
@each_method
def test_maps_have_the_dtype_of_the_activations(make, dtype, share):
    plain = make()[0].attribute(X, 2)
    assert plain.dtype == torch.float64
    maps = make(dtype=dtype)[0].attribute(X.to(dtype), 2)
    assert maps.dtype == dtype
    assert (maps.double() - plain).norm() < share * plain.norm()


@each_method
@pytest.mark.parametrize("target", [[2, 0, 3], torch.tensor([2, 0, 3])], ids=["list", "tensor"])
def test_targets_in_each_of_captums_forms(target, make):
    method, _ = make()
    maps = method.attribute(X, target)
    for b, own in enumerate([2, 0, 3]):
        close(maps[b : b + 1], method.attribute(X[b : b + 1], own), **tolerance(method))
        close(maps[b : b + 1], method.attribute(X, torch.tensor(own))[b : b + 1], **tolerance(method))


@each_method
@pytest.mark.parametrize(
    ("target", "error"), [(9, ValueError), (-6, ValueError), ([0, 1], ValueError), (1.5, TypeError), ("a", TypeError)]
)
def test_targets_that_number_nothing_are_refused(target, error, make):
    method, model = make()
    before = state(model, X)
    with pytest.raises(error, match="`target`"):
        method.attribute(X, target)
    assert state(model, X) == before


@each_method
@pytest.mark.parametrize("contrast", [9, "others", 1.5, [0, 1]])
def test_contrasts_that_number_nothing_are_refused(contrast, make):
    with pytest.raises((ValueError, TypeError), match="`contrast`"):
        make()[0].attribute(X, 1, contrast=contrast)


@each_method
def test_without_a_target_no_reference_is_guessed(make):
    method, _ = make()
    if isinstance(method, LabelFreeActivationMap):
        close(method.attribute(X), method.attribute(X, 2))
        return
    with pytest.raises(ValueError, match="`target`"):
        method.attribute(X)


@each_of_references
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_score_explains_as_its_references_do(similarity, method):
    encoder = seeded(PooledEncoder)
    score = SimilarityScore(encoder, REFERENCES, similarity)
    by_score = method(score, encoder.layer).attribute(X, 2, contrast=1)
    if method is OF_REFERENCES[-1]:
        by_references = Relax(encoder, similarity=similarity, n_samples=12, grid=3)
    else:
        by_references = method(encoder, encoder.layer, similarity=similarity)
    close(by_score, by_references.attribute(X, 2, reference_embedding=REFERENCES, contrast=1))


@each_of_references
def test_references_in_each_form_explain_alike(method):
    encoder, images = seeded(PooledEncoder), random(4, 3, 10, 10, seed=6)
    z = run(encoder, images)[0]
    explainer = method(encoder, encoder.layer)
    maps = explainer.attribute(X, [1, 0, 3], reference_embedding=z)
    close(explainer.attribute(X, [1, 0, 3], reference=images), maps)
    close(explainer.attribute(X, reference_embedding=z[[1, 0, 3]]), maps)
    close(explainer.attribute(X[:1], reference_embedding=z[1:2]), maps[:1], **tolerance(explainer))


@each_of_references
def test_two_references_at_once_are_refused(method):
    encoder = seeded(PooledEncoder)
    with pytest.raises(ValueError, match="exactly one of `reference`, `reference_embedding`"):
        method(encoder, encoder.layer).attribute(X, 1, reference=X, reference_embedding=REFERENCES)
    with pytest.raises(ValueError, match="exactly one of `reference`, `reference_embedding`"):
        method(SimilarityScore(encoder, REFERENCES), encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)


@each_method
@pytest.mark.parametrize("target", [2, [2, 0, 3]], ids=["int", "list"])
def test_a_noise_tunnel_without_noise_changes_nothing(target, make):
    method, _ = make()
    target = torch.tensor(target) if isinstance(target, list) else target
    smooth = NoiseTunnel(method).attribute(X, nt_samples=3, stdevs=0.0, target=target)
    close(smooth, method.attribute(X, target), **tolerance(method))


@each_method
def test_results_are_detached_and_no_grad_changes_nothing(make):
    method, _ = make()
    maps = method.attribute(X.clone().requires_grad_(), 2)
    assert not maps.requires_grad
    assert not method.embed(X.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        close(method.attribute(X, 2), maps, rtol=0, atol=0)


@pytest.mark.parametrize("make", [m for name, m in [*MAKES.items(), ("Relax", relax)] if name != "RelevanceCam"])
def test_inference_mode_changes_nothing_where_no_gradient_is_taken(make):
    method, _ = make()
    maps = method.attribute(X, 2)
    with torch.inference_mode():
        close(method.attribute(X, 2), maps, rtol=0, atol=0)


@each_method
def test_each_example_is_explained_as_if_it_were_alone(make):
    method, _ = make()
    maps = method.attribute(X, 2)
    for b in range(3):
        close(method.attribute(X[b : b + 1], 2), maps[b : b + 1], **tolerance(method))


@each_method
def test_an_empty_batch_has_an_empty_map(make):
    method, _ = make()
    maps = method.attribute(X[:0], 2)
    assert maps.shape == (0, 1, *((8, 8) if isinstance(method, (Fame, Relax)) else (4, 4)))
    assert maps.dtype == torch.float64
    if not isinstance(method, (Fame, Relax)):
        assert method.attribute_all(X[:0]).shape[0] == 0


@each_method
def test_embeddings_are_the_encoders(make):
    method, model = make()
    expected = arrays(model, X)[1].mean((2, 3))
    close(method.embed(X), expected)
    close(method.embed(X[:0]), expected[:0])


@each_method
def test_what_is_not_implemented_says_so_and_flags_are_captums(make):
    method, _ = make()
    with pytest.raises(NotImplementedError, match=type(method).__name__):
        method.attribute_future()
    assert not method.has_convergence_delta()
    if not isinstance(method, (Fame, Relax)):  # as Captum's other perturbation methods
        assert not method.multiplies_by_inputs
    assert hasattr(type(method).attribute, "__wrapped__")
    first = list(inspect.signature(method.attribute).parameters)[:3]
    assert first == ["inputs", "target", "additional_forward_args"]


@each_channels
def test_the_layer_is_read_when_it_is_asked_for(make):
    method, model = make()
    name = "again" if isinstance(method, ClassActivationMap) else "layer"
    expected = make(name)[0].attribute(X, 2)
    other, model = make("conv1")
    other.layer = getattr(model, name)
    close(other.attribute(X, 2), expected)


class Recalled(nn.Module):
    """A ReLU that is called twice, or two of them; CAM's linear layer at the end where there are classes."""

    def __init__(self, twice, classes):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 6) if classes else nn.Identity()
        self.early, self.layer, self.mean = nn.ReLU(), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        if twice:
            self.early = self.layer

    def forward(self, x):
        return self.fc(self.mean(self.layer(self.conv2(self.early(self.conv1(x))))).flatten(1))


@each_channels
def test_the_last_call_of_a_layer_that_is_called_several_times_is_explained_with_a_warning(make):
    classes = make is MAKES["ClassActivationMap"]
    twice, _ = make(model=lambda: Recalled(True, classes))
    once, _ = make(model=lambda: Recalled(False, classes))
    with pytest.warns(UserWarning, match=r"'.*' \(ReLU\) was called several times.*its last call"):
        maps = twice.attribute(X, 2)
    close(maps, once.attribute(X, 2))


@pytest.mark.parametrize("layer", ["layer4", None, [], ("a",)])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_no_module_is_refused(method, layer):
    with pytest.raises(TypeError, match="`layer`"):
        method(seeded(Classifier), layer)


@pytest.mark.parametrize("forward_func", [None, "resnet50", X])
@pytest.mark.parametrize("method", [*METHODS, lambda func, layer: Relax(func)], ids=[*MAKES, "Relax"])
def test_a_forward_func_that_cannot_be_called_is_refused(method, forward_func):
    with pytest.raises(TypeError, match="`forward_func`"):
        method(forward_func, nn.Identity())


@each_method
@pytest.mark.parametrize("inputs", [X.numpy(), [X], None, ()], ids=["array", "list", "None", "empty tuple"])
def test_inputs_that_are_no_tensors_are_refused(inputs, make):
    with pytest.raises(TypeError, match=r"`inputs`.*a tensor or a tuple of tensors"):
        make()[0].attribute(inputs, 2)


@pytest.mark.parametrize("method", OF_REFERENCES[1:], ids=[*list(MAKES)[2:], "Relax"])
def test_embeddings_that_are_not_finite_have_zero_maps_and_a_warning(method):
    encoder = OfActivations()
    A = torch.cat([HAND_A, HAND_A * torch.nan, HAND_A])
    explainer = method(encoder, encoder.layer)
    s = torch.tensor([[1.0, 2.0]]).double()
    if isinstance(explainer, RelevanceCam):
        explainer.layer = encoder[0] = nn.ReLU()
    message = r"Embeddings are zero or not finite \(inputs \[1\]\)"
    if isinstance(explainer, Relax):
        message = "Scores of masked inputs are not finite"
    with pytest.warns(UserWarning, match="finite") as caught:
        maps = explainer.attribute(A, reference_embedding=s)
    messages = [str(w.message) for w in caught]
    assert any(re.match(message, m) for m in messages)
    assert len(messages) == len(set(messages))
    assert maps[[0, 2]].isfinite().all()
    assert maps[0].any()
    assert not maps[1].any()
    close(maps[0], maps[2], **tolerance(explainer))


@each_of_references
def test_references_of_another_dimension_are_refused(method):
    encoder = seeded(PooledEncoder)
    before = state(encoder, X)
    with pytest.raises(ValueError, match=r"reference embeddings have 5 dimensions.*`inputs` have 6"):
        method(encoder, encoder.layer).attribute(X, 1, reference_embedding=random(4, 5))
    assert state(encoder, X) == before


@each_method
def test_a_data_parallel_model_is_explained_as_its_module(make):
    method, model = make()
    expected = method.attribute(X, 2)
    if isinstance(method, ClassActivationMap):
        parallel = ClassActivationMap(nn.DataParallel(model), model.layer)
    else:
        parallel, _ = make()
        model = parallel.forward_func.encoder
        parallel.forward_func = SimilarityScore(nn.DataParallel(model), REFERENCES)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # with a GPU, DataParallel takes modules there only
    parallel.forward_func.to(device)
    close(parallel.attribute(X.to(device), 2).cpu(), expected, rtol=1e-6, atol=1e-8)


@each_method
def test_bound_methods_are_explained_as_their_models(make):
    method, _ = make()
    expected = method.attribute(X, 2)
    method.forward_func = method.forward_func.forward
    close(method.attribute(X, 2), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_method
def test_devices_follow_the_inputs(make):
    method, _ = make()
    expected = method.attribute(X, 2)
    method, _ = make()
    method.forward_func.cuda()
    maps = method.attribute(X.cuda(), 2)
    assert maps.is_cuda
    close(maps.cpu(), expected, rtol=1e-5, atol=1e-7)


class Users(NormEncoder):
    """Six outputs of a linear layer on the mean of ``layer``, with batch norm and dropout before it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(super().forward(x))


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


CALLS = {
    "attribute": lambda method, x: method.attribute(x, 2, contrast="rest"),
    "attribute_all": lambda method, x: method.attribute_all(x),
    "attribute_pair": lambda method, x: method.attribute_pair(x, x),
    "attribute_matrix": lambda method, x: method.attribute_matrix(x, x),
    "embed": lambda method, x: method.embed(x),
}
COMBINATIONS = {
    f"{name}-{call}": (make, CALLS[call])
    for name, make in [*MAKES.items(), *OF_INPUTS.items()]
    for call in CALLS
    if hasattr(make()[0], call) and (name, call) != ("ClassActivationMap", "attribute_pair")
}


@pytest.mark.filterwarnings("ignore:The model is in training mode")
@pytest.mark.filterwarnings("ignore:The places of layer")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("fails_at", [None, 1, 2, 3, 4])
@pytest.mark.parametrize(("make", "call"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_call_leaves_the_model_as_it_was(make, call, fails_at, training):
    method, model = make(model=Users)
    model.train(training)
    model.layer.register_forward_hook(lambda *_: None)
    model.conv2.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    left = [fails_at or 1000]

    def fail(*_):
        left[0] -= 1
        if not left[0]:
            raise Stop

    model.fc.register_forward_hook(fail)
    for grad_enabled, requires_grad in [(True, False), (True, True), (False, True)]:
        left[0] = fails_at or 1000
        x = X.clone().requires_grad_(requires_grad)
        with torch.set_grad_enabled(grad_enabled):
            before, own = leftovers(model, x), dict(vars(method))
            if fails_at == 1:
                with pytest.raises(Stop):
                    call(method, x)
            else:  # not every call has so many forward passes
                with contextlib.suppress(Stop):
                    call(method, x)
            assert leftovers(model, x)[:2] == before[:2]
            assert vars(method) == own


@pytest.mark.filterwarnings("ignore:The places of layer")
@each_method
def test_a_model_in_training_mode_is_told(make):
    method, model = make(model=Users)
    model.train()
    with pytest.warns(UserWarning, match="The model is in training mode"):
        method.attribute(X, 2)


@pytest.mark.parametrize("make", [*list(MAKES.values())[1:], relax], ids=[*list(MAKES)[1:], "Relax"])
def test_in_place_changes_after_the_layer_change_nothing(make):
    class InPlace(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.layer, self.relu, self.mean = nn.Conv2d(3, 6, 3, padding=1), relu, nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(self.mean(self.relu(self.layer(x))).flatten(1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = [make(model=lambda i=i: InPlace(nn.ReLU(inplace=i)))[0].attribute(X, 2) for i in (True, False)]
    close(*maps)


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
@pytest.mark.parametrize(
    ("method", "less"),
    [(method, {}) for method in METHODS[1:]]
    + [(method, less) for method in OF_TERMS for less in ({"contrast": "self"}, {"threshold": 0.3})],
)
def test_pairs_are_explained_on_both_sides(method, kind, less):
    encoder, other = seeded(kind), random(3, 3, 10, 6, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = method(encoder, encoder.layer)
        here, there = explainer.attribute_pair(X, other, **less)
        close(here, explainer.attribute(X, reference=other, **less))
        close(there, explainer.attribute(other, reference=X, **less))


# What lies beyond the input itself, or a threshold: of the methods that explain terms of a score

each_of_terms = pytest.mark.parametrize("method", OF_TERMS)
each_less = pytest.mark.parametrize("less", [{"contrast": "self"}, {"threshold": 0.3}], ids=str)


@each_less
@each_of_terms
def test_one_reference_alone_is_enough(method, less):
    encoder = seeded(PooledEncoder)
    explainer = method(encoder, encoder.layer)
    expected = explainer.attribute(X, 2, reference_embedding=REFERENCES, **less)
    close(explainer.attribute(X, reference_embedding=REFERENCES[2:3], **less), expected)
    close(explainer.attribute_all(X, reference_embedding=REFERENCES[2:3], **less), expected)
    with pytest.raises(ValueError, match="at least two references"):
        explainer.attribute(X, reference_embedding=REFERENCES[2:3], contrast="rest")


@each_less
@each_of_terms
def test_all_maps_at_once_are_those_one_by_one(method, less):
    encoder, s = seeded(PooledEncoder), random(20, 6, seed=2)
    explainer = method(encoder, encoder.layer)
    maps = explainer.attribute_all(X, reference_embedding=s, **less)
    assert maps.shape == (3, 20, 4, 4)
    for k in (0, 7, 19):
        close(maps[:, k : k + 1], explainer.attribute(X, k, reference_embedding=s, **less), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("threshold", "error"),
    [("self", TypeError), (True, TypeError), ([0.1, 0.2, 0.3], TypeError), (float("nan"), ValueError)],
    ids=["text", "bool", "list", "nan"],
)
@each_of_terms
def test_thresholds_that_are_no_score_are_refused(method, threshold, error):
    encoder = seeded(PooledEncoder)
    explainer, before = method(encoder, encoder.layer), state(encoder, X)
    for call in (explainer.attribute_all, lambda x, **options: explainer.attribute(x, 1, **options)):
        with pytest.raises(error, match="`threshold`"):
            call(X, reference_embedding=REFERENCES, threshold=threshold)
    with pytest.raises(error, match="`threshold`"):
        explainer.attribute_pair(X, X, threshold=threshold)
    assert state(encoder, X) == before


@each_of_terms
def test_a_contrast_and_a_threshold_at_once_are_refused(method):
    encoder = seeded(PooledEncoder)
    explainer = method(encoder, encoder.layer)
    with pytest.raises(ValueError, match=r"`contrast` or `threshold`.*both"):
        explainer.attribute(X, 1, reference_embedding=REFERENCES, contrast="self", threshold=0.3)
    with pytest.raises(ValueError, match=r"`contrast` or `threshold`.*both"):
        explainer.attribute_pair(X, X, contrast="self", threshold=0.3)


# The methods that change the inputs

PERTURBING = {
    "ScoreCam": lambda model, **options: ScoreCam(model, model.layer, **options),
    "Relax": lambda model, **options: Relax(model, n_samples=12, grid=2, **options),
}
each_perturbing = pytest.mark.parametrize("perturbing", PERTURBING.values(), ids=PERTURBING.keys())


@pytest.mark.parametrize("perturbations_per_eval", [1, 4, 32])
@each_perturbing
def test_additional_arguments_with_a_row_for_each_input_go_with_it(perturbing, perturbations_per_eval):
    encoder, shift = seeded(Shifted), random(3, 6, seed=7)
    method = perturbing(encoder, perturbations_per_eval=perturbations_per_eval)
    maps = method.attribute(X, 2, (shift, 0.5), reference_embedding=REFERENCES)
    for b in range(3):
        alone = method.attribute(X[b : b + 1], 2, (shift[b : b + 1], 0.5), reference_embedding=REFERENCES)
        close(maps[b : b + 1], alone)
    assert not torch.allclose(maps, method.attribute(X, 2, (shift.flip(0), 0.5), reference_embedding=REFERENCES))


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("a", TypeError), (None, TypeError)]
)
@each_perturbing
def test_a_wrong_number_of_perturbations_is_refused(perturbing, value, error):
    with pytest.raises(error, match=r"`perturbations_per_eval`.*positive int"):
        perturbing(seeded(PooledEncoder), perturbations_per_eval=value)


@each_perturbing
def test_a_progress_bar_is_shown_only_where_it_is_asked_for(perturbing, capsys):
    encoder = seeded(PooledEncoder)
    maps = [
        perturbing(encoder, show_progress=show).attribute(X, 1, reference_embedding=REFERENCES)
        for show in (False, True)
    ]
    close(*maps, rtol=0, atol=0)
    assert re.search(r"ScoreCam|Relax", capsys.readouterr().err)
    perturbing(encoder).attribute(X, 1, reference_embedding=REFERENCES)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "explainer", [lambda e: ScoreCam(e, e.layer), lambda e: Relax(e, n_samples=40, seed=3)], ids=["ScoreCam", "Relax"]
)
def test_images_of_bytes_are_masked_to_their_rounding(explainer):
    encoder, x = seeded(OfBytes), (random(2, 3, 12, 12).abs() * 100).clamp(max=255).to(torch.uint8)
    s = random(1, 6)
    maps = explainer(encoder).attribute(x, reference_embedding=s)
    exact = explainer(encoder).attribute(x.double(), reference_embedding=s)
    assert maps.is_floating_point()
    close(maps.double(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    assert maps.std() > 0


class Scaled(PooledEncoder):
    """Takes numbers that do not go with the inputs row by row."""

    def forward(self, x, factors):
        return super().forward(x) * factors


@pytest.mark.parametrize(
    "explainer", [lambda e: ScoreCam(e, e.layer), lambda e: Relax(e, n_samples=40)], ids=["ScoreCam", "Relax"]
)
def test_arguments_that_are_no_rows_are_given_whole(explainer):
    encoder, factors, s = seeded(Scaled), random(6).abs(), random(1, 6)
    maps = explainer(encoder).attribute(X, None, factors, reference_embedding=s)
    bound = Modified(seeded(PooledEncoder), lambda z: z * factors)
    close(maps, explainer(bound).attribute(X, reference_embedding=s))
