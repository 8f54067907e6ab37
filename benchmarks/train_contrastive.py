"""Trains small contrastive encoders on CIFAR-10, for attribution maps that explain something learned.

    CAPTUM_FAM_DATA=<data folder> python -m benchmarks.train_contrastive [NAME ...]

Data: the 10,000 training images of ``photos/cifar10.zip``; the 2,000 test images only measure. The heads, losses and
schedules are lightly's, the vision transformer is timm's, CLIP is that of transformers. Every encoder takes normalised
images (B, 3, 32, 32), see ``normalise``; ``load(name)`` returns a trained one.
"""

import io
import json
import math
import os
import platform
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import LongTensor, Tensor, nn
from tqdm import tqdm

FOLDER = Path(__file__).with_name("contrastive")
RECORD = "trainings.json"
SEED = 0
BATCH = 200  # 50 batches of the 10,000 images, each 20 times the 10 classes
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10
NEIGHBOURS, TEMPERATURE = 20, 0.1  # of the weighted kNN

TRAINING = {  # name: (epochs, learning rate)
    "simclr": (24, 2e-3),
    "barlow_twins": (8, 2e-3),
    "byol": (14, 2e-3),
    "dino_vit": (20, 1e-3),
    "clip": (24, 1e-3),
}

PAD, BOS, EOS = 0, 129, 130  # around the ASCII characters, ord(c) + 1; CLIP pools the text at EOS
TEXT_LENGTH = 48
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = (
    "a photo of a {}",
    "a small {} in a picture",
    "a blurry photo of one {}",
    "this is a {}",
    "an image of the {}",
    "{}",
)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs else project
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convolutions(x) + self.shortcut(x))


class ConvolutionalBackbone(nn.Module):
    """Images (B, 3, 32, 32) to the spatial means (B, 128) of the map of ``stage3`` (B, 128, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stage1 = ResidualBlock(32, 32)
        self.stage2 = ResidualBlock(32, 64, stride=2)
        self.stage3 = ResidualBlock(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.stage3(self.stage2(self.stage1(self.stem(x)))).mean((2, 3))


class Encoder(nn.Module):
    """A backbone and its projection head; what is compared after training are the backbone's embeddings."""

    def __init__(self, backbone: nn.Module, projection_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = projection_head

    def embed(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection_head(self.embed(images))


def build(name: str) -> nn.Module:
    """The untrained encoder: an ``Encoder``, or for ``clip`` a ``transformers.CLIPModel``."""
    if name == "clip":
        return _clip()
    from lightly.models.modules import heads

    if name == "simclr":
        return Encoder(ConvolutionalBackbone(), heads.SimCLRProjectionHead(128, 256, 128))
    if name == "barlow_twins":
        return Encoder(ConvolutionalBackbone(), heads.BarlowTwinsProjectionHead(128, 256, 256))
    if name == "byol":
        return Encoder(ConvolutionalBackbone(), heads.BYOLProjectionHead(128, 512, 128))
    if name == "dino_vit":
        return Encoder(_vision_transformer(), heads.DINOProjectionHead(96, 256, 64, 1024))
    raise ValueError(f"Expected a name among {', '.join(TRAINING)} but got {name!r}.")


def _vision_transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=0, global_pool="token"
    )
    for block in model.blocks:
        block.attn.fused_attn = False  # its backward pass is twice as slow on CPUs
    return model


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    tokens = {"vocab_size": EOS + 1, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = CLIPConfig(
        text_config={**tokens, **text, "max_position_embeddings": TEXT_LENGTH},
        vision_config={**vision, "image_size": 32, "patch_size": 4},
        projection_dim=64,
        attn_implementation="eager",
    )
    return CLIPModel(config)


def load(name: str, folder: Path = FOLDER) -> nn.Module:
    """The trained encoder in eval mode, with the weights of ``folder/NAME.pt``."""
    model = build(name)
    model.load_state_dict(torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True))
    return model.eval()


def tokenize(texts: list[str]) -> LongTensor:
    """The characters of ASCII texts as the ``input_ids`` (B, L) of ``clip``, padded to the longest."""
    ids = [[BOS, *(ord(c) + 1 for c in text), EOS] for text in texts]
    longest = max(map(len, ids))
    if longest > TEXT_LENGTH or not all(text.isascii() for text in texts):
        raise ValueError(f"Expected ASCII texts of at most {TEXT_LENGTH - 2} characters but got {texts}.")
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in ids])


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """What similarities compare: the backbone's embeddings, for CLIP those in the space of the texts."""
    if isinstance(model, Encoder):
        return model.embed(images)
    return model.visual_projection(model.vision_model(images).pooler_output)


