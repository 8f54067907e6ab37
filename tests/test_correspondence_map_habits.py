"""CorrespondenceMap with encoders, values and arguments of all kinds, and what it leaves behind."""

import inspect
import threading

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, NoiseTunnel
from encoders import (
    Function,
    HeadEncoder,
    Modified,
    OfActivations,
    OfBytes,
    PooledEncoder,
    TwoInputEncoder,
    pooled,
    random,
    seeded,
)
from helpers import close, held, silent
from test_correspondence_map import CALLS, OTHERS, OWN, SHELF, X, each_call, explainer, of_activations
from test_errors import Counted
from test_model_untouched import Rendezvous, in_threads, state, users_model
from torch import nn

from captum_fam import CorrespondenceMap, SimilarityScore

# Encoders


class Blended(PooledEncoder):
    """Adds a row, or a number, to each input."""

    def forward(self, x, more):
        return super().forward(x + (more[:, None, None, None] if torch.is_tensor(more) and more.ndim else more))


@pytest.mark.parametrize("size", [None, 2])
def test_arguments_of_the_encoder_are_shared_or_go_row_by_row(size):
    encoder, rows, shelf = seeded(Blended), random(3, seed=5), SHELF[:3]
    correspondence, plain = explainer(encoder), explainer()
    close(
        correspondence.attribute(X, [1, 2, 0], 0.7, reference=shelf, contrast=OTHERS, internal_batch_size=size),
        plain.attribute(X + 0.7, [1, 2, 0], reference=shelf + 0.7, contrast=OTHERS + 0.7),
    )
    there, here = (t + rows[:, None, None, None] for t in (shelf, X))
    for more in (rows, (rows,)):
        found = correspondence.attribute_all(X, more, reference=shelf, contrast="rest", internal_batch_size=size)
        close(found, plain.attribute_all(here, reference=there, contrast="rest"))


@pytest.mark.parametrize("options", [{"target": 1, "reference": SHELF}, {"reference": SHELF[:3], "contrast": OTHERS}])
def test_rows_for_the_inputs_that_do_not_fit_the_other_images_are_an_error_that_says_what_would_work(options):
    encoder = Counted(seeded(Blended))
    with pytest.raises(ValueError, match=r"`additional_forward_args`.*3 inputs") as error:
        explainer(encoder).attribute(X, additional_forward_args=random(3), **options)
    assert encoder.calls == 0
    assert "reference_embedding" not in str(error.value)  # which is an error, too
    assert ("`contrast`" if "contrast" in options else "`reference`") in str(error.value)


def selected(encoder):
    named = Modified(encoder, lambda z: {"z": z})
    return SimilarityScore(named, random(2, 6), "dot", lambda output: output["z"])


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "SimilarityScore": lambda encoder: SimilarityScore(encoder, random(2, 6)),
    "both": lambda encoder: nn.DataParallel(SimilarityScore(encoder, random(2, 6))),
    "output_selector": selected,
    "bound method": lambda encoder: encoder.forward,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@each_call
def test_whatever_is_around_an_encoder_changes_no_map(wrap, call):
    encoder = seeded(PooledEncoder)
    close(CALLS[call](CorrespondenceMap(wrap(encoder), encoder.layer)), CALLS[call](explainer(encoder)))


