"""Places lie where the map says: known from the model, confirmed by the encoder, or refused."""

import contextlib
import functools
import importlib.util
import io
import math
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from encoders import HeadEncoder, random, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    LabelFreeActivationMap,
    SimilarityDecomposition,
    channels_last,
    patch_tokens,
)
from captum_fam import tokens as layouts
from captum_fam.engine.answers import answer_of
from captum_fam.engine.layers import early_map, last_map, maps_on_the_way


def refused(match="do not lie on inputs"):
    return pytest.raises(ValueError, match=match)


class Tokens(nn.Module):
    """
    Patches of 4 by 4 pixels as tokens in a given order, with a class token at a place among them, and two transformer
    layers; the embedding is a head on the mean of the tokens.
    """

    def __init__(self, order, at=0, width=12, first=True):
        super().__init__()
        self.order, self.at, self.first = order, at, first
        self.patch, self.cls = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(
            *[nn.TransformerEncoderLayer(width, 2, 24, 0.0, batch_first=first) for _ in range(2)]
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        t = self.patch(x).flatten(2).mT[:, self.order]
        if self.at is not None:
            t = torch.cat([t[:, : self.at], self.cls.expand(len(t), -1, -1), t[:, self.at :]], 1)
        return self.head(self.blocks(t).mean(1) if self.first else self.blocks(t.transpose(0, 1)).mean(0))


def explicit(order, at, grid):
    """The layout of such tokens, written out: token t is patch order[t]."""

    def transform(a):
        patches = a if at is None else torch.cat([a[:, :at], a[:, at + 1 :]], 1)
        return patches[:, torch.argsort(torch.tensor(order))].mT.unflatten(2, grid)

    return transform


def image(grid, B=2, patch=4):
    return random(B, 3, patch * grid[0], patch * grid[1])


def orders(grid):
    """Orders of patches that models have, beside row by row."""
    h, w = grid
    rows = torch.arange(h * w).reshape(h, w)
    snake = rows.clone()
    snake[1::2] = snake[1::2].flip(1)
    found = {
        "column by column": rows.T,
        "backwards": rows.flip(0, 1),
        "mirrored": rows.flip(1),
        "every second row backwards": snake,
        "shuffled": rows.flatten()[torch.randperm(h * w, generator=torch.Generator().manual_seed(0))],
    }
    found["every second row first"] = torch.cat([rows[::2], rows[1::2]])
    if h % 4 == w % 4 == 0 and h > 4:
        found["windows of 4 by 4"] = rows.reshape(h // 4, 4, w // 4, 4).transpose(1, 2)
    if h % 2 == w % 2 == 0:
        found["windows of 2 by 2"] = rows.reshape(h // 2, 2, w // 2, 2).transpose(1, 2)
    return {name: order.flatten().tolist() for name, order in found.items()}


def row_by_row(grid):
    return list(range(math.prod(grid)))


METHODS = {
    "FAM": lambda m, layer, **o: FeatureActivationMap(m, layer, **o),
    "decomposition": lambda m, layer, **o: SimilarityDecomposition(m, layer, channel_weights="jacobian", **o),
    "integrated": lambda m, layer, **o: SimilarityDecomposition(m, layer, n_steps=2, channel_weights="jacobian", **o),
    "correspondence": CorrespondenceMap,
    "LaFAM": LabelFreeActivationMap,
}
ASKED = {"LaFAM": {}}


def attribute(method, model, layer, x, **options):
    explainer = METHODS[method](model, layer, **options)
    return explainer.attribute(x, **ASKED.get(method, {"reference": x.flip(0)}))


# Tokens


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)], ids=str)
@pytest.mark.filterwarnings("ignore:The places of layer")
def test_a_class_token_that_comes_first_has_the_map_of_its_patches(grid, block, method):
    model, x = seeded(lambda: Tokens(row_by_row(grid))), image(grid)
    found, wanted = (
        attribute(method, model, model.blocks[block], x, **given)
        for given in ({}, {"reshape_transform": explicit(row_by_row(grid), 0, grid)})
    )
    assert found.any()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("at", ["second", "middle", "last but one", "last"])
@pytest.mark.filterwarnings("ignore:The places of layer")
def test_a_class_token_elsewhere_is_refused(at, block, method):
    grid = (4, 4)
    model = seeded(lambda: Tokens(row_by_row(grid), {"second": 1, "middle": 8, "last but one": 15, "last": 16}[at]))
    with refused():
        attribute(method, model, model.blocks[block], image(grid))


