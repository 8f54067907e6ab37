"""Encoders of timm and transformers, from files, and the layer that is explained without a name."""

import json
import re
import sys
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from encoders import HeadEncoder, Modified, TokenEncoder, random, seeded
from PIL import Image
from test_cli import photos, run  # noqa: F401
from torch import nn

from captum_fam import FeatureActivationMap
from captum_fam.encoders import load_encoder
from captum_fam.engine.layers import last_map
from captum_fam.images import read_image, to_tensor

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
LAYERS = {**SMALL, "intermediate_size": 32}
SWIN = {"embed_dim": 12, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 4}


def vit(**options):
    return transformers.ViTModel(transformers.ViTConfig(**LAYERS), **options)


def clip():
    text = {**LAYERS, "vocab_size": 20, "max_position_embeddings": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=LAYERS, projection_dim=6))


def siglip():
    text = {**LAYERS, "vocab_size": 20, "max_position_embeddings": 8}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=LAYERS))


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    return transformers.ConvNextModel(config)


# How each is made, the end of the layer's name, the grid of its map, and its weights' route.
HUGGING_FACE = {
    "ViT": (vit, "1.layernorm_before", [4, 4], "jacobian"),
    "DINOv2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2)),
        "layer.1.norm1",
        [4, 4],
        "jacobian",
    ),
    "DINOv2 with registers": (
        lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2)),
        "layer.1.norm1",
        [4, 4],
        "jacobian",
    ),
    "Swin": (lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN)), "layernorm", [4, 4], "aligned"),
    "CLIP": (clip, "vision_model.encoder.layers.1.layer_norm1", [4, 4], "jacobian"),
    "CLIP's images": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**LAYERS)),
        "encoder.layers.1.layer_norm1",
        [4, 4],
        "jacobian",
    ),
    "SigLIP": (siglip, "vision_model.post_layernorm", [4, 4], "jacobian"),
    "ConvNeXt": (convnext, "encoder.stages.1", [4, 4], "jacobian"),
}


def save_quietly(model, folder, **options):
    with redirect_stderr(StringIO()):  # a progress bar
        model.save_pretrained(folder, **options)


