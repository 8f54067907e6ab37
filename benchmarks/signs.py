"""What negative values in embeddings do to maps: ``CAPTUM_FAM_DATA=... python -m benchmarks.signs`` writes signs.md."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation
from scipy.stats import bootstrap
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import objects, study, tasks
from benchmarks import train_contrastive as trained
from benchmarks.pairs import _square
from captum_fam import FeatureActivationMap, SimilarityDecomposition, SimilarityScore
from captum_fam import channel_contributions as contributions
from captum_fam import contribution_weights as minmax

PAGE = """# The signs of embeddings

Made by `CAPTUM_FAM_DATA=<data folder> python -m benchmarks.signs`.

If embeddings have negative values, which method still finds the right half of a collage?
[Measured](../docs/measured.md) says what these tables mean.

- **Collages** join two images, as in [tasks.py](tasks.py): {count} of CIFAR-10, and {few} of clothing for the last
  two encoders. The score is the cosine.
- **Each cell** has three values. The first is the mean share of the positive map in the right half; chance is 0.50.
  The second is its 95 % bootstrap interval over collages. The third is the number of collages above 0.50. Each
  collage counts once, as the mean over its two references, so a map that ignores the reference has 0.50.
- **FAM** weighs the dimensions by w sign(z), and each place by its own gradient. *FAM 0.1*, the version before, did
  neither. *Signs only* and *places only* do one of the two.
- **Self** is what a match adds to what the image has with itself. It uses no other reference, so it is the same in
  both tables.
- **Negative** is the share of the sum of |c| where z < 0.
- **Untrained** encoders have one draw of weights each. The intervals do not include the choice of this draw.

{tables}
"""


@dataclass
class Case:
    net: nn.Module
    layer: nn.Module
    x: Tensor  # collages
    s: Tensor  # references (K, D)
    left: Tensor  # numbers of what is there
    right: Tensor


class Grid(nn.Module):
    """A norm's tokens after the class token as a map (B, C, h, w), which LayerGradCam needs, and back."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.map = norm, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x)
        side = math.isqrt(tokens.shape[1] - 1)
        return torch.cat([tokens[:, :1], self.map(tokens[:, 1:].mT.unflatten(2, (side, side))).flatten(2).mT], 1)


def layer_method(kind: Any, case: Case, a: Tensor, b: Tensor | None) -> Tensor:
    return kind(case.net, case.layer).attribute(case.x, a, reference_embedding=case.s, contrast=b)


def own(kind: Any, case: Case, a: Tensor, b: Tensor | None) -> Tensor:
    """What the match has beyond what the image has with itself; it knows of no other reference."""
    return kind(case.net, case.layer).attribute(case.x, a, reference_embedding=case.s, contrast="self")


def by_hand(signs: bool, places: bool, case: Case, a: Tensor, b: Tensor | None) -> Tensor:
    """FAM with or without the signs of z, with a weight for each place or for each channel."""
    z = case.net(case.x).detach()
    c = contributions(z, case.s[a])
    w = (z.sign() if signs else 1) * (minmax(c) if b is None else c - contributions(z, case.s[b]))
    kind = LayerGradientXActivation if places else LayerGradCam
    maps = kind(lambda x: (w * case.net(x)).sum(1), case.layer).attribute(case.x)
    return maps.sum(1, True)


def grad_cam(case: Case, a: Tensor, b: Tensor | None) -> Tensor:
    cam = LayerGradCam(SimilarityScore(case.net, case.s), case.layer)  # linear in the score
    return cam.attribute(case.x, a) - (0 if b is None else cam.attribute(case.x, b))


METHODS: dict[str, Callable[..., Tensor]] = {
    "FAM": partial(layer_method, FeatureActivationMap),
    "FAM 0.1": partial(by_hand, False, False),
    "signs only": partial(by_hand, True, False),
    "places only": partial(by_hand, False, True),
    "FAM self": partial(own, FeatureActivationMap),
    "decomposition": partial(layer_method, SimilarityDecomposition),
    "decomposition self": partial(own, SimilarityDecomposition),
    "Grad-CAM": grad_cam,
}
CHANGES: dict[str, Callable[[int], Tensor]] = {
    "-1": lambda D: -torch.eye(D),
    "random signs": lambda D: (2.0 * torch.randint(2, (D,)) - 1).diag(),
    "rotation": lambda D: torch.linalg.qr(torch.randn(D, D))[0],
}