@pytest.mark.parametrize("at", [0, None], ids=["class token", "none"])
@pytest.mark.parametrize(
    ("grid", "order"), [(g, name) for g in [(4, 4), (7, 7), (3, 5), (12, 12)] for name in orders(g)], ids=str
)
def test_tokens_in_an_order_of_their_own_are_refused(grid, order, at):
    tokens = orders(grid)[order]
    model, x = seeded(lambda: Tokens(tokens, at)), image(grid)
    with refused():
        FeatureActivationMap(model, model.blocks[0]).attribute(x, reference=x.flip(0))
    transform = explicit(tokens, at, grid)  # which the message asks for
    assert (
        FeatureActivationMap(model, model.blocks[0], reshape_transform=transform)
        .attribute(x, reference=x.flip(0))
        .any()
    )


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_the_order_the_map_is_right_or_refused(data):
    grid = data.draw(st.tuples(st.integers(1, 5), st.integers(2, 5)))
    N = math.prod(grid)
    at = data.draw(st.sampled_from([None, 0, 0, N // 2, N]))
    order = data.draw(st.one_of(st.just(row_by_row(grid)), st.permutations(row_by_row(grid))))
    model, x = seeded(lambda: Tokens(order, at), data.draw(st.integers(0, 9))), image(grid)
    try:
        found = FeatureActivationMap(model, model.blocks[0]).attribute(x, reference=x.flip(0))
    except ValueError:
        return
    transform = explicit(order, at, grid)
    wanted = FeatureActivationMap(model, model.blocks[0], reshape_transform=transform).attribute(x, reference=x.flip(0))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("grid", [(1, 3), (2, 2), (4, 3), (4, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("seed", [2, 5, 45, 53, 95])
def test_whether_the_class_token_is_first_or_second_does_not_hang_on_the_weights(seed, grid):
    """Only the first place is wrong where it is second; attention makes it answer a little."""
    for at in (0, 1):
        model, x = seeded(lambda at=at: Tokens(row_by_row(grid), at), seed), image(grid)
        fam = FeatureActivationMap(model, model.blocks[0])
        if at:
            with refused():
                fam.attribute(x, reference=x.flip(0))
        else:
            assert fam.attribute(x, reference=x.flip(0)).shape == (2, 1, *grid)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("at", [0, 1, 2])
def test_two_patches_and_a_class_token_are_not_told_apart(at, seed):
    model, x = seeded(lambda: Tokens(row_by_row((1, 2)), at), seed), image((1, 2))
    with refused(match="Cannot tell|do not lie on inputs"):
        FeatureActivationMap(model, model.blocks[0]).attribute(x, reference=x.flip(0))


class Mirrored(Tokens):
    """Tokens that lie where they should, but have a part of the one at the other end."""

    def forward(self, x):
        t = self.patch(x).flatten(2).mT
        return self.head(self.blocks(t + 0.9 * t.flip(1)).square().mean(1))


def test_where_others_answer_too_it_is_said_that_it_cannot_be_told():
    model, x = seeded(lambda: Mirrored(None, None)), image((4, 6))
    model.blocks = nn.Identity()
    fam = FeatureActivationMap(model, model.blocks)
    with refused(match="Cannot tell whether the activations") as error:
        fam.attribute(x, reference=x.flip(0))
    assert "do not lie" not in str(error.value)
    assert "reshape_transform=patch_tokens(4, 6);" in str(error.value)


@pytest.fixture(scope="module")
def trained():
    """A trained vision transformer whose class token comes first, and 40 photos."""
    folder = Path(os.environ.get("CAPTUM_FAM_DATA", ""))
    if not (folder / "signed" / "vit_cifar10.npz").is_file():
        pytest.skip("set CAPTUM_FAM_DATA to the folder of pretrained encoders")
    with pytest.MonkeyPatch.context() as patched:  # its module of the name `encoders` is another than that of the tests
        for name in ("encoders", "signed_encoders"):
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            patched.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
    encoder = module.load("vit_cifar10")
    with zipfile.ZipFile(folder / "photos" / "cifar10.zip") as zipped:
        names = sorted(name for name in zipped.namelist() if name.endswith((".jpg", ".png")))
        images = [Image.open(io.BytesIO(zipped.read(name))).convert("RGB") for name in names[:: len(names) // 40][:40]]
    return encoder.net, torch.stack([encoder.transform(image) for image in images])


def verdicts(net, layer, images, order=None):
    """Whether each of the images alone is taken, by an explainer of its own."""

    def reordered(module, args, output):
        return output[:, order]

    found = []
    with contextlib.ExitStack() as stack:
        module = net.get_submodule(layer)
        if order is not None:
            stack.callback(module.register_forward_hook(reordered).remove)
        for x in images.split(1):
            try:
                found.append(LabelFreeActivationMap(net, module).attribute(x))
            except ValueError:
                found.append(None)
    return found


@pytest.mark.parametrize("layer", ["blocks.3.norm1", "blocks.2.norm1", "blocks.1", "norm"])
def test_a_trained_transformer_is_taken_whatever_the_image(trained, layer):
    net, photos = trained
    few = photos[:: 1 if layer == "blocks.3.norm1" else 8]
    wanted = LabelFreeActivationMap(net, net.get_submodule(layer), reshape_transform=patch_tokens(8, 8)).attribute(few)
    for found, right in zip(verdicts(net, layer, few), wanted.split(1)):
        assert found is not None
        torch.testing.assert_close(found, right)
    dark = few[:2] * 0.2 - 1.5
    assert all(found is not None for found in verdicts(net, layer, dark))


@pytest.mark.parametrize("wrong", ["second", "middle", "last", *orders((8, 8))])
def test_a_trained_transformer_in_another_order_is_refused_whatever_the_image(trained, wrong):
    net, photos = trained
    at = {"second": 1, "middle": 32, "last": 64}.get(wrong, 0)
    patches = [1 + i for i in orders((8, 8)).get(wrong, row_by_row((8, 8)))]
    order = [*patches[:at], 0, *patches[at:]]
    assert verdicts(net, "blocks.3.norm1", photos[::13], order) == [None] * 4


def test_a_batch_of_as_many_images_as_tokens_is_not_taken_for_tokens():
    grid = (4, 4)
    model = seeded(lambda: Tokens(row_by_row(grid), first=False))
    for B in (17, 8):  # 17 tokens
        with pytest.raises(ValueError, match=r"blocks\.0"):
            FeatureActivationMap(model, model.blocks[0]).attribute(image(grid, B), reference=image(grid, 1))


class Unfolded(nn.Module):
    """Maps cut to pieces, as 4-D tensors that look like maps: blocks, unfolded patches, and attentions."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.stem, self.layer = kind, nn.Conv2d(3, 8, 2, 2), nn.Identity()
        self.head = nn.Linear(8 if kind != "attention" else 64, 5)

    def forward(self, x):
        A = self.stem(x)  # (B, 8, 8, 8) of 16 by 16 pixels
        pieces = A.unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (B, C, row, i, column, j)
        if self.kind == "blocks":  # (B, blocks, places, C)
            return self.head(self.layer(pieces.permute(0, 2, 4, 3, 5, 1).reshape(len(x), 16, 4, 8)).mean((1, 2)))
        if self.kind == "unfolded":  # (B, C, places, blocks)
            return self.head(self.layer(pieces.permute(0, 1, 3, 5, 2, 4).reshape(len(x), 8, 4, 16)).mean((2, 3)))
        t = A.flatten(2).mT.unflatten(2, (2, 4)).transpose(1, 2)
        self.layer.__class__ = nn.Softmax
        self.layer.dim = -1
        return self.head(self.layer(t @ t.mT).mean((1, 2)))  # (B, heads, 64, 64)


@pytest.mark.parametrize("kind", ["blocks", "unfolded", "attention"])
def test_pieces_and_attentions_are_no_maps(kind):
    model, x = seeded(lambda: Unfolded(kind)), random(2, 3, 16, 16)
    with refused():
        FeatureActivationMap(model, model.layer).attribute(x, reference=x.flip(0))


def test_as_many_blocks_as_places_in_each_are_no_map():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer, self.head = nn.Conv2d(3, 12, 2, 2), nn.LayerNorm(12), nn.Linear(12, 5)

        def forward(self, x):
            pieces = self.stem(x).unflatten(3, (4, 4)).unflatten(2, (4, 4))  # 16 by 16 places as 16 blocks of 16
            return self.head(self.layer(pieces.permute(0, 2, 4, 3, 5, 1).reshape(len(x), 16, 16, 12)).mean((1, 2)))

    model, x = seeded(Blocks), random(2, 3, 32, 32)
    with refused():
        FeatureActivationMap(model, model.layer).attribute(x, reference=x.flip(0))


@pytest.mark.parametrize(("size", "patch", "width"), [((32, 48), 2, 40), ((32, 48), 8, 8), ((56, 84), 4, 16)])
def test_channels_last_of_an_oblong_image_are_not_taken_for_a_side(size, patch, width):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer = nn.Conv2d(3, width, patch, patch), nn.LayerNorm(width)
            self.head = nn.Linear(width, 5)

        def forward(self, x):
            return self.head(self.layer(self.stem(x).movedim(1, -1)).square().mean((1, 2)))

    model, x = seeded(Last), random(2, 3, *size)
    try:
        found = FeatureActivationMap(model, model.layer).attribute(x, reference=x.flip(0))
    except ValueError:
        return
    fam = FeatureActivationMap(model, model.layer, reshape_transform=channels_last)
    assert torch.equal(found, fam.attribute(x, reference=x.flip(0)))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("nest_tiny", ["levels.0.transformer_encoder", "levels.1.transformer_encoder.1.norm1"]),
        ("mobilevitv2_050", ["stages.4.1.transformer", "stages.4.1.norm"]),
        ("hiera_tiny_224", ["blocks.0.norm1", "blocks.3"]),
        ("mixer_s32_224", ["blocks.0.mlp_tokens.fc1"]),
        ("vit_tiny_patch16_224", ["blocks.0.attn.q_norm"]),
    ],
)
def test_layers_of_timm_that_have_another_order_are_refused(name, layers):
    timm = pytest.importorskip("timm")
    model = seeded(lambda: timm.create_model(name, num_classes=0)).float()
    size = model.default_cfg["input_size"][-1]
    x = random(1, 3, size, size, dtype=torch.float32)
    for layer in layers:
        with refused():
            FeatureActivationMap(model, model.get_submodule(layer)).attribute(x, reference_embedding=model(x).detach())


# Sequences: no grid tells channels from places


class Sequence(nn.Module):
    """A transformer on sequences (B, T, features), or on (B, features, T) that it turns."""

    def __init__(self, features, turned=False, width=16, embedding=5):
        super().__init__()
        self.turned, self.first = turned, nn.Linear(features, width)
        self.block, self.head = (
            nn.TransformerEncoderLayer(width, 2, 24, 0.0, batch_first=True),
            nn.Linear(width, embedding),
        )

    def forward(self, x):
        return self.head(self.block(self.first(x.mT if self.turned else x)).mean(1))


@pytest.mark.parametrize("embedding", [5, 24, 16], ids=lambda d: f"D={d}")  # 24 is the length of the sequence, too
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("features", [8, 24])
def test_time_is_not_taken_for_channels(features, turned, embedding):
    model = seeded(lambda: Sequence(features, turned, embedding=embedding))
    x = random(2, *((features, 24) if turned else (24, features)))
    for layer in (model.first, model.block):
        with pytest.raises(ValueError, match="channels_last"):
            FeatureActivationMap(model, layer).attribute(x, reference=x.flip(0))
        fam = FeatureActivationMap(model, layer, reshape_transform=channels_last)
        assert fam.attribute(x, reference=x.flip(0)).shape == (2, 1, 24)


def test_the_words_of_a_text_are_not_taken_for_channels():
    class Text(Sequence):
        def __init__(self):
            super().__init__(8)
            self.words = nn.Embedding(50, 8)

        def forward(self, x):
            return super().forward(self.words(x))

    model, x = seeded(Text), torch.arange(48).reshape(2, 24)
    with refused():
        FeatureActivationMap(model, model.block).attribute(x, reference=x.flip(0))


@pytest.mark.parametrize("size", [5, 6, 16])
@pytest.mark.parametrize("seed", range(5))
def test_convolutions_of_sequences_are_taken_as_they_are(size, seed):
    model, x = seeded(lambda: HeadEncoder(1, embedding=7), seed), random(2, 3, size, seed=seed)
    for layer in (model.conv2, model.layer):
        found, wanted = (
            FeatureActivationMap(model, layer, reshape_transform=given).attribute(x, reference=x.flip(0))
            for given in (None, lambda a: a)
        )
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("T", "width"), [(16, 8), (24, 16), (20, 32), (12, 12)])
def test_a_transformer_on_the_features_themselves_is_not_taken_for_a_convolution(T, width):
    """Its residual paths leave time and features where they were, so both look like places."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.block = nn.TransformerEncoderLayer(width, 2, 24, 0.0, batch_first=True)
            self.head = nn.Linear(width, 5)

        def forward(self, x):
            return self.head(self.block(self.norm(x)).mean(1))

    model, x = seeded(Plain), random(2, T, width)
    for layer in (model.norm, model.block):
        with pytest.raises(ValueError, match="channels_last"):
            FeatureActivationMap(model, layer).attribute(x, reference=x.flip(0))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width))

    def forward(self, x):
        return torch.relu(x + self.body(x))


@pytest.mark.parametrize("width", [3, 8, 24])
@pytest.mark.parametrize("T", [16, 24, 50])
def test_convolutions_that_keep_their_channels_where_they_were_are_taken_as_they_are(T, width):
    model = seeded(
        lambda: nn.Sequential(
            *(Residual(width), nn.Conv1d(width, width, 3, padding=1, groups=width), nn.ReLU(), nn.AdaptiveAvgPool1d(1)),
            *(nn.Flatten(), nn.Linear(width, 5)),
        )
    )
    x = random(2, width, T)
    for layer in (0, 2):
        fam = FeatureActivationMap(model, model[layer])
        assert fam.attribute(x, reference=x.flip(0)).shape == (2, 1, T)


@pytest.mark.parametrize("names", [2, 5, 30])
def test_a_convolution_on_letters_is_taken_as_it_is(names):
    class Letters(nn.Module):
        def __init__(self):
            super().__init__()
            self.letters, self.convolution = nn.Embedding(names, 8), nn.Conv1d(8, 6, 3, padding=1)
            self.layer, self.head = nn.ReLU(), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.layer(self.convolution(self.letters(x).mT)).mean(2))

    model, x = seeded(Letters), torch.randint(0, names, (2, 40), generator=torch.Generator().manual_seed(0))
    assert FeatureActivationMap(model, model.layer).attribute(x, reference=x.flip(0)).shape == (2, 1, 40)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.complex128, torch.float16], ids=str)
def test_inputs_of_any_dtype_can_be_changed(dtype):
    class Any(HeadEncoder):
        def forward(self, x):
            return super().forward(x.real.double() if x.is_complex() else x.double())

    x = random(2, 3, 30) * 3
    x = x > 0 if dtype == torch.bool else x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)
    model = seeded(lambda: Any(1, embedding=7))
    assert FeatureActivationMap(model, model.layer).attribute(x, reference_embedding=random(1, 7)).shape[2] == 15


def test_the_input_of_most_dimensions_is_the_one_that_a_map_lies_on():
    class Beside(HeadEncoder):
        def forward(self, table, x):
            return super().forward(x) + table.sum(1, keepdim=True)

    for dim in (1, 3):
        model = seeded(lambda dim=dim: Beside(dim, embedding=7))
        x = (random(2, 4), random(2, 3, *[8] * dim))
        fam = FeatureActivationMap(model, model.layer)
        assert fam.attribute(x, reference_embedding=random(1, 7)).shape[2:] == (4,) * dim


def test_a_convolution_of_two_strides_is_taken_as_it_is():
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 6, 3, (2, 1), 1), nn.ReLU(), nn.Conv2d(6, 6, 3, (2, 1), 1), nn.ReLU()),
            *(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 4)),
        )
    )
    x = random(2, 1, 32, 40)
    assert FeatureActivationMap(model, model[3]).attribute(x, reference=x.flip(0)).shape == (2, 1, 8, 40)


