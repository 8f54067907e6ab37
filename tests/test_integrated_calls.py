"""Calls with n_steps: chunks, passes, dtypes, modes, models, aligned layers, Captum's forms and wrong arguments."""

import copy
import threading

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from captum.attr import NoiseTunnel
from encoders import (
    Function,
    HeadEncoder,
    Modified,
    OfActivations,
    PooledEncoder,
    random,
    seeded,
)
from helpers import close, run
from test_dtypes_and_edges import assert_maps_near, each_dtype, one_warning
from test_integrated_places import (
    ACTIVATIONS,
    CURVED,
    HAND,
    METHODS,
    SMOOTH,
    Curved,
    S,
    X,
    each_method,
    mean_map,
    places,
    weights_of_cosine,
)
from test_model_untouched import in_threads, state
from torch import nn

from captum_fam import (
    FeatureActivationMap,
    LabelFreeActivationMap,
    ScoreCam,
    SimilarityDecomposition,
)
from captum_fam.engine.places import place_terms, unit_vectors
from captum_fam.engine.report import Report

# One map, however it is asked for


@each_method
@pytest.mark.parametrize("K", [3, 30])  # fewer and more than there are dimensions
def test_all_maps_and_those_of_pairs_are_those_of_attribute(method, K):
    references, others = random(K, 4, seed=2), X.flip(0)
    for explainer in (places(CURVED, method=method), places(HAND, method=method)):
        x = X if explainer.layer is CURVED.layer else torch.from_numpy(ACTIVATIONS)
        maps = [explainer.attribute(x, k, reference_embedding=references) for k in range(K)]
        close(explainer.attribute_all(x, reference_embedding=references), torch.cat(maps, 1), rtol=1e-8)
        close(
            explainer.attribute_all(x, reference_embedding=references, internal_batch_size=2),
            torch.cat(maps, 1),
            rtol=1e-8,
        )
    explainer = places(CURVED, method=method)
    expected = explainer.attribute(X, reference=others), explainer.attribute(others, reference=X)
    close(explainer.attribute_pair(X, others), expected)
    close(
        explainer.attribute_pair(X, others[:1])[1], explainer.attribute(others[:1].expand(3, -1, -1, -1), reference=X)
    )


def test_many_maps_of_fewer_places_than_dimensions_are_those_of_attribute():
    encoder = OfActivations(nn.Flatten(), nn.Tanh(), seeded(lambda: nn.Linear(6, 9)), nn.GELU())
    x, references = random(2, 3, 1, 2), random(20, 9, seed=2)
    maps = [places(encoder).attribute(x, k, reference_embedding=references) for k in range(20)]
    close(places(encoder).attribute_all(x, reference_embedding=references), torch.cat(maps, 1), rtol=1e-8)


SIZES = [1, 2, 5, 7, 14, 16, 100]


@each_method
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("baseline", ["mean", random(3, 1, 8, 8, seed=4)], ids=["mean", "tensor"])
def test_chunks_have_the_maps_and_deltas_of_all_at_once(method, size, baseline):
    explainer = places(CURVED, method=method, n_steps=6, baseline=baseline)
    options = {"reference_embedding": S, "contrast": [0, 1, 2], "return_convergence_delta": True}
    close(
        explainer.attribute(X, [1, 2, 0], internal_batch_size=size, **options),
        explainer.attribute(X, [1, 2, 0], **options),
    )


class Watched(Curved):
    """Notes how many rows its parts see."""

    def __init__(self, *join):
        super().__init__(*join)
        self.rows = {"stem": [], "head": []}
        for name, seen in self.rows.items():
            getattr(self, name).register_forward_hook(lambda m, i, o, seen=seen: seen.append(len(o)))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("size", [*SIZES, 8, 9])
def test_no_part_sees_more_rows_than_the_internal_batch_size(size, delta):
    encoder, x = seeded(Watched), random(9, 3, 8, 8)
    options = {"reference_embedding": S, "internal_batch_size": size, "return_convergence_delta": delta}
    places(encoder, n_steps=6).attribute(x, 1, **options)
    assert max(encoder.rows["stem"] + encoder.rows["head"]) <= max(size, 2)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("inplace", [False, True])  # what comes after the layer
