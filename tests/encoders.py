"""Small encoders for tests; random weights from a fixed seed, in eval mode."""

import torch
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def seeded(build, seed=1):
    """The module that ``build()`` makes under a fixed seed, in eval mode and float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double().eval()


def random(*shape, seed=1, dtype=torch.float64):
    """A normal random tensor from a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class _Convolutions(nn.Module):
    """conv-relu-conv-relu; ``layer`` is the last feature map, ``early`` the first ReLU's."""

    def __init__(self, dim=2, channels=6, in_channels=3, inplace=False):
        super().__init__()
        self.conv1 = CONV[dim](in_channels, 5, 3, padding=1)
        self.early = nn.ReLU(inplace=inplace)
        self.conv2 = CONV[dim](5, channels, 3, stride=2, padding=1)
        self.layer = nn.ReLU(inplace=inplace)

    def features(self, x):
        return self.layer(self.conv2(self.early(self.conv1(x))))


class PooledEncoder(_Convolutions):
    """The embedding is the spatial mean of ``layer``: (B, in_channels, *spatial) -> (B, channels)."""

    def forward(self, x):
        return self.features(x).flatten(2).mean(2)


class HeadEncoder(_Convolutions):
    """A linear projection head on the spatial mean of ``layer``: -> (B, embedding)."""

    def __init__(self, dim=2, channels=6, in_channels=3, embedding=4, inplace=False):
        super().__init__(dim, channels, in_channels, inplace)
        self.head = nn.Linear(channels, embedding)

    def forward(self, x):
        return self.head(self.features(x).flatten(2).mean(2))


class FlatEncoder(_Convolutions):
    """The flattened ``layer``, as in a Conv-4 ProtoNet: -> (B, channels * places)."""

    def forward(self, x):
        return self.features(x).flatten(1)


class PowerPooledEncoder(_Convolutions):
    """Generalised-mean pooling of ``layer``, as in GeM: -> (B, channels)."""

    def forward(self, x, power=3.0):
        return self.features(x).clamp(min=1e-6).pow(power).flatten(2).mean(2).pow(1 / power)


class ResidualEncoder(nn.Module):
    """A stem, one residual block and a mean: what the block takes is used by both of its paths."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
            )

        def forward(self, x):
            return torch.relu(x + self.body(x))

    def __init__(self, channels=6):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.block = self.Block(channels)

    def forward(self, x):
        return self.block(self.stem(x)).mean((2, 3))


class BranchedEncoder(nn.Module):
    """Two branches from one stem; ``down`` is called before or after ``body``, to the same effect."""

    def __init__(self, down_first=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down, self.body = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.down_first = down_first

    def forward(self, x):
        x = torch.relu(self.stem(x))
        branches = [self.down, self.body] if self.down_first else [self.body, self.down]
        return torch.relu(sum(branch(x) for branch in branches)).square().mean((2, 3))


class Modified(nn.Module):
    """An encoder whose output goes through a function: ``Modified(encoder, F.normalize)``."""

    def __init__(self, encoder, modify):
        super().__init__()
        self.encoder = encoder
        self.layer = encoder.layer
        self.modify = modify

    def forward(self, *inputs):
        return self.modify(self.encoder(*inputs))


class TwoInputEncoder(nn.Module):
    """Two images, each with its branch; both outputs of ``layer``, a tuple, are pooled and joined by a head."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 5, 3, stride=2)

        def forward(self, a, b):
            return torch.relu(self.one(a)), torch.relu(self.two(b))

    def __init__(self, embedding=3):
        super().__init__()
        self.layer = self.Pair()
        self.head = nn.Linear(9, embedding)

    def forward(self, a, b):
        return self.head(torch.cat([m.mean((2, 3)) for m in self.layer(a, b)], 1))


class TokenEncoder(nn.Module):
    """A small token model with a CLS token: ``layer`` gives (B, 1 + places, channels)."""

    def __init__(self, channels=6, grid=3):
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, channels))
        self.layer = nn.Linear(channels, channels)
        self.mix = nn.Linear(1 + grid * grid, 1 + grid * grid)

    def forward(self, x):
        patches = self.patch(x).flatten(2).mT
        tokens = self.layer(torch.cat([self.cls.expand(len(x), -1, -1), patches], 1))
        mixed = tokens + torch.tanh(self.mix(tokens.mT).mT)
        return mixed[:, 0]


class OfActivations(nn.Sequential):
    """An "encoder" whose input is the activation of its layer; by default its embedding is the spatial mean."""

    def __init__(self, *after):
        super().__init__(nn.Identity(), *(after or (nn.AdaptiveAvgPool2d(1), nn.Flatten())))
        self.double().eval()

    @property
    def layer(self):
        return self[0]


HAND_A = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 4.0], [8.0, 4.0]]]]).double()  # its mean is (3, 4)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Classifier(PooledEncoder):
    """Five classes by a linear layer on the spatial mean of ``layer``, which ``again`` repeats."""

    def __init__(self, dim=2):
        super().__init__(dim)
        self.again = nn.Identity()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.again(self.features(x)).flatten(2).mean(2))


class Shifted(PooledEncoder):
    """Takes a row of six numbers with each input, and a factor for all."""

    def forward(self, x, shift, factor=1.0):
        return factor * (super().forward(x) + shift)


class OfBytes(PooledEncoder):
    """Takes images of bytes, and normalises them itself."""

    def forward(self, x):
        return super().forward(x.double() / 255 - 0.4)


class PatchEncoder(nn.Module):
    """Places are 8 x 8 pixels; all signs, and the places add up to the embedding."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 8, stride=8, bias=False)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.head(self.layer(x).mean((2, 3)))


def pooled():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Unbiased(nn.Module):
    """A bias-free network whose last feature map ``pool`` takes to (B, 6) and ``finish`` to the embedding."""

    def __init__(self, pool, finish):
        super().__init__()
        self.early = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.relu, self.conv2, self.layer = nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.ReLU()
        self.pool, self.finish = pool, finish

    def forward(self, x):
        return self.finish(self.pool(self.layer(self.conv2(self.relu(self.early(x))))))
