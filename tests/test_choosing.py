"""The layers and routes that docs/choosing.md names are those of the models."""

import re
from pathlib import Path

import pytest
import torch
import torchvision.models as tv

from captum_fam import FeatureActivationMap

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

PAGE = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text(encoding="utf-8")
(TABLE,) = re.findall(r"^\| your encoder .*?\n\n", PAGE, re.M | re.S)
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.strip().splitlines()[2:]]

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES = {"image_size": 64, "patch_size": 8}


def vit(**options):
    return timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, **options
    )


def swin():
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, num_classes=0, depths=(1,) * 4)


MODELS = {
    "ResNet of torchvision": [tv.resnet18],
    "ResNet of timm": [lambda: timm.create_model("resnet18", num_classes=0)],
    "MobileNet, EfficientNet of torchvision": [tv.mobilenet_v2, tv.mobilenet_v3_small, tv.efficientnet_b0],
    "DenseNet, VGG of torchvision": [tv.densenet121, tv.vgg11],
    "ConvNeXt of torchvision": [tv.convnext_tiny],
    "ConvNeXt of timm": [lambda: timm.create_model("convnext_atto", num_classes=0)],
    "Swin of torchvision": [tv.swin_t],
    "Swin of timm": [swin],
    "ViT of timm, class token": [vit],
    'ViT of timm, `global_pool="avg"`': [lambda: vit(global_pool="avg")],
    "ViT of torchvision": [lambda: tv.VisionTransformer(64, 8, 2, 2, 32, 64)],
    "ViT, DINOv2, CLIP of transformers": [
        lambda: transformers.ViTModel(transformers.ViTConfig(**WIDTHS, **SIZES)),
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**WIDTHS, **SIZES)),
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**WIDTHS, **SIZES)),
    ],
}


ENDINGS = ("layernorm_before", "norm1", "layer_norm1")  # of ViTModel, Dinov2Model and CLIP


def code(cell):
    return re.findall(r"`([^`]*)`", cell)


@pytest.mark.parametrize(
    ("row", "number"),
    [pytest.param(row, i, id=f"{row[0]}-{i}") for row in ROWS for i in range(len(MODELS.get(row[0], [])))],
)
def test_a_layer_of_the_table_gives_a_map_by_its_route(row, number):
    name, layer, embedding, route = row
    torch.manual_seed(0)
    model = MODELS[name][number]().eval()
    options = {}
    if "transformers" in name:
        ending = code(layer)[number]
        layer = [module for path, module in model.named_modules() if path.endswith("." + ending)][-1]
        options["output_selector"] = eval(code(embedding)[0].removeprefix("output_selector="))
    else:
        if code(embedding)[0].startswith("model."):
            exec(code(embedding)[0], {"model": model, "torch": torch})
        layer = eval(code(layer)[0], {"model": model})
    images = torch.rand(2, 3, 64, 64)
    fam = FeatureActivationMap(model, layer, **options)
    maps = fam.attribute(images, reference=images.flip(0))
    assert maps.shape[:2] == (2, 1)
    assert min(maps.shape[2:]) > 1
    assert maps.isfinite().all()
    assert fam.route(images) == route.split(":")[0]


def test_every_row_that_names_a_library_is_tested():
    named = {row[0] for row in ROWS if re.search("torchvision|timm|transformers", row[0])}
    assert named == set(MODELS)


def test_the_last_blocks_of_transformers_are_where_the_page_says():
    (text,) = re.findall(r"In transformers, the last block is.*?\n\n", PAGE, re.S)
    vit, dino, _ = (make() for make in MODELS["ViT, DINOv2, CLIP of transformers"])
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config={**WIDTHS, **SIZES}, text_config=WIDTHS))
    expressions = [c for c in code(text) if c.endswith("[-1]")]
    for model, expression, ending in zip((vit, dino, clip), expressions, ENDINGS, strict=True):
        block = eval(expression, {"model": model, "clip": model})
        last = [m for path, m in model.named_modules() if path.endswith("." + ending) and "text_model" not in path][-1]
        assert getattr(block, ending) is last
