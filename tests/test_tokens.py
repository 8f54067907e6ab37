"""Vision transformers: tokens and channels-last maps become maps of the patches, or are refused with advice."""

import functools
import re
import warnings

import numpy as np
import pytest
import reference
import torch
from encoders import HeadEncoder, PooledEncoder, TokenEncoder, random, seeded
from helpers import close, silent
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from captum_fam import (
    FeatureActivationMap,
    LabelFreeActivationMap,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
    channel_contributions,
    channels_last,
    compare_attributions,
    patch_tokens,
)
from captum_fam.engine.layers import last_map
from captum_fam.tokens import to_map

SIZES = [(32, 32), (32, 48)]
METHODS = [FeatureActivationMap, SimilarityDecomposition, LabelFreeActivationMap, ScoreCam]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


# Real models, from their configurations


def timm_model(module, name, **options):
    def build(size):
        pytest.importorskip("timm")
        build = getattr(__import__(f"timm.models.{module}", fromlist=[name]), name)
        return build(**({"img_size": size} if module != "convnext" else {}), num_classes=0, **options)

    return build


VIT = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
STAGES = {"depths": (1, 1), "num_heads": (1, 2), "window_size": 2, "patch_size": 4, "embed_dim": 10}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (6, 6, 12, 12)}
HF_VIT = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 32,
    "patch_size": 8,
}
HF_SWIN = {"depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4, "embed_dim": 10}
HF_CONVNEXT = {"depths": [1, 1, 1, 1], "hidden_sizes": [6, 6, 12, 12]}


def transformers_model(name, sized=False, **options):
    def build(size):
        T = pytest.importorskip("transformers")
        config = getattr(T, f"{name}Config")(**options, **({"image_size": size} if sized else {}))
        return getattr(T, f"{name}Model")(config)

    return build


BUILDS = {
    "ViT": timm_model("vision_transformer", "VisionTransformer", **VIT),
    "ViT, mean": timm_model("vision_transformer", "VisionTransformer", **VIT, global_pool="avg"),
    "ViT, mean of norm": timm_model("vision_transformer", "VisionTransformer", **VIT, global_pool="avg", fc_norm=False),
    "DeiT distilled": timm_model("deit", "VisionTransformerDistilled", **VIT),
    "four registers": timm_model("vision_transformer", "VisionTransformer", **VIT, reg_tokens=4),
    "DINOv3": timm_model("eva", "vit_small_patch16_dinov3", **(VIT | {"embed_dim": 24})),
    "no prefix": timm_model("vision_transformer", "VisionTransformer", **VIT, class_token=False, global_pool="map"),
    "Swin": timm_model("swin_transformer", "SwinTransformer", **STAGES),
    "ConvNeXt": timm_model("convnext", "ConvNeXt", **CONVNEXT),
    "Mixer": timm_model("mlp_mixer", "MlpMixer", patch_size=8, embed_dim=12, num_blocks=2),
    "HF ViT": transformers_model("ViT", True, **{k: v for k, v in HF_VIT.items() if k != "image_size"}),
    "HF Dinov2": transformers_model("Dinov2", **HF_VIT),
    "HF registers": transformers_model("Dinov2WithRegisters", **HF_VIT),
    "HF Swin": transformers_model("Swin", True, **HF_SWIN),
    "HF ConvNeXt": transformers_model("ConvNext", **HF_CONVNEXT),
}
# model: layers, each with the side of a patch and where the places of its activations are
LAYERS = {
    "ViT": {"patch_embed": (8, "tokens"), "blocks.0": (8, "tokens"), "blocks.1.norm1": (8, "tokens")},
    "ViT, mean": {"blocks.1": (8, "tokens"), "patch_embed.proj": (8, "map")},
    "ViT, mean of norm": {"norm": (8, "tokens")},
    "DeiT distilled": {"blocks.0": (8, "tokens"), "blocks.1.norm1": (8, "tokens")},
    "four registers": {"blocks.0.mlp.fc1": (8, "tokens"), "blocks.1.norm1": (8, "tokens")},
    "DINOv3": {"patch_embed": (8, "last"), "blocks.1.norm1": (8, "tokens")},
    "no prefix": {"blocks.1": (8, "tokens"), "norm": (8, "tokens")},
    "Swin": {"layers.0": (4, "last"), "layers.1": (8, "last"), "norm": (8, "last")},
    "ConvNeXt": {"stages.0": (4, "map"), "stages.2.blocks.0.norm": (16, "last"), "stages.2": (16, "map")},
    "Mixer": {"blocks.0": (8, "tokens"), "norm": (8, "tokens")},
    "HF ViT": {"embeddings": (8, "tokens"), "layers.1.layernorm_before": (8, "tokens")},
    "HF Dinov2": {"encoder.layer.0": (8, "tokens"), "encoder.layer.1.norm1": (8, "tokens")},
    "HF registers": {"encoder.layer.0.attention": (8, "tokens"), "encoder.layer.1.norm1": (8, "tokens")},
    "HF Swin": {"encoder.layers.0.blocks.0.layernorm_before": (4, "tokens"), "layernorm": (8, "tokens")},
    "HF ConvNeXt": {"encoder.stages.1": (8, "map"), "encoder.stages.3": (32, "map")},
}


def pooled(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@functools.cache
def real(name, size):
    """The model and two images; weights not so small that a layer hardly matters."""
    model = seeded(lambda: BUILDS[name](size))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                parameter.add_(random(*parameter.shape, seed=number), alpha=0.3)
            elif "norm" not in name and parameter.abs().max() < 1e-3:  # scales that begin next to zero
                parameter.add_(random(*parameter.shape, seed=number), alpha=0.1)
    # Four rows of 32 by 32 patches for the stages of a ConvNeXt.
    images = random(2, 3, *size).repeat_interleave(2, 2).repeat_interleave(2, 3) if "ConvNeXt" in name else None
    return model, random(2, 3, *size) if images is None else images


def explicit(kind, grid):
    own = {
        "tokens": lambda a: a[:, a.shape[1] - grid[0] * grid[1] :].mT.unflatten(2, grid),
        "last": lambda a: a.permute(0, 3, 1, 2),
        "map": lambda a: a,
    }
    ours = {"tokens": patch_tokens(*grid), "last": channels_last, "map": lambda a: a}
    return own[kind], ours[kind]


@each_size
@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, found in LAYERS.items() for layer in found])
def test_the_map_of_a_real_model_is_its_grid_of_patches(name, layer, size):
    model, x = real(name, size)
    patch, kind = LAYERS[name][layer]
    grid = (x.shape[2] // patch, x.shape[3] // patch)

    def maps(transform=None, **options):
        fam = FeatureActivationMap(
            model, model.get_submodule(layer), output_selector=pooled, reshape_transform=transform
        )
        return fam.attribute(x, reference=x.flip(0), **options)

    with silent():
        found, terms = maps(), maps(attr_dim_summation=False)
    assert found.shape == (2, 1, *grid)
    assert terms.shape[2:] == grid
    assert found.any()
    for transform in explicit(kind, grid):
        assert torch.equal(found, maps(transform))
        assert torch.equal(terms, maps(transform, attr_dim_summation=False))


@pytest.mark.parametrize("name", ["ViT, mean of norm", "Mixer"])
def test_a_mean_of_tokens_is_aligned_and_has_the_paper_s_map(name):
    model, x = real(name, (32, 48))
    fam, kept = FeatureActivationMap(model, model.norm), []
    assert fam.route(x) == "aligned"
    with model.norm.register_forward_hook(lambda *call: kept.append(call[2].detach())), torch.no_grad():
        z = model(x)
    s = random(1, 12)
    for map_, z_b, tokens in zip(fam.attribute(x, reference_embedding=s), z, kept[0][:, -24:]):
        w = reference.pair_weights(z_b.numpy(), s.numpy(), 0, "cosine")
        expected = reference.aligned_map(w, tokens.mT.unflatten(1, (4, 6)).numpy())
        np.testing.assert_allclose(map_[0].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ViT", "DeiT distilled", "four registers"])
@pytest.mark.parametrize(
    "question", [{}, {"contrast": 1}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.2}], ids=str
)
def test_each_patch_of_a_class_token_model_is_weighed_by_its_own_gradient(name, question):
    model, x = real(name, (32, 48))
    s, kept = random(3, 12), []
    with model.blocks[1].norm1.register_forward_hook(lambda *call: kept.append(call[2])):
        z = model(x)
    f = [reference.pair_weights(v, s.numpy(), 2, "cosine", **question) for v in z.detach().numpy()]
    (gradient,) = torch.autograd.grad((torch.from_numpy(np.stack(f)) * z).sum(), kept)
    terms = (24 * gradient * kept[0]).detach()[:, model.num_prefix_tokens :]  # 4 x 6 patches
    fam = FeatureActivationMap(model, model.blocks[1].norm1)
    options = {"target": 2, "reference_embedding": s, **question}
    close(fam.attribute(x, **options), terms.sum(2).reshape(2, 1, 4, 6))
    by_channel = fam.attribute(x, attr_dim_summation=False, **options)
    close(by_channel, terms.mT.reshape(2, 12, 4, 6))


# The same of small encoders


class ClassTokenEncoder(nn.Module):
    """A patch embedding, two layers of tokens with attention between them, and the class token through a head."""

    def __init__(self, embedding=4):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.first, self.last = (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, embedding)

    def forward(self, x):
        patches = self.patches(x).flatten(2).mT
        return self.head(self.last(self.first(torch.cat([patches.mean(1, keepdim=True), patches], 1)))[:, 0])


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.layer, self.head = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer(self.conv(x).movedim(1, -1)).mean((1, 2)))


