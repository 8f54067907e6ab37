"""Trains the encoder that the package carries (captum_fam/bundled.pt).

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.train_bundled

Data: the training photos of ``photos/clothing.zip`` (CC0). Loss: NT-Xent of
pytorch-metric-learning between a view of a photo and the mean embedding of two parts, one
of another view of that photo and one of a stranger's: what a collage of the two embeds as.
The features are non-negative, so photos that should not match must use different channels,
and every part of a photo must use its channels.
"""

import argparse
import io
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor
from tqdm import tqdm

from captum_fam import bundled
from captum_fam.bundled import BundledEncoder

SIDE = 160  # pixels of the stored square photos
VIEW = 96  # pixels of a training view
TEMPERATURE = 0.1


def photos(archive: Path, split: str) -> tuple[Tensor, list[str]]:
    """uint8 (N, 3, SIDE, SIDE) centre squares and their class names."""
    images, labels = [], []
    with zipfile.ZipFile(archive) as zipped:
        for name in sorted(n for n in zipped.namelist() if f"{split}/" in n and n.endswith(".jpg")):
            image = Image.open(io.BytesIO(zipped.read(name))).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
            labels.append(name.split("/")[-2])
    return torch.stack(images), labels


def view(batch: Tensor, size: int, generator: torch.Generator, least: float = 0.25) -> Tensor:
    """A random crop (share of the area at least ``least``), mirror and light of each image, normalised."""
    n = len(batch)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    area = least + (1 - least) * rand(n)
    stretch = torch.exp((rand(n) - 0.5) * 0.5)
    half = torch.stack([(area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)], 1)
    centre = (rand(n, 2) * 2 - 1) * (1 - half)
    mirror = (rand(n) < 0.5).float() * 2 - 1
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = half[:, 0] * mirror, half[:, 1], centre
    pixels = batch.float() / 255
    grid = F.affine_grid(affine, [n, 3, size, size], align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    gain = torch.exp((rand(n, 1, 1, 1) - 0.5) * 0.8 + (rand(n, 3, 1, 1) - 0.5) * 0.2)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (mean + (pixels - mean) * torch.exp((rand(n, 1, 1, 1) - 0.5) * 0.8)) * gain
    grey = pixels.mean(1, keepdim=True)
    pixels = (grey + (pixels - grey) * (0.4 + 1.2 * rand(n, 1, 1, 1))).clamp(0, 1)
    return normalise(pixels)


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (BundledEncoder.mean, BundledEncoder.std))
    return (pixels - mean) / std


def random_part(features: Tensor, generator: torch.Generator) -> Tensor:
    """The mean of a random quadrant of each feature map: (N, C)."""
    quadrants = F.adaptive_avg_pool2d(features, 2).flatten(2)
    chosen = torch.randint(4, (len(features), 1, 1), generator=generator).expand(-1, features.shape[1], 1)
    return quadrants.gather(2, chosen)[..., 0]


def collage_loss(loss: NTXentLoss, one: Tensor, two: Tensor) -> Tensor:
    """NT-Xent of views ``one`` against collages: the mean of a part ``two`` and its neighbour in the batch."""
    n = len(one)
    index = torch.arange(n)
    collages = (two + two.roll(1, 0)) / 2
    match = torch.zeros(n, n, dtype=torch.bool)
    match[index, index] = match[index, (index + 1) % n] = True
    positive, negative = match.nonzero(as_tuple=True), (~match).nonzero(as_tuple=True)
    return loss(one, indices_tuple=(*positive, *negative), ref_emb=collages)


@torch.no_grad()
def evaluate(
    encoder: BundledEncoder, train: tuple[Tensor, list[str]], test: tuple[Tensor, list[str]]
) -> dict[str, float]:
    """Accuracy of finding a photo again from another view, of the class by 5 neighbours, and of FAM on collages."""
    encoder.eval()
    views = [view(test[0], BundledEncoder.size, torch.Generator().manual_seed(s)) for s in (1, 2)]
    one, two = (F.normalize(encoder(v)) for v in views)
    instance = ((one @ two.T).argmax(1) == torch.arange(len(one))).float().mean().item()

    plain = [
        torch.cat(
            [
                F.normalize(encoder(normalise(F.interpolate(b.float() / 255, BundledEncoder.size, mode="area"))))
                for b in s.split(256)
            ]
        )
        for s in (train[0], test[0])
    ]
    classes = {name: i for i, name in enumerate(sorted(set(train[1])))}
    label = torch.tensor([classes[name] for name in train[1]])
    near = label[(plain[1] @ plain[0].T).topk(5).indices].mode().values
    knn = (near == torch.tensor([classes[name] for name in test[1]])).float().mean().item()

    collages = torch.cat([views[0], views[0].roll(1, 0)], 3)
    maps = encoder.features(collages)
    z, width = maps.mean((2, 3)), maps.shape[3] // 2
    c = F.normalize(z) * F.normalize(two)
    w = (c - c.amin(1, keepdim=True)) / (c.amax(1, keepdim=True) - c.amin(1, keepdim=True))
    fam = torch.einsum("bc,bchw->bhw", w, maps)
    share = fam[..., :width].sum((1, 2)) / fam.sum((1, 2))
    other = F.normalize(z) * F.normalize(two.roll(1, 0))
    contrast = torch.einsum("bc,bchw->bhw", c - other, maps).relu()
    kept = contrast[..., :width].sum((1, 2)) / contrast.sum((1, 2)).clamp(min=1e-12)
    return {
        "instance": instance,
        "5-nn class": knn,
        "FAM share": share.mean().item(),
        "FAM above chance": (share > 0.5).float().mean().item(),
        "contrast share": kept.mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(bundled.__file__).with_name(bundled.WEIGHTS))
    args = parser.parse_args()
    archive = args.data / "photos" / "clothing.zip"
    train, validation, test = (photos(archive, split) for split in ("train", "validation", "test"))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    encoder = BundledEncoder().to(memory_format=torch.channels_last)
    print(len(train[0]), len(validation[0]), len(test[0]))
    print("untrained:", evaluate(encoder, train, validation))
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.05)
    steps = args.epochs * (len(train[0]) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.15)
    loss_func = NTXentLoss(temperature=TEMPERATURE)
    start = time.time()
    for epoch in range(args.epochs):
        encoder.train()
        order = torch.randperm(len(train[0]), generator=generator)
        losses = []
        for index in tqdm(order.split(args.batch)[: len(order) // args.batch], leave=False):
            views = [view(train[0][index], VIEW, generator).contiguous(memory_format=torch.channels_last) for _ in "12"]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                one, two = (encoder.features(v) for v in views)
            loss = collage_loss(loss_func, one.float().mean((2, 3)), random_part(two.float(), generator))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {time.time() - start:.0f} s", flush=True)
        if epoch % 4 == 3 or epoch + 1 == args.epochs:
            print({k: round(v, 3) for k, v in evaluate(encoder, train, validation).items()}, flush=True)
            torch.save(
                {k: v.half() if v.is_floating_point() else v for k, v in encoder.state_dict().items()}, args.output
            )
    print("test:", evaluate(encoder, train, test))


if __name__ == "__main__":
    main()