# What the encoder is asked, and how


class Counted(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.model(x)


def test_the_encoder_is_asked_once_for_inputs_of_a_shape_with_one_of_them():
    grid = (4, 4)
    model = Counted(seeded(lambda: Tokens(slice(None))))
    fam = FeatureActivationMap(model, model.model.blocks[0])
    s = random(1, 5)
    for B in (3, 2):
        fam.attribute(image(grid, B), reference_embedding=s)
    assert model.sizes == [3, *[1] * 17, 2]  # one as it is, and each of its 16 places changed
    fam.attribute(image((8, 8), 1), reference_embedding=s)
    assert model.sizes == [3, *[1] * 17, 2, 1, *[1] * 17]


def test_a_convolution_on_images_is_not_asked():
    model = Counted(seeded(HeadEncoder))
    x = random(2, 3, 16, 16)
    for layer in (model.model.conv1, model.model.layer):
        FeatureActivationMap(model, layer).attribute(x, reference_embedding=random(1, 4))
    assert model.sizes == [2, 2]


def test_nothing_of_the_caller_s_changes_when_the_encoder_is_asked():
    grid = (4, 4)
    model = seeded(lambda: Tokens(row_by_row(grid)))
    model.blocks[0].dropout.p = model.blocks[0].self_attn.dropout = 0.3
    model.bn = nn.BatchNorm2d(3).double()
    embed = model.forward
    model.forward = lambda x: embed(model.bn(x))
    model.train()
    x = image(grid)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = []
    for transform in (None, patch_tokens(*grid)):  # with a transform, nothing is asked
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match="training mode"):
            map_ = FeatureActivationMap(model, model.blocks[0], reshape_transform=transform).attribute(
                x, reference_embedding=random(1, 5)
            )
        states.append((map_, torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_an_attempt_that_fails_gives_back_the_random_numbers_that_it_drew():
    grid = (4, 4)

    class Drawing(Tokens):
        def forward(self, x):
            torch.rand(3)
            return super().forward(x.reshape(2, 3, 16, 16))  # no single image

    model, states = seeded(lambda: Drawing(row_by_row(grid))), []
    for transform in (None, patch_tokens(*grid)):
        torch.manual_seed(3)
        FeatureActivationMap(model, model.blocks[0], reshape_transform=transform).attribute(
            image(grid), reference_embedding=random(1, 5)
        )
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_encoder_that_is_not_hashable_can_be_asked():
    class Called:
        __hash__ = None

        def __call__(self, x):
            return model(x)

    grid = (4, 4)
    model = seeded(lambda: Tokens(row_by_row(grid)))
    fam = FeatureActivationMap(Called(), model.blocks[0])
    assert fam.attribute(image(grid), reference_embedding=random(1, 5)).shape[2:] == grid


def test_an_encoder_of_whole_batches_is_asked_with_its_batch():
    grid = (4, 4)

    class Whole(Tokens):
        def forward(self, x):
            return super().forward(x.reshape(3, 3, 16, 16))

    model = seeded(lambda: Whole(row_by_row(grid)))
    x = image(grid, 3)
    assert FeatureActivationMap(model, model.blocks[0]).attribute(x, reference_embedding=random(1, 5)).shape[2:] == grid
    model = seeded(lambda: Whole(orders(grid)["shuffled"]))
    with refused():
        FeatureActivationMap(model, model.blocks[0]).attribute(x, reference_embedding=random(1, 5))


def test_an_encoder_that_refuses_changed_inputs_is_named_as_the_reason():
    grid = (4, 4)

    class Strict(Tokens):
        def forward(self, x):
            if not torch.isin(x, torch.tensor([0.0, 1.0], dtype=x.dtype)).all():
                raise RuntimeError("only zeros and ones")
            return super().forward(x)

    model, x = seeded(lambda: Strict(row_by_row(grid))), (image(grid) > 0).double()
    with refused(match=r"failed when a part of an input was changed \(RuntimeError: only zeros and ones\)") as error:
        FeatureActivationMap(model, model.blocks[0]).attribute(x, reference=x.flip(0))
    assert isinstance(error.value.__cause__, RuntimeError)
    assert last_map(model, (x,)) == "patch"
    fam = FeatureActivationMap(model, model.blocks[0], reshape_transform=patch_tokens(*grid))
    assert fam.attribute(x, reference=x.flip(0)).shape[2:] == grid


@pytest.mark.parametrize("kind", ["zeros", "bright patch", "not finite", "float16"])
def test_the_answer_does_not_depend_on_what_the_first_image_shows(kind):
    grid = (4, 4)
    x = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    if kind == "bright patch":
        x[:, :, 4:8, 4:8] = 1
    if kind == "not finite":
        x[0, 0, 0, 0], x[1] = torch.nan, 1
    for at, right in ((0, True), (16, False)):
        model = seeded(lambda at=at: Tokens(row_by_row(grid), at))
        given = x
        if kind == "float16":
            model, given = model.half(), x.half()
        fam = LabelFreeActivationMap(model, model.blocks[0])
        if right:
            assert fam.attribute(given).shape == (2, 1, *grid)
        else:
            with refused():
                fam.attribute(given)


def test_of_several_inputs_the_images_are_changed():
    grid = (4, 4)

    class Two(Tokens):
        def forward(self, scale, x, shift):
            return super().forward(x * scale[:, None, None, None] + shift[:, None, None, None])

    x, scale, shift = image(grid), random(2), random(2, seed=5)
    for at in (0, 16):
        model = seeded(lambda at=at: Two(row_by_row(grid), at))
        fam = FeatureActivationMap(model, model.blocks[0])
        call = functools.partial(
            fam.attribute, (scale, x), additional_forward_args=shift, reference_embedding=random(1, 5)
        )
        if at:
            with refused():
                call()
        else:
            assert call().shape == (2, 1, *grid)


def test_every_tensor_of_every_layer_is_asked():
    grid = (4, 4)

    class Pair(nn.Module):
        def forward(self, t):
            return t, t.flip(1)

    class Both(Tokens):
        def __init__(self, *args):
            super().__init__(*args)
            self.pair = Pair()

        def forward(self, x):
            a, b = self.pair(self.patch(x).flatten(2).mT)
            return self.head((a + 2 * b.flip(1)).square().mean(1))

    model, x = seeded(lambda: Both(row_by_row(grid), None)), image(grid)
    with refused():
        FeatureActivationMap(model, [model.patch, model.pair]).attribute(x, reference=x.flip(0))


def test_the_input_of_a_layer_is_asked_as_its_output_is():
    grid = (4, 4)
    for order, right in ((row_by_row(grid), True), (orders(grid)["mirrored"], False)):
        model, x = seeded(lambda order=order: Tokens(order)), image(grid)
        fam = FeatureActivationMap(model, model.blocks[1])
        call = functools.partial(fam.attribute, x, reference=x.flip(0), attribute_to_layer_input=True)
        if right:
            assert call().shape == (2, 1, *grid)
        else:
            with refused():
                call()


def test_an_empty_batch_is_not_asked():
    model = Counted(seeded(lambda: Tokens(row_by_row((4, 4)), 16)))
    x = image((4, 4))[:0]
    assert (
        FeatureActivationMap(model, model.model.blocks[0]).attribute(x, 0, reference_embedding=random(1, 5)).numel()
        == 0
    )
    assert model.sizes == [0]


def test_layers_in_another_order_are_not_found():
    grid = (4, 4)
    for order, last, early in [
        (row_by_row(grid), "blocks", "patch"),
        (orders(grid)["shuffled"], "patch", "patch"),
    ]:
        model, x = seeded(lambda order=order: Tokens(order)), image(grid)
        assert last_map(model, (x,)) == last
        assert early_map(model, (x,)) == early
        assert ("blocks.0" in maps_on_the_way(model, (x,))) == (last == "blocks")


# What models say of themselves

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
HF = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 32}


def timm_model(module, name, **options):
    pytest.importorskip("timm")
    return getattr(__import__(f"timm.models.{module}", fromlist=[name]), name)(**VIT, **options)


def transformers_model(name, **options):
    T = pytest.importorskip("transformers")
    config = {"ClipVision": "CLIPVision", "SiglipVision": "SiglipVision", "IJepa": "IJepa"}.get(name, name)
    return getattr(T, f"{config}Model")(getattr(T, f"{config}Config")(**HF | {"patch_size": 8} | options))


def open_clip_model():
    transformer = pytest.importorskip("open_clip.transformer")
    return transformer.VisionTransformer(32, 8, 12, 2, 2, 2.0, output_dim=6)


def torchvision_model():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 2, 12, 20)
    model.heads = nn.Identity()
    return model


