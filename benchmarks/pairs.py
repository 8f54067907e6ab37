"""The pairs of images of the study: scenes that share an object, and photos with masks."""

import json
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import objects, study
from captum_fam.scenes import Scenes, removal_effects, shared_object_scenes

REFEREES = ("mobilenet_v2_imagenet", "mobilenet_v1_100_imagenet")
REFEREE_SIZE = 224
CHUNK = 64  # hard scenes of one seed


@dataclass
class Pairs:
    """
    Images, what they are compared with, and where the explanation lies: (N, 1, H, W), bool.

    ``other`` (N,) numbers for each image the reference of another pair that shares as little as can be with it, and
    never the class of the shared object: a control.
    """

    images: Tensor
    references: Tensor
    masks: Tensor
    other: Tensor
    scenes: Scenes | None = None


@cache
def pictures(data: Path, name: str, half: int) -> objects.Pictures:
    """Half of the pictures: COCO by photo, the others by every second picture of each class."""
    if name == "coco":
        return objects.coco_cutouts(data, half=half)
    images, labels = {"clothing": objects.clothing, "cifar": objects.cifar10, "omniglot": objects.omniglot}[name](data)
    seen: dict[int, int] = {}
    chosen = []
    for number, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        if seen[label] % 2 == half:
            chosen.append(number)
    return [images[i] for i in chosen], [labels[i] for i in chosen]


def used(effects: Tensor) -> Tensor:
    """Whether the shared object makes the similarity, (N,), from removal_effects; ties, as of a dead one, do not."""
    return effects[:, 0] > effects[:, 1:].amax(1) + 1e-6


def scenes_of(data: Path, name: str, size: int, half: int, count: int, difficulty: str, chunk: int = 0) -> Scenes:
    """Scenes of one half; a scene of another size is the same scene, as its pictures and cells come from the seed."""
    seed = 10 * half + (difficulty == "hard") + 100 * chunk
    return shared_object_scenes(*pictures(data, name, half), count, size=size, difficulty=difficulty, seed=seed)


def solvable(data: Path, half: int, count: int, folder: Path) -> list[tuple[int, int]]:
    """Chunk and number of the first hard COCO scenes that all referees use; what is found is kept in the folder."""
    key = {"referees": [*REFEREES], "half": half, "size": REFEREE_SIZE, "chunk": CHUNK}
    path = folder / f"solvable-{half}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("key") != key:
        found = {"key": key, "drawn": 0, "kept": []}
    referees = [study.encoder(name, data) for name in REFEREES] if len(found["kept"]) < count else []
    while len(found["kept"]) < count:
        chunk = found["drawn"] // CHUNK
        drawn, numbers = scenes_of(data, "coco", REFEREE_SIZE, half, CHUNK, "hard", chunk), torch.arange(CHUNK)
        for referee in referees:
            if len(numbers):
                numbers = numbers[used(removal_effects(referee.fast, drawn[numbers]))]
        found["drawn"] += CHUNK
        found["kept"] += [(chunk, number) for number in numbers.tolist()]
        path.with_suffix(".part").write_text(json.dumps(found))
        path.with_suffix(".part").replace(path)
    return [(chunk, number) for chunk, number in found["kept"][:count]]


def chosen_scenes(data: Path, size: int, half: int, chosen: Sequence[tuple[int, int]]) -> Scenes:
    """Hard COCO scenes by chunk and number."""
    parts = []
    for chunk in sorted({chunk for chunk, _ in chosen}):
        numbers = torch.tensor([number for c, number in chosen if c == chunk])
        parts.append(scenes_of(data, "coco", size, half, int(numbers.max()) + 1, "hard", chunk)[numbers])
    return Scenes(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scenes)))


@cache
def pairs(data: Path, source: str, name: str, size: int, half: int, count: int, folder: Path | None = None) -> Pairs:
    """
    Pairs of one half, of a source: "medium" or "hard, all" scenes, "hard" ones that the referees use, or "photos".

    Which hard scenes these are is kept in the folder.
    """
    if source == "photos":
        return _photos(data, size, half, count)
    if source == "hard":
        if name != "coco" or folder is None:
            raise ValueError(f"Expected `name` 'coco' and a `folder` for hard scenes, but got {name!r} and {folder}.")
        scenes = chosen_scenes(data, size, half, solvable(data, half, count, folder))
    else:
        scenes = scenes_of(data, name, size, half, count, source.split(",")[0])
    others = _least_alike(
        [set(row) for row in scenes.labels.tolist()],
        [set(row) for row in scenes.reference_labels.tolist()],
        [{label} for label in scenes.labels[:, 0].tolist()],
    )
    return Pairs(scenes.images, scenes.references, scenes.masks, others, scenes)


def _photos(data: Path, size: int, half: int, count: int) -> Pairs:
    """Each photo is explained once, with a reference for its rarest category: most pairs share a person."""
    found = objects.coco_pairs(data, half)
    frequency = Counter(c for pair in found for c in pair.categories[0] & pair.categories[1])
    rarest = [min(frequency[c] for c in pair.categories[0] & pair.categories[1]) for pair in found]
    chosen: dict[int, objects.Pair] = {}
    for number in sorted(np.random.default_rng(0).permutation(len(found)), key=lambda n: rarest[n]):
        chosen.setdefault(found[number].numbers[0], found[number])
    kept = list(chosen.values())[:count]
    one, other = ([pair.categories[i] for pair in kept] for i in range(2))
    images, references, masks = (
        torch.stack([_square(picture, size) for picture in column])
        for column in ([p.photos[0] for p in kept], [p.photos[1] for p in kept], [p.masks[0] for p in kept])
    )
    return Pairs(images, references, masks > 0.5, _least_alike(one, other, [a & b for a, b in zip(one, other)]))


def _least_alike(
    classes: Sequence[AbstractSet[int]], references: Sequence[AbstractSet[int]], shared: Sequence[AbstractSet[int]]
) -> Tensor:
    """For each image the number of a reference with none of the shared classes, if there is one, and few others."""
    n = len(classes)
    order = [[(i + step) % n for step in range(1, n)] for i in range(n)]
    cost = [
        [100 * len(shared[i] & references[j]) + len(classes[i] & references[j]) for j in row]
        for i, row in enumerate(order)
    ]
    return torch.tensor([row[int(np.argmin(c))] for row, c in zip(order, cost)])


def _square(image: Any, size: int) -> Tensor:
    """A photo or mask at a square size, (C, size, size) in [0, 1]."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.uint8(image) * 255)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1)