def save(build, folder, processor=True):
    """The model of transformers that ``build()`` makes under a seed, in a folder."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():  # LayerScale may start so small that nothing would come of the patches
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_quietly(model, folder)
    if processor:
        mean, std, size = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], {"height": 32, "width": 32}
        transformers.ViTImageProcessor(image_mean=mean, image_std=std, size=size).save_pretrained(folder)
    return model


def tensors(paths, size, mean, std, resample=Image.Resampling.BILINEAR):
    return torch.stack([to_tensor(read_image(path), size, mean, std, resample) for path in paths])


def as_timm(paths, size, settings):
    resample = Image.Resampling[settings["interpolation"].upper()]
    return tensors(paths, size, settings["mean"], settings["std"], resample)


def own_embeddings(model, images):
    with torch.no_grad():
        if not hasattr(model, "get_image_features"):
            return model(pixel_values=images).pooler_output.flatten(1)
        output = model.get_image_features(pixel_values=images)
        return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.fixture
def two(photos):  # noqa: F811
    return photos / "query.png", photos / "cat.jpg"


@pytest.fixture
def explained(run, two, tmp_path):  # noqa: F811
    """Runs captum-fam explain --json with an encoder: its report."""

    def explained(encoder, *arguments):
        output = tmp_path / "out.png"
        status, out, err = run("explain", *two, "--encoder", encoder, "--json", "-o", output, *arguments)
        assert (status, err) == (0, "")
        return json.loads(out)

    return explained


@pytest.mark.parametrize(("build", "layer", "grid", "route"), HUGGING_FACE.values(), ids=HUGGING_FACE)
def test_a_model_of_transformers_is_explained_with_its_own_embeddings(
    explained, two, tmp_path, build, layer, grid, route
):
    model = save(build, tmp_path)
    report = explained(f"hf:{tmp_path}")
    z, s = own_embeddings(model, tensors(two, 32, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    assert report["layer"] in dict(model.named_modules())
    assert f".{report['layer']}".endswith(f".{layer}")
    assert (report["route"], report["size"]) == (route, 32)
    (reference,) = report["references"]
    assert reference["score"] == pytest.approx(torch.cosine_similarity(z, s, 0).item(), abs=1e-5)
    assert reference["map"]["shape"] == grid
    assert reference["map"]["max"] > reference["map"]["min"]


# Name, layer, route.
TIMM = {
    "class token": ("test_vit", "blocks.5.norm1", "jacobian"),
    "mean of tokens": ("test_vit4", "norm", "aligned"),
    "ResNet": ("test_resnet", "layer4", "aligned"),
}


@pytest.mark.parametrize(("name", "layer", "route"), TIMM.values(), ids=TIMM)
def test_a_model_of_timm_loads_its_state_dict_with_and_without_a_classifier(
    explained, two, tmp_path, name, layer, route
):
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=7).eval()
    bare = timm.create_model(name, num_classes=0).eval()
    bare.load_state_dict({k: v for k, v in whole.state_dict().items() if k in bare.state_dict()})
    settings = timm.data.resolve_model_data_config(bare)
    size = settings["input_size"][1]
    with torch.no_grad():
        z, s = bare(as_timm(two, size, settings))
    for model in (whole, bare):
        torch.save(model.state_dict(), tmp_path / "state.pt")
        report = explained(f"timm:{name}", "--weights", tmp_path / "state.pt")
        assert (report["layer"], report["route"], report["size"]) == (layer, route, size)
        score = report["references"][0]["score"]
        assert score == pytest.approx(torch.cosine_similarity(z, s, 0).item(), abs=1e-5)


def test_a_transformer_of_timm_takes_another_size(explained, two, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    report = explained("timm:vit_tiny_patch16_224", "--weights", tmp_path / "state.pt", "--size", 96)
    assert report["references"][0]["map"]["shape"] == [6, 6]
    settings = timm.data.resolve_model_data_config(model)
    model.set_input_size(img_size=(96, 96))
    with torch.no_grad():
        z, s = model(as_timm(two, 96, settings))
    assert report["references"][0]["score"] == pytest.approx(torch.cosine_similarity(z, s, 0).item(), abs=1e-5)


def test_a_transformer_of_transformers_takes_another_size(explained, tmp_path):
    save(vit, tmp_path)
    report = explained(f"hf:{tmp_path}", "--size", 48)
    assert report["references"][0]["map"]["shape"] == [6, 6]


def test_layers_have_the_names_of_the_model_and_the_route_is_printed(run, two, tmp_path):  # noqa: F811
    save(convnext, tmp_path)
    arguments = ("--encoder", f"hf:{tmp_path}", "--layer", "encoder.stages.0", "-o", tmp_path / "out.png")
    status, out, err = run("explain", *two, *arguments)
    assert (status, err) == (0, "")
    first = out.splitlines()[0]
    assert first == f"encoder hf:{tmp_path}, layer encoder.stages.0 (ConvNextStage); jacobian route"
    status, out, err = run("compare", *two, *arguments, "--method", "FeatureActivationMap")
    assert (status, err) == (0, "")
    assert "layer encoder.stages.0 (ConvNextStage)\n" in out


PROCESSORS = {
    "height and width": (lambda: transformers.ViTImageProcessor(size={"height": 40, "width": 40}), 40, 0.5),
    "crop": (
        lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}),
        48,
        0.48145466,
    ),
    "shortest edge": (
        lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 56}, do_center_crop=False),
        56,
        0.48145466,
    ),
    "not normalised": (
        lambda: transformers.ViTImageProcessor(size={"height": 40, "width": 40}, do_normalize=False),
        40,
        0.0,
    ),
}


@pytest.mark.parametrize(("processor", "size", "mean"), PROCESSORS.values(), ids=PROCESSORS)
def test_images_are_those_of_the_processor(tmp_path, processor, size, mean):
    save(vit, tmp_path, processor=False)
    processor().save_pretrained(tmp_path)
    loaded = load_encoder(f"hf:{tmp_path}")
    assert (loaded.size, loaded.mean[0]) == (size, mean)
    assert loaded.std[0] == pytest.approx({0.5: 0.5, 0.0: 1.0}.get(mean, 0.26862954))
    assert not any(module.training for module in loaded.model.modules())


@pytest.mark.parametrize("build", [vit, clip])
def test_without_a_processor_a_warning_says_how_images_are_normalised(run, two, tmp_path, build):  # noqa: F811
    save(build, tmp_path, processor=False)
    arguments = ("--encoder", f"hf:{tmp_path}", "--json", "-o", tmp_path / "out.png")
    status, out, err = run("explain", *two, *arguments)
    assert (status, json.loads(out)["size"]) == (0, 32)
    assert err.startswith("captum-fam: warning: ")
    assert "--mean and --std" in err
    assert err.count("\n") == 1


def test_a_pooler_without_weights_is_not_used(tmp_path):
    model = save(lambda: vit(add_pooling_layer=False), tmp_path)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    images = torch.rand(2, 3, 32, 32)
    for weights in (None, tmp_path / "state.pt"):
        with torch.no_grad():
            z = load_encoder(f"hf:{tmp_path}", weights).model(images)
            torch.testing.assert_close(z, model(images).last_hidden_state[:, 0])


def test_a_state_dict_replaces_the_weights_of_the_folder(tmp_path):
    model = save(vit, tmp_path)
    with torch.no_grad():
        model.layernorm.weight += 1
    torch.save(model.state_dict(), tmp_path / "state.pt")
    (tmp_path / "model.safetensors").unlink()  # the folder's configuration is enough
    images = torch.rand(2, 3, 32, 32)
    z = load_encoder(f"hf:{tmp_path}", tmp_path / "state.pt").model(images)
    torch.testing.assert_close(z.detach(), own_embeddings(model, images))


MISTAKES = {
    "an unknown model of timm": (["timm:test_vitt"], ["did you mean", "test_vit"]),
    "a name of timm's alone": (["resnet10t"], ["no encoder 'resnet10t': did you mean timm:resnet10t?"]),
    "a name of timm's and torchvision's": (["resnet18"], ["did you mean torchvision:resnet18 or timm:resnet18?"]),
    "an unknown tag": (["timm:test_vit.r160"], ["did you mean", "test_vit.r160_in1k"]),
    "weights of another model": (["timm:test_resnet", "--weights", "{tmp}/state.pt"], ["do not fit"]),
    "a size in pixels that timm cannot take": (
        ["timm:test_vit", "--weights", "{tmp}/vit.pt", "--size", "4"],
        ["--size"],
    ),
    "a missing folder": (["hf:{tmp}/nope"], ["cannot load hf:", "save_pretrained"]),
    "a folder without a model": (["hf:{tmp}"], ["cannot load hf:", "save_pretrained"]),
    "a name that is none": (["hf:a b"], ["cannot load hf:a b"]),
    "a model of text": (["hf:{tmp}/text"], ["BertModel", "takes no images"]),
    "a model without an embedding": (["hf:{tmp}/mae"], ["pooler_output, only last_hidden_state", "factory"]),
    "a folder that lacks weights": (["hf:{tmp}/partial"], ["lacks weights", "--weights FILE"]),
    "no name": (["hf:"], ["hf:PATH"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models that cannot be explained."""
    folder = tmp_path_factory.mktemp("models")
    text = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    save(lambda: transformers.BertModel(transformers.BertConfig(**text)), folder / "text", processor=False)
    mae = {**LAYERS, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    save(lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**mae)), folder / "mae")
    model = save(vit, folder / "partial")
    state = model.state_dict()
    state.pop("layernorm.weight")
    save_quietly(model, folder / "partial", state_dict=state)
    torch.save({"other": torch.zeros(1)}, folder / "state.pt")
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "vit.pt")
    return folder


