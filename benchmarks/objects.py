"""
Pictures of objects from the folder of photos (CAPTUM_FAM_DATA): classes for captum_fam.scenes, and pairs of photos.

What each file is and its licence: README.md of that folder.
"""

import io
import json
import zipfile
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pictures = tuple[list[Image.Image], list[int]]
Pair = tuple[Image.Image, Image.Image, NDArray[np.bool_], NDArray[np.bool_], int]

WHOLE = 0.3  # of its box, what an object covers at least; below, it is mostly hidden or spread out
SHARE = (0.03, 0.5)  # of a photo, what the objects of the shared category cover


def coco_cutouts(folder: str | Path, min_side: int = 40) -> Pictures:
    """Objects of the COCO photos, cut out (RGBA), and their category ids; none with a shorter side below min_side."""
    photos, annotations = _coco(folder)
    pictures, labels = [], []
    for a in annotations:
        if a["iscrowd"] or min(a["bbox"][2:]) < min_side or a["area"] < WHOLE * a["bbox"][2] * a["bbox"][3]:
            continue
        photo = photos[a["image_id"]]
        mask = _mask([a], photo)
        cut = photo.copy()
        cut.putalpha(Image.fromarray(mask))
        pictures.append(cut.crop(Image.fromarray(mask).getbbox()))
        labels.append(a["category_id"])
    return pictures, labels


def coco_pairs(folder: str | Path) -> list[Pair]:
    """
    Pairs of COCO photos that share a category: two photos, the masks (H, W) of its objects in each, and its id.

    Its objects cover 3 to 50 % of each photo, and none is a crowd, which has no outline. A pair of photos that shares
    several such categories is listed with the one that fewest photos have.
    """
    photos, annotations = _coco(folder)
    found = defaultdict(list)
    for a in annotations:
        found[a["category_id"], a["image_id"]].append(a)
    masks: dict[int, dict[int, NDArray[np.bool_]]] = defaultdict(dict)
    for (category, number), members in sorted(found.items()):
        mask = _mask(members, photos[number]) > 0 if not any(a["iscrowd"] for a in members) else np.zeros((1, 1), bool)
        if SHARE[0] <= mask.mean() <= SHARE[1]:
            masks[category][number] = mask
    pairs: dict[tuple[int, int], Pair] = {}
    for category, of in sorted(masks.items(), key=lambda item: (len(item[1]), item[0])):
        for a, b in combinations(of, 2):
            pairs.setdefault((a, b), (photos[a], photos[b], of[a], of[b], category))
    return [pairs[key] for key in sorted(pairs)]


def clothing(folder: str | Path, split: str = "test", per_class: int | None = None) -> Pictures:
    """Photos of clothing in 10 classes, numbered by name, of the train, validation or test split."""
    return _zipped(folder, "clothing.zip", f"{split}/", per_class)


def cifar10(folder: str | Path, split: str = "test", per_class: int | None = None) -> Pictures:
    """Images of CIFAR-10, classes numbered by name, of the train or test split."""
    return _zipped(folder, "cifar10.zip", f"{split}/", per_class)


def omniglot(folder: str | Path) -> Pictures:
    """Drawings of Omniglot, strokes black on white, and the number of the alphabet's character."""
    return _zipped(folder, "omniglot_small1.zip", "images_background_small1/", None)


def _zipped(folder: str | Path, name: str, prefix: str, per_class: int | None) -> Pictures:
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
        kept = [(n, label) for label, members in enumerate(classes.values()) for n in members[:per_class]]
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
