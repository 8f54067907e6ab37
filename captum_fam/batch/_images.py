"""Pairs of the images in a folder: all of them, or each with its nearest neighbours."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob
from itertools import combinations, islice, permutations
from pathlib import Path, PurePath, PurePosixPath

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from captum_fam._files import store
from captum_fam.batch._pairs import LISTS
from captum_fam.engine.question import usable
from captum_fam.similarity import unit, widen

MOST = 10_000_000  # pairs that nobody has asked for by name
_ROWS = 256  # images that are compared with all others at once
_HEIC = (".heic", ".heif")  # Pillow opens them with a plugin; without it, an error should say so


def images_of(given: Sequence[Path | str], root: Path | str) -> list[str] | None:
    """
    The images of a folder, of a pattern or by name, as paths from the root or as addresses; None
    for a list of pairs.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(given) == 1 and _is_list(given[0]):
        return None
    for path in given:
        if Path(path).suffix.lower() in LISTS and len(given) > 1:
            raise ValueError(f"expected images, or one list of pairs alone, but got {path} among {len(given)} paths")
    files = [path for some in given for path in (_files(some) if isinstance(some, Path) else _in_store(some))]
    found = list(dict.fromkeys(_from(path, root) for path in files))
    if len(found) < 2:
        shown = " ".join(map(str, given[:3]))
        raise ValueError(
            f"a pair needs two images, but {shown} has {len(found) or 'none'}: pass a folder, a pattern or the paths of"
            " images, or a list of pairs that ends in .parquet or .csv"
        )
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name of {name} is no UTF-8: rename it") from None
    return found


def _is_list(path: Path | str) -> bool:
    if isinstance(path, str):
        return Path(path).suffix.lower() in LISTS
    return not path.is_dir() and not _is_pattern(path)


def _is_pattern(path: Path) -> bool:
    return any(c in str(path) for c in "*?[") and not path.exists()


def _files(path: Path) -> Sequence[Path]:
    """The images in a folder and its subfolders, the files that a pattern matches, or the path itself."""
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*"))
        return [path / file for file in _images(inside) if not (path / file).is_dir()]
    if _is_pattern(path):
        return [Path(file) for file in sorted(glob(str(path), recursive=True)) if not Path(file).is_dir()]
    return [path]


def _images(inside: Iterable[PurePath]) -> list[PurePath]:
    """The files of a folder whose names are those of images, and not hidden."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [
        file
        for file in sorted(inside)
        if file.suffix.lower() in readable.union(_HEIC) and not any(part.startswith(".") for part in file.parts)
    ]


def _in_store(address: str) -> list[str]:
    """The same in a store, where a name with an ending is a folder only if a slash follows."""
    is_pattern, is_folder = "*" in address, address.endswith("/") or not Path(address).suffix
    if not is_pattern and not is_folder:
        return [address]
    with store(address) as (system, name):
        found = system.glob(name, detail=True) if is_pattern else system.find(name, detail=True)
    stem = name.strip("/")
    if "::" in address or not address.rstrip("/").endswith(stem):  # an address is more than a start and a path
        raise ValueError(f"cannot look for the images in {address}: write their addresses in a list of pairs")
    files = sorted(file for file, about in found.items() if about["type"] == "file")
    if not is_pattern:
        inside: dict[PurePath, str] = {PurePosixPath(file.removeprefix(name).lstrip("/")): file for file in files}
        files = [inside[file] for file in _images(inside)]
    return [address[: address.rfind(stem)] + file.lstrip("/") for file in files]


def _from(path: Path | str, root: Path | str) -> str:
    if isinstance(path, str) or isinstance(root, str):
        return path if isinstance(path, str) else str(path.absolute())
    path, root = path.absolute(), root.absolute()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def all_pairs(images: Sequence[str], once: bool) -> Iterator[pa.Table]:
    """
    Pairs each image with each other, in both orders, or ``once`` if a row is about both sides.

    Raises:
        ValueError: there are too many pairs.
    """
    count = len(images) * (len(images) - 1) // (2 if once else 1)
    if count > MOST:
        raise ValueError(
            f"{len(images):,} images make {count:,} pairs: pass --neighbours K for each image with the K that are"
            f" nearest to it, or a list of pairs; at most {MOST:,} are made without one"
        )
    return _tables((combinations if once else permutations)(images, 2))


def nearest(
    images: Sequence[str], embeddings: Mapping[str | int, Tensor], similarity: str, neighbours: int
) -> Iterator[pa.Table]:
    """
    Pairs each image with the others that are most similar to it, best first. An image that cannot
    be read, or whose embedding is zero or not finite, is paired with itself: so it has a row, with
    its error.
    """
    known = [path for path in images if path in embeddings and bool(usable(widen(embeddings[path])))]
    found: dict[str, list[int]] = {}
    if len(known) > 1:
        z = widen(torch.stack([embeddings[path] for path in known]))
        z = unit(z) if similarity == "cosine" else z
        for rows in torch.arange(len(known)).split(_ROWS):
            if similarity == "euclidean":  # by differences, because products would lose those of near embeddings
                scores = -torch.cdist(z[rows], z, compute_mode="donot_use_mm_for_euclid_dist")
            else:
                scores = z[rows] @ z.T
            scores[torch.arange(len(rows)), rows] = -torch.inf
            best = scores.topk(min(neighbours, len(known) - 1)).indices
            found |= {known[row]: hits for row, hits in zip(rows.tolist(), best.tolist())}
    return _tables(
        (path, other) for path in images for other in ([known[hit] for hit in found[path]] if path in found else [path])
    )


def _tables(pairs: Iterable[tuple[str, str]]) -> Iterator[pa.Table]:
    pairs = iter(pairs)
    while some := list(islice(pairs, 2**14)):
        queries, references = zip(*some)
        yield pa.table({"query": pa.array(queries, pa.string()), "reference": pa.array(references, pa.string())})
