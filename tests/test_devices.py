"""Half precision, torch.compile and GPUs: the same maps, without waiting where there is nothing to wait for."""

import warnings

import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, random, seeded
from helpers import close
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from captum_fam import (
    FeatureActivationMap,
    Relax,
    ScoreCam,
    SimilarityDecomposition,
    channel_contributions,
    contribution_weights,
    explain_episode,
)

X = random(3, 3, 8, 8)
REFERENCES = random(7, 6, seed=2)
ENCODERS = {"aligned": PooledEncoder, "jacobian": lambda: HeadEncoder(embedding=6)}
CALLS = {
    "attribute": lambda fam, x, s: fam.attribute(x, 2, reference_embedding=s),
    "attribute_all": lambda fam, x, s: fam.attribute_all(x, reference_embedding=s),
    "rest": lambda fam, x, s: fam.attribute_all(x, reference_embedding=s, contrast="rest"),
    "self": lambda fam, x, s: fam.attribute_all(x, reference_embedding=s, contrast="self"),
    "threshold": lambda fam, x, s: fam.attribute(x, 2, reference_embedding=s, threshold=0.3),
    "chunks": lambda fam, x, s: fam.attribute_all(x, reference_embedding=s, internal_batch_size=2),
    "target": lambda fam, x, s: fam.attribute(x, [2, 0, 1], reference_embedding=s, contrast=[1, 2, 3]),
    "pair": lambda fam, x, s: torch.stack(fam.attribute_pair(x, x.flip(0))),
}
each_call = pytest.mark.parametrize("call", CALLS)
each_encoder = pytest.mark.parametrize("kind", ENCODERS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def explainer(kind, device="cpu", dtype=torch.float64, **options):
    encoder = seeded(ENCODERS[kind]).to(device, dtype)
    return FeatureActivationMap(encoder, encoder.layer, **options)


class Lists(TorchFunctionMode):
    """Counts the calls of Tensor.tolist, which on a CPU is no operation of its own."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts the operations whose result Python must see, for which it would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "equal", "_unique2")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "options", "waits"),
    [
        ("aligned", {}, 2),  # is the layer aligned, are the maps to be trusted
        ("aligned", {"channel_weights": "aligned"}, 1),
        ("jacobian", {}, 4),  # does the embedding depend on the layer, and is it normalised
    ],
)
@pytest.mark.parametrize("call", ["attribute", "attribute_all", "rest", "self", "threshold"])
def test_a_call_waits_for_the_answers_that_it_needs_and_no_more(kind, options, waits, call):
    fam = explainer(kind, **options)
    with Lists() as lists, Waits() as counted:
        CALLS[call](fam, X, REFERENCES)
    # A share of the score with itself is an error where that score is zero.
    assert counted.count + lists.count == waits + (call in ("self", "threshold"))


@each_call
@each_encoder
@needs_cuda
def test_the_maps_on_a_gpu_are_those_on_the_cpu(kind, call):
    s = REFERENCES.cuda()
    maps = CALLS[call](explainer(kind, "cuda"), X.cuda(), s)
    assert maps.is_cuda
    close(maps.cpu(), CALLS[call](explainer(kind), X, REFERENCES), rtol=1e-7, atol=1e-9)


@each_call
@needs_cuda
def test_references_in_the_memory_of_the_cpu_explain_inputs_on_a_gpu(call):
    fam = explainer("aligned", "cuda")
    close(CALLS[call](fam, X.cuda(), REFERENCES), CALLS[call](fam, X.cuda(), REFERENCES.cuda()))


@pytest.mark.parametrize("call", ["attribute", "attribute_all"])
@needs_cuda
def test_a_gpu_is_waited_for_no_more_often_than_counted(call):
    fam, x, s = explainer("aligned", "cuda"), X.cuda(), REFERENCES.cuda()
    CALLS[call](fam, x, s)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            CALLS[call](fam, x, s)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # attribute also copies the numbers of the references there
    assert len([w for w in caught if "called a synchroniz" in str(w.message)]) <= 3


@each_call
@each_encoder
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_maps_but_for_its_own_rounding(kind, call, dtype):
    fam, half = explainer(kind), explainer(kind, dtype=dtype)
    expected, found = CALLS[call](fam, X, REFERENCES), CALLS[call](half, X.to(dtype), REFERENCES.to(dtype))
    assert found.dtype == dtype
    close(found.double(), expected, rtol=0.1, atol=0.03 * expected.abs().max().item())


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, backend="eager", **options)


@each_call
@each_encoder
def test_a_compiled_function_may_call_it(kind, call):
    fam = explainer(kind)
    expected = CALLS[call](fam, X, REFERENCES)
    run = compiled(lambda x: 2 * CALLS[call](fam, x, REFERENCES))
    close(run(X), 2 * expected)
    assert not fam.layer._forward_hooks


@pytest.mark.parametrize(
    "call",
    [
        lambda encoder, x: SimilarityDecomposition(encoder, encoder.layer).attribute_matrix(x, x),
        lambda encoder, x: explain_episode(encoder, encoder.layer, x, X, [0, 1, 2]).maps,
        lambda encoder, x: x * (FeatureActivationMap(encoder, encoder.layer).route(x) == "aligned"),
    ],
    ids=["attribute_matrix", "explain_episode", "route"],
)
def test_a_compiled_function_may_call_what_else_sets_hooks(call):
    encoder = seeded(PooledEncoder)
    expected = call(encoder, X)
    close(compiled(lambda x: call(encoder, x))(X), expected)


@needs_cuda
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("contrast", [None, 1, "rest"])
def test_methods_that_mask_inputs_take_references_from_anywhere(place, contrast):
    encoder = seeded(PooledEncoder)
    expected, found = (
        [
            method.attribute(X.to(device), [2, 0, 1], reference_embedding=REFERENCES.to(where), contrast=contrast)
            for method in (ScoreCam(encoder.to(device), encoder.layer), Relax(encoder.to(device), n_samples=8))
        ]
        for device, where in (("cpu", "cpu"), ("cuda", place))
    )
    close([maps.cpu() for maps in found], expected, rtol=1e-6, atol=1e-8)


def test_the_formula_compiles_with_its_encoder_into_one_graph():
    encoder = seeded(PooledEncoder)

    def explain(x, s):
        A = encoder.features(x)
        z = A.mean((2, 3))[:, None]
        f = contribution_weights(channel_contributions(z, s)) * z.sign()
        return torch.einsum("bkc,bchw->bkhw", f, A)

    with torch.no_grad():
        maps = compiled(explain, fullgraph=True)(X, REFERENCES)
    close(maps, FeatureActivationMap(encoder, encoder.layer).attribute_all(X, reference_embedding=REFERENCES))


@each_encoder
def test_autocast_gives_the_maps_but_for_its_rounding(kind):
    fam = explainer(kind, dtype=torch.float32)
    x, s = X.float(), REFERENCES.float()
    expected = fam.attribute_all(x, reference_embedding=s)
    with torch.autocast("cpu", torch.bfloat16):
        found = fam.attribute_all(x, reference_embedding=s)
    close(found.float(), expected, rtol=0.1, atol=0.03 * expected.abs().max().item())
