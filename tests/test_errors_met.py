"""Errors that people met who were new to the package: each says the next right step, and the step works."""

import functools
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import Modified, PooledEncoder, random, seeded
from helpers import silent
from PIL import Image
from test_cli import run  # noqa: F401
from torch import nn

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    IntegratedDecomposition,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
    explain_episode,
    nearest_references,
    prototypes,
)

X = random(3, 3, 8, 8)
S = random(4, 6, seed=2)
LABELS = torch.tensor([0, 1, 1])


# Encoders that compare


class Siamese(nn.Module):
    def __init__(self, name="encoder"):
        super().__init__()
        self.head = nn.Linear(6, 1).double()
        self.add_module(name, seeded(PooledEncoder))
        self.branch_name = name

    def branch(self):
        return getattr(self, self.branch_name)

    def forward(self, x1, x2):
        return self.head((self.branch()(x1) - self.branch()(x2)).abs())


class Once(Siamese):
    """As in many tutorials: a part, and a method that embeds by that part and a layer more."""

    def __init__(self):
        super().__init__("cnn")
        self.fc = nn.Linear(6, 5).double()

    def forward_once(self, x):
        return self.fc(self.cnn(x))

    def forward(self, x1, x2):
        return self.forward_once(x1), self.forward_once(x2)


class Triplet(Siamese):
    def forward(self, anchor, positive, negative):
        return tuple(map(self.branch(), (anchor, positive, negative)))


