"""IntegratedDecomposition: eight steps of SimilarityDecomposition at a layer that it finds, and which that is."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from encoders import CONV, Function, HeadEncoder, Modified, TwoInputEncoder, pooled, random, seeded
from helpers import close, held, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import photos, run  # noqa: F401
from test_cli_compare import drawn, tensors, two  # noqa: F401
from test_model_untouched import state, users_model
from torch import nn

import captum_fam
from captum_fam import (
    IntegratedDecomposition,
    SimilarityDecomposition,
    SimilarityScore,
    compare_attributions,
    explain_episode,
    explain_retrieval,
)
from captum_fam.engine.layers import early_map, maps_on_the_way

X, S, LARGE = random(3, 3, 32, 32), random(3, 4, seed=2), random(2, 3, 64, 64, seed=3)


class Staged(nn.Module):
    """Maps of a half, a half and a quarter of an image's side. Keeps how many rows each of its calls took."""

    def __init__(self, dim=2):
        super().__init__()
        self.stem = CONV[dim](3, 4, 3, 2, 1)
        self.body = nn.Sequential(CONV[dim](4, 5, 3, padding=1), nn.Tanh())
        self.late = nn.Sequential(CONV[dim](5, 6, 3, 2, 1), nn.Tanh())
        self.head, self.rows = nn.Linear(6, 4), []

    def forward(self, x, more=0.0):
        self.rows.append(len(x))
        return self.head(self.late(self.body(torch.tanh(self.stem(x)))).flatten(2).mean(2)) + more


ENCODER = seeded(Staged)  # at 32 x 32 its layer is body, at 64 x 64 late


def eight_steps(encoder=ENCODER, layer=None, **options):
    return SimilarityDecomposition(encoder, ENCODER.body if layer is None else layer, n_steps=8, **options)


# The same as with the layer's name


CALLS = {
    "a reference": lambda m: m.attribute(X, reference=X[1:2]),
    "targets": lambda m: m.attribute(X, [2, 0, 1], reference_embedding=S),
    "contrast": lambda m: m.attribute(X, [2, 0, 1], reference_embedding=S, contrast=[0, 1, 0]),
    "rest": lambda m: m.attribute(X, 1, reference_embedding=S, contrast="rest"),
    "self": lambda m: m.attribute(X, 1, reference_embedding=S, contrast="self"),
    "threshold": lambda m: m.attribute(X, 1, reference_embedding=S, threshold=0.3),
    "channels": lambda m: m.attribute(X, 1, attr_dim_summation=False, reference_embedding=S),
    "layer input": lambda m: m.attribute(X, 1, attribute_to_layer_input=True, reference_embedding=S),
    "arguments": lambda m: m.attribute(X, 1, random(3, 1, seed=6), reference_embedding=S),
    "delta": lambda m: m.attribute(X, 1, reference_embedding=S, return_convergence_delta=True),
    "chunks": lambda m: m.attribute(X, 1, reference_embedding=S, internal_batch_size=18),
    "all": lambda m: m.attribute_all(X, reference_embedding=S),
    "all, rest": lambda m: m.attribute_all(X, reference_embedding=S, contrast="rest"),
    "pair": lambda m: m.attribute_pair(X, X.flip(0), threshold=0.2),
    "pair of two sizes": lambda m: m.attribute_pair(X, LARGE[:1]),  # at the layer of the inputs
    "matrix": lambda m: m.attribute_matrix(X[:2], X[1:3]),
    "matrix, baselines": lambda m: m.attribute_matrix(X[:2], X[2:], return_baselines=True),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_every_call_is_that_of_eight_steps_at_the_layer_it_names(call):
    integrated = IntegratedDecomposition(ENCODER)
    assert integrated.layer_of(X) == "body"
    with silent():
        close(call(integrated), call(eight_steps()))
    assert integrated.layer is None


@each_call
def test_it_takes_one_more_pass_of_one_example_in_a_call_and_none_with_a_layer(call):
    encoder, rows = copy.deepcopy(ENCODER), []
    for method in (eight_steps(encoder, encoder.body), IntegratedDecomposition(encoder)):
        encoder.rows.clear()
        call(method)
        rows.append(sorted(encoder.rows))
    assert rows[1] == sorted([1, *rows[0]])
    encoder.rows.clear()
    call(IntegratedDecomposition(encoder, encoder.body))
    assert sorted(encoder.rows) == rows[0]


def test_the_route_and_the_embeddings_are_those_at_the_layer():
    aligned = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh(), *pooled()).double()
    assert IntegratedDecomposition(ENCODER).route(X) == "jacobian"
    assert IntegratedDecomposition(aligned, aligned[1]).route(X) == "aligned"
    assert IntegratedDecomposition(aligned).route(X) == "jacobian"  # before the Tanh: maps of one size
    close(IntegratedDecomposition(ENCODER).embed(X), ENCODER(X).detach())