def read(archive: Path, split: str) -> tuple[Tensor, Tensor]:
    """The images uint8 (N, 3, 32, 32) and classes (N,) of a split."""
    images, labels = [], []
    with zipfile.ZipFile(archive) as zipped:
        for name in sorted(n for n in zipped.namelist() if n.startswith(f"{split}/") and n.endswith(".jpg")):
            images.append(np.array(Image.open(io.BytesIO(zipped.read(name))).convert("RGB")))
            labels.append(CLASSES.index(name.split("/")[1]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def normalise(images: Tensor) -> Tensor:
    """Images uint8 as the encoders take them."""
    return _standardise(images.float() / 255)


def _standardise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor) -> Tensor:
    """A random view of each image: crop of 20 to 100 % of the area, mirror, light, contrast, colour or grey."""
    n, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, device=device)

    area, log_ratio = uniform(0.2, 1), uniform(-math.log(4 / 3), math.log(4 / 3))
    sides = torch.stack([(area * log_ratio.exp()).sqrt(), (area / log_ratio.exp()).sqrt()], 1).clamp(max=1)
    centres = uniform(-1, 1, 2) * (1 - sides)
    sides[:, 0] *= torch.where(uniform(0, 1) < 0.5, 1, -1)
    grid = F.affine_grid(torch.cat([sides.diag_embed(), centres[..., None]], 2), [n, 3, 32, 32], align_corners=False)
    cropped = F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)

    pixels = cropped * uniform(0.6, 1.4, 1, 1, 1) * uniform(0.9, 1.1, 3, 1, 1)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * uniform(0.6, 1.4, 1, 1, 1)
    pixels = torch.where(uniform(0, 1, 1, 1, 1) < 0.8, pixels, cropped)
    grey = pixels.mean(1, keepdim=True)
    saturation = torch.where(uniform(0, 1, 1, 1, 1) < 0.2, 0, uniform(0.6, 1.4, 1, 1, 1))
    return _standardise((grey + (pixels - grey) * saturation).clamp(0, 1))


def half_precision(images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, dtype=torch.bfloat16)


def project(model: nn.Module, images: Tensor) -> Tensor:
    with half_precision(images):
        return model(images).float()


class Objective(nn.Module):
    """The loss of a batch; what it holds beside the model (teacher, prediction head) is not kept."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def update(self, step: int, steps: int) -> None:
        """Called after each step of the optimiser."""


class TwoViews(Objective):
    """A loss between the projections of two views."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__(model)
        self.loss = loss

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(project(self.model, augment(images)), project(self.model, augment(images)))


class Taught(Objective):
    """A teacher that is the moving average of the model."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__(model)
        from lightly.models.utils import deactivate_requires_grad

        teacher.load_state_dict(model.state_dict())
        deactivate_requires_grad(teacher)
        self.teacher = teacher

    def update(self, step: int, steps: int) -> None:
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        update_momentum(self.model, self.teacher, cosine_schedule(step, steps, 0.99, 1))


class Byol(Taught):
    """Predicts the teacher's projection of the other view."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__(model, teacher)
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import BYOLPredictionHead

        self.prediction_head = BYOLPredictionHead(128, 512, 128)
        self.loss = NegativeCosineSimilarity()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        one, two = augment(images), augment(images)
        with torch.no_grad():
            of_one, of_two = project(self.teacher, one), project(self.teacher, two)
        like_two, like_one = (self.prediction_head(project(self.model, view)) for view in (one, two))
        return (self.loss(like_two, of_two) + self.loss(like_one, of_one)) / 2


