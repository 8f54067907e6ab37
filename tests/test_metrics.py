"""Metrics of attribution maps, each against its formula, and what a perfect, a random and a reversed map score."""

import contextlib
import copy
import itertools
from functools import partial

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import HeadEncoder, TokenEncoder, random, seeded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import nn

from captum_fam import FeatureActivationMap, LabelFreeActivationMap, SimilarityScore
from captum_fam.metrics import (
    average_drop,
    average_increase,
    box_masks,
    cascading_randomization,
    deletion,
    energy_pointing_game,
    insertion,
    iou,
    pointing_game,
    rank_correlation,
    reference_dependence,
    relevance_rank_accuracy,
    road,
)
from captum_fam.metrics._perturbed import ranks
from captum_fam.metrics._road import imputed

many = settings(deadline=None, max_examples=60)


close = partial(helpers.close, check_dtype=False)


def row(*values):
    """One input or map (1, 1, L) of a line of values."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)


def linear(*weights):
    """Scores (B, K) that are weighted sums of the inputs, with one row of weights for each reference."""
    return SimilarityScore(nn.Flatten(), torch.stack([w.double().flatten() for w in weights]), "dot")


def total(x):
    return x.flatten(1).sum(1)


class Seen(nn.Module):
    """A score that keeps every batch of inputs that it is asked for."""

    def __init__(self, score=total):
        super().__init__()
        self.score, self.batches = score, []

    def forward(self, x, *args):
        self.batches.append(x.clone())
        return self.score(x, *args)

    @property
    def inputs(self):
        return torch.cat(self.batches)


# Scores of changed inputs: what all these metrics share

X = random(2, 3, 4, 5)
MAPS = random(2, 1, 4, 5, seed=2)
OTHER_MAPS = (random(2, 1, 4, 5, seed=3) * 8).round()  # exact in any precision
WEIGHTS = [random(3, 4, 5, seed=4), random(3, 4, 5, seed=5), random(3, 4, 5, seed=6)]
SCORE = linear(*WEIGHTS)


def dependence(score, inputs, maps, target=0, other_target=1, **options):
    others = OTHER_MAPS[: len(maps)].to(maps.dtype if isinstance(maps, torch.Tensor) else torch.float64)
    options = {"baselines": "zero", "n_cells": 4, **options}
    return reference_dependence(score, inputs, maps, others, target, other_target, **options)


# Against zero: a blur in proportion leaves images as small as these what they are.
SCORED = {
    "deletion": partial(deletion, baselines="zero"),
    "insertion": partial(insertion, baselines="zero"),
    "average_drop": average_drop,
    "average_increase": average_increase,
    "road": road,
    "reference_dependence": dependence,
}
each_scored = pytest.mark.parametrize("metric", SCORED.values(), ids=SCORED)
each_with_target = pytest.mark.parametrize("metric", list(SCORED.values())[:-1], ids=list(SCORED)[:-1])
each_curve = pytest.mark.parametrize("curve", [deletion, insertion])
each_with_baselines = pytest.mark.parametrize("metric", [m for m in SCORED.values() if m is not road])


def parts(found):
    """The tensors of a result."""
    return [found] if isinstance(found, torch.Tensor) else list(found)


def same(found, expected):
    for one, other in zip(parts(found), parts(expected)):
        close(one, other)


def moved(found, expected):
    return any(not torch.allclose(one, other) for one, other in zip(parts(found), parts(expected)))


def of_two(metric):
    """Options under which the metric has no default target to take."""
    return {} if metric is dependence else {"target": 0}


@each_with_target
def test_a_target_may_be_a_number_or_one_for_each_input(metric):
    scores = [metric(linear(w), X, MAPS) for w in WEIGHTS]
    for shared in (1, torch.tensor(1), torch.tensor([1]), [1, 1], -2):
        same(metric(SCORE, X, MAPS, target=shared), scores[1])
    if metric is not average_increase:
        assert moved(scores[1], scores[2])
    for mixed in ([2, 0], torch.tensor([2, 0])):
        for part, (two, zero) in zip(
            parts(metric(SCORE, X, MAPS, target=mixed)), zip(parts(scores[2]), parts(scores[0]))
        ):
            if len(part) == len(X):
                close(part, torch.stack([two[0], zero[1]]))


@each_with_target
@pytest.mark.parametrize("limit", [None, 1, 3])
def test_without_a_target_as_many_references_as_inputs_are_paired(metric, limit):
    found = metric(linear(*WEIGHTS[:2]), X, MAPS, max_examples_per_batch=limit)
    same(found, metric(SCORE, X, MAPS, target=[0, 1]))


@each_with_target
def test_one_score_needs_no_target_in_either_of_its_shapes(metric):
    expected = metric(linear(torch.ones(3, 4, 5)), X, MAPS)
    same(metric(total, X, MAPS), expected)
    same(metric(lambda x: total(x)[:, None], X, MAPS), expected)


@each_with_target
def test_a_classifier_of_many_classes_needs_a_target_also_with_as_many_inputs(metric):
    with pytest.raises(ValueError, match=r"`target`.*2 outputs"):
        metric(nn.Sequential(nn.Flatten(), nn.Linear(60, 2).double()), X, MAPS)


@each_scored
def test_each_input_is_scored_as_if_it_were_alone(metric):
    options = {"noise": 0} if metric is road else {}
    together = metric(SCORE, X, MAPS, **of_two(metric), **options)
    alone = metric(SCORE, X[:1], MAPS[:1], **of_two(metric), **options)
    for one, both in zip(parts(alone), parts(together)):
        close(one, both[: len(one)])


@each_scored
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
def test_the_batch_size_limits_what_the_model_sees_and_changes_nothing(metric, limit):
    seen = Seen(SCORE)
    found = metric(seen, X, MAPS, **of_two(metric), max_examples_per_batch=limit)
    same(found, metric(SCORE, X, MAPS, **of_two(metric)))
    sizes = [len(batch) for batch in seen.batches]
    assert max(sizes) == min(limit, sum(sizes))


@each_scored
def test_without_a_limit_the_model_sees_as_many_inputs_as_were_given(metric):
    seen = Seen(SCORE)
    metric(seen, X, MAPS, **of_two(metric))
    assert {len(batch) for batch in seen.batches} == {len(X)}


@each_scored
@pytest.mark.parametrize("limit", [None, 1, 3])
def test_arguments_with_a_row_for_each_input_go_with_their_inputs(metric, limit):
    def scaled(x, scale, factor, bias, name):
        assert factor == 2
        assert bias.shape == (3,)
        assert name == "name"
        return SCORE(x) * scale * factor + bias

    scale = torch.tensor([[1.0], [-3.0]]).double()
    options = {**of_two(metric), "max_examples_per_batch": limit}
    args = (scale, torch.tensor(2), torch.zeros(3), "name")
    found = metric(scaled, X, MAPS, additional_forward_args=args, **options)
    for number in (0, 1):
        expected = metric(lambda x, s=2 * scale[number]: SCORE(x) * s, X, MAPS, **options)
        for one, other in zip(parts(found), parts(expected)):
            if len(one) == len(X):
                close(one[number], other[number])


@each_with_target
def test_one_additional_argument_needs_no_tuple(metric):
    scale = torch.tensor([2.0, -3.0]).double()
    found = metric(lambda x, s: total(x) * s, X, MAPS, additional_forward_args=scale)
    same(found, metric(lambda x: total(x) * scale[: len(x)], X, MAPS))


@each_scored
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_model_sees_the_inputs_own_precision_and_the_result_is_at_least_single(metric, dtype):
    # Values of few bits, and a score in double precision, so that only the result could lose something.
    x, maps = (X * 8).round().clamp(-16, 16), (MAPS * 8).round()
    weights = torch.stack(WEIGHTS).flatten(1).mT
    seen = Seen(lambda x: x.double().flatten(1) @ weights)
    options = {**of_two(metric), **({"noise": 0} if metric is road else {})}
    found = metric(seen, x.to(dtype), maps.to(dtype), **options)
    assert seen.inputs.dtype == dtype
    expected = metric(SCORE, x, maps, **options)
    for one, other in zip(parts(found), parts(expected)):
        assert one.dtype in (torch.float32, torch.float64)
        if metric is not average_increase:
            eps = torch.finfo(dtype).eps
            close(one, other, rtol=16 * eps + 1e-6, atol=100 * eps + 1e-6)


@each_scored
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_in_half_precision_become_single(metric, dtype):
    found = metric(lambda x: SCORE(x).to(dtype), X, MAPS, **of_two(metric))
    assert all(part.dtype in (torch.float32, torch.float64) for part in parts(found))


@each_scored
def test_no_inputs_have_no_scores(metric):
    found = metric(SCORE, X[:0], MAPS[:0], **of_two(metric))
    assert {len(part) for part in parts(found)} <= {0, 21}


@each_curve
@pytest.mark.parametrize("baselines", ["blur", "mean", 1.0])
def test_no_inputs_have_empty_curves_at_any_baseline(curve, baselines):
    assert curve(SCORE, X[:0], MAPS[:0], baselines, target=0).scores.shape == (0, 21)


@each_scored
def test_no_gradient_is_recorded_and_the_inputs_stay_as_they_were(metric):
    x, maps = X.clone().requires_grad_(), MAPS.clone().requires_grad_()
    weights = torch.stack(WEIGHTS).flatten(1).mT.clone().requires_grad_()
    enabled = []

    def score(x):
        enabled.append(torch.is_grad_enabled())
        return x.flatten(1) @ weights

    found = metric(score, x, maps, **of_two(metric))
    assert not any(part.requires_grad for part in parts(found))
    assert not any(enabled)
    assert torch.equal(x, X)
    assert torch.equal(maps, MAPS)


@each_scored
def test_the_global_random_state_is_left_alone(metric):
    before = torch.get_rng_state()
    metric(SCORE, X, torch.zeros_like(MAPS), **of_two(metric))
    assert torch.equal(torch.get_rng_state(), before)


@each_scored
def test_batch_norm_in_training_mode_is_warned_of(metric):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(60, 3)).double()
    with pytest.warns(UserWarning, match=r"training mode.*batch norm"):
        metric(model, X, MAPS, **of_two(metric))
    with helpers.silent():
        metric(model.eval(), X, MAPS, **of_two(metric))


@each_scored
@pytest.mark.parametrize("size", [(2, 2), (3, 7), (8, 10)])
def test_maps_of_another_size_are_resized_linearly(metric, size):
    small = random(2, 1, *size, seed=7)
    resized = F.interpolate(small, (4, 5), mode="bilinear", align_corners=False)
    same(metric(SCORE, X, small, **of_two(metric)), metric(SCORE, X, resized, **of_two(metric)))


@each_scored
def test_channels_of_a_map_are_summed(metric):
    maps = random(2, 3, 4, 5, seed=8)
    summed = maps.sum(1, keepdim=True)
    same(metric(SCORE, X, maps, **of_two(metric)), metric(SCORE, X, summed, **of_two(metric)))


@each_curve
@pytest.mark.parametrize("shape", [(5,), (3, 2, 2)])
def test_inputs_have_any_number_of_spatial_dimensions(curve, shape):
    x, maps, weights = random(2, 3, *shape), random(2, 1, *[2] * len(shape), seed=2), random(3, *shape, seed=3)
    resized = F.interpolate(maps, shape, mode={1: "linear", 3: "trilinear"}[len(shape)], align_corners=False)
    places = int(np.prod(shape))
    found = curve(linear(weights), x, maps, "mean", n_steps=places)
    mean = x.flatten(2).mean(2).reshape(2, 3, *[1] * len(shape)).expand_as(x)
    for number in range(2):
        expected = curve_by_hand(curve, x[number], resized[number, 0], mean[number], weights, places)
        close(found.scores[number], expected)
    assert average_drop(linear(weights), x, maps, "zero").shape == (2,)
    assert reference_dependence(
        linear(weights, -weights.flip(-1)), x, maps, -maps, 0, 1, "zero", n_cells=2
    ).change.shape == (2,)


@each_scored
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"forward_func": 3}, TypeError, r"`forward_func`.*3"),
        ({"forward_func": lambda x: x}, ValueError, r"`forward_func`.*scores \(2,\) or \(2, K\).*\(2, 3, 4, 5\)"),
        ({"forward_func": lambda x: SCORE(x).sum(0)}, ValueError, r"`forward_func`.*shape \(3,\)"),
        ({"forward_func": lambda x: [1.0, 2.0]}, ValueError, r"`forward_func`.*list"),
        ({"inputs": (X, X)}, TypeError, r"`inputs`.*tuple"),
        ({"inputs": X.long()}, TypeError, r"`inputs`.*floating-point.*int64"),
        ({"inputs": X[:, 0, 0]}, TypeError, r"`inputs`.*\(B, C, \*spatial\).*\(2, 5\)"),
        ({"maps": MAPS.numpy()}, TypeError, r"`attributions`.*ndarray"),
        ({"maps": MAPS.long()}, TypeError, r"`attributions`.*floating-point.*int64"),
        ({"maps": MAPS[:, 0]}, ValueError, r"`attributions`.*2 spatial dimensions.*\(2, 4, 5\)"),
        ({"maps": MAPS[:1]}, ValueError, r"`attributions`.*2 inputs.*got 1"),
        ({"maps": MAPS / 0}, ValueError, r"`attributions`.*finite.*40"),
        ({"target": 3}, ValueError, r"`target`.*3 references.*got 3"),
        ({"target": [0, 1, 2]}, ValueError, r"`target`.*2 of them.*\(3,\)"),
        ({"target": "one"}, TypeError, r"`target`.*'one'"),
        ({"target": 1.5}, TypeError, r"`target`.*1\.5"),
        ({"max_examples_per_batch": 0}, ValueError, r"`max_examples_per_batch`.*positive int.*0"),
        ({"max_examples_per_batch": 2.0}, TypeError, r"`max_examples_per_batch`.*positive int.*2\.0"),
    ],
)
def test_an_argument_that_cannot_work_is_named(metric, change, error, match):
    given = {"forward_func": SCORE, "inputs": X, "maps": MAPS, "target": 0, **change}
    with pytest.raises(error, match=match):
        metric(given.pop("forward_func"), given.pop("inputs"), given.pop("maps"), **given)


@each_with_baselines
@pytest.mark.parametrize(
    ("baselines", "match"),
    [
        ("black", r'`baselines`.*"blur", "mean", "zero".*\'black\''),
        (None, r'`baselines`.*"blur", "mean", "zero".*None'),
        (True, r'`baselines`.*"blur", "mean", "zero".*True'),
        (torch.zeros(3, 3, 4, 5), r"`baselines`.*\(2, 3, 4, 5\).*\(3, 3, 4, 5\)"),
        (torch.zeros(1, 2, 3, 4, 5), r"`baselines`.*\(2, 3, 4, 5\).*\(1, 2, 3, 4, 5\)"),
    ],
)
def test_baselines_that_cannot_work_are_named(metric, baselines, match):
    with pytest.raises(ValueError, match=match):
        metric(SCORE, X, MAPS, baselines=baselines, **of_two(metric))


@pytest.mark.parametrize("metric", [deletion, insertion, average_drop])
def test_a_blur_is_for_images_only(metric):
    with pytest.raises(ValueError, match=r"`baselines='blur'`.*images.*\(1, 1, 4\)"):
        metric(total, row(1, 2, 3, 4), row(1, 2, 3, 4), baselines="blur")


@each_curve
@pytest.mark.parametrize(("n_steps", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_number_of_steps_that_cannot_work_is_named(curve, n_steps, error):
    with pytest.raises(error, match=rf"`n_steps`.*positive int.*{n_steps}"):
        curve(SCORE, X, MAPS, target=0, n_steps=n_steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_scored
def test_a_model_on_a_gpu_gives_the_scores_of_the_cpu(metric):
    options = {**of_two(metric), "additional_forward_args": torch.tensor([1.0, 2.0]).double()}
    on_gpu = copy.deepcopy(SCORE).cuda()
    found = metric(lambda x, s: on_gpu(x) * s.to(x)[:, None], X.cuda(), MAPS, **options)
    expected = metric(lambda x, s: SCORE(x) * s[:, None], X, MAPS, **options)
    for one, other in zip(parts(found), parts(expected)):
        assert one.is_cuda
        close(one.cpu(), other, rtol=1e-6, atol=1e-7)


# Deletion and insertion

IMAGE = torch.tensor([[[[4.0, 3.0], [2.0, 1.0]]]]).double()
PLACES = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]).double()


def curve_by_hand(curve, x, m, baseline, weights, n_steps):
    """Scores of one input (C, *spatial) with map (*spatial): places move from one to the other, largest first."""
    start, end = (x, baseline) if curve is deletion else (baseline, x)
    start, end, weights = (t.reshape(len(x), -1).numpy() for t in (start, end, weights))
    order, scores = np.argsort(-m.numpy().ravel()), []
    for step in range(n_steps + 1):
        now = start.copy()
        for place in order[: round(step * len(order) / n_steps)]:
            now[:, place] = end[:, place]
        scores.append((now * weights).sum())
    return scores


@pytest.mark.parametrize(
    ("curve", "baselines", "scores", "auc"),
    [
        (deletion, "zero", [10, 6, 3, 1, 0], 3.75),
        (insertion, "zero", [0, 4, 7, 9, 10], 6.25),
        (deletion, "mean", [10, 8.5, 8, 8.5, 10], 8.75),
        (insertion, "mean", [10, 11.5, 12, 11.5, 10], 11.25),
        (deletion, 1, [10, 7, 5, 4, 4], 5.75),
        (insertion, 1.0, [4, 7, 9, 10, 10], 8.25),
        (deletion, PLACES, [10, 6, 4, 4, 6], 5.5),
        (insertion, PLACES, [6, 10, 12, 12, 10], 10.5),
        (insertion, PLACES[0, 0, 1], [10, 12, 12, 12, 10], 11.5),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (1, 1, 4)])
def test_a_curve_by_hand(curve, baselines, scores, auc, shape):
    if isinstance(baselines, torch.Tensor):
        if baselines.ndim == 1 and len(shape) == 3:
            baselines = baselines.repeat(2)
        baselines = baselines.reshape(shape) if baselines.numel() == 4 else baselines
    x = IMAGE.reshape(shape)
    found = curve(total, x, x, baselines, n_steps=4)
    close(found.scores, [scores])
    close(found.auc, [auc])
    close(found.fractions, [0, 0.25, 0.5, 0.75, 1], atol=1e-7)


def test_the_mean_is_of_each_input_and_channel():
    x = torch.tensor([[[1.0, 3.0], [10.0, 30.0]], [[5.0, 7.0], [0.0, 0.0]]])
    seen = Seen()
    deletion(seen, x, x, "mean", n_steps=1)
    close(seen.inputs[2:], torch.tensor([[[2.0, 2.0], [20.0, 20.0]], [[6.0, 6.0], [0.0, 0.0]]]))


@pytest.mark.parametrize(("size", "sigma"), [((56, 56), 2.5), ((112, 112), 5)])
def test_the_blur_is_a_gaussian_of_ten_pixels_for_images_of_224_and_in_proportion(size, sigma):
    x = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = Seen()
    deletion(seen, x, x, n_steps=1)
    blurred = gaussian_filter(x[0].numpy(), (0, sigma, sigma), mode="mirror")
    close(seen.inputs[1], blurred, rtol=0, atol=2e-3)  # the sums differ by what lies beyond three sigma
    wider = gaussian_filter(x[0].numpy(), (0, 1.1 * sigma, 1.1 * sigma), mode="mirror")
    assert np.abs(wider - blurred).max() > 4e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 30), (3, 2)])
def test_a_blur_leaves_an_image_of_one_colour_as_it_is_at_any_size(size):
    x, seen = torch.full((1, 1, *size), 3.0).double(), Seen()
    deletion(seen, x, x, n_steps=1)
    close(seen.inputs, torch.cat([x, x]))


@each_curve
def test_a_baseline_expands_over_inputs_channels_and_places(curve):
    for baseline in (random(3, 1, 1), random(1, 3, 4, 5), random(5), random(2, 1, 1, 1)):
        same(
            curve(SCORE, X, MAPS, baseline, target=0),
            curve(SCORE, X, MAPS, baseline.expand_as(X).clone(), target=0),
        )


DISTINCT = st.permutations(range(6)).map(lambda p: torch.tensor(p).double().reshape(1, 1, 2, 3))
NUMBERS = hnp.arrays(np.float64, (3, 2, 3), elements=st.floats(-8, 8, width=16)).map(torch.from_numpy)


@each_curve
@pytest.mark.parametrize("n_steps", [1, 2, 3, 6])
@given(m=DISTINCT, x=NUMBERS, baseline=NUMBERS, weights=NUMBERS)
@settings(deadline=None, max_examples=25)
def test_a_curve_moves_equal_numbers_of_places_in_the_order_of_the_map(curve, n_steps, m, x, baseline, weights):
    found = curve(linear(weights), x[None], m, baseline, n_steps=n_steps)
    expected = curve_by_hand(curve, x, m[0, 0], baseline, weights, n_steps)
    close(found.scores, [expected], atol=1e-9)
    close(found.auc, [(sum(expected) - (expected[0] + expected[-1]) / 2) / n_steps], rtol=1e-6, atol=1e-5)


@given(m=DISTINCT, x=NUMBERS, baseline=NUMBERS, weights=NUMBERS)
@many
def test_insertion_is_the_deletion_of_the_reversed_map_read_backwards(m, x, baseline, weights):
    put_in = insertion(linear(weights), x[None], m, baseline, n_steps=6)
    taken_out = deletion(linear(weights), x[None], -m, baseline, n_steps=6)
    close(put_in.scores, taken_out.scores.flip(1))
    close(put_in.auc, taken_out.auc, rtol=1e-6, atol=1e-5)


@each_curve
@pytest.mark.parametrize("n_steps", [1, 3, 7, 20, 50])
def test_a_curve_has_as_many_steps_as_asked_for_from_nothing_to_everything(curve, n_steps):
    found = curve(total, X, MAPS, "zero", n_steps=n_steps)
    assert found.scores.shape == (2, n_steps + 1)
    close(found.fractions, torch.linspace(0, 1, n_steps + 1), rtol=1e-6)
    ends = found.scores[:, [0, -1]]
    close(ends if curve is deletion else ends.flip(1), torch.stack([total(X), torch.zeros(2)], 1))


def test_a_curve_has_twenty_steps_by_default():
    assert deletion(total, X, MAPS).scores.shape == (2, 21)


def test_a_step_changes_as_near_to_its_fraction_of_the_places_as_it_can():
    x = torch.ones(1, 1, 10).double()
    found = insertion(total, x, x, "zero", n_steps=4)
    assert (found.scores - 10 * found.fractions).abs().max() <= 0.5
    close(found.scores.frac(), torch.zeros(1, 5))


@each_curve
@given(m=DISTINCT, factor=st.sampled_from([0.5, 2.0, 64.0]), shift=st.integers(-9, 9))
@many
def test_a_curve_reads_only_the_order_of_the_values(curve, m, factor, shift):
    x = random(1, 3, 2, 3)
    same(curve(total, x, m, "zero"), curve(total, x, m * factor + shift, "zero"))


@given(hnp.arrays(np.int64, (4, 4), elements=st.integers(1, 50), unique=True), DISTINCT)
@many
def test_no_map_deletes_faster_than_the_perfect_one_nor_slower_than_its_reverse(values, m):
    x = torch.from_numpy(values).double()[None, None, :2, :3]
    best, found, worst = (deletion(total, x, a, "zero", n_steps=6).auc for a in (x, m, -x))
    assert best <= found <= worst
    assert best < worst
    best, found, worst = (insertion(total, x, a, "zero", n_steps=6).auc for a in (x, m, -x))
    assert best >= found >= worst


@pytest.mark.parametrize(("curve", "sign"), [(deletion, 1), (insertion, -1)])
def test_random_maps_score_half_the_score_on_average_and_the_perfect_map_beats_them_all(curve, sign):
    x = torch.arange(1.0, 17).double().reshape(1, 1, 4, 4)
    chance = curve(total, x.expand(500, -1, -1, -1), random(500, 1, 4, 4), "zero", n_steps=16).auc
    assert abs(chance.mean() - total(x) / 2) < 4 * chance.std() / 500**0.5
    perfect, reverse = (curve(total, x, m, "zero", n_steps=16).auc for m in (x, -x))
    assert ((sign * perfect < sign * chance) & (sign * chance < sign * reverse)).all()


@each_curve
def test_ties_fall_in_an_order_of_their_seed(curve):
    x, flat = torch.arange(1.0, 9).double().reshape(1, 1, 8), torch.zeros(1, 1, 8)
    curves = [curve(total, x, flat, "zero", n_steps=8, seed=seed).scores for seed in range(40)]
    for seed in (0, 7):
        close(curve(total, x, flat, "zero", n_steps=8, seed=seed).scores, curves[seed])
    close(curve(total, x, flat, "zero", n_steps=8).scores, curves[0])
    assert len({tuple(c[0].tolist()) for c in curves}) > 30
    first = {float((c[0, 1] - c[0, 0]).abs()) for c in curves}
    assert first == set(x.flatten().tolist())  # each place comes first under some seed
    assert abs(torch.stack(curves).mean() - 18) < 1  # half the score: no end of the input is preferred


@each_curve
def test_only_ties_fall_in_random_order(curve):
    x, m = row(8, 4, 2, 1), row(3, 1, 1, 0)
    curves = torch.cat([curve(total, x, m, "zero", n_steps=4, seed=seed).scores for seed in range(20)])
    assert (curves[:, [0, 1, 3, 4]].std(0) == 0).all()
    step = 4 - 2 if curve is deletion else 2
    assert len(curves[:, step].unique()) == 2


# Average drop and average increase


def test_an_average_drop_by_hand():
    x, m = row(1, 2, 3, 4), row(0, 1, 2, 4)  # seen through 0, 1/4, 1/2, 1
    close(average_drop(total, x, m), [(10 - 6) / 10])
    close(average_drop(total, x, m, 1), [(10 - 8.25) / 6])
    close(average_drop(total, x, row(-5, 0, 2, 4)), [(10 - 5.5) / 10])  # the positive part
    close(average_drop(total, x, row(2, 2, 3, 4)), [(10 - 5.5) / 10])  # from its smallest value
    close(average_drop(total, row(1, 1, -1, 2), row(1, 1, 0, 1)), [0])  # a rise is no drop
    close(average_drop(total, row(1, 1, -1, 2), row(0, 0, 1, 0)), [1])  # -1 for 3: more than all of it


def test_an_average_increase_by_hand():
    x = row(1, 1, -1, 2)
    close(average_increase(total, x, row(1, 1, 0, 1)), [1])
    close(average_increase(total, x, row(0, 1, 0, 1)), [0])  # 3 for 3 is no rise
    close(average_increase(total, x, row(0, 0, 0, 1)), [0])
    close(average_increase(total, -x, row(0, 0, 0, 1)), [1])
    close(average_increase(total, row(1, 2), row(1, 0), row(0, 3)), [1])  # what is hidden shows the baseline
    assert average_increase(total, row(1, 2), row(1, 0)).is_floating_point()


def test_the_default_baseline_is_zero():
    for metric in (average_drop, average_increase):
        same(metric(SCORE, X, MAPS, target=[0, 1]), metric(SCORE, X, MAPS, torch.zeros_like(X), target=[0, 1]))
    assert moved(average_drop(SCORE, X, MAPS, target=0), average_drop(SCORE, X, MAPS, 1.0, target=0))


LINES = hnp.arrays(np.float64, (6,), elements=st.floats(-8, 8, width=16))


@given(x=LINES, m=LINES, weights=LINES)
@many
def test_where_the_baseline_scores_zero_the_drop_is_the_published_one(x, m, weights):
    assume((x * weights).sum() > 0.1)
    positive = np.maximum(m, 0)
    assume(np.ptp(positive) > 0.1)
    m01 = (positive - positive.min()) / np.ptp(positive)
    whole, seen = (x * weights).sum(), (x * m01 * weights).sum()
    score, x, m = linear(torch.from_numpy(weights)), row(*x), row(*m)
    close(average_drop(score, x, m), [min(1, max(0, whole - seen) / whole)])
    if abs(seen - whole) > 1e-6:
        close(average_increase(score, x, m), [float(seen > whole)])


@given(x=LINES, m=LINES, weights=LINES, factor=st.floats(0.125, 8), shift=st.integers(-64, 64))
@many
def test_a_drop_and_an_increase_stay_when_the_score_is_scaled_and_shifted(x, m, weights, factor, shift):
    assume(abs((x * weights).sum()) > 0.1)
    score, x, m = linear(torch.from_numpy(weights)), row(*x), row(*m)

    def other(x):
        return score(x) * factor + shift

    close(average_drop(other, x, m), average_drop(score, x, m), atol=1e-9)
    assume(abs(score(x) - score(x * unit(m))) > 1e-6)
    close(average_increase(other, x, m), average_increase(score, x, m))


def unit(m):
    """The positive part of one map, from its smallest value to its largest."""
    m = m.clamp(min=0)
    return (m - m.min()) / ((m.max() - m.min()) or 1)


@pytest.mark.parametrize("shift", [-3.0, -30.0, -10.0])
def test_a_map_that_hides_what_matters_drops_also_where_the_similarity_is_not_positive(shift):
    x = row(4, 4, 1, 1)

    def score(x):  # 10 or less than zero: the published drop is zero or less, or 0 / 0
        return total(x) + shift

    close(average_drop(score, x, row(0, 0, 1, 1)), [0.8])
    close(average_drop(score, x, row(1, 1, 0, 0)), [0.2])


@pytest.mark.parametrize("baselines", ["zero", "mean", 0.25])
def test_a_flat_map_shows_nothing(baselines):
    for flat in (0.0, -1.0, 1.0):
        m = torch.full((2, 1, 4, 5), flat)
        close(average_drop(lambda x: (x**2).flatten(1).sum(1), X, m, baselines), [1, 1])
        close(average_increase(lambda x: (x**2).flatten(1).sum(1), X, m, baselines), [0, 0])


def test_the_average_drop_of_a_flat_map_of_low_resolution_is_that_of_nothing():
    x = torch.ones(1, 1, 7, 7).double()
    close(average_drop(total, x, torch.full((1, 1, 3, 3), 0.1)), [1])


def test_a_map_that_shows_nearly_everything_has_nearly_no_drop():
    x, m = torch.ones(1, 1, 100).double(), torch.ones(1, 1, 100)
    m[..., 0] = 0
    close(average_drop(total, x, m), [0.01])


def test_where_the_whole_input_adds_nothing_any_drop_is_one():
    score, x = linear(torch.tensor([1.0, -1.0])), row(0.25, 0.25)
    close(average_drop(score, x, row(0, 1)), [1])
    close(average_drop(score, x, row(1, 0)), [0])
    close(average_drop(score, x, row(0, 0)), [0])


@given(x=LINES, m=LINES, weights=LINES)
@many
def test_a_drop_is_between_zero_and_one_and_an_increase_one_of_them(x, m, weights):
    score, x, m = linear(torch.from_numpy(weights)), row(*x), row(*m)
    assert 0 <= average_drop(score, x, m) <= 1
    assert average_increase(score, x, m) in (0, 1)


def test_a_perfect_map_neither_drops_nor_stays_and_the_reverse_drops_all():
    contributions = random(300, 1, 16)
    perfect, chance = (contributions > 0).double(), random(300, 1, 16, seed=2)
    whole = total(contributions) > 1  # where the whole input adds something
    x, perfect, chance = contributions[whole], perfect[whole], chance[whole]
    assert len(x) > 50
    close(average_drop(total, x, perfect), torch.zeros(len(x)))
    close(average_increase(total, x, perfect), torch.ones(len(x)))
    close(average_drop(total, x, -x), torch.ones(len(x)))
    close(average_increase(total, x, -x), torch.zeros(len(x)))
    assert 0.3 < average_drop(total, x, chance).mean() < 0.9
    assert 0 < average_increase(total, x, chance).mean() < 0.4


# Remove and debias


def test_a_missing_pixel_is_the_weighted_mean_of_its_neighbours():
    image = torch.arange(1.0, 10).double().reshape(1, 3, 3) ** 2
    missing = torch.zeros(3, 3, dtype=torch.bool)
    missing[1, 1] = True
    close(imputed(image, missing)[0, 1, 1], (4 + 16 + 36 + 64) / 6 + (1 + 9 + 49 + 81) / 12)
    missing = torch.zeros(3, 3, dtype=torch.bool)
    missing[0, 0] = True  # a corner has two direct neighbours and a diagonal one
    close(imputed(image, missing)[0, 0, 0], ((4 + 16) / 6 + 25 / 12) / (5 / 12))
    missing[0, 0], missing[0, 1] = False, True
    close(imputed(image, missing)[0, 0, 1], ((1 + 9 + 25) / 6 + (16 + 36) / 12) / (8 / 12))


@st.composite
def holed_images(draw):
    size = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda s: s[0] * s[1] > 1))
    image = draw(hnp.arrays(np.float64, (2, *size), elements=st.floats(-8, 8, width=16)))
    missing = draw(hnp.arrays(np.bool_, size))
    assume(not missing.all())
    return image, missing


@given(holed_images())
@many
def test_imputation_solves_the_equations_of_all_missing_pixels_at_once(case):
    image, missing = case
    H, W = missing.shape
    matrix, right = np.eye(H * W), image.reshape(2, -1).T.copy()
    for y, x in np.argwhere(missing):
        near = {
            (y + dy, x + dx): 1 / 12 if dy and dx else 1 / 6
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if (dy or dx) and 0 <= y + dy < H and 0 <= x + dx < W
        }
        right[y * W + x] = 0
        for (v, u), weight in near.items():
            matrix[y * W + x, v * W + u] = -weight / sum(near.values())
    expected = np.linalg.solve(matrix, right).T.reshape(image.shape)
    close(imputed(torch.from_numpy(image), torch.from_numpy(missing)), expected, atol=1e-9)


def test_removal_by_hand():
    x, m = torch.tensor([[[[1.0, 9.0, 3.0, 5.0]]]]).double(), torch.tensor([[[[2.0, 3.0, 1.0, 0.0]]]])
    found = road(total, x, m, percentages=[25, 50], noise=0)
    # 1 [2] 3 5 and [3] [3] 3 5; 1 9 3 [3] and 1 9 [9] [9]
    close(found.morf, [[11, 14]])
    close(found.lerf, [[16, 28]])
    close(found.score, [((16 - 11) + (28 - 14)) / 2 / 2])


@pytest.mark.parametrize("percentages", [[50], (10, 40, 90), np.array([33.7, 99.0])])
def test_the_pixels_removed_are_the_percentages_asked_for(percentages):
    x = torch.zeros(1, 1, 10, 10).double()
    m = random(1, 1, 10, 10)
    seen = Seen()
    found = road(seen, x, m, percentages=percentages, noise=1.0)
    assert found.morf.shape == found.lerf.shape == (1, len(percentages))
    counts = [round(float(p)) for p in percentages]
    changed = (seen.inputs != 0)[:, 0]
    assert changed.sum((1, 2)).tolist() == counts * 2
    ordered = m[0, 0].flatten().sort().values
    for gone, count in zip(changed, counts):
        assert m[0, 0][gone].min() == ordered[-count]
    for gone, count in zip(changed[len(counts) :], counts):
        assert m[0, 0][gone].max() == ordered[count - 1]


def test_one_pixel_stays_at_least_and_all_others_take_its_colour():
    x = torch.tensor([[[[1.0, 9.0], [3.0, 5.0]]]]).double()
    found = road(total, x, x, percentages=[99.9], noise=0)
    close(found.morf, [[4]])
    close(found.lerf, [[36]])


def test_nine_percentages_are_removed_by_default():
    assert road(total, X, MAPS).morf.shape == (2, 9)


@pytest.mark.parametrize("noise", [0.01, 2.0])
def test_noise_of_that_deviation_is_added_to_what_was_removed_alone(noise):
    x, m = random(1, 3, 40, 40), random(1, 1, 40, 40, seed=2)
    clean, noisy = Seen(), Seen()
    road(clean, x, m, percentages=[50], noise=0)
    road(noisy, x, m, percentages=[50], noise=noise)
    added = noisy.inputs - clean.inputs
    gone = (m > m.median())[0, 0]
    assert abs(added[0][:, gone].std() / noise - 1) < 0.05
    assert abs(added[0][:, gone].mean() / noise) < 0.1
    assert (added[0][:, ~gone] == 0).all()
    assert (added[1][:, gone] == 0).all()
    assert added[1][:, ~gone].std() > 0.9 * noise
    channels = np.corrcoef(added[0][:, gone].numpy())
    assert (np.abs(channels - np.eye(3)) < 0.2).all()  # each channel has its own


def test_noise_is_a_hundredth_by_default_and_drawn_from_the_seed():
    same(road(total, X, MAPS), road(total, X, MAPS, noise=0.01, seed=0))
    same(road(total, X, MAPS, seed=3), road(total, X, MAPS, seed=3))
    assert moved(road(total, X, MAPS, seed=3), road(total, X, MAPS, seed=4))
    same(road(total, X, MAPS, seed=3, noise=0), road(total, X, MAPS, seed=4, noise=0))


def test_ties_are_removed_in_an_order_of_their_seed():
    flat = torch.zeros_like(MAPS)
    same(road(total, X, flat, noise=0, seed=3), road(total, X, flat, noise=0, seed=3))
    assert moved(road(total, X, flat, noise=0, seed=3), road(total, X, flat, noise=0, seed=4))


def test_road_is_positive_for_a_perfect_map_negative_for_its_reverse_and_nothing_for_random_maps():
    x = 0.1 * random(1, 1, 8, 8).abs()
    x[..., 2:5, 3:6] += 1
    options = {"percentages": [10, 30, 60], "noise": 0}
    perfect, reverse = road(total, x, x, **options).score, road(total, x, -x, **options).score
    chance = road(total, x.expand(200, -1, -1, -1), random(200, 1, 8, 8, seed=2), **options).score
    assert abs(chance.mean()) < 4 * chance.std() / 200**0.5
    assert perfect > 5 * chance.std()
    assert reverse < -5 * chance.std()


def test_a_reversed_map_has_the_reversed_road():
    found, reverse = (road(total, X, m, noise=0) for m in (MAPS, -MAPS))
    close(found.morf, reverse.lerf)
    close(found.lerf, reverse.morf)
    close(found.score, -reverse.score)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"percentages": []}, r"`percentages`.*\[\]"),
        ({"percentages": [0, 50]}, r"`percentages`.*above 0 and below 100.*0, 50"),
        ({"percentages": [50, 100]}, r"`percentages`.*above 0 and below 100.*50, 100"),
        ({"noise": -1}, r"`noise`.*0 or more.*-1"),
        ({"noise": "some"}, r"`noise`.*0 or more.*'some'"),
        pytest.param({"noise": float("nan")}, r"`noise`.*nan"),
    ],
)
def test_options_of_road_that_cannot_work_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        road(total, X, MAPS, **options)


@pytest.mark.parametrize("percentages", [50, "50"])
def test_percentages_that_are_no_sequence_of_numbers_are_named(percentages):
    with pytest.raises((TypeError, ValueError), match="percentages"):
        road(total, X, MAPS, percentages=percentages)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 2, 2, 2)])
def test_road_is_for_images_only(shape):
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\).*\(2, 3"):
        road(total, random(*shape), random(*shape))


# Localisation: pointing games, rank accuracy, intersection over union

LOCAL = {
    "pointing_game": pointing_game,
    "energy_pointing_game": energy_pointing_game,
    "relevance_rank_accuracy": relevance_rank_accuracy,
    "iou": iou,
    "iou of the best threshold": lambda maps, masks: iou(maps, masks, threshold=None),
}
each_local = pytest.mark.parametrize("metric", LOCAL.values(), ids=LOCAL)


def image(*lines):
    """One map (1, 1, H, W)."""
    return torch.tensor(lines, dtype=torch.float64)[None, None]


def mask(*lines):
    """One mask (1, H, W)."""
    return torch.tensor(lines, dtype=torch.bool)[None]


def a_mask_of(metric, share, maps=2000, places=10):
    """Means over many random maps, with a mask of this share of the places."""
    inside = torch.zeros(places, places, dtype=torch.bool)
    inside[: round(share * places)] = True
    found = metric(random(maps, 1, places, places), inside.expand(maps, -1, -1))
    return found.mean(), 4 * found.std() / maps**0.5


@pytest.mark.parametrize(
    ("m", "hit"),
    [
        (image([3, 1], [0, 2]), 1),
        (image([1, 3], [0, 2]), 1),
        (image([1, 2], [0, 3]), 0),
        (image([-1, -2], [-3, -4]), 1),
        (image([3, 1], [0, 3]), 1 / 2),
        (image([3, 3], [0, 3]), 2 / 3),
        (image([3, 3], [0, 0]), 1),
        (image([0, 1], [3, 3]), 0),
        (image([5, 5], [5, 5]), 1 / 2),
    ],
)
def test_a_pointing_game_by_hand(m, hit):
    close(pointing_game(m, mask([1, 1], [0, 0])), [hit], rtol=1e-6)


@pytest.mark.parametrize(
    ("place", "distance"), [((2, 2), 0), ((2, 3), 1), ((1, 1), 1), ((4, 3), 2), ((2, 6), 4), ((6, 0), 4)]
)
def test_a_hit_may_be_as_many_pixels_away_as_the_tolerance_along_each_axis(place, distance):
    m, inside = torch.zeros(1, 1, 7, 7), torch.zeros(1, 7, 7, dtype=torch.bool)
    m[0, 0][place], inside[0, 2, 2] = 1, True
    hits = [pointing_game(m, inside, tolerance=t).item() for t in range(20)]
    assert hits == [float(t >= distance) for t in range(20)]


def test_the_tolerance_widens_the_mask_for_ties_too():
    close(pointing_game(image([3, 3, 0, 3]), mask([1, 0, 0, 0]), tolerance=1), [2 / 3], rtol=1e-6)


def test_an_energy_pointing_game_by_hand():
    inside = mask([1, 1], [0, 0])
    close(energy_pointing_game(image([3, 1], [1, 3]), inside), [0.5])
    close(energy_pointing_game(image([3, 2], [1, 2]), inside), [5 / 8])
    close(energy_pointing_game(image([3, -9], [1, -2]), inside), [3 / 4])
    close(energy_pointing_game(image([-3, -9], [1, 2]), inside), [0])
    close(energy_pointing_game(image([-3, 0], [-1, -2]), inside), [0])
    close(energy_pointing_game(image([0, 0], [0, 0]), inside), [0])


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30, 1e-44])
def test_energy_of_any_size_neither_overflows_nor_vanishes(size):
    m = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]]]) * size
    close(energy_pointing_game(m, mask([1, 0], [0, 0])), [0.25], rtol=1e-6)


def test_a_rank_accuracy_by_hand():
    inside = mask([1, 1, 0], [0, 1, 0])
    close(relevance_rank_accuracy(image([6, 5, 1], [2, 4, 3]), inside), [1])
    close(relevance_rank_accuracy(image([6, 5, 1], [2, 3, 4]), inside), [2 / 3], rtol=1e-6)
    close(relevance_rank_accuracy(image([1, 2, 4], [6, 3, 5]), inside), [0])
    close(relevance_rank_accuracy(image([-1, -2, -9], [-5, -3, -4]), inside), [1])
    # 6 inside; two of the four that tie come next, and half of these are inside
    close(relevance_rank_accuracy(image([6, 5, 5], [5, 5, 1]), inside), [2 / 3], rtol=1e-6)
    # 6 and 5 outside; one of the three that tie comes next, and all of these are inside
    close(relevance_rank_accuracy(image([3, 3, 6], [5, 3, 0]), inside), [1 / 3], rtol=1e-6)


@given(hnp.arrays(np.int64, (1, 1, 2, 3), elements=st.integers(-1, 2)), hnp.arrays(np.bool_, (1, 2, 3)))
@many
def test_rank_accuracy_is_the_mean_over_the_orders_of_ties(values, inside):
    assume(inside.any())
    orders = np.array(list(itertools.permutations(range(6))))
    order = np.lexsort((orders, np.broadcast_to(-values.ravel(), orders.shape)))  # by value, then by chance
    hits = inside.ravel()[order[:, : inside.sum()]]
    close(relevance_rank_accuracy(torch.from_numpy(values).double(), torch.from_numpy(inside)), [hits.mean()], 1e-6)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.1, 2 / 3), (0.25, 2 / 3), (0.26, 1 / 3), (0.5, 1 / 3), (0.51, 1 / 2), (0.75, 1 / 2), (1, 1 / 2)],
)
def test_an_intersection_over_union_by_hand(threshold, expected):
    inside = mask([1, 1], [0, 0])
    close(iou(image([4, 1], [2, 0]), inside, threshold), [expected], rtol=1e-6)
    close(iou(image([12, 3], [6, 0]), inside, threshold), [expected], rtol=1e-6)
    close(iou(image([4, 1], [2, -7]), inside, threshold), [expected], rtol=1e-6)  # the positive part
    close(iou(image([5, 2], [3, 1]), inside, threshold), [expected], rtol=1e-6)  # from its smallest value


def test_the_threshold_is_a_half_by_default():
    inside = mask([1, 1], [0, 0])
    close(iou(image([4, 2], [1.9, 0]), inside), [1])
    close(iou(image([4, 1.9], [2, 0]), inside), [1 / 3], rtol=1e-6)


@pytest.mark.parametrize("threshold", [1e-6, 0.5, 1])
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.1, 3.0])
def test_a_flat_map_has_no_intersection_at_a_fixed_threshold(value, threshold):
    close(iou(torch.full((1, 1, 3, 3), value), mask([1, 1, 1], [1, 0, 0], [0, 0, 0]), threshold), [0])


def test_a_map_without_positive_values_has_no_intersection_at_a_fixed_threshold():
    close(iou(image([-1, -2], [-3, -4]), mask([1, 1], [0, 0])), [0])


@given(hnp.arrays(np.int64, (1, 1, 2, 4), elements=st.integers(0, 4)), hnp.arrays(np.bool_, (1, 2, 4)))
@many
def test_the_best_threshold_is_the_best_of_all(values, inside):
    assume(inside.any())
    chosen = [values[:, 0] >= t for t in np.unique(values)]
    best = max((c & inside).sum() / (c | inside).sum() for c in chosen)
    close(iou(torch.from_numpy(values).double(), torch.from_numpy(inside), None), [best], rtol=1e-6)


@given(hnp.arrays(np.int64, (1, 1, 2, 4), elements=st.integers(-2, 4)), hnp.arrays(np.bool_, (1, 2, 4)))
@many
def test_no_threshold_is_better_than_the_best(values, inside):
    assume(inside.any())
    maps, inside = torch.from_numpy(values).double(), torch.from_numpy(inside)
    best = iou(maps, inside, None)
    assert all(iou(maps, inside, t) <= best for t in (0.01, 0.25, 0.4, 0.5, 0.75, 1))
    assert best >= inside.double().mean() - 1e-6  # a map without structure reaches that


@each_local
def test_a_perfect_map_scores_one_and_its_complement_nothing(metric):
    inside = random(5, 6, 7) > 0.5
    maps = inside[:, None] * random(5, 1, 6, 7, seed=2).abs().clamp(0.6, 1)
    close(metric(maps, inside), torch.ones(5))
    if metric is not LOCAL["iou of the best threshold"]:
        close(metric((~inside)[:, None].double(), inside), torch.zeros(5))


@each_local
def test_the_mask_as_a_map_is_perfect(metric):
    inside = random(5, 6, 7) > 0.5
    close(metric(inside[:, None].double(), inside), torch.ones(5))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("metric", [pointing_game, energy_pointing_game, relevance_rank_accuracy])
def test_random_maps_score_the_masks_share_on_average(metric, share):
    mean, error = a_mask_of(metric, share)
    assert abs(mean - share) < error


@pytest.mark.parametrize(
    "metric", [pointing_game, energy_pointing_game, relevance_rank_accuracy, LOCAL["iou of the best threshold"]]
)
@given(hnp.arrays(np.bool_, (1, 4, 5)), st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_a_flat_map_scores_the_masks_share(metric, inside, value):
    assume(inside.any())
    found = metric(torch.full((1, 1, 4, 5), value), torch.from_numpy(inside))
    close(found, [inside.mean()], rtol=1e-5)


@pytest.mark.parametrize("metric", [relevance_rank_accuracy, LOCAL["iou of the best threshold"]])
def test_a_flat_map_of_low_resolution_scores_the_masks_share(metric):
    inside = torch.arange(49).reshape(1, 7, 7) < 21
    values = torch.tensor([0.1, 0.3, 1 / 3, 0.7, 0.9]).reshape(-1, 1, 1, 1)
    close(metric(values.expand(-1, 1, 3, 3), inside.expand(5, -1, -1)), [21 / 49] * 5, rtol=1e-5)


def test_a_flat_map_of_low_resolution_has_no_intersection_at_a_fixed_threshold():
    inside = torch.arange(49).reshape(1, 7, 7) < 21
    values = torch.tensor([0.1, 0.3, 1 / 3, 0.7, 0.9]).reshape(-1, 1, 1, 1)
    close(iou(values.expand(-1, 1, 3, 3), inside.expand(5, -1, -1)), torch.zeros(5))


@each_local
@pytest.mark.parametrize("size", [(2, 3), (5, 4), (14, 12)])
def test_maps_are_resized_to_the_masks(metric, size):
    if metric is pointing_game:
        return  # points with the middle of a cell, below
    maps, inside = random(3, 1, *size), random(3, 7, 6, seed=2) > 0.3
    close(metric(maps, inside), metric(F.interpolate(maps, (7, 6), mode="bilinear", align_corners=False), inside))


def test_a_small_map_points_with_the_middle_of_its_largest_cell():
    maps = torch.tensor([[[[9.0, 0], [0, 0]]], [[[0.0, 0], [0, 9]]], [[[1.0, 1], [1, 1]]]])
    corner = torch.zeros(1, 8, 8, dtype=torch.bool)
    corner[:, :2, :2] = True  # what interpolation would spread the first cell to
    middle = torch.zeros(1, 8, 8, dtype=torch.bool)
    middle[:, 2, 2] = True
    assert pointing_game(maps, corner.expand(3, -1, -1)).tolist() == [0, 0, 0]
    assert pointing_game(maps, middle.expand(3, -1, -1)).tolist() == [1, 0, 0.25]
    assert pointing_game(maps, middle.expand(3, -1, -1), tolerance=4).tolist() == [1, 1, 1]
    assert pointing_game(maps, middle.expand(3, -1, -1), tolerance=3).tolist() == [1, 0, 0.25]


def test_a_map_larger_than_the_mask_points_too():
    maps = torch.zeros(1, 1, 6, 6)
    maps[0, 0, 1, 5] = 1
    masks = torch.zeros(1, 3, 3, dtype=torch.bool)
    masks[0, 0, 2] = True
    assert pointing_game(maps, masks).tolist() == [1]


@each_local
def test_channels_are_summed_before_they_are_compared_with_masks(metric):
    maps, inside = random(3, 4, 7, 6), random(3, 7, 6, seed=2) > 0.3
    close(metric(maps, inside), metric(maps.sum(1, keepdim=True), inside))


@pytest.mark.parametrize("metric", [energy_pointing_game, iou])
def test_a_sum_of_channels_in_half_precision_does_not_overflow(metric):
    maps = torch.tensor([[60000.0, 0.0], [20000.0, 0.0]]).reshape(1, 1, 2, 2).repeat(1, 4, 1, 1)
    inside = mask([1, 0], [0, 0])
    close(metric(maps.half(), inside), metric(maps, inside), rtol=1e-3)


@each_local
def test_masks_may_have_a_channel_and_each_map_has_its_own(metric):
    maps, inside = random(3, 1, 7, 6), random(3, 7, 6, seed=2) > 0.3
    together = metric(maps, inside[:, None])
    close(together, metric(maps, inside))
    close(together, torch.cat([metric(m[None], i[None]) for m, i in zip(maps, inside)]))


@each_local
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_maps_in_low_precision_are_scored_in_single(metric, dtype):
    maps, inside = (random(3, 1, 7, 6) * 16).round(), random(3, 7, 6, seed=2) > 0.3
    found = metric(maps.to(dtype).requires_grad_(), inside)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    close(found, metric(maps, inside), rtol=1e-5)


@each_local
def test_no_maps_have_no_localisation(metric):
    assert metric(torch.zeros(0, 1, 4, 4), torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0,)


@each_local
@given(hnp.arrays(np.float64, (2, 1, 3, 3), elements=st.floats(-1e300, 1e300)), hnp.arrays(np.bool_, (2, 3, 3)))
@many
def test_localisation_is_between_zero_and_one(metric, values, inside):
    assume(inside.any((1, 2)).all())
    found = metric(torch.from_numpy(values), torch.from_numpy(inside))
    assert ((found >= 0) & (found <= 1)).all()


GOOD = torch.ones(2, 3, 3, dtype=torch.bool)


@each_local
@pytest.mark.parametrize(
    ("maps", "masks", "error", "match"),
    [
        (random(2, 1, 3, 3), GOOD.float(), TypeError, r"`masks`.*bool.*float32.*masks > 0"),
        (random(2, 1, 3, 3), GOOD.tolist(), TypeError, r"`masks`.*bool.*list"),
        (random(2, 1, 3, 3), GOOD[0], ValueError, r"`masks` \(B, H, W\).*\(3, 3\)"),
        (random(2, 1, 3, 3), GOOD[None], ValueError, r"`masks` \(B, H, W\).*\(1, 2, 3, 3\)"),
        (random(2, 1, 3, 3), GOOD[:1], ValueError, r"mask for each map.*1 masks for 2 maps"),
        (random(2, 1, 3, 3), GOOD & torch.tensor([1, 0])[:, None, None].bool(), ValueError, r"`masks`.*\[1\].*empty"),
        (random(2, 1, 3), GOOD, ValueError, r"`attributions`.*2 spatial dimensions.*\(2, 1, 3\)"),
        (random(2, 1, 3, 3).numpy(), GOOD, TypeError, r"`attributions`.*floating-point.*ndarray"),
        (random(2, 1, 3, 3).long(), GOOD, TypeError, r"`attributions`.*floating-point.*int64"),
        (random(2, 1, 3, 3) / 0, GOOD, ValueError, r"`attributions`.*finite"),
    ],
)
def test_maps_and_masks_that_cannot_be_compared_are_named(metric, maps, masks, error, match):
    with pytest.raises(error, match=match):
        metric(maps, masks)


@pytest.mark.parametrize("tolerance", [-1, 1.5, True, "one"])
def test_a_tolerance_that_cannot_work_is_named(tolerance):
    with pytest.raises(ValueError, match=rf"`tolerance`.*pixels.*{tolerance}"):
        pointing_game(random(2, 1, 3, 3), GOOD, tolerance)


@pytest.mark.parametrize(
    "threshold",
    [
        0,
        -0.5,
        1.01,
        float("nan"),
        True,
        "half",
        pytest.param([0.5]),
    ],
)
def test_a_threshold_that_cannot_work_is_named(threshold):
    with pytest.raises((TypeError, ValueError), match=r"`threshold`.*\(0, 1\]"):
        iou(random(2, 1, 3, 3), GOOD, threshold)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_local
def test_localisation_is_on_the_maps_device(metric):
    maps, inside = random(3, 1, 7, 6), random(3, 7, 6, seed=2) > 0.3
    for masks in (inside, inside.cuda()):
        found = metric(maps.cuda(), masks)
        assert found.is_cuda
        close(found.cpu(), metric(maps, inside), rtol=1e-6)


# Boxes


def test_boxes_by_hand():
    found = box_masks([torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 3.0, 2.0]]), torch.tensor([3, 2, 4, 3])], (3, 4))
    expected = [
        [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
    ]
    assert found.dtype == torch.bool
    assert found.int().tolist() == [[e] for e in expected]


@pytest.mark.parametrize(
    ("box", "columns"),
    [
        ((0.45, 1.55), [1, 1, 0, 0]),
        ((0.55, 1.45), [0, 0, 0, 0]),
        ((0.55, 1.55), [0, 1, 0, 0]),
        ((-3.0, 0.55), [1, 0, 0, 0]),
        ((2.45, 99.0), [0, 0, 1, 1]),
        ((2.0, 2.0), [0, 0, 0, 0]),
    ],
)
def test_a_pixel_belongs_to_a_box_that_holds_its_centre(box, columns):
    low, high = box
    assert box_masks([torch.tensor([low, 0, high, 1])], (1, 4)).int().flatten().tolist() == columns
    assert box_masks([torch.tensor([0, low, 1, high])], (4, 1)).int().flatten().tolist() == columns


CORNERS = st.lists(st.tuples(*[st.integers(0, 6)] * 4), min_size=1, max_size=4)


@given(CORNERS)
@many
def test_boxes_with_whole_corners_are_slices_and_an_image_has_the_union_of_its_boxes(boxes):
    expected = torch.zeros(6, 5, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes:
        expected[y1:y2, x1:x2] = True
    for dtype in (torch.int64, torch.float16, torch.float64):
        assert torch.equal(box_masks([torch.tensor(boxes, dtype=dtype)], (6, 5)), expected[None, None])


@given(st.floats(0, 6, width=32), st.sampled_from([0.5, 1.5, 2.0, 2.25]))
@many
def test_boxes_that_touch_share_no_pixel_and_leave_none_out(one, other):
    for edge in (one, other):
        beside = torch.tensor([[0.0, 0.0, edge, 1.0], [edge, 0.0, 6.0, 1.0]])
        assert box_masks(list(beside), (1, 6)).sum(0).tolist() == [[[1] * 6]]
        above = beside[:, [1, 0, 3, 2]]
        assert box_masks(list(above), (6, 1)).sum(0).flatten().tolist() == [1] * 6


def test_no_boxes_have_no_masks_and_an_image_without_boxes_an_empty_one():
    assert box_masks([], (3, 4)).shape == (0, 1, 3, 4)
    assert box_masks([], (3, 4)).dtype == torch.bool
    found = box_masks([torch.zeros(0, 4)], (3, 4))
    assert found.shape == (1, 1, 3, 4)
    assert not found.any()


def test_boxes_are_masks_for_the_pointing_game():
    masks = box_masks([torch.tensor([0.0, 0.0, 1.0, 2.0])], (2, 2))
    close(pointing_game(image([1, 0], [3, 2]), masks), [1])


@pytest.mark.parametrize(
    ("boxes", "size", "match"),
    [
        ([torch.zeros(3)], (2, 2), r"`boxes`.*\(N, 4\).*\(3,\)"),
        ([torch.zeros(2, 5)], (2, 2), r"`boxes`.*\(N, 4\).*\(2, 5\)"),
        ([torch.zeros(1, 2, 4)], (2, 2), r"`boxes`.*\(N, 4\).*\(1, 2, 4\)"),
        ([torch.tensor(1.0)], (2, 2), r"`boxes`.*\(N, 4\).*\(\)"),
        ([torch.zeros(4)], (2, 2, 2), r"`size`.*height and a width.*\(2, 2, 2\)"),
        pytest.param([None], (2, 2), "`boxes`"),
        pytest.param(["box"], (2, 2), "`boxes`"),
        pytest.param([torch.zeros(4)], 2, "`size`"),
    ],
)
def test_boxes_and_sizes_that_cannot_work_are_named(boxes, size, match):
    with pytest.raises(ValueError, match=match):
        box_masks(boxes, size)


# Rank correlation


def test_a_rank_correlation_by_hand():
    close(rank_correlation(image([1, 2], [3, 4]), image([10, 20], [30, 99])), [1])
    close(rank_correlation(image([1, 2], [3, 4]), image([4, 3], [2, 1])), [-1])
    close(rank_correlation(row(1, 2, 3), row(1, 3, 2)), [0.5])  # 1 - 6 * 2 / (3 * 8)
    close(rank_correlation(row(1, 1, 2), row(1, 2, 3)), [3**0.5 / 2], rtol=1e-6)  # ranks 1.5, 1.5, 3


@given(
    hnp.arrays(np.float64, (1, 1, 3, 3), elements=st.integers(-2, 2).map(float)),
    hnp.arrays(np.float64, (1, 1, 3, 3), elements=st.sampled_from([-1e9, -1.0, 0.0, 1e-9, 1.0, 2.0, 1e9])),
)
@many
def test_a_rank_correlation_is_spearmans_also_with_ties_and_nothing_for_flat_maps(one, other):
    flat = np.ptp(one) == 0 or np.ptp(other) == 0
    expected = 0.0 if flat else spearmanr(one.ravel(), other.ravel()).statistic
    close(rank_correlation(*map(torch.from_numpy, (one, other))), [expected])


def test_each_pair_of_a_batch_has_its_rank_correlation_with_channels_summed():
    one, other = random(4, 2, 5, 6), random(4, 3, 5, 6, seed=2)
    expected = [spearmanr(a.sum(0).flatten(), b.sum(0).flatten()).statistic for a, b in zip(one, other)]
    close(rank_correlation(one, other), expected)


@pytest.mark.parametrize(("small", "large"), [((3, 4), (7, 9)), ((3, 9), (7, 4)), ((4,), (9,)), ((2, 2, 2), (3, 4, 5))])
def test_the_smaller_map_is_resized_to_the_larger(small, large):
    one, other = random(2, 1, *small), random(2, 1, *large, seed=2)
    size, mode = [max(p) for p in zip(small, large)], {1: "linear", 2: "bilinear", 3: "trilinear"}[len(small)]
    a, b = (m if list(m.shape[2:]) == size else F.interpolate(m, size, mode=mode) for m in (one, other))
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b)]
    close(rank_correlation(one, other), expected)
    close(rank_correlation(other, one), expected)


def test_a_flat_map_of_low_resolution_correlates_with_nothing():
    values = torch.tensor([0.1, 0.3, 1 / 3, 0.7, 0.9]).reshape(-1, 1, 1, 1)
    close(rank_correlation(values.expand(-1, 1, 3, 3), random(5, 1, 7, 7)), torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rank_correlations_are_in_at_least_single_precision(dtype):
    assert rank_correlation(random(2, 1, 3, 3, dtype=dtype), random(2, 1, 3, 3)).dtype == torch.promote_types(
        dtype, torch.float32
    )


def test_random_maps_do_not_correlate():
    found = rank_correlation(random(500, 1, 5, 5), random(500, 1, 5, 5, seed=2))
    assert abs(found.mean()) < 4 * found.std() / 500**0.5
    assert abs(found.std() - 24**-0.5) < 0.02


@pytest.mark.parametrize(
    ("one", "other", "error", "match"),
    [
        (MAPS.long(), MAPS, TypeError, r"`attributions`.*int64"),
        (MAPS, MAPS.long(), TypeError, r"`others`.*int64"),
        (MAPS, None, TypeError, r"`others`.*None"),
        (MAPS, MAPS / 0, ValueError, r"`others`.*finite"),
        (MAPS, MAPS[0, 0], ValueError, r"`others`.*\(4, 5\)"),
        (MAPS, MAPS[:1], ValueError, r"`attributions` and `others`.*\(2, 1, 4, 5\).*\(1, 1, 4, 5\)"),
        (MAPS, MAPS[0], ValueError, r"`attributions` and `others`.*\(2, 1, 4, 5\).*\(1, 4, 5\)"),
    ],
)
def test_maps_that_cannot_be_correlated_are_named(one, other, error, match):
    with pytest.raises(error, match=match):
        rank_correlation(one, other)


# Cascading randomisation


def weights_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def explaining(encoder):
    """Maps of an encoder for a reference that it embeds itself, and the inputs."""
    fam = FeatureActivationMap(encoder, encoder.layer)
    return lambda x: fam.attribute(x, reference=random(1, 3, 8, 8, seed=9))


class Watched:
    """An explanation that keeps the model's weights at each of its calls, and maps from the weights."""

    def __init__(self, model):
        self.model, self.states = model, []

    def __call__(self, x):
        self.states.append(weights_of(self.model))
        return x[:, :1] + torch.randn(x[:, :1].shape, generator=torch.Generator().manual_seed(len(self.states)))