@pytest.mark.parametrize(
    ("build", "layer", "size", "transform"),
    [
        (TokenEncoder, "layer", (12, 12), lambda a: a[:, 1:].mT.unflatten(2, (3, 3))),
        (ClassTokenEncoder, "first", (8, 12), lambda a: a[:, 1:].mT.unflatten(2, (4, 6))),
        (ClassTokenEncoder, "patches", (8, 12), lambda a: a),
        (ChannelsLast, "layer", (8, 12), lambda a: a.permute(0, 3, 1, 2)),
    ],
)
@pytest.mark.parametrize("route", ["auto", "jacobian"])
def test_the_layout_found_is_the_one_that_would_be_given(build, layer, size, transform, route):
    encoder, x = seeded(build), random(2, 3, *size)
    with silent():
        found, wanted = (
            FeatureActivationMap(
                encoder, encoder.get_submodule(layer), channel_weights=route, reshape_transform=given
            ).attribute(x, reference=x.flip(0))
            for given in (None, transform)
        )
    assert found.any()
    assert torch.equal(found, wanted)


# A place on the map is the place on the image


@pytest.mark.parametrize("name", ["ViT", "no prefix", "Mixer", "HF ViT"])
def test_tokens_lie_where_the_patch_embedding_put_them(name):
    model, x = real(name, (32, 48))
    embedding = {"Mixer": "stem", "HF ViT": "embeddings.patch_embeddings"}.get(name, "patch_embed")
    convolution = f"{embedding}.{'projection' if name == 'HF ViT' else 'proj'}"
    layers = [model.get_submodule(layer) for layer in (convolution, embedding)]
    on_map, on_tokens = FeatureActivationMap(model, layers, output_selector=pooled).attribute(x, reference=x.flip(0))
    close(on_tokens, on_map)


