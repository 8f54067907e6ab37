"""
Random encoders, layers and questions, against an oracle of its own: plain hooks and a gradient for each embedding
dimension, and the formulas in NumPy (tests/reference.py).
"""

import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from torch import nn

from captum_fam import FeatureActivationMap, SimilarityDecomposition
from tests import reference as oracle

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX, MEAN = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}, {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ACTIVATIONS = [nn.ReLU, lambda: nn.ReLU(inplace=True), nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus, nn.ELU]
# How far the maps may be from the oracle's, in float64, as a share of the largest term; and how far from a point where
# the formula itself jumps (a sign, a flat min-max) examples must be.
EXACT, NEAR_A_JUMP = 1e-8, 1e-7


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Power(nn.Module):
    """Generalised mean."""

    def forward(self, x):
        return x.flatten(2).clamp(min=1e-4).pow(3).mean(2).pow(1 / 3)


class Total(nn.Module):
    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def forward(self, x):
        return self.reduce(x.flatten(2))


class Unit(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x, dim=1)


class Scrambled(nn.Module):
    """Tokens (B, T, C) of a grid, with others before, between and after its patches, mixed by attention or a matrix."""

    def __init__(self, channels, grid, before, after, attention, read):
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 3, stride=3)
        self.before, self.after = (nn.Parameter(torch.randn(1, n, channels)) for n in (before, after))
        tokens = before + grid[0] * grid[1] + after
        self.norm, self.layer = nn.LayerNorm(channels), nn.Linear(channels, channels)
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True) if attention else None
        self.mix, self.read = nn.Linear(tokens, tokens), read
        self.first, self.grid = before, grid

    def forward(self, x):
        patches = self.patch(x).flatten(2).mT
        tokens = torch.cat([self.before.expand(len(x), -1, -1), patches, self.after.expand(len(x), -1, -1)], 1)
        tokens = self.layer(self.norm(tokens))
        if self.attention is None:
            tokens = tokens + torch.tanh(self.mix(tokens.mT).mT)
        else:
            tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return tokens.mean(1) if self.read is None else tokens[:, self.read]

    def to_map(self, tokens):
        """The layout, as a user gives it."""
        h, w = self.grid
        return tokens[:, self.first : self.first + h * w].mT.unflatten(2, (h, w))


@dataclass
class Case:
    encoder: nn.Module
    layer: nn.Module
    inputs: torch.Tensor
    to_map: object = None