@pytest.mark.parametrize("layer", [ENCODER.stem, [ENCODER.stem, ENCODER.late]], ids=["one", "list"])
def test_a_layer_that_is_given_is_the_one(layer):
    given, plain = IntegratedDecomposition(ENCODER, layer), eight_steps(layer=layer)
    for call in ("a reference", "all", "pair", "matrix", "delta"):
        close(CALLS[call](given), CALLS[call](plain))
    assert given.route(X) == plain.route(X)
    later = IntegratedDecomposition(ENCODER)
    later.layer = layer
    close(CALLS["all"](later), CALLS["all"](plain))


OPTIONS = {
    "steps": {"n_steps": 3},
    "zero": {"baseline": "zero"},
    "tensor": {"baseline": random(5, 1, 1, seed=4)},
    "dot": {"similarity": "dot"},
    "euclidean": {"similarity": "euclidean"},
    "layout": {"reshape_transform": lambda A: A.flip(3)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_those_of_the_decomposition(options):
    integrated = IntegratedDecomposition(ENCODER, **options)
    plain = SimilarityDecomposition(ENCODER, ENCODER.body, **{"n_steps": 8, **options})
    close(CALLS["all"](integrated), CALLS["all"](plain))
    assert integrated.has_convergence_delta()


def test_the_mean_of_a_map_is_the_score_less_what_the_baseline_has_of_it():
    maps, delta = CALLS["delta"](IntegratedDecomposition(ENCODER))
    with torch.no_grad():
        A = ENCODER.body(torch.tanh(ENCODER.stem(X))).mean((2, 3), keepdim=True).expand(-1, -1, 16, 16)
        z, z0 = ENCODER(X), ENCODER.head(ENCODER.late(A).mean((2, 3)))
        f = S[1] / S[1].norm() / z.norm(dim=1, keepdim=True)
    close(maps.mean((1, 2, 3)) - delta, (f * (z - z0)).sum(1))
    assert delta.abs().max() < 1e-6


def test_images_of_two_sizes_each_have_their_own_layer():
    integrated = IntegratedDecomposition(ENCODER)
    assert [integrated.layer_of(x) for x in (X, LARGE, X, X[..., ::4, ::4])] == ["body", "late", "body", "body"]
    for x, layer in ((LARGE, ENCODER.late), (X, ENCODER.body)):
        found = integrated.attribute(x, 1, reference_embedding=S)
        close(found, eight_steps(layer=layer).attribute(x, 1, reference_embedding=S))
        assert found.shape[2:] == (16, 16)


# Encoders and inputs of all kinds


class Numbered(Staged):
    """A row of numbers comes before the image."""

    def forward(self, numbers, x):
        return super().forward(x) + numbers


def test_several_inputs_go_through_together_and_the_image_is_what_maps_lie_on():
    for encoder, layer, inputs in (
        (seeded(TwoInputEncoder), "layer.one", (random(2, 3, 16, 16), random(2, 1, 16, 16))),
        (seeded(Numbered), "body", (random(2, 4), X[:2])),
    ):
        integrated = IntegratedDecomposition(encoder)
        assert integrated.layer_of(inputs) == layer
        plain = eight_steps(encoder, encoder.get_submodule(layer))
        others = tuple(t.flip(0) for t in inputs)
        close(integrated.attribute(inputs, reference=others), plain.attribute(inputs, reference=others))
        close(integrated.attribute_pair(inputs, others), plain.attribute_pair(inputs, others))


# What an encoder is wrapped in, the name of its layer, and options.
WRAPS = {
    "score": (lambda e: SimilarityScore(e, S), "body", {}),
    "bound method": (lambda e: e.forward, "body", {}),
    "DataParallel": (nn.DataParallel, "module.body", {}),
    "score in DataParallel": (lambda e: nn.DataParallel(SimilarityScore(e, S)), "body", {}),
    "compiled": (lambda e: torch.compile(e, backend="eager"), "body", {}),
    "compiled part": (lambda e: nn.Sequential(torch.compile(e, backend="eager")), "0._orig_mod.body", {}),
    "selector": (
        lambda e: Modified(e, lambda z: {"z": z, "other": -z[:, :2]}),
        "encoder.body",
        {"output_selector": lambda output: output["z"]},
    ),
    "selector of a score": (
        lambda e: SimilarityScore(Modified(e, lambda z: (z[:, :2], z)), S, output_selector=lambda output: output[1]),
        "encoder.body",
        {},
    ),
}


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_wrapped_encoder_has_the_maps_of_the_encoder(kind):
    wrap, name, options = WRAPS[kind]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = copy.deepcopy(ENCODER).to(device)
    encoder.layer = encoder.body  # of Modified
    wrapped, x, s = wrap(encoder), X.to(device), S.to(device)
    if isinstance(wrapped, nn.Module):  # what is compiled has run
        wrapped.to(device)(x)
    integrated = IntegratedDecomposition(wrapped, **options)
    assert integrated.layer_of(x) == name
    found = integrated.attribute(x, 1, **({} if "score" in kind else {"reference_embedding": s}))
    close(found.cpu(), eight_steps().attribute(X, 1, reference_embedding=S))


@pytest.mark.parametrize("dim", [1, 3])
def test_signals_and_volumes_have_a_layer(dim):
    encoder = seeded(lambda: Staged(dim))
    for side, layer in ((28, "body"), (56, "late")) if dim == 1 else ((28, "body"),):
        x = random(2, 3, *[side] * dim)
        assert IntegratedDecomposition(encoder).layer_of(x) == layer
        plain = eight_steps(encoder, encoder.get_submodule(layer))
        close(IntegratedDecomposition(encoder).attribute(x, reference=x[:1]), plain.attribute(x, reference=x[:1]))


def test_an_empty_batch_has_an_empty_map():
    maps = IntegratedDecomposition(ENCODER).attribute(X[:0], reference_embedding=S[:1])
    assert maps.shape[:2] == (0, 1)


# Errors


@pytest.mark.parametrize("call", ["a reference", "targets", "all", "pair", "matrix"])
@pytest.mark.parametrize(
    "encoder",
    [
        lambda x, more=0.0: ENCODER(x, more),
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).double(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten()).double(),
        nn.Sequential(nn.Conv2d(3, 4, 3), *pooled(), Function(lambda z: z * 0 + 1)).double(),
    ],
    ids=["function", "flat", "one place", "nothing"],
)
def test_an_encoder_without_maps_is_told_to_pass_a_layer(encoder, call):
    with pytest.raises(ValueError, match=r"No layer of the encoder.*pass one as `layer`"):
        CALLS[call](IntegratedDecomposition(encoder))
    with pytest.raises(ValueError, match=r"No layer of the encoder.*pass one as `layer`"):
        IntegratedDecomposition(encoder).layer_of(X)


def test_a_function_has_the_maps_of_a_layer_that_is_given():
    of_function = IntegratedDecomposition(lambda x: ENCODER(x), ENCODER.body)
    close(CALLS["all"](of_function), CALLS["all"](eight_steps()))


METHODS = ["FeatureActivationMap", "LabelFreeActivationMap", "ScoreCam", "RelevanceCam", "CorrespondenceMap"]


@pytest.mark.parametrize("method", ["SimilarityDecomposition", *METHODS])
def test_other_methods_still_need_a_layer(method):
    with pytest.raises(TypeError, match=r"`layer`.*None"):
        getattr(captum_fam, method)(ENCODER, None)


@pytest.mark.parametrize("layer", ["body", [], [None], 3], ids=str)
def test_a_wrong_layer_is_named(layer):
    with pytest.raises(TypeError, match="`layer`"):
        IntegratedDecomposition(ENCODER, layer)


# The model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:The model is in training mode")
def test_a_call_leaves_the_model_and_gradient_mode_as_they_were(training, grad):
    model, x = users_model(training=training), random(3, 3, 8, 8).requires_grad_()
    integrated, before = IntegratedDecomposition(model), (state(model, x), held(model))
    for call in (
        lambda: integrated.attribute(x, reference=x),
        lambda: integrated.attribute_pair(x, x.detach().flip(0)),
        lambda: integrated.layer_of(x),
    ):
        with torch.set_grad_enabled(grad):
            call()
            assert torch.is_grad_enabled() == grad
        assert (state(model, x), held(model)) == before


def test_an_error_of_the_encoder_reaches_the_user_from_one_run_and_leaves_no_hook():
    encoder = copy.deepcopy(ENCODER)
    encoder.head.forward, before = lambda z: 1 / 0, list(encoder.rows)
    with pytest.raises(ZeroDivisionError):
        IntegratedDecomposition(encoder).attribute(X, reference_embedding=S[:1])
    assert encoder.rows == [*before, 1]
    assert not any(m._forward_hooks for m in encoder.modules())


def test_gradient_mode_and_frozen_weights_change_nothing_and_inference_mode_is_refused():
    frozen, expected = copy.deepcopy(ENCODER).requires_grad_(False), CALLS["all"](eight_steps())
    with torch.no_grad():
        close(CALLS["all"](IntegratedDecomposition(frozen)), expected)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        CALLS["all"](IntegratedDecomposition(ENCODER))


@pytest.mark.filterwarnings("ignore:The model is in training mode")
def test_batch_norm_of_embeddings_in_training_has_the_maps_of_eight_steps():
    encoder = seeded(lambda: nn.Sequential(Staged(), nn.BatchNorm1d(4))).train()
    found = IntegratedDecomposition(encoder).attribute(X, 1, reference_embedding=S)
    close(found, eight_steps(encoder, encoder[0].body).attribute(X, 1, reference_embedding=S))


# Where methods are chosen by name or class


def compare(layer, *methods):
    return compare_attributions(SimilarityScore(ENCODER, S), layer, X, [2, 0, 1], [*methods], show_progress=False)


@pytest.mark.parametrize("method", ["IntegratedDecomposition", IntegratedDecomposition], ids=["name", "class"])
def test_a_comparison_lets_it_find_its_layer_and_an_instance_keep_its_own(method):
    score = SimilarityScore(ENCODER, S)
    instances = IntegratedDecomposition(score, ENCODER.stem), IntegratedDecomposition(score)
    maps = compare(ENCODER.late, method, "SimilarityDecomposition", *instances)
    layers = {"": ENCODER.body, " 2": ENCODER.stem, " 3": ENCODER.body}
    for number, layer in layers.items():
        expected = CALLS["targets"](eight_steps(layer=layer))
        close(maps[f"IntegratedDecomposition{number}"], F.interpolate(expected, X.shape[2:], mode="bilinear"))
    late = SimilarityDecomposition(ENCODER, ENCODER.late).attribute(X, [2, 0, 1], reference_embedding=S)
    close(maps["SimilarityDecomposition"], F.interpolate(late, X.shape[2:], mode="bilinear"))


@pytest.mark.parametrize("layer", [(), ("--layer", "features")], ids=["no layer", "layer"])
def test_the_command_line_compares_it_at_its_own_layer(run, two, drawn, tmp_path, layer):  # noqa: F811
    arguments = ("--size", 64, "--method", "IntegratedDecomposition", *layer, "-o", tmp_path / "out.png")
    assert run("compare", *two, *arguments)[0] == 0
    encoder, x = tensors(two, 64)
    own = IntegratedDecomposition(encoder).layer_of(x)
    assert own != "features"
    plain = eight_steps(encoder, encoder.get_submodule(own))
    expected = F.interpolate(plain.attribute(x, reference=x.flip(0)), (64, 64), mode="bilinear")
    (found,) = drawn[0][1].values()
    close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


LABELS = [0, 0, 1, 1]
SUPPORT = random(4, 3, 32, 32, seed=7)
each_layer = pytest.mark.parametrize("layer", [None, ENCODER.stem], ids=["found", "given"])


def same_explanation(found, expected, *names):
    for name in ("similarities", "constants", "maps", "signed_maps", *names):
        close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
    assert found.route == expected.route == "jacobian"


@each_layer
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("size", [None, 18])
def test_an_episode_is_explained_with_and_without_a_layer(layer, similarity, size):
    episode = (X, SUPPORT, LABELS)
    options = {"similarity": similarity, "internal_batch_size": size}
    found = explain_episode(ENCODER, layer, *episode, method=IntegratedDecomposition, **options)
    options |= {"method": SimilarityDecomposition, "n_steps": 8}
    same_explanation(found, explain_episode(ENCODER, layer or ENCODER.body, *episode, **options), "scores")


@each_layer
@pytest.mark.parametrize("classifier", ["PrototypicalNetworks", "SimpleShot"])
def test_a_classifier_of_easyfsl_is_explained_with_and_without_a_layer(layer, classifier):
    made = getattr(pytest.importorskip("easyfsl.methods"), classifier)(ENCODER)
    episode = (X, SUPPORT, torch.tensor(LABELS))
    found = explain_episode(made, layer, *episode, method=IntegratedDecomposition)
    options = {"method": SimilarityDecomposition, "n_steps": 8}
    same_explanation(found, explain_episode(made, layer or ENCODER.body, *episode, **options), "scores")


@each_layer
def test_hits_are_explained_with_and_without_a_layer(layer):
    index = pytest.importorskip("faiss").IndexFlatL2(4)
    encoder = copy.deepcopy(ENCODER).float()
    layer, body = None if layer is None else encoder.stem, encoder.body
    gallery, query = random(5, 3, 32, 32, seed=8).float(), X.float()
    with torch.no_grad():
        index.add(encoder(gallery).numpy())
    found = explain_retrieval(query, index, encoder, layer, gallery, 2, method=IntegratedDecomposition)
    options = {"method": SimilarityDecomposition, "n_steps": 8}
    expected = explain_retrieval(query, index, encoder, layer or body, gallery, 2, **options)
    for name in ("indices", "maps", "signed_maps", "hit_maps"):
        close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_an_explanation_by_another_method_still_needs_a_layer():
    with pytest.raises(TypeError, match="`layer`"):
        explain_episode(ENCODER, None, X, SUPPORT, LABELS)


# Which layer it is


TORCHVISION = {
    "resnet50": "layer3",
    "mobilenet_v2": "features.13",
    "efficientnet_b0": "features.5",
    "densenet121": "features.denseblock3",
    "convnext_tiny": "features.5",
    "swin_t": "features.5",
}


@pytest.mark.parametrize(("name", "layer"), TORCHVISION.items())
def test_of_a_network_of_torchvision_it_is_the_end_of_the_stage_of_14_by_14_places(name, layer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
    images = (random(1, 3, 224, 224, dtype=torch.float32),)
    assert early_map(model, images) == layer


TOKENS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 2}


VIT = {"img_size": 32, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
MLP = {**TOKENS, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 12, 12], "depths": [1, 1, 1], "num_stages": 3}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (6, 6, 12, 12), "num_classes": 0}
# Module, class, options, side of the images, layer. Of ConvNeXt, the second stage has 16 x 16 places.
LIBRARIES = {
    "timm ViT": ("timm.models.vision_transformer", "VisionTransformer", VIT, 32, "patch_embed"),
    "timm ViT, mean": (
        "timm.models.vision_transformer",
        "VisionTransformer",
        {**VIT, "reg_tokens": 4, "global_pool": "avg"},
        32,
        "patch_embed",
    ),
    "timm ConvNeXt": ("timm.models.convnext", "ConvNeXt", CONVNEXT, 128, "stages.1"),
    "ViT": ("transformers", "ViT", MLP, 32, "embeddings"),
    "ViT of 4 x 4": ("transformers", "ViT", {**MLP, "patch_size": 8}, 32, "embeddings"),
    "Dinov2": ("transformers", "Dinov2", {**TOKENS, "mlp_ratio": 2}, 32, "embeddings"),
    "CLIP": ("transformers", "CLIPVision", MLP, 32, "embeddings"),
    "ConvNeXt": ("transformers", "ConvNext", STAGES, 128, "encoder.stages.1"),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_of_other_libraries_it_is_the_end_of_a_stage_or_the_patches_as_they_come_in(name):
    module, kind, options, side, layer = LIBRARIES[name]
    library, hugging_face = pytest.importorskip(module), module == "transformers"
    if hugging_face:
        made = getattr(library, f"{kind}Config")(**options)
        model = seeded(lambda: getattr(library, f"{kind}Model")(made))
    else:
        model = seeded(lambda: getattr(library, kind)(**options))
    images = random(1, 3, side, side)
    with torch.no_grad():  # weights not so small that the class token hardly sees the patches
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    selector = (lambda output: output.pooler_output.flatten(1)) if hugging_face else None
    integrated = IntegratedDecomposition(model, output_selector=selector)
    assert integrated.layer_of(images) == early_map(model, (images,), None, selector) == layer
    maps = integrated.attribute(images, reference=images.flip(3))
    assert maps.any()
    assert maps.shape[2:] == ((4, 4) if "4 x 4" in name else (16, 16))


def network(**parts):
    """Modules by name, one after another, with the mean of what comes out."""
    encoder = nn.Sequential()
    for name, part in parts.items():
        encoder.add_module(name, part)
    encoder.add_module("pool", nn.AdaptiveAvgPool2d(1))
    encoder.add_module("flat", nn.Flatten())
    return encoder


def conv(stride=1, before=3):
    return nn.Conv2d(before, 3, 3, stride, 1)


def nested(*parts):
    return nn.Sequential(*parts)


def early(side=64, **parts):
    size = (side, side) if isinstance(side, int) else side
    return early_map(seeded(lambda: network(**parts)), (random(1, 3, *size),))


def down(*strides):
    return {f"s{i}": conv(stride) for i, stride in enumerate(strides)}


# What it is, its parts at 64 x 64 and their layer.
CASES = {
    "the smallest of 14 places": (down(2, 2, 2), "s1"),
    "the last of that size": (down(2, 2, 1, 1, 2), "s3"),
    "exactly 14 on the short side": ({"side": (56, 112), **down(2, 2, 2)}, "s1"),
    "13 are too few": ({"side": (52, 208), **down(2, 2, 2)}, "s0"),
    "all smaller: the largest": ({"side": 24, **down(2, 2)}, "s0"),
    "all smaller: the last of the largest": ({"side": 24, **down(2, 1, 2)}, "s1"),
    "all of one size: the first": (down(4, 1, 1), "s0"),
    "all smaller and of one size: the first": (down(8, 1, 1), "s0"),
    "a normalisation in front": ({"norm": nn.Identity(), **down(2, 1)}, "s0"),
    "a stem as large as the image": ({"norm": nn.BatchNorm2d(3), **down(1, 1, 4, 2)}, "s2"),
    "padding on top": ({**down(2, 2), "pad": nn.ZeroPad2d(1), "s2": conv(2)}, "s1"),
    "padding inside a block": ({"s0": conv(4), "b": nested(nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3, 2))}, "s0"),
    "padding in a block that keeps the size": (
        {"s0": conv(4), "b": nested(nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3)), "s1": conv(2)},
        "b",
    ),
    "a way back up": ({**down(2, 2, 2), "up": nn.Upsample(scale_factor=2)}, "s1"),
    "a block that goes down and up inside": (
        {"s0": conv(4), "b": nested(conv(2), nn.Upsample(scale_factor=2)), "s1": conv(2)},
        "b",
    ),
    "a stage comes before its parts": ({"s0": conv(4), "b": nested(conv(), conv()), "s1": conv(2)}, "b"),
    "parts where the stage goes on": ({"b": nested(conv(2), conv(2), nn.Tanh(), conv(2))}, "b.2"),
    "the fewest dots": ({"b": nested(nested(conv(2), conv(2)), nested(conv(), conv(2)))}, "b.0"),
    "an attention is no stage": ({"s0": conv(4), "attn": conv(), "s1": conv(2)}, "s0"),
    "an attention where there is no other": ({"attn": conv(4)}, "attn"),
    "one place is no map": ({"s0": conv(32), "one": nn.AdaptiveAvgPool2d(1)}, "s0"),
    "only as large as the image": (down(1, 1), "s0"),
}