class Momentum(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_q, self.encoder_k = seeded(PooledEncoder), seeded(PooledEncoder, 2)
        self.predictor = nn.Linear(6, 6).double()

    def forward(self, view1, view2):
        return self.predictor(self.encoder_q(view1)), self.encoder_k(view2)


def layer_of(model):
    return next(m.layer for m in model.modules() if isinstance(m, PooledEncoder))


CALLS = {
    "attribute": lambda f, layer: FeatureActivationMap(f, layer).attribute(X, 1, reference_embedding=S),
    "attribute, no target": lambda f, layer: FeatureActivationMap(f, layer).attribute(X, reference_embedding=S),
    "reference": lambda f, layer: FeatureActivationMap(f, layer).attribute(X, reference=X),
    "attribute_all": lambda f, layer: SimilarityDecomposition(f, layer).attribute_all(X, reference_embedding=S),
    "attribute_pair": lambda f, layer: FeatureActivationMap(f, layer).attribute_pair(X, X),
    "embed": lambda f, layer: FeatureActivationMap(f, layer).embed(X),
    "integrated": lambda f, layer: IntegratedDecomposition(f, layer).attribute(X, 1, reference_embedding=S),
    "layer found": lambda f, layer: IntegratedDecomposition(f).attribute(X, 1, reference_embedding=S),
    "Relax": lambda f, layer: Relax(f, n_samples=2).attribute(X, 1, reference_embedding=S),
    "ScoreCam": lambda f, layer: ScoreCam(f, layer).attribute(X, 1, reference_embedding=S),
    "label-free": lambda f, layer: LabelFreeActivationMap(f, layer).attribute(X),
    "correspondence": lambda f, layer: CorrespondenceMap(f, layer).attribute(X, reference=X),
    "score": lambda f, layer: SimilarityScore(f, S)(X),
    "method of a score": lambda f, layer: FeatureActivationMap(SimilarityScore(f, S), layer).attribute(X, 1),
    "episode": lambda f, layer: explain_episode(f, layer, X, X, LABELS),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_an_encoder_of_two_inputs_is_told_its_branch(call):
    siamese = Siamese().eval()
    with pytest.raises(TypeError, match=r"Siamese.forward\(\) missing.*'x2'.*pass model\.encoder, .* as `reference`"):
        call(siamese, layer_of(siamese))


@pytest.mark.parametrize(
    ("build", "advice"),
    [
        (Siamese, "model.encoder"),
        (lambda: Siamese("embedding_net"), "model.embedding_net"),
        (lambda: Siamese("backbone"), "model.backbone"),
        (Triplet, "model.encoder"),
        (Once, "model.forward_once"),  # not its part, which lacks a layer
        (Momentum, "model.encoder_q or model.encoder_k"),
    ],
)
def test_the_branch_is_found_by_name_and_embeds(build, advice):
    model = build().eval()
    call = CALLS["attribute"]
    with pytest.raises(TypeError, match=re.escape(f"pass {advice}, and")):
        call(model, layer_of(model))
    branch = getattr(model, advice.split(" or ")[0].removeprefix("model."))
    assert FeatureActivationMap(branch, layer_of(model)).attribute(X, reference=X).shape == (3, 1, 4, 4)


class Maps(Siamese):
    """Its part gives maps, which are no embeddings."""

    def branch(self):
        return lambda x: self.encoder(x).mean((2, 3))

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 6, 3).double()


def test_a_part_that_gives_no_embeddings_or_has_another_name_is_not_advised():
    for model in (Maps().eval(), Siamese("left").eval()):
        with pytest.raises(TypeError, match="compares several inputs, pass the part of it that embeds one, and"):
            FeatureActivationMap(model, nn.ReLU()).attribute(X, reference=X)


@pytest.mark.parametrize(
    "around",
    [
        lambda model: lambda x: model(x),
        lambda model: functools.partial(model),
        lambda model: model.forward,
        nn.DataParallel,
    ],
    ids=["lambda", "partial", "bound method", "DataParallel"],
)
def test_the_branch_is_found_behind_what_is_around_the_model(around):
    model = Siamese().eval()
    with pytest.raises(TypeError, match=r"Siamese.forward\(\) missing.*pass model\.encoder, "):
        FeatureActivationMap(around(model), layer_of(model)).attribute(X, reference=X)


def test_a_function_of_two_inputs_is_told_so():
    with pytest.raises(TypeError, match=r"<lambda>\(\) missing.*'b'.*`additional_forward_args`"):
        FeatureActivationMap(lambda a, b: a, nn.ReLU()).attribute(X, reference=X)


def test_arguments_that_are_missing_may_be_further_ones():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = seeded(PooledEncoder)

        def forward(self, x, scale):
            return self.net(x) * scale

    fam = FeatureActivationMap(model := Scaled().eval(), model.net.layer)
    with pytest.raises(TypeError, match=r"pass the missing arguments as `additional_forward_args`\.$"):
        fam.attribute(X, reference=X)
    fam.attribute(X, None, 2.0, reference=X)


def test_more_inputs_than_the_encoder_takes_are_an_error_that_says_where_they_go():
    encoder = seeded(PooledEncoder)
    with pytest.raises(TypeError, match=r"2 tensors.*PooledEncoder|_Convolutions.*takes 2 .*the `reference`"):
        FeatureActivationMap(encoder, encoder.layer).attribute((X, X), 1, reference_embedding=S)


class ByName(Siamese):
    def forward(self, *, image, scale=1.0):
        return self.encoder(image) * scale


def test_an_encoder_that_takes_its_input_by_name_says_how_to_pass_it():
    model = ByName().eval()
    with pytest.raises(TypeError, match=r"It takes image, scale by name: pass lambda x: model\(image=x\)"):
        FeatureActivationMap(model, layer_of(model)).attribute(X, reference=X)
    FeatureActivationMap(lambda x: model(image=x), layer_of(model)).attribute(X, reference=X)


class NoForward(nn.Module):
    """As of Lightning, which trains it by other methods."""

    def __init__(self, name="backbone"):
        super().__init__()
        self.add_module(name, seeded(PooledEncoder))


@pytest.mark.parametrize(
    ("build", "advice"),
    [
        (NoForward, "Pass model.backbone."),
        (lambda: nn.ModuleDict({"student": seeded(PooledEncoder)}), "Pass model.student."),
        (lambda: nn.ModuleList([seeded(PooledEncoder)]), "Pass the part of it that embeds."),
        (lambda: NoForward("left"), "Pass the part of it that embeds."),
    ],
)
def test_a_module_without_a_forward_pass_is_told_its_part(build, advice):
    model = build().eval()
    with pytest.raises(TypeError, match=f"cannot be called: .*{re.escape(advice)}"):
        FeatureActivationMap(model, layer_of(model)).attribute(X, reference=X)


def test_a_class_in_place_of_a_module_is_told_so():
    for name, call in {
        "forward_func": lambda: FeatureActivationMap(PooledEncoder, nn.ReLU()),
        "encoder": lambda: SimilarityScore(PooledEncoder, S),
    }.items():
        with pytest.raises(TypeError, match=rf"`{name}`.*the class PooledEncoder; pass an instance, PooledEncoder\("):
            call()


def test_a_loss_in_place_of_embeddings_is_told_so():
    encoder = Modified(seeded(PooledEncoder), lambda z: z.square().sum())
    with pytest.raises(ValueError, match=r"shape \(\); .*if this is a loss or a score, pass the part .* that embeds"):
        FeatureActivationMap(encoder, encoder.layer).attribute(X, reference=X)


def test_the_model_itself_as_a_layer_is_named_by_its_kind():
    encoder = nn.LSTM(4, 6, batch_first=True).double()
    fam = FeatureActivationMap(encoder, encoder, output_selector=lambda output: output[0][:, -1])
    with pytest.raises(ValueError, match="of layer LSTM look like"):
        fam.attribute(x := random(2, 20, 4), reference=x)


class Wrong(nn.Module):
    """Whose own code calls a part of it wrongly, or raises what looks like Python's error."""

    def __init__(self, how):
        super().__init__()
        self.encoder, self.how = seeded(PooledEncoder), how
        self.siamese = Siamese()

    def forward(self, x):
        return self.how(self, x)


@pytest.mark.parametrize(
    "how",
    [
        lambda self, x: self.siamese(x),
        lambda self, x: Siamese.forward(self.siamese, x),
        lambda self, x: (lambda a, b: a)(x),
        lambda self, x: exec('raise TypeError("Wrong.forward() missing 1 required positional argument")'),
        lambda self, x: x + None,
        lambda self, x: NoForward().double()(x),
        lambda self, x: self.encoder(x, x),
    ],
)
def test_an_error_from_inside_the_encoder_is_its_own(how):
    model = Wrong(how).eval()
    with pytest.raises((TypeError, NotImplementedError)) as alone:
        model(X)
    with pytest.raises((TypeError, NotImplementedError)) as met:
        FeatureActivationMap(model, model.encoder.layer).attribute(X, reference=X)
    assert str(met.value) == str(alone.value)


def test_the_search_for_a_branch_leaves_the_model_as_it_was():
    model = Siamese()
    model.encoder = nn.Sequential(seeded(PooledEncoder), nn.BatchNorm1d(6).double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"pass model\.encoder, "):
        FeatureActivationMap(model, layer_of(model)).attribute(X, reference=X)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_score_in_place_of_an_embedding_is_told():
    compared = Modified(seeded(PooledEncoder), lambda z: z[:, :1])
    fam = FeatureActivationMap(compared, compared.layer)
    with pytest.warns(UserWarning, match="one dimension, so every cosine is 1 or -1.*pass the part of it that embeds"):
        fam.attribute(X, reference=X)
    with silent():  # a classifier of one output
        FeatureActivationMap(compared, compared.layer, similarity="dot").attribute(X, reference=X)


# What encoders return


OUTPUTS = {
    "one key": (lambda z: {"tokens": z[:, None], "z": z, "none": None}, r"lambda output: output\['z'\], of the keys"),
    "two keys": (lambda z: {"a": z, "b": z}, r"lambda output: output\[key\] with one of the keys \['a', 'b'\]"),
    "logits": (lambda z: {"logits": z}, r"output\[key\] with one of the keys \['logits'\]"),
    "lengths": (lambda z: (z, z.norm(dim=1, keepdim=True)), r"lambda output: output\[0\], or call model\.eval\(\)"),
    "list of training": (lambda z: [z, z], r"lambda output: output\[i\], or call model\.eval\(\)"),
    "maps first": (lambda z: (z[..., None, None], z), r"lambda output: output\[1\]"),
}


@pytest.mark.parametrize(("function", "advice"), OUTPUTS.values(), ids=OUTPUTS)
def test_the_embeddings_in_an_output_are_named_where_that_is_clear(function, advice):
    encoder = Modified(seeded(PooledEncoder), function)
    with pytest.raises(TypeError, match=advice):
        FeatureActivationMap(encoder, encoder.layer).attribute(X, reference=X)


@pytest.mark.parametrize(
    ("function", "selector", "message"),
    [
        (lambda z: {"z": z}, lambda o: o.pooler_output, r"dict: AttributeError.*output\['z'\]"),
        (lambda z: {"z": z}, lambda o: o["y"], r"dict: KeyError.*output\['z'\]"),
        (lambda z: (z,), lambda o: o["z"], r"tuple of 1: TypeError.*output\[0\]"),
        (lambda z: (z,), lambda o: o[1], r"tuple of 1: IndexError.*output\[0\]"),
        (lambda z: z, lambda o: o.pooler_output, r"\(3, 6\): AttributeError.*are embeddings \(B, D\), so leave it out"),
    ],
)  # fmt: skip
def test_an_output_selector_that_does_not_fit_says_what_the_encoder_returns(function, selector, message):
    encoder = Modified(seeded(PooledEncoder), function)
    with pytest.raises(TypeError, match=f"`output_selector` fails on what the encoder returns, .*{message}"):
        FeatureActivationMap(encoder, encoder.layer, output_selector=selector).attribute(X, reference=X)


# CLIP, step by step


def tower(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    layers = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = {**layers, "vocab_size": 20}, {**layers, "image_size": 32, "patch_size": 8}
    if kind == "Blip":
        text["encoder_hidden_size"] = 24
    options = {} if kind == "Siglip" else {"projection_dim": 24}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **options)
    return getattr(transformers, f"{kind}Model")(config).eval()


PHOTOS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEXTS = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 3, 4]])