@pytest.mark.parametrize("bright", [(0, 5), (2, 1), (3, 0)])
def test_the_one_bright_patch_is_the_maximum(bright):
    encoder = seeded(lambda: PatchTokens(prefix=1))
    x = torch.zeros(1, 3, 16, 24, dtype=torch.float64)
    row, column = bright
    x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    (map_,) = LabelFreeActivationMap(encoder, encoder.layer).attribute(x)[:, 0]
    assert map_.flatten().argmax() == 6 * row + column
    assert (map_ > 0).sum() == 1


class PatchTokens(nn.Module):
    """Prefix tokens of zeros and patches of 4 by 4 that are their brightness, pooled by their mean."""

    def __init__(self, prefix, width=10):
        super().__init__()
        self.prefix, self.width, self.layer = prefix, width, nn.Identity()

    def forward(self, x):
        patches = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(2).mT.expand(-1, -1, self.width)
        return self.layer(nn.functional.pad(patches, (0, 0, self.prefix, 0))).mean(1)


# to_map, by shape alone


def of(*shape):
    """A tensor of that shape that takes no memory."""
    return torch.zeros(()).expand(shape)


def laid_out(shape, size, dimensions=None):
    found = to_map(of(2, *shape), of(2, 3, *size), dimensions)
    return None if found is None else tuple(found.shape[1:])


IMAGE = (224, 224)


