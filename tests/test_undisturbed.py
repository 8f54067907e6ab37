"""A call among the user's own work: models behind any callable, backward passes that wait, threads, torch.compile."""

import functools
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, random, seeded
from helpers import close, silent
from test_model_untouched import LateNormEncoder, NormEncoder, Stop, in_threads
from torch import nn
from torch.nn.modules import module as torch_module

from captum_fam import (
    ClassActivationMap,
    CorrespondenceMap,
    FeatureActivationMap,
    IntegratedDecomposition,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
    compare_attributions,
    explain_episode,
)
from captum_fam.metrics import cascading_randomization, deletion, reference_dependence

INPUTS, REFERENCES = random(3, 3, 8, 8), random(4, 6, seed=2)
PLACES = random(3, 1, 8, 8, seed=3)
HELD = {}


class Slots:
    __slots__ = ("model",)

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x)


class Pipeline:
    def __init__(self, model):
        self.model = model

    def embed(self, x):
        return self.model(x)


def held_by_name(x):
    return HELD["models"][0](x)


def in_a_global(model):
    HELD["models"] = [model]
    return held_by_name


def by_a_weak_reference(model):
    model = weakref.ref(model)
    return lambda x: model()(x)


def from_a_cache(model):
    cache = functools.lru_cache(lambda: model)
    cache()
    return lambda x: cache()(x)


class Hidden(nn.Module):
    """Not among its children."""

    def __init__(self, model):
        super().__init__()
        self.models = [model]

    def forward(self, x):
        return self.models[0](x)


def decorated(model):
    @functools.wraps(model.forward)
    def embed(*args):
        return model(*args)

    return embed


WRAPPED = {
    "module": lambda model: model,
    "forward": lambda model: model.forward,
    "lambda": lambda model: lambda x: model(x),
    "lambda of forward": lambda model: lambda x: model.forward(x),
    "partial": lambda model: functools.partial(model),
    "partial of a lambda": lambda model: functools.partial(lambda a, x: model(x), 1),
    "argument of a partial": lambda model: functools.partial(lambda model, x: model(x), model),
    "default": lambda model: lambda x, model=model: model(x),
    "method": lambda model: Pipeline(model).embed,
    "object with slots": Slots,
    "namespace": lambda model: types.SimpleNamespace(f=types.SimpleNamespace(m=model)).f.m.__call__,
    "dict": lambda model: functools.partial(lambda models, x: models["a"](x), {"a": model}),
    "global": in_a_global,
    "decorated": decorated,
    "weak reference": by_a_weak_reference,
    "cached": from_a_cache,
    "hidden": Hidden,
    "nested": lambda model: (lambda f: lambda x: f(x))(lambda x: model(x)),
    "through another module": lambda model: lambda x: nn.Identity()(model(nn.Identity()(x))),
}
each_wrap = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())


def buffers(*models):
    return [(name, id(b), b.clone()) for model in models for name, b in model.named_buffers()]


def unchanged(before, *models):
    after = buffers(*models)
    assert [name for name, *_ in after] == [name for name, *_ in before]
    assert all(i == j and torch.equal(a, b) for (_, i, a), (_, j, b) in zip(after, before))


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in found]


class Queue(HeadEncoder):
    """In evaluation, too, counts in place and replaces its queue; ``embed`` is another way in."""

    def __init__(self):
        super().__init__(embedding=6)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("queue", torch.zeros(4, 6))

    def forward(self, x):
        self.count += 1
        z = super().forward(x)
        self.queue = torch.cat([z.detach(), self.queue])[:4]
        return z

    def embed(self, x):
        return self.forward(x)


class Counting(Queue):
    """Its embedding depends on the count, and it takes no more rows after the layer than before it."""

    def forward(self, x):
        return super().forward(x).reshape(len(x), 6) * self.count


@each_wrap
@pytest.mark.parametrize("call", ["attribute", "embed", "n_steps", "relax", "deletion"])
def test_a_model_in_training_mode_behind_any_callable_stays_and_warns_as_itself(call, wrap):
    def run(func, model):
        layer = model.layer if call != "n_steps" else model.conv1
        if call == "relax":
            return Relax(func, n_samples=3).attribute(INPUTS, 0, reference_embedding=REFERENCES)
        if call == "deletion":
            return deletion(SimilarityScore(func, REFERENCES), INPUTS, PLACES, target=0).scores
        fam = SimilarityDecomposition(func, layer, n_steps=2 if call == "n_steps" else None)
        return fam.embed(INPUTS) if call == "embed" else fam.attribute(INPUTS, 0, reference_embedding=REFERENCES)

    plain, model = (seeded(LateNormEncoder).train() for _ in range(2))
    expected, told = caught(lambda: run(plain, plain))
    before, func = buffers(model), wrap(model)
    found, said = caught(lambda: run(func, model))
    unchanged(before, model)
    close(found, expected)
    of_training = [text for text in told if "training mode" in text]
    assert [text for text in said if "training mode" in text] == of_training
    assert len(of_training) == (call != "embed")


