"""Encoders by name give the embeddings of their libraries, of images and sentences, and all that a notebook needs."""

import copy
import json
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from encoders import HeadEncoder, seeded
from PIL import Image
from test_cli import photos, run  # noqa: F401
from test_cli_encoders import LAYERS, save, save_quietly
from torch import nn

from captum_fam import FeatureActivationMap
from captum_fam.bundled import BundledEncoder
from captum_fam.cli._common import loaded as loaded_by_the_shell
from captum_fam.encoders import LoadedEncoder, load_encoder
from captum_fam.images import read_image

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
sentence_transformers = pytest.importorskip("sentence_transformers")
tokenizers = pytest.importorskip("tokenizers")

SENTENCES = ["a red shoe", "hat"]
LEVEL = 1.01 / 255  # transformers rounds to a level of 8 bits after resizing, and Pillow does


def picture(width=90, height=90, mode="RGB"):
    shape = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(array.squeeze(-1) if mode == "L" else array, mode)


@torch.no_grad()
def shaken(model):
    """Away from zeros and ones that a new model starts with, and equal for all places."""
    for name, parameter in model.named_parameters():
        parameter += 0.1 * torch.randn_like(parameter)
        if name.split(".")[-1] in ("positional_embedding", "pos_embed") or "position_embedding" in name:
            parameter.zero_()
    return model.eval()


TOWER = {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "image_size": 160}
WORDS = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
DECODER = {**WORDS, "context_length": 76, "dim_head": 8}
POOLER = {"attentional_pool": True, "attn_pooler_heads": 2}
# The model's configuration, the layer, and the places along a side of its map.
OPEN_CLIP = {
    "ViT": ({"vision_cfg": TOWER}, "visual.transformer.resblocks.1.ln_1", 4),
    "ViT, mean of tokens": ({"vision_cfg": {**TOWER, "pool_type": "avg"}}, "visual.ln_post", 4),
    "ViT, attention pooling": ({"vision_cfg": {**TOWER, **POOLER}}, "visual.transformer", 4),
    "ResNet": ({"vision_cfg": {"image_size": 128, "layers": [1, 1, 1, 1], "width": 8}}, "visual.layer4", 4),
    "SigLIP": (
        {"custom_text": True, "vision_cfg": {**TIMM, "timm_pool": "map", "timm_proj": "none"}, "embed_dim": 64},
        "visual.trunk.norm",
        10,
    ),
    "timm": (
        {"custom_text": True, "vision_cfg": {**TIMM, "timm_pool": "", "timm_proj": "linear"}},
        "visual.trunk.blocks.5.norm1",
        10,
    ),
    "CoCa": (
        {
            "custom_text": True,
            "vision_cfg": {**TOWER, **POOLER, "output_tokens": True},
            "multimodal_cfg": DECODER,
            "text_cfg": {**WORDS, "context_length": 76, "embed_cls": True, "output_tokens": True},
        },
        "visual.transformer",
        4,
    ),
}


def quietly_open_clip(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logging.warning", lambda *_: None)
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)


def save_open_clip(folder, kind):
    config = {"embed_dim": 12, "text_cfg": WORDS, **OPEN_CLIP[kind][0]}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = quietly_open_clip(folder).eval()
    if kind != "ResNet":
        shaken(model)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model


@pytest.fixture(params=OPEN_CLIP)
def of_open_clip(request, tmp_path):
    """Its folder, the layer and the grid."""
    save_open_clip(tmp_path, request.param)
    return tmp_path, *OPEN_CLIP[request.param][1:]


def check_that_maps_move_with_the_image(loaded, grid):
    """Without position embeddings, patches have no order: maps move with them, place by place."""
    torch.manual_seed(1)
    images, reference = torch.rand(2, 1, 3, loaded.size, loaded.size, dtype=torch.float64)
    fam = FeatureActivationMap(loaded.model.double(), loaded.layer)
    still = fam.attribute(images, reference=reference)
    step = loaded.size // grid
    moved = fam.attribute(images.roll((step, 2 * step), (2, 3)), reference=reference)
    assert still.shape[2:] == (grid, grid)
    scale = (still.max() - still.min()).item()
    torch.testing.assert_close(moved, still.roll((1, 2), (2, 3)), rtol=1e-5, atol=1e-5 * scale)
    assert (moved - still).abs().max() > 0.05 * scale


