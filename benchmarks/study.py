"""What the study of faithfulness.py compares: encoders, pairs of images with known places, and methods."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Normalize

from benchmarks import objects
from benchmarks import train_contrastive as trained
from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    IntegratedDecomposition,
    LabelFreeActivationMap,
    SimilarityDecomposition,
)
from captum_fam.bundled import BundledEncoder, bundled_encoder
from captum_fam.methods.channel_attribution import ChannelAttribution
from captum_fam.methods.relax import masks_of
from captum_fam.scenes import Scenes, shared_object_scenes

PRETRAINED = {  # name: (size of the images, pictures of the scenes)
    "mobilenet_v2_imagenet": (128, "coco"),
    "mobilenet_v1_100_imagenet": (128, "coco"),
    "mobilenet_v1_050_imagenet": (128, "coco"),
    "mobilenet_v1_025_imagenet": (128, "coco"),
    "protonet_miniimagenet": (84, "coco"),
    "protonet_orobix": (84, "coco"),
    "protonet_omniglot": (56, "omniglot"),
    "resnet20_cifar10": (64, "cifar"),
    "resnet32_cifar10": (64, "cifar"),
    "resnet44_cifar10": (64, "cifar"),
}
SIGNED = ("mobilevit_flowers", "protonet_cifar100", "vit_cifar10")  # with their own loader
CONTRASTIVE = {"simclr": 64, "barlow_twins": 64, "byol": 64, "dino_vit": 32, "clip": 32}
ENCODERS = [*PRETRAINED, "bundled", *CONTRASTIVE, "mean_colour"]
LAYERS: dict[str, Callable[[Any], nn.Module]] = {  # of the contrastive encoders, to explain
    "simclr": lambda model: model.backbone.stage3,
    "barlow_twins": lambda model: model.backbone.stage3,
    "byol": lambda model: model.backbone.stage3,
    "dino_vit": lambda model: model.backbone.blocks[-1].norm1,
    "clip": lambda model: model.vision_model.encoder.layers[-1].layer_norm1,
}
FAMILIES = {  # encoders of one are not independent of each other
    **{name: name.split("_")[0].rstrip("0123456789") for name in PRETRAINED},
    "protonet_omniglot": "omniglot",
    "bundled": "bundled",
    "simclr": "small CNN",
    "barlow_twins": "small CNN",
    "byol": "small CNN",
    "dino_vit": "dino_vit",
    "clip": "clip",
}
SOURCES = ("medium", "hard", "photos")
WEIGHTS = ("trained", "untrained", "shuffled")


@dataclass
class Encoder:
    """Images in [0, 1] to embeddings, the layer that is explained, and the modules that embed (no unused heads)."""

    name: str
    net: nn.Module
    embedder: nn.Module
    layer: nn.Module
    size: int
    pictures: str


class Ink(nn.Module):
    """How dark an RGB image is: Omniglot's strokes are black, its encoder wants them white."""

    def forward(self, images: Tensor) -> Tensor:
        return 1 - images.mean(1, keepdim=True)


class Embedding(nn.Module):
    """Images to what a contrastive encoder compares."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return trained.embed(self.model, images)


class MeanColour(nn.Module):
    """The mean colour as an embedding: a control that knows nothing of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.AvgPool2d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((2, 3))


def encoder(name: str, data: Path, weights: str = "trained") -> Encoder:
    """An encoder, trained or as a control."""
    if name in PRETRAINED:
        loaded, (size, pictures) = pretrained(data, name), PRETRAINED[name]
        front: list[nn.Module] = [Normalize(loaded.meta["mean"], loaded.meta["std"])]
        layer = loaded.layer
        if loaded.channels == 1:
            front, layer = [Ink(), *front], loaded.net.get_submodule("features.3.2")
        net: Any = loaded.net
        embedder = net
    elif name == "bundled":
        net, size, pictures = bundled_encoder(), BundledEncoder.size, "clothing"
        front, layer, embedder = [Normalize(net.mean, net.std)], net.features, net
    elif name == "mean_colour":
        net, size, pictures = MeanColour(), 64, "cifar"
        front, layer, embedder = [], net.layer, net
    else:
        model: Any = trained.load(name)
        net, size, pictures = Embedding(model), CONTRASTIVE[name], "cifar"
        embedder = nn.ModuleList([model.vision_model, model.visual_projection]) if name == "clip" else model.backbone
        front = [Normalize(trained.MEAN, trained.STD)]
        layer = LAYERS[name](model)
    torch.manual_seed(crc32(name.encode()))  # encoders of one architecture do not become one network
    with torch.no_grad():
        for module in embedder.modules() if weights != "trained" else ():
            _forget(module, weights)
    return Encoder(name, nn.Sequential(*front, net).eval(), embedder, layer, size, pictures)


