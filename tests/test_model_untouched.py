"""What a call leaves behind, records and disturbs: nothing, not even when it fails."""

import contextlib
import gc
import itertools
import threading
import weakref

import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, ResidualEncoder, random, seeded
from helpers import close
from torch import nn

from captum_fam import FeatureActivationMap, SimilarityScore

INPUTS = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)
ROUTES = ["aligned", "auto", "jacobian"]
CALLS = {
    "attribute": lambda fam, x: fam.attribute(x, 1, reference_embedding=REFERENCES),
    "attribute_to_layer_input": lambda fam, x: fam.attribute(x, 1, None, True, reference_embedding=REFERENCES),
    "attribute_reference": lambda fam, x: fam.attribute(x, reference=x),
    "attribute_all": lambda fam, x: fam.attribute_all(x, reference_embedding=REFERENCES),
    "attribute_many": lambda fam, x: fam.attribute_all(x, reference_embedding=random(40, 6)),  # more than dimensions
    "attribute_self": lambda fam, x: fam.attribute_all(x, reference_embedding=REFERENCES, contrast="self"),
    "attribute_threshold": lambda fam, x: fam.attribute(x, 1, reference_embedding=REFERENCES, threshold=0.3),
    "attribute_pair": lambda fam, x: fam.attribute_pair(x, x.flip(0)),
    "embed": lambda fam, x: fam.embed(x),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
each_route = pytest.mark.parametrize("route", ROUTES)


class NormEncoder(PooledEncoder):
    """Batch norm and dropout before the layer; D = C."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.dropout(self.norm(x)))


class ScaledEncoder(PooledEncoder):
    """A buffer that the embedding is multiplied by."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) * self.scale


class LateNormEncoder(HeadEncoder):
    """Batch norm before and after the layer, and a projection head."""

    def __init__(self):
        super().__init__(embedding=6)
        self.norm, self.late_norm = nn.BatchNorm2d(3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.head(self.late_norm(self.features(self.norm(x))).flatten(2).mean(2))


def explainer(encoder, **options):
    return FeatureActivationMap(encoder, encoder.layer, **options)


def state(model, *tensors):
    """All that a call might change: hooks, flags, gradients and values."""
    hooks = [
        (name, list(hooks))
        for owner in [*model.modules(), *model.parameters(), *tensors]
        for name, hooks in [
            *vars(owner).items(),
            ("tensor", owner._backward_hooks if isinstance(owner, torch.Tensor) else None),
        ]
        if isinstance(hooks, dict) and (name.endswith("hooks") or "hooks_" in name or name == "tensor")
    ]
    leaves = [*model.parameters(), *model.buffers(), *tensors]
    flags = [(t.requires_grad, t.is_leaf, id(t.grad), None if t.grad is None else t.grad.tolist()) for t in leaves]
    values = {name: value.tolist() for name, value in model.state_dict().items()}
    return (
        hooks,
        flags,
        values,
        [t.tolist() for t in tensors],
        [m.training for m in model.modules()],
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype()),
    )


def autocast_dtype():
    """Of products on the CPU; what says whether autocast is on differs between versions of torch."""
    return torch.ones(1, 1).mm(torch.ones(1, 1)).dtype


def users_model(build=NormEncoder, training=False):
    """A model as a user may hand it over: hooked, partly frozen, with a gradient that is awaited."""
    model = seeded(build).train(training)
    model.layer.register_forward_hook(lambda *_: None)
    model.conv2.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    return model


@each_call
@each_route
def test_a_call_leaves_model_inputs_and_gradient_mode_as_they_were(call, route):
    model = users_model()
    fam = explainer(model, channel_weights=route)
    for grad_enabled, requires_grad in itertools.product((True, False), (True, False)):
        x = INPUTS.clone().requires_grad_(requires_grad)
        with torch.set_grad_enabled(grad_enabled):
            before, own = state(model, x), dict(vars(fam))
            call(fam, x)
            assert state(model, x) == before
            assert vars(fam) == own


@each_call
@each_route
@pytest.mark.filterwarnings("ignore:The model is in training mode")
def test_running_statistics_of_a_model_in_training_mode_stay(call, route):
    model = users_model(training=True)
    before = state(model, INPUTS)
    call(explainer(model, channel_weights=route), INPUTS)
    assert state(model, INPUTS) == before


@pytest.mark.filterwarnings("ignore:The model is in training mode")
@pytest.mark.parametrize("build", [LateNormEncoder, ScaledEncoder])
@each_call
def test_buffers_that_are_used_after_the_layer_in_training_mode_do_not_hinder_the_gradient(call, build):
    model = users_model(build, training=True)
    before = state(model, INPUTS)
    call(explainer(model, channel_weights="jacobian"), INPUTS)
    assert state(model, INPUTS) == before


@pytest.mark.filterwarnings("ignore:The model is in training mode")
@pytest.mark.parametrize("call", ["attribute", "embed"])
def test_buffers_that_a_forward_pass_replaces_in_training_mode_stay(call):
    class Centre(PooledEncoder):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(6))

        def forward(self, x):
            z = super().forward(x)
            if self.training:
                self.centre = 0.9 * self.centre + 0.1 * z.detach().mean(0)
            return z

    model = seeded(Centre).train()
    CALLS[call](explainer(model), INPUTS)
    assert not model.centre.any()


