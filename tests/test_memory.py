"""What is kept for backward: nothing before the layer, and nothing that only the gradients of parameters would need."""

import re

import pytest
import torch
from encoders import random, seeded
from helpers import close
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from captum_fam import FeatureActivationMap, SimilarityDecomposition
from captum_fam.engine import recording
from captum_fam.engine.report import Report
from captum_fam.engine.ways import Way

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


def map_of(encoder, x, s, layer):
    """N f.v_i from the gradient of f.z by the layer, as torch gives it to anyone; f = w * sign(z) is held."""
    kept = []
    handle = layer.register_forward_hook(lambda m, args, out: kept.append(out) or out.clone())
    z = encoder(x)
    handle.remove()
    c = (z / z.norm(dim=1, keepdim=True) * (s / s.norm(dim=1, keepdim=True))).detach()
    low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
    f = (c - low) / (high - low) * z.detach().sign()
    (gradient,) = torch.autograd.grad((f * z).sum(), kept)
    A = kept[0].detach()
    return (A * gradient).sum(1, keepdim=True) * A[0, 0].numel()


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.5}], ids=lambda o: "-".join(o)
)
def test_batch_norm_has_the_gradient_that_torch_gives_it(options, inplace):
    encoder, s = seeded(lambda: Normed(inplace=inplace, **options)), random(1, 4, seed=2)
    expected = map_of(encoder, X, s, encoder.layer)
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(X, reference_embedding=s)
    assert maps.any()
    close(maps, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_in_half_precision_is_left_to_torch(dtype):
    encoder, s = seeded(Normed).to(dtype), random(1, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    with fam._record((X.to(dtype),), None, Report(), way=Way()) as recording, torch.no_grad():
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


class Scaled(nn.Module):
    """A convolution, a step in between that does something with a weight, and a head."""

    def __init__(self, step):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3), norm(), nn.ReLU())
        self.w, self.step = nn.Parameter(torch.tensor(2.0)), step

    def forward(self, x):
        return self.head(self.step(self, self.layer(x)).mean((2, 3)))


def adapted(self, x):
    with torch.enable_grad():
        (g,) = torch.autograd.grad(nn.functional.linear(x, self.head.weight[:, :4]).square().sum(), self.head.weight)
    return x * g.norm()


def hooked(self, x):
    self.w.register_hook(lambda g: g).remove()
    return x * self.w


def frozen_for_a_while(self, x):
    self.w.requires_grad_(False)
    self.w += 0.0
    self.w.requires_grad_(True)
    return x * self.w


def checkpointed(self, x):
    return checkpoint(self.block, x, use_reentrant=False)