def test_modules_lose_their_weights_from_the_output_down_and_stay_random():
    encoder = seeded(HeadEncoder)
    watched = Watched(encoder)
    found = cascading_randomization(watched, encoder, random(2, 3, 8, 8))
    assert found.modules == ["head", "conv2", "conv1"]
    assert found.rank_correlation.shape == (3, 2)
    trained, *stages = watched.states
    assert all(torch.equal(trained[k], v) for k, v in encoder.state_dict().items())
    for number, stage in enumerate(stages):
        for key, value in stage.items():
            reset = key.split(".")[0] in found.modules[: number + 1]
            assert torch.equal(value, trained[key]) != reset
    later = [stage["head.weight"] for stage in stages]
    assert torch.equal(later[0], later[2])


def test_the_first_stage_is_that_of_a_copy_whose_output_layer_is_reset_by_the_seed():
    encoder, x = seeded(HeadEncoder), random(2, 3, 8, 8)
    found = cascading_randomization(explaining(encoder), encoder, x, seed=5)
    other = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        other.head.reset_parameters()
    trained, reset = (explaining(e)(x) for e in (encoder, other))
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(trained, reset)]
    close(found.rank_correlation[0], expected)
    assert (found.rank_correlation[0] < 0.99).any()


def test_each_map_is_compared_with_that_of_the_trained_model():
    maps = iter(random(4, 2, 1, 5, 5))
    found = cascading_randomization(lambda x: next(maps), seeded(HeadEncoder), None)
    trained, *later = random(4, 2, 1, 5, 5)
    close(found.rank_correlation, torch.stack([rank_correlation(trained, m) for m in later]))


