"""Fame, against a loop written by hand: gradients by central differences, the blur by SciPy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from encoders import CONV, Classifier, PooledEncoder, Shifted, TwoInputEncoder, random, seeded
from helpers import close, silent, similarity_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate1d
from test_model_untouched import NormEncoder, state
from torch import nn

from captum_fam import Fame, SimilarityScore, compare_attributions, explain_hits
from captum_fam.methods.fame import blurred, grey

X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)
STD = (0.2, 0.25, 0.5)
LUMA = np.array([0.2989, 0.587, 0.114])


def smooth(dim=2):
    """An encoder without kinks, so that differences are gradients."""
    return seeded(
        lambda: nn.Sequential(
            nn.Flatten(2),
            nn.Linear(16 if dim == 2 else 4**dim, 5),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(6),
        )
    )


def encoder_of(x):
    encoder = smooth(x.ndim - 2).double()
    with torch.no_grad():
        encoder(x)
    for p, values in zip(encoder.parameters(), range(9), strict=False):
        p.data.copy_(random(*p.shape, seed=10 + values) / np.sqrt(p.shape[-1]))
    return encoder


def gradient_of(score, p, h=1e-6):
    """By central differences."""
    g = np.zeros_like(p)
    for i in np.ndindex(*p.shape):
        up, down = p.copy(), p.copy()
        up[i] += h
        down[i] -= h
        g[i] = (score(up) - score(down)) / (2 * h)
    return g


def gaussian(image, sigma, reach):
    at = np.arange(-reach, reach + 1)
    kernel = np.exp(-(at**2) / (2 * sigma**2))
    for axis in range(image.ndim):
        image = correlate1d(image, kernel / kernel.sum(), axis=axis, mode="mirror")
    return image


def fame_of(encoder, x, score, sign=1, n_steps=4, std=(1.0,)):
    """The method for one input (C, *spatial), on the pixels that the encoder normalises."""
    std = np.broadcast_to(np.array(std), len(x)).reshape(-1, *[1] * (x.ndim - 1))

    def of_pixels(p):
        with torch.no_grad():
            return score(encoder(torch.from_numpy(p / std)[None])[0].numpy())

    start = p = x.numpy() * std
    for _ in range(n_steps):
        g = gradient_of(of_pixels, p)
        p = p - sign * g / np.abs(g).max() / 255
    weights = LUMA if len(x) == 3 else np.full(len(x), 1 / len(x))
    change = np.abs(np.tensordot(weights, p, 1) - np.tensordot(weights, start, 1))
    side = min(x.shape[1:])
    return gaussian(change, 7.7 * side / 224, round(24 * side / 224)) if round(24 * side / 224) else change


@pytest.mark.parametrize("std", [(1.0,), (0.25,), STD], ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_fame_is_a_loop_over_steps_in_both_directions(similarity, std):
    x = random(2, 3, 4, 4)
    encoder = encoder_of(x)
    fame = Fame(encoder, similarity=similarity, n_steps=4, std=std[0] if len(std) == 1 else std)
    both = fame.attribute_both(x, [3, 1], reference_embedding=REFERENCES)
    assert both[0].shape == both[1].shape == (2, 1, 4, 4)
    for maps, sign in zip(both, (1, -1), strict=True):
        for b, own in enumerate([3, 1]):

            def score(z, own=own):
                return similarity_of(z, REFERENCES[own].numpy(), similarity)

            close(maps[b, 0], fame_of(encoder, x[b], score, sign, std=std), rtol=1e-5, atol=1e-8)
    close(fame.attribute(x, [3, 1], reference_embedding=REFERENCES), both[0])
    signed = Fame(encoder, similarity=similarity, n_steps=4, std=fame.std, signed=True)
    close(signed.attribute(x, [3, 1], reference_embedding=REFERENCES), both[0] - both[1])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", CONV)
def test_fame_in_each_number_of_dimensions_and_channels(dim, channels):
    x = random(1, channels, *[11, 10, 10][:dim])
    encoder = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5), nn.Tanh())).double()
    s = random(1, 5, seed=3)
    maps = Fame(encoder, n_steps=3).attribute(x, reference_embedding=s)
    moved = torch.zeros_like(x)
    for _ in range(3):
        at = (x + moved).requires_grad_()
        (g,) = torch.autograd.grad(torch.cosine_similarity(encoder(at), s).sum(), at)
        moved -= g / g.abs().max() / 255
    weights = torch.from_numpy(LUMA) if channels == 3 else torch.full((channels,), 1 / channels).double()
    change = torch.einsum("c,bc...->b...", weights, moved).abs()[0].numpy()
    close(maps[0, 0], gaussian(change, 7.7 * min(x.shape[2:]) / 224, 1))


def test_a_step_by_hand():
    """One pixel of three channels; the score is a dot product, whose gradient by x is the reference."""
    s, x = torch.tensor([[1.0, -2.0, 0.5]]).double(), torch.ones(1, 3, 1, 1).double()
    similar, dissimilar = Fame(nn.Flatten(), similarity="dot", n_steps=2).attribute_both(x, reference_embedding=s)
    # Two steps of (-1, 2, -0.5) / 2 / 255, in luma.
    expected = 2 / 255 * abs(-0.5 * 0.2989 + 0.587 - 0.25 * 0.114)
    close(similar, torch.full((1, 1, 1, 1), expected, dtype=torch.float64))
    close(dissimilar, similar)
    # Inputs that were divided by (1, 1/4, 1/2): the gradient by pixels is (1, -8, 1).
    scaled = Fame(nn.Flatten(), similarity="dot", n_steps=2, std=(1.0, 0.25, 0.5))
    expected = 2 / 255 * abs(-0.2989 / 8 + 0.587 - 0.114 / 8)
    close(scaled.attribute(x, reference_embedding=s), torch.full((1, 1, 1, 1), expected, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1.0, 255.0, 0.01])
def test_a_step_is_one_of_pixels_whatever_the_encoder_takes(scale):
    """The same network behind another normalisation has the same map."""
    encoder, mean = seeded(PooledEncoder), torch.tensor([0.3, 0.5, 0.4]).double()[:, None, None]
    std = torch.tensor(STD).double()[:, None, None] * scale
    s, pixels = REFERENCES[:1], random(2, 3, 8, 8).sigmoid()
    plain = Fame(encoder, n_steps=5).attribute(pixels, reference_embedding=s)
    behind = Fame(lambda x: encoder(x * std + mean), n_steps=5, std=std.flatten())
    close(behind.attribute((pixels - mean) / std, reference_embedding=s), plain, rtol=1e-6, atol=1e-10)


def test_the_strongest_pixel_moves_by_one_step_and_none_by_more():
    seen = []

    def encoder(x):
        seen.append(x.detach().clone())
        return x.flatten(1).tanh()

    x = random(2, 1, 3, 3)
    Fame(encoder, n_steps=6, std=0.5).attribute(x, reference_embedding=random(1, 9, seed=4))
    steps = [(after - before).abs().flatten(1).amax(1) for before, after in pairwise(seen)]
    assert len(seen) == 6
    for step in steps:
        close(step, np.full(2, 1 / 255 / 0.5))


def test_the_similar_map_lowers_the_score_and_the_dissimilar_one_raises_it():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.z = seeded(PooledEncoder), []

        def forward(self, x):
            z = self.encoder(x)
            self.z.append(z.detach())
            return z

    last, s = Last(), REFERENCES[:1]
    Fame(last, n_steps=10).attribute_both(X, reference_embedding=s)
    scores = torch.stack([torch.cosine_similarity(z, s) for z in last.z])
    assert len(scores) == 20
    assert (scores[1:10] < scores[:9]).all()
    assert (scores[11:] > scores[10:19]).all()
    close(scores[10], scores[0])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.lists(st.integers(1, 26), min_size=1, max_size=3), st.integers(0, 99))
def test_the_blur_is_scipys_and_keeps_the_mean_of_what_is_flat(n, size, seed):
    maps = random(n, 1, *size, seed=seed).abs()
    side = min(size)
    sigma, reach = 7.7 * side / 224, round(24 * side / 224)
    for one, map_ in zip(blurred(maps), maps, strict=True):
        close(one[0], gaussian(map_[0].numpy(), sigma, reach) if reach else map_[0])
    close(blurred(torch.ones_like(maps)), torch.ones_like(maps))


def test_at_224_pixels_the_blur_has_the_papers_kernel():
    gaussian_blur = pytest.importorskip("torchvision.transforms.functional").gaussian_blur
    maps = random(2, 1, 224, 240).abs()
    close(blurred(maps), gaussian_blur(maps, [49, 49], [7.7, 7.7]), rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_of_other_numbers_of_channels_is_their_mean(channels):
    x = random(2, channels, 3, 3)
    close(grey(x), x.mean(1, keepdim=True))


def test_grey_comes_before_the_magnitude():
    """Red up and green down in proportion: grey does not change."""
    s = torch.tensor([[0.587, -0.2989, 0.0]], dtype=torch.float64)
    maps = Fame(nn.Flatten(), similarity="dot", n_steps=3).attribute(
        torch.ones(1, 3, 1, 1).double(), reference_embedding=s
    )
    close(maps, torch.zeros(1, 1, 1, 1).double(), atol=1e-15)


# Batches


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(3)), st.integers(1, 4), st.sampled_from(["cosine", "dot", "euclidean"]))
def test_examples_do_not_depend_on_each_other(order, most, similarity):
    encoder = seeded(PooledEncoder)
    fame = Fame(encoder, n_steps=3, similarity=similarity)
    target = [1, 0, 3]
    maps = fame.attribute(X, target, reference_embedding=REFERENCES)
    shuffled = fame.attribute(
        X[list(order)], [target[i] for i in order], reference_embedding=REFERENCES, internal_batch_size=most
    )
    close(shuffled, maps[list(order)], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_inputs_than_asked_for_go_through_at_once(most):
    encoder, sizes = seeded(PooledEncoder), []
    handle = encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    maps = Fame(encoder, n_steps=3).attribute(X, reference=X.roll(1, 0), internal_batch_size=most)
    handle.remove()
    assert max(sizes) == min(most, 3)
    assert sum(sizes) == 3 + 3 * 3  # the references, and a pass of each step
    close(maps, Fame(encoder, n_steps=3).attribute(X, reference=X.roll(1, 0)), rtol=1e-7, atol=1e-10)


def test_the_same_call_gives_the_same_map_and_moves_no_random_numbers():
    encoder = seeded(PooledEncoder)
    before = torch.get_rng_state()
    one, other = (Fame(encoder, n_steps=3).attribute(X, 1, reference_embedding=REFERENCES) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_of_no_inputs():
    fame = Fame(seeded(PooledEncoder), n_steps=3)
    with silent():
        assert fame.attribute(X[:0], 1, reference_embedding=REFERENCES).shape == (0, 1, 8, 8)
        similar, dissimilar = fame.attribute_both(X[:0], 1, reference_embedding=REFERENCES)
    assert similar.shape == dissimilar.shape == (0, 1, 8, 8)


# References


@pytest.mark.parametrize("contrast", [2, [2, 3, 0], "rest"], ids=str)
def test_a_contrast_is_the_difference_of_maps(contrast):
    fame = Fame(seeded(PooledEncoder), n_steps=3)
    each = [fame.attribute_both(X, k, reference_embedding=REFERENCES) for k in range(4)]
    own = torch.tensor([1, 1, 0])
    found = fame.attribute_both(X, own, reference_embedding=REFERENCES, contrast=contrast)
    for side in range(2):
        maps = torch.stack([pair[side] for pair in each], 1)
        rows = torch.arange(3)
        others = (maps.sum(1) - maps[rows, own]) / 3
        if contrast != "rest":
            others = maps[rows, torch.as_tensor(contrast).expand(3)]
        close(found[side], maps[rows, own] - others, rtol=1e-7, atol=1e-10)
    close(fame.attribute(X, own, reference_embedding=REFERENCES, contrast=contrast), found[0])


def test_the_logit_of_a_classifier_is_lowered():
    model = seeded(Classifier)
    score = SimilarityScore(model, torch.eye(5).double(), "dot")
    maps = Fame(score, n_steps=4).attribute(X, [4, 0, 2])
    for b, own in enumerate([4, 0, 2]):
        moved = torch.zeros_like(X[:1])
        for _ in range(4):
            at = (X[b : b + 1] + moved).requires_grad_()
            (g,) = torch.autograd.grad(model(at)[0, own], at)
            moved -= g / g.abs().max() / 255
        change = np.abs(np.tensordot(LUMA, moved[0].numpy(), 1))
        close(maps[b, 0], gaussian(change, 7.7 * 8 / 224, 1))


def test_each_input_has_its_own_row_of_arguments():
    encoder, shift = seeded(Shifted), random(3, 6, seed=7)
    fame = Fame(encoder, n_steps=3)
    maps = fame.attribute(X, 2, (shift, 0.5), reference_embedding=REFERENCES, internal_batch_size=2)
    for b in range(3):
        one = fame.attribute(X[b : b + 1], 2, (shift[b : b + 1], 0.5), reference_embedding=REFERENCES)
        close(maps[b : b + 1], one, rtol=1e-7, atol=1e-10)


def test_outputs_that_are_more_than_an_embedding():
    encoder = seeded(PooledEncoder)
    plain = Fame(encoder, n_steps=3).attribute(X, 1, reference_embedding=REFERENCES)
    selected = Fame(lambda x: {"z": encoder(x)}, output_selector=lambda output: output["z"], n_steps=3)
    close(selected.attribute(X, 1, reference_embedding=REFERENCES), plain)


# Where nothing moves


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_image_and_itself_have_no_map_and_the_user_is_told(dtype, similarity):
    encoder, x = seeded(PooledEncoder).to(dtype), X.to(dtype)
    s = torch.cat([encoder(x[i : i + 1]).detach() for i in range(2)] + [REFERENCES[:1].to(dtype)])  # another batch
    with pytest.warns(UserWarning, match=r"no gradient by the pixels in 2 of 3 pairs.*itself") as caught:
        maps = Fame(encoder, n_steps=3, similarity=similarity).attribute(x, reference_embedding=s)
    assert len(caught) == 1
    assert not maps[:2].any()
    assert maps[2].any()


def test_a_cosine_close_to_one_still_has_a_map():
    encoder = seeded(PooledEncoder).float()
    x = X.float()
    s = encoder(x).detach() + 1e-3 * random(3, 6, seed=8).float()
    with silent():
        assert Fame(encoder, n_steps=3).attribute(x, reference_embedding=s).flatten(1).any(1).all()


@pytest.mark.parametrize("cut", ["detach", "constant"])
def test_an_encoder_that_cuts_the_gradient_has_no_map_and_the_user_is_told(cut):
    encoder = seeded(PooledEncoder)
    w = nn.Parameter(torch.ones(6).double())

    def embed(x):
        return encoder(x).detach() if cut == "detach" else encoder(x.detach()) * w

    with pytest.warns(UserWarning, match=r"in 3 of 3 pairs.*cuts the gradient \(detach, torch\.no_grad\)"):
        assert not Fame(embed, n_steps=2).attribute(X, 1, reference_embedding=REFERENCES).any()
    assert w.grad is None


@pytest.mark.parametrize("bad", [0.0, float("nan")])
@pytest.mark.parametrize("contrast", [None, 1])
def test_a_reference_that_cannot_be_compared_with_has_no_map(bad, contrast):
    s = torch.stack([REFERENCES[0], torch.full((6,), bad).double(), REFERENCES[1]])
    fame = Fame(seeded(PooledEncoder), n_steps=2)
    with pytest.warns(UserWarning, match=r"Embeddings are zero or not finite \(references \[1\]\)") as caught:
        maps = fame.attribute(X, [0, 1, 2], reference_embedding=s, contrast=contrast)
    assert len(caught) == 1
    assert maps.isfinite().all()
    assert maps.flatten(1).any(1).tolist() == ([True, False, True] if contrast is None else [False] * 3)


@pytest.mark.parametrize("bad", [0.0, float("inf")])
def test_an_input_without_an_embedding_has_no_map(bad):
    x = X.clone()
    x[1] = bad
    encoder = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6, bias=False))).double()
    with pytest.warns(UserWarning, match=r"Embeddings are zero or not finite \(inputs \[1\]\)"):
        maps = Fame(encoder, n_steps=2).attribute(x, 0, reference_embedding=REFERENCES)
    assert maps.flatten(1).any(1).tolist() == [True, False, True]


def test_gradients_that_are_not_finite_end_the_steps():
    class Breaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            z = x.flatten(1)[:, :6]
            return z * float("inf") if self.calls > 2 else z

    x, s = torch.zeros(1, 1, 3, 3).double() + 1, random(1, 6)
    with pytest.warns(UserWarning, match="Gradients are not finite: the maps that depend on them end at that step"):
        maps = Fame(Breaking(), n_steps=5).attribute(x, reference_embedding=s)
    close(maps, Fame(lambda x: x.flatten(1)[:, :6], n_steps=2).attribute(x, reference_embedding=s))


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_small_steps_add_up(dtype):
    """At 8, a step of 1/255 is less than bfloat16 can tell."""
    x, s = torch.full((1, 1, 2, 2), 8.0), torch.tensor([[4.0, -2.0, 1.0, 0.5]])
    maps = Fame(nn.Flatten(), similarity="dot", n_steps=20).attribute(x.to(dtype), reference_embedding=s.to(dtype))
    assert maps.dtype == dtype
    close(maps.float(), 20 / 255 * s.abs().reshape(1, 1, 2, 2) / 4, rtol=1e-2)


def test_gradients_too_small_for_half_precision_are_scaled():
    x, s = random(1, 1, 4, 4, dtype=torch.float16), random(1, 16, seed=2, dtype=torch.float32)
    fame = Fame(nn.Flatten(), similarity="dot", n_steps=4)
    tiny = fame.attribute(x, reference_embedding=s * 1e-9)
    assert tiny.any()
    close(tiny, fame.attribute(x, reference_embedding=s), rtol=1e-2, atol=1e-4)


# The model, and the caller


def test_the_model_and_its_gradients_are_as_they_were():
    model, s = seeded(NormEncoder).eval(), random(2, 6)
    before = state(model, X)
    Fame(model, n_steps=3).attribute(X, 0, reference_embedding=s)
    assert state(model, X) == before
    model.train()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with (
        pytest.warns(UserWarning, match="training mode and has batch norm"),
        pytest.warns(UserWarning, match="training mode and has dropout"),
    ):
        Fame(model, n_steps=3).attribute(X, 0, reference_embedding=s)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


class Counting(nn.Module):
    """Sees less of its input with each pass that its buffer has counted."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()).double())

    def forward(self, x):
        self.passes.add_(1)
        return x.flatten(1).tanh() ** self.passes