# model: how it is made, tokens before the patches, an early layer of tokens
KNOWN = {
    "timm.VisionTransformer": (lambda: timm_model("vision_transformer", "VisionTransformer"), 1, "blocks.0.norm1"),
    "timm.VisionTransformer, registers": (
        lambda: timm_model("vision_transformer", "VisionTransformer", reg_tokens=6),
        7,
        "blocks.0.norm1",
    ),
    "timm.VisionTransformerDistilled": (lambda: timm_model("deit", "VisionTransformerDistilled"), 2, "blocks.0.norm1"),
    "timm.Eva": (lambda: timm_model("eva", "Eva"), 1, "blocks.0.norm1"),
    "timm.Beit": (lambda: timm_model("beit", "Beit"), 1, "blocks.0.norm1"),
    "torchvision": (torchvision_model, 1, "encoder.layers.encoder_layer_0.ln_1"),
    "open_clip": (open_clip_model, 1, "ln_pre"),
    "vit": (lambda: transformers_model("ViT"), 1, "embeddings"),
    "deit": (lambda: transformers_model("DeiT"), 2, "embeddings"),
    "beit": (lambda: transformers_model("Beit"), 1, "embeddings"),
    "dinov2": (lambda: transformers_model("Dinov2"), 1, "embeddings"),
    "dinov2_with_registers": (
        lambda: transformers_model("Dinov2WithRegisters", num_register_tokens=3),
        4,
        "embeddings",
    ),
    "dinov3_vit": (lambda: transformers_model("DINOv3ViT", hidden_size=16, num_register_tokens=4), 5, "embeddings"),
    "clip_vision_model": (lambda: transformers_model("CLIPVision"), 1, "embeddings"),
    "siglip_vision_model": (lambda: transformers_model("SiglipVision"), 0, "embeddings"),
    "ijepa": (lambda: transformers_model("IJepa"), 0, "embeddings"),
}