@pytest.mark.parametrize("route", ["auto", "jacobian"])
@pytest.mark.parametrize("build", [HeadEncoder, ResidualEncoder])
def test_inputs_that_are_the_explained_layer_input_are_as_they_were(build, route):
    model = seeded(lambda: build(channels=6))
    fam = FeatureActivationMap(model, next(model.children()), channel_weights=route)
    for requires_grad, fails in itertools.product((True, False), (True, False)):
        x = INPUTS.clone().requires_grad_(requires_grad)
        before = state(model, x)
        with contextlib.suppress(ValueError):
            D = 2 if fails else model(x).shape[1]
            fam.attribute(x, 0, None, True, reference_embedding=random(1, D))
            assert not fails
        assert state(model, x) == before


@pytest.mark.filterwarnings("ignore:The model is in training mode")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [LateNormEncoder, ScaledEncoder])
@each_call
@each_route
def test_a_backward_pass_of_the_users_that_waits_gives_the_gradients_that_it_would_have_given(
    call, route, build, training
):
    undisturbed, model = (seeded(build).train(training) for _ in range(2))
    expected = torch.autograd.grad(undisturbed(INPUTS).square().sum(), list(undisturbed.parameters()))
    waiting = model(INPUTS).square().sum()
    call(explainer(model, channel_weights=route), INPUTS)
    close(torch.autograd.grad(waiting, list(model.parameters())), expected)


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


class Fault:
    """Raises ``error`` when it is called for the ``at``-th time; otherwise returns what it is given."""

    def __init__(self, error, at=1):
        self.error, self.left = error, at

    def __call__(self, value, *_):
        self.left -= 1
        if not self.left:
            raise self.error
        return value


class Fragile(NormEncoder):
    """An encoder whose early ReLU, layer or end may fail or be left out."""

    early_fault = late_fault = end = staticmethod(lambda value: value)

    def forward(self, x):
        features = self.features(self.norm(self.early_fault(x)))
        return self.end(self.late_fault(features).flatten(2).mean(2))


def fragile(**attributes):
    model = users_model(Fragile)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def bypassing_its_layer():
    model = fragile()
    model.features = lambda x: model.conv2(model.early(model.conv1(x)))
    return model