@each_wrap
def test_dropout_behind_any_callable_is_warned_of(wrap):
    model = seeded(NormEncoder)
    model.dropout.train()
    with pytest.warns(UserWarning, match="training mode and has dropout"):
        FeatureActivationMap(wrap(model), model.layer).attribute(INPUTS, reference=INPUTS)


def test_a_model_that_is_not_called_is_not_warned_of():
    model, other = seeded(HeadEncoder), seeded(NormEncoder).train()
    embedder = Pipeline(model)
    embedder.other = other
    with silent():
        FeatureActivationMap(embedder.embed, model.layer).attribute(INPUTS, reference=INPUTS)


def test_a_function_that_calls_two_models_leaves_both_as_they_were():
    one, other = seeded(NormEncoder).train(), seeded(Queue)
    before = buffers(one, other)
    fam = FeatureActivationMap(lambda x: one(x) + other.embed(x), one.layer)
    with pytest.warns(UserWarning, match="batch norm"):
        fam.attribute(INPUTS, 0, reference_embedding=REFERENCES)
    unchanged(before, one, other)


ENCODERS = {
    "module": lambda model: model,
    "method": lambda model: model.embed,
    "lambda of a method": lambda model: lambda x: model.embed(x),
}


def explained(method, **options):
    return lambda f, m: method(f, m.layer, **options).attribute(INPUTS, 0, reference_embedding=REFERENCES)


PUBLIC = {
    "FeatureActivationMap": explained(FeatureActivationMap),
    "n_steps": explained(SimilarityDecomposition, n_steps=2),
    "LabelFreeActivationMap": explained(LabelFreeActivationMap),
    "ScoreCam": explained(ScoreCam),
    "RelevanceCam": lambda f, m: explained(RelevanceCam)(m, m),
    "IntegratedDecomposition": lambda f, m: IntegratedDecomposition(m).attribute(INPUTS, reference=INPUTS),
    "ClassActivationMap": lambda f, m: ClassActivationMap(f, m.layer, classifier=m.head).attribute(INPUTS, 0),
    "CorrespondenceMap": lambda f, m: CorrespondenceMap(f, m.layer).attribute(INPUTS, reference=INPUTS),
    "Relax": lambda f, m: Relax(f, n_samples=2).attribute(INPUTS, reference=INPUTS),
    "attribute_all": lambda f, m: FeatureActivationMap(f, m.layer).attribute_all(INPUTS, reference=INPUTS),
    "attribute_pair": lambda f, m: FeatureActivationMap(f, m.layer).attribute_pair(INPUTS, INPUTS),
    "attribute_matrix": lambda f, m: SimilarityDecomposition(f, m.layer).attribute_matrix(INPUTS, INPUTS),
    "embed": lambda f, m: FeatureActivationMap(f, m.layer).embed(INPUTS),
    "route": lambda f, m: FeatureActivationMap(f, m.layer).route(INPUTS),
    "compare_attributions": lambda f, m: compare_attributions(
        SimilarityScore(f, REFERENCES), m.layer, INPUTS, 0, methods=["FeatureActivationMap", "LayerGradCam"]
    ),
    "deletion": lambda f, m: deletion(SimilarityScore(f, REFERENCES), INPUTS, PLACES, target=0),
    "reference_dependence": lambda f, m: reference_dependence(
        SimilarityScore(f, REFERENCES), INPUTS, PLACES, PLACES.flip(0), target=0, other_target=1, n_cells=2
    ),
    "cascading_randomization": lambda f, m: cascading_randomization(
        FeatureActivationMap(f, m.layer).attribute, m, INPUTS, reference=INPUTS
    ),
    "explain_episode": lambda f, m: explain_episode(f, m.layer, INPUTS, INPUTS, [0, 1, 1]),
}


