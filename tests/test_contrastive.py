"""Contrastive encoders, with and without their projection heads, and the nearest-neighbour decision over a bank."""

import functools
import importlib.util
import io
import os
import zipfile
from collections import Counter
from pathlib import Path

import helpers
import numpy as np
import pytest
import reference as oracle
import torch
from encoders import HeadEncoder, PooledEncoder, random, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from captum_fam import FeatureActivationMap, channel_contributions, contribution_weights, nearest_references

DATA = os.environ.get("CAPTUM_FAM_DATA")
close = functools.partial(helpers.close, rtol=None, atol=None)  # as their dtype has it
few = settings(deadline=None, max_examples=40)
HEADS = {
    "SimCLR": lambda heads: heads.SimCLRProjectionHead(6, 8, 4),
    "MoCo": lambda heads: heads.MoCoProjectionHead(6, 8, 4, num_layers=3, batch_norm=True),
    "BYOL": lambda heads: nn.Sequential(heads.BYOLProjectionHead(6, 8, 5), heads.BYOLPredictionHead(5, 8, 4)),
    "SimSiam": lambda heads: heads.SimSiamProjectionHead(6, 8, 6),  # as many dimensions as channels
    "BarlowTwins": lambda heads: heads.BarlowTwinsProjectionHead(6, 8, 10),
    "VICReg": lambda heads: heads.VICRegProjectionHead(6, 8, 10),
    "SwaV": lambda heads: nn.Sequential(heads.SwaVProjectionHead(6, 8, 4), heads.SwaVPrototypes(4, 9)),
    "DINO": lambda heads: heads.DINOProjectionHead(6, 8, 4, 12, batch_norm=True),
}


class Contrastive(nn.Module):
    """A backbone that pools by the mean, and the head that a method trains it with."""

    def __init__(self, head):
        super().__init__()
        self.backbone, self.head = PooledEncoder(), head
        for norm in (m for m in head.modules() if isinstance(m, nn.BatchNorm1d)):
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_two_views_with_and_without_the_projection_head(head):
    heads = pytest.importorskip("lightly.models.modules.heads")
    model = seeded(lambda: Contrastive(head(heads)))
    layer, photo = model.backbone.layer, random(3, 3, 10, 10)
    views = photo[..., 1:9, 1:9], photo.flip(3) + random(3, 3, 10, 10, seed=2) / 5
    for encoder, route in ((model, "jacobian"), (model.backbone, "aligned")):
        fam = FeatureActivationMap(encoder, layer)
        pair = fam.attribute_pair(*views)
        for (x, other), maps in zip((views, views[::-1]), pair):
            assert fam.route(x) == route
            A = model.backbone.features(x).detach().requires_grad_()
            z = A.mean((2, 3)) if encoder is model.backbone else model.head(A.mean((2, 3)))
            s = encoder(other).detach().numpy()
            f = np.stack([oracle.pair_weights(*row, 0, "cosine") for row in zip(z.detach().numpy(), s[:, None])])
            (gradient,) = torch.autograd.grad((torch.from_numpy(f) * z).sum(), A)
            close(maps, A[0, 0].numel() * (gradient * A).sum(1, keepdim=True).detach())
            assert (maps.flatten(1).std(1) > 0).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("question", [{}, {"contrast": 1}, {"contrast": "self"}, {"threshold": 0.5}], ids=str)
def test_the_signs_of_a_heads_dimensions_do_not_matter(head, question):
    heads = pytest.importorskip("lightly.models.modules.heads")
    model, x, others = seeded(lambda: Contrastive(head(heads))), random(3, 3, 8, 8), random(2, 3, 8, 8, seed=2)
    D = model(x).shape[1]
    signs = torch.tensor([1.0, -1.0, -1.0]).repeat(D)[:D]
    maps, turned = (
        FeatureActivationMap(encoder, model.backbone.layer).attribute(x, 0, reference=others, **question)
        for encoder in (model, lambda x: model(x) * signs)
    )
    assert maps.any()
    close(turned, maps)