def pooled(output):
    return getattr(output, "pooler_output", output)  # a tensor before transformers 5


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Blip"])
def test_a_user_of_clip_meets_the_encoder_then_the_layer_then_the_target(kind):
    model = tower(kind)
    of_texts = next(m for name, m in model.text_model.named_modules() if name.endswith("1"))
    of_images = model.vision_model.encoder.layers[-1].layer_norm1

    def step(function, layer, selector=None, target=None):
        fam = FeatureActivationMap(function, layer, output_selector=selector)
        return fam.attribute(PHOTOS, target, reference_embedding=TEXTS)

    for function in (model, lambda x: model(pixel_values=x), lambda x: model(x), model.get_text_features):
        with pytest.raises(TypeError, match=rf"{kind}Model .*pass model\.get_image_features, which embeds"):
            step(function, of_texts)
    if not isinstance(model.get_image_features(PHOTOS), torch.Tensor):
        with pytest.raises(TypeError, match=r"lambda output: output\['pooler_output'\]"):
            step(model.get_image_features, of_texts)
    with pytest.raises(ValueError, match=r"`layer`.*text_model.* was not called.*a map is 'vision_model\.[\w.]+'") as e:
        step(model.get_image_features, of_texts, pooled)
    advised = model.get_submodule(re.search(r"a map is '([\w.]+)'", str(e.value)).group(1))
    if kind == "CLIP":  # embedded by the class token: after the last attention, no patch has a part in it
        with pytest.raises(ValueError, match="has no map; choose a layer before the last attention, such as"):
            step(model.get_image_features, model.vision_model.encoder.layers[-1], pooled)
    with pytest.raises(ValueError, match=r"`target` is needed to choose among 3 references for 2 inputs"):
        step(model.get_image_features, advised, pooled)
    assert step(model.get_image_features, advised, pooled, 1).shape == (2, 1, 4, 4)
    assert step(model.get_image_features, of_images, pooled, 1).any()