def test_no_step_sees_what_the_step_before_made_of_a_buffer():
    x, s = random(2, 1, 3, 3).abs(), random(1, 9, seed=4)
    counting = Counting()
    found = Fame(counting, n_steps=4).attribute(x, reference_embedding=s)
    assert counting.passes == 0
    close(found, Fame(lambda x: x.flatten(1).tanh(), n_steps=4).attribute(x, reference_embedding=s))


def test_an_encoder_may_change_its_input_in_place():
    encoder = seeded(PooledEncoder)
    plain = Fame(lambda x: encoder(x * 2), n_steps=3).attribute(X, 1, reference_embedding=REFERENCES)
    x = X.clone()
    close(Fame(lambda x: encoder(x.mul_(2)), n_steps=3).attribute(x, 1, reference_embedding=REFERENCES), plain)
    assert torch.equal(x, X)


def test_fame_without_gradients_around_it():
    fame = Fame(seeded(PooledEncoder), n_steps=3)
    plain = fame.attribute(X, 1, reference_embedding=REFERENCES)
    with torch.no_grad():
        close(fame.attribute(X, 1, reference_embedding=REFERENCES), plain)
    frozen = seeded(PooledEncoder).requires_grad_(False)
    close(Fame(frozen, n_steps=3).attribute(X, 1, reference_embedding=REFERENCES), plain)
    assert not plain.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Fame needs a gradient.*use torch\.no_grad\(\)"):
        fame.attribute(X, 1, reference_embedding=REFERENCES)