def votes(z, bank, labels, k, temperature):
    """The decision for one embedding, one neighbour after the other: label, shares, neighbours, agreeing ones."""
    cosines = [oracle.cosine(z, s).sum() for s in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
    shares = Counter()
    for i in nearest:
        shares[labels[i]] += np.exp((cosines[i] - max(cosines)) / temperature)
    best = max(shares, key=shares.get)
    return (
        best,
        {y: v / sum(shares.values()) for y, v in shares.items()},
        nearest,
        [i for i in nearest if labels[i] == best],
    )


@few
@given(st.data(), st.integers(0, 10**6), st.floats(0.01, 10))
def test_the_decision_is_that_of_a_loop_over_the_bank(data, seed, temperature):
    N, D, B = (data.draw(st.integers(1, most)) for most in (12, 4, 3))
    k = data.draw(st.integers(1, N))
    labels = data.draw(st.lists(st.integers(-3, 3), min_size=N, max_size=N))
    z, bank = random(B, D + 1, seed=seed), random(N, D + 1, seed=seed + 1) * 3
    found = nearest_references(z, bank, data.draw(st.sampled_from([labels, torch.tensor(labels)])), k, temperature)
    assert found.classes.tolist() == sorted(set(labels))
    for b in range(B):
        best, shares, nearest, agreeing = votes(z[b].numpy(), bank.numpy(), labels, k, temperature)
        assert found.predicted[b] == best
        assert found.scores[b].tolist() == pytest.approx([shares.get(y, 0) for y in sorted(set(labels))], abs=1e-9)
        assert found.indices[b].tolist() == nearest
        assert found.indices[b][found.agrees[b]].tolist() == agreeing
        close(found.reference_embedding[b], sum(bank[i] / bank[i].norm() for i in agreeing) / len(agreeing))
        # One reference has the weights that min-max makes of the agreeing neighbours' mean contributions.
        c = channel_contributions(z[b], bank[agreeing]).mean(0)
        one = channel_contributions(z[b], found.reference_embedding[b])
        close(contribution_weights(one), contribution_weights(c), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_classes_come_in_the_order_of_lightly(k, temperature):
    knn_predict = pytest.importorskip("lightly.utils.benchmarking").knn_predict
    z, bank = (nn.functional.normalize(random(n, 5, seed=n)) for n in (20, 60))
    labels = torch.arange(60) % 4
    found = nearest_references(z, bank, labels, k, temperature)
    order = knn_predict(z, bank.T, labels, 4, k, temperature)
    assert torch.equal(found.predicted, order[:, 0])
    ranked = found.scores.gather(1, order)
    assert (ranked.diff(dim=1) <= 1e-6).all()  # lightly adds up in single precision


@pytest.mark.skipif(DATA is None, reason="set CAPTUM_FAM_DATA to the folder of pretrained encoders")
def test_a_real_bank_decides_as_in_lightly():
    knn_predict = pytest.importorskip("lightly.utils.benchmarking").knn_predict
    spec = importlib.util.spec_from_file_location("pretrained_encoders", Path(DATA) / "encoders.py")
    spec.loader.exec_module(pretrained := importlib.util.module_from_spec(spec))
    encoder = pretrained.load("resnet20_cifar10")
    with zipfile.ZipFile(Path(DATA) / "photos" / "cifar10.zip") as zipped:
        names = sorted(n for n in zipped.namelist() if n.startswith("test/") and n.endswith(".jpg"))[::10]
        images = torch.stack([encoder.transform(Image.open(io.BytesIO(zipped.read(n)))) for n in names])
    kinds = sorted({n.split("/")[1] for n in names})
    labels = torch.tensor([kinds.index(n.split("/")[1]) for n in names])
    z, held_out = FeatureActivationMap(encoder.net, encoder.layer).embed(images), torch.arange(len(names)) % 4 == 0
    found = nearest_references(z[held_out], z[~held_out], labels[~held_out], k=20)
    unit = nn.functional.normalize(z)
    order = knn_predict(unit[held_out], unit[~held_out].T, labels[~held_out], len(kinds), 20, 0.1)
    assert torch.equal(found.predicted, order[:, 0])
    assert (found.predicted == labels[held_out]).float().mean() > 0.6


@pytest.mark.parametrize("build", [PooledEncoder, HeadEncoder])
def test_the_reference_makes_the_map_of_the_agreeing_neighbours(build):
    encoder, x, labels = seeded(build), random(4, 3, 8, 8), torch.arange(12) % 3
    bank = encoder(random(12, 3, 8, 8, seed=2)).detach()
    fam = FeatureActivationMap(encoder, encoder.layer)
    found = nearest_references(fam.embed(x), bank, labels, k=7)
    maps = fam.attribute(x, reference_embedding=found.reference_embedding)
    A = encoder.features(x).detach().requires_grad_()
    z = A.mean((2, 3)) if build is PooledEncoder else encoder.head(A.mean((2, 3)))
    neighbours = [bank[i[a]] for i, a in zip(found.indices, found.agrees)]
    assert max(map(len, neighbours)) > 1
    f = []
    for row, shots in zip(z.detach().numpy(), neighbours):
        c = np.mean([oracle.cosine(row, s) for s in shots.numpy()], 0)
        f.append(oracle.weights(c) * np.sign(row))
    (gradient,) = torch.autograd.grad((torch.from_numpy(np.stack(f)) * z).sum(), A)
    close(maps, (16 * gradient * A).sum(1, keepdim=True).detach())  # 4 x 4 places


def test_votes_by_hand():
    bank, labels = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, -1.0], [3.0, 4.0]]), [9, 4, 4, -2]
    found = nearest_references(torch.tensor([[10.0, 0.0], [0.0, 1.0]]), bank, labels, k=3, temperature=0.2)
    assert found.classes.tolist() == [-2, 4, 9]
    close(found.scores, torch.tensor([[0.6, 0.0, 1.0], [0.8, 1.0, 0.0]]).div(0.2).softmax(1))
    assert found.predicted.tolist() == [9, 4]
    assert found.indices[:, :2].tolist() == [[0, 3], [1, 3]]
    assert found.agrees.tolist() == [[True, False, False], [True, False, False]]
    close(found.reference_embedding, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    many = nearest_references(torch.tensor([[1.0, 0.0]]), bank[[3, 3, 3, 0]], [1, 1, 1, 0], k=4, temperature=1.0)
    assert many.predicted.tolist() == [1]  # three of cosine 0.6 outvote one of 1
    assert many.indices[0, 0] == 3
    assert many.agrees.tolist() == [[False, True, True, True]]


def test_of_classes_with_the_same_votes_one_wins_and_its_neighbours_agree():
    bank = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    found = nearest_references(bank.new_tensor([[1.0, 0.0], [0.0, 1.0]]), bank, [5, 8, 5, 8], k=4)
    close(found.scores[0], bank.new_tensor([0.5, 0.5]))
    assert found.predicted[1] == 5
    for b in range(2):
        assert torch.equal(found.agrees[b], torch.tensor([5, 8, 5, 8])[found.indices[b]] == found.predicted[b])
        assert found.agrees[b].sum() == 2
        close(found.reference_embedding[b], bank[[5, 8].index(found.predicted[b])] / 2**0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 1e-4])
