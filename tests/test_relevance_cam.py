"""RelevanceCam, against hand-written LRP, activation times gradient and Captum's LRP."""

import copy

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerLRP
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule
from encoders import (
    Function,
    OfActivations,
    OfBytes,
    PooledEncoder,
    ResidualEncoder,
    TwoInputEncoder,
    Unbiased,
    pooled,
    random,
    seeded,
)
from helpers import arrays, close, held, run, similarity_of
from test_model_untouched import state
from torch import nn

from captum_fam import RelevanceCam, SimilarityScore

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)


def leftovers(model, *tensors):
    """All that a call may leave: ``state``, and what ``held`` finds."""
    return state(model, *tensors), *held(model)


class Plain(nn.Module):
    """A network without biases, of convolutions, poolings, a container and a head of two layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.early = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.block = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.ReLU(), nn.AvgPool2d(2))
        self.conv2, self.layer = nn.Conv2d(4, 6, 1, bias=False), nn.ReLU()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.hidden, self.act, self.head = nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False)

    def forward(self, x):
        x = self.block(self.pool(self.early(self.conv1(x))))
        return self.head(self.act(self.hidden(self.mean(self.layer(self.conv2(x))).flatten(1))))


def activation_times_gradient(encoder, layer, x, start, layer_input=False):
    """A_k sum_locations (A dC/dA)_k for C = sum z (c / z), the quotient held: epsilon-LRP where there is no bias."""
    kept = []

    def keep(activation):
        kept.append(activation.detach().clone().requires_grad_())
        return kept[-1].clone()

    if layer_input:
        handle = layer.register_forward_pre_hook(lambda m, args: (keep(args[0]),))
    else:
        handle = layer.register_forward_hook(lambda m, args, out: keep(out))
    z = encoder(x)
    handle.remove()
    c = torch.from_numpy(np.stack([start(b, z_b) for b, z_b in enumerate(z.detach().numpy())]))
    (gradient,) = torch.autograd.grad((z * (c / z).detach()).sum(), kept)
    A = kept[0].detach()
    relevance = A * gradient
    return (relevance.flatten(2).sum(2)[..., None, None] * A).sum(1, keepdim=True)


def starting(references, targets, similarity="cosine", contrast=None, threshold=None):
    """The contributions that LRP starts from, by the reference implementation."""

    def start(b, z):
        c = oracle.contributions(z, references[targets[b]].numpy(), similarity)
        if threshold is not None:
            return c - threshold * oracle.own(z, similarity)
        if contrast == "self":
            return c - c.sum() * oracle.own(z, similarity)
        if contrast is None:
            return c
        return oracle.contrasted(z, references.numpy(), targets[b], contrast, similarity)

    return start


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("contrast", [None, 1, "rest"])
@pytest.mark.parametrize("layer_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("name", ["conv1", "early", "pool", "block", "block.0", "block.2", "conv2", "layer"])
def test_without_biases_relevance_is_activation_times_gradient(name, layer_input, contrast, similarity):
    encoder, x, s = seeded(Plain), 1000 * random(2, 3, 8, 8), 5 * random(4, 4, seed=2)  # large, for the stabiliser 1e-9
    layer = encoder.get_submodule(name)
    expected = activation_times_gradient(encoder, layer, x, starting(s, [2, 0], similarity, contrast), layer_input)
    assert expected.abs().max() > 1e-4
    maps = RelevanceCam(encoder, layer, similarity=similarity).attribute(
        x, [2, 0], None, layer_input, reference_embedding=s, contrast=contrast
    )
    close(maps, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


LESS = [{"contrast": "self"}, {"threshold": 0.3}]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("less", LESS, ids=str)
@pytest.mark.parametrize("name", ["early", "block", "layer"])
def test_the_relevance_less_a_share_of_the_inputs_own_starts_with_that_difference(name, less, similarity):
    encoder, x, s = seeded(Plain), 1000 * random(2, 3, 8, 8), 5 * random(4, 4, seed=2)
    cam, layer = RelevanceCam(encoder, encoder.get_submodule(name), similarity=similarity), encoder.get_submodule(name)
    expected = [activation_times_gradient(encoder, layer, x, starting(s, [k, k], similarity, **less)) for k in range(4)]
    tolerances = {"rtol": 1e-6, "atol": 1e-6 * max(M.abs().max().item() for M in expected)}
    assert min(M.abs().max() for M in expected) > 1e-4
    close(cam.attribute(x, 2, reference_embedding=s, **less), expected[2], **tolerances)
    close(cam.attribute_all(x, reference_embedding=s, **less), torch.cat(expected, 1), **tolerances)


@pytest.mark.parametrize("less", LESS, ids=str)
def test_a_similarity_by_which_nothing_is_similar_to_itself_has_no_such_difference(less):
    encoder = seeded(PooledEncoder)
    for similarity in ("euclidean", lambda z, s: -(z - s).abs()):
        cam = RelevanceCam(encoder, encoder.layer, similarity=similarity)
        with pytest.raises(ValueError, match=rf"{next(iter(less))}.*compares with"):
            cam.attribute(X, 1, reference_embedding=REFERENCES, **less)


@pytest.mark.parametrize("contrast", [None, 1])
def test_relevance_of_a_tiny_network_with_biases_by_hand_written_lrp(contrast):
    """The epsilon rule, layer by layer: R_i = a_i sum_j w_ji R_j / (sum_i w_ji a_i + b_j)."""
    encoder = seeded(
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), seed=4
    )
    (W1, b1, W2, b2), x = (p.detach().numpy() for p in encoder.parameters()), random(4, 2, 2, 2)
    s = random(2, 3, seed=2)
    maps = RelevanceCam(encoder, encoder[0]).attribute(x, 0, reference_embedding=s, contrast=contrast)
    for b in range(4):
        A = np.maximum(x[b].numpy(), 0)
        a0 = A.ravel()
        h = W1 @ a0 + b1
        a1 = np.maximum(h, 0)
        z = W2 @ a1 + b2
        c = starting(s, [0] * 4, "cosine", contrast)(b, z)
        R1 = a1 * (W2.T @ (c / z))
        R0 = a0 * (W1.T @ (R1 / h))
        alpha = R0.reshape(2, 4).sum(1)
        assert np.abs(alpha).max() > 1e-3
        close(maps[b, 0], oracle.aligned_map(alpha, A), rtol=1e-6, atol=1e-9)


def test_relevance_by_hand():
    """One location and a head: z = (3 a, b) = (6, 1), s = (1, 1), dot: c = (6, 1), R = (6, 1), M = 6 * 2 + 1 * 1."""
    encoder = OfActivations(nn.Flatten(), nn.Linear(2, 2, bias=False))
    encoder[0] = nn.ReLU()
    with torch.no_grad():
        encoder[2].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    maps = RelevanceCam(encoder, encoder[0], similarity="dot").attribute(
        torch.tensor([[[[2.0]], [[1.0]]]]).double(), reference_embedding=torch.ones(1, 2).double()
    )
    close(maps, [[[[13.0]]]], rtol=1e-7)


def test_at_the_layer_that_is_pooled_relevance_is_the_contribution():
    """Where the embedding is the mean, R_k sums to c_k: the map is sum_k c_k A_k."""
    encoder = seeded(PooledEncoder)
    z, A = arrays(encoder, X)
    maps = RelevanceCam(encoder, encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)
    for b in range(3):
        c = oracle.contributions(z[b], REFERENCES[1].numpy(), "cosine")
        close(maps[b, 0], oracle.aligned_map(c, A[b]), rtol=1e-6, atol=1e-9)


def test_all_relevance_maps_at_once_are_those_one_by_one():
    encoder, s = seeded(Plain), random(4, 4, seed=2)
    cam = RelevanceCam(encoder, encoder.pool)
    for contrast in (None, "rest"):
        each = [cam.attribute(X, k, reference_embedding=s, contrast=contrast) for k in range(4)]
        close(cam.attribute_all(X, reference_embedding=s, contrast=contrast), torch.cat(each, 1))


class PlainClassifier(nn.Module):
    """Modules that Captum's LRP has rules for, with biases; classes on top."""

    def __init__(self):
        super().__init__()
        self.conv1, self.early = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()
        self.pool, self.conv2, self.layer = nn.MaxPool2d(2), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU()
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.mean(self.layer(self.conv2(self.pool(self.early(self.conv1(x)))))).flatten(1))