@pytest.mark.parametrize("show", [True, False])
def test_a_progress_bar_counts_the_passes(capsys, show):
    fame = Fame(nn.Flatten(), n_steps=3, show_progress=show)
    fame.attribute_both(random(2, 1, 2, 2), reference_embedding=random(1, 4, seed=2), internal_batch_size=1)
    err = capsys.readouterr().err
    assert ("Fame: 100%" in err and "12/12" in err) if show else err == ""


# Errors


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_steps": 0}, ValueError, "`n_steps`.*positive int.*0"),
        ({"n_steps": 1.5}, TypeError, "`n_steps`.*positive int.*1.5"),
        ({"std": 0.0}, ValueError, r"`std` to be positive and finite, but got 0\.0"),
        ({"std": (0.2, -1.0, 0.2)}, ValueError, r"`std` to be positive and finite, but got \(0\.2, -1\.0, 0\.2\)"),
        ({"std": float("nan")}, ValueError, "`std` to be positive and finite, but got nan"),
        ({"std": "imagenet"}, TypeError, "`std` to be a number, or one for each channel, but got 'imagenet'"),
        ({"std": True}, TypeError, "`std` to be a number.*True"),
        ({"std": None}, TypeError, "`std` to be a number.*None"),
        ({"std": torch.ones(3, 1, 1)}, TypeError, r"`std` to be a number.*shape \(3, 1, 1\)"),
        ({"similarity": "cosin"}, ValueError, "`similarity`.*Did you mean 'cosine'"),
        ({"output_selector": 1}, TypeError, "`output_selector`.*function.*1"),
    ],
)
def test_wrong_options_are_refused_when_it_is_made(options, error, match):
    with pytest.raises(error, match=match):
        Fame(seeded(PooledEncoder), **options)


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        ((X, X), ValueError, r"one input \(B, C, \*spatial\).*\(3, 3, 8, 8\), \(3, 3, 8, 8\)\]; bind"),
        (X[:, :, 0, 0], ValueError, r"one input \(B, C, \*spatial\).*\(3, 3\)"),
        ((X * 255).byte(), TypeError, r"Fame needs floating-point inputs.*uint8.*pass inputs\.float\(\)"),
        (X[:, :2], ValueError, r"`std` to be one number, or 2 of them.*but got 3"),
    ],
    ids=["two", "no places", "bytes", "channels"],
)
def test_inputs_that_fame_cannot_change_are_refused(inputs, error, match):
    with pytest.raises(error, match=match):
        Fame(lambda *_: REFERENCES[:3], std=STD).attribute(inputs, 1, reference_embedding=REFERENCES)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"exactly one of `reference`.*got none.*torch\.eye"),
        ({"reference_embedding": REFERENCES, "contrast": "self"}, r"Fame has no contrast='self'"),
        ({"reference_embedding": REFERENCES, "internal_batch_size": 0}, "`internal_batch_size`.*positive"),
        ({"reference_embedding": REFERENCES[:, :5]}, "5 dimensions.*`inputs` have 6"),
    ],
    ids=["none", "self", "batch", "dimensions"],
)
def test_what_fame_cannot_be_asked(options, match, both):
    fame = Fame(seeded(PooledEncoder), n_steps=2)
    with pytest.raises(ValueError, match=match):
        (fame.attribute_both if both else fame.attribute)(X, 1, **options)