def test_one_pass_goes_to_the_layer_and_all_points_go_on_from_there(delta, inplace):
    encoder = seeded(lambda: Watched(lambda self, x, h, a: F.silu(a, inplace=inplace).mean((2, 3))))
    places(encoder, n_steps=6).attribute(X, 1, reference_embedding=S, return_convergence_delta=delta)
    assert encoder.rows == {"stem": [3], "head": [3 * (7 + delta)]}


def test_forward_products_on_a_path_are_what_the_gradients_give():
    method = places(seeded(Curved))
    with method._record((X,), None, Report(), path=method._paths(None, False)[0]) as recording:
        (found,) = recording.place_products()
        rows = [terms[0].sum(1) for terms in place_terms(recording, unit_vectors(recording.embedding), [None])]
    close(found, torch.stack(rows, 1) / found.shape[2])


def test_what_the_layer_takes_is_integrated_as_the_output_of_what_gives_it():
    encoder = seeded(HeadEncoder)
    expected = places(encoder, encoder.conv2).attribute(X, 1, reference_embedding=S)
    close(places(encoder).attribute(X, 1, None, True, reference_embedding=S), expected)
    changes = seeded(lambda: HeadEncoder(inplace=True))  # in place, after the layer
    close(places(changes, changes.conv2).attribute(X, 1, reference_embedding=S), expected)


# Dtypes, modes and models


@each_method
@each_dtype
def test_each_dtype_comes_out_as_it_came_in(method, dtype):
    narrow, options = copy.deepcopy(CURVED).to(dtype), {"method": method, "n_steps": 5}
    maps = places(narrow, **options).attribute(X.to(dtype), 1, reference_embedding=S.to(dtype))
    assert_maps_near(maps, places(CURVED, **options).attribute(X, 1, reference_embedding=S), dtype)


def test_gradient_mode_and_frozen_weights_change_nothing_and_are_not_changed():
    expected, frozen = (
        places(CURVED).attribute(X, 1, reference_embedding=S),
        copy.deepcopy(CURVED).requires_grad_(False),
    )
    for encoder in (CURVED, frozen):
        before = state(encoder, X)
        with torch.no_grad():
            maps = places(encoder).attribute(X, 1, reference_embedding=S)
            places(encoder).attribute_matrix(X, X, return_baselines=True)
        close(maps, expected)
        assert state(encoder, X) == before
        assert not maps.requires_grad


def test_inference_mode_gives_aligned_maps_and_refuses_others():
    pooled, s = seeded(PooledEncoder), random(1, 6, seed=2)
    for route in ("auto", "aligned"):
        explainer = places(pooled, channel_weights=route)
        options = {"reference_embedding": s, "return_convergence_delta": True}
        with torch.inference_mode():
            found = explainer.attribute(X, **options)
        close(found, explainer.attribute(X, **options))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        places(CURVED).attribute(X, 1, reference_embedding=S)


@pytest.mark.parametrize("baseline", ["mean", "zero", torch.zeros(1, 4, 1, 1)], ids=str)
def test_an_empty_batch_has_empty_maps(baseline):
    explainer = places(CURVED, baseline=baseline)
    maps, delta = explainer.attribute(X[:0], reference_embedding=S[:1], return_convergence_delta=True)
    assert maps.shape == (0, 1, 8, 8)
    assert delta.shape == (0,)