def test_small_temperatures_do_not_overflow_in_any_precision(dtype, temperature):
    z, bank, labels = random(8, 16, dtype=dtype), random(30, 16, seed=2, dtype=dtype), torch.arange(30) % 3
    found = nearest_references(z, bank, labels, k=30, temperature=temperature)
    assert found.reference_embedding.dtype == dtype
    assert found.scores.isfinite().all()
    close(found.scores.sum(1).double(), torch.ones(8, dtype=torch.float64))
    wide = nearest_references(z.double(), bank.double(), labels, k=30, temperature=temperature)
    assert torch.equal(found.predicted, wide.predicted)
    close(found.scores.double(), wide.scores, rtol=0, atol=1e-6 / temperature)
    close(found.reference_embedding.double(), wide.reference_embedding, rtol=0, atol=torch.finfo(dtype).eps)
    if temperature < 0.01:
        assert torch.equal(found.predicted, labels[found.indices[:, 0]])


def test_only_directions_count_and_nothing_is_recorded():
    z, bank, labels = random(5, 4).requires_grad_(), random(9, 4, seed=2).requires_grad_(), [3, 1, 2] * 3
    found = nearest_references(z, bank, labels, k=4)
    scaled = nearest_references(z * 1e200, bank * torch.logspace(-150, 150, 9, dtype=z.dtype)[:, None], labels, k=4)
    for one, two in zip(found, scaled):
        assert not one.requires_grad
        close(one, two)
    assert nearest_references(z[:0], bank, labels, k=4).reference_embedding.shape == (0, 4)
    mixed = nearest_references(z.detach().float(), bank.detach(), labels, k=4)
    assert torch.equal(mixed.predicted, found.predicted)
    assert mixed.reference_embedding.dtype == torch.float64


