"""What is loaded by name: an encoder, the pictures that it takes, its layer and its text tower."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from captum_fam.encoders._layer import find_layer
from captum_fam.encoders._loading import one_line
from captum_fam.images import as_rgb, to_tensor

IMAGENET_SIZE, IMAGENET_MEAN, IMAGENET_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadedEncoder:
    """
    An encoder in eval mode, the layer to explain and the pictures that it was trained on, from :func:`load_encoder`.
    It can be taken apart: ``encoder, layer, transform, mean, std = load_encoder("timm:resnet50")``.

    Attributes:
        model: from images (B, 3, size, size) to embeddings (B, D).
        size: of the images, in pixels.
        mean: of their RGB channels in [0, 1].
        std: the same.
        resample: how Pillow resizes them, as the encoder's library does.
        name: what was loaded.

    Examples::

        >>> from captum_fam.demo import photographs
        >>> from captum_fam.encoders import load_encoder
        >>> loaded = load_encoder("bundled")
        >>> loaded.size, loaded.model.training, loaded.layer_name
        (160, False, 'features')
        >>> encoder, layer, transform, mean, std = loaded
        >>> encoder(transform(photographs()["cat"])[None]).shape
        torch.Size([1, 512])
    """

    model: nn.Module
    size: int = IMAGENET_SIZE
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    resample: Image.Resampling = Image.Resampling.BILINEAR
    name: str = "the encoder"

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """
        From a PIL image of any mode and size, the whole of it, upright, to a tensor (3, size, size) of the encoder's
        dtype, on the CPU: as the command line makes it. A ``TypeError`` says that something else came.
        """
        return partial(
            _to_tensor, size=self.size, mean=self.mean, std=self.std, resample=self.resample, dtype=self.dtype
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the images that the encoder takes, that of its parameters."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def layer(self) -> nn.Module:
        """
        The module that is explained without a name, found as the command line does, when it is first asked for. A
        ``ValueError`` says that there is none.
        """
        return self._named_layer[1]

    @property
    def layer_name(self) -> str:
        """Its dotted name in ``model``."""
        return self._named_layer[0]

    @cached_property
    def _named_layer(self) -> tuple[str, nn.Module]:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        noise = torch.rand(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(tuple(values)).view(3, 1, 1) for values in (self.mean, self.std))
        return find_layer(self.model, None, ((noise - mean) / std).to(device, self.dtype))

    def embed_text(self, sentences: Sequence[str]) -> Tensor:
        """
        Embeddings (N, D) of sentences, as the encoder's library makes them, on the device and in the dtype of the
        encoder: references beside those of images. For encoders with a text tower: ``open_clip:NAME/PRETRAINED``,
        ``hf:PATH`` of a model such as CLIP or SigLIP, ``sentence-transformers:PATH`` of one that takes images and
        texts, or a module of your own with a method ``embed_text``.

        Raises:
            TypeError: sentences are no list of strings.
            ValueError: the encoder has no text tower, the list is empty, or the tower fails.
        """
        if isinstance(sentences, str) or not all(isinstance(sentence, str) for sentence in sentences):
            came = "a string" if isinstance(sentences, str) else "a list with other things"
            raise TypeError(f'sentences must be a list of strings, got {came}: pass one such as ["a red shoe"]')
        if not sentences:
            raise ValueError('sentences is empty: pass a list such as ["a red shoe"]')
        embed: Callable[[list[str]], Any] | None = getattr(self.model, "embed_text", None)
        if embed is None:
            raise ValueError(
                f"{self.name} has no text tower: open_clip:NAME/PRETRAINED, hf:PATH of a model such as CLIP or SigLIP"
                " and sentence-transformers:PATH of images and texts have one, or a module with a method embed_text"
            )
        with torch.no_grad():
            z = embed(list(sentences))
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(sentences):
            raise ValueError(
                f"{self.name} gives no embeddings (N, D) of sentences but"
                f" {tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__}: pass an encoder that does"
            )
        return z

    def __iter__(self) -> Iterator[Any]:
        """``encoder, layer, transform, mean, std``"""
        return iter((self.model, self.layer, self.transform, self.mean, self.std))


class SameModules(nn.Module):
    """
    A model of another library as an encoder, (B, 3, H, W) to (B, D): its modules keep their names, and state dicts get
    no prefix.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # Not a submodule but the same module in another form; in a tuple, or it would become one.
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self._model: Any = (model.eval(),)
        self.eval()

    @property
    def model(self) -> Any:
        return self._model[0]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _to_tensor(
    image: Image.Image,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: Image.Resampling,
    dtype: torch.dtype,
) -> Tensor:
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got {type(image).__name__}: PIL.Image.open(path) gives one")
    return to_tensor(as_rgb(ImageOps.exif_transpose(image)), size, mean, std, resample).to(dtype)


def resampling(interpolation: Any) -> Image.Resampling:
    """Of a library's name or number; what it draws at random is bicubic."""
    if isinstance(interpolation, str):
        return Image.Resampling.__members__.get(interpolation.upper(), Image.Resampling.BICUBIC)
    return Image.Resampling.BILINEAR if interpolation is None else Image.Resampling(int(interpolation))


def pictures(
    name: str, process: Callable[[Image.Image], Any], settings: Mapping[str, Any], side: int | None
) -> dict[str, Any]:
    """
    The size, mean, std and resampling of the images that a processor of transformers makes: asked for black, white and
    a colour, whatever its settings are called.

    Raises:
        ValueError: it fails, makes no images (1, 3, H, W), or more of them than a mean and a standard deviation for
            each channel do.
    """
    colour = (40, 120, 220)
    made = []
    for rgb in ((0, 0, 0), (255, 255, 255), colour):
        try:
            image = process(Image.new("RGB", (side or IMAGENET_SIZE,) * 2, rgb))
        except Exception as error:  # of any of three libraries
            raise ValueError(f"{name} cannot read an image ({one_line(error)}): pass a model that does") from error
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[:2] != (1, 3):
            raise ValueError(f"{name} takes no images (B, 3, H, W): write a factory that returns a module that does")
        made.append(image[0, :, image.shape[2] // 2, image.shape[3] // 2].double())
    black, white, seen = made
    std = 1 / (white - black)
    mean = -black * std
    if not torch.allclose((torch.tensor(colour) / 255 - mean) / std, seen, atol=0.02):
        raise ValueError(
            f"{name} has images that are more than scaled (of other channels than RGB, for one): write a factory whose"
            " module takes RGB images and does it"
        )
    timm = settings.get("data_config", {})  # of a model of timm that transformers saved
    return {
        "size": int(image.shape[2]),
        "mean": _as_written(mean, settings.get("image_mean", timm.get("mean"))),
        "std": _as_written(std, settings.get("image_std", timm.get("std"))),
        "resample": resampling(settings.get("resample", timm.get("interpolation"))),
    }


def _as_written(found: Tensor, written: Any) -> tuple[float, ...]:
    """The numbers of the settings where they are those that were found, which are rounded."""
    values = [float(f"{f:.6g}") + 0.0 for f in found.tolist()]  # no -0.0
    numbers = tuple(written) if isinstance(written, (list, tuple)) and len(written) == 3 else values
    return tuple(w if math.isclose(w, f, rel_tol=1e-4, abs_tol=1e-6) else f for w, f in zip(numbers, values))