def cases(data: Path, count: int) -> Iterator[tuple[str, Case]]:
    test, labels = trained.read(data / "photos" / "cifar10.zip", "test")
    chosen = tasks.pairs_of_classes(labels, count)
    small = trained.normalise(test[chosen.flatten()]).unflatten(0, (-1, 2))
    photos, kinds = objects.clothing(data)
    numbers = tasks.pairs_of_classes(torch.tensor(kinds), count // 4).flatten().tolist()
    large = torch.stack([_square(photos[i], 128) for i in numbers]).unflatten(0, (-1, 2))

    @torch.no_grad()
    def case(net: nn.Module, layer: nn.Module, images: Tensor) -> Case:
        s = torch.cat([net(x) for x in images.transpose(0, 1).flatten(0, 1).split(50)])
        return Case(net, layer, tasks.collages(images), s, *torch.arange(len(s)).chunk(2))

    for state in ("trained", "untrained"):
        for seed, name in enumerate(study.LAYERS):
            torch.manual_seed(seed)
            model: Any = trained.load(name) if state == "trained" else trained.build(name).eval()
            layer = study.LAYERS[name](model)
            if name in ("dino_vit", "clip"):
                parent, _, leaf = next(n for n, module in model.named_modules() if module is layer).rpartition(".")
                setattr(model.get_submodule(parent), leaf, grid := Grid(layer))
                layer = grid.map
            yield f"{name}, {state}", (images := case(study.Embedding(model), layer, small))
            if name != "clip":
                yield f"{name} with its head, {state}", case(model, layer, small)
        s = model.get_text_features(trained.tokenize([f"a photo of a {c}" for c in trained.CLASSES])).pooler_output
        a, b = labels[chosen].T
        yield f"clip, sentences, {state}", replace(images, s=s.detach(), left=a, right=b)
        for name in ("bundled", "mobilenet_v2_imagenet"):
            encoder = study.encoder(name, data, state)
            yield f"{name}, {state}", case(encoder.net, encoder.layer, large)


def share(method: Callable[..., Tensor], case: Case, contrast: bool) -> str:
    sides = ((case.left, case.right), (case.right, case.left))
    maps = [method(case, a, b if contrast else None).detach()[:, 0] for a, b in sides]
    left, right = (torch.where((M > 0).flatten(1).any(1), tasks.left_share(M), 0.5) for M in maps)  # empty: chance
    values = ((left + 1 - right) / 2).double().numpy()
    low, high = bootstrap((values,), np.mean, method="percentile", random_state=tasks.SEED).confidence_interval
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}] {(values > 0.5 + 1e-6).sum()}"


def negative(case: Case) -> str:
    z = case.net(case.x).detach()
    sizes = torch.stack([contributions(z, case.s[side]).abs() for side in (case.left, case.right)])
    return f"{((sizes * (z < 0)).sum(2) / sizes.sum(2)).mean():.2f}"


def alike(method: Callable[..., Tensor], case: Case, contrast: bool, change: str) -> float:
    """The mean correlation of 16 maps before and after a change of the embedding that changes no cosine."""
    torch.manual_seed(tasks.SEED)
    head = nn.Linear(case.s.shape[1], case.s.shape[1], bias=False)
    head.weight.data = CHANGES[change](len(head.weight))
    few = replace(case, x=case.x[:16], left=case.left[:16], right=case.right[:16])
    changed = replace(few, net=nn.Sequential(case.net, head), s=head(case.s).detach())
    maps = [method(c, c.left, c.right if contrast else None).detach().flatten(1) for c in (few, changed)]
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(*maps)]))


@click.command()
@click.option("--data", envvar="CAPTUM_FAM_DATA", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--count", default=200, show_default=True, help="Collages of CIFAR-10; of clothing a quarter.")
def main(data: Path, count: int) -> None:
    """Print and write what signs do to maps."""
    warnings.filterwarnings("ignore")
    tables = []
    found = list(cases(data, count))
    for contrast, title in ((False, "plain maps"), (True, "contrast with the other half")):
        head = f"{' | '.join(METHODS)} |\n|---|---|{'---|' * len(METHODS)}"
        lines = [f"{title.capitalize()}\n\n| encoder | negative | {head}"]
        for name, case in tqdm(found, desc=title):
            cells = [share(method, case, contrast) for method in METHODS.values()]
            lines.append(f"| {name} | {negative(case)} | {' | '.join(cells)} |")
        lines.append("\nCorrelation of these maps before and after a change of all embeddings")
        lines.append(f"\n| change | encoders | {head}")
        for change in CHANGES:
            kept = [[alike(m, c, contrast, change) for n, c in found if "untrained" not in n] for m in METHODS.values()]
            lines.append(f"| {change} | trained | {' | '.join(f'{min(v):.2f} to {max(v):.2f}' for v in kept)} |")
        tables.append("\n".join(lines))
    page = PAGE.format(tables="\n\n".join(tables), count=count, few=count // 4)
    Path(__file__).with_suffix(".md").write_text(page)
    click.echo(page)


if __name__ == "__main__":
    main()
