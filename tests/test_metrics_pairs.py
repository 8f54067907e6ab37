"""Metrics that look at both images of a pair: counts by hand, a loop of NumPy, chance, and toys with a known answer."""

import copy

import numpy as np
import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, random, seeded
from helpers import close, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_scenes import textures
from torch import nn

from captum_fam import CorrespondenceMap, SimilarityDecomposition, SimilarityScore
from captum_fam.metrics import (
    deletion,
    insertion,
    matching_accuracy,
    pair_deletion,
    pair_insertion,
    pair_pointing_game,
    pointing_game,
)
from captum_fam.scenes import shared_object_scenes

each = pytest.mark.parametrize("metric", [pair_pointing_game, matching_accuracy])


def mask(*rows):
    """One mask (1, H, W), # where it is."""
    return torch.tensor([[[letter == "#" for letter in row] for row in rows]])


LEFT, LOWER = mask("#.", "#."), mask("..", "##")  # places 0 and 2, places 2 and 3
# Rows are places of the image, columns those of the reference.
MATRIX = torch.tensor([[[0.0, 1, 5, 2], [9, 0, 0, 0], [1, 7, 0, 7], [0, 0, 0, 3]]])


def test_the_strongest_pair_by_hand():
    close(pair_pointing_game(MATRIX, LEFT, LOWER), [0.0], check_dtype=False)  # 9, of places 1 and 0: on neither
    close(pair_pointing_game(MATRIX, ~LEFT, ~LOWER), [1.0], check_dtype=False)
    close(pair_pointing_game(MATRIX, ~LEFT, LOWER), [0.0], check_dtype=False)  # on one alone
    close(pair_pointing_game(MATRIX, LEFT, ~LOWER), [0.0], check_dtype=False)
    two = MATRIX.clone()
    two[0, 0, 2] = two[0, 3, 3] = 9  # with that of 1 and 0, three that are equal; of 0 and 2: on both
    close(pair_pointing_game(two, LEFT, LOWER), [1 / 3], rtol=1e-6, check_dtype=False)


def test_what_places_find_by_hand():
    # Place 0 finds place 2, on the object; place 2 finds places 1 and 3, of which one is on it.
    close(matching_accuracy(MATRIX, LEFT, LOWER), [0.75], check_dtype=False)
    # Place 1 finds place 0, not on it; place 3 finds place 3.
    close(matching_accuracy(MATRIX, ~LEFT, LOWER), [0.5], check_dtype=False)
    # The other way: place 2 of the reference finds place 0 of the image, place 3 finds place 2: both on the left.
    close(matching_accuracy(MATRIX.mT, LOWER, LEFT), [1.0], check_dtype=False)
    # Its places 0 and 1 find places 1 and 2, of which one is on the left.
    close(matching_accuracy(MATRIX.mT, ~LOWER, LEFT), [0.5], check_dtype=False)


def test_examples_are_counted_one_by_one():
    matrices, masks = torch.cat([MATRIX, MATRIX, MATRIX]), torch.cat([LEFT, ~LEFT, ~LEFT])
    others = torch.cat([LOWER, LOWER, ~LOWER])
    close(pair_pointing_game(matrices, masks, others), [0.0, 0, 1], check_dtype=False)
    close(matching_accuracy(matrices, masks, others), [0.75, 0.5, 0.5], check_dtype=False)


# Against a loop


def places_by_hand(inside, grid):
    """Numbers of the places on the object: by their middle pixel, or those that hold most of it."""
    (h, w), (H, W) = grid, inside.shape
    middles = {y * w + x for y in range(h) for x in range(w) if inside[int((y + 0.5) * H / h), int((x + 0.5) * W / w)]}
    if middles:
        return middles
    held = dict.fromkeys(range(h * w), 0)
    for y, x in np.argwhere(inside):
        held[int((y + 0.5) * h / H) * w + int((x + 0.5) * w / W)] += 1
    return {place for place, count in held.items() if count == max(held.values())}