# A model, options of the explainer, and the error that they cause.
FAILURES = {
    "before the layer": lambda: (fragile(early_fault=Fault(OSError("disk"))), {}, OSError),
    "after the layer": lambda: (fragile(late_fault=Fault(OSError("disk"))), {}, OSError),
    "interrupt before the layer": lambda: (fragile(early_fault=Fault(Stop())), {}, Stop),
    "interrupt after the layer": lambda: (fragile(late_fault=Fault(Stop())), {}, Stop),
    "interrupt in the second pass": lambda: (fragile(late_fault=Fault(Stop(), at=2)), {}, Stop),
    "output of a wrong shape": lambda: (fragile(end=lambda z: z[..., None]), {}, ValueError),
    "output of a wrong type": lambda: (fragile(end=lambda z: {"z": z}), {}, TypeError),
    "output of a wrong batch": lambda: (fragile(end=lambda z: z[:2]), {}, ValueError),
    "layer not called": lambda: (bypassing_its_layer(), {}, ValueError),
    "output_selector": lambda: (fragile(), {"output_selector": Fault(OSError("disk"))}, OSError),
    "reshape_transform": lambda: (fragile(), {"reshape_transform": Fault(OSError("disk"))}, OSError),
    "second reshape_transform": lambda: (fragile(), {"reshape_transform": Fault(Stop(), at=2)}, Stop),
    "similarity": lambda: (fragile(), {"similarity": Fault(OSError("disk"))}, OSError),
    "interrupt in similarity": lambda: (fragile(), {"similarity": Fault(Stop())}, Stop),
    "similarity of a wrong shape": lambda: (fragile(), {"similarity": lambda z, s: (z * s).sum(-1)}, ValueError),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
@each_call
def test_a_failed_call_leaves_model_inputs_and_gradient_mode_as_they_were(failure, call):
    for route, grad_enabled in itertools.product(("aligned", "jacobian"), (True, False)):
        (model, options, error), x = failure(), INPUTS.clone()
        fam = explainer(model, channel_weights=route, **options)
        with torch.set_grad_enabled(grad_enabled):
            before, own = state(model, x), dict(vars(fam))
            # Not every call meets every failure; the next test shows that none is swallowed.
            with contextlib.suppress(error):
                call(fam, x)
            assert state(model, x) == before
            assert vars(fam) == own


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_reaches_the_caller(failure):
    model, options, error = failure()
    with pytest.raises(error):
        explainer(model, channel_weights="jacobian", **options).attribute_pair(INPUTS, INPUTS)


@each_route
@pytest.mark.parametrize("error", [ValueError("mine"), RuntimeError("mine"), OSError("mine"), Stop("mine")], ids=repr)
@pytest.mark.parametrize("fault", ["early_fault", "late_fault"])
@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_many", "attribute_pair"])
def test_an_encoder_that_fails_is_run_once_and_its_own_error_is_seen(call, fault, error, route):
    passes = []

    def fail(value):
        passes.append(1)
        raise error

    with pytest.raises(type(error)) as seen:
        CALLS[call](explainer(fragile(**{fault: fail}), channel_weights=route), INPUTS)
    assert seen.value is error
    assert len(passes) == 1


def test_a_layer_that_fails_itself_keeps_no_hook():
    class Failing(nn.Module):
        def forward(self, x):
            raise Stop

    model = fragile()
    model.layer = Failing()
    for layer_input in (False, True):
        before = state(model, INPUTS)
        with pytest.raises(Stop):
            explainer(model).attribute(INPUTS, 1, None, layer_input, reference_embedding=REFERENCES)
        assert state(model, INPUTS) == before


class Trace:
    """What an activation's memory, or a graph, holds on to; weakly referred to, it tells whether they are alive."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trace):
        ctx.trace = trace
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class TracedEncoder(PooledEncoder):
    """The graph from its layer on holds a Trace; ``traces`` refers to it weakly."""

    def __init__(self):
        super().__init__()
        self.traces = []

    def forward(self, x):
        features, trace = self.features(x), Trace()
        self.traces.append(weakref.ref(trace))
        return Marked.apply(features, trace).flatten(2).mean(2)


@pytest.mark.parametrize("fails", [False, True], ids=["successful", "failed"])
@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_no_graph_outlives_a_call(call, fails):
    encoder, seen_alive = seeded(TracedEncoder), []

    def similarity(z, s):
        seen_alive.append(encoder.traces[0]() is not None)
        if fails:
            raise OSError
        return z * s

    fam = explainer(encoder, channel_weights="jacobian", similarity=similarity)
    try:
        maps = CALLS[call](fam, INPUTS)
    except OSError:
        maps = None
    gc.collect()
    assert seen_alive[0]  # so the traces tell a living graph
    assert [trace() for trace in encoder.traces] == [None] * len(encoder.traces)
    assert (maps is None) == fails


class GradModeEncoder(PooledEncoder):
    """Notes the gradient mode before its layer, and after it."""

    def __init__(self, embedding=None):
        super().__init__()
        self.head = nn.Linear(6, embedding) if embedding else nn.Identity()
        self.before, self.after = [], []
        self.conv1.register_forward_pre_hook(lambda *_: self.before.append(torch.is_grad_enabled()))
        self.layer.register_forward_pre_hook(lambda *_: self.before.append(torch.is_grad_enabled()))
        self.head.register_forward_pre_hook(lambda *_: self.after.append(torch.is_grad_enabled()))

    def forward(self, x):
        return self.head(super().forward(x))


@each_call
@each_route
@pytest.mark.parametrize("requires_grad", [True, False], ids=["inputs_with_grad", "inputs_without"])
def test_gradient_mode_is_off_before_the_layer_and_with_aligned_weights_everywhere(call, route, requires_grad):
    encoder = seeded(GradModeEncoder)
    call(explainer(encoder, channel_weights=route), INPUTS.clone().requires_grad_(requires_grad))
    before_layer_input = call is CALLS["attribute_to_layer_input"] and route != "aligned"
    assert not any(encoder.before[::2] if before_layer_input else encoder.before)
    if route == "aligned" or call is CALLS["embed"]:
        assert not any(encoder.after)
    else:
        assert encoder.after[-1]


def packed_sizes(function):
    """Sizes of all tensors that are saved for backward while the function runs."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sizes


def wide_then_narrow(early):
    """An encoder with ``early`` channels before its layer, the sigmoid, and few after it; D = C = 2."""
    return seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, early, 3), nn.ReLU(), nn.Conv2d(early, 2, 3), nn.Sigmoid()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
    )


