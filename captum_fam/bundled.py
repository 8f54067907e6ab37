"""The small encoder that the package carries, so that the first map needs no download."""

from importlib.resources import files

import torch
from torch import Tensor, nn

WEIGHTS = "bundled.pt"
TRUNK = 12  # layers, which are EfficientNet-Lite0's

_BLOCKS = (  # inputs, outputs, expansion, kernel, stride
    (32, 16, 1, 3, 1),
    (16, 24, 6, 3, 2),
    (24, 24, 6, 3, 1),
    (24, 40, 6, 5, 2),
    (40, 40, 6, 5, 1),
    (40, 80, 6, 3, 2),
    (80, 80, 6, 3, 1),
    (80, 80, 6, 3, 1),
    (80, 112, 6, 5, 1),
    (112, 112, 6, 5, 1),
    (112, 112, 6, 5, 1),
)


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with TensorFlow's padding, and a batch norm."""
    first, last = (kernel - stride) // 2, (kernel - stride + 1) // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    nn.init.kaiming_normal_(convolution.weight)  # without training, too, activations keep their scale
    return [nn.ZeroPad2d((first, last, first, last)), convolution, nn.BatchNorm2d(outputs, eps=1e-3)]


class _InvertedResidual(nn.Module):
    """The block of MobileNetV2 (Sandler et al., https://arxiv.org/abs/1801.04381)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.body = nn.Sequential(
            *([*_convolution(inputs, width), nn.ReLU6()] if expansion > 1 else []),
            *_convolution(width, width, kernel, stride, groups=width),
            nn.ReLU6(),
            *_convolution(width, outputs),
        )
        self.is_residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.is_residual else y


class _Bottleneck(nn.Module):
    """The block of ResNet-50 (He et al., https://arxiv.org/abs/1512.03385)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 2
        self.body = nn.Sequential(
            *_convolution(channels, width),
            nn.ReLU(),
            *_convolution(width, width, 3),
            nn.ReLU(),
            *_convolution(width, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class BundledEncoder(nn.Module):
    r"""
    A convolutional encoder of 1.2 million parameters for RGB images.

    Its first layers are those of EfficientNet-Lite0 (Apache-2.0, see ``bundled.LICENSE``); its last
    ones learned from the whole of that network. Its embedding is the spatial mean of its last
    feature map, which is not negative. So dimension k of the embedding is channel k of
    ``features``, and FAM takes its aligned route.

    Shape:
        - input: (B, 3, H, W), float, normalised by ``mean`` and ``std``
        - output: (B, 512); ``features`` gives (B, 512, H / 16, W / 16)
    """

    size = 160
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(*_convolution(3, 32, 3, stride=2), nn.ReLU6()),
            *(_InvertedResidual(*block) for block in _BLOCKS),  # the trunk ends here
            nn.Sequential(*_convolution(112, 192), nn.ReLU()),
            *(_Bottleneck(192) for _ in range(3)),
            nn.Sequential(*_convolution(192, 512), nn.ReLU()),
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(images)
        return features.mean((2, 3))


def bundled_encoder() -> BundledEncoder:
    """
    An encoder for a first map without a download: the one that the package carries, trained.

    Returns:
        *torch.nn.Module*: from images (B, 3, H, W), normalised by its ``mean`` and ``std``, to
        embeddings (B, 512); in eval mode and float32. Its layer ``features`` gives maps
        (B, 512, H / 16, W / 16).

    Examples::

        >>> from captum_fam.bundled import bundled_encoder
        >>> encoder = bundled_encoder()
        >>> FeatureActivationMap(encoder, encoder.features).route(torch.rand(1, 3, 160, 160))
        'aligned'
    """
    encoder = BundledEncoder()
    with (files(__package__) / WEIGHTS).open("rb") as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    encoder.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    return encoder.eval()
