"""What is kept for backward: nothing before the layer, and nothing that only the gradients of parameters would need."""

import pytest
import torch
from encoders import random, seeded
from test_chunks import close
from torch import nn

from captum_fam import FeatureActivationMap

X = random(2, 3, 8, 8)


class Normed(nn.Module):
    """Convolutions with batch norm and ReLU, then a head; ``layer`` is the first ReLU."""

    def __init__(self, depth=3, inplace=True, **options):
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(6 if i else 3, 6, 3, padding=1), norm(**options), nn.ReLU(inplace))
            for i in range(depth)
        ]
        self.layer, self.rest = blocks[0][2], nn.Sequential(*blocks[1:])
        self.first = nn.Sequential(*blocks[0][:2])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rest(self.layer(self.first(x))).mean((2, 3)))


def norm(**options):
    module = nn.BatchNorm2d(6, **options)
    for i, (name, tensor) in enumerate(module.state_dict().items()):
        if tensor.is_floating_point():
            tensor.copy_((random(6, seed=i + 3).abs() + 0.1) * (-1 if name == "running_mean" else 1))
    return module


def alphas(encoder, x, s, layer):
    """The gradients of w·z with respect to the layer, summed over places, as torch gives them to anyone."""
    kept = []
    handle = layer.register_forward_hook(lambda m, args, out: kept.append(out) or out.clone())
    z = encoder(x)
    handle.remove()
    c = (z / z.norm(dim=1, keepdim=True) * (s / s.norm(dim=1, keepdim=True))).detach()
    low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
    (gradient,) = torch.autograd.grad((z * (c - low) / (high - low)).sum(), kept)
    return gradient.sum((2, 3), keepdim=True), kept[0].detach()


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.5}], ids=lambda o: "-".join(o)
)
def test_batch_norm_has_the_gradient_that_torch_gives_it(options, inplace):
    encoder, s = seeded(lambda: Normed(inplace=inplace, **options)), random(1, 4, seed=2)
    alpha, A = alphas(encoder, X, s, encoder.layer)
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(X, reference_embedding=s)
    assert maps.any()
    close(maps, (alpha * A).sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_in_half_precision_is_left_to_torch(dtype):
    encoder, s = seeded(Normed).to(dtype), random(1, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    with fam._record((X.to(dtype),), None) as recording, torch.no_grad():
        assert torch.equal(recording.embedding, encoder(X.to(dtype)))
    assert fam.attribute(X.to(dtype), reference_embedding=s).dtype == dtype


def kept_of(call):
    """The tensors that are kept for backward in a call, each memory once."""
    kept = {}

    def pack(tensor):
        if tensor.ndim == 4:
            kept[tensor.data_ptr()] = (tensor.numel(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sorted(numel for numel, _ in kept.values())


def test_of_each_block_one_map_is_kept_and_its_weights():
    encoder, s = seeded(lambda: Normed(depth=4)), random(1, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    kept = kept_of(lambda: fam.attribute(X, reference_embedding=s))
    places, weights = X[0, 0].numel() * 6 * len(X), 6 * 6 * 9
    # of three blocks after the layer: the weights, and between them what one gives and the next takes
    assert kept == [weights] * 3 + [places] * 4


def test_parameters_in_the_formula_of_a_module_stay_what_they_are():
    class Scaled(Normed):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            assert self.scale.requires_grad
            assert type(self.scale) is nn.Parameter
            z = torch.mul(input=super().forward(x), other=self.scale)
            return torch.cat([z, self.scale.expand(len(x), -1)], 1)

    encoder = seeded(Scaled)
    fam = FeatureActivationMap(encoder, encoder.layer)
    maps = fam.attribute(X, reference_embedding=random(1, 8, seed=2))
    assert maps.any()
    encoder(X).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
