"""Contributions, weights, prototypes and scores: the numbers that a map is made of."""

import numpy as np
import pytest
import reference as oracle
import torch
from encoders import FlatEncoder, Modified, PooledEncoder, random, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_fam import SimilarityScore, channel_contributions, contribution_weights, prototypes

NAMES = ["cosine", "dot", "euclidean"]
HALVES = [torch.float16, torch.bfloat16]

few = settings(deadline=None, max_examples=40)
numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


def manhattan(z, s):
    return -(z - s).abs()


@st.composite
def pairs(draw):
    """Two vectors (D,) of one length, with entries of ordinary size, zeros among them."""
    D = draw(st.integers(1, 8))
    vector = st.lists(numbers, min_size=D, max_size=D)
    return draw(vector), draw(vector)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def scores(z, s, similarity):
    """What torch says the similarity is, for all pairs of rows."""
    if similarity == "cosine":
        return torch.cosine_similarity(z[:, None], s[None], dim=-1)
    return z @ s.mT if similarity == "dot" else -(torch.cdist(z, s, compute_mode="donot_use_mm_for_euclid_dist") ** 2)


# Channel contributions


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [
        ("cosine", [12 / 25, 12 / 25, 0.0]),
        ("dot", [12.0, 12.0, 0.0]),
        ("euclidean", [-1.0, -1.0, 0.0]),
        (manhattan, [-1.0, -1.0, 0.0]),
    ],
)
def test_contributions_of_a_pair_computed_by_hand(similarity, expected):
    c = channel_contributions(tensor([3.0, 4.0, 0.0]), tensor([4.0, 3.0, 0.0]), similarity)
    torch.testing.assert_close(c, tensor(expected), rtol=1e-15, atol=0)


def test_cosine_is_the_default():
    z, s = random(4), random(4, seed=2)
    assert torch.equal(channel_contributions(z, s), channel_contributions(z, s, "cosine"))