def _forget(module: nn.Module, weights: str) -> None:
    """The module's own weights drawn anew so that the scale of activations is kept, or shuffled."""
    if isinstance(module, nn.BatchNorm2d):
        module.reset_running_stats()
    if weights == "shuffled":
        for parameter in module.parameters(recurse=False):
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].reshape(parameter.shape))
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    else:  # class tokens and position embeddings
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)


def pretrained(data: Path, name: str) -> Any:
    """An encoder of the data folder, by its own loader."""
    loader = _module(data, "encoders")
    if name in SIGNED:
        loader = _module(data, "signed_encoders")
    return loader.load(name)


def _module(data: Path, name: str) -> Any:
    """A Python file of the data folder."""
    file = data / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.exists():
        raise FileNotFoundError(f"{data} has no {file.name}: name the data folder in CAPTUM_FAM_DATA")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclass looks itself up, and signed_encoders imports encoders
    spec.loader.exec_module(module)
    return module


@dataclass
class Pairs:
    """
    Images, what they are compared with, and where the explanation lies: (N, 1, H, W), bool.

    ``other`` (N,) numbers for each image the reference of another pair that shares as little as can be with it, and
    never the class of the shared object: a control.
    """

    images: Tensor
    references: Tensor
    masks: Tensor
    other: Tensor
    scenes: Scenes | None = None


@cache
def pictures(data: Path, name: str, half: int) -> objects.Pictures:
    """Half of the pictures: COCO by photo, the others by every second picture of each class."""
    if name == "coco":
        return objects.coco_cutouts(data, half=half)
    images, labels = {"clothing": objects.clothing, "cifar": objects.cifar10, "omniglot": objects.omniglot}[name](data)
    seen: dict[int, int] = {}
    chosen = []
    for number, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        if seen[label] % 2 == half:
            chosen.append(number)
    return [images[i] for i in chosen], [labels[i] for i in chosen]


@cache
def pairs(data: Path, source: str, name: str, size: int, half: int, count: int) -> Pairs:
    """Pairs of one half: of scenes ("medium", "hard"), or of photos ("photos")."""
    if source != "photos":
        seed = 10 * half + SOURCES.index(source)
        scenes = shared_object_scenes(*pictures(data, name, half), count, size=size, difficulty=source, seed=seed)
        others = _least_alike(
            [set(row) for row in scenes.labels.tolist()],
            [set(row) for row in scenes.reference_labels.tolist()],
            [{label} for label in scenes.labels[:, 0].tolist()],
        )
        return Pairs(scenes.images, scenes.references, scenes.masks, others, scenes)
    # Each photo is explained once, with a reference for its rarest category: most pairs share a person.
    found = objects.coco_pairs(data, half)
    frequency = Counter(c for pair in found for c in pair.categories[0] & pair.categories[1])
    rarest = [min(frequency[c] for c in pair.categories[0] & pair.categories[1]) for pair in found]
    chosen: dict[int, objects.Pair] = {}
    for number in sorted(np.random.default_rng(0).permutation(len(found)), key=lambda n: rarest[n]):
        chosen.setdefault(found[number].numbers[0], found[number])
    kept = list(chosen.values())[:count]
    one, other = ([pair.categories[i] for pair in kept] for i in range(2))
    images, references, masks = (
        torch.stack([_square(picture, size) for picture in column])
        for column in ([p.photos[0] for p in kept], [p.photos[1] for p in kept], [p.masks[0] for p in kept])
    )
    return Pairs(images, references, masks > 0.5, _least_alike(one, other, [a & b for a, b in zip(one, other)]))