def test_embeddings_of_images_and_sentences_are_those_of_open_clip(of_open_clip):
    folder, layer, grid = of_open_clip
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    loaded = load_encoder(f"open_clip:local-dir:{folder}")
    image, tokens = picture(), open_clip.get_tokenizer(f"local-dir:{folder}")(SENTENCES)
    assert torch.equal(loaded.transform(image), preprocess(image))
    with torch.no_grad():
        own = model.eval().encode_image(preprocess(image)[None])
        assert torch.equal(loaded.model(loaded.transform(image)[None]), own)
        assert torch.equal(loaded.embed_text(SENTENCES), model.encode_text(tokens))
    assert loaded.layer_name == layer
    assert loaded.layer is loaded.model.get_submodule(layer)
    if grid != 4 or "layer4" not in layer:  # which sees the border
        check_that_maps_move_with_the_image(loaded, grid)


def test_the_map_of_a_resnet_of_open_clip_moves_with_a_patch(tmp_path):
    save_open_clip(tmp_path, "ResNet")
    loaded = load_encoder(f"open_clip:local-dir:{tmp_path}")
    fam = FeatureActivationMap(loaded.model, loaded.layer)
    patch = 3 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))

    def centre(i, j):
        image = torch.zeros(1, 3, 128, 128)
        image[0, :, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32] = patch
        seen = fam.attribute(image, reference=image)[0, 0].abs()
        return [((seen.sum(d) / seen.sum()) @ torch.arange(4.0)).item() for d in (1, 0)]

    for place in ((0, 0), (0, 3), (3, 0), (3, 3)):
        assert centre(*place) == pytest.approx(place, abs=0.4)


def tokenizer(length=8):
    """Knows a few words, and ends a sentence by 2."""
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, "a": 3, "red": 4, "shoe": 5, "hat": 6}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.post_processor = tokenizers.processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=length, **names)


READER = {**LAYERS, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"height": 32, "width": 32}


def clip():
    config = transformers.CLIPConfig(text_config=READER, vision_config=LAYERS, projection_dim=6)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    return transformers.CLIPModel(config), transformers.CLIPProcessor(images, tokenizer())


def siglip():
    config = transformers.SiglipConfig(text_config=READER, vision_config=LAYERS)
    images = transformers.SiglipImageProcessor(size=SIZE)
    return transformers.SiglipModel(config), transformers.SiglipProcessor(images, tokenizer())


# How each is made, and its layer.
DUAL = {
    "CLIP": (clip, "vision_model.encoder.layers.1.layer_norm1"),
    "SigLIP": (siglip, "vision_model.post_layernorm"),
}


def save_dual(folder, build):
    torch.manual_seed(0)
    model, processor = build()
    shaken(model)
    save_quietly(model, folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize(("build", "layer"), DUAL.values(), ids=DUAL)
def test_scores_of_images_and_sentences_are_those_of_transformers(tmp_path, build, layer):
    model, processor = save_dual(tmp_path, build)
    loaded = load_encoder(f"hf:{tmp_path}")
    image = picture()
    seen = processor(images=image, text=SENTENCES, return_tensors="pt", padding="max_length", max_length=8)
    std = torch.tensor(loaded.std).view(3, 1, 1)
    assert ((loaded.transform(image) - seen["pixel_values"][0]).abs() <= LEVEL / std).all()
    with torch.no_grad():
        logits = model(**seen).logits_per_image - getattr(model, "logit_bias", 0)
        z = loaded.model(seen["pixel_values"])
    cosines = torch.cosine_similarity(z[:, None], loaded.embed_text(SENTENCES)[None], -1)
    torch.testing.assert_close(cosines, (logits / model.logit_scale.exp()).detach())
    assert loaded.layer_name == layer
    check_that_maps_move_with_the_image(loaded, 4)


def test_a_long_sentence_is_cut_as_its_library_does(tmp_path):
    model, processor = save_dual(tmp_path, clip)
    long = "a red shoe " * 9
    tokens = processor(text=[long], return_tensors="pt", truncation=True, max_length=8)
    assert tokens["input_ids"].shape == (1, 8)
    with torch.no_grad():
        z = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(load_encoder(f"hf:{tmp_path}").embed_text([long]), z)


def test_a_tower_with_its_projection_keeps_it(tmp_path):
    def tower():
        return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**LAYERS, projection_dim=6))

    model = save(tower, tmp_path)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        own = model(pixel_values=images).image_embeds
        assert own.shape == (2, 6)
        for weights in (None, tmp_path / "state.pt"):
            torch.testing.assert_close(load_encoder(f"hf:{tmp_path}", weights).model(images), own)