class Dino(Taught):
    """Assigns the outputs that the teacher assigns to the other view; no local crops."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__(model, teacher)
        from lightly.loss import DINOLoss

        self.loss = DINOLoss(output_dim=1024)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        views = [augment(images), augment(images)]
        with torch.no_grad():
            taught = [project(self.teacher, view) for view in views]
        return self.loss(taught, [project(self.model, view) for view in views])


class Clip(Objective):
    """CLIP's symmetric loss in groups of ten images, one of each class, so that one caption of a group is right."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        chosen = torch.randint(len(TEMPLATES), labels.shape).tolist()
        captions = [TEMPLATES[t].format(CLASSES[label]) for t, label in zip(chosen, labels.tolist())]
        with half_precision(images):
            output = self.model(input_ids=tokenize(captions).to(images.device), pixel_values=augment(images))
        groups = output.logits_per_text.float().unflatten(0, (-1, 10)).unflatten(2, (-1, 10))
        logits = groups.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (group, text, image)
        right = torch.arange(10, device=images.device).expand(len(logits), -1)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.mT, right)) / 2


def objective(name: str, model: nn.Module) -> Objective:
    """The loss that trains ``build(name)``."""
    if name == "clip":
        return Clip(model)
    if name == "byol":
        return Byol(model, build(name))
    if name == "dino_vit":
        return Dino(model, build(name))
    from lightly.loss import BarlowTwinsLoss, NTXentLoss

    return TwoViews(model, BarlowTwinsLoss() if name == "barlow_twins" else NTXentLoss(temperature=0.2))


def shuffled(labels: Tensor, by_class: bool) -> Tensor:
    """A random order of the images; ``by_class``: each ten in a row are of the ten classes."""
    if by_class:
        orders = [members[torch.randperm(len(members))] for c in range(10) for members in (labels == c).nonzero().mT]
        return torch.stack(orders, 1).flatten()
    return torch.randperm(len(labels))


