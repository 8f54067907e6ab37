"""Rows of benchmarks/peers.py on kinds of encoders."""
# ruff: noqa: N805, RUF012  # as in peers_rows.py

from functools import partial

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
import transformers
from pytorch_grad_cam.utils.reshape_transforms import vit_reshape_transform
from torch import nn
from xaitk_saliency.impls.gen_image_similarity_blackbox_sal.sbsm import SBSMStack

import captum_fam
import captum_fam.metrics
from benchmarks.peers_rows import (
    Case,
    Descriptors,
    Flat,
    Question,
    fam,
    flaw,
    grad_cam,
    layer_grad_cam,
    noise,
    pixels,
    sbsm,
    similarity,
    target,
    torchcam_map,
)
from captum_fam import SimilarityScore


class Tokens(Question):
    name = "explains an encoder of transformers, whose layer gives tokens"

    @staticmethod
    def check(run):
        size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        vit = transformers.ViTModel(transformers.ViTConfig(**size, image_size=16, patch_size=4)).eval()
        case = Case.__new__(Case)
        case.encoder, case.layer = vit, vit.layers[-1].layernorm_before
        case.x, case.references = noise(2, 1, 3, 16, 16)
        case.s = vit(case.references).pooler_output.detach()
        maps = run(case).squeeze()
        return flaw(maps) or (None if maps.shape in ((4, 4), (16, 16)) else f"a map of {tuple(maps.shape)}")

    def captum_fam(case):
        method = captum_fam.FeatureActivationMap(case.encoder, case.layer, output_selector=lambda z: z.pooler_output)
        return method.attribute(case.x, reference=case.references)

    def captum(case):
        def score(x):
            return F.cosine_similarity(case.encoder(x).pooler_output, case.s)

        found = captum.attr.LayerGradientXActivation(score, case.layer).attribute(case.x)
        return found.sum(2)[:, 1:].reshape(4, 4).detach()  # by hand

    def grad_cam(case):
        class Pooled(nn.Module):  # by hand
            def __init__(self):  # by hand
                super().__init__()  # by hand
                self.vit = case.encoder  # by hand

            def forward(self, x):  # by hand
                return self.vit(x).pooler_output  # by hand

        grid = partial(vit_reshape_transform, height=4, width=4)
        with pytorch_grad_cam.GradCAM(Pooled(), [case.layer], reshape_transform=grid) as cam:
            return torch.from_numpy(cam(case.x, [target(case)]))

    def torchcam(case):
        def grid(tokens):  # by hand
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # by hand

        with torchcam.methods.GradCAM(case.encoder, case.layer, reshape_transform=grid) as extractor:
            return extractor(scores=case.encoder(case.x).pooler_output, targets=target(case))[0]

    def xaitk(case):
        return sbsm(case.x, case.references, lambda x: case.encoder(x).pooler_output)


class BlackBox(Question):
    name = "explains a function of arrays, without a layer and without gradients"

    @staticmethod
    def check(run):
        weights = noise(3 * 16 * 16, 5).numpy()
        case = Case()
        case.encoder = lambda x: torch.from_numpy(np.tanh(x.numpy().reshape(len(x), -1) @ weights))
        case.s = case.encoder(case.references)
        return flaw(run(case))

    def captum_fam(case):
        return captum_fam.Relax(SimilarityScore(case.encoder, case.s), n_samples=50).attribute(case.x, target=0)

    def captum(case):
        return captum.attr.Occlusion(similarity(case)).attribute(case.x, sliding_window_shapes=(3, 4, 4))

    def grad_cam(case):
        return grad_cam(case, target(case), pytorch_grad_cam.ScoreCAM)

    def torchcam(case):
        return torchcam_map(case, target(case), torchcam.methods.ScoreCAM)

    def xaitk(case):
        return sbsm(case.x, case.references[:1], case.encoder)


class Signals(Question):
    name = "explains signals, (B, C, T)"

    @staticmethod
    def check(run):
        found = run(Case(size=(16,)))
        return flaw(found) or (None if found.shape[-1] in (8, 16) else f"a map of {tuple(found.shape)}")

    def captum_fam(case):
        return fam(case)

    def captum(case):
        return layer_grad_cam(case, similarity(case))

    def grad_cam(case):  # as an image of height 1
        def image(A):  # by hand
            return A[:, :, None]  # by hand

        with pytorch_grad_cam.GradCAM(Flat(case.encoder), [case.layer], reshape_transform=image) as cam:
            return torch.from_numpy(cam(case.x[:, :, None], [target(case)]))

    def torchcam(case):
        return torchcam_map(case, target(case))

    def xaitk(case):
        stack = SBSMStack((1, 4), (1, 2), "cosine", fill=0)
        images = [pixels(x[:, :, None])[0] for x in (case.x, case.references[:1])]  # by hand
        return torch.from_numpy(stack(images[0], images[1:], Descriptors(lambda x: case.encoder(x.flatten(2)))))

    helpers = {"grad_cam": Flat}


