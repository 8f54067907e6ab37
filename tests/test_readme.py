"""The code of the README and the pages runs as it stands, with small stand-ins for the user's own objects."""

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerGradCam, LayerIntegratedGradients
from encoders import random, seeded
from PIL import Image
from torch import nn
from torchvision.models.resnet import Bottleneck

import captum_fam

README = Path(__file__).parent.parent / "README.md"
MEASURED = README.parent / "docs" / "measured.md"
PAGES = (README, *(README.parent / "docs" / f"{name}.md" for name in ("start", "tasks", "captum", "trust", "measured")))
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
]


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer4 = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())

    def forward(self, x):
        return self.layer4(x).mean((2, 3))


class Output:
    def __init__(self, pooler_output):
        self.pooler_output = pooler_output


def small_vit():
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=9, patch_size=3, embed_dim=8, depth=2, num_heads=2, num_classes=0
    ).eval()


def small_clip():
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = {**tower, "image_size": 9, "patch_size": 3}, {**tower, "vocab_size": 20, "eos_token_id": 19}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_python_block_runs(block, monkeypatch, tmp_path):
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    for library in re.findall(r"^(?:from|import) (easyfsl|faiss)", block, re.M):
        pytest.importorskip(library)
    encoder = seeded(Backbone).float()
    images = torch.rand(3, 3, 9, 9)
    score = captum_fam.SimilarityScore(encoder, torch.rand(4, 6))
    names = {
        **{name: getattr(captum_fam, name) for name in captum_fam.__all__},
        "encoder": encoder,
        "layer": encoder.layer4,
        "images": images,
        "matches": images.flip(0),
        "reference": images[:1],
        "gallery": torch.rand(4, 6),
        "photos": images,
        "embeddings": encoder(images).detach().numpy() if "faiss" in block else torch.rand(4, 6),
        "bank": torch.rand(4, 6),
        "support": images,
        "labels": [0, 1, 2] if "support" in block else [0, 1, 0, 2],
        "query": images[:2],
        "hf_model": lambda x: Output(encoder(x)),
        "score": score,
        "torch": torch,
        "fam": captum_fam.FeatureActivationMap(encoder, encoder.layer4),
        "maps": torch.rand(3, 1, 7, 7),
        "photo": np.zeros((9, 9, 3)),
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    }
    if "model.backbone" in block:
        names["model"] = nn.ModuleDict({"backbone": encoder})
    if "pictures" in block:
        noise = np.random.default_rng(0).integers(0, 256, (14, 24, 24, 3), dtype=np.uint8)
        names |= {"pictures": [Image.fromarray(array) for array in noise], "labels": [i // 2 for i in range(14)]}
    if "vit." in block:
        names["vit"] = small_vit()
    if "clip." in block:
        tokens = torch.tensor([[18, 3, 4, 19], [18, 5, 6, 19]])
        names |= {"clip": small_clip(), "pixel_values": images, "tokens": {"input_ids": tokens}}
    if "ResNet50_Weights" in block:  # the weights are not at hand
        monkeypatch.setattr(
            torchvision.models, "resnet50", lambda weights: torchvision.models.ResNet(Bottleneck, [1] * 4)
        )
    if ".jpg" in block:
        for name in ("query", "match", "other"):
            Image.effect_noise((300, 250), 50).save(f"{name}.jpg")
    exec(block, names)
    if "ResNet50_Weights" in block:
        assert Image.open("pair.png").size > (100, 100)
        assert names.get("why", torch.empty(1, 1, 7, 7)).shape == (1, 1, 7, 7)


def test_the_pages_have_the_blocks_that_are_tested():
    assert len(BLOCKS) == 16


def test_the_summary_in_the_pages_is_that_of_the_study():
    results = (README.parent / "benchmarks" / "faithfulness" / "README.md").read_text(encoding="utf-8")
    (summary,) = re.findall(r"^\| method \| right object \| faithfulness .*?\n\n", results, re.M | re.S)
    assert summary in MEASURED.read_text(encoding="utf-8")


def test_the_rows_on_other_libraries_are_those_that_the_script_made():
    (table,) = re.findall(r"^\|  \| captum_fam .*?\n\n", README.read_text(encoding="utf-8"), re.M | re.S)
    made = (README.parent / "benchmarks" / "peers.md").read_text(encoding="utf-8").splitlines()
    assert set(table.splitlines()) <= set(made)


def test_the_usual_wrapper_of_two_encoder_calls_explains_the_reference_as_the_pages_say():
    encoder, query, reference = seeded(Backbone), random(1, 3, 9, 9), random(1, 3, 9, 9, seed=2)

    def wrapper(x):
        return F.cosine_similarity(encoder(x), encoder(reference))

    grad_cam = LayerGradCam(wrapper, encoder.layer4).attribute(query)
    s = encoder(reference).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cosine_similarity(encoder(query), s).sum(), s)
    of_the_reference = (gradient[..., None, None] * encoder.layer4(reference)).sum(1, keepdim=True) / 49
    torch.testing.assert_close(grad_cam, of_the_reference.detach())
    assert not LayerIntegratedGradients(wrapper, encoder.layer4).attribute(query, torch.zeros_like(query)).any()


def test_fam_warns_of_an_encoder_that_calls_its_layer_twice():
    encoder, query = seeded(Backbone), random(1, 3, 9, 9)
    fam = captum_fam.FeatureActivationMap(lambda x: encoder(x) - encoder(x.flip(3)), encoder.layer4)
    with pytest.warns(UserWarning, match="called several times"):
        fam.attribute(query, reference_embedding=random(1, 6))