def test_a_map_of_the_input_alone_stays_what_it_was():
    encoder = seeded(HeadEncoder)
    found = cascading_randomization(lambda x: x.abs(), encoder, random(2, 3, 8, 8))
    close(found.rank_correlation, torch.ones(3, 2))


def test_a_map_of_the_weights_falls_to_nothing_when_its_module_is_reset():
    model = nn.Sequential(nn.Conv2d(1, 1, 50), nn.Flatten(), nn.Linear(4, 2500))

    def of_both(x):
        return torch.cat([model[0].weight, model[2].weight[:, :1].reshape(1, 1, 50, 50)]).detach()

    found = cascading_randomization(of_both, model, None)
    assert found.modules == ["2", "0"]
    close(found.rank_correlation[0, 0], 1.0)
    assert (found.rank_correlation[[0, 1, 1], [1, 0, 1]].abs() < 0.1).all()  # five standard deviations


def test_a_map_of_random_weights_is_nothing_like_the_one_before():
    encoders = [seeded(HeadEncoder, seed) for seed in range(6)]
    found = [cascading_randomization(explaining(e), e, random(10, 3, 8, 8)).rank_correlation for e in encoders]
    assert abs(torch.stack(found)[:, -1].mean()) < 0.2


def test_the_seed_is_that_of_the_weights():
    encoder, x = seeded(HeadEncoder), random(2, 3, 8, 8)
    found = [cascading_randomization(explaining(encoder), encoder, x, seed=s).rank_correlation for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(cascading_randomization(explaining(encoder), encoder, x).rank_correlation, found[0])


def test_modules_of_one_shape_do_not_get_the_same_weights():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)).double()
    watched = Watched(model)
    cascading_randomization(watched, model, random(1, 3, 3, 3))
    assert not torch.equal(watched.states[-1]["0.weight"], watched.states[-1]["1.weight"])