def test_calls_in_several_threads_each_give_their_own_maps():
    residual = SMOOTH["residual"]
    calls = [
        lambda i=i: places([CURVED, residual][i % 2], n_steps=2 + i).attribute(
            X + i, i, reference_embedding=S, return_convergence_delta=True
        )
        for i in range(4)
    ]
    alone, before = [call() for call in calls], state(CURVED)
    close(in_threads(*calls), alone)
    assert state(CURVED) == before


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_error_of_the_encoder_itself_reaches_the_user(place):
    class BrokenError(Exception):
        pass

    calls = []

    def fail(*values):
        calls.append(threading.get_ident())
        raise BrokenError("mine")

    encoder = seeded(Curved)
    (encoder.stem if place == "before" else encoder.head).register_forward_pre_hook(fail)
    before = state(encoder)
    with pytest.raises(BrokenError, match="mine"):
        places(encoder).attribute(X, 1, reference_embedding=S)
    assert state(encoder) == before
    assert len(calls) <= (1 if place == "before" else 2)  # after the layer, once more with fewer rows


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_embeddings_that_are_zero_or_not_finite_have_zero_maps(value):
    def spoil(self, x, h, a):
        z = F.gelu(a).mean((2, 3))
        bad = (torch.arange(len(a)) % 3 == 1)[:, None]
        return z + torch.where(bad, value - z.detach(), 0.0)  # the gradient stays

    encoder = seeded(lambda: Curved(spoil))
    encoder.head = nn.Identity()
    with one_warning(r"zero or not finite \(inputs \[1\]\)"):
        maps, delta = places(encoder).attribute(X, 1, reference_embedding=S, return_convergence_delta=True)
    assert not maps[1].any()
    assert not delta[1]
    plain = seeded(Curved)
    plain.head = nn.Identity()
    close(maps[::2], places(plain).attribute(X, 1, reference_embedding=S)[::2])


def test_embeddings_that_are_not_finite_on_the_path_have_zero_maps():
    encoder = OfActivations(Function(lambda a: a.mean((2, 3)).log()))
    x = random(2, 4, 2, 2).abs() + 0.1
    with pytest.warns(UserWarning, match="not finite"):
        maps = places(encoder, baseline=torch.full((1, 4, 1, 1), -1.0)).attribute(x, 1, reference_embedding=S)
    assert not maps.any()


# Where no gradient is needed


@each_method
@pytest.mark.parametrize("baseline", ["mean", "zero", random(1, 6, 1, 1, seed=4)], ids=["mean", "zero", "tensor"])
def test_of_a_mean_of_the_last_map_the_activations_less_the_baseline_are_weighed(method, baseline):
    encoder, references = seeded(PooledEncoder), random(4, 6, seed=2)
    z, A = run(encoder, X)
    B = {"mean": mean_map(A), "zero": 0 * A}[baseline] if isinstance(baseline, str) else baseline
    of = oracle.pair_weights if method is FeatureActivationMap else oracle.decomposition_weights
    f = [of(row, references.numpy(), 1, "cosine") for row in z.numpy()]
    expected = np.stack([oracle.aligned_map(*pair) for pair in zip(f, (A - B).numpy())])[:, None]
    for route in ("auto", "aligned", "jacobian"):
        for size in (None, 2):
            explainer = places(encoder, method=method, baseline=baseline, channel_weights=route)
            maps, delta = explainer.attribute(
                X, 1, reference_embedding=references, return_convergence_delta=True, internal_batch_size=size
            )
            close(maps, expected, atol=1e-11)
            assert delta.abs().max() < 1e-11
    assert places(encoder, method=method).route(X) == "aligned"


def test_forced_alignment_records_nothing_for_backward_and_takes_no_other_point():
    seen = []
    encoder = seeded(lambda: Modified(PooledEncoder(), lambda z: seen.append((z.requires_grad, len(z))) or z.clone()))
    places(encoder, channel_weights="aligned").attribute(X, reference_embedding=random(1, 6))
    assert seen == [(False, 3)]


@pytest.mark.parametrize("baseline", ["mean", "zero", random(1, 6, 1, 1, seed=4).abs()], ids=["mean", "zero", "tensor"])
def test_the_places_of_a_normalised_mean_add_up_as_well(baseline):
    encoder, s = seeded(lambda: Modified(PooledEncoder(), lambda z: F.normalize(z, dim=1))), random(1, 6, seed=2)
    z, A = run(encoder, X)
    B = {"mean": mean_map(A), "zero": 0 * A}[baseline] if isinstance(baseline, str) else baseline.expand_as(A)
    z0 = F.normalize(B.mean((2, 3)), dim=1)
    maps = places(encoder, n_steps=60, baseline=baseline).attribute(X, reference_embedding=s)
    close(maps.mean((1, 2, 3)), (weights_of_cosine(z, s) * (z - z0)).sum(1), rtol=1e-6, atol=1e-9)
    if baseline == "mean":
        f = weights_of_cosine(z, s) / A.mean((2, 3)).norm(dim=1, keepdim=True)
        close(maps[:, 0], torch.einsum("bk,bkhw->bhw", f, A - B))