def test_texts_go_to_reference_embedding():
    model = tower("CLIP")
    layer = model.vision_model.encoder.layers[-1].layer_norm1
    fam = FeatureActivationMap(model.get_image_features, layer, output_selector=pooled)
    with pytest.raises(ValueError, match=r"`reference`.*\(3, 3\).*of texts too.*pass them as reference_embedding"):
        fam.attribute(PHOTOS, 1, reference=TOKENS)
    with pytest.raises(TypeError, match=r"got integers of shape \(3, 3\), which look like tokens of texts"):
        fam.embed(TOKENS)
    output = model.get_text_features(TOKENS)
    if not isinstance(output, torch.Tensor):
        with pytest.raises(TypeError, match=r"`reference_embedding`.*the embeddings in it, output\['pooler_output'\]"):
            fam.attribute(PHOTOS, 1, reference_embedding=output)
    assert fam.attribute(PHOTOS, 1, reference_embedding=pooled(output)).any()


def test_what_a_processor_returns_is_opened():
    with pytest.raises(TypeError, match=r"`inputs`.*pass one of its values, inputs\[key\] .*\['pixel_values'\]"):
        FeatureActivationMap(seeded(PooledEncoder), nn.ReLU()).embed({"pixel_values": X})


def test_an_error_of_the_image_tower_is_its_own():
    model = tower("CLIP")
    layer = model.vision_model.encoder.layers[-1].layer_norm1
    fam = FeatureActivationMap(lambda x: model(input_ids=TOKENS, pixel_values=x), layer)
    with pytest.raises(ValueError, match=r"\(40\*40\)"):
        fam.embed(torch.rand(3, 3, 40, 40))


