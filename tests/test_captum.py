"""FAM among Captum's tools: noise tunnels, metrics, TCAV, DataParallel, and the names that others rely on."""

import ast
import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import reference as oracle
import torch
from captum.attr import LayerAttribution, LayerGradCam, LayerGradientXActivation, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from encoders import (
    CONV,
    FlatEncoder,
    HeadEncoder,
    PooledEncoder,
    PowerPooledEncoder,
    TwoInputEncoder,
    random,
    seeded,
)
from helpers import close, run
from torch import nn

import captum_fam
from captum_fam import FeatureActivationMap, SimilarityDecomposition, SimilarityScore, explanation_func, to_input_space

KINDS = [PooledEncoder, HeadEncoder]


def scored(kind=HeadEncoder, K=3):
    """An encoder and FAM on its similarity to K references."""
    encoder = seeded(kind)
    D = encoder(random(1, 3, 6, 6)).shape[1]
    score = SimilarityScore(encoder, random(K, D, seed=2))
    return encoder, FeatureActivationMap(score, encoder.layer)


# The public names


@pytest.mark.parametrize(
    "name",
    [
        "ClassActivationMap",
        "EpisodeExplanation",
        "FeatureActivationMap",
        "LabelFreeActivationMap",
        "NearestReferences",
        "Relax",
        "RelevanceCam",
        "RetrievalExplanation",
        "ScoreCam",
        "SimilarityDecomposition",
        "SimilarityScore",
        "channel_contributions",
        "channels_last",
        "compare_attributions",
        "contribution_weights",
        "explain_episode",
        "explain_retrieval",
        "explanation_func",
        "nearest_references",
        "patch_tokens",
        "prototypes",
        "to_input_space",
        "visualize_comparison",
        "visualize_pair",
    ],
)
def test_a_public_name_stays(name):
    assert name in captum_fam.__all__
    assert callable(getattr(captum_fam, name))


def test_every_listed_name_can_be_imported():
    for name in captum_fam.__all__:
        assert hasattr(captum_fam, name)
    assert len(set(captum_fam.__all__)) == len(captum_fam.__all__)