@pytest.mark.parametrize("similarity", [*NAMES, "manhattan"])
@few
@given(pairs())
def test_contributions_are_those_of_the_reference_implementation(similarity, pair):
    z, s = pair
    c = channel_contributions(tensor(z), tensor(s), manhattan if similarity == "manhattan" else similarity)
    np.testing.assert_allclose(c.numpy(), oracle.contributions(z, s, similarity), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("similarity", NAMES)
@few
@given(pairs())
def test_contributions_add_up_to_the_score(similarity, pair):
    z, s = map(tensor, pair)
    expected = scores(z[None], s[None], similarity)[0, 0]
    torch.testing.assert_close(channel_contributions(z, s, similarity).sum(), expected, rtol=1e-10, atol=1e-10)


@few
@given(pairs(), st.integers(-150, 150), st.integers(-150, 150))
def test_the_cosine_does_not_change_when_vectors_are_scaled_by_any_power_of_ten(pair, zs, ss):
    z, s = map(tensor, pair)
    scaled = channel_contributions(z * 10.0**zs, s * 10.0**ss)
    torch.testing.assert_close(scaled, channel_contributions(z, s), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cosine_is_right_for_the_largest_and_smallest_numbers_of_a_dtype(dtype):
    direction = torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=dtype)
    limits = torch.finfo(dtype)
    expected = torch.tensor([16.0, 4.0, 1.0, 0.0]) / 21
    for scale in (limits.max, limits.tiny * 8):
        c = channel_contributions(direction * scale, direction)
        torch.testing.assert_close(c.float(), expected, rtol=4 * limits.eps, atol=limits.eps)


def test_a_zero_vector_has_zero_cosine_contributions():
    zero, s = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(channel_contributions(zero, s), zero)
    assert torch.equal(channel_contributions(s, zero), zero)
    assert torch.equal(channel_contributions(zero, zero), zero)


@pytest.mark.parametrize("similarity", NAMES)
def test_gradients_are_finite_at_a_zero_vector(similarity):
    z, s = torch.zeros(3, requires_grad=True), torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    channel_contributions(z, s, similarity).sum().backward()
    assert z.grad.isfinite().all()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("similarity", NAMES)
def test_gradients_are_those_of_the_torch_score(similarity):
    z, s = random(1, 5).requires_grad_(), random(1, 5, seed=2).requires_grad_()
    ours = torch.autograd.grad(channel_contributions(z, s, similarity).sum(), (z, s))
    theirs = torch.autograd.grad(scores(z, s, similarity).sum(), (z, s))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("similarity", [*NAMES, manhattan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_contributions_keep_the_dtype_at_its_precision(similarity, dtype):
    z, s = random(64, dtype=dtype), random(64, seed=2, dtype=dtype)
    c = channel_contributions(z, s, similarity)
    assert c.dtype == dtype
    exact = channel_contributions(z.double(), s.double(), similarity)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(c.double(), exact, rtol=8 * eps, atol=1e-7 if dtype in HALVES else eps)


def test_embeddings_and_references_are_broadcast_to_all_pairs():
    z, s = random(2, 5), random(3, 5, seed=2)
    c = channel_contributions(z[:, None], s, "cosine")
    assert c.shape == (2, 3, 5)
    for b in range(2):
        for k in range(3):
            torch.testing.assert_close(c[b, k], channel_contributions(z[b], s[k]), rtol=1e-14, atol=0)


def test_one_reference_serves_many_embeddings_also_for_a_callable():
    z, s = random(2, 4, 5), random(5, seed=2)
    seen = []

    def similarity(z, s):
        seen.append((z.shape, s.shape))
        return z - s

    torch.testing.assert_close(channel_contributions(z, s, similarity), z - s)
    assert seen == [((2, 4, 5), (2, 4, 5))]


@pytest.mark.parametrize("argument", ["embedding", "reference"])
@pytest.mark.parametrize("value", [None, [1.0, 2.0], torch.tensor([1, 2]), np.ones(2)])
def test_contributions_of_what_is_no_float_tensor_are_refused(argument, value):
    arguments = {"embedding": torch.ones(2), "reference": torch.ones(2), argument: value}
    with pytest.raises(TypeError, match=f"`{argument}`"):
        channel_contributions(**arguments)


@pytest.mark.parametrize(
    ("z", "s", "match"),
    [
        ((2, 3), (2, 4), r"\(2, 3\) and \(2, 4\)"),
        ((3,), (), r"\(3,\) and \(\)"),
        ((4, 1), (4, 5), r"\(4, 1\) and \(4, 5\)"),  # one dimension is no shared dimension
        ((2, 3), (4, 3), r"broadcast.*\(2, 3\) and \(4, 3\)"),
        ((2, 0), (2, 0), r"\(2, 0\)"),
    ],
)
def test_contributions_of_shapes_that_do_not_fit_are_refused(z, s, match):
    with pytest.raises(ValueError, match=match):
        channel_contributions(torch.ones(z), torch.ones(s))


def test_an_unknown_similarity_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"`similarity`.*'euclidian'.*'euclidean'"):
        channel_contributions(torch.ones(2), torch.ones(2), "euclidian")


@pytest.mark.parametrize("similarity", [None, 3])
def test_a_similarity_that_is_neither_name_nor_function_is_refused(similarity):
    with pytest.raises(TypeError, match="`similarity`"):
        channel_contributions(torch.ones(2), torch.ones(2), similarity)


@pytest.mark.parametrize("similarity", [lambda z, s: (z * s).sum(-1), lambda z, s: 1.0, lambda z, s: z[:1]])
def test_a_similarity_function_that_does_not_return_contributions_is_refused(similarity):
    with pytest.raises(ValueError, match=r"`similarity`.*\(3,\)"):
        channel_contributions(torch.ones(3), torch.ones(3), similarity)


# Contribution weights


def test_weights_of_contributions_computed_by_hand():
    w = contribution_weights(tensor([[0.5, -0.5, 0.0], [8.0, 2.0, 4.0]]))
    torch.testing.assert_close(w, tensor([[1.0, 0.0, 0.5], [1.0, 0.0, 1 / 3]]), rtol=1e-15, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
def test_flat_contributions_get_weights_of_one(value):
    c = torch.stack([torch.full((5,), value), torch.arange(5.0)])
    assert torch.equal(contribution_weights(c), torch.stack([torch.ones(5), torch.arange(5.0) / 4]))


def test_a_single_dimension_gets_the_weight_one():
    assert torch.equal(contribution_weights(tensor([[-3.0]])), tensor([[1.0]]))


@few
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=8))
def test_weights_lie_in_zero_to_one_and_reach_both_unless_flat(values):
    c = tensor(values)
    w = contribution_weights(c)
    assert ((w >= 0) & (w <= 1)).all()
    assert w.max() == 1
    assert w.min() == (1 if c.min() == c.max() else 0)
    assert (w[c.argsort()].diff() >= 0).all()


@few
@given(pairs())
def test_weights_are_those_of_the_reference_implementation(pair):
    for c in pair:
        np.testing.assert_allclose(contribution_weights(tensor(c)).numpy(), oracle.weights(c), rtol=1e-12)


def test_each_pair_has_its_own_minimum_and_maximum():
    c = random(2, 3, 5)
    expected = [[oracle.weights(c[b, k].numpy()) for k in range(3)] for b in range(2)]
    np.testing.assert_allclose(contribution_weights(c).numpy(), expected, rtol=1e-13)


@few
@given(pairs())
def test_without_normalisation_the_weights_are_the_contributions(pair):
    for c in map(tensor, pair):
        assert torch.equal(contribution_weights(c, None), c)


@pytest.mark.parametrize("normalize", ["minmax", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_weights_keep_the_dtype_at_its_precision(normalize, dtype):
    c = random(64, dtype=dtype)
    w = contribution_weights(c, normalize)
    assert w.dtype == dtype
    exact = contribution_weights(c.double(), normalize)
    torch.testing.assert_close(w.double(), exact, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_weights_of_contributions_that_span_a_whole_dtype_follow_the_formula(dtype):
    largest = torch.finfo(dtype).max
    w = contribution_weights(torch.tensor([-largest, 0.0, largest], dtype=dtype))
    assert w.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("normalize", ["max", "softmax", 1, True])
def test_an_unknown_normalisation_is_refused(normalize):
    with pytest.raises((ValueError, TypeError), match=r"`normalize`.*minmax"):
        contribution_weights(torch.ones(2), normalize)


@pytest.mark.parametrize("value", [None, [1.0, 2.0], torch.tensor([1, 2])])
def test_weights_of_what_is_no_float_tensor_are_refused(value):
    with pytest.raises(TypeError, match="`contributions`"):
        contribution_weights(value)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_weights_without_a_dimension_are_refused(shape):
    with pytest.raises(ValueError, match="`contributions`"):
        contribution_weights(torch.ones(shape))


# Prototypes


def test_prototypes_are_class_means_in_the_order_of_any_labels():
    embeddings, labels = random(7, 4), [42, -3, 42, 1000, -3, 42, 7]
    expected = [embeddings.numpy()[np.array(labels) == label].mean(0) for label in (-3, 7, 42, 1000)]
    for form in (labels, torch.tensor(labels), np.array(labels), torch.tensor(labels, dtype=torch.int16)):
        np.testing.assert_allclose(prototypes(embeddings, form).numpy(), expected, rtol=1e-13)


@few
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12))
def test_every_class_has_the_mean_of_its_embeddings(labels):
    embeddings = random(len(labels), 3)
    means = prototypes(embeddings, labels)
    expected = [embeddings.numpy()[np.array(labels) == label].mean(0) for label in sorted(set(labels))]
    np.testing.assert_allclose(means.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_prototypes_are_detached():
    assert not prototypes(random(4, 3).requires_grad_(), [0, 0, 1, 1]).requires_grad


@pytest.mark.parametrize("dtype", HALVES)
def test_prototypes_of_half_embeddings_are_summed_beyond_their_range(dtype):
    embeddings = torch.full((300, 2), 1000.0, dtype=dtype)  # float16 ends at 65504
    means = prototypes(embeddings, [0] * 300)
    assert means.dtype == dtype
    torch.testing.assert_close(means.float(), torch.full((1, 2), 1000.0))


@pytest.mark.parametrize("embeddings", [None, [[1.0]], torch.ones(2, 3, dtype=torch.long)])
def test_prototypes_of_what_is_no_float_tensor_are_refused(embeddings):
    with pytest.raises(TypeError, match="`embeddings`"):
        prototypes(embeddings, [0, 1])


@pytest.mark.parametrize("labels", [None, [0.0, 1.0], ["cat", "dog"], torch.tensor([0.0, 1.0])])
def test_labels_that_are_no_integers_are_refused(labels):
    with pytest.raises(TypeError, match="`labels`"):
        prototypes(torch.ones(2, 3), labels)


@pytest.mark.parametrize(
    ("shape", "labels"), [((2, 3), [0]), ((2, 3), [[0, 1]]), ((6,), [0] * 6), ((0, 3), []), ((2, 3, 1), [0, 1])]
)
def test_prototypes_of_shapes_that_do_not_fit_are_refused(shape, labels):
    with pytest.raises(ValueError, match="label"):
        prototypes(torch.ones(shape), torch.tensor(labels, dtype=torch.long))


# SimilarityScore


@pytest.mark.parametrize("similarity", NAMES)
def test_scores_are_those_of_torch(similarity):
    encoder, x, s = seeded(PooledEncoder), random(4, 3, 6, 6), random(5, 6, seed=2)
    result = SimilarityScore(encoder, s, similarity)(x)
    assert result.shape == (4, 5)
    torch.testing.assert_close(result, scores(encoder(x), s, similarity), rtol=1e-10, atol=1e-12)


def test_the_score_of_a_similarity_function_is_the_sum_of_its_contributions():
    z, s = random(4, 6), random(5, 6, seed=2)
    result = SimilarityScore(nn.Identity(), s, manhattan)(z)
    torch.testing.assert_close(result, -torch.cdist(z, s, p=1), rtol=1e-12, atol=1e-12)


def test_a_score_takes_a_plain_function_and_several_inputs():
    a, b, s = random(4, 6), random(4, 6, seed=2), random(5, 6, seed=3)
    torch.testing.assert_close(SimilarityScore(lambda a, b: a + b, s, "dot")(a, b), (a + b) @ s.mT)


def test_the_references_are_a_buffer_that_is_saved_and_moved_with_the_module():
    score = SimilarityScore(nn.Linear(3, 2), torch.ones(4, 2))
    assert "reference_embedding" in dict(score.named_buffers())
    assert torch.equal(score.state_dict()["reference_embedding"], torch.ones(4, 2))
    assert score.double().reference_embedding.dtype == torch.float64
    assert score(random(5, 3)).dtype == torch.float64
    other = SimilarityScore(nn.Linear(3, 2), torch.zeros(4, 2)).double()
    other.load_state_dict(score.state_dict())
    assert torch.equal(other.reference_embedding, torch.ones(4, 2, dtype=torch.float64))


def test_the_references_are_detached_and_do_not_train():
    s = torch.ones(4, 2, requires_grad=True)
    score = SimilarityScore(nn.Linear(3, 2), s)
    assert not score.reference_embedding.requires_grad
    assert {name for name, _ in score.named_parameters()} == {"encoder.weight", "encoder.bias"}
    score(torch.ones(1, 3)).sum().backward()
    assert s.grad is None


@pytest.mark.parametrize("dtype", HALVES)
def test_half_scores_are_summed_in_float32(dtype):
    z, s = random(3, 512, dtype=dtype), random(4, 512, seed=2, dtype=dtype)
    result = SimilarityScore(nn.Identity(), s)(z)
    assert result.dtype == dtype
    exact = scores(z.double(), s.double(), "cosine")
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(
    ("modify", "select"),
    [
        (lambda z: {"embedding": z, "loss": 0}, lambda output: output["embedding"]),
        (lambda z: (0, z), lambda output: output[1]),
        (lambda z: z[:, :, None, None], lambda output: output.flatten(1)),
    ],
)
def test_an_output_selector_takes_the_embeddings_out_of_any_output(modify, select):
    encoder, x, s = seeded(PooledEncoder), random(2, 3, 6, 6), random(5, 6, seed=2)
    result = SimilarityScore(Modified(encoder, modify), s, output_selector=select)(x)
    assert torch.equal(result, SimilarityScore(encoder, s)(x))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"encoder": "resnet18"}, TypeError, "`encoder`.*'resnet18'"),
        ({"reference_embedding": [[1.0, 2.0]]}, TypeError, "`reference_embedding`.*list"),
        ({"reference_embedding": torch.ones(2, 2, dtype=torch.long)}, TypeError, "`reference_embedding`.*int64"),
        ({"reference_embedding": torch.ones(2)}, ValueError, r"`reference_embedding`.*\(2,\)"),
        ({"reference_embedding": torch.ones(2, 2, 2)}, ValueError, r"`reference_embedding`.*\(2, 2, 2\)"),
        ({"similarity": "cos"}, ValueError, "`similarity`.*'cos'"),
        ({"similarity": 1}, TypeError, "`similarity`"),
        ({"output_selector": "embedding"}, TypeError, "`output_selector`.*'embedding'"),
    ],
)
def test_a_score_of_bad_arguments_is_refused(change, error, match):
    arguments = {"encoder": nn.Identity(), "reference_embedding": torch.ones(2, 2), **change}
    with pytest.raises(error, match=match):
        SimilarityScore(**arguments)


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        ({"last": torch.ones(2, 2)}, TypeError, "output_selector.*last"),
        ((torch.ones(2, 2), None), TypeError, "tuple of 2.*output_selector"),
        (torch.ones(2, 2, 1, 1), ValueError, r"\(2, 2, 1, 1\).*output_selector"),
        (torch.ones(2), ValueError, r"\(2,\)"),
        (torch.ones(2, 2, dtype=torch.long), TypeError, "int64"),
        (None, TypeError, "None.*output_selector"),
    ],
)
def test_an_encoder_that_gives_no_embeddings_is_refused_with_a_cure(output, error, match):
    score = SimilarityScore(lambda x: output, torch.ones(3, 2))
    with pytest.raises(error, match=match):
        score(torch.ones(2, 2))


def test_references_of_another_embedding_dimension_are_refused():
    score = SimilarityScore(seeded(FlatEncoder), random(2, 7))
    with pytest.raises(ValueError, match=r"54.*7"):
        score(random(1, 3, 6, 6))