def test_a_sentence_without_a_tokenizer_says_so_and_images_need_none(tmp_path, monkeypatch):
    save_dual(tmp_path, clip)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    loaded = load_encoder(f"hf:{tmp_path}")
    assert loaded.model(torch.rand(1, 3, 32, 32)).shape == (1, 6)
    with pytest.raises(ValueError, match="knows no words: save its files"):  # transformers makes up an empty one
        loaded.embed_text(SENTENCES)

    def unreachable(*_, **__):
        raise OSError("no network. Pass `token=`")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of hf:.* \(OSError: no network\.\): save it"):
        load_encoder(f"hf:{tmp_path}").embed_text(SENTENCES)


def as_clip_model_of_old(folder):
    """As sentence-transformers saved its CLIP before version 5: the weights in a folder of their own."""
    files = list(folder.iterdir())
    (folder / "0_CLIPModel").mkdir()
    for file in files:
        file.rename(folder / "0_CLIPModel" / file.name)
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (folder / "modules.json").write_text(json.dumps([module]))


def save_sentence_transformer(folder, kind):
    if kind == "ViT":
        torch.manual_seed(0)
        save_quietly(shaken(transformers.ViTModel(transformers.ViTConfig(**LAYERS))), folder)
        transformers.ViTImageProcessor(size=SIZE).save_pretrained(folder)
    else:
        save_dual(folder, siglip if kind == "SigLIP" else clip)
    if kind == "CLIP of old":
        return as_clip_model_of_old(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", open(os.devnull, "w"))  # noqa: SIM115
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        if kind == "ViT":
            model.append(sentence_transformers.sentence_transformer.modules.Normalize())
        model.save(str(folder))


# The layer, and whether it takes sentences.
SENTENCE = {
    "CLIP": ("0.model.vision_model.encoder.layers.1.layer_norm1", True),
    "CLIP of old": ("0.model.vision_model.encoder.layers.1.layer_norm1", True),
    "SigLIP": ("0.model.vision_model.post_layernorm", True),
    "ViT": ("0.model.layernorm", False),
}


@pytest.mark.parametrize("kind", SENTENCE)
def test_embeddings_are_those_of_sentence_transformers(tmp_path, kind):
    save_sentence_transformer(tmp_path, kind)
    layer, takes_sentences = SENTENCE[kind]
    loaded = load_encoder(f"sentence-transformers:{tmp_path}")
    own = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    native = picture(32, 32)  # needs no resizing
    with torch.no_grad():
        z = loaded.model(loaded.transform(native)[None])
    torch.testing.assert_close(z, torch.tensor(own.encode([native])))
    std = torch.tensor(loaded.std).view(3, 1, 1)
    seen = own.preprocess([picture()])["pixel_values"][0]
    assert ((loaded.transform(picture()) - seen).abs() <= LEVEL / std).all()
    assert loaded.layer_name == layer
    check_that_maps_move_with_the_image(loaded, 4)
    if takes_sentences:
        z = load_encoder(f"sentence-transformers:{tmp_path}").embed_text(SENTENCES)
        assert torch.equal(z, torch.tensor(own.encode(SENTENCES)))
        assert not z.is_inference()
    else:
        with pytest.raises(ValueError, match="no text tower"):
            loaded.embed_text(SENTENCES)


def test_what_is_loaded_can_be_taken_apart():
    loaded = load_encoder("bundled")
    encoder, layer, transform, mean, std = loaded
    assert (encoder, layer, mean, std) == (loaded.model, loaded.layer, loaded.mean, loaded.std)
    assert layer is encoder.get_submodule(loaded.layer_name)
    image = picture(30, 20)
    assert torch.equal(transform(image), loaded.transform(image))
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))  # for workers of a DataLoader


def test_weights_are_a_path_or_its_name(tmp_path):
    file = tmp_path / "state.pt"
    state = {k: v + 1 for k, v in load_encoder("bundled").model.state_dict().items()}
    torch.save(state, file)
    for weights in (file, str(file)):
        loaded = load_encoder("bundled", weights).model.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in state.items())