@pytest.mark.parametrize("call", PUBLIC.values(), ids=PUBLIC.keys())
@pytest.mark.parametrize("wrap", ENCODERS.values(), ids=ENCODERS.keys())
@pytest.mark.filterwarnings("ignore")
def test_buffers_that_an_evaluation_changes_are_as_before_every_public_call(call, wrap):
    model = seeded(Queue)
    before = buffers(model)
    call(wrap(model), model)
    unchanged(before, model)


@pytest.mark.parametrize("wrap", ENCODERS.values(), ids=ENCODERS.keys())
def test_each_pass_begins_with_the_buffers_of_the_model(wrap):
    """The count is 1 in every pass, so that the encoder is the head itself, also with a pass for each point."""
    plain, model = seeded(lambda: HeadEncoder(embedding=6)), seeded(Counting)
    for options in ({}, {"n_steps": 3}):
        expected = explained(SimilarityDecomposition, **options)(plain, plain)
        close(explained(SimilarityDecomposition, **options)(wrap(model), model), expected)


class Growing(PooledEncoder):
    """A cache that grows with its input, and the size that it is for."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.size = 4

    def forward(self, x):
        if x.shape[3] > self.size:
            self.register_buffer("scale", torch.linspace(1, 2, x.shape[3]))
            self.size, self.at = x.shape[3], "its end"
        return super().forward(x * self.scale[: x.shape[3]])


def test_what_a_module_notes_beside_a_buffer_that_it_replaces_goes_back_with_it():
    model = seeded(Growing)
    expected = seeded(Growing)(INPUTS)
    for _ in range(2):
        explained(FeatureActivationMap)(model, model)
        assert (model.size, len(model.scale), hasattr(model, "at")) == (4, 4, False)
    close(model(INPUTS), expected)


def test_buffers_that_modules_share_are_one_in_the_pass_too():
    class Shared(PooledEncoder):
        def __init__(self):
            super().__init__()
            self.reader = nn.Module()
            self.register_buffer("mean", torch.zeros(6))
            self.reader.register_buffer("mean", self.mean)

        def forward(self, x):
            z = super().forward(x)
            self.mean += z.detach().mean(0)
            return z * self.reader.mean

    model, plain = seeded(Shared), seeded(Shared)
    model.reader.mean, plain.reader.mean = model.mean, plain.mean
    close(FeatureActivationMap(model, model.layer).embed(INPUTS), plain(INPUTS).detach())
    assert not model.mean.any()


class Reading(PooledEncoder):
    """Uses the statistics of a child that it does not call."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return super().forward(
            nn.functional.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)
        )


@each_wrap
def test_statistics_of_a_child_that_its_parent_uses_stay(wrap):
    model = seeded(Reading)
    before = buffers(model)
    explained(FeatureActivationMap)(wrap(model), model)
    unchanged(before, model)


def test_the_hook_on_all_modules_is_gone_after_each_call_and_those_of_the_user_stay():
    model, seen = seeded(NormEncoder), []
    handle = torch_module.register_module_forward_pre_hook(lambda m, _: seen.append(m))
    own = dict(torch_module._global_forward_pre_hooks)

    def failing(x):
        model(x)
        raise Stop

    try:
        explained(FeatureActivationMap)(lambda x: model(x), model)
        for call in (FeatureActivationMap(failing, model.layer).embed, lambda x: explained(ScoreCam)(failing, model)):
            with pytest.raises(Stop):
                call(INPUTS)
        assert dict(torch_module._global_forward_pre_hooks) == own
        assert model in seen
    finally:
        handle.remove()


def test_a_pass_of_another_thread_is_not_among_the_modules_that_were_called():
    model, other = seeded(HeadEncoder), seeded(NormEncoder).train()

    def embed(x):
        thread = threading.Thread(target=lambda: HELD["other"](INPUTS))
        thread.start()
        thread.join(10)
        return model(x)

    HELD["other"] = other
    count = other.norm.num_batches_tracked.clone()
    with silent():
        FeatureActivationMap(embed, model.layer).attribute(INPUTS, reference_embedding=random(1, 4))
    del HELD["other"]
    assert other.norm.num_batches_tracked >= count


def test_a_model_whose_parameters_are_not_initialised_yet_is_explained():
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.double().eval()
    first = FeatureActivationMap(model, model[2]).attribute(INPUTS, 0, reference_embedding=REFERENCES)
    close(FeatureActivationMap(model, model[2]).attribute(INPUTS, 0, reference_embedding=REFERENCES), first)
    assert type(model[1]) is nn.BatchNorm2d


