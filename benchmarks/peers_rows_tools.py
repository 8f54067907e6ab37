"""Rows of benchmarks/peers.py on metrics, tools, and what is no similarity."""
# ruff: noqa: N805, RUF012  # as in peers_rows.py

import math
import tempfile
from functools import partial
from pathlib import Path

import captum.attr
import captum.influence
import captum.metrics
import numpy as np
import pytorch_grad_cam
import torch
import torch.nn.functional as F
import torchcam.explain
import torchcam.methods
import torchcam.metrics
from captum.attr import LayerAttribution
from PIL import Image
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import (
    ClassifierOutputTarget,
    FasterRCNNBoxScoreTarget,
    SemanticSegmentationTarget,
)
from smqtk_detection.interfaces.detect_image_objects import DetectImageObjects
from smqtk_image_io import AxisAlignedBoundingBox
from torch import nn
from xaitk_saliency import PerturbImage
from xaitk_saliency.impls.gen_classifier_conf_sal.occlusion_scoring import OcclusionScoring
from xaitk_saliency.impls.gen_image_classifier_blackbox_sal.occlusion_based import PerturbationOcclusion
from xaitk_saliency.impls.gen_object_detector_blackbox_sal.drise import DRISEStack

import captum_fam
import captum_fam.metrics
from benchmarks import compatibility
from benchmarks.peers_rows import (
    Case,
    Encoder,
    Question,
    Scores,
    fam,
    flaw,
    grad_cam,
    layer_grad_cam,
    noise,
    occlusion,
    pixels,
    similarity,
    target,
    torchcam_map,
)
from captum_fam import SimilarityScore, demo
from captum_fam.batch import explain_pairs


class Metric(Question):
    name = "measures how faithful a map of a similarity is"

    @staticmethod
    def check(run):
        found = run(Case())
        return None if math.isfinite(found) and found else f"a value of {found}"

    def captum_fam(case):
        score = SimilarityScore(case.encoder, case.s)
        return captum_fam.metrics.deletion(score, case.x, fam(case), target=0).auc.item()

    def captum(case):
        values = captum.attr.InputXGradient(similarity(case)).attribute(case.x)
        return captum.metrics.infidelity(similarity(case), lambda x: (0.1 * x, 0.9 * x), case.x, values).item()

    def grad_cam(case):
        maps = grad_cam(case, target(case)).numpy()
        return ROADCombined()(case.x, maps, [target(case)], case.encoder).item()

    def torchcam(case):
        with torchcam.methods.GradCAM(case.encoder, case.layer) as extractor:
            metric = torchcam.metrics.DeletionInsertionMetric(extractor)
            metric.update(case.x, targets=target(case))
            return metric.summary()["deletion_auc"]

    public = r"(?i)faithful|fidelity|deletion|insertion"


class MetricOfPairs(Question):
    name = "measures the maps of both images of a pair"
    public = r"(?i)^pair_|_pairs?$"
    check = Metric.check

    def captum_fam(case):
        method = captum_fam.FeatureActivationMap(case.encoder, case.layer)
        maps = method.attribute_pair(case.x, case.references[:1])
        return captum_fam.metrics.pair_deletion(case.encoder, case.x, case.references[:1], *maps).auc.item()


class Nearest(Question):
    name = "finds the most similar images of a set"
    public = r"(?i)nearest|influence"

    @staticmethod
    def check(run):
        case = Case(references=8)
        expected = F.cosine_similarity(case.encoder(case.x), case.s).argmax().item()
        return None if run(case) == expected else "another image"

    def captum_fam(case):
        nearest = captum_fam.nearest_references(case.encoder(case.x).detach(), case.s, range(len(case.s)), k=1)
        return nearest.indices.item()

    def captum(case):
        with tempfile.TemporaryDirectory() as folder:
            layers = ["layer", "head"]  # with a single one, Captum 0.9.0 fails
            influence = captum.influence.SimilarityInfluence(case.encoder, layers, case.references, folder)
            return influence.influence(case.x)["head"][0].item()


class Parts(Question):
    name = "finds parts that two images share, by factorisation"
    public = r"(?i)factori[sz]ation|\bnmf|\bdff"

    @staticmethod
    def check(run):
        return flaw(*run(Case()))

    def captum_fam(case):
        found = captum_fam.SharedParts(case.encoder, case.layer, 2).explain(case.x, case.references[:1])
        return *found.maps[0], *found.reference_maps[0]

    def grad_cam(case):
        images = torch.cat([case.x, case.references[:1]])
        found = pytorch_grad_cam.DeepFeatureFactorization(case.encoder, case.layer)(images, 2)[1]
        return [torch.from_numpy(part) for image in found for part in image]


