"""An encoder that was loaded by name, with its pictures, its layer and its text tower."""

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
    How do I use an encoder that was loaded by name? It has the model in eval mode, the layer to explain and the
    transform of its pictures; made by :func:`load_encoder`. It unpacks:
    ``encoder, layer, transform, mean, std = load_encoder("timm:resnet50")``.

    Attributes:
        model (torch.nn.Module): From images (B, 3, size, size) to embeddings (B, D).
        size (int): Height and width of the images in pixels.
        mean (sequence of float): The mean that images are normalised with, for the RGB channels in [0, 1].
        std (sequence of float): The standard deviation that images are normalised with, in the same form.
        resample (PIL.Image.Resampling): How Pillow resizes images, as the encoder's library does.
        name (str): The name that was loaded.

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
        How do I make an input of a picture? A function from a PIL image of any mode and size to a tensor
        (3, size, size) in the encoder's dtype, on the CPU, as on the command line: the whole image, upright. For
        anything else than a PIL image it raises a ``TypeError``.
        """
        return partial(
            _to_tensor, size=self.size, mean=self.mean, std=self.std, resample=self.resample, dtype=self.dtype
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the images that the encoder takes: that of its parameters."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def layer(self) -> nn.Module:
        """
        Which layer should be explained? The last module with a map that the embedding depends on, as on the command
        line. It is found on the first use; a ``ValueError`` says if there is none.
        """
        return self._named_layer[1]

    @property
    def layer_name(self) -> str:
        """The dotted name of ``layer`` in ``model``."""
        return self._named_layer[0]

    @cached_property
    def _named_layer(self) -> tuple[str, nn.Module]:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        noise = torch.rand(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(tuple(values)).view(3, 1, 1) for values in (self.mean, self.std))
        return find_layer(self.model, None, ((noise - mean) / std).to(device, self.dtype))

    def embed_text(self, sentences: Sequence[str]) -> Tensor:
        """
        How do I compare images with sentences? Makes embeddings of sentences, as the encoder's library does: references
        for images. The encoder needs a text tower: ``open_clip:NAME/PRETRAINED``, ``hf:PATH`` of a model such as CLIP
        or SigLIP, ``sentence-transformers:PATH`` of one for images and texts, or your own module with a method
        ``embed_text``.

        Args:
            sentences (list of str): N sentences.

        Returns:
            *Tensor*: embeddings (N, D), on the device and in the dtype of the encoder.

        Raises:
            TypeError: ``sentences`` is not a list of strings.
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
    A model of another library as an encoder, from (B, 3, H, W) to (B, D). Its modules keep their names, and its state
    dict gets no prefix.
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
    """The resampling of a library's name or number; bicubic if the library draws it at random."""
    if isinstance(interpolation, str):
        return Image.Resampling.__members__.get(interpolation.upper(), Image.Resampling.BICUBIC)
    return Image.Resampling.BILINEAR if interpolation is None else Image.Resampling(int(interpolation))


def pictures(
    name: str, process: Callable[[Image.Image], Any], settings: Mapping[str, Any], side: int | None
) -> dict[str, Any]:
    """
    The size, mean, std and resampling of the images that a processor of transformers makes. They are measured on a
    black, a white and a coloured image, because the names of the settings differ.

    Raises:
        ValueError: the processor fails, makes no images (1, 3, H, W), or does more than to scale each channel.
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
            f"{name} does more to images than scale them (it reorders channels, for one): write a factory whose module"
            " takes RGB images and does the rest"
        )
    timm = settings.get("data_config", {})  # of a model of timm that transformers saved
    return {
        "size": int(image.shape[2]),
        "mean": _as_written(mean, settings.get("image_mean", timm.get("mean"))),
        "std": _as_written(std, settings.get("image_std", timm.get("std"))),
        "resample": resampling(settings.get("resample", timm.get("interpolation"))),
    }


def _as_written(found: Tensor, written: Any) -> tuple[float, ...]:
    """The numbers of the settings, if they are those that were found up to rounding; else those."""
    values = [float(f"{f:.6g}") + 0.0 for f in found.tolist()]  # no -0.0
    numbers = tuple(written) if isinstance(written, (list, tuple)) and len(written) == 3 else values
    return tuple(w if math.isclose(w, f, rel_tol=1e-4, abs_tol=1e-6) else f for w, f in zip(numbers, values))