def private_imports_of_captum(source):
    """Dotted names under captum with a private part that a source file imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return [p for p in parts if p[0] == "captum" and any(part.startswith("_") for part in p[1:])]


def test_private_imports_are_recognised():
    assert private_imports_of_captum("from captum._utils.common import run") == [["captum", "_utils", "common", "run"]]
    assert private_imports_of_captum("def f():\n    from captum import _utils")
    assert private_imports_of_captum("import captum.attr._core.layer.grad_cam")
    assert not private_imports_of_captum("from captum.attr import NoiseTunnel\nimport captum_fam._captum")


def test_captums_private_modules_are_imported_in_one_file_only():
    files = sorted(Path(captum_fam.__file__).parent.rglob("*.py"))
    assert len(files) > 5
    private = {file.name for file in files if private_imports_of_captum(file.read_text(encoding="utf-8"))}
    assert private == {"_captum.py"}


def test_the_private_helpers_of_this_captum_are_there():
    module = importlib.import_module("captum_fam._captum")
    assert all(hasattr(module, name) for name in module.__all__)


# What Captum asks of an attribution


def test_fam_is_a_captum_layer_attribution_that_says_what_it_is():
    encoder, fam = scored()
    assert isinstance(fam, LayerAttribution)
    assert fam.layer is encoder.layer
    assert fam.get_name() == "Feature Activation Map"
    assert fam.has_convergence_delta() is False
    assert fam.multiplies_by_inputs is False


def test_attribute_future_is_not_implemented():
    with pytest.raises(NotImplementedError, match="FeatureActivationMap"):
        scored()[1].attribute_future()


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_inside_the_usage_log_gives_the_same_map(kind):
    _, fam = scored(kind)
    x = random(2, 3, 6, 6)
    unlogged = fam.attribute.__wrapped__(fam, x, target=1, additional_forward_args=None, attribute_to_layer_input=False)
    assert torch.equal(unlogged, fam.attribute(x, target=1))
    assert not hasattr(unlogged, "grad_fn") or unlogged.grad_fn is None


def test_the_usage_log_is_the_outermost_decorator():
    from captum.log import log_usage

    plain = FeatureActivationMap.attribute.__wrapped__
    assert not hasattr(plain, "__wrapped__")
    assert FeatureActivationMap.attribute.__code__ is log_usage()(plain).__code__


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_put_in_place_of_another_is_explained(kind):
    encoder, fam = scored(kind)
    x, first = random(2, 3, 6, 6), fam.layer
    before = fam.attribute(x, 1)
    fam.layer = encoder.early  # as TCAV does, for each of its layers
    assert fam.attribute(x, 1).shape == (2, 1, 6, 6)
    close(fam.attribute(x, 1), FeatureActivationMap(fam.forward_func, encoder.early).attribute(x, 1))
    fam.layer = [encoder.early, encoder.layer]
    assert isinstance(fam.attribute(x, 1), list)
    fam.layer = first
    assert torch.equal(fam.attribute(x, 1), before)


# The same by Captum's gradient times activation


@pytest.mark.parametrize("kind", [*KINDS, FlatEncoder, PowerPooledEncoder])
@pytest.mark.parametrize(
    "question", [{}, {"contrast": 0}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.2}], ids=str
)
def test_fam_is_gradient_times_activation_of_the_embedding_weighed_by_f(kind, question):
    encoder, x = seeded(kind), random(2, 3, 6, 6)
    z, A = run(encoder, x)
    s = random(3, z.shape[1], seed=2)
    f = np.stack([oracle.pair_weights(z_b, s.numpy(), k, "cosine", **question) for z_b, k in zip(z.numpy(), [2, 1])])
    weighed = LayerGradientXActivation(lambda x: (torch.from_numpy(f) * encoder(x)).sum(1), encoder.layer)
    terms = A.shape[2] * A.shape[3] * weighed.attribute(x).detach()
    fam = FeatureActivationMap(encoder, encoder.layer)
    options = {"target": [2, 1], "reference_embedding": s, **question}
    close(fam.attribute(x, **options), terms.sum(1, keepdim=True))
    close(fam.attribute(x, attr_dim_summation=False, **options), terms)


@pytest.mark.parametrize("kind", [*KINDS, FlatEncoder, PowerPooledEncoder])
def test_the_decomposition_of_a_dot_product_is_gradient_times_activation_of_the_score(kind):
    encoder, x = seeded(kind), random(2, 3, 6, 6)
    z, A = run(encoder, x)
    score = SimilarityScore(encoder, random(3, z.shape[1], seed=2), "dot")
    terms = A.shape[2] * A.shape[3] * LayerGradientXActivation(score, encoder.layer).attribute(x, [2, 1]).detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The places of layer")  # a head has a bias
        decomposition = SimilarityDecomposition(score, encoder.layer)
        close(decomposition.attribute(x, [2, 1]), terms.sum(1, keepdim=True))
        close(decomposition.attribute(x, [2, 1], attr_dim_summation=False), terms)


# Noise tunnels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [1, [0, 2], torch.tensor([2, 0])])
@pytest.mark.parametrize(
    ("nt_type", "expected"),
    [("smoothgrad", lambda m: m), ("smoothgrad_sq", torch.square), ("vargrad", torch.zeros_like)],
)
def test_a_noise_tunnel_without_noise_is_the_plain_map(nt_type, expected, target, kind):
    _, fam = scored(kind)
    x = random(2, 3, 6, 6)
    result = NoiseTunnel(fam).attribute(x, nt_type=nt_type, nt_samples=3, stdevs=0.0, target=target)
    close(result, expected(fam.attribute(x, target=target)))


def test_a_noise_tunnel_is_the_mean_of_the_maps_of_noisy_inputs_with_each_examples_own_target():
    _, fam = scored()
    x, seen = random(2, 3, 6, 6), []
    handle = fam.forward_func.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    result = NoiseTunnel(fam).attribute(x, nt_samples=4, nt_samples_batch_size=2, stdevs=0.3, target=[2, 0])
    handle.remove()
    noisy = torch.cat(seen).reshape(2, 2, 2, 3, 6, 6)  # batches of samples, examples, samples
    assert not torch.allclose(noisy[0, 0, 0], noisy[0, 0, 1])
    for b, target in enumerate([2, 0]):
        samples = noisy[:, b].flatten(0, 1)
        close(result[b], fam.attribute(samples, target=target).mean(0))


@pytest.mark.parametrize("question", [{"contrast": 2}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.1}])
def test_a_noise_tunnel_repeats_a_contrast_and_a_threshold(question):
    _, fam = scored()
    x = random(2, 3, 6, 6)
    result = NoiseTunnel(fam).attribute(x, nt_samples=3, stdevs=0.0, target=[0, 1], **question)
    close(result, fam.attribute(x, [0, 1], **question))


# Metrics


def shifts(inputs, radius=None):
    """Perturbs without chance: the samples of each example are moved by different amounts."""
    x = inputs[0] if isinstance(inputs, tuple) else inputs
    return x + 0.3 * torch.linspace(-1, 1, len(x), dtype=x.dtype)[:, None, None, None] * x.flip(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "target"), [(1, 2), (1, [2]), (3, 2), (3, [2, 0, 1])])
def test_the_sensitivity_of_a_map_is_the_largest_relative_change(B, target, kind):
    _, fam = scored(kind)
    x, n = random(B, 3, 6, 6), 4
    result = sensitivity_max(explanation_func(fam), x, shifts, n_perturb_samples=n, target=target)
    moved = shifts(x.repeat_interleave(n, 0)).reshape(B, n, 3, 6, 6)
    for b in range(B):
        own = target if isinstance(target, int) else target[b]
        plain = fam.attribute(x[b : b + 1], own).numpy().ravel()
        changes = [np.linalg.norm(fam.attribute(moved[b, i : i + 1], own).numpy().ravel() - plain) for i in range(n)]
        assert result[b].item() == pytest.approx(max(changes) / np.linalg.norm(plain), rel=1e-9)
    assert result.shape == (B,)


def test_an_explanation_function_passes_everything_on_and_returns_a_tuple():
    encoder, fam = scored()
    x = random(2, 3, 6, 6)
    result = explanation_func(fam)(x, target=1, attr_dim_summation=False)
    assert isinstance(result, tuple)
    assert torch.equal(result[0], fam.attribute(x, 1, attr_dim_summation=False))
    fam.layer = [encoder.early, encoder.layer]
    assert [m.shape for m in explanation_func(fam)(x, target=1)] == [(2, 1, 6, 6), (2, 1, 3, 3)]
    a, b = random(2, 3, 8, 8), random(2, 1, 9, 9)
    pairs = seeded(TwoInputEncoder)
    both = FeatureActivationMap(SimilarityScore(pairs, random(1, 3)), pairs.layer)
    close(explanation_func(both)((a, b)), both.attribute((a, b)))


def test_the_sensitivity_of_a_layer_that_gives_a_tuple_counts_all_its_maps():
    encoder, a, b = seeded(TwoInputEncoder), random(2, 3, 8, 8), random(2, 1, 9, 9, seed=2)
    fam = FeatureActivationMap(SimilarityScore(encoder, random(2, 3)), encoder.layer)
    result = sensitivity_max(
        explanation_func(fam), (a, b), lambda x: (x[0] * 1.1, x[1] - 0.1), n_perturb_samples=1, target=0
    )
    plain, moved = (torch.cat([m.flatten(1) for m in fam.attribute(x, 0)], 1) for x in ((a, b), (a * 1.1, b - 0.1)))
    close(result, (plain - moved).norm(dim=1) / plain.norm(dim=1))


def test_an_explanation_function_serves_captums_other_layer_methods():
    encoder, fam = scored()
    x = random(3, 3, 6, 6)
    grad_cam = LayerGradCam(fam.forward_func, encoder.layer)
    close(explanation_func(grad_cam)(x, target=1)[0], grad_cam.attribute(x, target=1))
    assert sensitivity_max(explanation_func(grad_cam), x, shifts, n_perturb_samples=2, target=1).shape == (3,)


@pytest.mark.parametrize("value", [None, nn.Identity(), lambda x: x])
def test_an_explanation_function_of_no_attribution_method_is_refused(value):
    with pytest.raises(TypeError, match="`attribution`"):
        explanation_func(value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_infidelity_of_a_map_is_that_of_its_values_in_input_space(kind):
    _, fam = scored(kind)
    x, target = random(2, 3, 6, 6), [2, 0]
    attributions = to_input_space(fam.attribute(x, target), x)

    def brighter(inputs):
        return torch.ones_like(inputs) * 0.01, inputs - 0.01

    result = infidelity(fam.forward_func, brighter, x, attributions, n_perturb_samples=2, target=target)
    change = (fam.forward_func(x) - fam.forward_func(x - 0.01)).detach()[[0, 1], target]
    close(result, ((0.01 * attributions.sum((1, 2, 3))) - change) ** 2)


# Maps in input space


@pytest.mark.parametrize("dim", CONV)
def test_a_map_in_input_space_adds_up_over_the_channels_to_captums_interpolation(dim):
    maps, inputs = random(2, 1, *(3, 4, 2)[:dim]), random(2, 5, *(9, 7, 8)[:dim])
    result = to_input_space(maps, inputs)
    assert result.shape == inputs.shape
    assert result.dtype == torch.float64
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dim]
    close(result.sum(1, keepdim=True), LayerAttribution.interpolate(maps, inputs.shape[2:], mode))
    assert torch.equal(result, result[:, :1].expand_as(result))


def test_a_map_in_input_space_can_be_interpolated_in_another_mode():
    maps, inputs = random(2, 1, 2, 2), random(2, 1, 6, 6)
    assert torch.equal(to_input_space(maps, inputs, "nearest"), maps.repeat_interleave(3, 2).repeat_interleave(3, 3))


def test_a_map_of_the_inputs_size_is_only_shared_among_its_channels():
    maps = random(2, 1, 4, 5)
    close(to_input_space(maps, random(2, 4, 4, 5)), (maps / 4).expand(2, 4, 4, 5))


def test_a_tuple_of_maps_becomes_a_tuple_in_input_space():
    encoder, inputs = seeded(TwoInputEncoder), (random(2, 3, 8, 8), random(2, 1, 9, 9))
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(inputs, reference=inputs)
    result = to_input_space(maps, inputs)
    assert isinstance(result, tuple)
    for r, m, x in zip(result, maps, inputs, strict=True):
        assert torch.equal(r, to_input_space(m, x))
    one = to_input_space((maps[0],), (inputs[0],))
    assert isinstance(one, tuple)
    assert torch.equal(one[0], result[0])


def test_no_maps_become_no_attributions():
    assert to_input_space(torch.ones(0, 1, 3, 3), torch.ones(0, 3, 6, 6)).shape == (0, 3, 6, 6)


@pytest.mark.parametrize(
    ("maps", "inputs", "error", "match"),
    [
        (None, torch.ones(1, 3, 4, 4), TypeError, "`attributions`"),
        ([torch.ones(1, 1, 2, 2)], torch.ones(1, 3, 4, 4), TypeError, "`attributions`.*list"),
        (torch.ones(1, 1, 2, 2), np.ones((1, 3, 4, 4)), TypeError, "`inputs`.*ndarray"),
        ((torch.ones(1, 1, 2, 2),) * 2, torch.ones(1, 3, 4, 4), ValueError, "2 maps for 1"),
        (torch.ones(2, 1, 2, 2), torch.ones(1, 3, 4, 4), ValueError, r"\(2, 1, 2, 2\) and \(1, 3, 4, 4\)"),
        (torch.ones(1, 6, 2, 2), torch.ones(1, 3, 4, 4), ValueError, r"\(B, 1, \*spatial\).*\(1, 6, 2, 2\)"),
        (torch.ones(1, 1, 4), torch.ones(1, 3, 4, 4), ValueError, r"\(1, 1, 4\)"),
        (torch.ones(1, 1), torch.ones(1, 8), ValueError, r"\(1, 1\)"),
    ],
)
def test_maps_that_do_not_fit_the_inputs_are_refused(maps, inputs, error, match):
    with pytest.raises(error, match=match):
        to_input_space(maps, inputs)


# Forward functions


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # with a GPU, DataParallel takes modules there only


@pytest.mark.parametrize("kind", [*KINDS, FlatEncoder])
def test_a_data_parallel_encoder_gives_the_maps_of_the_encoder(kind):
    encoder, x = seeded(kind).to(DEVICE), random(3, 3, 6, 6).to(DEVICE)
    reference = x[:1].flip(-1)
    plain, parallel = (FeatureActivationMap(model, encoder.layer) for model in (encoder, nn.DataParallel(encoder)))
    close(parallel.attribute(x, reference=reference), plain.attribute(x, reference=reference))
    close(parallel.attribute_all(x, reference=x), plain.attribute_all(x, reference=x))
    close(parallel.attribute_pair(x, reference), plain.attribute_pair(x, reference))
    close(parallel.embed(x), plain.embed(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_parallel_score_gives_the_maps_of_the_score(kind):
    encoder, fam = scored(kind)
    score, x = fam.forward_func.to(DEVICE), random(3, 3, 6, 6).to(DEVICE)
    score.similarity = "euclidean"
    parallel = FeatureActivationMap(nn.DataParallel(score), encoder.layer)
    close(parallel.attribute(x, [1, 0, 2]), fam.attribute(x, [1, 0, 2]))
    close(parallel.attribute_all(x), fam.attribute_all(x))
    with pytest.raises(ValueError, match="SimilarityScore"):
        parallel.attribute(x, reference=x)


@pytest.mark.parametrize("kind", [*KINDS, PowerPooledEncoder])
def test_bound_methods_and_plain_functions_are_forward_functions(kind):
    encoder, x, reference = seeded(kind), random(2, 3, 6, 6), random(1, 3, 6, 6, seed=2)
    expected = FeatureActivationMap(encoder, encoder.layer).attribute(x, reference=reference)
    for forward_func in (encoder.forward, encoder.__call__, lambda x: encoder(x)):
        fam = FeatureActivationMap(forward_func, encoder.layer)
        assert torch.equal(fam.attribute(x, reference=reference), expected)
        on_score = FeatureActivationMap(SimilarityScore(forward_func, fam.embed(reference)), encoder.layer)
        assert torch.equal(on_score.attribute(x), expected)


def test_a_compiled_encoder_that_has_run_before_gives_the_maps_of_the_encoder_itself():
    encoder, x = seeded(PooledEncoder), random(2, 3, 8, 8)
    compiled = torch.compile(encoder, backend="eager")
    compiled(x)
    maps = FeatureActivationMap(compiled, compiled.layer).attribute(x, reference=x)
    torch.testing.assert_close(maps, FeatureActivationMap(encoder, encoder.layer).attribute(x, reference=x))


def test_a_compiled_score_gives_the_maps_of_the_score_itself():
    encoder, x, s = seeded(PooledEncoder), random(2, 3, 8, 8), random(3, 6, seed=2)
    score = SimilarityScore(encoder, s, "euclidean")
    maps = FeatureActivationMap(torch.compile(score, backend="eager"), encoder.layer).attribute(x, target=1)
    torch.testing.assert_close(maps, FeatureActivationMap(score, encoder.layer).attribute(x, target=1))
