"""Rows of benchmarks/peers.py on similarities: for each library the best way that we know, as its pages show."""
# ruff: noqa: N805, RUF012  # a class is a row, and its functions take a case

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import captum.attr
import numpy as np
import pytorch_grad_cam
import torch
import torch.nn.functional as F
import torchcam.methods
from smqtk_classifier.interfaces.classify_image import ClassifyImage
from smqtk_descriptors.interfaces.image_descriptor_generator import ImageDescriptorGenerator
from torch import Tensor, nn
from xaitk_saliency.impls.gen_image_classifier_blackbox_sal.slidingwindow import SlidingWindowStack
from xaitk_saliency.impls.gen_image_similarity_blackbox_sal.sbsm import SBSMStack

import captum_fam
from captum_fam import SimilarityScore

# The encoders, images and wrappers that the rows share


class Encoder(nn.Module):
    """Two convolutions, the mean over the places, and a head, for signals, images or volumes; centred for noise."""

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.layer = conv(3, 8, 3, padding=1), nn.Sequential(conv(8, 6, 3, 2, 1), nn.ReLU())
            self.head = nn.Linear(6, 5)
        self.eval()
        with torch.no_grad():
            self.head.bias -= Encoder.forward(self, noise(64, 3, *[16] * dimensions)).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.first(x).relu()).flatten(2).mean(2))


def noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


class Flat(nn.Module):  # by hand
    def __init__(self, encoder: nn.Module) -> None:  # by hand
        super().__init__()  # by hand
        self.encoder = encoder  # by hand

    def forward(self, x: Tensor) -> Tensor:  # by hand
        return self.encoder(x.flatten(2))  # by hand


class Case:
    """An encoder, its layer, a query, and K reference images with their embeddings."""

    def __init__(self, encoder: nn.Module | None = None, size: tuple[int, ...] = (16, 16), references: int = 3) -> None:
        self.encoder = encoder or Encoder(len(size))
        self.layer: nn.Module = self.encoder.layer
        self.x, self.references = noise(1, 3, *size), noise(references, 3, *size, seed=2)
        self.s: Tensor = self.encoder(self.references).detach()

    def exchanged(self) -> "Case":
        """The first reference as the query, and the query as the reference."""
        other = Case(self.encoder)
        other.x, other.references, other.s = self.references[:1], self.x, self.encoder(self.x).detach()
        return other


def similarity(case: Case, k: int = 0) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cosine_similarity(case.encoder(x), case.s[k : k + 1])  # by hand


def target(case: Case, k: int = 0) -> Callable[[Tensor], Tensor]:
    return lambda z: F.cosine_similarity(z, case.s[k], dim=0)  # by hand


class Descriptors(ImageDescriptorGenerator):  # by hand
    def __init__(self, encoder: Callable[[Tensor], Tensor]) -> None:  # by hand
        self.encoder = encoder  # by hand

    def generate_arrays_from_images(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:  # by hand
        for image in images:  # by hand
            yield self.encoder(torch.from_numpy(image).permute(2, 0, 1)[None]).detach().numpy()[0]  # by hand

    def get_config(self) -> dict[str, Any]:  # by hand
        return {}  # by hand


class Scores(ClassifyImage):  # by hand
    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:  # by hand
        self.score = score  # by hand

    def get_labels(self) -> list[str]:  # by hand
        return ["score"]  # by hand

    def classify_images(self, images: Iterable[np.ndarray]) -> Iterator[dict[str, float]]:  # by hand
        for image in images:  # by hand
            yield {"score": self.score(torch.from_numpy(image).permute(2, 0, 1)[None]).item()}  # by hand

    def get_config(self) -> dict[str, Any]:  # by hand
        return {}  # by hand


def pixels(images: Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).contiguous().numpy())


def fam(case: Case, k: int = 0) -> Tensor:
    return captum_fam.FeatureActivationMap(case.encoder, case.layer).attribute(case.x, reference=case.references[[k]])


def layer_grad_cam(case: Case, score: Callable[[Tensor], Tensor]) -> Tensor:
    return captum.attr.LayerGradCam(score, case.layer).attribute(case.x).detach()


def grad_cam(case: Case, target: Callable[[Any], Tensor], method: Any = pytorch_grad_cam.GradCAM) -> Tensor:
    with method(case.encoder, [case.layer]) as cam:
        return torch.from_numpy(cam(case.x, [target]))


def torchcam_map(case: Case, target: Callable[[Any], Tensor], method: Any = torchcam.methods.GradCAM) -> Tensor:
    with method(case.encoder, case.layer) as extractor:
        return extractor(scores=case.encoder(case.x), targets=target)[0]


