"""IntegratedDecomposition: eight steps of SimilarityDecomposition at a layer that it finds, and which that is."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from encoders import CONV, Function, Modified, TwoInputEncoder, pooled, random, seeded
from helpers import close, held, silent
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_cli import photos, run  # noqa: F401
from test_cli_compare import drawn, tensors, two  # noqa: F401
from test_model_untouched import state, users_model
from torch import nn

import captum_fam
from captum_fam import IntegratedDecomposition, SimilarityDecomposition, SimilarityScore, explain_episode
from captum_fam.engine.layers import early_map, last_map, maps_on_the_way

X, S, LARGE = random(3, 3, 32, 32), random(3, 4, seed=2), random(2, 3, 64, 64, seed=3)
SUPPORT, LABELS = random(4, 3, 32, 32, seed=7), [0, 0, 1, 1]


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
        more = more.reshape(len(x), -1) if torch.is_tensor(more) else more  # a row for each, or an error
        return self.head(self.late(self.body(torch.tanh(self.stem(x)))).flatten(2).mean(2)) + more


ENCODER = seeded(Staged)  # at 32 x 32 its layer is body, at 64 x 64 late
STEPS = {"n_steps": 8}


def eight_steps(encoder=ENCODER, layer=ENCODER.body):
    return SimilarityDecomposition(encoder, layer, **STEPS)


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
    assert (integrated.layer_of(X), integrated.route(X)) == ("body", "jacobian")
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


@pytest.mark.parametrize("layer", [ENCODER.stem, [ENCODER.stem, ENCODER.late]], ids=["one", "list"])
def test_a_layer_that_is_given_is_the_one(layer):
    given, plain = IntegratedDecomposition(ENCODER, layer), eight_steps(layer=layer)
    for call in ("a reference", "all", "pair", "matrix", "delta"):
        close(CALLS[call](given), CALLS[call](plain))
    assert given.route(X) == plain.route(X)
    later, of_function = IntegratedDecomposition(ENCODER), IntegratedDecomposition(lambda x: ENCODER(x), layer)
    later.layer = layer
    for method in (later, of_function):
        close(CALLS["all"](method), CALLS["all"](plain))


def test_options_are_those_of_the_decomposition():
    more = {"similarity": "dot"}, {"reshape_transform": lambda A: A.flip(3)}
    for options in ({"n_steps": 3}, {"baseline": "zero"}, *more):
        plain = SimilarityDecomposition(ENCODER, ENCODER.body, **STEPS | options)
        close(CALLS["all"](IntegratedDecomposition(ENCODER, **options)), CALLS["all"](plain))


def test_images_of_two_sizes_each_have_their_own_layer():
    integrated = IntegratedDecomposition(ENCODER)
    assert [integrated.layer_of(x) for x in (X, LARGE, X, X[..., ::4, ::4])] == ["body", "late", "body", "body"]
    for x, layer in ((LARGE, ENCODER.late), (X, ENCODER.body)):
        found = integrated.attribute(x, 1, reference_embedding=S)
        close(found, eight_steps(layer=layer).attribute(x, 1, reference_embedding=S))
        assert found.shape[2:] == (16, 16)


# Encoders and inputs of all kinds


def test_several_inputs_go_through_together():
    encoder, inputs = seeded(TwoInputEncoder), (random(2, 3, 16, 16), random(2, 1, 16, 16))
    integrated, plain = IntegratedDecomposition(encoder), eight_steps(encoder, encoder.layer.one)
    others = tuple(t.flip(0) for t in inputs)
    assert integrated.layer_of(inputs) == "layer.one"
    close(integrated.attribute(inputs, reference=others), plain.attribute(inputs, reference=others))
    close(integrated.attribute_pair(inputs, others), plain.attribute_pair(inputs, others))


PICK = {"output_selector": lambda output: output["z"]}
# What an encoder is wrapped in, the name of its layer, and options.
WRAPS = {
    "score": (lambda e: SimilarityScore(e, S), "body", {}),
    "bound method": (lambda e: e.forward, "body", {}),
    "DataParallel": (nn.DataParallel, "module.body", {}),
    "score in DataParallel": (lambda e: nn.DataParallel(SimilarityScore(e, S)), "body", {}),
    "compiled": (lambda e: torch.compile(e, backend="eager"), "body", {}),
    "compiled part": (lambda e: nn.Sequential(torch.compile(e, backend="eager")), "0._orig_mod.body", {}),
    "selector": (lambda e: Modified(e, lambda z: {"z": z}), "encoder.body", PICK),
    "score's selector": (lambda e: SimilarityScore(Modified(e, lambda z: {"z": z}), S, **PICK), "encoder.body", {}),
}


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_wrapped_encoder_has_the_maps_of_the_encoder(kind):
    if kind == "compiled part" and not hasattr(torch.compiler, "set_stance"):
        pytest.skip("this torch cannot run compiled parts of a model as they are")
    wrap, name, options = WRAPS[kind]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = copy.deepcopy(ENCODER).to(device)
    encoder.layer = encoder.body  # of Modified
    wrapped, x, s = wrap(encoder), X.to(device), S.to(device)
    if isinstance(wrapped, nn.Module):  # what is compiled has run
        wrapped.to(device)(x[:1].requires_grad_().clone())
    integrated = IntegratedDecomposition(wrapped, **options)
    assert integrated.layer_of(x) == name
    found = integrated.attribute(x, 1, **({} if "score" in kind else {"reference_embedding": s}))
    close(found.cpu(), eight_steps().attribute(X, 1, reference_embedding=S))


def test_the_layers_name_in_a_score_in_data_parallel_is_the_same_with_a_gpu_and_without():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parallel = nn.DataParallel(SimilarityScore(copy.deepcopy(ENCODER).to(device), S), None)
    # As with a GPU, where the encoder is put into a DataParallel model of its own.
    parallel.device_ids, parallel.output_device, parallel.dim = [0], 0, 0
    integrated, x = IntegratedDecomposition(parallel), X.to(device)
    assert integrated.layer_of(x) == "body"
    assert integrated._layers((x,), None) == [parallel.module.encoder.body]


class Needy(Staged):
    def forward(self, x, more):
        return super().forward(x, more)


def test_arguments_of_the_encoder_are_passed_on_row_by_row():
    encoder = seeded(Needy)
    found = CALLS["arguments"](IntegratedDecomposition(encoder))
    close(found, CALLS["arguments"](eight_steps(encoder, encoder.body)))


@pytest.mark.parametrize("dim", [1, 3])
def test_signals_and_volumes_have_a_layer(dim):
    encoder = seeded(lambda: Staged(dim))
    integrated, x = IntegratedDecomposition(encoder), random(2, 3, *[28] * dim)
    assert integrated.layer_of(x) == "body"
    assert integrated.layer_of(random(2, 3, *[28] * (dim - 1), 56)) == ("late" if dim == 1 else "body")
    close(integrated.attribute(x, reference=x), eight_steps(encoder, encoder.body).attribute(x, reference=x))


def test_an_empty_batch_has_an_empty_map():
    maps = IntegratedDecomposition(ENCODER).attribute(X[:0], reference_embedding=S[:1])
    assert maps.shape[:2] == (0, 1)


# Errors, and the model


NO_MAPS = {
    "function": lambda x: ENCODER(x),
    "flat": nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).double(),
    "one place": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten()).double(),
    "nothing": nn.Sequential(nn.Conv2d(3, 4, 3), *pooled(), Function(lambda z: z * 0 + 1)).double(),
}


@pytest.mark.parametrize("call", ["a reference", "pair", "matrix"])
@pytest.mark.parametrize("encoder", NO_MAPS.values(), ids=NO_MAPS)
def test_an_encoder_without_maps_is_told_to_pass_a_layer(encoder, call):
    with pytest.raises(ValueError, match=r"No layer of the encoder.*pass one as `layer`"):
        CALLS[call](IntegratedDecomposition(encoder))
    with pytest.raises(ValueError, match=r"No layer of the encoder.*pass one as `layer`"):
        IntegratedDecomposition(encoder).layer_of(X)


def test_other_methods_still_need_a_layer_and_a_wrong_one_is_named():
    for name in ("SimilarityDecomposition", "FeatureActivationMap", "ScoreCam", "RelevanceCam", "CorrespondenceMap"):
        with pytest.raises(TypeError, match=r"`layer`.*None"):
            getattr(captum_fam, name)(ENCODER, None)
    with pytest.raises(TypeError, match=r"`layer`.*None"):
        explain_episode(ENCODER, None, X, SUPPORT, LABELS)
    for layer in ("body", [], [None], 3):
        with pytest.raises(TypeError, match="`layer`"):
            IntegratedDecomposition(ENCODER, layer)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:The model is in training mode")
def test_a_call_leaves_the_model_and_gradient_mode_as_they_were(training, grad):
    model, x = users_model(training=training), random(3, 3, 8, 8).requires_grad_()
    integrated, before = IntegratedDecomposition(model), (state(model, x), held(model))
    calls = [lambda: integrated.attribute(x, reference=x), lambda: integrated.attribute_pair(x, x.detach())]
    for call in (*calls, lambda: integrated.layer_of(x)):
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


@pytest.mark.filterwarnings("ignore:The places of layer 'late'")
@pytest.mark.parametrize("method", ["IntegratedDecomposition", IntegratedDecomposition], ids=["name", "class"])
def test_a_comparison_lets_it_find_its_layer_and_an_instance_keep_its_own(method):
    score = SimilarityScore(ENCODER, S)
    late = SimilarityDecomposition(ENCODER, ENCODER.late)
    wanted = [eight_steps(), late, eight_steps(layer=ENCODER.stem), eight_steps()]
    methods = [method, "SimilarityDecomposition"]
    methods += [IntegratedDecomposition(score, ENCODER.stem), IntegratedDecomposition(score)]
    maps = captum_fam.compare_attributions(score, ENCODER.late, X, [2, 0, 1], methods, show_progress=False)
    for found, plain in zip(maps.values(), wanted, strict=True):
        close(found, F.interpolate(CALLS["targets"](plain), X.shape[2:], mode="bilinear"))


def test_the_command_line_compares_it_at_its_own_layer(run, two, drawn, tmp_path):  # noqa: F811
    options = {"--size": 64, "--method": "IntegratedDecomposition", "--layer": "features", "-o": tmp_path / "out.png"}
    assert run("compare", *two, *[word for pair in options.items() for word in pair])[0] == 0
    encoder, x = tensors(two, 64)
    own = IntegratedDecomposition(encoder).layer_of(x)
    assert own != "features"
    plain = eight_steps(encoder, encoder.get_submodule(own))
    expected = F.interpolate(plain.attribute(x, reference=x.flip(0)), (64, 64), mode="bilinear")
    (found,) = drawn[0][1].values()
    close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


each_layer = pytest.mark.parametrize("layer", [None, ENCODER.stem], ids=["found", "given"])


EPISODES = {
    "cosine": {},
    "distance": {"similarity": "euclidean", "internal_batch_size": 18},
    "PrototypicalNetworks": {},
}


@each_layer
@pytest.mark.parametrize("kind", EPISODES)
def test_an_episode_is_explained_with_and_without_a_layer(layer, kind):
    of_easyfsl = kind == "PrototypicalNetworks"
    of = pytest.importorskip("easyfsl.methods").PrototypicalNetworks(ENCODER) if of_easyfsl else ENCODER
    episode, options = (X, SUPPORT, torch.tensor(LABELS)), EPISODES[kind]
    found = explain_episode(of, layer, *episode, method=IntegratedDecomposition, **options)
    options = {"method": SimilarityDecomposition, **STEPS, **options}
    expected = explain_episode(of, layer or ENCODER.body, *episode, **options)
    for name in ("scores", "similarities", "constants", "maps", "signed_maps"):
        close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
    assert found.route == expected.route == "jacobian"


@each_layer
def test_hits_are_explained_with_and_without_a_layer(layer):
    index = pytest.importorskip("faiss").IndexFlatL2(4)
    encoder = copy.deepcopy(ENCODER).float()
    layer, body = None if layer is None else encoder.stem, encoder.body
    gallery, query = random(5, 3, 32, 32, seed=8).float(), X.float()
    with torch.no_grad():
        index.add(encoder(gallery).numpy())
    found = captum_fam.explain_retrieval(query, index, encoder, layer, gallery, 2, method=IntegratedDecomposition)
    options = {"method": SimilarityDecomposition, **STEPS}
    expected = captum_fam.explain_retrieval(query, index, encoder, layer or body, gallery, 2, **options)
    for name in ("indices", "maps", "signed_maps", "hit_maps"):
        close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


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
MLP = {**TOKENS, "intermediate_size": 32}
TIMM = {"img_size": 32, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2}
STAGES = {"hidden_sizes": [8, 12, 12], "depths": [1, 1, 1], "num_stages": 3}
# Library, model, options, side of the images, layer. Of ConvNeXt, the second stage has 16 x 16 places.
LIBRARIES = {
    "timm ViT": ("timm", "vit_tiny_patch16_224", TIMM, 32, "patch_embed"),
    "timm ViT, mean": ("timm", "vit_tiny_patch16_224", {**TIMM, "global_pool": "avg"}, 32, "patch_embed"),
    "timm ConvNeXt": ("timm", "convnext_atto", {"depths": (1,) * 4, "dims": (6, 6, 12, 12)}, 128, "stages.1"),
    "ViT": ("transformers", "ViT", MLP, 32, "embeddings"),
    "ViT of 4 x 4": ("transformers", "ViT", {**MLP, "patch_size": 8}, 32, "embeddings"),
    "Dinov2": ("transformers", "Dinov2", {**TOKENS, "mlp_ratio": 2}, 32, "embeddings"),
    "CLIP": ("transformers", "CLIPVision", MLP, 32, "embeddings"),
    "ConvNeXt": ("transformers", "ConvNext", STAGES, 128, "encoder.stages.1"),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_of_other_libraries_it_is_the_end_of_a_stage_or_the_patches_as_they_come_in(name):
    package, kind, options, side, layer = LIBRARIES[name]
    library, selector = pytest.importorskip(package), None
    if package == "timm":
        model = seeded(lambda: library.create_model(kind, num_classes=0, **options))
    else:
        selector = lambda output: output.pooler_output.flatten(1)  # noqa: E731
        config = getattr(library, f"{kind}Config")(**options)
        model = seeded(lambda: getattr(library, f"{kind}Model")(config))
    images = random(1, 3, side, side)
    with torch.no_grad():  # weights not so small that the class token hardly sees the patches
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    integrated = IntegratedDecomposition(model, output_selector=selector)
    assert integrated.layer_of(images) == early_map(model, (images,), None, selector) == layer
    maps = integrated.attribute(images, reference=images.flip(3))
    assert maps.any()
    assert maps.shape[2:] == ((4, 4) if "4 x 4" in name else (16, 16))


def network(**parts):
    """Modules by name, one after another, with the mean of what comes out."""
    return nn.Sequential(OrderedDict(**parts, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))


def conv(stride=1, padding=1):
    return nn.Conv2d(3, 3, 3, stride, padding)


def along(width, height=1, stride=1):
    return nn.Conv2d(3, 3, (height, width), stride)


def down(*strides):
    return {f"s{i}": conv(stride) for i, stride in enumerate(strides)}


def early(side=64, **parts):
    size = (side, side) if isinstance(side, int) else side
    return early_map(seeded(lambda: network(**parts)), (random(1, 3, *size),))


up, block = nn.Upsample(scale_factor=2), nn.Sequential
# What it is, its parts at 64 x 64 and their layer.
CASES = {
    "the smallest of 14 places": (down(2, 2, 2), "s1"),
    "the last of that size": (down(2, 2, 1, 1, 2), "s3"),
    "exactly 14 on the short side": ({"side": (56, 112), **down(2, 2, 2)}, "s1"),
    "13 are too few": ({"side": (52, 208), **down(2, 2, 2)}, "s0"),
    "all smaller: the largest": ({"side": 24, **down(2, 2)}, "s0"),
    "all smaller: the last of the largest": ({"side": 24, **down(2, 1, 2)}, "s1"),
    "all of one size: the first": (down(4, 1, 1), "s0"),
    "a normalisation in front": ({"norm": nn.Identity(), **down(2, 1)}, "s0"),
    "a stem as large as the image": ({"norm": nn.BatchNorm2d(3), **down(1, 1, 4, 2)}, "s2"),
    "padding of what is too small": ({"side": 48, **down(2, 2), "pad": nn.ZeroPad2d(1), "s2": conv(2, 0)}, "s0"),
    "padding in a block": ({"side": 48, **down(2, 2), "b": block(nn.ZeroPad2d(1), conv(1, 0))}, "s0"),
    "a way back up": ({**down(2, 4), "up": up}, "s0"),
    "a block that goes down and up": ({"s0": conv(4), "b": block(conv(2), up), "s1": conv(2)}, "b"),
    "two of them": ({"s0": conv(4), "b": block(conv(2), up), "c": block(conv(2), up), "s1": conv(2)}, "c"),
    "a stage comes before its parts": ({"s0": conv(4), "b": block(conv(), conv()), "s1": conv(2)}, "b"),
    "parts where the stage goes on": ({"b": block(conv(2), conv(2), nn.Tanh(), conv(2))}, "b.2"),
    "the fewest dots": ({"b": block(block(conv(2), conv(2)), block(conv(), conv(2)))}, "b.0"),
    "an attention is no stage": ({"s0": conv(4), "attn": conv(), "s1": conv(2)}, "s0"),
    "an attention where there is no other": ({"attn": conv(4)}, "attn"),
    "one place is no map": ({"s0": conv(32), "one": nn.AdaptiveAvgPool2d(1)}, "s0"),
    "only as large as the image": (down(1, 1), "s0"),
    "electrodes by time": (
        {"side": (63, 250), "time": along(25), "mean": nn.AvgPool2d((1, 51), (1, 5)), "space": along(1, 63)},
        "mean",
    ),
    "strides that differ": ({"side": (64, 100), **{f"s{i}": along(5, 3, (i + 1, 2)) for i in range(3)}}, "s1"),
}


@pytest.mark.parametrize(("parts", "layer"), CASES.values(), ids=CASES)
def test_the_layer_of_a_small_network_is_known_by_hand(parts, layer):
    assert early(**parts) == layer


class Heads(nn.Module):
    """What is given to the heads of an attention, (B, heads, N, C): no map, though it has the dimensions of one."""

    def __init__(self):
        super().__init__()
        self.stem, self.split, self.mix = (
            nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU()),
            nn.Identity(),
            nn.Linear(4, 4),
        )

    def forward(self, x):
        heads = self.mix(self.split(self.stem(x).flatten(2).unflatten(1, (4, 4)).mT))
        return heads.mT.flatten(1, 2).mean(2)


@pytest.mark.parametrize("size", [(224, 160), (112, 112)])
def test_what_has_four_dimensions_is_a_map_if_its_size_is_that_of_one(size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, x = Heads().eval(), torch.rand(1, 3, *size)
    assert last_map(encoder, (x,)) == early_map(encoder, (x,)) == "stem"


SIDES = st.integers(8, 70)


@given(st.tuples(SIDES, SIDES), st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_of_any_convolutions_it_is_the_end_of_the_smallest_of_14_places_or_of_the_largest(side, strides):
    sizes, (h, w) = [], side
    for stride in strides:
        h, w = (h - 1) // stride + 1, (w - 1) // stride + 1
        sizes.append((h, w))
    smaller = [size for size in sizes if 1 < size[0] * size[1] < side[0] * side[1]]
    assume(smaller)
    wanted = min([size for size in smaller if min(size) >= 14] or [max(smaller)])
    number = sizes.index(wanted) + (sizes.count(wanted) - 1 if len(set(smaller)) > 1 else 0)
    assert early(side, **down(*strides)) == f"s{number}"


class Odd(nn.Module):
    """An unused part, a repeated one, one whose gradient is cut, one that gives a tuple, and one of one place."""

    def __init__(self):
        super().__init__()
        self.first, self.unused, self.cut, self.both = conv(2), conv(), conv(), Function(lambda x: (x, x))
        self.again, self.last, self.one = nn.Tanh(), conv(2), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        a = self.again(self.first(x))
        self.unused(a)
        a = self.again(a + self.cut(a).detach())
        return self.one(self.last(self.both(a)[0])).flatten(1)


def test_maps_on_the_way_are_those_that_the_embedding_depends_on_in_the_order_of_their_calls():
    images = (random(2, 3, 20, 12),)
    assert list(maps_on_the_way(seeded(Odd), images).items()) == [("first", (10, 6)), ("last", (5, 3))]
    early_names, late_names = ["stem", "body.0", "body.1", "body"], ["late.0", "late.1", "late"]
    expected = [(name, (32, 32)) for name in early_names] + [(name, (16, 16)) for name in late_names]
    assert list(maps_on_the_way(ENCODER, (LARGE,)).items()) == expected
    assert maps_on_the_way(ENCODER.forward, (LARGE,)) == maps_on_the_way(ENCODER, (LARGE,))
    assert maps_on_the_way(lambda x: ENCODER(x), (LARGE,)) == {}
    repeated = seeded(lambda: network(a=block(*[conv(2)] * 2)))
    assert maps_on_the_way(repeated, images) == {"a": (5, 3)}
    alone = seeded(lambda: network(attn=(shared := nn.Tanh()), same=shared))
    assert maps_on_the_way(alone, images) == {"attn": (20, 12)}  # called twice, but there is no other