def _least_alike(
    classes: Sequence[AbstractSet[int]], references: Sequence[AbstractSet[int]], shared: Sequence[AbstractSet[int]]
) -> Tensor:
    """For each image the number of a reference with none of the shared classes, if there is one, and few others."""
    n = len(classes)
    order = [[(i + step) % n for step in range(1, n)] for i in range(n)]
    cost = [
        [100 * len(shared[i] & references[j]) + len(classes[i] & references[j]) for j in row]
        for i, row in enumerate(order)
    ]
    return torch.tensor([row[int(np.argmin(c))] for row, c in zip(order, cost)])


def _square(image: Any, size: int) -> Tensor:
    """A photo or mask at a square size, (C, size, size) in [0, 1]."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.uint8(image) * 255)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1)


@dataclass
class Question:
    """What is explained: images (N, 3, H, W), each with its reference, by the cosine of their embeddings."""

    encoder: Encoder
    images: Tensor
    references: Tensor
    s: Tensor  # embeddings (N, D) of the references

    @classmethod
    def of(cls, encoder: Encoder, images: Tensor, references: Tensor) -> "Question":
        with torch.no_grad():
            return cls(encoder, images, references, torch.cat([encoder.net(x) for x in references.split(16)]))

    def swapped(self, other: Tensor) -> "Question":
        """The same images with other references, by their numbers (N,)."""
        return Question(self.encoder, self.images, self.references[other], self.s[other])

    def __getitem__(self, index: slice) -> "Question":
        return Question(self.encoder, self.images[index], self.references[index], self.s[index])


def fam(contrast: str | None = None, **options: Any) -> Callable[[Question], Tensor]:
    return lambda q: _paired(FeatureActivationMap(q.encoder.net, q.encoder.layer, **options), q, contrast=contrast)


def decomposition(contrast: str | None = None, **options: Any) -> Callable[[Question], Tensor]:
    return lambda q: _paired(SimilarityDecomposition(q.encoder.net, q.encoder.layer, **options), q, contrast=contrast)


def _paired(method: Any, q: Question, **options: Any) -> Tensor:
    numbers = torch.arange(len(q.images))
    parts = [
        method.attribute(x, n, reference_embedding=q.s, **options)
        for x, n in zip(q.images.split(16), numbers.split(16))
    ]
    return torch.cat(parts)


def residual(share: float) -> Callable[[Tensor, Tensor], Tensor]:
    """
    The weights of the embedding dimensions: what the reference has beyond a share of what the image has of it itself.

    With z and s of unit length, s - share * (s.z) z. A share of 1 is the gradient of the cosine, Grad-CAM's weights but
    for a positive factor; a share of 0, where dimensions are channels, those of SimilarityDecomposition.
    """

    def weights(z: Tensor, s: Tensor) -> Tensor:
        z, s = F.normalize(z, dim=-1), F.normalize(s, dim=-1)
        return s - share * (s * z).sum(-1, keepdim=True) * z

    return weights


class GradCam(ChannelAttribution):
    """Grad-CAM of the cosine, signed, on every layout that the package knows: the mean of the gradient over places."""

    def _needs_graph(self) -> bool:
        return True

    def alpha(self, pairs: Any) -> list[Tensor]:
        s = F.normalize(pairs.question.s[pairs.question.own], dim=2)
        z = F.normalize(pairs.z, dim=1)[:, None]
        (gradients,) = pairs.recording.gradients(s - (s * z).sum(2, keepdim=True) * z)
        return [g.flatten(2).mean(2)[:, None] for g in gradients]


def _grad_cam(q: Question) -> Tensor:
    return _paired(GradCam(q.encoder.net, q.encoder.layer), q)


def _lafam(q: Question) -> Tensor:
    lafam = LabelFreeActivationMap(q.encoder.net, q.encoder.layer)
    return torch.cat([lafam.attribute(x) for x in q.images.split(16)])


def _integrated(q: Question) -> Tensor:
    return _paired(IntegratedDecomposition(q.encoder.net), q)


def best_match(q: Question) -> Tensor:
    """At each place of the layer's map of the image, the cosine to the most similar place of the reference's."""
    numbers = torch.arange(len(q.images))
    return CorrespondenceMap(q.encoder.net, q.encoder.layer).attribute(
        q.images, numbers, reference=q.references, internal_batch_size=16
    )


def match_less_others(q: Question) -> Tensor:
    """Best match, less the mean of it in the references of the next dozen pairs."""
    found = CorrespondenceMap(q.encoder.net, q.encoder.layer).attribute_all(
        q.images, reference=q.references, internal_batch_size=16
    )
    rows, n = torch.arange(len(found)), min(12, len(found) - 1)
    others = (rows[:, None] + 1 + torch.arange(n)) % len(found)
    return found[rows, rows][:, None] - found[rows[:, None], others].mean(1, keepdim=True)


def random_map(q: Question) -> Tensor:
    seed = crc32(q.encoder.name.encode())  # another for each encoder
    return torch.rand(len(q.images), 1, 7, 7, generator=torch.Generator().manual_seed(seed))


def centred_blob(q: Question) -> Tensor:
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 2, indexing="ij")
    return torch.exp(-2 * (x**2 + y**2)).expand(len(q.images), 1, 32, 32)


def masked_embeddings(q: Question, n_masks: int) -> tuple[Tensor, Tensor]:
    """RISE's random masks (M, H, W), 7 x 7 cells, half of them kept, and embeddings (N, M, D) of the masked images."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(n_masks, 7, 7, generator=generator) < 0.5
    masks = masks_of(cells, torch.rand(n_masks, 2, generator=generator), q.images.shape[2:])
    mean = q.images.mean((0, 2, 3))[:, None, None]  # masked pixels: black is a colour like any other here
    with torch.no_grad():
        z = [
            torch.cat([q.encoder.net(mean + (image - mean) * m[:, None]) for m in masks.split(50)])
            for image in q.images
        ]
    return masks, torch.stack(z)