def pointing_by_hand(matrix, here, there):
    pairs = [(i, j) for i in range(len(matrix)) for j in range(len(matrix[0])) if matrix[i, j] == matrix.max()]
    return sum(i in here and j in there for i, j in pairs) / len(pairs)


def matching_by_hand(matrix, here, there):
    shares = []
    for i in here:
        best = [j for j, value in enumerate(matrix[i]) if value == matrix[i].max()]
        shares.append(sum(j in there for j in best) / len(best))
    return sum(shares) / len(shares)


SIDES = st.integers(1, 4)


@st.composite
def cases(draw):
    """A matrix (1, h, w, h', w') of few values, so that some are equal, and masks of any size."""
    shape = [draw(SIDES) for _ in range(4)]
    matrix = draw(hnp.arrays(np.float64, (1, *shape), elements=st.integers(-2, 2).map(float)))
    masks = [
        draw(hnp.arrays(bool, (1, draw(st.integers(1, 9)), draw(st.integers(1, 9)))).filter(lambda m: m.any()))
        for _ in range(2)
    ]
    return matrix, *masks


@each
@given(cases())
@settings(deadline=None, max_examples=60)
def test_a_value_is_that_of_a_loop(metric, case):
    matrix, one, other = case
    grids = matrix.shape[1:3], matrix.shape[3:]
    here, there = (places_by_hand(m[0], grid) for m, grid in zip((one, other), grids))
    by_hand = pointing_by_hand if metric is pair_pointing_game else matching_by_hand
    flat = matrix.reshape(np.prod(grids[0]), np.prod(grids[1]))
    found = metric(*map(torch.from_numpy, case))
    close(found, [by_hand(flat, here, there)], rtol=1e-6, check_dtype=False)


@given(cases())
@settings(deadline=None, max_examples=30)
def test_the_strongest_pair_is_the_same_from_the_other_side(case):
    matrix, one, other = map(torch.from_numpy, case)
    close(pair_pointing_game(matrix.permute(0, 3, 4, 1, 2), other, one), pair_pointing_game(matrix, one, other))


@given(hnp.arrays(np.float64, (1, 1, 3, 3), elements=st.integers(-2, 2).map(float)), hnp.arrays(bool, (1, 7, 5)))
@settings(deadline=None, max_examples=60)
def test_against_a_reference_of_one_place_it_is_the_pointing_game(m, inside):
    m, inside = torch.from_numpy(m), torch.from_numpy(inside)
    if not inside[:, [1, 3, 5]][:, :, [0, 2, 4]].any():  # rows and columns of the middles
        return
    close(
        pair_pointing_game(m.reshape(1, 9, 1), inside, torch.ones(1, 2, 2, dtype=torch.bool)), pointing_game(m, inside)
    )


@each
def test_a_matrix_of_square_grids_may_have_its_places_in_a_row(metric):
    told = random(3, 2, 2, 3, 3)
    masks, others = random(3, 1, 6, 6, seed=2) > 0.5, random(3, 9, 9, seed=3) > 0.5
    expected = metric(told, masks, others)
    close(metric(told.reshape(3, 4, 9), masks, others), expected)
    close(metric([told], masks[:, 0], others[:, None]), expected)  # of a list of one layer
    close(metric((told.reshape(3, 4, 9),), masks, others), expected)


# Small objects


def test_a_small_object_is_in_the_places_that_hold_most_of_it():
    # Middles of 2 x 2 places in 8 x 8 pixels are at 2 and 6. Of 3 pixels, the upper right place holds two.
    small = torch.zeros(1, 8, 8, dtype=torch.bool)
    small[0, 0, 3:6] = True
    matrix = torch.zeros(1, 4, 4)
    matrix[0, 1, 2] = 1
    assert pair_pointing_game(matrix, small, LOWER).item() == 1
    assert matching_accuracy(matrix, small, LOWER).item() == 1
    assert pair_pointing_game(matrix.mT, LOWER, small).item() == 1
    assert matching_accuracy(matrix.mT, LOWER, small).item() == (1 + 0.25) / 2  # place 3 finds all four alike
    # Where two places hold as much, both are on it; and one middle pixel is enough to leave them out.
    small[0, 0, 2] = True
    assert matching_accuracy(matrix, small, LOWER).item() == (0.5 + 1) / 2
    small[0, 6, 2] = True
    assert matching_accuracy(matrix, small, LOWER).item() == 0.5


