"""Layouts of vision transformers: tokens and channels-last maps as (B, C, h, w)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Tokens before the patches: a class token (and one for distillation), four registers, or both.
_PREFIXES = (0, 1, 2, 4, 5)


def patch_tokens(height: int, width: int) -> Callable[[Tensor], Tensor]:
    r"""
    How do the tokens of a vision transformer lie on the image? A ``reshape_transform`` for them: the last height ·
    width tokens are the patches, row by row; those before them (class token, registers) are left out.

    You seldom need it. Without a ``reshape_transform``, the attribution methods find the grid themselves for the vision
    transformers of timm, torchvision, transformers and open_clip that they know, and wherever the shape fits one grid
    and the encoder confirms it.

    Args:
        height (int): Patches in a column: the image's height / the patch size.
        width (int): Patches in a row.

    Returns:
        *Callable*: a function from activations (B, N, C) with N ≥ height · width to
        (B, C, height, width).

    Raises:
        ValueError: height or width is not positive, or (of the function) the activations do
                    not have that form.

    Examples::

        >>> patch_tokens(14, 14)(torch.rand(2, 1 + 4 + 14 * 14, 384)).shape
        torch.Size([2, 384, 14, 14])
    """
    if height < 1 or width < 1:
        raise ValueError(f"Expected `height` and `width` to be positive, but got {height} and {width}.")

    def reshape_transform(activation: Tensor) -> Tensor:
        if activation.ndim != 3 or activation.shape[1] < height * width:
            raise ValueError(
                f"Expected tokens (B, N, C) with N of at least {height} · {width} = {height * width}, but got"
                f" activations of shape {tuple(activation.shape)}; pass the height and width of this layer's grid."
            )
        patches: Tensor = activation[:, -height * width :].mT.unflatten(2, (height, width))
        return patches

    return reshape_transform


def channels_last(activation: Tensor) -> Tensor:
    r"""
    How do maps with their channels last, as in Swin Transformers, lie on the image? A ``reshape_transform`` for them.

    Args:
        activation (Tensor): Activations (B, \*spatial, C).

    Returns:
        *Tensor*: (B, C, \*spatial), a view of the activations.

    Examples::

        >>> channels_last(torch.rand(2, 7, 7, 768)).shape
        torch.Size([2, 768, 7, 7])
    """
    return activation.movedim(-1, 1)


@dataclass(frozen=True)
class Patches:
    """
    How the tokens (B, N, C) of a vision transformer lie, as the model declares it: ``prefix`` other tokens come first,
    then the patches, row by row.
    """

    prefix: int
    height: int  # of a patch, in pixels
    width: int

    def grid(self, activation: Tensor, images: Tensor) -> tuple[int, int] | None:
        """The grid of the patches on these images; None if the activation has other tokens."""
        if images.ndim != 4 or activation.ndim != 3:
            return None
        h, w = images.shape[2] // self.height, images.shape[3] // self.width
        return (h, w) if h * w > 1 and activation.shape[1] == self.prefix + h * w else None


# Tokens before the patches in models of transformers, by their config's model_type.
_PREFIX_OF_TYPE = {
    "beit": 1,
    "clip_vision_model": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "ijepa": 0,
    "siglip_vision_model": 0,
    "vit": 1,
}
# Classes of timm that put ``num_prefix_tokens`` before their patches.
_OF_TIMM = ("Beit", "Eva", "VisionTransformer", "VisionTransformerDistilled")


def patches_of(model: nn.Module) -> Patches | None:
    """What a vision transformer of timm, torchvision, transformers or open_clip declares about its tokens."""
    package, name = type(model).__module__, type(model).__name__
    size: Any = None
    prefix: Any = 1
    if package.startswith("timm.models.") and name in _OF_TIMM:
        prefix, size = model.num_prefix_tokens, getattr(model.patch_embed, "patch_size", None)
    elif package == "torchvision.models.vision_transformer" and name == "VisionTransformer":
        size = model.patch_size
    elif package == "open_clip.transformer" and name == "VisionTransformer":
        size = model.patch_size if getattr(model.transformer, "batch_first", False) else None
    elif package.startswith("transformers.models."):
        config: Any = getattr(model, "config", None)
        known = _PREFIX_OF_TYPE.get(getattr(config, "model_type", ""))
        if known is not None:
            prefix, size = known + getattr(config, "num_register_tokens", 0), config.patch_size
    if isinstance(size, int):
        size = (size, size)
    return Patches(int(prefix), *map(int, size)) if isinstance(size, (tuple, list)) and len(size) == 2 else None


def to_map(activation: Tensor, inputs: Tensor, dimensions: int | None = None) -> Tensor | None:
    """
    Activations as (B, C, *spatial), as their shape and that of the inputs suggest, or None where
    these fit several layouts.

    For images (B, channels, H, W), a grid is (H / p, W / p) for a whole patch size p. ``dimensions`` of the
    embedding tell channels from places where both fit.
    """
    shape = activation.shape
    if inputs.ndim != 4:
        # For other inputs no grid is known. Fewer dimensions, or the embedding's as the last, suggest tokens.
        tokens = activation.ndim < inputs.ndim or (shape[-1] == dimensions and dimensions not in shape[2:-1])
        return activation if activation.ndim < 3 or shape[1] == dimensions or not tokens else None
    size = (inputs.shape[2], inputs.shape[3])
    if activation.ndim == 4:
        first, last = may_be_map((shape[2], shape[3]), size), _is_grid((shape[1], shape[2]), size)
        if first and last and not _has_one_stride((shape[2], shape[3]), size):
            # On a square image, two strides are far less likely than a number of channels that divides its side.
            return channels_last(activation) if size[0] == size[1] and shape[1] != dimensions else None
        if shape[-1] == dimensions != shape[1]:  # suggests channels last, but does not prove it
            return channels_last(activation) if last and not first else activation if first and not last else None
        if shape[1] == dimensions or first:
            return None if last and not first else activation
        if last:
            return channels_last(activation)
        return None if _has_one_stride((shape[1], shape[2]), size) else activation
    if activation.ndim == 3 and shape[2] > 1:  # of one place, it is pooled
        grids, flat = _grids(shape[1], size), [(h, w) for h, w in _grids(shape[2], size) if h * w == shape[2]]
        if len(grids) == 1 and not flat:
            return patch_tokens(*grids[0])(activation)
        if len(grids) == 1 and shape[1] != dimensions:  # wide channels may be a square, too
            has_prefix = math.prod(grids[0]) < shape[1]
            return patch_tokens(*grids[0])(activation) if has_prefix or shape[2] == dimensions else None
        if shape[1] != dimensions or grids:
            return None
        return activation.reshape(*shape[:2], *flat[0]) if len(flat) == 1 else activation
    return activation


def fit(grid: Sequence[int], size: Sequence[int]) -> int:
    """How well one stride makes a map of that size: exactly (2), up to what kernels lose at edges (1), or not."""
    strides = range(1, size[0] // grid[0] + 2)
    lost = [[abs(S - s * n) for S, n in zip(size, grid)] for s in strides]
    return 2 if any(not any(of) for of in lost) else int(any(max(of) <= max(s, 4) for of, s in zip(lost, strides)))


def _grids(tokens: int, size: tuple[int, int]) -> list[tuple[int, int]]:
    """The grids of more than one patch that this many tokens may form, with a few other tokens before them."""
    H, W = size
    found = [(H // p, W // p) for p in range(1, min(H, W) + 1) if H % p == W % p == 0]
    return [(h, w) for h, w in found if h * w > 1 and tokens - h * w in _PREFIXES]


def _is_grid(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    (h, w), (H, W) = grid, size
    return H % h == W % w == 0 and H // h == W // w


def may_be_map(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a convolutional network may make a map of that size."""
    return size[0] % grid[0] == size[1] % grid[1] == 0 or _has_one_stride(grid, size)


def _has_one_stride(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether one stride for both sides makes a map of that size, with the same loss at their edges."""
    (h, w), (H, W) = grid, size
    lost = [(H - s * h, W - s * w, s) for s in range(1, H // h + 2)]
    # An even kernel with half its size as padding makes one place more.
    return any(abs(top - left) < s and -max(s, 2) <= min(top, left) and 4 * top <= H for top, left, s in lost)


def images_of(inputs: tuple[Tensor, ...]) -> Tensor:
    """Which of the encoder's inputs its activations lie on: the images, or the input with the most dimensions."""
    images = (t for t in inputs if t.ndim == 4 and t.is_floating_point())
    return next(images, max(inputs, key=lambda t: t.ndim))