class Other(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def with_a_mode_that_ends_after_it(self, x):
    with Other():
        return x * self.w


STEPS = {
    "requires_grad": lambda self, x: x * w if (w := self.w.to(x.dtype)).requires_grad else 0 * x,
    "a gradient in between": adapted,
    "a hook on a weight": hooked,
    "in place": frozen_for_a_while,
    "checkpoint": checkpointed,
    "a mode": with_a_mode_that_ends_after_it,
    "a weight as input": lambda self, x: x * nn.functional.linear(self.head.weight, self.head.weight).norm(),
}


@pytest.mark.parametrize("step", STEPS)
def test_an_encoder_may_do_with_its_weights_what_it_likes(step):
    encoder, s = seeded(lambda: Scaled(STEPS[step])), random(1, 4, seed=2)
    if step == "a gradient in between":
        encoder.head.weight.data = random(4, 6)
        encoder.step = lambda self, x: adapted(self, x[..., :4])
    expected = map_of(encoder, X, s, encoder.layer)
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(X, reference_embedding=s)
    assert maps.any()
    close(maps, expected)
    assert all(p.requires_grad for p in encoder.parameters())
    assert not torch._C._len_torch_function_stack()


def test_what_an_encoder_computes_of_its_weights_alone_keeps_their_gradients():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double().eval()
    with nn.utils.parametrize.cached():
        FeatureActivationMap(encoder, encoder[0]).attribute(X, reference_embedding=random(1, 4, seed=2))
        encoder(X).sum().backward()
    assert head.parametrizations.weight.original0.grad is not None


def test_what_it_computes_of_a_constant_and_a_weight_keeps_its_gradient_too():
    def cached(self, x):
        if not hasattr(self, "cache"):
            self.cache = nn.functional.linear(torch.ones(1, 6).double(), self.head.weight)
        return x * self.cache.norm()

    encoder = seeded(lambda: Scaled(cached))
    FeatureActivationMap(encoder, encoder.layer).attribute(X, reference_embedding=random(1, 4, seed=2))
    assert encoder.cache.requires_grad


@pytest.mark.parametrize("wrong", ["channels", "dtype"])
def test_batch_norm_that_does_not_fit_is_torchs_error(wrong):
    encoder = seeded(Normed)
    if wrong == "channels":
        encoder.rest[0][1] = nn.BatchNorm2d(1).double().eval()
    else:
        encoder.rest[0][1].float()
    with pytest.raises(RuntimeError) as error:
        encoder(X)
    with pytest.raises(RuntimeError, match=re.escape(str(error.value).split("\n")[0])):
        FeatureActivationMap(encoder, encoder.layer).attribute(X, reference_embedding=random(1, 4, seed=2))


def test_a_layer_may_return_or_take_a_parameter():
    class Tokens(nn.Module):
        def forward(self, queries, memory):
            return torch.softmax(queries @ memory.mT, -1) @ memory

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.decoder, self.head = nn.Conv1d(3, 6, 3), Tokens(), nn.Linear(6, 4)
            self.queries = nn.Parameter(torch.randn(1, 5, 6))

        def forward(self, x):
            return self.head(self.decoder(self.queries, self.conv(x).mT).mean(1))

    encoder = seeded(Queries)
    fam = FeatureActivationMap(encoder, encoder.decoder, reshape_transform=lambda a: a.mT)
    queries, memory = fam.attribute(random(1, 3, 9), reference_embedding=random(1, 4), attribute_to_layer_input=True)
    assert queries.shape == (1, 1, 5)
    assert memory.shape == (1, 1, 7)
    assert queries.any()


def test_a_transformer_before_the_layer_gives_the_embedding_that_it_gives_elsewhere():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
            self.encoder, self.layer, self.head = nn.TransformerEncoder(block, 2), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x, mask):
            return self.head(self.layer(self.encoder(x, src_key_padding_mask=mask)).tanh().mean(1))

    encoder, x = seeded(Text), random(2, 5, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool()
    fam = FeatureActivationMap(encoder, encoder.layer, reshape_transform=lambda a: a.mT)
    seen = []
    handle = encoder.head.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    fam.attribute(x, additional_forward_args=(mask,), reference_embedding=random(1, 4))
    handle.remove()
    close(seen[0], fam.embed(x, (mask,)))


def test_forward_products_go_through_what_lies_behind_the_layer_a_few_places_at_a_time(monkeypatch):
    encoder = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 40))
    encoder, x = encoder.double(), random(1, 3, 8, 8)  # 36 places, fewer than dimensions
    batches, products = [], recording._vector_jacobian_products

    def counted(output, by, rows):
        batches.append(len(rows))
        return products(output, by, rows)

    decomposition = SimilarityDecomposition(encoder, encoder[0])
    expected = decomposition.attribute_matrix(x, x.flip(3))
    monkeypatch.setattr(recording, "_vector_jacobian_products", counted)
    monkeypatch.setattr(recording, "_AT_ONCE", 3 * 2 * 36)
    close(decomposition.attribute_matrix(x, x.flip(3)), expected)
    assert max(batches) == 3
    assert batches.count(3) == 2 * 12