@each
def test_an_object_of_one_pixel_has_a_place_in_any_grid(metric):
    for y, x in [(0, 0), (3, 4), (10, 2), (12, 12)]:
        one = torch.zeros(1, 13, 13, dtype=torch.bool)
        one[0, y, x] = True
        for n in range(1, 15):
            assert metric(torch.ones(1, n * n, n * n), one, one).item() > 0


# Chance, and precision


def test_a_flat_matrix_gets_exactly_the_chance():
    here, there = torch.zeros(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)
    here[:, :4, :4] = there[:, 4:] = True
    flat = torch.full((1, 16, 16), 0.3)
    assert pair_pointing_game(flat, here, there).item() == 1 / 4 * 1 / 2
    assert matching_accuracy(flat, here, there).item() == 1 / 2


def test_matrices_without_structure_are_at_the_chance_and_those_of_the_object_far_above():
    n = 4000
    here, there = torch.zeros(n, 8, 8, dtype=torch.bool), torch.zeros(n, 8, 8, dtype=torch.bool)
    here[:, :4, :4] = there[:, 4:] = True  # 4 of 16 places, and 8 of 16
    noise = random(n, 16, 16, seed=5)
    pointing, matching = pair_pointing_game(noise, here, there), matching_accuracy(noise, here, there)
    assert abs(pointing.mean().item() - 1 / 8) < 4 * (1 / 8 * 7 / 8 / n) ** 0.5  # four standard errors
    assert abs(matching.mean().item() - 1 / 2) < 4 * (1 / 4 / n / 4) ** 0.5
    assert set(pointing.tolist()) == {0.0, 1.0}
    objects = noise.reshape(n, 4, 4, 4, 4).clone()
    objects[:, :2, :2, 2:] += 3  # the places of the object have more in common
    assert pair_pointing_game(objects, here, there).mean() > 0.85
    assert matching_accuracy(objects, here, there).mean() > 0.9


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_compared_in_their_own_precision(metric, dtype):
    matrix = MATRIX.to(dtype)
    close(metric(matrix, LEFT, LOWER), metric(MATRIX, LEFT, LOWER))
    assert metric(matrix, LEFT, LOWER).dtype == torch.float32
    nearly = torch.ones(1, 4, 4, dtype=dtype)
    nearly[0, :, 3] += torch.finfo(dtype).eps  # the smallest difference there is decides
    assert metric(nearly, LEFT, LOWER).item() == (1 if metric is matching_accuracy else 0.5)


@each
def test_matrices_may_be_huge_negative_and_part_of_a_graph(metric):
    for factor in (3e38, 1e-38):
        close(metric(MATRIX / 9 * factor, LEFT, LOWER), metric(MATRIX, LEFT, LOWER))
    close(metric(MATRIX - 20, LEFT, LOWER), metric(MATRIX, LEFT, LOWER))
    assert not metric(MATRIX.clone().requires_grad_(), LEFT, LOWER).requires_grad


@each
def test_no_pairs_have_no_values(metric):
    assert metric(MATRIX[:0], LEFT[:0], LOWER[:0]).shape == (0,)
    assert metric(MATRIX[:0].reshape(0, 2, 2, 2, 2), LEFT[:0], LOWER[:0]).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each
def test_a_matrix_on_a_gpu_takes_masks_from_anywhere(metric):
    expected = metric(MATRIX, LEFT, LOWER)
    for masks, others in ((LEFT, LOWER), (LEFT.cuda(), LOWER), (LEFT.cuda(), LOWER.cuda())):
        found = metric(MATRIX.cuda(), masks, others)
        assert found.is_cuda
        close(found.cpu(), expected)