NORMED = {
    "batch norm": lambda m: m,
    "spectral norm": lambda m: nn.utils.spectral_norm(m.head) and m,
    "weight norm": lambda m: nn.utils.weight_norm(m.head) and m,
    "parametrized spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m.head) and m,
    "parametrized weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.conv2) and m,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prepare", NORMED.values(), ids=NORMED.keys())
def test_a_backward_pass_that_waits_behind_a_function_gives_the_same_gradients(prepare, training):
    undisturbed, model = (seeded(lambda: prepare(LateNormEncoder())).train(training) for _ in range(2))
    expected = torch.autograd.grad(undisturbed(INPUTS).square().sum(), list(undisturbed.parameters()))
    waiting = model(INPUTS).square().sum()
    before, state = buffers(model), {name: t.clone() for name, t in model.state_dict().items()}
    for name in ("FeatureActivationMap", "embed", "attribute_pair", "Relax", "deletion", "cascading_randomization"):
        PUBLIC[name](lambda x: model(x), model)
    unchanged(before, model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    close(torch.autograd.grad(waiting, list(model.parameters())), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lambda x: model(x)], ids=["module", "lambda"])
def test_eight_threads_on_a_model_in_training_mode_each_get_their_own_maps_and_leave_it_as_it_was(wrap):
    model = seeded(LateNormEncoder).train()
    func, before = wrap(model), buffers(model)
    names = ["FeatureActivationMap", "embed", "attribute_all", "attribute_pair", "CorrespondenceMap", "Relax"]
    calls = [
        lambda n=n: [PUBLIC[n](func, model) for _ in range(3)] for n in [*names, "FeatureActivationMap", "n_steps"]
    ]
    alone = [call() for call in calls]
    close(in_threads(*calls), alone)
    unchanged(before, model)
    assert not torch_module._global_forward_pre_hooks


MEMORY = {
    "SimilarityScore": (
        (4, 6),
        lambda t: SimilarityScore(seeded(PooledEncoder), t),
        lambda made: made(INPUTS),
    ),
    "background": (
        (5, 3, 8, 8),
        lambda t: CorrespondenceMap(e := seeded(PooledEncoder), e.layer, background=t),
        lambda made: made.attribute(INPUTS, reference=INPUTS.flip(0)),
    ),
    "baseline": (
        (1, 6, 1, 1),
        lambda t: SimilarityDecomposition(e := seeded(PooledEncoder), e.layer, n_steps=2, baseline=t),
        lambda made: made.attribute(INPUTS, 0, reference_embedding=REFERENCES),
    ),
}


@pytest.mark.parametrize(("shape", "make", "use"), MEMORY.values(), ids=MEMORY.keys())
def test_nothing_that_is_kept_shares_memory_with_the_callers_tensor(shape, make, use):
    given = random(*shape, seed=5)
    made = make(given)
    before = use(made)
    given.add_(1)
    close(use(made), before)
    assert not torch.allclose(use(make(given)), before)  # so it does matter


def test_a_result_shares_no_memory_with_what_was_given():
    support, query = random(3, 3, 8, 8), random(2, 3, 8, 8, seed=4)
    model = seeded(PooledEncoder)
    episode = explain_episode(model, model.layer, query, support, [0, 1, 1])
    before = [episode.map(0).clone(), episode.contrast(0, 1).clone(), episode.margin(0, 1).clone()]
    query.zero_(), support.zero_(), model.conv2.weight.data.zero_()
    close([episode.map(0), episode.contrast(0, 1), episode.margin(0, 1)], before)


class Checkpointed(HeadEncoder):
    """The second convolution and the layer are checkpointed."""

    def __init__(self, use_reentrant):
        super().__init__(embedding=6)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        part = nn.Sequential(self.conv2, self.layer)
        if self.use_reentrant is None:
            return self.head(part(self.early(self.conv1(x))).mean((2, 3)))
        run = torch.utils.checkpoint.checkpoint(part, self.early(self.conv1(x)), use_reentrant=self.use_reentrant)
        return self.head(run.mean((2, 3)))