def pooled(output):
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state.mean(1)


def find(model, layer):
    return next(m for name, m in model.named_modules() if name == layer or name.endswith(f".{layer}"))


def test_every_model_that_is_known_is_tried_here():
    assert {name for name in KNOWN if "." not in name and name not in ("torchvision", "open_clip")} == set(
        layouts._PREFIX_OF_TYPE
    )
    assert {name[5:].partition(",")[0] for name in KNOWN if name.startswith("timm.")} == set(layouts._OF_TIMM)


@pytest.mark.parametrize("name", KNOWN)
def test_the_tokens_of_a_known_model_lie_where_it_says(name):
    build, prefix, layer = KNOWN[name]
    model = seeded(build)
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):  # what begins at zero has no effect
            p.add_(random(*p.shape, seed=number), alpha=0.1)
    layer, x = find(model, layer), random(1, 3, 32, 32)
    # The oracle: one patch after another is changed, and the token that changes most is noted.
    kept = []
    with torch.no_grad(), layer.register_forward_hook(lambda *call: kept.append(call[2])):
        model(x)
        for i in range(4):
            for j in range(4):
                changed = x.clone()
                changed[:, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] *= -2
                model(changed)
    answered = [int((a - kept[0])[0].norm(dim=1).argmax()) for a in kept[1:]]
    assert answered == list(range(prefix, prefix + 16))

    counted = Counted(model)
    fam = FeatureActivationMap(counted, layer, output_selector=pooled, channel_weights="jacobian")
    found = fam.attribute(x, reference_embedding=random(1, pooled(model(x)).shape[1]))
    assert counted.sizes == [1]  # it is known, so not asked
    transform = lambda a: a[:, prefix:].mT.unflatten(2, (4, 4))  # noqa: E731
    fam = FeatureActivationMap(
        counted, layer, output_selector=pooled, channel_weights="jacobian", reshape_transform=transform
    )
    wanted = fam.attribute(x, reference_embedding=random(1, pooled(model(x)).shape[1]))
    assert torch.equal(found, wanted)


