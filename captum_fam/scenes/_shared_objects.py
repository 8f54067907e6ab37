"""Scenes that share one object, made of cut-out pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageStat
from torch import Tensor

from captum_fam._checks import (
    check_labels,
    check_positive,
    describe,
    did_you_mean,
)

_DIFFICULTIES = ("easy", "medium", "hard")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # those that Pillow converts to eight bits without clipping
_SMALLEST = 0.75  # the smallest longer side of an object, as a share of the cell
_MARGIN = 32  # a cell leaves 1 / 32 of its side free on each side
_LEAST_CELL = 8  # pixels
_DEGREES, _STOPS = 20.0, 0.5  # a view is turned by up to 20 degrees, its gamma is 2 to a power of up to 0.5
_MEANS, _STDS = (0.35, 0.65), (0.1, 0.2)  # of a palette: seldom clipped to [0, 1]
_FLAT = 1 / 255  # a standard deviation below one grey level is no texture


@dataclass(frozen=True, repr=False, eq=False)
class Scenes:
    r"""
    Which scenes share which object, and where? N pairs of scenes with n objects each; one object is
    in both. Made by :func:`shared_object_scenes`.

    Attributes:
        images (Tensor): Scenes to explain, (N, 3, size, size), float32 in [0, 1].
        references (Tensor): The scenes that they are compared with, in the same form.
        objects (Tensor): The object at each pixel of ``images``, (N, size, size), uint8: 0 is the
                    background, 1 the shared object, 2 ... n are the distractors.
        reference_objects (Tensor): The same for ``references``.
        labels (Tensor): Classes of the objects 1 ... n of ``images``, (N, n), int64; column 0 is
                    the shared object's.
        reference_labels (Tensor): The same for ``references``.
        backgrounds (Tensor): The plain colour behind the objects of both scenes, (N, 3), float32.

    Examples::

        >>> import numpy as np
        >>> from PIL import Image
        >>> from captum_fam.scenes import shared_object_scenes
        >>> noise = np.random.default_rng(0).integers(0, 256, (14, 24, 24, 3), dtype=np.uint8)
        >>> pictures, labels = [Image.fromarray(a) for a in noise], [i // 2 for i in range(14)]
        >>> scenes = shared_object_scenes(pictures, labels, n_pairs=3, size=64)
        >>> scenes[1:]
        Scenes(images=(2, 3, 64, 64), n_objects=4)
        >>> scenes.masks.shape
        torch.Size([3, 1, 64, 64])
    """

    images: Tensor
    references: Tensor
    objects: Tensor
    reference_objects: Tensor
    labels: Tensor
    reference_labels: Tensor
    backgrounds: Tensor

    def __repr__(self) -> str:
        return f"Scenes(images={tuple(self.images.shape)}, n_objects={self.labels.shape[1]})"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> "Scenes":
        """Some of the pairs, possibly none: by a slice, a tensor of numbers (M,) or a tensor of bools (N,)."""
        if not isinstance(index, slice) and not (isinstance(index, Tensor) and index.ndim == 1):
            raise TypeError(
                f"Expected `index` to be a slice or a tensor of numbers (M,), but got {describe(index)};"
                " one pair is scenes[i : i + 1]."
            )
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def masks(self) -> Tensor:
        """Where the shared object is in ``images``: (N, 1, size, size), bool."""
        return self.objects[:, None] == 1

    @property
    def reference_masks(self) -> Tensor:
        """Where the shared object is in ``references``: (N, 1, size, size), bool."""
        return self.reference_objects[:, None] == 1

    def swapped(self) -> "Scenes":
        """The same pairs with images and references exchanged."""
        return Scenes(
            self.references,
            self.images,
            self.reference_objects,
            self.objects,
            self.reference_labels,
            self.labels,
            self.backgrounds,
        )

    def without(self, index: int) -> Tensor:
        r"""
        What do the images look like without one object? It is painted over with the background;
        objects have hard edges, so nothing of it stays.

        Args:
            index (int): Number of the object, 1 ... n; 1 is the shared one.

        Returns:
            *Tensor*: images (N, 3, size, size), float32.

        Raises:
            TypeError, ValueError: there is no object of this number.
        """
        check_positive("index", index)
        if index > self.labels.shape[1]:
            raise ValueError(f"Expected `index` to number one of {self.labels.shape[1]} objects, but got {index}.")
        return torch.where(self.objects[:, None] == index, self.backgrounds[:, :, None, None], self.images)


def shared_object_scenes(
    pictures: Sequence[Image.Image],
    labels: Tensor | Sequence[int],
    n_pairs: int = 100,
    *,
    size: int = 224,
    n_objects: int = 4,
    difficulty: str = "hard",
    seed: int = 0,
) -> Scenes:
    r"""
    Does an explanation of a similarity find what two images share? Makes pairs of scenes that share
    one object among distractors, so the answer is known: that object, in both.

    All other objects of a pair have other classes, no two the same. Objects lie in random cells of
    a square grid, at a random place; their longer side is 75 to 100 % of the cell (less a margin).
    The shared object is never in the same cell of both scenes. What its two views have in common
    depends on ``difficulty``:

    ============  ==================================================================
    difficulty    the shared object in ``references``
    ============  ==================================================================
    ``"easy"``    the same picture at the same size, in its own colours
    ``"medium"``  the same picture mirrored, turned by up to 20 degrees, of another
                  random size and gamma (so are the distractors of ``references``)
    ``"hard"``    another picture of the same class, of another random size (every
                  object of both scenes is mirrored at random)
    ============  ==================================================================

    The background is the mean colour of the pictures, clipped to 0.35 to 0.65. All objects of
    ``"medium"`` and ``"hard"`` pairs have one palette: in each colour channel, the pixels of an
    object have the background's mean and the pictures' mean standard deviation (clipped to 0.1 to
    0.2), except for values clipped to [0, 1]. So mean colours tell neither which object is shared
    nor which scenes are a pair. A picture of one plain colour cannot be seen.

    The layout is ours. BAM (Yang, Kim, https://arxiv.org/abs/1907.09701) pastes objects into scenes
    as known truth for classifiers.

    Args:
        pictures (sequence of PIL.Image.Image): The pictures of the objects: RGB or grey (the whole
                    rectangle), or RGBA (the pixels with alpha of at least 128), eight bits.
        labels (Tensor or sequence of int): The class of each picture; at least
                    2 n_objects - 1 classes.
        n_pairs (int): Number of pairs N.
                    Default: 100
        size (int): Height and width of a scene.
                    Default: 224
        n_objects (int): Number n of objects in each scene, 2 to 255.
                    Default: 4
        difficulty (str): ``"easy"``, ``"medium"`` or ``"hard"``. ``"hard"`` needs a class with two
                    pictures.
                    Default: ``"hard"``
        seed (int): Seed of all random choices. Pair i depends on the seed and i, not on
                    ``n_pairs``.
                    Default: 0

    Returns:
        *Scenes*: the pairs, with the place and class of each object.

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> import numpy as np
        >>> from PIL import Image
        >>> from captum_fam.scenes import shared_object_scenes
        >>> noise = np.random.default_rng(0).integers(0, 256, (14, 24, 24, 3), dtype=np.uint8)
        >>> pictures, labels = [Image.fromarray(a) for a in noise], [i // 2 for i in range(14)]
        >>> scenes = shared_object_scenes(pictures, labels, n_pairs=2, size=64)
        >>> bool((scenes.labels[:, 0] == scenes.reference_labels[:, 0]).all())
        True
    """
    for name, value in (("n_pairs", n_pairs), ("size", size), ("n_objects", n_objects)):
        check_positive(name, value)
    if not 2 <= n_objects <= 255:
        raise ValueError(f"Expected `n_objects` to be 2 to 255, but got {n_objects}.")
    side = math.isqrt(n_objects - 1) + 1
    if size < _LEAST_CELL * side:
        raise ValueError(
            f"Expected `size` to be at least {_LEAST_CELL * side} for {n_objects} objects, but got {size}."
        )
    if difficulty not in _DIFFICULTIES:
        raise ValueError(
            f"Expected `difficulty` to be one of {list(_DIFFICULTIES)}, but got {describe(difficulty)}."
            + did_you_mean(difficulty, _DIFFICULTIES)
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"Expected `seed` to be an int, but got {describe(seed)}.")
    if seed < 0:
        raise ValueError(f"Expected `seed` to be 0 or more, but got {seed}.")
    _check_pictures(pictures)
    label = check_labels("labels", labels, len(pictures), "`pictures`", torch.device("cpu")).tolist()
    classes: dict[int, list[int]] = {c: [] for c in sorted(set(label))}
    for number, c in enumerate(label):
        classes[c].append(number)
    if len(classes) < 2 * n_objects - 1:
        raise ValueError(
            f"Expected `labels` of at least {2 * n_objects - 1} classes, so that two scenes of {n_objects} objects"
            f" share just one, but got {len(classes)}; pass pictures of more classes, or fewer n_objects: for n, there"
            " must be 2 n - 1."
        )
    shareable = [c for c, members in classes.items() if difficulty != "hard" or len(members) > 1]
    if not shareable:
        raise ValueError(
            "Expected `labels` with two pictures of a class, which a hard pair shares, but each class has one; pass"
            ' more pictures, or difficulty="medium".'
        )
    palette = _palette(pictures)
    pairs = [
        _pair(pictures, classes, shareable, palette, size, n_objects, difficulty, np.random.default_rng((seed, i)))
        for i in range(n_pairs)
    ]
    return Scenes(*(torch.stack(column) for column in zip(*pairs)))


def _check_pictures(pictures: object) -> None:
    if not isinstance(pictures, Sequence) or not pictures or not all(isinstance(p, Image.Image) for p in pictures):
        kinds = sorted({type(p).__name__ for p in pictures}) if isinstance(pictures, Sequence) else describe(pictures)
        raise TypeError(
            f"Expected `pictures` to be a sequence of PIL images, but got {kinds}; turn an array of uint8 (H, W, 3)"
            " into one with PIL.Image.fromarray."
        )
    for number, picture in enumerate(pictures):
        if picture.mode not in _MODES:
            raise ValueError(
                f"Expected `pictures` of the modes {list(_MODES)}, but pictures[{number}] has mode {picture.mode!r};"
                ' scale it to eight bits and pass picture.convert("RGB").'
            )
        if "A" in picture.getbands() and picture.getchannel("A").getextrema()[1] < 128:
            raise ValueError(f"`pictures`[{number}] shows no object: its alpha is below 128 everywhere.")


def _pair(
    pictures: Sequence[Image.Image],
    classes: dict[int, list[int]],
    shareable: list[int],
    palette: tuple[Tensor, Tensor],
    size: int,
    n: int,
    difficulty: str,
    rng: np.random.Generator,
) -> tuple[Tensor, ...]:
    """One pair, as the fields of Scenes without the first dimension."""
    shared = shareable[rng.integers(len(shareable))]
    others = rng.permutation([c for c in classes if c != shared])[: 2 * n - 2].tolist()
    labels = ([shared, *others[: n - 1]], [shared, *others[n - 1 :]])
    chosen = [[int(rng.choice(classes[c])) for c in scene] for scene in labels]
    if difficulty == "hard":
        chosen[0][0], chosen[1][0] = rng.choice(classes[shared], 2, replace=False).tolist()
    else:
        chosen[1][0] = chosen[0][0]

    side = math.isqrt(n - 1) + 1
    cell = size // side
    margin = cell // _MARGIN
    room = cell - 2 * margin
    cells = [rng.permutation(side**2)[:n] for _ in range(2)]
    while cells[0][0] == cells[1][0]:
        cells[1] = rng.permutation(side**2)[:n]
    lengths = np.rint(rng.uniform(_SMALLEST, 1, (2, n)) * room).astype(int)
    if difficulty == "easy":
        lengths[1, 0] = lengths[0, 0]

    objects = [
        [_view(pictures[p], int(length), difficulty, scene, rng) for p, length in zip(chosen[scene], lengths[scene])]
        for scene in range(2)
    ]
    if difficulty != "easy":
        for colours, mask in objects[0] + objects[1]:
            colours[:, mask] = _in_palette(colours[:, mask], *palette)

    images, places = [], []
    for scene in range(2):
        image = palette[0][:, None, None].repeat(1, size, size)
        place = torch.zeros(size, size, dtype=torch.uint8)
        for number, ((colours, mask), where) in enumerate(zip(objects[scene], cells[scene].tolist())):
            h, w = mask.shape
            top = where // side * cell + margin + int(rng.integers(room - h + 1))
            left = where % side * cell + margin + int(rng.integers(room - w + 1))
            image[:, top : top + h, left : left + w][:, mask] = colours[:, mask]
            place[top : top + h, left : left + w][mask] = number + 1
        images.append(image)
        places.append(place)
    return *images, *places, *(torch.tensor(scene) for scene in labels), palette[0]


def _view(
    picture: Image.Image, length: int, difficulty: str, scene: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Colours (3, h, w) in [0, 1] and mask (h, w) of an object, in the view of this difficulty and scene."""
    cut, gamma = _cut(picture), 1.0
    if difficulty == "medium" and scene == 1:
        angle, gamma = rng.uniform(-_DEGREES, _DEGREES), 2 ** rng.uniform(-_STOPS, _STOPS)
        cut = _cropped(ImageOps.mirror(cut).rotate(angle, Image.Resampling.BICUBIC, expand=True))
    elif difficulty == "hard" and rng.random() < 0.5:
        cut = ImageOps.mirror(cut)
    colours, mask = _scaled(cut, length)
    return colours**gamma, mask


def _cut(picture: Image.Image) -> Image.Image:
    """RGBA within the bounding box of the object, where alpha is 255."""
    cut = picture.convert("RGBA")
    cut.putalpha(cut.getchannel("A").point(lambda a: 255 if a >= 128 else 0))
    return _cropped(cut)


def _cropped(cut: Image.Image) -> Image.Image:
    """The part of a picture within the bounding box of alpha, from half its largest value on."""
    alpha = cut.getchannel("A")
    half = np.asarray(alpha).max() / 2
    return cut.crop(alpha.point(lambda a: 255 if a >= half else 0).getbbox())


def _scaled(cut: Image.Image, length: int) -> tuple[Tensor, Tensor]:
    """Colours (3, h, w) and mask (h, w) with the longer side at a length; of fine lines that fade, the core stays."""
    pixels = torch.from_numpy(np.array(cut, np.float32)).permute(2, 0, 1) / 255
    alpha = pixels[3:]
    pixels = torch.cat([pixels[:3] * alpha, alpha])  # so that hidden pixels do not colour the edges
    shape = [max(1, round(length * edge / max(cut.size))) for edge in (cut.height, cut.width)]
    pixels = F.interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0]
    alpha = pixels[3]
    mask = alpha >= alpha.max() / 2
    return torch.where(mask, pixels[:3] / alpha, 0).clamp(0, 1), mask


def _palette(pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """The mean over the pictures of their mean colour (3,) and of its standard deviation (3,)."""
    found = [ImageStat.Stat(cut.convert("RGB"), cut.getchannel("A")) for cut in map(_cut, pictures)]
    mean, std = (torch.tensor(values).mean(0) / 255 for values in ([f.mean for f in found], [f.stddev for f in found]))
    return mean.clamp(*_MEANS), std.clamp(*_STDS)


def _in_palette(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """An object's pixels (3, P), in [0, 1], moved to a mean (3,) and a standard deviation (3,)."""
    mean, std = mean[:, None].double(), std[:, None].double()
    z = pixels.double() - pixels.double().mean(1, keepdim=True)
    spread = z.std(1, correction=0, keepdim=True)
    z = torch.where(spread > _FLAT, z / spread, 0)
    gain, offset = std, mean
    for _ in range(16):  # clipping moves both: a few steps put them back
        x = (gain * z + offset).clamp(0, 1)
        gain = (gain * std / x.std(1, correction=0, keepdim=True)).clamp(max=2 * std)
        offset = offset + mean - x.mean(1, keepdim=True)
    return (gain * z + offset).clamp(0, 1).float()