CHECKPOINTED = {
    "before": (lambda m: m.early, {}),
    "inside": (lambda m: m.conv2, {}),
    "at its end": (lambda m: m.layer, {}),
    "at its end, integrated": (lambda m: m.layer, {"n_steps": 2}),
    "before, integrated": (lambda m: m.conv1, {"n_steps": 2}),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("references", [1, 40])
@pytest.mark.parametrize(("layer", "options"), CHECKPOINTED.values(), ids=CHECKPOINTED.keys())
def test_a_checkpointed_part_has_the_maps_of_the_same_part_or_an_error_that_names_it(layer, options, references):
    def run(use_reentrant):
        model = seeded(lambda: Checkpointed(use_reentrant))
        method = SimilarityDecomposition(model, layer(model), **options)
        return method.attribute_all(INPUTS, reference_embedding=random(references, 6))

    close(run(False), run(None))
    with pytest.raises(ValueError, match=r"checkpointing with use_reentrant=True.*set_grad_checkpointing\(False\)"):
        run(True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpointed_part_needs_no_gradient_where_the_weights_are_aligned():
    def run(use_reentrant):
        model = seeded(lambda: Checkpointed(use_reentrant))
        model.head = nn.Identity()
        return FeatureActivationMap(model, model.layer).attribute(INPUTS, 0, reference_embedding=REFERENCES)

    close(run(True), run(None))
    close(run(False), run(None))


def test_a_checkpointed_part_is_named_where_a_layer_is_looked_for():
    model = seeded(lambda: Checkpointed(True))
    with pytest.raises(ValueError, match="checkpointing with use_reentrant=True"):
        IntegratedDecomposition(model).attribute(INPUTS, reference=INPUTS)


class InStages(nn.Module):
    """A stage whose parts are called one by one, as gradient checkpointing does in timm."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU()))

    def forward(self, x):
        for part in self.stage:
            x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
        return x.mean((2, 3))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lambda x: model(x)], ids=["module", "lambda"])
def test_a_stage_that_runs_part_by_part_is_refused_with_its_last_part(wrap):
    model = seeded(InStages)
    with pytest.raises(ValueError, match=r"was not called; .*'1' the last of them.*set_grad_checkpointing\(False\)"):
        FeatureActivationMap(wrap(model), model.stage).attribute(INPUTS, reference=INPUTS)
    close(
        FeatureActivationMap(wrap(model), model.stage[1]).attribute(INPUTS, reference=INPUTS),
        FeatureActivationMap(nn.Sequential(model.stage, nn.AdaptiveAvgPool2d(1), nn.Flatten()), model.stage).attribute(
            INPUTS, reference=INPUTS
        ),
    )


class Scripted(nn.Module):
    """The first part in TorchScript, the layer outside of it."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.after = nn.Conv2d(3, 3, 1), inner, nn.Linear(6, 6)

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


def script(model):
    return torch.jit.script(model)


def trace(model):
    return torch.jit.trace(model, INPUTS, check_trace=False)


def plain_sequence():
    parts = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*parts)


each_compiler = pytest.mark.parametrize("compiled", [script, trace])


@each_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit:")
def test_torchscript_is_refused_before_anything_runs_but_for_relax(compiled):
    model = seeded(plain_sequence)
    made, calls = compiled(model), []
    inside = getattr(made, "2")
    for make in (
        lambda: FeatureActivationMap(made, inside),
        lambda: FeatureActivationMap(made, model[2]),
        lambda: FeatureActivationMap(SimilarityScore(made, REFERENCES), model[2]),
        lambda: FeatureActivationMap(made.forward, model[2]),
        lambda: CorrespondenceMap(nn.DataParallel(made), model[2]),
        lambda: IntegratedDecomposition(made),
        lambda: ScoreCam(lambda x: calls.append(1), inside if isinstance(inside, torch.jit.ScriptModule) else made),
    ):
        with pytest.raises(TypeError, match=r"TorchScript .*hooks do not work; pass the Python model.*Relax"):
            make()
    assert calls == []
    close(
        Relax(made, n_samples=5).attribute(INPUTS, reference=INPUTS),
        Relax(model, n_samples=5).attribute(INPUTS, reference=INPUTS),
    )


@each_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit:")
def test_a_part_in_torchscript_hides_its_layers_only(compiled):
    model = seeded(plain_sequence)
    mixed = seeded(lambda: Scripted(compiled(model)))
    plain = seeded(lambda: Scripted(model))
    close(
        FeatureActivationMap(mixed, mixed.before).attribute(INPUTS, reference=INPUTS),
        FeatureActivationMap(plain, plain.before).attribute(INPUTS, reference=INPUTS),
    )
    assert IntegratedDecomposition(mixed).layer_of(INPUTS) == "before"
    for func in (mixed, lambda x: mixed(x)):
        with pytest.raises(ValueError, match=r"ReLU was not called; .*Hooks do not work in its TorchScript"):
            FeatureActivationMap(func, model[2]).attribute(INPUTS, reference=INPUTS)


@each_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit:")
def test_torchscript_in_training_mode_stays_and_warns(compiled):
    made = compiled(seeded(plain_sequence).train())
    before = {name: b.clone() for name, b in made.named_buffers()}
    with pytest.warns(UserWarning, match="training mode and has batch norm"):
        Relax(lambda x: made(x), n_samples=3).attribute(INPUTS, reference=INPUTS)
    assert before.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(torch.equal(b, before[name]) for name, b in made.named_buffers())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit:")
def test_frozen_torchscript_is_explained_by_relax():
    model = seeded(plain_sequence)
    frozen = torch.jit.freeze(torch.jit.script(model))
    close(
        Relax(frozen, n_samples=3).attribute(INPUTS, reference=INPUTS),
        Relax(model, n_samples=3).attribute(INPUTS, reference=INPUTS),
    )


def test_a_graph_module_of_fx_has_the_maps_of_its_model():
    model = seeded(plain_sequence)
    graph = torch.fx.symbolic_trace(model)
    close(
        FeatureActivationMap(graph, graph.get_submodule("2")).attribute(INPUTS, reference=INPUTS),
        FeatureActivationMap(model, model[2]).attribute(INPUTS, reference=INPUTS),
    )


@pytest.fixture
def dynamo():
    """torch.compile as nobody has used it."""
    torch.compiler.reset()
    yield sys.modules["torch._dynamo.eval_frame"]
    torch.compiler.set_stance("default")
    torch.compiler.reset()


needs_stance = pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="this torch has no stance")