class Concepts(Question):
    name = "tests concepts that you name (TCAV)"
    public = r"(?i)tcav"

    @staticmethod
    def check(run):
        found, expected = run()
        return None if torch.allclose(found, expected, rtol=1e-3) else "not as computed by hand"

    def captum():
        return compatibility.concepts()

    captum_fam = captum
    with_captum = True


class NamedParts(Question):
    name = "ranks parts that you name, such as superpixels, by how much the similarity falls without them"
    public = r"(?i)superpixel|feature_mask"

    @staticmethod
    def check(run):
        case, quarters = Case(), torch.zeros(16, 16, dtype=torch.int64)
        quarters[8:] += 2
        quarters[:, 8:] += 1
        found, f = run(case, quarters).reshape(-1, 16, 16), similarity(case)
        values = [found[:, quarters == part].mean() for part in range(4)]
        falls = [f(case.x) - f(torch.where(quarters == part, 0, case.x)) for part in range(4)]
        same = np.argsort([float(v) for v in values]).tolist() == np.argsort([float(v) for v in falls]).tolist()
        return flaw(found) or (None if same else "in another order")

    def captum(case, parts):
        return captum.attr.FeatureAblation(similarity(case)).attribute(case.x, feature_mask=parts[None, None])

    def captum_fam(case, parts):
        score = SimilarityScore(case.encoder, case.s)
        return captum.attr.FeatureAblation(score).attribute(case.x, target=0, feature_mask=parts[None, None])

    with_captum = True

    def xaitk(case, parts):
        class Parts(PerturbImage):  # by hand
            def perturb(self, ref_image):  # by hand
                return np.stack([(parts != part).numpy() for part in parts.unique()])  # by hand

            def get_config(self):  # by hand
                return {}  # by hand

        stack = PerturbationOcclusion(Parts(), OcclusionScoring())
        return torch.from_numpy(stack(pixels(case.x)[0], Scores(similarity(case))))

    helpers = {"xaitk": Scores}


class Segmentation(Question):
    name = "explains a class of a segmentation"
    public = r"(?i)segmentation"

    @staticmethod
    def check(run):
        case = Case()
        case.encoder.forward = lambda x: case.encoder.layer(case.encoder.first(x).relu())
        return flaw(run(case))

    def captum(case):
        return layer_grad_cam(case, lambda x: case.encoder(x)[:, 0, :4].sum((1, 2)))  # by hand

    def grad_cam(case):
        return grad_cam(case, SemanticSegmentationTarget(0, np.eye(8, dtype=np.float32)))

    def torchcam(case):
        return torchcam_map(case, lambda z: z[0, :4].sum())  # by hand

    def xaitk(case):
        return occlusion(case.x, lambda x: case.encoder(x)[0, 0, :4].sum())  # by hand

    helpers = {"xaitk": Scores}


class Detector(Encoder):
    """One box, which the image moves a little, and its score."""

    def forward(self, x):
        z = super().forward(x)
        boxes = torch.tensor([2.0, 2, 10, 10]) + z[:, None, :4].tanh()
        return [
            {"boxes": box, "scores": score.sigmoid(), "labels": torch.ones(1)} for box, score in zip(boxes, z[:, 4:])
        ]


class Detection(Question):
    name = "explains a detection"
    public = r"Detect|FasterRCNN|DRISE"

    @staticmethod
    def check(run):
        case = Case.__new__(Case)
        case.encoder = Detector()
        case.layer, case.x = case.encoder.layer, noise(1, 3, 16, 16)
        return flaw(run(case))

    def captum(case):
        return layer_grad_cam(case, lambda x: torch.stack([found["scores"][0] for found in case.encoder(x)]))  # by hand

    def grad_cam(case):
        box = case.encoder(case.x)[0]["boxes"].detach().numpy()
        return grad_cam(case, FasterRCNNBoxScoreTarget([1], box))

    def torchcam(case):
        return torchcam_map(case, lambda found: found["scores"][0])  # by hand

    def xaitk(case):
        class Boxes(DetectImageObjects):  # by hand
            def detect_objects(self, images):  # by hand
                for image in images:  # by hand
                    (found,) = case.encoder(torch.from_numpy(image).permute(2, 0, 1)[None])  # by hand
                    box = found["boxes"][0].detach().numpy()  # by hand
                    yield [(AxisAlignedBoundingBox(box[:2], box[2:]), {"thing": found["scores"].item()})]  # by hand

            def get_config(self):  # by hand
                return {}  # by hand

        (found,) = case.encoder(case.x)
        boxes, scores = found["boxes"].detach().numpy(), found["scores"].detach().numpy()[None]
        stack = DRISEStack(20, 4, 0.5, seed=0, threads=0)
        return torch.from_numpy(stack(pixels(case.x)[0], boxes, scores, Boxes()))