def of_classes(model):
    """The model's logits as similarities, for unit vectors as references."""
    return SimilarityScore(model, torch.eye(5).double(), "dot")


RULES = {
    "epsilon": None,
    "alpha1-beta0": Alpha1_Beta0_Rule,
    "gamma": GammaRule,
    "wide epsilon": lambda: EpsilonRule(0.1),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def ruled(rule, build=PlainClassifier):
    """A model whose layers with weights have this rule."""
    model = seeded(build)
    for module in model.modules():
        if rule is not None and isinstance(module, nn.Conv2d | nn.Linear):
            module.rule = rule()
    return model


@each_rule
@pytest.mark.parametrize(
    ("name", "layer_input"),
    [("pool", True), ("pool", False), ("conv2", True), ("conv2", False), ("mean", True)],
)
def test_the_relevance_of_a_class_is_that_of_captums_lrp(name, layer_input, rule):
    for_captum = ruled(rule)
    lrp = LayerLRP(for_captum, for_captum.get_submodule(name))
    relevance = lrp.attribute(X.clone(), 3, attribute_to_layer_input=layer_input).detach()
    model = ruled(rule)
    cam = RelevanceCam(of_classes(model), model.get_submodule(name))
    terms = cam.attribute(X, 3, None, layer_input, attr_dim_summation=False)
    before = {("pool", True): model.early, ("conv2", True): model.pool, ("mean", True): model.layer}
    A = run(model, X, layer=before.get((name, layer_input), model.get_submodule(name)))[1]
    close(terms, relevance.sum((2, 3), keepdim=True) * A, rtol=1e-6, atol=1e-10)


def test_a_rule_changes_the_map():
    models = [ruled(rule) for rule in RULES.values()]
    maps = [RelevanceCam(of_classes(model), model.early).attribute(X, 3) for model in models]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(maps) for b in maps[:i])