@pytest.mark.parametrize("call", ["less a list", "all less the rest", "less images"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_and_frozen_parameters_change_no_map(mode, call):
    encoder = seeded(HeadEncoder)
    expected = CALLS[call](explainer(encoder))
    assert not expected.requires_grad
    with mode():
        close(CALLS[call](explainer(encoder)).clone(), expected)
        pair = explainer(encoder, background=OTHERS).attribute_pair(X, SHELF[:3])
    encoder.requires_grad_(False)
    close(CALLS[call](explainer(encoder)), expected)
    close(pair, explainer(encoder, background=OTHERS).attribute_pair(X.clone().requires_grad_(), SHELF[:3]))
    assert not any(M.requires_grad for M in pair)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_maps_have_the_dtype_of_the_activations_and_only_its_rounding(dtype):
    x, shelf, others = (t.to(dtype) for t in (X, SHELF, OTHERS))
    expected, correspondence = of_activations(background=others.double()), of_activations(background=others)
    rounding = {"rtol": 0, "atol": 2 * torch.finfo(dtype).eps}
    for call in (
        lambda c, x, s: c.attribute(x, OWN, reference=s, contrast=1),
        lambda c, x, s: c.attribute_all(x, reference=s),
        lambda c, x, s: torch.cat([M.flatten(1) for M in c.attribute_pair(x, s[:1])], 1),
        lambda c, x, s: c.attribute_matrix(x, s[:1]),
    ):
        found = call(correspondence, x, shelf)
        assert found.dtype == dtype
        close(found.double(), call(expected, x.double(), shelf.double()), **rounding)
        if dtype != torch.float16:  # which torch's autocast on a CPU cannot join
            with torch.autocast("cpu", torch.bfloat16):  # the layer gives the same, and so do the cosines
                close(call(correspondence, x, shelf), found, 0, 0)


def test_an_empty_batch_has_an_empty_map():
    correspondence, none = explainer(background=OTHERS), X[:0]
    with silent():
        for size in (None, 2):
            options = {"reference": SHELF, "internal_batch_size": size}
            for contrast in (None, 1, "rest", OTHERS):
                assert correspondence.attribute(none, 0, contrast=contrast, **options).shape == (0, 1, 4, 4)
            assert correspondence.attribute_all(none, **options).shape == (0, 5, 4, 4)
        here, there = correspondence.attribute_pair(none, SHELF[:1])
        assert here.shape == (0, 1, 4, 4)
        assert there.shape == (0, 1, 3, 5)
        assert correspondence.attribute_matrix(none, SHELF[:1]).shape == (0, 16, 15)


def test_activations_of_zero_are_like_nothing():
    x, dark = random(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).double()
    with silent():
        for one, other in ((x, dark), (dark, x)):
            close(of_activations().attribute(one, reference=other), torch.zeros(2, 1, 4, 4).double(), 0, 0)
            assert not of_activations().attribute_matrix(one, other).any()


def test_images_of_bytes_can_be_taken_away():
    encoder = seeded(OfBytes)
    x, shelf, others = ((40 * t + 128).clamp(0, 255).byte() for t in (X, SHELF, OTHERS))
    expected = explainer(encoder, background=others).attribute(x, OWN, reference=shelf)
    close(explainer(encoder).attribute(x, OWN, reference=shelf, contrast=others), expected)


# Values that are not finite


def spoiled(t, row, value):
    t = t.clone()
    t[row, 1, 2, 3] = value
    return t


def warned_of(which, call):
    """What a call gives that warns once, of these images."""
    text = rf"Activations are not finite \({which}\)"
    with pytest.warns(UserWarning, match=text) as caught:
        found = call()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return found


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [None, 1])
def test_only_the_maps_that_depend_on_what_is_not_finite_are_zero_and_one_warning_names_it(value, size):
    correspondence, options = of_activations(), {"internal_batch_size": size}
    plain = correspondence.attribute_all(X, reference=SHELF)
    bad = spoiled(SHELF, 3, value)
    found = warned_of(
        r"inputs \[1\], references \[3\]",
        lambda: correspondence.attribute_all(spoiled(X, 1, value), reference=bad, **options),
    )
    close(found[[0, 2]][:, [0, 1, 2, 4]], plain[[0, 2]][:, [0, 1, 2, 4]])
    assert not found[1].any()
    assert not found[:, 3].any()
    call = lambda **o: correspondence.attribute(X, [3, 0, 4], reference=bad, **options, **o)  # noqa: E731
    found = warned_of(r"references \[3\]", call)
    close(found, torch.stack([torch.zeros_like(plain[0, 3]), plain[1, 0], plain[2, 4]])[:, None])
    found = warned_of(r"references \[3\]", lambda: call(contrast=[0, 3, 1]))
    close(found[2, 0], plain[2, 4] - plain[2, 1])
    assert not found[:2].any()
    assert not warned_of(r"references \[3\]", lambda: call(contrast="rest")).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_background_that_is_not_finite_leaves_nothing(value):
    others = spoiled(OTHERS, 2, value)
    correspondence = of_activations(background=others)
    assert not warned_of(r"background \[2\]", lambda: correspondence.attribute(X, OWN, reference=SHELF)).any()
    here, there = warned_of(r"background \[2\]", lambda: correspondence.attribute_pair(X, SHELF[:3]))
    assert not here.any()
    assert not there.any()
    plain = of_activations()
    assert not warned_of(r"contrast \[2\]", lambda: plain.attribute(X, 0, reference=SHELF, contrast=others)).any()


def test_of_a_pair_only_the_maps_of_what_is_not_finite_are_zero():
    plain, x = of_activations(), spoiled(X, 1, np.nan)
    for call in (plain.attribute_pair, lambda x, s: (plain.attribute_matrix(x, s),)):
        expected, found = call(X, SHELF[:3]), warned_of(r"inputs \[1\]", lambda call=call: call(x, SHELF[:3]))
        for M, F in zip(expected, found):
            close(F[[0, 2]], M[[0, 2]])
            assert not F[1].any()


def test_a_reference_that_no_input_is_compared_with_is_not_warned_of():
    correspondence, bad = of_activations(), spoiled(SHELF, 3, np.nan)
    with silent():
        found = correspondence.attribute(X, OWN, reference=bad, contrast=1)
    close(found, correspondence.attribute(X, OWN, reference=SHELF, contrast=1))


def test_of_several_layers_only_the_maps_of_one_that_is_not_finite_are_zero():
    encoder = OfActivations(Function(lambda x: x / (x > -5)), *pooled())
    correspondence, x = CorrespondenceMap(encoder, [encoder[0], encoder[1]]), X.clone()
    x[1, 0, 0, 0] = -9
    expected = of_activations().attribute(x, OWN, reference=SHELF)
    early, late = warned_of(r"inputs \[1\]", lambda: correspondence.attribute(x, OWN, reference=SHELF))
    close(late[[0, 2]], expected[[0, 2]])
    assert not late[1].any()
    close(early, expected)


def test_what_is_not_finite_after_the_layer_does_not_matter():
    encoder = seeded(PooledEncoder)
    with silent():
        found = explainer(Modified(encoder, lambda z: z / 0)).attribute(X, OWN, reference=SHELF)
    close(found, explainer(encoder).attribute(X, OWN, reference=SHELF))


# The model


@pytest.mark.parametrize("training", [False, True])
def test_a_call_leaves_model_images_and_gradient_mode_as_they_were(training):
    model = users_model(training=training)
    tensors = [X.clone().requires_grad_(), SHELF.clone(), OTHERS.clone()]
    correspondence, before = explainer(model, background=tensors[2]), (state(model, *tensors), held(model))
    calls = [
        lambda: correspondence.attribute(tensors[0], OWN, reference=tensors[1]),
        lambda: correspondence.attribute_all(tensors[0], reference=tensors[1], contrast="rest"),
        lambda: correspondence.attribute_pair(tensors[0], tensors[1][:3]),
        lambda: correspondence.attribute_matrix(tensors[0], tensors[1][:3]),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="training mode") if training else silent():
            call()
        assert (state(model, *tensors), held(model)) == before
        with torch.no_grad(), pytest.warns(UserWarning, match="training mode") if training else silent():
            call()
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_failing_encoder_is_run_once_more_by_nobody_and_left_as_it_was(fails_at):
    encoder = seeded(PooledEncoder)
    counted = Counted(encoder)

    def fail(*_):
        if counted.calls == fails_at:
            raise RuntimeError("the encoder's own")

    encoder.layer.register_forward_hook(fail)
    before = state(counted)
    with pytest.raises(RuntimeError, match="the encoder's own"):
        explainer(counted, background=OTHERS).attribute(X, OWN, reference=SHELF)
    assert counted.calls == fails_at
    assert state(counted) == before


def test_two_threads_in_the_same_layer_at_once_each_have_their_own_maps():
    model = seeded(lambda: Rendezvous(embedding=6))
    calls = [
        lambda: CALLS["less a list"](explainer(model)),
        lambda: explainer(model).attribute_all(X.flip(0), reference=OTHERS),
    ]
    alone = [call() for call in calls]
    both = threading.Barrier(2)
    model.meet = lambda place: both.wait(10)
    close(in_threads(*calls), alone)
    assert state(model)[0] == state(seeded(lambda: Rendezvous(embedding=6)))[0]


# Captum's conventions


def test_it_is_a_captum_layer_attribution_that_says_what_it_is():
    correspondence = explainer()
    assert isinstance(correspondence, LayerAttribution)
    assert correspondence.has_convergence_delta() is False
    assert correspondence.multiplies_by_inputs is False
    names = [*inspect.signature(CorrespondenceMap.attribute.__wrapped__).parameters][1:6]
    assert names == ["inputs", "target", "additional_forward_args", "attribute_to_layer_input", "relu_attributions"]
    with pytest.raises(NotImplementedError, match="CorrespondenceMap"):
        correspondence.attribute_future()


@pytest.mark.parametrize("options", [{}, {"contrast": "rest"}, {"contrast": 1}, {"contrast": OTHERS}], ids=list)
def test_a_noise_tunnel_without_noise_gives_the_map(options):
    correspondence = explainer()
    found = NoiseTunnel(correspondence).attribute(
        X, nt_type="smoothgrad", nt_samples=3, stdevs=0.0, target=OWN, reference=SHELF, **options
    )
    close(found, correspondence.attribute(X, OWN, reference=SHELF, **options))


# Errors


V, T, EMBEDDED = ValueError, TypeError, random(1, 6)


def chosen(correspondence, contrast):
    return correspondence.attribute(X, 0, reference=SHELF, contrast=contrast)


def less(correspondence, background):
    return explainer(correspondence.forward_func, background=background).attribute(X, reference=X)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda c: c.attribute(X), V, r"reference=images"),
        (lambda c: c.attribute_all(X), V, r"reference=images"),
        (lambda c: c.attribute(X, reference_embedding=EMBEDDED), V, r"embeddings have none.*reference=images"),
        (lambda c: c.attribute_all(X, reference=X, reference_embedding=EMBEDDED), V, r"reference=images"),
        (lambda c: chosen(c, contrast="self"), V, r"`contrast`.*images.*'self'"),
        (lambda c: c.attribute(X, reference=SHELF[:1], contrast="self"), V, r"`contrast`.*images.*'self'"),
        (lambda c: chosen(c, contrast="other"), V, r"`contrast`.*images.*'other'"),
        (lambda c: chosen(c, contrast=5), V, r"`contrast`.*0 to 4, but got 5"),
        (lambda c: chosen(c, contrast=[0, 1]), V, r"`contrast`.*one int, or 3.*\(2,\)"),
        (lambda c: chosen(c, contrast=0.5), T, r"`contrast`.*int.*0.5"),
        (lambda c: chosen(c, contrast=OTHERS[:0]), V, r"`contrast`.*empty"),
        (lambda c: chosen(c, contrast=OTHERS[0]), V, r"`contrast`.*batch dimension"),
        (lambda c: chosen(c, contrast=(OTHERS, OTHERS)), V, r"`contrast`.*1 tensor"),
        (lambda c: c.attribute(X, reference=SHELF[:1], contrast=0), V, r"contrast=0.*two references.*1.*images"),
        (lambda c: c.attribute_all(X, reference=SHELF[:1], contrast="rest"), V, r"'rest'.*two references.*images"),
        (lambda c: c.attribute_all(X, reference=SHELF, contrast=2), V, r"`contrast`.*images.*got 2"),
        (lambda c: c.attribute_all(X, reference=SHELF, contrast="self"), V, r"`contrast`.*images.*'self'"),
        (lambda c: c.attribute_all(X, reference=SHELF[:0]), V, r"at least one reference.*`reference`"),
        (lambda c: c.attribute(X, 5, reference=SHELF), V, r"`target`.*0 to 4, but got 5"),
        (lambda c: c.attribute_pair(X, SHELF), V, r"`reference`.*one reference or 3.*got 5"),
        (lambda c: c.attribute_matrix(X, SHELF), V, r"`reference`.*one reference or 3.*got 5"),
        (lambda c: c.attribute(X, reference=(X, X)), V, r"`reference`.*1 tensor.*got 2"),
        (lambda c: c.attribute(X, reference=X[0]), V, r"`reference`.*reference\[None\]"),
        (lambda c: c.attribute(X, reference=[X[0], X[1]]), T, r"`reference`.*torch.stack"),
        (lambda c: c.attribute(X, reference=X, internal_batch_size=0), V, r"`internal_batch_size`.*positive.*0"),
        (lambda c: explainer(c.forward_func, background=X[:0]), V, r"`background`.*empty; leave it out"),
        (lambda c: explainer(c.forward_func, background=[X]), T, r"`background`.*torch.stack"),
        (lambda c: less(c, X[0]), V, r"`background`.*batch dimension"),
        (lambda c: less(c, (X, X)), V, r"`background`.*1 tensor"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_model_runs_with_what_would(call, error, match):
    encoder = Counted(seeded(PooledEncoder))
    with pytest.raises(error, match=match):
        call(explainer(encoder))
    assert encoder.calls == 0


def test_a_missing_target_is_asked_for_when_the_encoder_has_been_tried_on_one_input():
    encoder = Counted(seeded(PooledEncoder))
    with pytest.raises(ValueError, match=r"`target` is needed.*5 references for 3.*target=<int>"):
        explainer(encoder).attribute(X, reference=SHELF)
    assert encoder.calls == 1


def test_a_score_has_no_reference_to_compare_places_with():
    encoder = seeded(PooledEncoder)
    correspondence = CorrespondenceMap(SimilarityScore(encoder, random(2, 6)), encoder.layer)
    for call in (lambda: correspondence.attribute(X, 1), lambda: correspondence.attribute_all(X)):
        with pytest.raises(ValueError, match=r"embeddings have none.*reference=images"):
            call()


def test_the_matrix_of_a_layer_that_gives_several_tensors_is_an_error():
    encoder, inputs = seeded(TwoInputEncoder), (random(2, 3, 8, 8), random(2, 1, 9, 9))
    with pytest.raises(ValueError, match="layer with one tensor, but it has 2"):
        explainer(encoder).attribute_matrix(inputs, inputs)