@pytest.mark.parametrize(("arguments", "advice"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(run, two, tmp_path, folder, arguments, advice):  # noqa: F811
    arguments = [a.format(tmp=folder) for a in arguments]
    status, out, err = run("explain", *two, "--json", "-o", tmp_path / "out.png", "--encoder", *arguments)
    assert (status, out) == (2, "")
    assert all(words in err for words in advice)
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_open_clip_is_named_as_it_is_passed(run, two, tmp_path):  # noqa: F811
    pytest.importorskip("open_clip")
    status, _, err = run("explain", *two, "-o", tmp_path / "out.png", "--encoder", f"open_clip:{tmp_path}")
    assert (status, err) == (
        2,
        f"captum-fam: open_clip takes a folder by another name: open_clip:local-dir:{tmp_path}\n",
    )


CODE = {"auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
ADVICE = {
    "code of its own": (
        {"model_type": "mine", **CODE},
        {},
        "contains custom code",
        "module.path:factory, for a factory",
    ),
    "weights that are none": (
        {"model_type": "vit", **LAYERS},
        {"pytorch_model.bin": "x"},
        "Weights only load failed.",
        "a folder that save_pretrained wrote",
    ),
    "a type that is unknown": ({"model_type": "mine"}, {}, "does not recognize", "a folder that save_pretrained wrote"),
}


@pytest.mark.parametrize(("config", "files", "reason", "advice"), ADVICE.values(), ids=ADVICE)
def test_advice_of_transformers_to_its_callers_is_left_out(tmp_path, config, files, reason, advice):
    for name, content in {"config.json": json.dumps(config), **files}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{reason}.*: pass {advice}") as caught:
        load_encoder(f"hf:{tmp_path}")
    assert not [no for no in ("trust_remote_code", "weights_only", "pip install", "token=") if no in str(caught.value)]


def test_advice_of_a_hub_to_its_callers_is_left_out(monkeypatch):
    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo. Make sure to pass `token=<your_token>`.")

    monkeypatch.setattr("timm.create_model", gated)
    with pytest.raises(ValueError, match=r"\(OSError: You are trying to access a gated repo\.\): pass a state dict"):
        load_encoder("timm:test_vit")


@pytest.mark.parametrize(("package", "encoder"), [("timm", "timm:resnet18"), ("transformers", "hf:some/model")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    run,  # noqa: F811
    two,
    monkeypatch,
    package,
    encoder,
):
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = run("explain", *two, "--encoder", encoder)
    assert (status, out) == (2, "")
    assert err == f"captum-fam: {package} is not installed: pip install 'captum-fam[transformers]'\n"


@pytest.mark.parametrize(
    ("function", "encoder", "advice"),
    [
        ("timm.create_model", "timm:resnet18", "--weights FILE"),
        ("transformers.AutoModel.from_pretrained", "hf:{tmp}", "huggingface.co"),
    ],
)
def test_a_download_that_fails_is_one_line(
    run,  # noqa: F811
    two,
    tmp_path,
    monkeypatch,
    function,
    encoder,
    advice,
):
    def unreachable(*_, **__):
        print("Downloading")
        sys.stderr.write("Downloading\n")
        raise OSError("no network\nat all")

    save(vit, tmp_path)
    monkeypatch.setattr(function, unreachable)
    status, out, err = run("explain", *two, "--encoder", encoder.format(tmp=tmp_path))
    assert (status, out) == (2, "")
    assert "OSError: no network at all" in err
    assert advice in err
    assert err.count("\n") == 1


class Transformer(nn.Module):
    """Pooled by its class token; ``last`` returns tokens after the last attention."""

    class ResidualAttentionBlock(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(channels), self.SelfAttention(channels)

        class SelfAttention(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.values, self.mix = nn.Linear(channels, channels), nn.Linear(channels, channels)

            def forward(self, x):
                return torch.softmax(self.mix(x) @ x.mT, -1) @ self.values(x)

        def forward(self, x):
            return x + self.attn(self.norm(x))

    def __init__(self, channels=6):
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, channels))
        self.blocks = nn.Sequential(*(self.ResidualAttentionBlock(channels) for _ in range(2)))
        self.last = nn.LayerNorm(channels)

    def forward(self, x):
        patches = self.patch(x).flatten(2).mT
        return self.last(self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), patches], 1)))[:, 0]