@pytest.mark.parametrize(
    ("shape", "size", "dimensions", "wanted"),
    [
        # wide models: 1024 channels are also 32 by 32, 256 are 16 by 16
        ((197, 1024), IMAGE, 1024, (1024, 14, 14)),
        ((197, 1024), IMAGE, 768, (1024, 14, 14)),
        ((257, 1024), IMAGE, 768, (1024, 16, 16)),
        ((261, 1024), IMAGE, 768, (1024, 16, 16)),
        ((256, 1024), IMAGE, 1024, (1024, 16, 16)),
        ((50, 768), IMAGE, 512, (768, 7, 7)),
        ((49, 768), IMAGE, 768, (768, 7, 7)),
        ((577, 1024), (384, 384), 768, (1024, 24, 24)),
        ((3136, 96), IMAGE, 768, (96, 56, 56)),
        ((7, 7, 768), IMAGE, 768, (768, 7, 7)),
        ((56, 56, 96), IMAGE, 768, (96, 56, 56)),
        ((7, 14, 768), (224, 448), 512, (768, 7, 14)),
        # flattened maps, channels first
        ((768, 49), IMAGE, 768, (768, 7, 7)),
        # channels that divide the image: two strides would make a map of them, but not of a square image
        ((64, 64, 128), (256, 256), 1024, (128, 64, 64)),
        ((48, 48, 384), (384, 384), 1536, (384, 48, 48)),
        ((16, 16, 256), (256, 256), 512, (256, 16, 16)),
        ((56, 56, 32), IMAGE, 256, (32, 56, 56)),
        # maps: as they are
        ((32, 32, 32), (32, 32), None, (32, 32, 32)),
        ((32, 32, 32), (64, 64), 7, (32, 32, 32)),
        ((16, 16, 16), (64, 64), 16, (16, 16, 16)),
        ((14, 14, 14), IMAGE, 5, (14, 14, 14)),
        ((5, 12, 12), (12, 12), 12, (5, 12, 12)),
        ((5, 8, 8), (15, 15), 8, (5, 8, 8)),
        ((512, 7, 7), (200, 200), 512, (512, 7, 7)),
        ((64, 1, 1), IMAGE, 10, (64, 1, 1)),
        ((512,), IMAGE, 512, (512,)),
    ],
    ids=str,
)
def test_a_shape_that_leaves_no_doubt(shape, size, dimensions, wanted):
    assert laid_out(shape, size, dimensions) == wanted


@pytest.mark.parametrize(
    ("shape", "size", "dimensions"),
    [
        ((1024, 16), (64, 64), None),  # 1024 patches of 16 channels, or 4 by 4 with 1024
        ((256, 1024), IMAGE, 768),  # 16 by 16 patches, or 32 by 32
        ((196, 1024), IMAGE, None),
        ((16, 16), (32, 32), 16),  # the dimensions fit both
        ((50, 49), IMAGE, 50),  # 7 by 7 places, of 50 channels as the dimensions say, or after a class token
        ((9, 8), (12, 12), 8),  # 3 by 3, or 2 by 2 after five others
        ((202, 768), IMAGE, 768),  # six tokens before 14 by 14
        ((204, 384), IMAGE, 384),
        ((195, 384), IMAGE, 384),  # too few for 14 by 14
        ((197, 768), (224, 448), 768),  # a square grid in an image that is not
        ((30, 20), (75, 62), 20),  # patches that do not divide the image
        ((7, 7, 768), (220, 220), 768),  # a grid that does not divide the image
        ((14, 7, 768), IMAGE, 768),
        ((4, 6, 10), (64, 96), 10),  # channels last, as the dimensions say, or 6 by 10 of a strided network
        ((8, 16, 32), (32, 64), 32),
        ((16, 24, 8), (64, 96), 16),  # 16 rows, or 16 channels as the dimensions say
        ((1, 384), IMAGE, 384),  # a class token alone
        ((1, 256), IMAGE, 256),  # whose dimensions are 16 by 16
        ((207, 1024), IMAGE, 768),  # ten tokens of a prompt, and channels that are 32 by 32
        ((730, 64), IMAGE, 256),  # overlapping patches
        ((768, 196), IMAGE, 512),  # a flattened map, or 768 tokens
        ((8, 16, 16), (16, 32), 5),  # one stride with channels last, or two with channels first
    ],
    ids=str,
)
def test_a_shape_in_doubt_is_refused(shape, size, dimensions):
    assert laid_out(shape, size, dimensions) is None


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5)), st.integers(0, 8), st.integers(1, 40), st.data()
)
def test_tokens_are_laid_out_row_by_row_or_refused_but_never_changed(grid, prefix, channels, data):
    h, w, p = grid
    dimensions = data.draw(st.sampled_from([None, 3, channels, h * w]))
    tokens = torch.arange(2.0 * (prefix + h * w) * channels).reshape(2, -1, channels)
    found = to_map(tokens, of(2, 3, h * p, w * p), dimensions)
    if found is None:
        return
    assert to_map(found, of(2, 3, h * p, w * p), dimensions) is not None  # what is a map stays one
    for row, values in zip(tokens.flatten(1), found.flatten(1)):
        assert len(values.unique()) == values.numel()
        assert torch.isin(values, row).all()
    if found.shape[1:] == (channels, h, w) and (h * w > 1):
        assert torch.equal(found, tokens[:, prefix:].mT.reshape(2, channels, h, w))