@each
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"matrix": MATRIX.numpy()}, TypeError, r"`matrix`.*floating-point tensor \(B, N, N'\).*ndarray"),
        ({"matrix": MATRIX.long()}, TypeError, r"`matrix`.*int64"),
        ({"matrix": [MATRIX, MATRIX]}, TypeError, r"`matrix`.*list"),
        ({"matrix": MATRIX[0]}, ValueError, r"`matrix`.*\(B, h, w, h', w'\).*\(4, 4\).*matrix\[None\]"),
        (
            {"matrix": MATRIX[:, :, :3]},
            ValueError,
            r"`matrix`.*square.*\(1, 4, 3\).*matrix\.reshape\(-1, h, w, h', w'\)",
        ),
        ({"matrix": torch.ones(1, 6, 4)}, ValueError, r"`matrix`.*square.*\(1, 6, 4\)"),
        ({"matrix": MATRIX[:, :0]}, ValueError, r"`matrix`.*\(1, 0, 4\)"),
        ({"matrix": torch.ones(1, 2, 2, 0, 2)}, ValueError, r"`matrix`.*\(1, 2, 2, 0, 2\)"),
        ({"matrix": torch.ones(1, 2, 2, 4)}, ValueError, r"`matrix`.*\(1, 2, 2, 4\)"),
        ({"matrix": MATRIX / 0}, ValueError, r"`matrix` to be finite, but 16 values"),
        ({"masks": LEFT.int()}, TypeError, r"`masks`.*bool.*int32.*masks > 0"),
        ({"reference_masks": LEFT.float()}, TypeError, r"`reference_masks`.*bool.*float32.*reference_masks > 0"),
        ({"masks": LEFT[0]}, ValueError, r"`masks`.*\(2, 2\)"),
        ({"reference_masks": LOWER.expand(1, 3, 2, 2)}, ValueError, r"`reference_masks`.*\(1, 3, 2, 2\)"),
        ({"masks": LEFT.expand(2, 2, 2)}, ValueError, r"`masks`.*2 masks for 1"),
        ({"reference_masks": LOWER.expand(3, 2, 2)}, ValueError, r"`reference_masks`.*3 masks for 1"),
        ({"masks": LEFT & ~LEFT}, ValueError, r"`masks`.*masks \[0\] are empty"),
        ({"reference_masks": LOWER & ~LOWER}, ValueError, r"`reference_masks`.*masks \[0\] are empty"),
    ],
)
def test_an_argument_that_cannot_work_is_named(metric, change, error, match):
    with pytest.raises(error, match=match):
        metric(**{"matrix": MATRIX, "masks": LEFT, "reference_masks": LOWER, **change})


@each
@pytest.mark.parametrize("side", ["image", "reference"])
def test_a_square_grid_is_not_taken_where_the_masks_say_another(metric, side):
    """Places of 36 in an image of 144 x 64 pixels are 9 x 4 of 16, as well as 6 x 6."""
    wide = torch.ones(1, 144, 64, dtype=torch.bool)
    matrix, masks = torch.ones(1, 36, 4), (wide, LOWER)
    if side == "reference":
        matrix, masks = matrix.mT, masks[::-1]
    with pytest.raises(ValueError, match=rf"grid of the {side}'s 36 places in `matrix`: 6 x 6, or 9 x 4.*144 x"):
        metric(matrix, *masks)
    metric(matrix.reshape(1, 9, 4, 2, 2) if side == "image" else matrix.reshape(1, 2, 2, 9, 4), *masks)


# The faithfulness of a pair

PIXELS = nn.Flatten()  # an encoder whose embedding is the image
NET = seeded(HeadEncoder)
X, R = random(3, 3, 8, 8), random(3, 3, 8, 8, seed=2)
MX, MR = random(3, 1, 8, 8, seed=3), random(3, 1, 8, 8, seed=4)

each_curve = pytest.mark.parametrize("metric", [pair_deletion, pair_insertion])