class ClassTokenAlone(nn.Module):
    """Nothing goes from the patches to the embedding."""

    def __init__(self):
        super().__init__()
        self.inner = seeded(TokenEncoder)

    def forward(self, x):
        return self.inner.cls.expand(len(x), -1, -1)[:, 0] + 0 * self.inner(x).detach()


def test_the_last_map_is_the_last_that_the_embedding_depends_on():
    images = (random(2, 3, 12, 12),)
    transformer = seeded(Transformer)
    assert last_map(transformer, images) == "blocks.1.norm"
    assert last_map(transformer.forward, images) == "blocks.1.norm"  # a bound method has its model's names
    assert last_map(lambda x: transformer(x), images) is None
    assert last_map(seeded(HeadEncoder), images) == "layer"
    assert last_map(seeded(ClassTokenAlone), images) is None
    fam = FeatureActivationMap(transformer, transformer.get_submodule("blocks.1.norm"))
    assert fam.attribute(*images, reference=images[0][:1]).any()


def test_a_normalised_embedding_or_one_in_a_dict_depends_on_its_map():
    images = (random(1, 3, 12, 12),)
    normalised = Modified(seeded(HeadEncoder), lambda z: F.normalize(z))
    assert last_map(normalised, images) == "encoder.layer"
    in_dict = Modified(seeded(HeadEncoder), lambda z: {"embedding": z})
    assert last_map(in_dict, images, None, lambda output: output["embedding"]) == "encoder.layer"