@given(
    st.tuples(st.integers(8, 70), st.integers(8, 70)),
    st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 3), st.integers(1, 2)),
    st.integers(1, 40),
    st.data(),
)
@example((16, 28), (3, 1, 0, 1), 8, None)
@example((16, 32), (3, 2, 0, 1), 4, None)
@example((128, 122), (7, 2, 0, 1), 64, None)
@example((8, 9), (2, 1, 1, 1), 8, None)
@example((36, 19), (2, 2, 1, 1), 36, None)
def test_the_map_of_a_convolution_is_never_transposed(size, convolution, channels, data):
    kernel, stride, padding, dilation = convolution
    padding = min(padding, (dilation * (kernel - 1) + 1) // 2)  # no more than keeps the size, rounded up
    assume(stride <= kernel and 4 * dilation * (kernel - 1) <= min(size))
    places = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size]
    if min(places) < 1:
        return
    activation = of(2, channels, *places)
    dimensions = data.draw(st.sampled_from([None, 5, channels])) if data else None
    found = to_map(activation, of(2, 3, *size), dimensions)
    assert found is activation or (found is None and dimensions != channels)


def test_helpers_say_what_does_not_fit():
    for sides in [(0, 4), (4, -1)]:
        with pytest.raises(ValueError, match=rf"`height` and `width`.*positive.*{sides[0]} and {sides[1]}"):
            patch_tokens(*sides)
    for shape in [(2, 15, 3), (2, 4, 4, 3)]:
        with pytest.raises(ValueError, match=rf"at least 4 · 4 = 16.*{re.escape(str(shape))}.*height and width"):
            patch_tokens(4, 4)(of(*shape))
    assert channels_last(of(2, 3, 4, 5, 6)).shape == (2, 6, 3, 4, 5)


class Gives(nn.Module):
    """``layer`` gives that shape, whatever the input; the embedding is the first of its values."""

    def __init__(self, shape, dimensions):
        super().__init__()
        self.shape, self.dimensions, self.layer = shape, dimensions, nn.Identity()

    def forward(self, x):
        values = random(1, *self.shape) * x.flatten(1).mean(1).reshape(-1, *[1] * len(self.shape))
        return self.layer(values).flatten(1)[:, : self.dimensions]


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [
        ((1024, 16), (3, 64, 64)),
        ((202, 6), (3, 28, 28)),  # six tokens before 14 by 14
        ((5, 7, 4), (3, 12, 12)),
        ((10, 4), (3, 2, 12, 12)),  # a video
        ((10, 6), (3, 2, 12, 12)),
        ((10, 4), (7,)),  # no image at all
        ((3, 5, 4), (3, 8, 8, 8)),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_refusal_names_the_layer_its_shape_and_the_helpers(method, shape, inputs):
    encoder, x = Gives(shape, 4), random(2, *inputs)
    with pytest.raises(ValueError, match=rf"{re.escape(str((2, *shape)))} of layer 'layer' \(Identity\)") as error:
        method(encoder, encoder.layer).attribute(x, reference_embedding=random(1, 4))
    for advice in (str((2, *inputs)), "patch_tokens(height, width)", "channels_last", "reshape_transform=lambda a: a"):
        assert advice in str(error.value)


class PatchesAlone(nn.Module):
    """16 tokens of 64 channels; these may be 8 by 8 places, too."""

    def __init__(self, dimensions):
        super().__init__()
        self.layer, self.dimensions = nn.Conv2d(3, 64, 16, 16), dimensions
        self.tokens = nn.Identity()

    def forward(self, x):
        return self.tokens(self.layer(x).flatten(2).mT).mean(1)[:, : self.dimensions]


def test_the_embedding_tells_channels_from_places():
    x = random(2, 3, 64, 64)
    for dimensions, grid in [(64, (4, 4)), (5, None)]:  # 16 tokens of 64 channels, or 8 by 8 places of 16 channels
        encoder = seeded(lambda dimensions=dimensions: PatchesAlone(dimensions))
        lafam = LabelFreeActivationMap(encoder, encoder.tokens)
        if grid is None:
            with pytest.raises(ValueError, match="cannot be told from their shape"):
                lafam.attribute(x)
        else:
            assert lafam.attribute(x).shape == (2, 1, *grid)


def test_the_advice_of_a_refusal_helps():
    encoder, x, s = Gives((1024, 16), 4), random(2, 3, 64, 64), random(1, 4)
    for transform, grid in [(patch_tokens(32, 32), (32, 32)), (lambda a: a, (16,))]:
        fam = FeatureActivationMap(encoder, encoder.layer, reshape_transform=transform)
        assert fam.attribute(x, reference_embedding=s).shape == (2, 1, *grid)


# Layers after the last attention


AFTER = {
    "ViT": ["blocks.1", "norm", "blocks.1.mlp.fc1"],
    "DeiT distilled": ["blocks.1"],
    "four registers": ["blocks.1.norm2"],
    "HF ViT": ["layers.1", "layernorm"],
    "HF Dinov2": ["encoder.layer.1"],
    "HF registers": ["layernorm"],
}


def layer_advised(method, encoder, model, layer, x, s, **options):
    with pytest.raises(ValueError, match=rf"{re.escape(layer)}.*before the last attention, such as '") as error:
        method(encoder, model.get_submodule(layer), **options).attribute(x, reference_embedding=s)
    return re.search("such as '([^']+)'", str(error.value))[1]


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, found in AFTER.items() for layer in found])
def test_a_layer_after_the_last_attention_is_an_error_that_says_which_layer_to_take(name, layer, method):
    (model, x), s = real(name, (32, 48)), random(1, 12)
    advised = layer_advised(method, model, model, layer, x, s, output_selector=pooled)
    assert re.search(r"1\.(norm1|layernorm_before)$", advised)  # of the last attention's input
    maps = FeatureActivationMap(model, model.get_submodule(advised), output_selector=pooled)
    assert maps.attribute(x, reference_embedding=s).shape == (2, 1, 4, 6)
    assert maps.attribute(x, reference_embedding=s).any()
    with silent():
        lafam = LabelFreeActivationMap(model, model.get_submodule(layer), output_selector=pooled)
        assert lafam.attribute(x).shape == (2, 1, 4, 6)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("transform", [None, lambda a: a[:, 1:].mT.unflatten(2, (4, 6))])
