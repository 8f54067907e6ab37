"""The package on real pretrained encoders and photographs, where CAPTUM_FAM_DATA names a folder that has them."""

import importlib.util
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from captum_fam import FeatureActivationMap, SimilarityScore, demo

DATA = os.environ.get("CAPTUM_FAM_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="set CAPTUM_FAM_DATA to the folder of pretrained encoders")


@pytest.fixture(scope="module")
def load():
    spec = importlib.util.spec_from_file_location("pretrained_encoders", Path(DATA) / "encoders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load


@pytest.fixture(scope="module")
def clothing():
    with zipfile.ZipFile(Path(DATA) / "photos" / "clothing.zip") as zipped:
        names = sorted(n for n in zipped.namelist() if n.startswith("test/") and n.endswith(".jpg"))[::60]
        return [Image.open(io.BytesIO(zipped.read(n))).convert("RGB") for n in names]


def test_fam_and_contrast_on_imagenet_features_find_the_right_half_of_a_collage(load):
    encoder, photos = load("mobilenet_v2_imagenet"), list(demo.photographs().values())
    shares = [
        demo.shares(maps[0], 1, 2).diagonal()
        for left, right in [(0, 1), (2, 3), (4, 5)]
        for maps in _plain_and_contrast(encoder, photos[left], photos[right])
    ]
    plain, contrast = torch.cat(shares[::2]), torch.cat(shares[1::2])
    assert plain.mean() > 0.6
    assert contrast.mean() > 0.95


def _plain_and_contrast(encoder, left, right):
    query = torch.cat([encoder.transform(left), encoder.transform(right)], 2)[None]
    fam = FeatureActivationMap(encoder.net, encoder.layer)
    s = fam.embed(torch.stack([encoder.transform(demo.another_view(p)) for p in (left, right)]))
    return [fam.attribute_all(query, reference_embedding=s, contrast=c) for c in (None, "rest")]


@pytest.mark.parametrize("name", ["mobilenet_v1_025_imagenet", "resnet20_cifar10"])
def test_an_encoder_that_pools_by_the_mean_is_aligned(load, clothing, name):
    encoder = load(name)
    images = torch.stack([encoder.transform(photo) for photo in clothing])
    auto, aligned = (
        FeatureActivationMap(encoder.net, encoder.layer, channel_weights=c).attribute_all(images, reference=images)
        for c in ("auto", "aligned")
    )
    assert torch.equal(auto, aligned)


@pytest.mark.parametrize("name", ["protonet_miniimagenet", "protonet_orobix"])
def test_a_prototypical_network_is_explained_by_the_gradient_of_its_weighted_embedding(load, clothing, name):
    encoder = load(name)
    images = torch.stack([encoder.transform(photo) for photo in clothing])
    fam = FeatureActivationMap(SimilarityScore(encoder.net, encoder.net(images[:2]), "euclidean"), encoder.layer)
    maps = fam.attribute(images[2:], target=1)
    A = encoder.net.features(images[2:]).detach()
    z, s = A.flatten(1), fam.embed(images[1:2])
    c = -((z - s) ** 2)
    low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
    w = ((c - low) / (high - low)).reshape(A.shape)  # each dimension is a (channel, place) pair
    torch.testing.assert_close(maps, (w.sum((2, 3), keepdim=True) * A).sum(1, keepdim=True), rtol=1e-4, atol=1e-3)