class Methods(Question):
    name = "methods that give a map of a layer for a class of this encoder"
    public = r"CAM$|^Layer"

    @staticmethod
    def check(run):
        def works(method):
            torch.manual_seed(0)
            np.random.seed(0)  # of RandomCAM
            try:
                return flaw(method(Case())) is None
            except Exception:  # for another kind of encoder, or no method
                return False

        return sum(map(works, run()))

    def captum_fam():
        def explained(method, case):
            score = SimilarityScore(case.encoder, torch.eye(5), "dot")
            model = case.encoder if method is captum_fam.ClassActivationMap else score
            return method(model, case.layer).attribute(case.x, target=0)

        names = [getattr(captum_fam, name) for name in captum_fam.__all__]
        return [partial(explained, method) for method in classes(names) if issubclass(method, LayerAttribution)]

    def captum():
        def explained(method, case):
            needed = {"baselines": torch.zeros_like(case.x)} if "Shap" in method.__name__ else {}
            target = {} if method is captum.attr.LayerActivation else {"target": 0}
            return method(case.encoder, case.layer).attribute(case.x, **target, **needed).detach()

        methods = classes(vars(captum.attr).values())
        return [partial(explained, method) for method in methods if issubclass(method, LayerAttribution)]

    def grad_cam():
        def explained(method, case):
            found = method(case.encoder, [case.layer])(case.x, [ClassifierOutputTarget(0)])
            return torch.from_numpy(found)

        return [partial(explained, method) for method in classes(vars(pytorch_grad_cam).values())]

    def torchcam():
        def explained(method, case):
            layers = [case.encoder.first, case.layer] if method is torchcam.methods.RefineCAM else case.layer
            with method(case.encoder, layers) as extractor:
                z = case.encoder(case.x)
                return extractor(0, z)[0]

        return [partial(explained, method) for method in classes(vars(torchcam.methods).values())]


def classes(values):
    return [value for value in values if isinstance(value, type)]


class SavedResult(Question):
    name = "writes a map, a picture and a record of model and versions, in one call"
    public = r"(?i)manifest"

    @staticmethod
    def check(run):
        with tempfile.TemporaryDirectory() as folder:
            run(Case(), Path(folder) / "out")
            kinds = {file.suffix for file in Path(folder).rglob("*.*")}
        return None if {".npy", ".png", ".json"} <= kinds else f"only {sorted(kinds)}"

    def torchcam(case, folder):
        class Score(nn.Module):  # by hand
            def __init__(self):  # by hand
                super().__init__()  # by hand
                self.encoder = case.encoder  # by hand

            def forward(self, x):  # by hand
                return F.cosine_similarity(self.encoder(x)[:, None], case.s, dim=2)  # by hand

        image = Image.effect_noise((16, 16), 50).convert("RGB")
        torchcam.explain.explain(Score().eval(), case.x, target_layer=case.layer).save(folder, image)


class Job(Question):
    name = "explains many pairs as a job that goes on after a stop"
    public = r"(?i)explain_pairs|resume"

    @staticmethod
    def check(run):
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder) / "photos"
            photos.mkdir()
            for name, photo in list(demo.photographs().items())[:3]:
                photo.convert("RGB").resize((64, 64)).save(photos / f"{name}.jpg")
            out = Path(folder) / "maps"
            run(photos, out)
            first, *others = sorted(out.rglob("part-*.parquet"))
            kept, values = [part.stat().st_mtime_ns for part in others], first.read_bytes()
            first.unlink()
            run(photos, out)
            if [part.stat().st_mtime_ns for part in others] != kept:
                return "explained once more"
            return None if others and first.read_bytes() == values else "not what it was"

    def captum_fam(photos, out):
        explain_pairs(photos, out, part_size=2, workers=1)


class Page(Question):
    name = "makes a page on which one points at a place and sees its matches"
    public = r"(?i)explorer|insights|widget|interactive"

    @staticmethod
    def check(run):
        found = run(Case())
        return None if "<script" in found and "<canvas" in found else "no page that answers"

    def captum_fam(case):
        method = captum_fam.SimilarityDecomposition(case.encoder, case.layer)
        with tempfile.TemporaryDirectory() as folder:
            captum_fam.explore_pair(case.x, case.references[:1], method).save(Path(folder) / "page.html")
            return (Path(folder) / "page.html").read_text(encoding="utf-8")