class Volumes(Question):
    name = "explains volumes, (B, C, D, H, W)"

    @staticmethod
    def check(run):
        found = run(Case(size=(8, 8, 8)))
        return flaw(found) or (None if found.squeeze().ndim == 3 else f"a map of {tuple(found.shape)}")

    captum_fam, captum, torchcam = Signals.captum_fam, Signals.captum, Signals.torchcam

    def grad_cam(case):
        return grad_cam(case, target(case))

    def xaitk(case):
        images = [x[0].movedim(0, -1).numpy() for x in (case.x, case.references[:1])]
        embed = Descriptors(lambda x: case.encoder(x.movedim(-1, 1)))
        return torch.from_numpy(SBSMStack((4, 4), (2, 2), "cosine")(images[0], images[1:], embed))


class Mean(nn.Module):
    def forward(self, tokens):
        return tokens.mean(1)


class Sentences(Question):
    name = "explains two sentences, token by token"
    public = r"(?i)sentence"

    @staticmethod
    def check(run):
        torch.manual_seed(0)
        case = Case.__new__(Case)
        words = nn.Embedding(20, 8)
        case.encoder = nn.Sequential(words, nn.Linear(8, 6), nn.Tanh(), Mean())
        case.layer, case.x, case.references = words, torch.tensor([[3, 5, 7, 11]]), torch.tensor([[2, 5, 9, 11]])
        case.s = case.encoder(case.references).detach()
        found = run(case)
        return flaw(found) or (None if found.numel() == 4 else f"a map of {tuple(found.shape)}")

    def captum_fam(case):
        def signal(tokens):  # by hand
            return tokens.transpose(1, 2)  # by hand

        method = captum_fam.FeatureActivationMap(case.encoder, case.layer, reshape_transform=signal)
        return method.attribute(case.x, reference=case.references)

    def captum(case):
        method = captum.attr.LayerIntegratedGradients(similarity(case), case.layer)
        return method.attribute(case.x, torch.zeros_like(case.x)).sum(2).detach()  # by hand

    def grad_cam(case):  # as an image of height and channel 1
        def image(tokens):  # by hand
            return tokens.transpose(1, 2)[:, :, None]  # by hand

        whole = Flat(nn.Sequential(nn.Flatten(), case.encoder))
        with pytorch_grad_cam.GradCAM(whole, [case.layer], reshape_transform=image) as cam:
            return torch.from_numpy(cam(case.x[:, None, None], [target(case)]))

    def torchcam(case):
        def signal(tokens):  # by hand
            return tokens.transpose(1, 2)  # by hand

        with torchcam.methods.GradCAM(case.encoder, case.layer, reshape_transform=signal) as extractor:
            return extractor(scores=case.encoder(case.x), targets=target(case))[0]

    def xaitk(case):  # as an image of height 1
        images = [x[0, None, :, None].numpy() for x in (case.x, case.references)]  # by hand
        embed = Descriptors(lambda x: case.encoder(x.flatten(1)))
        return torch.from_numpy(SBSMStack((1, 1), (1, 1), "cosine", fill=0)(images[0], images[1:], embed))

    helpers = {"grad_cam": Flat}


class Untouched(Question):
    name = "leaves the model's mode, gradients and hooks as they were"

    @staticmethod
    def check(run):
        case = Case()
        case.encoder.train()
        for p in case.encoder.parameters():
            p.grad = torch.ones_like(p)
        run(case)
        if not case.encoder.training:
            return "the model is in evaluation mode"
        if not all(p.grad is not None and (p.grad == 1).all() for p in case.encoder.parameters()):
            return "the gradients are others"
        return "hooks are left" if any(len(m._forward_hooks) for m in case.encoder.modules()) else None

    captum_fam, captum, grad_cam = Signals.captum_fam, Signals.captum, Volumes.grad_cam
    torchcam = Signals.torchcam

    def xaitk(case):
        return sbsm(case.x, case.references[:1], case.encoder)