def compiles(dynamo):
    """Whether torch.compile compiles."""
    graphs = []
    torch.compile(lambda a: a + 1, backend=lambda graph, _: graphs.append(1) or graph.forward)(torch.ones(2))
    return bool(graphs) and dynamo._stance.stance == "default"


@needs_stance
@pytest.mark.parametrize("fails", [(), (0,), (1,), (0, 1)], ids=["none", "first", "second", "both"])
def test_two_calls_that_overlap_leave_torch_compile_on_failed_ones_too(dynamo, fails):
    """The first enters first and leaves first."""
    entered, left = threading.Event(), threading.Event()

    def call(number):
        def embed(x):
            if number == 0:
                assert entered.wait(10)
            else:
                entered.set()
                assert left.wait(10)
            if number in fails:
                raise OSError
            return model(x)

        model = seeded(HeadEncoder)
        try:
            FeatureActivationMap(embed, model.layer).attribute(INPUTS, reference_embedding=random(1, 4))
        except OSError:
            pass
        finally:
            if number == 0:
                left.set()

    in_threads(*[lambda i=i: call(i) for i in range(2)])
    assert compiles(dynamo)


@needs_stance
def test_a_stance_of_the_users_own_stays(dynamo):
    model = seeded(HeadEncoder)

    def explain(func):
        return FeatureActivationMap(func, model.layer).attribute(INPUTS, reference_embedding=random(1, 4))

    def setting(x):
        torch.compiler.set_stance("eager_on_recompile")
        return model(x)

    with torch.compiler.set_stance("fail_on_recompile"):
        explain(lambda x: model(x))
        assert dynamo._stance.stance == "fail_on_recompile"
    explain(setting)
    assert dynamo._stance.stance == "eager_on_recompile"


@needs_stance
@pytest.mark.filterwarnings("ignore:The model is in training mode")
@pytest.mark.parametrize("whole", [True, False], ids=["module", "function"])
def test_a_compiled_model_behind_a_function_stays_is_not_warned_of_and_keeps_no_hook(dynamo, whole):
    model, graphs = seeded(LateNormEncoder).train(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    made = torch.compile(model if whole else lambda x: model(x), backend=backend)
    before = buffers(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using `torch.compile")
        fam = FeatureActivationMap(lambda x: made(x), model.layer)
        fam.embed(INPUTS)
        fam.attribute(INPUTS, 0, reference_embedding=REFERENCES)
    unchanged(before, model)
    graphs.clear()
    made(INPUTS)
    assert len(graphs) <= 1  # a hook would have broken it into many
    assert model.norm.num_batches_tracked == 1