class TextsOptional(nn.Module):
    """Takes texts, too, but needs none; its layer runs twice, so that a path's points cannot go on in one batch."""

    def __init__(self):
        super().__init__()
        self.encoder = seeded(PooledEncoder)

    def get_image_features(self, pixel_values):
        return self.encoder(pixel_values)

    def forward(self, pixel_values, input_ids=None):
        return self.get_image_features(pixel_values) + self.get_image_features(pixel_values)


def test_what_only_turns_a_call_to_another_way_is_no_error():
    model = TextsOptional().eval()
    layer = model.encoder.layer
    with pytest.warns(UserWarning, match="called several times"):
        maps = SimilarityDecomposition(model, layer, n_steps=2, baseline="zero").attribute(X, 1, reference_embedding=S)
    assert maps.any()


def test_a_user_of_open_clip_reaches_a_map():
    open_clip = pytest.importorskip("open_clip").model
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    model = open_clip.CLIP(24, vision, open_clip.CLIPTextCfg(8, 20, 32, 2, 2)).eval()
    of_texts, of_images = model.transformer.resblocks[-1], model.visual.transformer.resblocks[-1].ln_1

    def step(function, layer, target=None):
        return FeatureActivationMap(function, layer).attribute(PHOTOS, target, reference_embedding=TEXTS)

    with pytest.raises(TypeError, match=r"lambda output: output\[0\]"):  # the images' embeddings, None, the scale
        step(model, of_texts)
    with pytest.raises(TypeError, match=r"CLIP took images for texts; pass model\.encode_image"):
        step(model.encode_text, of_texts)
    with pytest.raises(ValueError, match=r"was not called.*a map is 'visual\.transformer\.resblocks\.1\.ln_1'"):
        step(model.encode_image, of_texts)
    with pytest.raises(ValueError, match="`target` is needed"):
        step(model.encode_image, of_images)
    assert step(model.encode_image, of_images, 1).any()


@pytest.mark.parametrize("method", [FeatureActivationMap, SimilarityDecomposition, ScoreCam, RelevanceCam])
@pytest.mark.parametrize("dependent", [False, True], ids=["evaluation", "batch norm in training"])
def test_without_a_target_the_encoder_runs_once_for_one_input_so_that_its_errors_come_first(method, dependent):
    sizes = []

    class Counted(Modified):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    encoder = Counted(seeded(PooledEncoder), lambda z: z).eval()
    if dependent:
        encoder.norm = nn.BatchNorm1d(6).train()
    with pytest.raises(ValueError, match="`target` is needed"):
        method(encoder, encoder.layer).attribute(X, reference_embedding=S)
    assert sizes == [3 if dependent else 1]
    with pytest.raises(ValueError, match=r"ReLU was not called"):
        method(encoder, nn.ReLU()).attribute(X, reference_embedding=S)