def test_what_a_model_says_holds_for_its_own_modules_alone():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.layer, self.head = torchvision_model(), nn.Identity(), nn.Linear(12, 5)

        def forward(self, x):
            tokens = self.vit.encoder(torch.cat([self.vit.class_token, self.vit._process_input(x)], 1))
            return self.head(self.layer(tokens.flip(1)).mean(1))

    model, x = seeded(Shuffled), random(1, 3, 32, 32)
    with refused():
        FeatureActivationMap(model, model.layer).attribute(x, reference_embedding=random(1, 5))


def test_the_refusal_names_layer_shapes_and_cures():
    model = seeded(lambda: Tokens(row_by_row((4, 4)), 16))
    x = image((4, 4))
    with refused() as error:
        FeatureActivationMap(model, model.blocks[0]).attribute(x, reference=x)
    for word in ("(2, 17, 12)", "'blocks.0'", "(2, 3, 16, 16)", "reshape_transform", "patch_tokens(height, width)"):
        assert re.search(re.escape(word), str(error.value))


@pytest.mark.parametrize(
    ("by", "partial", "right"), [(0, True, True), (1, False, True), (1, True, False), (2, False, False)]
)
def test_near_is_not_enough(by, partial, right):
    """In one row of 40, what answers lies so many places before the cell: one may be a blur, if no token is missing."""
    cells = [(0, i) for i in (2, 5, 11, 17, 22, 28, 33, 39)]
    changes = torch.zeros(8, 40, dtype=torch.float64)
    for row, (_, i) in zip(changes, cells):
        row[i - by] = 1
    answer = answer_of(changes, (1, 40), cells, partial)
    assert answer.is_near
    assert answer.is_local == right