def turned(folder):
    image, exif = picture(50, 40), Image.Exif()
    exif[0x112] = 6
    image.save(folder / "turned.png", exif=exif)
    return folder / "turned.png"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "turned", "I;16"])
def test_a_picture_is_as_the_shell_sees_it(tmp_path, mode):
    file = tmp_path / "picture.png"
    if mode == "turned":
        file = turned(tmp_path)
    elif mode == "I;16":
        Image.fromarray(np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16)).save(file)
    else:
        picture(50, 40).convert(mode).save(file)
    loaded = load_encoder("bundled")
    with Image.open(file) as image:
        made = loaded.transform(image)
    assert made.shape == (3, BundledEncoder.size, BundledEncoder.size)
    assert made.dtype == torch.float32
    options = {"weights": None, "device": "cpu", "mean": None, "std": None}
    with loaded_by_the_shell([read_image(file)] * 2, "bundled", None, None, **options) as shell:
        assert torch.equal(made, shell.tensors[0])
        assert loaded.layer_name == shell.layer_name


@pytest.mark.parametrize("other", ["picture.png", np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4)])
def test_a_transform_of_something_else_says_what_to_pass(other):
    with pytest.raises(TypeError, match=f"image must be a PIL image, got {type(other).__name__}: PIL.Image.open"):
        load_encoder("bundled").transform(other)


def named(kind, folder):
    """The arguments of load_encoder, of a small model in the folder."""
    if kind == "hf":
        save_dual(folder, siglip)
    elif kind == "open_clip":
        save_open_clip(folder, "ViT")
        return (f"open_clip:local-dir:{folder}",)
    elif kind == "timm":
        torch.manual_seed(0)
        torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "state.pt")
        return "timm:test_vit", folder / "state.pt"
    else:
        save_sentence_transformer(folder, "CLIP")
    return (f"{kind}:{folder}",)


def map_in_python(loaded, files):
    query, reference = (loaded.transform(Image.open(file))[None] for file in files)
    fam = FeatureActivationMap(loaded.model, loaded.layer)
    return fam.attribute(query, reference_embedding=fam.embed(reference))[0, 0]


@pytest.mark.parametrize("kind", ["hf", "open_clip", "sentence-transformers", "timm"])
def test_a_notebook_has_what_the_shell_has_to_the_bit(photos, tmp_path, kind):  # noqa: F811
    files, arguments = (photos / "query.png", photos / "cat.jpg"), named(kind, tmp_path)
    options = {"weights": arguments[1] if arguments[1:] else None, "device": "cpu", "mean": None, "std": None}
    with loaded_by_the_shell([read_image(f) for f in files], arguments[0], None, None, **options) as shell:
        fam = FeatureActivationMap(shell.model, shell.layer)
        there = fam.attribute(shell.tensors[:1], reference_embedding=shell.embeddings[1:])[0, 0]
    assert torch.equal(map_in_python(load_encoder(*arguments), files), there)


def test_a_notebook_gives_the_map_that_the_shell_prints_to_the_bit(run, photos, tmp_path):  # noqa: F811
    files, (name,) = (photos / "query.png", photos / "cat.jpg"), named("open_clip", tmp_path)
    status, out, err = run("explain", *files, "--encoder", name, "--json-maps", "-o", tmp_path / "out.png")
    assert (status, err) == (0, "")
    (reference,) = json.loads(out)["references"]
    assert torch.equal(map_in_python(load_encoder(name), files), torch.tensor(reference["map"]["values"]))


class OfText(HeadEncoder):
    def embed_text(self, sentences):
        return self.head.weight[:1, :3] * 0 + torch.tensor([[len(s), s.count("a"), 1.0] for s in sentences])


