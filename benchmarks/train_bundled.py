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
import os
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor
from tqdm import tqdm

from captum_fam import FeatureActivationMap, bundled
from captum_fam.bundled import BundledEncoder
from captum_fam.demo import above, shares

SIDE = 160  # pixels of the stored square photos
VIEW = 96  # pixels of a training view
TEMPERATURE = 0.1
RATE = 2e-3
BATCH = 256

Photos = tuple[Tensor, list[str]]  # uint8 (N, 3, SIDE, SIDE) centre squares, and their class names


def photos(archive: Path, split: str) -> Photos:
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
def evaluate(encoder: BundledEncoder, train: Photos, test: Photos) -> str:
    """
    How well the test photos are found again from another view and classified by their 5 nearest training photos, and
    the share of the map in the right half of collages of two views.
    """
    encoder.eval()
    fam = FeatureActivationMap(encoder, encoder.features)
    (images, labels), (bank, bank_labels) = test, train
    one, two = (view(images, encoder.size, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    s = fam.embed(two)
    again = F.normalize(fam.embed(one)) @ F.normalize(s).T
    instance = (again.argmax(1) == torch.arange(len(images))).float().mean().item()

    nearest = (_plain(fam, images) @ _plain(fam, bank).T).topk(5).indices
    votes = [Counter(bank_labels[i] for i in row).most_common(1)[0][0] for row in nearest.tolist()]
    accuracy = sum(vote == label for vote, label in zip(votes, labels)) / len(labels)

    collages, mine = torch.cat([one, one.roll(1, 0)], 3), list(range(len(images)))
    others = [i - 1 for i in mine]
    plain = fam.attribute(collages, mine, reference_embedding=s)
    contrast = fam.attribute(collages, mine, reference_embedding=s, contrast=others)
    inside, decided = (shares(maps[:, 0], 1, 2)[:, 0] for maps in (plain, contrast))
    return (
        f"found again {instance:.3f}, class by 5-NN {accuracy:.3f}, FAM inside {inside.mean():.3f} (above chance"
        f" {above(inside):.3f}), contrast inside {decided.nanmean():.3f}"
    )


def _plain(fam: FeatureActivationMap, images: Tensor) -> Tensor:
    """Unit embeddings of whole photos."""
    size = BundledEncoder.size
    batches = (normalise(F.interpolate(b.float() / 255, size, mode="area")) for b in images.split(256))
    return F.normalize(torch.cat([fam.embed(b) for b in batches]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("CAPTUM_FAM_DATA"))
    parser.add_argument("--output", type=Path, default=Path(bundled.__file__).with_name(bundled.WEIGHTS))
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data is None:
        parser.error("set CAPTUM_FAM_DATA or pass --data: the folder with photos/clothing.zip")
    archive = args.data / "photos" / "clothing.zip"
    train, validation, test = (photos(archive, split) for split in ("train", "validation", "test"))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    encoder = BundledEncoder().to(memory_format=torch.channels_last)
    print("untrained, test photos:", evaluate(encoder, train, test), flush=True)

    images, start = train[0], time.time()
    batches = len(images) // BATCH
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=args.epochs * batches, pct_start=0.15)
    loss_func = NTXentLoss(temperature=TEMPERATURE)
    for epoch in range(args.epochs):
        encoder.train()
        losses = []
        order = torch.randperm(len(images), generator=generator)
        for index in tqdm(order.split(BATCH)[:batches], f"epoch {epoch + 1}", leave=False):
            views = [view(images[index], VIEW, generator).contiguous(memory_format=torch.channels_last) for _ in "12"]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                one, two = (encoder.features(v) for v in views)
            loss = collage_loss(loss_func, one.float().mean((2, 3)), random_part(two.float(), generator))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {time.time() - start:.0f} s", flush=True)
        if (epoch + 1) % 4 == 0:
            print("validation photos:", evaluate(encoder, train, validation), flush=True)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in encoder.state_dict().items()}, args.output)
    print("trained, test photos:", evaluate(encoder, train, test))


if __name__ == "__main__":
    main()