@pytest.mark.parametrize("call", ["attribute", "attribute_to_layer_input", "attribute_all", "attribute_pair"])
def test_nothing_is_saved_for_backward_with_aligned_weights(call):
    fam = explainer(seeded(PooledEncoder), channel_weights="aligned")
    assert packed_sizes(lambda: CALLS[call](fam, INPUTS.clone().requires_grad_())) == []


@pytest.mark.parametrize("layer_input", [False, True])
@pytest.mark.parametrize("route", ["auto", "jacobian"])
def test_what_is_saved_for_backward_does_not_depend_on_what_is_before_the_layer(route, layer_input):
    references = random(1, 2)

    def saved(early):
        encoder = wide_then_narrow(early)
        fam = FeatureActivationMap(encoder, encoder[3], channel_weights=route)
        x = INPUTS.clone().requires_grad_()
        return packed_sizes(lambda: fam.attribute(x, 0, None, layer_input, reference_embedding=references))

    assert sum(saved(50)) == sum(saved(2)) <= 2 * 3 * 2 * 4 * 4  # of the sigmoid, at most, in and out


def test_a_reference_and_an_embedding_are_not_recorded_at_all():
    fam = explainer(seeded(HeadEncoder))
    assert packed_sizes(lambda: fam.embed(INPUTS.clone().requires_grad_())) == []
    z = fam.embed(INPUTS)
    inputs_only = packed_sizes(lambda: fam.attribute(INPUTS, 0, reference_embedding=z))
    assert sum(packed_sizes(lambda: fam.attribute(INPUTS, 0, reference=INPUTS))) == sum(inputs_only) > 0