def test_two_inputs_are_bound_in_the_encoder():
    two = seeded(TwoInputEncoder)
    other = random(1, 1, 8, 8, seed=5)
    maps = Fame(lambda x: two(x, other.expand(len(x), -1, -1, -1)), n_steps=2).attribute(
        X, reference_embedding=random(1, 3)
    )
    assert maps.shape == (3, 1, 8, 8)


# Beside the others


def test_fame_is_compared_by_its_name_and_by_itself():
    encoder = seeded(PooledEncoder)
    score = SimilarityScore(encoder, REFERENCES)
    few = Fame(score, n_steps=3, signed=True)
    maps = compare_attributions(score, encoder.layer, X, 1, ["Fame", few], show_progress=False)
    close(maps["Fame"], Fame(score).attribute(X, 1))
    close(maps["Fame 2"], few.attribute(X, 1))


@pytest.mark.parametrize("signed", [False, True])
def test_fame_in_a_task_counts_an_equal_image(signed):
    encoder, hits = seeded(PooledEncoder), torch.stack([torch.stack([x, x.flip(2)]) for x in X])
    with pytest.warns(UserWarning, match="no gradient by the pixels in [13] of [26] pairs"):
        found = explain_hits(X, hits, encoder, None, method="Fame", n_steps=3, signed=signed)
    assert not found.maps[:, 0].any()
    for b in range(3):
        own = Fame(encoder, n_steps=3, signed=signed).attribute(X[b : b + 1], reference=hits[b, 1:])
        close(found.maps[b, 1:], own[:, 0], rtol=1e-6, atol=1e-9)