@pytest.mark.parametrize(("parts", "layer"), CASES.values(), ids=CASES)
def test_the_layer_of_a_small_network_is_known_by_hand(parts, layer):
    assert early(**parts) == layer


@given(
    st.tuples(st.integers(8, 70), st.integers(8, 70)),
    st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_of_any_convolutions_it_is_the_end_of_the_smallest_of_14_places_or_of_the_largest(side, strides):
    sizes, (h, w) = [], side
    for stride in strides:
        h, w = (h - 1) // stride + 1, (w - 1) // stride + 1
        sizes.append((h, w))
    smaller = [size for size in sizes if 1 < size[0] * size[1] < side[0] * side[1]]
    if len(set(smaller)) > 1:
        wanted = min([size for size in smaller if min(size) >= 14] or [max(smaller)])
        assert early(side, **down(*strides)) == f"s{len(sizes) - 1 - sizes[::-1].index(wanted)}"
    elif smaller:
        assert early(side, **down(*strides)) == f"s{sizes.index(smaller[0])}"


class Odd(nn.Module):
    """An unused part, a repeated one, one whose gradient is cut, one that gives a tuple, and one of one place."""

    class Both(nn.Module):
        def forward(self, x):
            return x, x

    def __init__(self):
        super().__init__()
        self.first, self.unused, self.cut, self.both = conv(2), conv(), conv(), self.Both()
        self.again, self.last, self.one = nn.Tanh(), conv(2), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        a = self.again(self.first(x))
        self.unused(a)
        a = self.again(a + self.cut(a).detach())
        return self.one(self.last(self.both(a)[0])).flatten(1)


def test_maps_on_the_way_are_those_that_the_embedding_depends_on_in_the_order_of_their_calls():
    images = (random(2, 3, 20, 12),)
    assert list(maps_on_the_way(seeded(Odd), images).items()) == [("first", (10, 6)), ("last", (5, 3))]
    assert list(maps_on_the_way(ENCODER, (LARGE,)).items()) == [
        ("stem", (32, 32)),
        ("body.0", (32, 32)),
        ("body.1", (32, 32)),
        ("body", (32, 32)),
        ("late.0", (16, 16)),
        ("late.1", (16, 16)),
        ("late", (16, 16)),
    ]
    assert maps_on_the_way(ENCODER.forward, (LARGE,)) == maps_on_the_way(ENCODER, (LARGE,))
    assert maps_on_the_way(lambda x: ENCODER(x), (LARGE,)) == {}
    repeated = seeded(lambda: network(a=nested(*[conv(2)] * 2)))
    assert maps_on_the_way(repeated, images) == {"a": (5, 3)}
    alone = seeded(lambda: network(attn=(shared := nn.Tanh()), same=shared))
    assert maps_on_the_way(alone, images) == {"attn": (20, 12)}  # called twice, but there is no other
    cut = Modified(seeded(HeadEncoder), torch.detach)  # dependence cannot be seen
    assert list(maps_on_the_way(cut, images)) == [f"encoder.{n}" for n in ("conv1", "early", "conv2", "layer")]