def test_randomisation_leaves_the_global_random_state_alone():
    encoder = seeded(lambda: nn.Sequential(TokenEncoder(), nn.Linear(6, 6)))
    before = torch.get_rng_state()
    cascading_randomization(lambda x: x, encoder, random(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def norm_encoder():
    """Batch norm with statistics, a frozen module, and modules in either mode."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).train()
    model(random(8, 3, 8, 8, dtype=torch.float32))
    model[1].eval()
    model[4].eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("call", [None, 1, 2, 4])
def test_the_model_is_as_it_was_also_when_the_explanation_fails(call):
    model, x = norm_encoder(), random(4, 3, 8, 8, dtype=torch.float32)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, parameters = weights_of(model), list(model.parameters())
    flags, requires = [m.training for m in model.modules()], [p.requires_grad for p in parameters]
    calls = itertools.count(1)

    def explanation(x):
        if next(calls) == call:
            raise RuntimeError("no explanation")
        return model[:2](x)

    fails = pytest.raises(RuntimeError, match="no explanation")
    with fails if call else contextlib.nullcontext():
        cascading_randomization(explanation, model, x)
    assert unchanged(model, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == requires
    assert (model[0].weight.grad == 1).all()


def test_running_statistics_are_reset_with_their_module_and_restored():
    model, states = norm_encoder(), []
    before = weights_of(model)

    def explanation(x):
        states.append(weights_of(model))
        return x

    assert cascading_randomization(explanation, model, random(4, 3, 8, 8)).modules == ["4", "1", "0"]
    assert torch.equal(states[1]["1.running_mean"], before["1.running_mean"])
    assert (states[2]["1.running_mean"] == 0).all()
    assert not (before["1.running_mean"] == 0).any()
    assert unchanged(model, before)


def test_running_statistics_are_restored_in_training_mode():
    model, x = norm_encoder().train(), random(4, 3, 8, 8, dtype=torch.float32)
    before = weights_of(model)
    cascading_randomization(lambda x: model[:2](x), model, x)
    assert unchanged(model, before)


class Failing(nn.Linear):
    def reset_parameters(self):
        if hasattr(self, "built"):
            with torch.no_grad():
                self.weight.zero_()
            raise RuntimeError("no reset")
        super().reset_parameters()
        self.built = True


def test_the_model_is_as_it_was_when_a_module_cannot_be_reset():
    model = nn.Sequential(Failing(3, 3), nn.Linear(3, 3))
    before, state = weights_of(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no reset"):
        cascading_randomization(lambda x: x, model, random(1, 3, 3))
    assert unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


class Renewed(nn.Module):
    """A module whose ``reset_parameters`` makes a new parameter."""

    def __init__(self):
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self):
        self.weight = nn.Parameter(torch.rand(3, 4))


def test_the_model_is_as_it_was_when_a_module_makes_new_parameters():
    model = nn.Sequential(Renewed())
    before, parameter = weights_of(model), model[0].weight
    cascading_randomization(lambda x: x, model, random(1, 3, 3))
    assert unchanged(model, before)
    assert model[0].weight is parameter


class Own(nn.Module):
    """Weights of its own and no ``reset_parameters``."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.arange(50.0).reshape(5, 10)), nn.Parameter(-torch.arange(9.0))
        self.inner = nn.Linear(2, 2)


def test_weights_without_a_reset_are_shuffled_each_within_its_parameter():
    model = Own()
    watched = Watched(model)
    found = cascading_randomization(watched, model, random(1, 3, 3))
    assert found.modules == ["inner", ""]
    trained, inner, last = watched.states
    assert torch.equal(inner["scale"], trained["scale"])
    for name in ("scale", "shift"):
        assert last[name].shape == trained[name].shape
        assert not torch.equal(last[name], trained[name])
        assert torch.equal(last[name].flatten().sort().values, trained[name].flatten().sort().values)
    assert unchanged(model, trained)


def test_a_module_that_holds_only_modules_is_not_a_stage():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3))
    assert cascading_randomization(lambda x: x, model, random(1, 3, 3)).modules == ["2", "0.0"]