def test_a_module_of_ones_own_may_have_a_text_tower_and_a_layer():
    loaded = LoadedEncoder(seeded(OfText).float(), size=24, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert loaded.layer_name == "layer"
    z = loaded.embed_text(("a", "banana"))
    assert z.tolist() == [[1, 1, 1], [6, 3, 1]]
    assert not z.requires_grad


class Wrong(HeadEncoder):
    def embed_text(self, sentences):
        return torch.zeros(len(sentences), 2, 3)


@pytest.mark.parametrize(
    ("model", "sentences", "error", "words"),
    [
        (HeadEncoder, ["a"], ValueError, r"timm:x has no text tower: open_clip:NAME/PRETRAINED, hf:PATH .* sentence-t"),
        (OfText, "a", TypeError, r'sentences must be a list of strings, got a string: pass one such as \["a red'),
        (OfText, ["a", 1], TypeError, "got a list with other things"),
        (OfText, [], ValueError, "sentences is empty: pass a list"),
        (Wrong, ["a"], ValueError, r"no embeddings \(N, D\) of sentences but \(1, 2, 3\)"),
    ],
)
def test_mistakes_with_sentences_say_what_to_pass(model, sentences, error, words):
    with pytest.raises(error, match=words):
        LoadedEncoder(seeded(model), name="timm:x").embed_text(sentences)


def test_a_copy_of_an_encoder_is_its_own(tmp_path):
    """Sanity checks randomise copies: the copy runs the copied modules."""
    save_dual(tmp_path, clip)
    encoder, images = load_encoder(f"hf:{tmp_path}").model, torch.rand(1, 3, 32, 32)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        before = encoder(images)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(encoder(images), before)
        assert not other(images).any()
    assert encoder.embed_text(SENTENCES).any()
    assert not other.embed_text(SENTENCES).any()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An architecture of open_clip with two kinds of weights, and their file."""
    from open_clip import factory, pretrained

    config = {"embed_dim": 12, "vision_cfg": TOWER, "text_cfg": WORDS}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny-16", config)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Bare-16", config)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny-16-quickgelu", {**config, "quick_gelu": True})
    first = {"url": "x", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    tags = {"first": first, "second": {"url": "x", "quick_gelu": True}}
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-16", tags)
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-16-quickgelu", {"second": tags["second"]})
    file = tmp_path / "weights.pt"
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: str(file))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logging.warning", lambda *_: None)
        model = open_clip.create_model("Tiny-16")
    torch.save(model.state_dict(), file)
    return model.eval(), file


# As in OpenAI's ViT-B/32, and as open_clip takes tags.
@pytest.mark.parametrize("name", ["Tiny-16/first", "Tiny/16/first", "Tiny-16/First"])
def test_an_architecture_of_open_clip_with_its_weights(tiny, name):
    model, _ = tiny
    loaded = load_encoder(f"open_clip:{name}")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model.encode_image(images))
    assert (loaded.mean, loaded.resample) == ((0.1, 0.2, 0.3), Image.Resampling.BILINEAR)
    assert loaded.name == f"open_clip:{name}"


@pytest.mark.parametrize("name", ["Tiny-16", "Tiny/16", "Tiny-16/first", "Tiny-16/second"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.filterwarnings("ignore:open_clip.Tiny-16/second was trained")
def test_a_file_of_open_clip_replaces_its_weights(tiny, monkeypatch, tmp_path, name, checkpoint):
    model, _ = tiny
    monkeypatch.setattr("open_clip.factory.download_pretrained", None)  # no network is needed
    with torch.no_grad():
        model.visual.proj += 1
    state = model.state_dict()
    if checkpoint:  # of open_clip's own training
        state = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "own.pt")
    loaded = load_encoder(f"open_clip:{name}", tmp_path / "own.pt")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model.encode_image(images))
    assert (loaded.mean == (0.1, 0.2, 0.3)) == ("second" not in name)


def test_a_model_of_open_clip_takes_another_size(tiny):
    loaded = load_encoder("open_clip:Tiny-16/first", size=96)
    assert loaded.size == 96
    image = loaded.transform(picture())[None]
    assert image.shape == (1, 3, 96, 96)
    assert FeatureActivationMap(loaded.model, loaded.layer).attribute(image, reference=image).shape == (1, 1, 6, 6)


def test_weights_of_another_activation_are_warned_of_with_the_name_that_fits(tiny):
    with pytest.warns(UserWarning, match="open_clip:Tiny-16-quickgelu/second has it"):
        load_encoder("open_clip:Tiny-16/second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_encoder("open_clip:Tiny-16-quickgelu/second")


OPEN_CLIP_MISTAKES = {
    "Tiny-16": r"does not say which weights: write open_clip:Tiny-16/TAG, with TAG one of first, second",
    "Tiny-16/third": r"open_clip has no weights 'third' for Tiny-16: pass one of first, second",
    "Tyny-16/first": r"open_clip has no model 'Tyny-16': did you mean .*Tiny-16",
    "Bare-16/first": r"no weights 'first' for Bare-16: pass a file as --weights",
    "Bare-16": r"does not say which weights: pass a file as --weights",
    "test/of/nothing": r"open_clip has no model",
    "local-dir:/nowhere": r"cannot load open_clip:local-dir:/nowhere .*: pass its checkpoint as --weights FILE",
    "local-dir:": r"cannot load open_clip:local-dir: ",
}


@pytest.mark.parametrize(("name", "words"), OPEN_CLIP_MISTAKES.items())
def test_mistakes_with_open_clip_say_what_to_pass(tiny, name, words):
    with pytest.raises(ValueError, match=words):
        load_encoder(f"open_clip:{name}")


def test_a_folder_of_open_clip_without_weights_is_not_a_random_encoder(tmp_path):
    save_open_clip(tmp_path, "ViT")
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="cannot load open_clip:local-dir"):
        load_encoder(f"open_clip:local-dir:{tmp_path}")


def test_weights_that_do_not_fit_a_model_of_open_clip_say_so(tiny, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for file, words in (
        ("other.pt", "do not fit the encoder"),
        ("none.pt", "there is no weights file"),
        ("", "a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            load_encoder("open_clip:Tiny-16", tmp_path / file)


def test_a_model_of_texts_is_refused_by_both_libraries(tmp_path):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    save_quietly(transformers.BertModel(config), tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes text, no images"):
        load_encoder(f"sentence-transformers:{tmp_path}")
    with pytest.raises(ValueError, match="which takes no images"):
        load_encoder(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match=r"cannot load sentence-transformers:.*: pass a folder that Sentence"):
        load_encoder(f"sentence-transformers:{tmp_path / 'none'}")


def processed(processor):
    return processor(images=picture(64, 64), return_tensors="pt")["pixel_values"][0]


# With settings that say nothing of themselves: offsets, a second normalisation, a scale of its own.
PROCESSORS = {
    "EfficientNet": lambda: transformers.EfficientNetImageProcessor(size={"height": 64, "width": 64}),
    "EfficientNet with an offset": lambda: transformers.EfficientNetImageProcessor(
        size={"height": 64, "width": 64}, rescale_factor=1 / 127.5, rescale_offset=True, include_top=False
    ),
    "a scale": lambda: transformers.ViTImageProcessor(size={"height": 64, "width": 64}, rescale_factor=1 / 100),
    "levels of 8 bits": lambda: transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, do_normalize=False, do_rescale=False
    ),
    "no normalisation": lambda: transformers.ViTImageProcessor(size={"height": 64, "width": 64}, do_normalize=False),
}


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_images_are_normalised_as_the_processor_does_whatever_its_settings_are_called(tmp_path, make):
    save(lambda: transformers.ViTModel(transformers.ViTConfig(**LAYERS)), tmp_path, processor=False)
    make().save_pretrained(tmp_path)
    loaded = load_encoder(f"hf:{tmp_path}")
    assert loaded.size == 64
    torch.testing.assert_close(loaded.transform(picture(64, 64)), processed(make()).float(), rtol=1e-5, atol=1e-5)


def test_a_processor_that_turns_channels_is_refused(tmp_path):
    """MobileViT's pictures are BGR: RGB would give other embeddings without a word."""
    save(lambda: transformers.ViTModel(transformers.ViTConfig(**LAYERS)), tmp_path, processor=False)
    transformers.MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does more to images than scale them \(it reorders channels"):
        load_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_images_of_timm_are_resized_as_timm_does(tmp_path, name):
    model = timm.create_model(name, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    settings = {**timm.data.resolve_model_data_config(model), "crop_pct": 1.0}  # the whole image
    torch.testing.assert_close(
        load_encoder(f"timm:{name}", tmp_path / "state.pt").transform(picture(300, 300)),
        timm.data.create_transform(**settings)(picture(300, 300)),
    )


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b1"])
def test_images_of_torchvision_are_resized_as_torchvision_does(tmp_path, name):
    models = pytest.importorskip("torchvision").models
    torch.save(models.get_model(name).state_dict(), tmp_path / "state.pt")
    loaded = load_encoder(f"torchvision:{name}", tmp_path / "state.pt")
    own = models.get_model_weights(name).DEFAULT.transforms(resize_size=loaded.size)
    torch.testing.assert_close(loaded.transform(picture(300, 300)), own(picture(300, 300)), rtol=1e-5, atol=1e-5)


def test_a_transform_gives_what_an_encoder_of_half_precision_takes(tmp_path):
    def convnext():
        sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
        return transformers.ConvNextModel(transformers.ConvNextConfig(**sizes, image_size=32))

    save_quietly(save(convnext, tmp_path).half(), tmp_path)
    loaded = load_encoder(f"hf:{tmp_path}")
    image = loaded.transform(picture())
    assert image.dtype == torch.float16
    maps = FeatureActivationMap(loaded.model, loaded.layer).attribute(image[None], reference=image[None])
    assert maps.dtype == torch.float16
    files = [picture()] * 2
    options = {"weights": None, "device": "cpu", "mean": None, "std": None}
    with loaded_by_the_shell(files, f"hf:{tmp_path}", None, None, **options) as shell:
        assert torch.equal(image, shell.tensors[0])


def test_a_model_of_timm_that_transformers_saved_has_the_images_of_timm(tmp_path):
    own = timm.create_model("test_vit", num_classes=0)
    settings = {**own.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "interpolation": "bicubic"}
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_classes=0, pretrained_cfg=settings)
    save(lambda: transformers.TimmWrapperModel(config), tmp_path, processor=False)
    loaded = load_encoder(f"hf:{tmp_path}")
    assert loaded.mean == (0.1, 0.2, 0.3)
    whole = {**timm.data.resolve_model_data_config(own), "mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}
    torch.testing.assert_close(
        loaded.transform(picture(300, 300)), timm.data.create_transform(**whole)(picture(300, 300))
    )
    assert loaded.layer_name == "timm_model.blocks.5.norm1"


@pytest.mark.parametrize("kind", ["hf", "open_clip", "sentence-transformers"])
def test_positions_are_interpolated_for_images_of_another_size(tmp_path, kind):
    (name,) = named(kind, tmp_path)
    loaded = load_encoder(name, size=96)
    image = loaded.transform(picture())[None]
    grid = 6 if kind == "open_clip" else 12
    assert FeatureActivationMap(loaded.model, loaded.layer).attribute(image, reference=image).shape == (
        1,
        1,
        grid,
        grid,
    )


def test_a_state_dict_replaces_the_weights_of_a_sentence_transformer(tmp_path):
    save_sentence_transformer(tmp_path, "CLIP")
    state = {k: v + 1 for k, v in load_encoder(f"sentence-transformers:{tmp_path}").model.state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    loaded = load_encoder(f"sentence-transformers:{tmp_path}", tmp_path / "state.pt").model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_an_encoder_without_a_map_says_how_to_name_a_layer():
    loaded = LoadedEncoder(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), size=8)
    with pytest.raises(ValueError, match=r"name one with --layer, in Python with model.get_submodule\(name\)"):
        _ = loaded.layer


def test_models_that_read_no_images_of_one_size_are_refused(tmp_path, monkeypatch):
    vision = {k: v for k, v in LAYERS.items() if k != "image_size"}
    config = transformers.Siglip2Config(text_config=READER, vision_config={**vision, "num_patches": 16})
    save(lambda: transformers.Siglip2Model(config), tmp_path, processor=False)
    transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hf:.* takes no images \(B, 3, H, W\): write a factory"):
        load_encoder(f"hf:{tmp_path}")

    def broken(*_, **__):
        raise RuntimeError("no backend")

    monkeypatch.setattr("transformers.Siglip2ImageProcessor.preprocess", broken)
    with pytest.raises(ValueError, match=r"hf:.* cannot read an image \(RuntimeError: no backend\)"):
        load_encoder(f"hf:{tmp_path}")


def test_a_chat_model_of_sentence_transformers_is_refused(tmp_path, monkeypatch):
    save_sentence_transformer(tmp_path, "CLIP")
    monkeypatch.setattr("sentence_transformers.SentenceTransformer.supports", lambda *_: True)
    with pytest.raises(ValueError, match="reads images within a text: pass a model"):
        load_encoder(f"sentence-transformers:{tmp_path}")