z1, bank1, labels1 = random(2, 4), random(9, 4), list(range(9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((z1[0], bank1, labels1, 3), "`embedding`"),
        ((z1.long(), bank1, labels1, 3), "`embedding`"),
        ((z1.tolist(), bank1, labels1, 3), "`embedding`"),
        ((z1, bank1[None], labels1, 3), "`bank`"),
        ((z1[:, :3], bank1, labels1, 3), "`embedding`.*`bank`|`bank`.*`embedding`"),
        ((z1, bank1, labels1[:8], 3), "`labels` to be 9 integers"),
        ((z1, bank1, [0.5] * 9, 3), "`labels`"),
        ((z1, bank1, ["cat"] * 9, 3), "`labels`"),
        ((z1, bank1, None, 3), "`labels`"),
        ((z1, bank1, labels1), "at most the 9 embeddings.*200"),
        ((z1, bank1, labels1, 10), "`k` .*10"),
        ((z1, bank1, labels1, 0), "`k`"),
        ((z1, bank1, labels1, 2.0), "`k`"),
        ((z1, bank1, labels1, True), "`k`"),
        ((z1, bank1, labels1, 3, 0.0), "`temperature`"),
        ((z1, bank1, labels1, 3, -0.1), "`temperature`"),
        ((z1, bank1, labels1, 3, float("nan")), "`temperature`"),
        ((z1, bank1, labels1, 3, "cold"), "`temperature`"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        nearest_references(*arguments)


# The encoders that benchmarks/train_contrastive.py has trained

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "train_contrastive.py"


def trained_here():
    if not SCRIPT.exists():
        pytest.skip("benchmarks/ is not there: run the tests in the repository")
    spec = importlib.util.spec_from_file_location("train_contrastive", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["simclr", "barlow_twins", "byol"])
def test_trained_weights_load_and_are_explained_without_and_with_the_head(name):
    model = trained_here().load(name)
    images, references = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    for encoder, route in ((model.embed, "aligned"), (model, "jacobian")):
        fam = FeatureActivationMap(encoder, model.backbone.stage3)
        assert fam.route(images) == route
        maps = fam.attribute(images, reference=references)
        assert maps.shape == (2, 1, 8, 8)
        assert maps.std((2, 3)).min() > 0


def test_the_class_token_of_a_trained_transformer_is_explained_before_its_last_attention():
    pytest.importorskip("timm")
    model = trained_here().load("dino_vit")
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"choose .* 'backbone\.blocks\.3\.norm1'"):
        FeatureActivationMap(model, model.backbone.blocks[3]).attribute(images, reference=images.flip(0))
    maps = FeatureActivationMap(model, model.backbone.blocks[3].norm1).attribute(images, reference=images.flip(0))
    assert maps.shape == (2, 1, 8, 8)


def test_trained_clip_compares_images_with_sentences_as_its_logits_do():
    pytest.importorskip("transformers")
    script = trained_here()
    model, tokens = script.load("clip"), script.tokenize(["a photo of a cat", "a photo of a ship"])
    images = torch.randn(3, 3, 32, 32)
    layer = model.vision_model.encoder.layers[-1].layer_norm1
    fam = FeatureActivationMap(model.get_image_features, layer, output_selector=lambda output: output.pooler_output)
    with torch.no_grad():
        text = model.get_text_features(tokens).pooler_output
        logits = model(input_ids=tokens, pixel_values=images).logits_per_image / model.logit_scale.exp()
    scores = channel_contributions(fam.embed(images)[:, None], text).sum(2)
    torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-6)
    maps = fam.attribute_all(images, reference_embedding=text, contrast="rest")
    torch.testing.assert_close(maps[:, 0], -maps[:, 1])
    assert maps.abs().amax((2, 3)).min() > 0