def test_without_a_target_correspondences_too_tell_the_layer_first():
    encoder = seeded(PooledEncoder)
    with pytest.raises(ValueError, match=r"ReLU was not called.*a map is 'layer'"):
        CorrespondenceMap(encoder, nn.ReLU()).attribute(X, reference=random(4, 3, 8, 8))


def test_embeddings_as_reference_are_told_their_argument():
    fam = FeatureActivationMap(encoder := seeded(PooledEncoder), encoder.layer)
    with pytest.raises(ValueError, match=r"`reference` .*\(4, 6\); embeddings.* pass them as reference_embedding"):
        fam.attribute(X, 1, reference=S)
    signals = nn.Sequential(nn.Conv1d(3, 6, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double()
    with pytest.raises(ValueError, match=r"reference\[None\] for a single one; embeddings.*reference_embedding"):
        FeatureActivationMap(signals, signals[0]).attribute(X[:, :, 0], 1, reference=S)


def test_a_layer_of_none_says_which():
    with pytest.raises(TypeError, match="pass the last one with a map, or take IntegratedDecomposition, which finds"):
        FeatureActivationMap(seeded(PooledEncoder), None)


# Labels


NAMES = ["dog", "cat", "dog"]


@pytest.mark.parametrize("names", [NAMES, tuple(NAMES), np.array(NAMES), np.array(NAMES, dtype=object)], ids=type)
def test_names_in_place_of_labels_say_how_to_number_them(names):
    encoder, z = seeded(PooledEncoder), S[:3]
    for call, argument in (
        (lambda labels: prototypes(z, labels), "labels"),
        (lambda labels: nearest_references(z, z, labels, k=2), "labels"),
        (lambda labels: explain_episode(encoder, encoder.layer, X, X, labels), "support_labels"),
    ):
        with pytest.raises(TypeError, match=rf"`{argument}` to be integers, but got \['dog', 'cat', 'dog'\]; .*numpy"):
            call(names)
    classes, labels = np.unique(names, return_inverse=True)  # the cure
    episode = explain_episode(encoder, encoder.layer, X, X, labels)
    assert classes[episode.predicted.numpy()].tolist() == NAMES


def test_many_names_are_not_all_told_and_one_is_a_number_that_is_missing():
    with pytest.raises(TypeError, match=r"got \['a', 'b', 'c', \.\.\.\]; "):
        prototypes(S, list("abcd"))
    encoder = seeded(PooledEncoder)
    with pytest.raises(TypeError, match=r"`label` to be integers, but got 'cat'; pass the number of that name"):
        explain_episode(encoder, encoder.layer, X, X, LABELS).map("cat")


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0.0, 1, 1]), TypeError, r"float32.*labels\.long\(\)"),
        (torch.tensor([True, False, True]), TypeError, r"bool.*labels\.long\(\)"),
        (torch.eye(3, dtype=torch.long), ValueError, r"\(3, 3\); for one-hot labels pass labels\.argmax\(1\)"),
        (torch.zeros(2, dtype=torch.long), ValueError, r"\(2,\)\.$"),
        ([None, 1, 2], TypeError, "NoneType"),
        ([[1], [1, 2], [3]], TypeError, "list: "),
    ],
)  # fmt: skip
def test_labels_of_another_kind_say_what_to_do(labels, error, message):
    with pytest.raises(error, match=message):
        prototypes(S[:3], labels)


# The decision over a bank


def test_nearest_references_print_as_one_short_line():
    found = nearest_references(S, random(9, 6), list(range(9)), k=5)
    assert repr(found) == (
        "NearestReferences(predicted=(4,), classes=(9,), scores=(4, 9), indices=(4, 5), agrees=(4, 5),"
        " reference_embedding=(4, 6))"
    )
    assert found == (*found,)  # still a tuple


def test_images_in_place_of_embeddings_are_embedded_first():
    for call in (lambda: nearest_references(X, S, [0, 1, 2, 3], k=1), lambda: prototypes(X, [0, 1, 2])):
        with pytest.raises((TypeError, ValueError), match=r"\(3, 3, 8, 8\); embed images first"):
            call()