def test_the_classes_of_a_classifier_are_the_unit_vectors():
    """The relevance starts from the logit of the class, for "rest" less the mean of the others'."""
    model = seeded(PlainClassifier)
    cam = RelevanceCam(of_classes(model), model.layer)
    each = [cam.attribute(X, t) for t in range(5)]
    close(cam.attribute_all(X), torch.cat(each, 1))
    close(cam.attribute(X, [4, 0, 2]), torch.stack([each[4][0], each[0][1], each[2][2]]))
    close(cam.attribute(X, 0, contrast=2), each[0] - each[2], rtol=1e-6)
    close(cam.attribute(X, 0, contrast="rest"), each[0] - sum(each[1:]) / 4, rtol=1e-6)


class Awkward(PlainClassifier):
    """As a user may hand it over: batch norm, frozen weights, an awaited gradient, hooks and rules of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(6), nn.Dropout(0.3)
        self.stage = nn.Sequential(self.conv2, self.norm)
        self.conv1.weight.requires_grad_(False)
        self.conv2.weight.requires_grad_(False)
        self.conv2.rule = Alpha1_Beta0_Rule()
        self.conv1.rule = GammaRule()
        self.relu_hook = self.layer.register_forward_hook(lambda *_: None)
        self.fc_hook = self.fc.register_forward_pre_hook(lambda *_: None)
        self.fails = False

    def forward(self, x):
        x = self.layer(self.stage(self.pool(self.early(self.conv1(x)))))
        x = self.drop(self.mean(x).flatten(1))
        if self.fails:
            raise OSError
        return self.fc(x)


def awkward(training=False):
    model = seeded(Awkward)
    model.fc.weight.grad = torch.ones(5, 6, dtype=torch.float64)
    return model.train(training)


@pytest.mark.filterwarnings("ignore:The model is in training mode")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["early", "pool", "stage", "layer"])
def test_lrp_leaves_nothing_in_the_model(name, training):
    model = awkward(training)
    x = X.clone().requires_grad_()
    cam = RelevanceCam(of_classes(model), model.get_submodule(name))
    before, rules = leftovers(model, x), (model.conv1.rule, model.conv2.rule)
    calls = [
        lambda: cam.attribute(x, 3),
        lambda: cam.attribute(x, 3, attribute_to_layer_input=True),
        lambda: cam.attribute_all(x, contrast="rest"),
        lambda: cam.attribute_pair(x, x),
        lambda: cam.attribute(x, 3),
    ]
    for call in calls:
        assert call() is not None
        after = leftovers(model, x)
        assert after[:2] == before[:2]
        assert [m[0] for m in after[2]] == [m[0] for m in before[2]]
        assert (model.conv1.rule, model.conv2.rule) == rules
        left = [name for m in model.modules() for name in vars(m) if name.startswith(("activation", "relevance"))]
        assert left == []
    assert not hasattr(model.fc, "rule")


@pytest.mark.parametrize(
    "fail",
    [
        lambda model: setattr(model, "fails", True),
        lambda model: setattr(model, "stage", nn.Sequential(model.conv2, nn.Softplus())),
        lambda model: setattr(model, "drop", Function(lambda z: z + z.square())),
        lambda model: setattr(model, "mean", nn.Softmax2d()),
        lambda model: setattr(model.conv2, "rule", "epsilon"),
        lambda model: setattr(model.fc, "rule", Broken()),
    ],
    ids=["forward", "no rule", "arithmetic", "shape", "no such rule", "rule that fails"],
)  # fmt: skip
def test_lrp_leaves_nothing_in_the_model_when_it_fails(fail):
    model = awkward()
    fail(model)
    before = leftovers(model, X)
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled), pytest.raises((ValueError, TypeError, OSError, RuntimeError)):
            RelevanceCam(of_classes(model), model.early).attribute(X, 3)
        assert leftovers(model, X)[:2] == before[:2]


class Broken(EpsilonRule):
    def _create_backward_hook_output(self, outputs):
        raise OSError


@each_rule
def test_rules_of_the_user_stay_and_weights_are_put_back_exactly(rule):
    model = ruled(rule)
    rules = [getattr(m, "rule", None) for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    cam = RelevanceCam(of_classes(model), model.early)
    first = cam.attribute(X, 3)
    assert all(a is b for a, b in zip(rules, [getattr(m, "rule", None) for m in model.modules()], strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    close(cam.attribute(X, 3), first, rtol=0, atol=0)


def test_sums_in_a_forward_function_are_refused_before_the_layer_only():
    encoder = seeded(ResidualEncoder)
    before = leftovers(encoder, X)
    for layer in (encoder.stem, encoder.block.body[0]):
        with pytest.raises(ValueError, match=r"LRP cannot follow.*Add.*after layer '.*' \(Conv2d\).*Addition_Module"):
            RelevanceCam(encoder, layer).attribute(X, 1, reference_embedding=REFERENCES)
    assert leftovers(encoder, X)[:2] == before[:2]
    z, A = arrays(encoder, X, layer=encoder.block)
    maps = RelevanceCam(encoder, encoder.block).attribute(X, 1, reference_embedding=REFERENCES)
    c = [oracle.contributions(z_b, REFERENCES[1].numpy(), "cosine") for z_b in z]
    close(maps, np.einsum("bk,bkij->bij", c, A)[:, None], rtol=1e-6, atol=1e-9)


class Summed(nn.Module):
    """A residual block whose sum is Captum's module, without biases."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 1, bias=False))
        self.add, self.last, self.mean = Addition_Module(), nn.ReLU(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.layer(self.stem(x))
        return self.mean(self.last(self.add(x, self.body(x)))).flatten(1)


@pytest.mark.parametrize("name", ["stem", "layer", "body.0", "body.1", "body", "add", "last"])
def test_captums_sums_are_followed(name):
    encoder = seeded(Summed)
    layer = encoder.get_submodule(name)
    expected = activation_times_gradient(encoder, layer, X, starting(REFERENCES, [1, 1, 1]))
    maps = RelevanceCam(encoder, layer).attribute(X, 1, reference_embedding=REFERENCES)
    close(maps, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def spatial_mean(x):
    return x.mean((2, 3))


REFUSED = {
    "normalised": (spatial_mean, lambda z: F.normalize(z, dim=1)),
    "divided": (spatial_mean, lambda z: z / z.norm(dim=1, keepdim=True)),
    "centred": (spatial_mean, lambda z: z - z.mean(1, keepdim=True)),
    "added": (spatial_mean, lambda z: z + z.relu()),
    "square": (spatial_mean, torch.square),
    "power": (lambda x: x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3), lambda z: z),
    "attention": (lambda x: (x * x.flatten(2).softmax(2).view_as(x)).sum((2, 3)), lambda z: z),
}
FOLLOWED = {
    "relu": (pooled, torch.relu),
    "joined with itself": (pooled, lambda z: torch.cat([z, z], 1)[:, 3:9]),
    "reordered": (pooled, lambda z: z.flip(1).reshape(-1, 3, 2).mT.flatten(1)),
    "stacked": (pooled, lambda z: torch.stack([z, z], 2).unbind(2)[0]),
}
PERHAPS = {
    **FOLLOWED,
    "scaled": (pooled, lambda z: 2 * z),
    "negated": (pooled, lambda z: -z),
    "divided by a number": (pooled, lambda z: z / 2),
    "sum": (lambda: lambda x: x.sum((2, 3)), lambda z: z),
    "mean": (lambda: spatial_mean, lambda z: z),
    "maximum": (lambda: lambda x: x.amax((2, 3)), lambda z: z),
    "softmax": (pooled, lambda z: z.softmax(1)),
    "sigmoid": (pooled, torch.sigmoid),
    "exponential": (pooled, torch.exp),
    "root": (pooled, lambda z: (z + 1e-6).sqrt()),
    "layer norm": (pooled, lambda z: F.layer_norm(z, (6,))),
    "matrix": (pooled, lambda z: z @ random(6, 6)),
    "linear": (pooled, lambda z: F.linear(z, random(6, 6))),
    "shifted": (pooled, lambda z: z + 1),
    "sum of a copy": (pooled, lambda z: z.repeat(1, 2).unflatten(1, (2, 6)).sum(1)),
    "repeated": (pooled, lambda z: z[:, :, None].expand(-1, -1, 2).flatten(1)[:, :6]),
    "convolution": (lambda: lambda x: F.conv2d(x, random(6, 6, 1, 1)).mean((2, 3)), lambda z: z),
    "upsampled": (lambda: lambda x: F.interpolate(x, scale_factor=2).mean((2, 3)), lambda z: z),
}


@pytest.mark.parametrize("steps", REFUSED.values(), ids=REFUSED)
def test_arithmetic_that_lrp_has_no_rule_for_is_refused(steps):
    encoder = seeded(lambda: Unbiased(*steps))
    before = leftovers(encoder, X)
    with pytest.raises(ValueError, match="LRP cannot follow"):
        RelevanceCam(encoder, encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)
    assert leftovers(encoder, X)[:2] == before[:2]


def unless_refused(call, *signs):
    """What the call gives; None where it is refused with a message that has one of the signs."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        if not any(sign in str(error) for sign in signs):
            raise
        return None


@pytest.mark.parametrize("steps", PERHAPS.values(), ids=PERHAPS)
def test_functions_in_a_forward_are_refused_or_lose_no_relevance(steps):
    """Without biases, the relevances of the channels add up to the score, as LRP conserves relevance."""
    pool, finish = steps
    encoder, x = seeded(lambda: Unbiased(pool(), finish)), 100 * X
    before, cam = leftovers(encoder, x), RelevanceCam(encoder, encoder.early)
    terms = unless_refused(
        lambda: cam.attribute(x, 1, attr_dim_summation=False, reference_embedding=REFERENCES), "LRP cannot follow"
    )
    assert leftovers(encoder, x)[:2] == before[:2]
    if steps in FOLLOWED.values():
        assert terms is not None
    if terms is not None:
        z, A = arrays(encoder, x, layer=encoder.early)
        alpha = terms.sum((2, 3)) / torch.from_numpy(A).sum((2, 3))
        alpha = torch.where(torch.from_numpy(A).sum((2, 3)) == 0, 0, alpha)
        close(alpha.sum(1), [similarity_of(z_b, REFERENCES[1].numpy()) for z_b in z], rtol=1e-5, atol=1e-7)


def test_a_mean_in_a_forward_directly_after_the_layer_gives_the_relevance_of_a_pooling_module():
    by_function = seeded(lambda: Unbiased(spatial_mean, lambda z: z))
    by_module = seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    one, two = (
        RelevanceCam(encoder, encoder.layer).attribute(100 * X, 1, reference_embedding=REFERENCES)
        for encoder in (by_function, by_module)
    )
    close(one, two, rtol=1e-6, atol=1e-8)


def test_a_mean_in_a_forward_further_on_shares_relevance_evenly_which_is_refused():
    encoder = seeded(lambda: Unbiased(spatial_mean, lambda z: z))
    with pytest.raises(ValueError, match=r"LRP cannot follow.*Mean.*after layer 'early' \(Conv2d\)"):
        RelevanceCam(encoder, encoder.early).attribute(X, 1, reference_embedding=REFERENCES)


ACTIVATIONS = [nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, lambda: nn.Softmax(1)]


@pytest.mark.parametrize("module", ACTIVATIONS)
def test_activation_functions_are_refused_by_name_or_pass_relevance_on(module):
    """What acts on each value alone gives it its relevance: the map is sum_k c_k A_k of what the module takes."""
    encoder = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), module(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    before, cam = leftovers(encoder, X), RelevanceCam(encoder, encoder[0])
    maps = unless_refused(lambda: cam.attribute(X, 1, reference_embedding=REFERENCES), type(encoder[1]).__name__)
    assert leftovers(encoder, X)[:2] == before[:2]
    if isinstance(encoder[1], nn.Softmax):
        assert maps is None
    if maps is not None:
        z, A = arrays(encoder, X, layer=encoder[0])
        c = [oracle.contributions(z_b, REFERENCES[1].numpy(), "cosine") for z_b in z]
        close(maps, np.einsum("bk,bkij->bij", c, A)[:, None], rtol=1e-5, atol=1e-7)


IN_PLACE = {
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "ELU": lambda inplace: nn.ELU(1.0, inplace),
    "SiLU": nn.SiLU,
    "Hardswish": nn.Hardswish,
}


@pytest.mark.parametrize("module", IN_PLACE.values(), ids=IN_PLACE)
def test_activation_functions_in_place_pass_on_the_same_relevance(module):
    """As in the heads of MobileNetV3, and in EfficientNet."""
    models = [
        seeded(lambda i=i: nn.Sequential(nn.Conv2d(3, 6, 3), *pooled(), nn.Linear(6, 5), module(i), nn.Linear(5, 6)))
        for i in (True, False)
    ]
    close(*[RelevanceCam(m, m[0]).attribute(X, 1, reference_embedding=REFERENCES) for m in models])


class Reused(nn.Module):
    """Calls one ReLU and one convolution twice, or two of each with the same weights."""

    def __init__(self, shared):
        super().__init__()
        self.layer, self.conv, self.relu = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 6, 1, bias=False), nn.ReLU()
        self.again, self.relu_again = copy.deepcopy(self.conv), nn.ReLU()
        self.shared, self.mean = shared, nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.relu(self.conv(self.layer(x)))
        x = self.relu_again(x) if "relu" not in self.shared else self.relu(x)
        x = self.again(x) if "conv" not in self.shared else self.conv(x)
        return self.mean(x).flatten(1)


@pytest.mark.parametrize("shared", ["relu", "conv"])
def test_modules_that_are_called_twice_are_refused_or_give_the_maps_of_two_modules(shared):
    reused = seeded(lambda: Reused(shared))
    expected = RelevanceCam(two := seeded(lambda: Reused("")), two.layer).attribute(
        X, 1, reference_embedding=REFERENCES
    )
    before, cam = leftovers(reused, X), RelevanceCam(reused, reused.layer)
    maps = unless_refused(lambda: cam.attribute(X, 1, reference_embedding=REFERENCES), "called 2 times")
    assert leftovers(reused, X)[:2] == before[:2]
    if maps is not None:
        close(maps, expected, rtol=1e-6, atol=1e-9)


def test_a_residual_network_is_explained_at_its_last_stage_and_refused_before():
    model, x, s = seeded(torchvision.models.resnet18), random(2, 3, 64, 64), random(1, 1000)
    z, A = arrays(model, x, layer=model.layer4)
    maps = RelevanceCam(model, model.layer4).attribute(x, reference_embedding=s)
    for b in range(2):
        c = oracle.contributions(z[b], s[0].numpy(), "cosine")
        alpha = A[b].mean((1, 2)) * (model.fc.weight.detach().numpy().T @ (c / z[b]))
        close(maps[b, 0], oracle.aligned_map(alpha, A[b]), rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match=r"LRP cannot follow.*Add"):
        RelevanceCam(model, model.layer3).attribute(x, reference_embedding=s)


def test_relevance_through_a_plain_network_in_place_is_that_out_of_place():
    build = lambda inplace: nn.Sequential(  # noqa: E731
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 5), nn.ReLU(inplace), nn.Dropout(0.5, inplace), nn.Linear(5, 6)),
    )
    for i in (0, 2, 3, 5):  # those into whose output nothing writes
        maps = [
            RelevanceCam(model, model[i]).attribute(X, 1, reference_embedding=REFERENCES)
            for model in (seeded(lambda: build(True)), seeded(lambda: build(False)))
        ]
        close(*maps)


def test_an_encoder_that_is_no_module_is_refused():
    encoder = seeded(PooledEncoder)
    for forward_func in (lambda x: encoder(x), SimilarityScore(lambda x: encoder(x), REFERENCES)):
        with pytest.raises(TypeError, match=r"RelevanceCam needs.*torch.nn.Module.*function"):
            RelevanceCam(forward_func, encoder.layer).attribute(
                X, 1, reference_embedding=None if isinstance(forward_func, SimilarityScore) else REFERENCES
            )


def test_a_layer_with_several_tensors_is_refused():
    two = seeded(TwoInputEncoder)
    with pytest.raises(ValueError, match=r"one tensor.*'layer' \(Pair\)"):
        RelevanceCam(two, two.layer).attribute((X, X[:, :1]), reference_embedding=random(1, 3))


def test_relevance_under_inference_mode_is_refused_with_the_cure():
    encoder = seeded(PooledEncoder)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*torch.no_grad\(\)"):
        RelevanceCam(encoder, encoder.layer).attribute(X, 1, reference_embedding=REFERENCES)


def test_user_inputs_are_unchanged_by_lrp():
    encoder, x = seeded(Plain), X.clone()
    for requires_grad in (False, True):
        x.requires_grad_(requires_grad)
        before = state(encoder, x)
        RelevanceCam(encoder, encoder.conv1).attribute(x, 1, None, True, reference_embedding=random(4, 4))
        assert state(encoder, x) == before
        assert torch.equal(x, X)


def test_relevances_of_bytes_are_refused_with_the_cure():
    encoder = seeded(OfBytes)
    with pytest.raises(TypeError, match=r"inputs\.float\(\)"):
        RelevanceCam(encoder, encoder.layer).attribute(torch.ones(1, 3, 12, 12, dtype=torch.uint8), reference=X[:1])


def test_relevances_of_more_references_than_dimensions_are_those_one_by_one():
    encoder, s = seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Flatten())), random(9, 6)
    cam = RelevanceCam(encoder, encoder.conv2)
    maps = cam.attribute_all(X, reference_embedding=s)
    for k in range(9):
        close(maps[:, k : k + 1], cam.attribute(X, k, reference_embedding=s), rtol=1e-6, atol=1e-10)


class Cut(PooledEncoder):
    def forward(self, x):
        return self.head(self.features(x).detach()).flatten(2).mean(2)

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(6, 6, 1)


def test_lrp_says_that_the_gradient_is_cut():
    encoder = seeded(Cut)
    with pytest.raises(ValueError, match=r"LRP cannot follow.*cut of the gradient"):
        RelevanceCam(encoder, encoder.layer).attribute(X, reference_embedding=random(1, 6))


@pytest.mark.filterwarnings("ignore:Relevances")
def test_relevances_that_are_not_finite_give_zero_maps():
    class Infinite(EpsilonRule):
        def _create_backward_hook_output(self, outputs):
            return lambda grad: grad * torch.inf

    encoder = seeded(lambda: Unbiased(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    encoder.conv2.rule = Infinite()
    with pytest.warns(UserWarning, match="Relevances of layer 'relu'"):
        maps = RelevanceCam(encoder, encoder.relu).attribute(X, 1, reference_embedding=REFERENCES)
    assert not maps.any()


@pytest.mark.parametrize("kind", [PooledEncoder, PlainClassifier])
def test_a_forgotten_reference_is_an_error_also_for_a_classifier(kind):
    model = seeded(kind)
    cam, before = RelevanceCam(model, model.layer), leftovers(model, X)
    for call in (lambda: cam.attribute(X, 1), lambda: cam.attribute(X), lambda: cam.attribute_all(X)):
        with pytest.raises(ValueError, match=r"exactly one of `reference`.*got none.*torch\.eye"):
            call()
    assert leftovers(model, X) == before


def test_a_module_without_a_rule_is_told_with_what_to_do():
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6)]
    encoder = nn.Sequential(*layers).double()
    with pytest.raises(ValueError, match=r"LRP has no rule for a module after layer .*LayerNorm.*Decomposition"):
        RelevanceCam(encoder, encoder[1]).attribute(X, 0, reference_embedding=REFERENCES)