def test_the_layer_advised_for_a_small_encoder_helps(method, transform):
    encoder, x, s = seeded(ClassTokenEncoder), random(2, 3, 8, 12), random(1, 4)
    advised = layer_advised(method, encoder, encoder, "last", x, s, reshape_transform=transform)
    assert advised.startswith("first")
    assert FeatureActivationMap(encoder, encoder.get_submodule(advised)).attribute(x, reference_embedding=s).any()


def test_every_call_and_a_score_say_which_layer_to_take():
    model, x = real("ViT", (32, 48))
    score = SimilarityScore(model, random(3, 12))
    fam, by_score = (FeatureActivationMap(f, [model.blocks[0], model.norm]) for f in (model, score))
    for call in (
        lambda: fam.attribute_all(x, reference_embedding=random(20, 12)),
        lambda: fam.attribute_pair(x, x.flip(0)),
        lambda: by_score.attribute(x, target=1, contrast="rest"),
    ):
        with pytest.raises(ValueError, match=r"layer 'norm'.*such as 'blocks.1.norm1'"):
            call()
    assert not model._forward_hooks
    assert all(not module._forward_hooks for module in model.modules())


def test_a_reshape_transform_that_leaves_out_all_that_is_used_is_told_too():
    model, x = real("ViT", (32, 48))
    fam = FeatureActivationMap(model, model.norm, reshape_transform=patch_tokens(4, 6))
    with pytest.raises(ValueError, match="before the last attention"):
        fam.attribute(x, reference_embedding=random(1, 12))


def test_a_layer_that_truly_does_not_matter_still_warns_and_has_a_zero_map():
    class Aside(TokenEncoder):
        def forward(self, x):
            self.layer(self.patch(x).flatten(2).mT)
            return self.patch(x).mean((2, 3))

    encoder, x = seeded(Aside), random(2, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"does not depend on layer 'layer' \(Linear\)"):
        assert not FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=random(1, 6)).any()


class Halves(HeadEncoder):
    """The first half of the embedding comes from ``layer``, the second from the image itself."""

    def forward(self, x):
        return torch.cat([super().forward(x), x.mean((2, 3))], 1)