def test_a_single_embedding_says_how_to_be_a_batch():
    with pytest.raises(TypeError, match=r"`embedding`.*\(6,\); a single embedding is embedding\[None\]"):
        nearest_references(S[0], S, [0, 1, 2, 3], k=1)


# Layers without a map


def signals():
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double(), random(2, 3, 9)


def images():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double(), X


POOLED = {
    "FeatureActivationMap": lambda f, layer, x: FeatureActivationMap(f, layer).attribute(x, reference=x),
    "jacobian": lambda f, layer, x: FeatureActivationMap(f, layer, channel_weights="jacobian").attribute_pair(x, x),
    "decomposition": lambda f, layer, x: SimilarityDecomposition(f, layer).attribute_all(x, reference=x),
    "label-free": lambda f, layer, x: LabelFreeActivationMap(f, layer).attribute(x),
    "matrix": lambda f, layer, x: SimilarityDecomposition(f, layer).attribute_matrix(x, x),
    "correspondence": lambda f, layer, x: CorrespondenceMap(f, layer).attribute(x, reference=x),
    "episode": lambda f, layer, x: explain_episode(f, layer, x, x, range(len(x))),
}


@pytest.mark.parametrize("call", POOLED.values(), ids=POOLED)
@pytest.mark.parametrize("build", [signals, images])
@pytest.mark.parametrize("place", [2, 3])
def test_a_layer_of_one_place_is_told_and_another_is_named(call, build, place):
    encoder, x = build()
    with pytest.warns(UserWarning, match=rf"Layer '{place}' .*one place, as after a pooling.*such as '1'\.") as met:
        call(encoder, encoder[place], x)
    assert len([w for w in met if "one place" in str(w.message)]) == 1
    assert {w.filename for w in met} == {__file__}
    with silent():
        call(encoder, encoder[1], x)


def test_inputs_of_one_place_have_maps_of_one_place():
    encoder = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    with silent():
        FeatureActivationMap(encoder, encoder[1]).attribute(random(3, 5), reference=random(3, 5, seed=2))


def test_of_several_layers_only_the_pooled_one_is_told():
    encoder, x = images()
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        FeatureActivationMap(encoder, [encoder[1], encoder[2]]).attribute(x, reference=x)
    assert ["Layer '2'" in str(w.message) for w in met] == [True]


# Habits of faces, re-identification and self-supervision


class Faces(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.norm, self.logits = seeded(PooledEncoder), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        z = self.norm(self.backbone(x))
        return [self.logits(z), z] if self.training else F.normalize(z)


def test_an_encoder_that_returns_more_in_training_mode_says_eval():
    model = Faces()
    fam = FeatureActivationMap(model, model.backbone.layer)
    with pytest.raises(TypeError, match=r"a list of 2; .*call model\.eval\(\) if it is longer in training"):
        fam.attribute(X, reference=X)
    model.eval()
    with silent():
        assert fam.attribute(X, reference=X.flip(0)).any()


# On the command line

FACTORY = """
from torch import nn
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    def forward(self, x1, x2):
        return (self.encoder(x1) - self.encoder(x2)).abs().sum(1)
def branch():
    return Siamese().encoder
"""


@pytest.mark.parametrize("layer", [(), ("--layer", "encoder.1")], ids=["found", "named"])
def test_a_factory_of_a_siamese_encoder_is_one_line_that_names_the_branch(run, tmp_path, monkeypatch, layer):  # noqa: F811
    (tmp_path / "siamese_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(f"{name}.png")
    arguments = ("--size", 16, "-o", "out.png")
    status, out, err = run("explain", "a.png", "b.png", "--encoder", "siamese_factory:Siamese", *arguments, *layer)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "Siamese.forward() missing" in err
    assert "let the factory return model.encoder, which embeds images alone" in err
    status, _, err = run("explain", "a.png", "b.png", "--encoder", "siamese_factory:branch", *arguments)
    assert status == 0, err
