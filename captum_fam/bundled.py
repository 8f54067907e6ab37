"""The small encoder that the package carries, so that the first map needs no download."""

from importlib.resources import files

import torch
from torch import Tensor, nn

WEIGHTS = "bundled.pt"


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


class BundledEncoder(nn.Module):
    r"""
    A convolutional encoder of 0.5 million parameters for RGB images.

    Its embedding is the spatial mean of its last, non-negative feature map, so
    dimension k of the embedding is channel k of ``features``: FAM's aligned case.

    Shape:
        - input: (B, 3, H, W), float, normalised by ``mean`` and ``std``
        - output: (B, 512); ``features`` gives (B, 512, H / 8, W / 8)
    """

    size = 128
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, 32, stride=2),
            *_convolution(32, 64, stride=2),
            _Residual(64),
            *_convolution(64, 128, stride=2),
            _Residual(128),
            *_convolution(128, 512, kernel=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(images)
        return features.mean((2, 3))


def bundled_encoder() -> BundledEncoder:
    """
    The trained encoder, in eval mode and float32.

    Examples::

        >>> from captum_fam.bundled import bundled_encoder
        >>> encoder = bundled_encoder()
        >>> FeatureActivationMap(encoder, encoder.features).route(torch.rand(1, 3, 128, 128))
        'aligned'
    """
    encoder = BundledEncoder()
    with (files(__package__) / WEIGHTS).open("rb") as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    encoder.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    return encoder.eval()