class Counted(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.layer, self.calls = encoder, encoder.layer, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.encoder(*inputs)


@each_route
@pytest.mark.parametrize(
    ("call", "passes"),
    [
        (lambda fam: fam.attribute(INPUTS, 3, reference_embedding=REFERENCES), 1),
        (lambda fam: fam.attribute(INPUTS, 3, reference_embedding=REFERENCES, contrast="rest"), 1),
        (lambda fam: fam.attribute(INPUTS, 0, None, True, reference_embedding=REFERENCES), 1),
        (lambda fam: fam.attribute_all(INPUTS, reference_embedding=random(1000, 6)), 1),
        (lambda fam: fam.attribute_all(INPUTS, reference_embedding=random(1000, 6), contrast="rest"), 1),
        (lambda fam: fam.embed(INPUTS), 1),
        (lambda fam: fam.attribute(INPUTS, reference=INPUTS), 2),
        (lambda fam: fam.attribute_all(INPUTS, reference=INPUTS), 2),
        (lambda fam: fam.attribute_pair(INPUTS, INPUTS), 2),
        (lambda fam: fam.attribute_pair(INPUTS, INPUTS[:1]), 2),
    ],
    ids=[
        "attribute", "attribute_contrast", "attribute_to_layer_input", "attribute_all", "attribute_all_contrast",
        "embed", "attribute_reference", "attribute_all_reference", "attribute_pair", "attribute_pair_shared",
    ],
)  # fmt: skip
def test_inputs_and_references_take_one_forward_pass_each(call, passes, route):
    counted = Counted(seeded(PooledEncoder))
    call(explainer(counted, channel_weights=route))
    assert counted.calls == passes


def test_a_list_of_layers_takes_one_forward_pass():
    counted = Counted(seeded(PooledEncoder))
    layers = [counted.encoder.early, counted.encoder.conv2, counted.encoder.layer]
    FeatureActivationMap(counted, layers).attribute_all(INPUTS, reference_embedding=random(1000, 6))
    assert counted.calls == 1


def test_the_references_of_a_score_take_no_forward_pass():
    counted = Counted(seeded(PooledEncoder))
    explainer_of_score = FeatureActivationMap(SimilarityScore(counted, REFERENCES), counted.layer)
    explainer_of_score.attribute(INPUTS, 2)
    assert counted.calls == 1


class StepEncoder(nn.Module):
    """A stem, the layer within a step ``(x, layer) -> x``, and a head (none: D = C)."""

    def __init__(self, step, layer, head):
        super().__init__()
        self.stem, self.layer, self.step = nn.Conv2d(3, 5, 3, padding=1), layer(), step
        self.head = nn.Linear(5, 4) if head else nn.Identity()

    def forward(self, x):
        return self.head(self.step(self.stem(x), self.layer).mean((2, 3)))


def convolution():
    return nn.Conv2d(5, 5, 3, padding=1)


def minus_(x, y):
    x -= y
    return x


# A layer and two steps that compute the same, the first in place.
STEPS = {
    "relu_": (convolution, lambda x, layer: layer(x).relu_(), lambda x, layer: layer(x).relu()),
    "nn.ReLU": (convolution, lambda x, layer: nn.ReLU(inplace=True)(layer(x)), lambda x, layer: nn.ReLU()(layer(x))),
    "output -= input": (convolution, lambda x, layer: minus_(layer(x), x), lambda x, layer: layer(x) - x),
    "input -= output": (convolution, lambda x, layer: minus_(x, layer(x)), lambda x, layer: x - layer(x)),
    "input -= output of a layer that passes its input through": (
        nn.Identity, lambda x, layer: minus_(x, layer(x).tanh()), lambda x, layer: x - layer(x).tanh(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer_input", [False, True], ids=["layer_output", "layer_input"])
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
@pytest.mark.parametrize("step", STEPS)
def test_changes_in_place_after_the_layer_do_not_change_the_map(step, route, layer_input):
    layer, *steps = STEPS[step]
    references = random(1, 4 if route == "jacobian" else 5)
    in_place, out_of_place = (
        explainer(seeded(lambda s=s: StepEncoder(s, layer, route == "jacobian")), channel_weights=route).attribute(
            INPUTS, 0, None, layer_input, reference_embedding=references
        )
        for s in steps
    )
    close(in_place, out_of_place)


@pytest.mark.parametrize("layer_input", [False, True], ids=["layer_output", "layer_input"])
@each_route
def test_a_model_whose_layer_itself_works_in_place_has_the_same_maps(route, layer_input):
    in_place, out_of_place = (
        explainer(seeded(lambda i=i: HeadEncoder(embedding=6, inplace=i)), channel_weights=route).attribute(
            INPUTS, 1, None, layer_input, reference_embedding=REFERENCES
        )
        for i in (True, False)
    )
    close(in_place, out_of_place)


@each_call
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_channels_last_memory_does_not_change_the_maps(call, route):
    model, x = seeded(lambda: HeadEncoder(embedding=6)), INPUTS
    plain = call(explainer(model, channel_weights=route), x)
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    close(call(explainer(model, channel_weights=route), x), plain)


@each_call
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_frozen_parameters_do_not_change_the_maps(call, route):
    model = seeded(lambda: HeadEncoder(embedding=6))
    plain = call(explainer(model, channel_weights=route), INPUTS)
    close(call(explainer(model.requires_grad_(False), channel_weights=route), INPUTS), plain)


@each_call
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_no_grad_does_not_change_the_maps(call, route):
    fam = explainer(seeded(lambda: HeadEncoder(embedding=6)), channel_weights=route)
    plain = call(fam, INPUTS)
    with torch.no_grad():
        close(call(fam, INPUTS), plain)


@pytest.mark.parametrize(
    ("call", "route"),
    [*((call, "aligned") for call in CALLS), ("attribute_reference", "auto"), ("attribute_all", "auto")],
)
def test_inference_mode_does_not_change_aligned_maps(call, route):
    call = CALLS[call]
    fam = explainer(seeded(PooledEncoder), channel_weights=route)
    plain = call(fam, INPUTS)
    with torch.inference_mode():
        close(call(fam, INPUTS), plain)


def inside(context, method):
    """The method, run inside a context such as torch.no_grad()."""

    def run(*args):
        with context():
            return method(*args)

    return run


@pytest.mark.parametrize("route", ["auto", "jacobian"])
@pytest.mark.parametrize("call", ["attribute", "attribute_to_layer_input", "attribute_all", "attribute_pair"])
def test_inference_mode_is_refused_where_a_gradient_is_needed(call, route):
    model = seeded(lambda: HeadEncoder(embedding=6))
    before = state(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\).*torch.no_grad\(\)"):
        CALLS[call](explainer(model, channel_weights=route), INPUTS)
    assert state(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_encoder_that_switches_gradients_off_has_the_same_aligned_maps(context):
    model = seeded(PooledEncoder)
    plain = explainer(model).attribute(INPUTS, reference=INPUTS)
    model.forward = inside(context, model.forward)
    close(explainer(model).attribute(INPUTS, reference=INPUTS), plain)


def test_an_encoder_that_runs_as_a_whole_under_no_grad_has_the_same_jacobian_maps():
    model = seeded(HeadEncoder)
    plain = explainer(model).attribute(INPUTS, reference=INPUTS.flip(0))
    model.forward = inside(torch.no_grad, model.forward)
    close(explainer(model).attribute(INPUTS, reference=INPUTS.flip(0)), plain)


def test_an_encoder_that_cuts_the_gradient_after_its_layer_has_a_zero_map_and_says_why():
    model = seeded(HeadEncoder)
    model.features = inside(torch.no_grad, model.features)
    with pytest.warns(UserWarning, match=r"layer 'layer' \(ReLU\).*cuts the gradient.*its map is zero"):
        maps = explainer(model).attribute(INPUTS, reference=INPUTS.flip(0))
    assert not maps.any()


@pytest.mark.parametrize("part", ["forward", "features", "head"])
def test_an_encoder_that_runs_under_inference_mode_is_refused_where_a_gradient_is_needed(part):
    model = seeded(HeadEncoder)
    module = model if part != "head" else model.head
    name = part if part != "head" else "forward"
    setattr(module, name, inside(torch.inference_mode, getattr(module, name)))
    before = state(model)
    with pytest.raises(RuntimeError, match="inference_mode"):
        explainer(model).attribute(INPUTS, reference=INPUTS.flip(0))
    assert state(model) == before


@pytest.mark.parametrize("layer_input", [False, True], ids=["layer_output", "layer_input"])
def test_inputs_made_under_inference_mode_have_the_same_maps(layer_input):
    model = seeded(lambda: HeadEncoder(embedding=6))
    fam = FeatureActivationMap(model, model.conv1)
    plain = fam.attribute(INPUTS.clone(), 1, None, layer_input, reference_embedding=REFERENCES)
    with torch.inference_mode():
        made_there = INPUTS.clone()
    close(fam.attribute(made_there, 1, None, layer_input, reference_embedding=REFERENCES), plain)


@each_call
@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_autocast_gives_the_maps_but_for_rounding(call, route):
    fam = explainer(seeded(lambda: HeadEncoder(embedding=6)).float(), channel_weights=route)
    plain = call(fam, INPUTS.float())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = call(fam, INPUTS.float())
        assert autocast_dtype() == torch.bfloat16
    pairs = zip(rounded, plain, strict=True) if isinstance(plain, tuple) else [(rounded, plain)]
    for a, b in pairs:
        assert (a.float() - b).norm() < 0.05 * b.norm()


class Rendezvous(HeadEncoder):
    """Before and after its layer, ``meet(name)`` may hold a thread until another one is there."""

    meet = staticmethod(lambda place: None)

    def forward(self, x):
        x = self.conv2(self.early(self.conv1(x)))
        self.meet("before")
        x = self.layer(x)
        self.meet("after")
        return self.head(x.mean((2, 3)))


def in_threads(*functions):
    """The results of functions that run at once, each in a thread of its own."""
    start, results = threading.Barrier(len(functions)), [None] * len(functions)

    def run(i):
        start.wait(10)
        try:
            results[i] = functions[i]()
        except Exception as error:  # re-raised where the test can show it
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("routes", [("jacobian", "jacobian"), ("aligned", "jacobian"), ("aligned", "aligned")])
def test_two_threads_in_the_same_layer_at_once_each_explain_their_own_input(routes):
    model = seeded(lambda: Rendezvous(embedding=6))
    inputs = [INPUTS, INPUTS.flip(0) * 2]
    fams = [explainer(model, channel_weights=route) for route in routes]
    calls = [lambda i=i: fams[i].attribute(inputs[i], i, reference_embedding=REFERENCES) for i in range(2)]
    alone = [call() for call in calls]
    both = threading.Barrier(2)
    model.meet = lambda place: both.wait(10)
    close(in_threads(*calls), alone)
    assert state(model)[0] == state(seeded(lambda: Rendezvous(embedding=6)))[0]


@pytest.mark.parametrize("route", ["aligned", "jacobian"])
def test_a_plain_forward_pass_in_another_thread_is_neither_explained_nor_changed(route):
    model = seeded(lambda: Rendezvous(embedding=6))
    fam, other = explainer(model, channel_weights=route), INPUTS.flip(0) * 2
    alone, plain = fam.attribute(INPUTS, 1, reference_embedding=REFERENCES), model(other)
    explained, done, names = threading.Event(), threading.Event(), {}

    def meet(place):
        """The plain pass goes through the layer when the explained one has just been there."""
        is_plain = names.get(threading.get_ident()) == "plain"
        if is_plain and place == "before":
            assert explained.wait(10)
        if not is_plain and place == "after":
            explained.set()
            assert done.wait(10)

    def forward():
        names[threading.get_ident()] = "plain"
        with torch.no_grad():
            z = model(other)
        done.set()
        return z

    model.meet = meet
    maps, z = in_threads(lambda: fam.attribute(INPUTS, 1, reference_embedding=REFERENCES), forward)
    close(maps, alone)
    close(z, plain.detach())
    assert not z.requires_grad


def test_two_threads_can_explain_the_layer_input_that_they_share():
    model, x = seeded(lambda: HeadEncoder(embedding=6)), INPUTS.clone()
    alone = FeatureActivationMap(model, model.conv1).attribute(x, 1, None, True, reference_embedding=REFERENCES)
    first_ran, second_ran, first_done = (threading.Event() for _ in range(3))

    def explain(ran, awaited):
        def cosine(z, s):  # called between the forward pass and the gradient
            ran.set()
            assert awaited.wait(10)
            return nn.functional.normalize(z, dim=-1) * nn.functional.normalize(s, dim=-1)

        fam = FeatureActivationMap(model, model.conv1, similarity=cosine)
        return fam.attribute(x, 1, None, True, reference_embedding=REFERENCES)

    def first():
        maps = explain(first_ran, second_ran)
        first_done.set()
        return maps

    def second():
        assert first_ran.wait(10)
        return explain(second_ran, first_done)

    close(in_threads(first, second), [alone, alone])
    assert not x.requires_grad


def test_many_calls_in_many_threads_each_give_their_own_result():
    model = seeded(lambda: HeadEncoder(embedding=6))

    def work(i):
        x = random(2, 3, 6, 6, seed=10 + i)
        layer = [model.layer, model.early, [model.conv2, model.layer], model.conv1][i % 4]
        route = "aligned" if i in (0, 4) else "jacobian"
        fam = FeatureActivationMap(model, layer, channel_weights=route, similarity=["cosine", "dot"][i % 2])
        if i == 7:
            return [model(x).detach() for _ in range(20)]
        return [
            fam.attribute(x, i % 4, None, i == 3, reference_embedding=REFERENCES),
            fam.attribute_all(x, reference=random(3, 3, 6, 6, seed=i)),
            fam.attribute_pair(x, x.flip(0)),
            *[fam.attribute(x, k % 4, reference_embedding=REFERENCES) for k in range(6)],
        ]

    alone = [work(i) for i in range(8)]
    close(in_threads(*[lambda i=i: work(i) for i in range(8)]), alone)
    assert not any(hooks for m in model.modules() for name, hooks in vars(m).items() if name.endswith("_hooks"))