# Captum's forms, and bad arguments


def test_captum_is_told_of_the_delta_and_smooths_maps_with_it():
    assert places(CURVED).has_convergence_delta()
    assert not SimilarityDecomposition(CURVED, CURVED.layer).has_convergence_delta()
    smoothed, deltas = NoiseTunnel(places(CURVED)).attribute(
        X, nt_samples=2, stdevs=0.0, target=1, reference_embedding=S, return_convergence_delta=True
    )
    maps, delta = places(CURVED).attribute(X, 1, reference_embedding=S, return_convergence_delta=True)
    close(smoothed, maps)
    close(deltas, delta.repeat_interleave(2))


@pytest.mark.parametrize("method", [*METHODS, LabelFreeActivationMap, ScoreCam])
def test_without_steps_there_is_no_delta(method):
    reference = {} if method is LabelFreeActivationMap else {"reference_embedding": S[:1]}
    with pytest.raises(ValueError, match=r"return_convergence_delta.*pass n_steps to"):
        method(CURVED, CURVED.layer).attribute(X, return_convergence_delta=True, **reference)
    if method is SimilarityDecomposition:
        with pytest.raises(ValueError, match=r"return_baselines.*pass n_steps to"):
            method(CURVED, CURVED.layer).attribute_matrix(X, X, return_baselines=True)


@each_method
@pytest.mark.parametrize(
    ("n", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ("8", TypeError)]
)
def test_a_wrong_number_of_steps_is_named(method, n, error):
    with pytest.raises(error, match=r"`n_steps` to be a positive int, but got"):
        places(CURVED, method=method, n_steps=n)


@each_method
@pytest.mark.parametrize("baseline", ["median", 3, None, np.zeros(4)], ids=str)
def test_a_wrong_baseline_is_named(method, baseline):
    with pytest.raises((ValueError, TypeError), match=r'`baseline` to be "mean", "zero" or a tensor that broadcasts'):
        places(CURVED, method=method, baseline=baseline)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 8, 8), (4, 4, 1, 1, 1), (1, 3, 1, 1), (5, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("size", [None, 6])  # six rows: two inputs at once
def test_a_baseline_of_another_shape_is_named_with_what_would_fit(shape, size):
    explainer = places(CURVED, n_steps=2, baseline=torch.zeros(shape))
    with pytest.raises(
        ValueError, match=r"`baseline` to broadcast to the layer's activations .*pass one of shape \(1, 4, 1, 1\)"
    ):
        explainer.attribute(random(4, 3, 8, 8), 1, reference_embedding=S, internal_batch_size=size)


@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 8, 8), (1, 1), ()], ids=str)
def test_a_baseline_with_fewer_dimensions_is_the_same_for_every_chunk(shape):
    x, baseline = random(4, 3, 8, 8), random(1, *shape, seed=4)[0]  # as many inputs as channels
    explainer = places(CURVED, baseline=baseline)
    whole = places(CURVED, baseline=baseline.expand(4, 4, 8, 8)).attribute(x, 1, reference_embedding=S)
    for size in (None, 1, 8):
        close(explainer.attribute(x, 1, reference_embedding=S, internal_batch_size=size), whole)


def test_a_layer_without_channels_is_named():
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0), Function(lambda a: a[:, None].expand(-1, 4))
    ).double()
    with pytest.raises(ValueError, match=r"layer '2' \(Flatten\) to give activations \(B, C, \*spatial\)"):
        places(encoder, encoder[2]).attribute(X, 1, reference_embedding=S)


def test_route_looks_at_the_points_of_the_path_and_at_no_other():
    encoder, seen = seeded(HeadEncoder), []
    encoder.head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    assert FeatureActivationMap(encoder, encoder.layer, n_steps=3).route(random(2, 3, 8, 8)) == "jacobian"
    assert seen == [2 * (1 + 3)]