def image(*values):
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("metric", "baselines", "scores", "auc"),
    [
        # x loses 4, 3, 2, 1, which r meets with 1, 0, 2, 5: 13, 9, 9, 5, 0. r loses 5, 2, 1, 0: 13, 8, 4, 0, 0.
        (pair_deletion, "zero", [13, 8.5, 6.5, 2.5, 0], 6),
        (pair_insertion, "zero", [0, 4.5, 6.5, 10.5, 13], 7),
        # 13, 10, 10, 8, 8 and 13, 9, 7, 7, 10
        (pair_deletion, 1, [13, 9.5, 8.5, 7.5, 9], 9.125),
        (pair_deletion, torch.ones(2), [13, 9.5, 8.5, 7.5, 9], 9.125),
    ],
)
def test_a_curve_of_a_pair_by_hand(metric, baselines, scores, auc):
    x, r = image(4, 3, 2, 1), image(1, 0, 2, 5)
    found = metric(PIXELS, x, r, x, r, "dot", baselines, n_steps=4)
    close(found.scores, [scores])
    close(found.auc, [float(auc)])
    close(found.fractions, [0, 0.25, 0.5, 0.75, 1], check_dtype=False)


def changed(x, m, baseline, fraction, shown):
    """One image (C, H, W) with the first places of its map (H, W) shown alone, or hidden."""
    first = np.argsort(-m.ravel())[: round(fraction * m.size)]
    start, end = (baseline, x) if shown else (x, baseline)
    now = start.reshape(len(x), -1).copy()
    now[:, first] = end.reshape(len(x), -1)[:, first]
    return now.reshape(x.shape)


NUMBERS = hnp.arrays(np.float64, (2, 2, 3), elements=st.floats(-8, 8, width=16))
DISTINCT = st.permutations(range(6)).map(lambda p: np.array(p, float).reshape(2, 3))