@st.composite
def convolutions(draw, dim):
    """Some blocks, and which of their modules give a map."""
    channels, blocks = 3, []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "residual", "depthwise", "max", "mean", "norm"]))
        if kind in ("max", "mean"):
            blocks.append((MAX if kind == "max" else MEAN)[dim](2, ceil_mode=True))
            continue
        if kind == "norm":
            blocks.append(draw(st.sampled_from([NORM[dim](channels), nn.GroupNorm(1, channels)])))
            continue
        size, bias = draw(st.sampled_from([1, 3])), draw(st.booleans())
        if kind == "residual":
            body = CONV[dim](channels, channels, size, padding=size // 2, bias=bias)
            blocks.append(Residual(nn.Sequential(body, draw(st.sampled_from(ACTIVATIONS))())))
        else:
            out = channels * draw(st.integers(1, 2)) if kind == "depthwise" else draw(st.integers(1, 6))
            groups = channels if kind == "depthwise" else 1
            stride = draw(st.integers(1, 2))
            blocks.append(CONV[dim](channels, out, size, stride, size // 2, groups=groups, bias=bias))
            channels = out
        blocks.append(draw(st.sampled_from(ACTIVATIONS))())
    return blocks, channels


@st.composite
def convolutional(draw):
    dim = draw(st.sampled_from([1, 2, 2, 3]))
    blocks, channels = draw(convolutions(dim))
    size = [draw(st.integers(4, 9 if dim < 3 else 5)) for _ in range(dim)]
    inputs = torch.randn(draw(st.integers(1, 3)), 3, *size)
    features = nn.Sequential(*blocks)
    try:
        with torch.no_grad():
            numel = features.eval()(inputs[:1]).numel()
    except RuntimeError:  # nothing is left for a pooling
        reject()
    pool = draw(st.sampled_from(["mean", "mean", "sum", "max", "power", "flat"]))
    head, width = (
        {
            "mean": lambda: Total(lambda x: x.mean(2)),
            "sum": lambda: Total(lambda x: x.sum(2)),
            "max": lambda: Total(lambda x: x.amax(2)),
            "power": Power,
            "flat": nn.Flatten,
        }[pool](),
        numel if pool == "flat" else channels,
    )
    tail, D = [head], draw(st.integers(2, 7))
    match draw(st.sampled_from(["none", "linear", "mlp"])) if pool != "flat" else "linear":
        case "linear":
            tail.append(nn.Linear(width, D, bias=draw(st.booleans())))
        case "mlp":
            tail += [nn.Linear(width, 5), draw(st.sampled_from(ACTIVATIONS))(), nn.Linear(5, D)]
    if draw(st.booleans()):
        tail.append(Unit())
    encoder = nn.Sequential(features, *tail)
    layer = draw(st.sampled_from(blocks))
    # A layer of one dimension has (B, C, T), which no shape tells from tokens: as is, the layout is given.
    return Case(encoder, layer, inputs, (lambda a: a) if dim == 1 else None)


@st.composite
def tokens(draw):
    grid, before, after = (draw(st.integers(1, 4)), draw(st.integers(1, 4))), *draw(st.tuples(*[st.integers(0, 2)] * 2))
    others = [None, *range(before), *(before + grid[0] * grid[1] + i for i in range(after))]
    channels = 2 * draw(st.integers(1, 4))
    encoder = Scrambled(channels, grid, before, after, draw(st.booleans()), draw(st.sampled_from(others)))
    inputs = torch.randn(draw(st.integers(1, 3)), 3, 3 * grid[0], 3 * grid[1])
    layer = draw(st.sampled_from([encoder.norm, encoder.layer]))
    head = nn.Sequential(encoder, nn.Linear(channels, draw(st.integers(2, 6)))) if draw(st.booleans()) else encoder
    return Case(head, layer, inputs, encoder.to_map)


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    case = draw(st.one_of(convolutional(), tokens()))
    case.encoder.double().eval()
    case.inputs = case.inputs.double()
    for m in case.encoder.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return case


def jacobian(case):
    """z (B, D), the layer's map A (B, C, *spatial) and dz/dA (B, D, C, *spatial), by a hook and D gradients."""
    kept = []

    def hook(_, __, output):
        kept.append(output.detach().clone().requires_grad_())
        return kept[-1].clone()

    handle = case.layer.register_forward_hook(hook)
    z = case.encoder(case.inputs)
    handle.remove()
    (activation,) = kept
    to_map = case.to_map or (lambda a: a)
    rows = [torch.autograd.grad(z[:, d].sum(), activation, retain_graph=True)[0] for d in range(z.shape[1])]
    J = torch.stack([to_map(row) for row in rows], 1)
    return z.detach().numpy(), to_map(activation).detach().numpy(), J.numpy()


def is_aligned(z, A):
    """Whether each z is a positive multiple of its A's mean over the places."""
    if z.shape[1] != A.shape[1]:
        return False
    mean = A.reshape(*A.shape[:2], -1).mean(2)
    apart = [np.linalg.norm(a / oracle.norm(a) - b / oracle.norm(b)) for a, b in zip(z, mean)]
    assume(all(d < 1e-12 or d > 1e-2 for d in apart))  # between these nobody can tell
    return max(apart) < 1e-12


QUESTIONS = st.sampled_from([{}, {"contrast": "rest"}, {"contrast": 0}, {"contrast": "self"}, {"threshold": 0.3}])
SEEN = Counter()


@pytest.fixture(autouse=True)
def _counted(record_property):
    SEEN.clear()
    yield
    for what, number in sorted(SEEN.items()):
        record_property(what, number)


@given(
    cases(),
    QUESTIONS,
    st.sampled_from(["cosine", "dot", "euclidean"]),
    st.sampled_from(["minmax", None]),
    st.integers(2, 4),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["auto", "jacobian"]),
)
def test_maps_are_those_of_the_oracle(case, question, similarity, normalize, K, at_once, route):
    assume(similarity != "euclidean" or not ({"threshold"} & set(question) or question.get("contrast") == "self"))
    z, A, J = jacobian(case)
    B, D = z.shape
    s = np.random.default_rng(torch.randint(2**31, ()).item()).normal(size=(K, D))
    assume(np.isfinite(z).all() and (np.abs(z).max(1) > 0).all() and np.abs(J).max() > 0)
    assume((np.abs(z) > NEAR_A_JUMP * np.abs(z).max()).all())
    aligned = is_aligned(z, A) and route == "auto"
    own = K - 1
    for method, weights, options in (
        (FeatureActivationMap, oracle.pair_weights, {"normalize": normalize}),
        (SimilarityDecomposition, oracle.decomposition_weights, {}),
    ):
        if method is FeatureActivationMap:
            c = np.array([[oracle.contributions(row, other, similarity) for other in s] for row in z])
            assume((np.ptp(c, axis=2) > NEAR_A_JUMP * np.abs(c).max()).all())

        def wanted(b, k, weights=weights, options=options):
            f = weights(z[b], s, k, similarity, **options, **question)
            if not aligned:
                return oracle.jacobian_map(f, J[b], A[b])
            mean = A[b].reshape(len(A[b]), -1).mean(1)
            multiple = 1 if weights is oracle.pair_weights else oracle.norm(z[b]) / oracle.norm(mean)
            return multiple * oracle.aligned_map(f, A[b])

        explainer = method(
            case.encoder,
            case.layer,
            similarity=similarity,
            channel_weights=route,
            reshape_transform=case.to_map,
            **options,
        )
        references = torch.from_numpy(s)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refusal, found = "", None
            try:
                found = explainer.attribute(
                    case.inputs, own, reference_embedding=references, internal_batch_size=at_once, **question
                )
            except ValueError as error:
                refusal = str(error)
            if found is None:
                assert "reshape_transform" in refusal  # the layout is in doubt, and the user is told what to pass
                SEEN["encoders refused, as the shape of a layer leaves a doubt"] += 1
                return
            compare(found[:, 0], [wanted(b, own) for b in range(B)])
            if question.get("contrast") != 0:
                every = explainer.attribute_all(
                    case.inputs, reference_embedding=references, internal_batch_size=at_once, **question
                )
                compare(every, [[wanted(b, k) for k in range(K)] for b in range(B)])
            SEEN["maps compared with the oracle's"] += 1
    SEEN["encoders"] += 1


def compare(found, wanted):
    wanted = np.array(wanted)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=EXACT * max(1e-3, np.abs(wanted).max()))