def test_an_explanation_takes_keywords_and_may_give_a_tuple_of_one():
    encoder, x = seeded(HeadEncoder), random(2, 3, 8, 8)
    fam, references = FeatureActivationMap(encoder, encoder.layer), random(1, 3, 8, 8, seed=9)
    found = cascading_randomization(fam.attribute, encoder, x, seed=2, reference=references)
    same(found.rank_correlation, cascading_randomization(explaining(encoder), encoder, x, 2).rank_correlation)
    tupled = cascading_randomization(lambda x: (explaining(encoder)(x),), encoder, x, 2)
    same(found.rank_correlation, tupled.rank_correlation)


@pytest.mark.parametrize(
    ("explanation", "model", "error", "match"),
    [
        (3, nn.Linear(2, 2), TypeError, r"`explanation_func`.*3"),
        (abs, "model", TypeError, r"`model`.*module.*'model'"),
        (abs, lambda x: x, TypeError, r"`model`.*module.*function"),
        (abs, nn.ReLU(), ValueError, r"`model`.*weights.*no parameters"),
        (abs, nn.BatchNorm2d(3, affine=False), ValueError, r"`model`.*weights.*no parameters"),
    ],
)
def test_what_cannot_be_randomised_is_named(explanation, model, error, match):
    with pytest.raises(error, match=match):
        cascading_randomization(explanation, model, X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "device",
    ["cpu", "cuda"],
)
def test_a_model_on_a_gpu_is_restored_and_so_are_both_random_states(device):
    encoder, x = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Own())).to(device), X.to(device)
    before, states = weights_of(encoder), (torch.get_rng_state(), torch.cuda.get_rng_state())
    found = cascading_randomization(lambda x: encoder[0](x), encoder, x)
    assert found.rank_correlation.device.type == device
    assert (found.rank_correlation[-1] < 1).all()
    assert unchanged(encoder, before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


# Reference dependence

ONES = torch.ones(1, 1, 3).double()


@pytest.mark.parametrize(
    ("one", "other", "agreement", "change"),
    [
        (row(1, 1, 2), row(2, 1, 1), 1, 1 / 4),
        (row(2, 1, 1), row(1, 1, 2), -1, 1 / 4),
        (row(0, 2, 2), row(1, 0, 1), 1 / 2, 1 / 2),
        (row(1, 0, 0), row(0, 0, -1), 0, 1),
        (row(0, 0, 5), row(7, 0, 0), 1, 1),
        (row(1, 2, 3), row(2, 4, 6), 0, 0),
        (row(1, 2, 3), row(1, 2, 3), 0, 0),
        (row(0, 0, 1), row(0, 0, 0), 3**0.5 / 2, 1 / 2),
    ],
)
def test_a_reference_dependence_by_hand(one, other, agreement, change):
    # O = 1 2 3 and 3 2 1 of 6: their difference is -1 0 1 of 3.
    found = reference_dependence(linear(row(1, 2, 3), row(3, 2, 1)), ONES, one, other, 0, 1, "zero", n_cells=3)
    close(found.agreement, [agreement], rtol=1e-7, atol=1e-7)
    close(found.change, [change])
    close(found.expected, [1 / 3])


def test_the_effects_are_those_of_the_baseline():
    # Against 1, 1, 0 only the last cell has an effect; against 0, all have.
    score, maps = linear(row(1, 2, 3), row(3, 2, -1)), (row(0, 0, 1), row(1, 1, 0))
    found = reference_dependence(score, ONES, *maps, 0, 1, row(1, 1, 0), n_cells=3)
    close(found.expected, [1])  # 0 0 1 and 0 0 -1
    close(found.agreement, [1])
    found = reference_dependence(score, ONES, *maps, 0, 1, 0.5, n_cells=3)
    close(found.expected, [(2 / 6 + 0 + 4 / 6) / 2])


def test_an_effect_that_does_not_change_agrees_with_nothing():
    score = linear(row(1, 2, 3), row(2, 4, 6))
    found = reference_dependence(score, ONES, row(1, 0, 0), row(0, 1, 0), 0, 1, "zero", n_cells=3)
    close(found.expected, [0])
    assert found.agreement.abs() < 1 + 1e-9  # of rounding alone


SIZES = {(9,): 3, (6, 6): 3, (7, 5): 3, (4, 4, 4): 2, (8, 8): 8, (7, 9): 7, (3, 3): 1, (5, 11): 4}


def occlusions(size, n_cells):
    """What each of the cells hides, (cells, places)."""
    x, seen = torch.ones(1, 1, *size).double(), Seen(lambda x: torch.stack([total(x), -total(x)], 1))
    reference_dependence(seen, x, x, -x, 0, 1, "zero", n_cells=n_cells)
    hidden = 1 - seen.inputs.reshape(len(seen.inputs), -1)
    return hidden[hidden.sum(1) > 0]


@pytest.mark.parametrize(("size", "n_cells"), SIZES.items())
def test_cells_are_boxes_of_nearly_one_size_that_hide_each_place_once(size, n_cells):
    cells = occlusions(size, n_cells)
    assert len(cells) == n_cells ** len(size)
    close(cells.sum(0), torch.ones(cells.shape[1]))
    for cell in cells:
        sides = [len(set(axis)) for axis in np.nonzero(cell.reshape(size).numpy())]
        assert np.prod(sides) == cell.sum()
        assert all(side in (n // n_cells, -(-n // n_cells)) for side, n in zip(sides, size))
        assert all(np.ptp(axis) == len(set(axis)) - 1 for axis in np.nonzero(cell.reshape(size).numpy()))


@pytest.mark.parametrize(("size", "n_cells"), [((6, 6), 3), ((7, 5), 3), ((9,), 4), ((5, 4, 4), 2)])
def test_maps_and_effects_are_averaged_over_cells_and_compared(size, n_cells):
    x, weights = random(3, 2, *size), [random(2, *size, seed=s) for s in (2, 3)]
    maps = [random(3, 2, *size, seed=s) for s in (4, 5)]
    found = reference_dependence(linear(*weights), x, *maps, 0, 1, "zero", n_cells=n_cells)
    cells = occlusions(size, n_cells).numpy()
    for number in range(3):
        changes = []
        for values, divide in (([m[number] for m in maps], True), ([x[number] * w for w in weights], False)):
            shares = []
            for value in values:
                of_cells = cells @ value.reshape(2, -1).sum(0).numpy()
                of_cells = of_cells / cells.sum(1) if divide else of_cells
                shares.append(of_cells / np.abs(of_cells).sum())
            changes.append(shares[0] - shares[1])
        close(found.agreement[number], np.corrcoef(*changes)[0, 1])
        close(found.change[number], np.abs(changes[0]).sum() / 2)
        close(found.expected[number], np.abs(changes[1]).sum() / 2)


def effects(x, weights):
    """The exact effects of occluding single places on a linear score, against zero."""
    return (x * weights).sum(1, keepdim=True)


def contest(inputs=4, size=(4, 4)):
    """Inputs, a linear score of two references, and its exact effects."""
    x, weights = random(inputs, 3, *size), [random(3, *size, seed=s) for s in (2, 3)]
    return x, linear(*weights), [effects(x, w) for w in weights]


def test_perfect_maps_agree_fully_swapped_ones_not_at_all_and_scale_is_no_change():
    x, score, (one, other) = contest()

    def ask(a, b):
        return reference_dependence(score, x, a, b, 0, 1, "zero", n_cells=4)

    perfect = ask(one, other)
    close(perfect.agreement, torch.ones(4))
    close(perfect.change, perfect.expected)
    close(ask(3 * one, other / 7).agreement, torch.ones(4))
    close(ask(other, one).agreement, -torch.ones(4))
    for factor in (3.0, 0.1, 1 / 3):
        assert torch.equal(ask(one, factor * one).agreement, torch.zeros(4))
        close(ask(one, factor * one).change, torch.zeros(4))
    close(ask(one, -one).change, torch.ones(4))


def test_a_small_change_of_a_map_agrees_as_much_as_a_large_one():
    x, weights = random(4, 3, 4, 4).abs(), [random(3, 4, 4, seed=s).abs() for s in (2, 3)]
    one, other = (m / m.sum((1, 2, 3), keepdim=True) for m in (effects(x, w) for w in weights))
    found = reference_dependence(linear(*weights), x, one, 0.999 * one + 0.001 * other, 0, 1, "zero", n_cells=4)
    close(found.agreement, torch.ones(4))
    close(found.change, found.expected / 1000)


def test_no_rounding_takes_a_correlation_beyond_one():
    x, score, (one, other) = contest(500)
    agreement = reference_dependence(score, x, one, other, 0, 1, "zero", n_cells=4).agreement
    close(agreement, torch.ones(500))
    assert agreement.max() == 1
    maps = (2 * random(500, 1, 5, 5)).round()
    assert rank_correlation(maps, maps).max() == -rank_correlation(maps, -maps).min() == 1


def test_swapped_targets_and_maps_give_the_same():
    x, score, (one, other) = contest()
    noisy = one + random(4, 1, 4, 4, seed=8)
    found = reference_dependence(score, x, noisy, other, 0, 1, n_cells=4)
    same(found, reference_dependence(score, x, other, noisy, 1, 0, n_cells=4))


def test_each_input_may_have_its_own_two_references():
    x, weights = random(2, 3, 4, 5), WEIGHTS
    maps = MAPS, OTHER_MAPS
    found = reference_dependence(linear(*weights), x, *maps, [0, 2], torch.tensor([1, 0]), n_cells=4)
    first = reference_dependence(linear(*weights), x, *maps, 0, 1, n_cells=4)
    second = reference_dependence(linear(*weights), x, *maps, 2, 0, n_cells=4)
    for mixed, one, two in zip(found, first, second):
        close(mixed, torch.stack([one[0], two[1]]))


def test_maps_that_change_at_random_agree_with_nothing_on_average():
    x, score, _ = contest(400)
    found = reference_dependence(
        score, x, random(400, 1, 4, 4, seed=5), random(400, 1, 4, 4, seed=6), 0, 1, "zero", n_cells=4
    )
    assert abs(found.agreement.mean()) < 4 * found.agreement.std() / 20
    assert found.agreement.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_cells", [1, 4, 7])
def test_a_map_that_ignores_the_reference_scores_zero(dtype, n_cells):
    encoder = seeded(HeadEncoder).to(dtype)
    score = SimilarityScore(encoder, random(4, 4, dtype=dtype))
    x = random(3, 3, 9, 9, dtype=dtype)
    lafam = LabelFreeActivationMap(score, encoder.layer)
    maps = [lafam.attribute(x, target) for target in (0, 1)]
    found = reference_dependence(score, x, *maps, target=0, other_target=1, n_cells=n_cells)
    assert torch.equal(found.agreement, torch.zeros(3, dtype=dtype))
    assert torch.equal(found.change, torch.zeros(3, dtype=dtype))
    assert n_cells == 1 or (found.expected > 0).all()


@given(
    hnp.arrays(np.float64, (2, 2, 1, 3, 3), elements=st.floats(-8, 8, width=16)),
    hnp.arrays(np.float64, (2, 9), elements=st.floats(-8, 8, width=16)),
)
@many
def test_dependence_is_bounded(maps, weights):
    found = reference_dependence(
        linear(*torch.from_numpy(weights)), random(2, 1, 3, 3), *torch.from_numpy(maps), 0, 1, "zero", n_cells=3
    )
    assert (found.agreement.abs() <= 1).all()
    for part in (found.change, found.expected):
        assert ((part >= 0) & (part <= 1 + 1e-12)).all()


def test_the_two_maps_may_have_different_precisions():
    found = reference_dependence(SCORE, X, MAPS.float(), OTHER_MAPS, 0, 1, n_cells=4)
    expected = reference_dependence(SCORE, X, MAPS, OTHER_MAPS, 0, 1, n_cells=4)
    for one, other in zip(found, expected):
        close(one, other, rtol=1e-4, atol=1e-5)


def test_the_two_maps_may_have_different_sizes_and_channels():
    other = random(2, 3, 2, 2, seed=7)
    resized = F.interpolate(other.sum(1, keepdim=True), (4, 5), mode="bilinear", align_corners=False)
    same(
        reference_dependence(SCORE, X, MAPS, other, 0, 1, n_cells=3),
        reference_dependence(SCORE, X, MAPS, resized, 0, 1, n_cells=3),
    )


def test_there_are_seven_cells_along_each_dimension_and_a_blur_by_default():
    x, maps = random(1, 3, 9, 8), (random(1, 1, 9, 8), random(1, 1, 9, 8, seed=2))
    score = linear(random(3, 9, 8, seed=3), random(3, 9, 8, seed=4))
    seen = Seen(score)
    same(
        reference_dependence(seen, x, *maps, 0, 1),
        reference_dependence(score, x, *maps, 0, 1, "blur", n_cells=7),
    )
    assert len(seen.inputs) == 7 * 7 + 1  # each cell, and the input as it is


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"n_cells": 5}, ValueError, r"`n_cells`.*\(4, 5\).*5"),
        ({"n_cells": 0}, ValueError, r"`n_cells`.*positive int.*0"),
        ({"n_cells": 2.0}, TypeError, r"`n_cells`.*positive int.*2\.0"),
        ({"target": None}, ValueError, r"`target`.*needed"),
        ({"other_target": None}, ValueError, r"`other_target`.*needed"),
        pytest.param(
            {"other_target": 9},
            ValueError,
            r"`other_target`.*got 9",
        ),
        ({"other_attributions": OTHER_MAPS[:1]}, ValueError, r"`other_attributions`.*2 inputs.*1"),
        ({"other_attributions": OTHER_MAPS.long()}, TypeError, r"`other_attributions`.*int64"),
        ({"other_attributions": OTHER_MAPS / 0}, ValueError, r"`other_attributions`.*finite"),
    ],
)
def test_an_argument_of_reference_dependence_that_cannot_work_is_named(change, error, match):
    given = {"attributions": MAPS, "other_attributions": OTHER_MAPS, "target": 0, "other_target": 1, "n_cells": 4}
    with pytest.raises(error, match=match):
        reference_dependence(SCORE, X, **{**given, **change})


def test_ties_keep_the_order_that_the_seed_has_drawn():
    maps = torch.randint(0, 3, (2, 60, 60), generator=torch.Generator().manual_seed(0)).double()
    drawn = torch.randperm(3600, generator=torch.Generator().manual_seed(5)).tolist()
    for values, places in zip(maps.flatten(1).tolist(), ranks(maps, 5).flatten(1)):
        order = sorted(drawn, key=lambda i: -values[i])  # Python's sort is stable
        assert places[order].tolist() == list(range(3600))