def test_a_question_that_a_layer_of_a_cnn_does_not_answer_is_no_matter_of_tokens():
    # Of a reference without the layer's half, nothing comes from the layer: a zero map, and not an error about tokens.
    encoder, x = seeded(Halves), random(2, 3, 8, 8)
    s = torch.tensor([[0.0, 0, 0, 0, 1, 2, 3]]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fam = FeatureActivationMap(encoder, encoder.layer, similarity="dot", normalize=None)
        assert not fam.attribute(x, reference_embedding=s).any()


# Pairs of image and text


@functools.cache
def clip():
    T = pytest.importorskip("transformers")
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text |= {"vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = seeded(lambda: T.CLIPModel(T.CLIPConfig(vision_config=HF_VIT, text_config=text, projection_dim=10)))
    sentences = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 5, 2]])
    with torch.no_grad():
        return model, random(2, 3, 32, 32), sentences, model.get_text_features(sentences).pooler_output


def test_a_sentence_is_a_reference_of_an_image():
    model, x, sentences, s = clip()
    layer = model.vision_model.encoder.layers[1].layer_norm1
    fam = FeatureActivationMap(model.get_image_features, layer, output_selector=pooled)
    maps = fam.attribute_all(x, reference_embedding=s)
    assert maps.shape == (2, 3, 4, 4)
    for k in range(3):
        close(maps[:, [k]], fam.attribute(x, k, reference_embedding=s))
    with torch.no_grad():
        output = model(input_ids=sentences, pixel_values=x)
    scores = output.logits_per_image / model.logit_scale.detach().exp()
    close(SimilarityScore(model.get_image_features, s, output_selector=pooled)(x).detach(), scores)
    close(channel_contributions(fam.embed(x)[:, None], s).sum(2), scores)


def test_the_contrast_of_two_sentences_carries_the_difference_of_their_contributions_by_place():
    model, x, _, s = clip()
    layer = model.vision_model.encoder.layers[1].layer_norm1
    fam, kept = FeatureActivationMap(model.get_image_features, layer, output_selector=pooled), []
    with layer.register_forward_hook(lambda *call: kept.append(call[2])):
        z = model.get_image_features(x).pooler_output
    f = [reference.pair_weights(z_b, s.numpy(), 0, "cosine", contrast=1) for z_b in z.detach().numpy()]
    (gradient,) = torch.autograd.grad((torch.from_numpy(np.stack(f)) * z).sum(), kept)
    expected = 16 * (gradient * kept[0])[:, 1:].sum(2).detach().reshape(2, 1, 4, 4)  # 4 x 4 patches
    close(fam.attribute(x, 0, reference_embedding=s, contrast=1), expected)
    close(-fam.attribute(x, 1, reference_embedding=s, contrast=0), expected)


@pytest.mark.parametrize("layer", ["encoder.layers.1", "encoder.layers.1.mlp"])
def test_the_error_of_clip_names_a_layer_of_the_model(layer):
    model, x, _, s = clip()
    advised = layer_advised(
        FeatureActivationMap,
        model.get_image_features,
        model,
        f"vision_model.{layer}",
        x,
        s[:1],
        output_selector=pooled,
    )
    assert advised == "vision_model.encoder.layers.1.layer_norm1"


def test_the_image_tower_alone_is_explained():
    T = pytest.importorskip("transformers")
    config = T.CLIPVisionConfig(**HF_VIT, projection_dim=10)
    model, x = seeded(lambda: T.CLIPVisionModelWithProjection(config)), random(2, 3, 32, 32)
    fam = FeatureActivationMap(
        model, model.vision_model.encoder.layers[0], output_selector=lambda output: output.image_embeds
    )
    assert fam.attribute(x, reference=x.flip(0)).shape == (2, 1, 4, 4)