def test_inside_an_attention_a_map_counts_where_there_is_no_other():
    attention = nn.Sequential()
    attention.attn = nn.Conv2d(3, 4, 3)
    encoder = nn.Sequential(attention, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = (torch.rand(1, 3, 12, 12),)
    assert last_map(encoder, images) == "0"
    bare = nn.Sequential()
    bare.attn, bare.pool, bare.flat = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    assert last_map(bare, images) == "attn"


def test_an_encoder_without_gradients_has_its_last_map():
    inner = seeded(HeadEncoder)
    encoder = Modified(inner, torch.detach)
    assert last_map(encoder, (random(1, 3, 12, 12),)) == "encoder.layer"


@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_left_as_it_was(training):
    model = timm.create_model("test_resnet", num_classes=0).train(training)
    images = torch.rand(2, 3, 64, 64)
    next(model.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        assert last_map(model, (images,)) == "layer4"
        assert not torch.is_grad_enabled()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training == training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert not images.requires_grad


def test_hooks_are_gone_after_a_failure():
    def fail(z):
        raise KeyError("pixels")

    encoder = Modified(seeded(HeadEncoder), fail)
    with pytest.raises(KeyError):
        last_map(encoder, (random(1, 3, 12, 12),))
    assert not any(m._forward_hooks for m in encoder.modules())


def test_a_path_in_place_of_a_module_says_what_to_write():
    with pytest.raises(ValueError, match=r"; write folder\.mine:make$"):
        load_encoder("folder/mine.py:make")


@pytest.mark.parametrize("name", ["mine", "mine.make"])
def test_an_unknown_encoder_says_how_to_name_ones_own(name):
    with pytest.raises(ValueError, match=r"for your own, module\.path:factory"):
        load_encoder(name)


def test_a_module_of_the_current_folder_comes_first_and_the_path_is_as_before(tmp_path, monkeypatch):
    (tmp_path / "this.py").write_text("from torch import nn\nencoder = nn.Identity\n")  # Python has one of this name
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "this", raising=False)
    before = list(sys.path)
    assert isinstance(load_encoder("this:encoder").model, nn.Identity)
    with pytest.raises(ValueError, match="cannot import nope"):
        load_encoder("nope:encoder")
    assert sys.path == before
    sys.modules.pop("this")


def test_weights_that_lack_one_key_or_have_one_more_do_not_fit(tmp_path):
    state = load_encoder("bundled").model.state_dict()
    key = next(iter(state))
    for changed, words in (
        ({k: v for k, v in state.items() if k != key}, f"1 keys missing ({key}, ...)"),
        ({**state, "more": torch.zeros(1)}, "1 keys unknown (more, ...)"),
    ):
        torch.save(changed, tmp_path / "state.pt")
        with pytest.raises(ValueError, match=f"do not fit the encoder: {re.escape(words)}$"):
            load_encoder("bundled", tmp_path / "state.pt")


def test_the_size_of_images_is_that_asked_for(tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "state.pt")
    assert load_encoder("timm:test_resnet", tmp_path / "state.pt", size=96).size == 96