@each_curve
@given(x=NUMBERS, r=NUMBERS, mx=DISTINCT, mr=DISTINCT, w=hnp.arrays(np.float64, (12, 4), elements=st.floats(-2, 2)))
@settings(deadline=None, max_examples=30)
def test_a_curve_of_a_pair_is_that_of_a_loop(metric, x, r, mx, mr, w):
    def f(one, other):
        return (one.ravel() @ w) @ (other.ravel() @ w)

    nothing, shown = np.full_like(x, 0.5), metric is pair_insertion
    expected = [
        (f(changed(x, mx, nothing, p, shown), r) + f(x, changed(r, mr, nothing, p, shown))) / 2
        for p in (0, 1 / 3, 2 / 3, 1)
    ]
    tensors = [torch.from_numpy(a)[None] for a in (x, r, mx[None], mr[None])]
    found = metric(lambda t: t.flatten(1) @ torch.from_numpy(w), *tensors, "dot", 0.5, n_steps=3)
    close(found.scores, [expected], rtol=1e-9, atol=1e-9)
    close(found.auc, [np.trapezoid(expected, dx=1 / 3)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", lambda z, s: z * s.abs()])
@pytest.mark.parametrize(("metric", "single"), [(pair_deletion, deletion), (pair_insertion, insertion)])
def test_a_pair_is_the_mean_of_both_sides_each_against_the_whole_of_the_other(metric, single, similarity):
    back = similarity if isinstance(similarity, str) else lambda z, s: s * z.abs()  # that of the other side
    for baselines in ("blur", "mean", "zero", 0.5):
        with torch.no_grad():
            here = single(SimilarityScore(NET, NET(R), similarity), X, MX, baselines, n_steps=5)
            there = single(SimilarityScore(NET, NET(X), back), R, MR, baselines, n_steps=5)
        found = metric(NET, X, R, MX, MR, similarity, baselines, n_steps=5)
        close(found.scores, (here.scores + there.scores) / 2)
        close(found.auc, (here.auc + there.auc) / 2)


def test_insertion_of_a_pair_is_the_deletion_of_reversed_maps_read_backwards():
    put_in, taken_out = pair_insertion(NET, X, R, MX, MR), pair_deletion(NET, X, R, -MX, -MR)
    assert put_in.scores.shape == (3, 21)
    close(put_in.scores, taken_out.scores.flip(1))
    close(put_in.scores[:, -1], torch.cosine_similarity(NET(X), NET(R)).detach())


@each_curve
def test_images_and_references_have_sizes_of_their_own_and_may_share_one_reference(metric):
    large, maps = random(1, 3, 12, 16, seed=5), random(3, 1, 3, 4, seed=6)  # and maps of a size of their own
    found = metric(NET, X, large, MX, maps, n_steps=4)
    close(found, metric(NET, X, large.expand(3, -1, -1, -1), MX, maps, n_steps=4))
    for i in range(3):
        one = metric(NET, X[i : i + 1], large, MX[i : i + 1], maps[i : i + 1], n_steps=4)
        close(one.scores, found.scores[i : i + 1])


@each_curve
@pytest.mark.parametrize("limit", [1, 2, 7, None])
def test_the_encoder_sees_no_more_images_at_a_time_than_it_may(metric, limit):
    sizes = []

    def encoder(x):
        assert not torch.is_grad_enabled()
        sizes.append(len(x))
        return NET(x)

    found = metric(encoder, X.clone().requires_grad_(), R, MX, MR, n_steps=4, max_examples_per_batch=limit)
    close(found, metric(NET, X, R, MX, MR, n_steps=4))
    assert max(sizes) <= (limit or 3)
    assert sum(sizes) == 2 * 3 * (1 + 5)
    if limit is None:  # as many as there are
        sizes.clear()
        metric(encoder, X[:1], R[:1], MX[:1], MR[:1], n_steps=4)
        assert set(sizes) == {1}


@each_curve
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_encoder_sees_the_images_precision_and_the_scores_are_at_least_single(metric, dtype):
    x, r = ((8 * t).round().clamp(-16, 16) for t in (X, R))

    def encoder(t):
        assert t.dtype == dtype
        return t.double().mean((2, 3)).to(dtype)

    found = metric(encoder, x.to(dtype), r.to(dtype), MX.to(dtype), MR.to(dtype), baselines="zero", n_steps=1)
    assert found.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    whole = torch.cosine_similarity(x.mean((2, 3)), r.mean((2, 3)))
    expected = torch.stack([whole, 0 * whole], 1)  # an embedding of zeros has a cosine of zero
    expected = expected.flip(1) if metric is pair_insertion else expected
    close(found.scores, expected, rtol=0, atol=4 * torch.finfo(dtype).eps, check_dtype=False)


@each_curve
def test_embeddings_are_selected_and_no_pairs_have_no_curves(metric):
    found = metric(lambda x: {"z": NET(x)}, X, R, MX, MR, n_steps=2, output_selector=lambda output: output["z"])
    close(found, metric(NET, X, R, MX, MR, n_steps=2))
    empty = metric(NET, X[:0], R[:0], MX[:0], MR[:0])
    assert (empty.auc.shape, empty.scores.shape) == ((0,), (0, 21))


@each_curve
def test_equal_values_are_in_an_order_of_the_seed(metric):
    flat = torch.zeros_like(MX)
    one, again, other = (metric(NET, X, R, flat, flat, n_steps=3, seed=seed).scores for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


@each_curve
def test_batch_norm_in_training_mode_is_warned_of_and_counts_nothing(metric):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).double()
    with pytest.warns(UserWarning, match=r"training mode.*batch norm"):
        metric(model, X, R, MX, MR, n_steps=2)
    assert model[0].num_batches_tracked == 0
    with silent():
        metric(model.eval(), X, R, MX, MR, n_steps=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_curve
def test_a_pair_on_a_gpu_has_the_curve_of_the_cpu(metric):
    found = metric(copy.deepcopy(NET).cuda(), X.cuda(), R.cuda(), MX, MR.cuda(), n_steps=3)
    assert found.auc.is_cuda
    close(found.scores.cpu(), metric(NET, X, R, MX, MR, n_steps=3).scores, rtol=1e-6, atol=1e-7)


# Scenes of one line: background, the shared object A, and B or C, each in a colour channel of its own.
LINES = {"x": "..AA..BB", "r": "CC.AA..."}
GREY = torch.tensor([0.3, 0, 0, 0])[:, None, None]


def scene(line):
    return torch.stack([torch.tensor([0.3 * (c == ".") if k == "." else float(c == k) for c in line]) for k in ".ABC"])


def showing(letters, seed=0):
    """Maps of both scenes that are large where one of the letters is; places of equal worth in a random order."""
    noise = [0.1 * random(1, 1, 1, 8, seed=2 * seed + i, dtype=torch.float32).sigmoid() for i in range(2)]
    return [m + torch.tensor([float(c in letters) for c in line]) for m, line in zip(noise, LINES.values())]


def together(maps, shown):
    """The area where both images are changed at once."""
    curves = []
    for p in np.arange(9) / 8:
        z, s = (
            changed(scene(line)[:, None].numpy(), m.numpy().ravel(), GREY.expand(-1, 1, 8).numpy(), p, shown).mean(
                (1, 2)
            )
            for line, m in zip(LINES.values(), maps)
        )
        curves.append(z @ s / np.linalg.norm(z) / np.linalg.norm(s))
    return np.trapezoid(curves, dx=1 / 8)


def area(metric, letters, reference_letters=None, seeds=12):
    """The mean area of maps that show these letters, in random orders of all else."""
    maps = [
        (showing(letters, i)[0], showing(letters if reference_letters is None else reference_letters, i)[1])
        for i in range(seeds)
    ]
    here, there = (torch.cat(of) for of in zip(*maps))
    x, r = (scene(line)[None, :, None].expand(seeds, -1, -1, -1) for line in LINES.values())
    return metric(lambda t: t.mean((2, 3)), x, r, here, there, baselines=GREY, n_steps=8).auc.mean().item()


def test_the_right_maps_beat_random_and_wrong_ones():
    for letters in ([""], ["BC"], ["."], ["A", "BC"], ["BC", "A"], ["A", "."]):
        assert area(pair_insertion, "A") > area(pair_insertion, *letters) + 0.04, letters
        assert area(pair_deletion, "A") < area(pair_deletion, *letters) - 0.04, letters


def test_images_that_are_changed_together_are_alike_when_both_show_nothing():
    """Why each side is changed against the whole of the other: mere background would be better than the object."""
    right, background = (np.mean([together(showing(c, i), shown=True) for i in range(12)]) for c in "A.")
    assert background > right + 0.04
    assert area(pair_insertion, ".") < area(pair_insertion, "A") - 0.15


@each_curve
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"forward_func": 3}, TypeError, r"`forward_func`.*3"),
        ({"forward_func": SimilarityScore(NET, torch.ones(3, 4))}, TypeError, r"`forward_func`.*pass score\.encoder"),
        ({"forward_func": lambda x: x}, ValueError, r"embeddings \(B, D\).*pool"),
        ({"forward_func": lambda x: NET(x)[:1]}, ValueError, r"one embedding for each of the 3"),
        ({"inputs": (X, X)}, TypeError, r"`inputs`.*tuple"),
        ({"reference": R.long()}, TypeError, r"`reference`.*int64"),
        ({"reference": NET(R)}, TypeError, r"`reference`.*\(B, C, \*spatial\).*\(3, 4\)"),
        ({"reference": R[:2]}, ValueError, r"`reference`.*one reference or 3.*2"),
        ({"attributions": MX[:2]}, ValueError, r"`attributions`.*3 inputs.*got 2"),
        ({"reference_attributions": MR[:1]}, ValueError, r"`reference_attributions`.*3 inputs.*got 1"),
        ({"reference_attributions": MR / 0}, ValueError, r"`reference_attributions`.*finite.*192"),
        ({"attributions": MX[:, 0]}, ValueError, r"`attributions`.*2 spatial dimensions"),
        ({"similarity": "cosinus"}, ValueError, r"`similarity`.*Did you mean"),
        ({"baselines": "black"}, ValueError, r'`baselines`.*"blur", "mean", "zero"'),
        ({"baselines": X}, ValueError, r"`baselines`.*both sides.*\(3, 3, 8, 8\).*baselines\[0\]"),
        ({"baselines": X[:1]}, ValueError, r"`baselines`.*both sides"),
        ({"baselines": torch.ones(2, 8, 8)}, ValueError, r"`baselines`.*`inputs`.*\(2, 8, 8\)"),
        (
            {"baselines": X[0], "reference": R[..., 1:], "reference_attributions": MR},
            ValueError,
            r"`baselines`.*`reference`, \(3, 3, 8, 7\).*\(3, 8, 8\)",
        ),
        ({"n_steps": 0}, ValueError, r"`n_steps`.*0"),
        ({"max_examples_per_batch": 0}, ValueError, r"`max_examples_per_batch`.*0"),
        ({"max_examples_per_batch": 1.5}, TypeError, r"`max_examples_per_batch`.*1\.5"),
    ],
)
def test_an_argument_of_a_pair_that_cannot_work_is_named(metric, change, error, match):
    given = {
        "forward_func": NET,
        "inputs": X,
        "reference": R,
        "attributions": MX,
        "reference_attributions": MR,
        **change,
    }
    with pytest.raises(error, match=match):
        metric(**given)


