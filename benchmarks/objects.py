"""
Pictures of objects from the folder of photos (CAPTUM_FAM_DATA): classes for captum_fam.scenes, and pairs of photos.

What each file is and its licence: README.md of that folder.
"""

import io
import json
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pictures = tuple[list[Image.Image], list[int]]

LEAST_SIDE = 40  # of the box of an object, in pixels
WHOLE = 0.3  # of its box, what an object covers at least; below, it is mostly hidden or spread out
SHARE = (0.03, 0.5)  # of a photo, what the objects of the shared category cover


def coco_cutouts(folder: str | Path, half: int | None = None) -> Pictures:
    """
    Objects of the COCO photos, cut out (RGBA), and their category ids; one of each category in a photo.

    Args:
        folder: of the data.
        half: 0 or 1, for the photos with even or odd numbers alone.
    """
    photos, annotations = _coco(folder)
    found: dict[tuple[int, int], Image.Image] = {}
    for a in sorted(annotations, key=lambda a: -a["area"]):
        if a["iscrowd"] or min(a["bbox"][2:]) < LEAST_SIDE or a["area"] < WHOLE * a["bbox"][2] * a["bbox"][3]:
            continue
        if half is not None and a["image_id"] % 2 != half:
            continue
        photo = photos[a["image_id"]]
        mask = Image.fromarray(_mask([a], photo))
        cut = photo.copy()
        cut.putalpha(mask)
        found.setdefault((a["category_id"], a["image_id"]), cut.crop(mask.getbbox()))
    keys = sorted(found)
    return [found[key] for key in keys], [category for category, _ in keys]


@dataclass(frozen=True)
class Pair:
    """Two photos that share categories, the masks (H, W) of all objects of these, and all categories of each."""

    numbers: tuple[int, int]
    photos: tuple[Image.Image, Image.Image]
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    categories: tuple[frozenset[int], frozenset[int]]


def coco_pairs(folder: str | Path, half: int | None = None) -> list[Pair]:
    """
    Ordered pairs of COCO photos, both of one half (photos with even or odd numbers), that share a category.

    The objects of the categories that they share cover 3 to 50 % of each photo, and none is a crowd, which has no
    outline.
    """
    photos, annotations = _coco(folder)
    of: dict[int, list[Any]] = {number: [] for number in photos if half is None or number % 2 == half}
    for a in annotations:
        if a["image_id"] in of:
            of[a["image_id"]].append(a)
    categories = {number: frozenset(a["category_id"] for a in members) for number, members in of.items()}
    pairs = []
    for numbers in permutations(of, 2):
        shared = categories[numbers[0]] & categories[numbers[1]]
        objects = [[a for a in of[n] if a["category_id"] in shared] for n in numbers]
        if not shared or any(a["iscrowd"] for members in objects for a in members):
            continue
        one, other = (_mask(members, photos[n]) > 0 for members, n in zip(objects, numbers))
        if all(SHARE[0] <= mask.mean() <= SHARE[1] for mask in (one, other)):
            a, b = numbers
            pairs.append(Pair((a, b), (photos[a], photos[b]), (one, other), (categories[a], categories[b])))
    return pairs


def clothing(folder: str | Path) -> Pictures:
    """Photos of clothing in 10 classes, numbered by name, of the test split."""
    return _zipped(folder, "clothing.zip", "test/")


def cifar10(folder: str | Path) -> Pictures:
    """Images of CIFAR-10, classes numbered by name, of the test split."""
    return _zipped(folder, "cifar10.zip", "test/")


def omniglot(folder: str | Path) -> Pictures:
    """Drawings of Omniglot, strokes black on white, and the number of the alphabet's character."""
    return _zipped(folder, "omniglot_small1.zip", "images_background_small1/")


def _zipped(folder: str | Path, name: str, prefix: str) -> Pictures:
    """The images below a folder of a zip file, in order of name, and the numbers of the folders that they are in."""
    with zipfile.ZipFile(_file(folder, name)) as zipped:
        files = [n for n in sorted(zipped.namelist()) if n.startswith(prefix) and not n.endswith("/")]
        if not files:
            raise ValueError(
                f"there is no {prefix} in {name}: it has {sorted({n.split('/')[0] for n in zipped.namelist()})}"
            )
        classes = defaultdict(list)
        for n in files:
            classes[n.rpartition("/")[0]].append(n)
        kept = [(n, label) for label, members in enumerate(classes.values()) for n in members]
        return [Image.open(io.BytesIO(zipped.read(n))).convert("RGB") for n, _ in kept], [label for _, label in kept]


def _coco(folder: str | Path) -> tuple[dict[int, Image.Image], list[Any]]:
    """The photos by their number, and the annotations in order of their id."""
    content = json.loads(_file(folder, "coco/instances.json").read_text())
    photos = {}
    for image in content["images"]:
        with Image.open(_file(folder, f"coco/{image['file_name']}")) as photo:
            photos[image["id"]] = photo.convert("RGB")
    return photos, sorted(content["annotations"], key=lambda a: a["id"])


def _mask(annotations: list[Any], photo: Image.Image) -> NDArray[np.uint8]:
    """255 inside the polygons of the annotations, (H, W)."""
    mask = Image.new("L", photo.size)
    for annotation in annotations:
        for polygon in annotation["segmentation"]:
            ImageDraw.Draw(mask).polygon(polygon, fill=255)
    return np.asarray(mask)


def _file(folder: str | Path, name: str) -> Path:
    path = Path(folder) / "photos" / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: pass the folder of photos that CAPTUM_FAM_DATA names")
    return path