def train(name: str, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """The encoder ``name``, trained on the device of the images."""
    torch.manual_seed(SEED)
    model = build(name)
    loss_func = objective(name, model).to(images.device, memory_format=torch.channels_last)
    parameters = [p for p in loss_func.parameters() if p.requires_grad]
    steps, rate = epochs * (len(labels) // BATCH), TRAINING[name][1]
    optimiser = torch.optim.AdamW(parameters, rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.15)
    loss_func.train()
    with tqdm(total=steps, desc=name, mininterval=2) as progress:
        for _ in range(epochs):
            for index in shuffled(labels, by_class=name == "clip").split(BATCH):
                loss = loss_func(images[index], labels[index])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 3)
                optimiser.step()
                loss_func.update(progress.n, steps)
                schedule.step()
                progress.update()
                progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """Unit embeddings of whole images."""
    return F.normalize(torch.cat([embed(model, normalise(batch)) for batch in images.split(500)]))


def knn_accuracy(model: nn.Module, bank: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """The share of test images that their nearest training images classify right."""
    from lightly.utils.benchmarking import knn_predict

    features, database = embeddings(model, test[0]), embeddings(model, bank[0])
    found = knn_predict(features, database.T, bank[1], len(CLASSES), NEIGHBOURS, TEMPERATURE)[:, 0]
    return (found == test[1]).float().mean().item()


@torch.no_grad()
def zero_shot_accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """The share of test images whose nearest caption, "a photo of a ...", names their class."""
    tokens = tokenize([TEMPLATES[0].format(name) for name in CLASSES]).to(test[0].device)
    texts = F.normalize(model.text_projection(model.text_model(tokens).pooler_output))
    return ((embeddings(model, test[0]) @ texts.T).argmax(1) == test[1]).float().mean().item()


def table(folder: Path, bank: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> str:
    """What the encoders with weights in ``folder`` learned, as Markdown."""
    record = json.loads((folder / RECORD).read_text())
    lines = [
        "| encoder | parameters | epochs | seconds | kNN untrained | kNN trained | zero-shot |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in TRAINING if n in record):
        untrained = []
        for seed in range(3):
            torch.manual_seed(seed)
            untrained.append(knn_accuracy(build(name).to(test[0].device).eval(), bank, test))
        model = load(name, folder).to(test[0].device)
        size = sum(p.numel() for p in model.parameters())
        zero_shot = f"{zero_shot_accuracy(model, test):.3f}" if name == "clip" else "-"
        lines.append(
            f"| {name} | {size:,} | {record[name]['epochs']} | {record[name]['seconds']} | {np.mean(untrained):.3f}"
            f" | {knn_accuracy(model, bank, test):.3f} | {zero_shot} |"
        )
    return "\n".join(lines)


def machine(device: str) -> str:
    """The processor that trained."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used"


def readme(folder: Path, results: str) -> str:
    """The table with what is needed to make it again."""
    record = json.loads((folder / RECORD).read_text())
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "lightly", "timm", "transformers"))
    machines = "; ".join(sorted({entry["machine"] for entry in record.values()}))
    return f"""# Small contrastive encoders

Made by `CAPTUM_FAM_DATA=<data folder> python -m benchmarks.train_contrastive`. To load an encoder, call its
`load(name)`. Weights are float16 state dicts. Seed {SEED}. Measured with {packages}.
Trained on {machines}. Other work shared the machine, and the seconds depend on it.

{results}

Do not rank the training methods by these rows: each encoder was trained for few epochs, and each for another
number of them. All were trained on 10,000 CIFAR-10 images, 1,000 of each class.

* *kNN*: the accuracy on 2,000 test images. The {NEIGHBOURS} training images with the most similar embeddings (cosine)
  vote with weights (temperature {TEMPERATURE}). *Untrained* is the mean of three seeds.
* *Zero-shot*: the accuracy if the nearest of the ten captions "a photo of a ..." names the class. CLIP's captions for
  training are made of the class names, so CLIP is trained with the labels. The other encoders are not.

CIFAR-10 images are for research use. None are included.
"""


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(TRAINING)))
@click.option("--epochs", type=click.IntRange(1), help="Epochs of each training.  [default: its own number]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--evaluate", is_flag=True, help="Only measure the saved encoders.")
def main(names: tuple[str, ...], epochs: int | None, device: str, output: Path, evaluate: bool) -> None:
    """Trains the encoders NAMES (all by default) and measures all that are saved."""
    data = os.environ.get("CAPTUM_FAM_DATA")
    if data is None:
        raise click.UsageError("Set CAPTUM_FAM_DATA: the folder with photos/cifar10.zip.")
    archive = Path(data) / "photos" / "cifar10.zip"
    if not archive.exists():
        raise click.UsageError(f"There is no {archive}.")
    bank, test = (tuple(t.to(device) for t in read(archive, split)) for split in ("train", "test"))
    output.mkdir(parents=True, exist_ok=True)
    path = output / RECORD
    for name in () if evaluate else names or TRAINING:
        start = time.time()
        trained_for = epochs or TRAINING[name][0]
        model = train(name, *bank, trained_for)
        seconds = round(time.time() - start)
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        torch.save(state, output / f"{name}.pt")
        record = json.loads(path.read_text()) if path.exists() else {}
        record[name] = {"epochs": trained_for, "seconds": seconds, "machine": machine(device)}
        path.write_text(json.dumps(record, indent=1) + "\n")
    if not path.exists():
        raise click.UsageError(f"There are no trained encoders in {output}.")
    results = table(output, bank, test)
    (output / "README.md").write_text(readme(output, results))
    click.echo(results)


if __name__ == "__main__":
    main()