# All methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "layer"), [("ViT", "blocks.0"), ("Swin", "layers.1"), ("no prefix", "norm")])
def test_every_method_finds_the_layout(name, layer, method):
    model, x = real(name, (32, 48))
    transform, _ = explicit(LAYERS[name][layer][1], (4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a decomposition with biases has a remainder
        found, wanted = (
            method(model, model.get_submodule(layer), reshape_transform=given).attribute(x, reference=x.flip(0))
            for given in (None, transform)
        )
    assert found.shape == (2, 1, 4, 6)
    assert found.any()
    assert torch.equal(found, wanted)


def test_a_decomposition_of_tokens_adds_up_to_the_similarity():
    encoder, x = seeded(lambda: PatchTokens(prefix=0)), random(2, 3, 16, 24).abs()
    s = random(1, 10).abs()
    maps = SimilarityDecomposition(encoder, encoder.layer).attribute(x, reference_embedding=s)
    close(maps.mean((1, 2, 3)), torch.cosine_similarity(encoder(x), s))


def test_relevance_refuses_a_transformer_and_names_what_has_no_rule():
    model, x = real("ViT", (32, 48))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"LayerNorm.*no rule|Attention"):
        RelevanceCam(model, model.blocks[0]).attribute(x, reference=x.flip(0))


def test_layers_of_different_layouts_make_a_list_of_maps():
    model, x = real("Swin", (32, 48))
    layers = [model.patch_embed.proj, model.patch_embed, model.layers[1]]
    convolution, embedded, last = FeatureActivationMap(model, layers).attribute(x, reference=x.flip(0))
    assert (convolution.shape, embedded.shape, last.shape) == ((2, 1, 8, 12), (2, 1, 8, 12), (2, 1, 4, 6))


def test_methods_are_compared_on_a_layer_of_tokens():
    model, x = real("ViT", (32, 48))
    score = SimilarityScore(model, random(2, 12))
    methods = ["FeatureActivationMap", "LabelFreeActivationMap", "ScoreCam"]
    maps = compare_attributions(score, model.blocks[0], x, target=1, methods=methods)
    assert list(maps) == methods
    assert all(M.shape == (2, 1, 32, 48) and M.any() for M in maps.values())


def test_the_layer_s_input_has_a_layout_too():
    model, x = real("ViT", (32, 48))
    at_output = FeatureActivationMap(model, model.blocks[0]).attribute(x, reference=x.flip(0))
    before = FeatureActivationMap(model, model.blocks[1]).attribute(x, None, None, True, reference=x.flip(0))
    close(before, at_output)


def test_an_empty_batch_of_tokens_has_an_empty_map():
    model, _ = real("ViT", (32, 48))
    fam = FeatureActivationMap(model, model.blocks[0])
    assert fam.attribute(random(0, 3, 32, 48), reference_embedding=random(1, 12)).shape == (0, 1, 4, 6)


def test_a_cnn_is_explained_as_ever():
    encoder, x = seeded(PooledEncoder), random(2, 3, 8, 8)
    fam = FeatureActivationMap(encoder, encoder.layer)
    assert torch.equal(
        fam.attribute(x, reference=x.flip(0)),
        FeatureActivationMap(encoder, encoder.layer, reshape_transform=lambda a: a).attribute(x, reference=x.flip(0)),
    )


def test_the_images_are_found_among_other_inputs():
    model, x, sentences, s = clip()
    layer = model.vision_model.encoder.layers[1].layer_norm1
    both = FeatureActivationMap(model, layer, output_selector=lambda output: output.image_embeds)
    alone = FeatureActivationMap(model.get_image_features, layer, output_selector=pooled)
    maps = both.attribute((sentences[:2], x), 0, reference_embedding=s, contrast=1)
    # image_embeds are normalised: the gradient is that of another length, and without the part along the embedding
    assert maps.shape == alone.attribute(x, 0, reference_embedding=s, contrast=1).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("name", ["coat_lite_tiny", "pit_ti_224"])
def test_the_layer_found_for_a_model_returns_a_map_of_the_image(name):
    timm = pytest.importorskip("timm")
    model, x = timm.create_model(name, num_classes=0).eval(), random(1, 3, 224, 224).float()
    found = last_map(model, (x,))
    maps = FeatureActivationMap(model, model.get_submodule(found)).attribute(x, reference=x.flip(3))
    assert maps.shape[2] == maps.shape[3] < 64


class Parts(nn.Module):
    """A map, what an attention makes of it, and a module that is called for every step."""

    def __init__(self, last):
        super().__init__()
        self.features, self.heads, self.each = nn.Conv2d(3, 6, 4, 4), nn.Identity(), nn.Identity()
        self.last = last

    def forward(self, x):
        a = self.features(x)
        if self.last == "heads":  # (B, 2 heads, 16 places, 3 dimensions)
            a = self.heads(a.flatten(2).unflatten(1, (2, 3)).mT).mT.flatten(1, 2)
        else:
            a = self.each(self.each(a) + 1)
        return a.flatten(2).mean(2)


@pytest.mark.parametrize("last", ["heads", "each"])
def test_the_layer_found_is_a_map_of_the_image_from_one_call(last):
    assert last_map(seeded(lambda: Parts(last)), (random(1, 3, 16, 16),)) == "features"