# Scenes, maps and metrics together


@pytest.mark.parametrize("method", [CorrespondenceMap, SimilarityDecomposition])
def test_scenes_and_matrices_are_measured_in_both_directions(method):
    encoder = seeded(PooledEncoder).float()
    scenes = shared_object_scenes(*textures(), 8, size=48, difficulty="easy")
    found = []
    for one in (scenes, scenes.swapped()):
        matrix = method(encoder, encoder.layer).attribute_matrix(one.images, one.references)
        pointing = pair_pointing_game(matrix, one.masks, one.reference_masks)
        found.append((pointing, matching_accuracy(matrix, one.masks, one.reference_masks)))
    back = matching_accuracy(matrix.mT, scenes.masks, scenes.reference_masks)  # from the other side
    assert (back - found[0][1]).abs().max() < 0.02  # of 400 products in another order
    assert not torch.allclose(found[0][1], found[1][1])
    chance = scenes.reference_masks.float().mean().item()
    if method is CorrespondenceMap:  # the very same pixels are in both
        assert all(matching.mean() > 2 * chance for _, matching in found)
    assert all(((value >= 0) & (value <= 1)).all() for pair in found for value in pair)


def test_no_scenes_have_no_values():
    none = shared_object_scenes(*textures(), 2, size=48)[torch.zeros(2, dtype=torch.bool)]
    encoder = seeded(PooledEncoder).float()
    method = SimilarityDecomposition(encoder, encoder.layer)
    matrix = method.attribute_matrix(none.images, none.references)
    maps = method.attribute_pair(none.images, none.references)
    assert matching_accuracy(matrix, none.masks, none.reference_masks).shape == (0,)
    assert pair_pointing_game(matrix, none.masks, none.reference_masks).shape == (0,)
    assert pair_insertion(encoder, none.images, none.references, *maps).auc.shape == (0,)


@each_curve
def test_maps_of_both_sides_are_taken_as_a_method_returns_them(metric):
    """And those of a decomposition, which say what the score is made of, beat reversed ones."""
    encoder = seeded(PooledEncoder).float()
    scenes = shared_object_scenes(*textures(), 4, size=48, difficulty="easy")
    maps = SimilarityDecomposition(encoder, encoder.layer).attribute_pair(scenes.images, scenes.references)
    area, reversed_area = (
        metric(encoder, scenes.images, scenes.references, *of, baselines="zero", n_steps=5).auc.mean()
        for of in (maps, [-m for m in maps])
    )
    assert area > reversed_area if metric is pair_insertion else area < reversed_area