def relax(masks: Tensor, cosines: Tensor) -> Tensor:
    """captum_fam.Relax from cosines (N, M) of masked images."""
    flat = masks.flatten(1).to(cosines)
    importance = cosines @ flat / flat.sum(0) - cosines.mean(1, keepdim=True)
    return importance.reshape(len(cosines), 1, *masks.shape[1:])


def distance_explainer(masks: Tensor, cosines: Tensor) -> Tensor:
    """
    Distance Explainer (Meijer and Bos, https://arxiv.org/abs/2505.15516), with the default ranges of their class: the
    mean of the fifth of the masks with the smallest distance to the reference, less that of the fifth with the largest.
    """
    fifth, order = masks.shape[0] // 5, cosines.argsort(1, descending=True)
    return (masks[order[:, :fifth]].mean(1) - masks[order[:, -fifth:]].mean(1))[:, None]


MASKS = {"RELAX": relax, "Distance Explainer": distance_explainer}
CONTROLS = {"random": random_map, "centred blob": centred_blob}
METHODS: dict[str, Callable[[Question], Tensor]] = {
    "FAM cosine": fam(),  # and dot: its contributions are larger by one factor, so the weights are the same
    "FAM Euclidean": fam(similarity="euclidean"),
    "FAM signed": fam(normalize=None),
    "FAM self": fam("self"),
    "SimilarityDecomposition": decomposition(),
    "decomposition self": decomposition("self"),
    "LaFAM": _lafam,
    "Grad-CAM": _grad_cam,
    "residual 0.9": decomposition(dimension_weights=residual(0.9)),
    "integrated": _integrated,
    "best match": best_match,
    "match less others": match_less_others,
    "contrast with the rest": decomposition("rest"),
    **CONTROLS,
}


def explain(questions: Sequence[Question], n_masks: int) -> list[dict[str, Tensor]]:
    """Maps (N, 1, h, w) of all methods for questions about the same images."""
    found = [{name: method(question) for name, method in METHODS.items()} for question in questions]
    if n_masks:
        masks, z = masked_embeddings(questions[0], n_masks)
        for maps, question in zip(found, questions):
            cosines = (F.normalize(z, dim=2) * F.normalize(question.s, dim=1)[:, None]).sum(2)
            maps.update({name: method(masks, cosines) for name, method in MASKS.items()})
    return found