def sbsm(x: Tensor, references: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
    stack = SBSMStack((4, 4), (2, 2), "cosine", fill=0)
    return torch.from_numpy(stack(pixels(x)[0], pixels(references), Descriptors(encoder)))


def occlusion(x: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.from_numpy(SlidingWindowStack((4, 4), (2, 2))(pixels(x)[0], Scores(score)))


WRAPPERS = {"captum": similarity, "grad_cam": target, "torchcam": target, "xaitk": Descriptors}


def flaw(*maps: Tensor) -> str | None:
    """What is wrong with a map, if anything."""
    for values in maps:
        if not values.isfinite().all():
            return "not finite"
        if not values.max() - values.min() > 1e-6:
            return "the map is constant"
    return None


class Question:
    """A row: a function for each library that can be tried, and ``check``, which says what is wrong with one."""

    name: str
    public = "(?!)"  # a library without a function has no public name that matches this
    helpers: dict[str, Any] = {}  # of a library, whose lines by hand count, too
    with_captum = False  # our function uses a class of Captum
    rows: list[type["Question"]] = []

    def __init_subclass__(cls) -> None:
        Question.rows.append(cls)

    @staticmethod
    def check(run: Callable[..., Any]) -> str | None:
        return flaw(run(Case()))


class Cosine(Question):
    name = "explains the cosine of two embeddings"
    helpers = WRAPPERS

    @staticmethod
    def check(run):
        one, other = run(Case(), 0), run(Case(), 1)
        return flaw(one, other, one - other)

    def captum_fam(case, k):
        return fam(case, k)

    def captum(case, k):
        return layer_grad_cam(case, similarity(case, k))

    def grad_cam(case, k):
        return grad_cam(case, target(case, k))

    def torchcam(case, k):
        return torchcam_map(case, target(case, k))

    def xaitk(case, k):
        return sbsm(case.x, case.references[[k]], case.encoder)


class BothImages(Question):
    name = "gives a map of both images"

    @staticmethod
    def check(run):
        maps, (again, _) = run(Case()), run(Case().exchanged())
        return flaw(*maps) or (None if torch.allclose(maps[1], again) else "not the map with the images exchanged")

    def captum_fam(case):
        return captum_fam.FeatureActivationMap(case.encoder, case.layer).attribute_pair(case.x, case.references[:1])

    def captum(case):
        other = case.exchanged()  # by hand
        second = layer_grad_cam(other, similarity(other))  # by hand
        return layer_grad_cam(case, similarity(case)), second

    def grad_cam(case):
        other = case.exchanged()  # by hand
        second = grad_cam(other, target(other))  # by hand
        return grad_cam(case, target(case)), second

    def torchcam(case):
        other = case.exchanged()  # by hand
        second = torchcam_map(other, target(other))  # by hand
        return torchcam_map(case, target(case)), second

    def xaitk(case):
        second = sbsm(case.references[:1], case.x, case.encoder)  # by hand
        return sbsm(case.x, case.references[:1], case.encoder), second


class ManyReferences(Question):
    name = "explains 64 references with no more forward passes of the query than one"

    @staticmethod
    def check(run):
        passes = []
        for k in (1, 64):
            case, seen = Case(references=k), []
            case.encoder.register_forward_hook(lambda m, x, z, seen=seen: seen.extend(x[0]))
            maps = run(case)
            if len(maps) != k or flaw(maps[0]):
                return "not a map for each reference"
            passes.append(sum(not any(image.equal(r) for r in case.references) for image in seen))
        return None if passes[0] == passes[1] else f"{passes[0]} for one, {passes[1]} for 64"

    def captum_fam(case):
        method = captum_fam.FeatureActivationMap(case.encoder, case.layer)
        return method.attribute_all(case.x, reference_embedding=case.s)[0]

    def captum(case):
        return [layer_grad_cam(case, similarity(case, k)) for k in range(len(case.s))]

    def grad_cam(case):
        return [grad_cam(case, target(case, k)) for k in range(len(case.s))]

    def torchcam(case):
        with torchcam.methods.GradCAM(case.encoder, case.layer) as extractor:
            z = case.encoder(case.x)
            one_by_one = range(len(case.s))
            return [extractor(scores=z, targets=target(case, k), retain_graph=True)[0] for k in one_by_one]

    def xaitk(case):
        return sbsm(case.x, case.references, case.encoder)


class SignFlip(Question):
    name = "a sign flip of the embedding's dimensions changes no map"
    captum_fam, captum, grad_cam = Cosine.captum_fam, Cosine.captum, Cosine.grad_cam
    torchcam, xaitk = Cosine.torchcam, Cosine.xaitk

    @staticmethod
    def check(run):
        flipped = Encoder()
        for values in (flipped.head.weight.data, flipped.head.bias.data):
            values[::2] *= -1
        maps = run(Case(), 0), run(Case(flipped), 0)
        return flaw(*maps) or (None if torch.allclose(*maps, atol=1e-4) else "the maps differ")


class Signs(Question):
    name = "shows what speaks against the similarity"

    @staticmethod
    def check(run):
        values = run(Case())
        return flaw(values) or (None if values.min() < 0 < values.max() else "no value is negative")

    def captum_fam(case):
        return captum_fam.SimilarityDecomposition(case.encoder, case.layer).attribute(
            case.x, reference=case.references[:1]
        )

    def captum(case):
        return layer_grad_cam(case, similarity(case))

    def grad_cam(case):
        against = grad_cam(case, lambda z: -target(case)(z))  # by hand
        return grad_cam(case, target(case)) - against  # by hand

    def torchcam(case):
        with torchcam.methods.GradCAM(case.encoder, case.layer) as extractor:
            z, f = case.encoder(case.x), target(case)
            (speaks_for,) = extractor(scores=z, targets=f, normalized=False, retain_graph=True)
            (against,) = extractor(scores=z, targets=lambda z: -f(z), normalized=False)  # by hand
            return speaks_for - against  # by hand

    def xaitk(case):
        return occlusion(case.x, similarity(case))

    helpers = {"xaitk": Scores}


class Contrast(Question):
    name = "explains why one reference rather than another"

    @staticmethod
    def check(run):
        one, other = run(Case(), 0, 1), run(Case(), 1, 0)
        together = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        return flaw(one, other) or (None if together < 0 else f"both maps go together, by {together:.2f}")

    def captum_fam(case, a, b):
        score = SimilarityScore(case.encoder, case.s)
        return captum_fam.FeatureActivationMap(score, case.layer).attribute(case.x, target=a, contrast=b)

    def captum(case, a, b):  # the encoder may be called once only
        return layer_grad_cam(case, lambda x: F.cosine_similarity(case.encoder(x), case.s[[b, a]]).diff())  # by hand

    def grad_cam(case, a, b):
        return grad_cam(case, lambda z: target(case, a)(z) - target(case, b)(z))  # by hand

    def torchcam(case, a, b):
        return torchcam_map(case, lambda z: target(case, a)(z) - target(case, b)(z))  # by hand

    def xaitk(case, a, b):
        return occlusion(case.x, lambda x: similarity(case, a)(x) - similarity(case, b)(x))  # by hand

    helpers = {"xaitk": Scores}


class Itself(Question):
    name = "has a map for an image and itself, where the gradient of the cosine is zero"

    @staticmethod
    def check(run):
        case = Case()
        case.references = case.x
        case.s = case.encoder(case.x).detach()
        return flaw(run(case))

    def captum_fam(case):
        return fam(case)

    def captum(case):
        method = captum.attr.LayerIntegratedGradients(similarity(case), case.layer)
        return method.attribute(case.x, torch.zeros_like(case.x)).sum(1).detach()

    def grad_cam(case):
        return grad_cam(case, target(case), pytorch_grad_cam.ScoreCAM)

    def torchcam(case):
        return torchcam_map(case, target(case), torchcam.methods.ScoreCAM)

    def xaitk(case):
        return sbsm(case.x, case.references[:1], case.encoder)


class Completeness(Question):
    name = "a map's values add up to the score, together with what a black image has"

    @staticmethod
    def check(run):
        case = Case()
        (values, rest), score = run(case), similarity(case)(case.x).item()
        total = values.sum().item() + rest.item()
        return flaw(values) or (None if abs(total - score) < 0.01 else f"{total:.2f}, but the score is {score:.2f}")

    def captum_fam(case):
        black = torch.zeros_like(case.x)
        baseline = case.layer(case.encoder.first(black).relu())
        method = captum_fam.IntegratedDecomposition(case.encoder, case.layer, n_steps=100, baseline=baseline)
        values = method.attribute(case.x, reference=case.references[:1])
        unit = F.normalize(case.s[0], dim=0)
        return values / values[0].numel(), case.encoder(black) @ unit / case.encoder(case.x).norm()

    def captum(case):
        black = torch.zeros_like(case.x)
        method = captum.attr.LayerIntegratedGradients(similarity(case), case.layer)
        return method.attribute(case.x, black, n_steps=100).detach(), similarity(case)(black)

    def grad_cam(case):
        rest = similarity(case)(torch.zeros_like(case.x))
        return grad_cam(case, target(case), pytorch_grad_cam.HiResCAM), rest

    def torchcam(case):
        rest = similarity(case)(torch.zeros_like(case.x))
        with torchcam.methods.XGradCAM(case.encoder, case.layer) as extractor:
            return extractor(scores=case.encoder(case.x), targets=target(case), normalized=False)[0], rest

    def xaitk(case):
        rest = similarity(case)(torch.zeros_like(case.x))
        return sbsm(case.x, case.references[:1], case.encoder), rest


class PairsOfPlaces(Question):
    name = "splits the score over pairs of places of both images, and their baselines: all add up to it"
    public = r"(?i)attribute_matrix|correspond|pairwise|matches"

    @staticmethod
    def check(run):
        case = Case()
        parts, score = run(case), similarity(case)(case.x).item()
        off = sum(part.sum().item() for part in parts) - score
        return flaw(parts[0]) or (None if abs(off) < 1e-3 else f"off by {off:.2f} of {score:.2f}")

    def captum_fam(case):
        method = captum_fam.SimilarityDecomposition(case.encoder, case.layer, n_steps=8)
        return method.attribute_matrix(case.x, case.references[:1], return_baselines=True)
