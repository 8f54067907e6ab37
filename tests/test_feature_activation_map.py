"""The map, against the reference implementation, against Captum, and in every form that it can be asked for."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import reference as oracle
import torch
from captum.attr import LayerFeatureAblation, LayerGradCam, LayerGradientXActivation
from encoders import (
    CONV,
    BranchedEncoder,
    FlatEncoder,
    HeadEncoder,
    Modified,
    PooledEncoder,
    PowerPooledEncoder,
    ResidualEncoder,
    TokenEncoder,
    TwoInputEncoder,
    random,
    seeded,
)
from helpers import close, run, silent
from torch import nn

from captum_fam import (
    FeatureActivationMap,
    SimilarityDecomposition,
    SimilarityScore,
    channel_contributions,
    contribution_weights,
    prototypes,
)


def manhattan(z, s):
    return -(z - s).abs()


SIMILARITIES = {"cosine": "cosine", "dot": "dot", "euclidean": "euclidean", "manhattan": manhattan}


class HeldTarget(nn.Module):
    """f.z with f held constant, (B, 1): the target whose gradient at each place is what the jacobian route takes."""

    def __init__(self, encoder, f):
        super().__init__()
        self.encoder, self.f = encoder, f

    def forward(self, *inputs):
        return (self.f * self.encoder(*inputs)).sum(1, keepdim=True)


def fam_weights(z, s, similarity="cosine", normalize="minmax"):
    """f (B, D) = w * sign(z), by the reference implementation, for paired z and s or one s for all."""
    z, s = z.detach().numpy(), s.expand_as(z).numpy()
    return torch.from_numpy(np.stack([oracle.pair_weights(a, b[None], 0, similarity, normalize) for a, b in zip(z, s)]))


def places(activation):
    return activation[0, 0].numel()


def terms_of_held_target(encoder, layer, inputs, f, **options):
    """Captum's gradient of f.z times the activation, times the number of places: (B, C, *spatial), or a tuple."""
    found = LayerGradientXActivation(HeldTarget(encoder, f), layer).attribute(inputs, target=0, **options)
    return tuple(t.detach() * places(t) for t in found) if isinstance(found, tuple) else found.detach() * places(found)


def map_of_held_target(*args, **options):
    """Those, added up over the channels."""
    found = terms_of_held_target(*args, **options)
    return tuple(t.sum(1, keepdim=True) for t in found) if isinstance(found, tuple) else found.sum(1, keepdim=True)


def both(encoder):
    """An encoder and its layer, for the routes that both apply to it."""
    return [FeatureActivationMap(encoder, encoder.layer, channel_weights=route) for route in ("aligned", "jacobian")]


# Against the reference implementation


QUESTIONS = {
    "plain": {},
    "another": {"contrast": 1},
    "rest": {"contrast": "rest"},
    "self": {"contrast": "self"},
    "threshold": {"threshold": 0.3},
}
# The score of z with itself is zero by a distance, so it has no share of it to take away.
ASKED = [
    pytest.param(similarity, asked, id=f"{similarity}-{name}")
    for similarity in SIMILARITIES
    for name, asked in QUESTIONS.items()
    if similarity in ("cosine", "dot") or name not in ("self", "threshold")
]


@pytest.mark.parametrize(("similarity", "asked"), ASKED)
@pytest.mark.parametrize("normalize", ["minmax", None])
@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_the_map_is_that_of_the_reference_implementation(kind, normalize, similarity, asked):
    encoder, x = seeded(kind), random(3, 3, 6, 6)
    z, A = run(encoder, x)
    s = random(4, z.shape[1], seed=2)
    targets = [2, 0, 3]
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=SIMILARITIES[similarity], normalize=normalize)
    maps = fam.attribute(x, targets, reference_embedding=s, **asked)
    assert maps.shape == (3, 1, 3, 3)
    for b, own in enumerate(targets):
        f = oracle.pair_weights(z[b].numpy(), s.numpy(), own, similarity, normalize, **asked)
        if kind is PooledEncoder:
            expected = oracle.aligned_map(f, A[b].numpy())
        else:  # the head's weights, spread over the nine places of the mean
            head = encoder.head.weight.detach().numpy()
            expected = oracle.jacobian_map(f, np.tile(head[:, :, None, None] / 9, (1, 1, 3, 3)), A[b].numpy())
        close(maps[b, 0], expected)


def test_the_heads_of_these_tests_have_dimensions_of_both_signs():
    z = seeded(HeadEncoder)(random(3, 3, 6, 6))
    assert (z.amin(1) < 0).all()
    assert (z.amax(1) > 0).all()


@pytest.mark.parametrize(("similarity", "asked"), ASKED)
def test_each_place_of_a_flattening_encoder_has_the_weights_of_its_own_dimensions(similarity, asked):
    """Dimension (k, i) is channel k at place i, so v_i has its activations and no others."""
    encoder, x = seeded(FlatEncoder), random(2, 3, 4, 4)
    z, A = run(encoder, x)
    s = random(3, z.shape[1], seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=SIMILARITIES[similarity])
    maps = fam.attribute(x, [2, 0], reference_embedding=s, **asked)
    for b, own in enumerate([2, 0]):
        f = oracle.pair_weights(z[b].numpy(), s.numpy(), own, similarity, **asked).reshape(A[b].shape)
        close(maps[b, 0], places(A) * (f * A[b].numpy()).sum(0))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_map_of_a_flattening_encoder_is_that_of_its_numeric_jacobian(similarity):
    encoder, x = seeded(FlatEncoder), random(2, 3, 4, 4)
    z, A = run(encoder, x)
    s = random(2, z.shape[1], seed=2)
    maps = FeatureActivationMap(encoder, encoder.layer, similarity=SIMILARITIES[similarity]).attribute(
        x, reference_embedding=s
    )
    for b in range(2):
        jacobian = oracle.numeric_jacobian(np.ravel, A[b].numpy())
        f = oracle.pair_weights(z[b].numpy(), s.numpy(), b, similarity)
        close(maps[b, 0], oracle.jacobian_map(f, jacobian, A[b].numpy()), rtol=1e-8)


def test_the_map_of_power_pooling_is_that_of_its_numeric_jacobian():
    def pool(activation):
        return np.mean(np.maximum(activation, 1e-6) ** 3, axis=(1, 2)) ** (1 / 3)

    encoder, x = seeded(PowerPooledEncoder), random(2, 3, 6, 6)
    z, A = run(encoder, x)
    s = random(1, 6, seed=2)
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=s)
    for b in range(2):
        f = oracle.pair_weights(z[b].numpy(), s.numpy(), 0, "cosine")
        jacobian = oracle.numeric_jacobian(pool, A[b].numpy())
        close(maps[b, 0], oracle.jacobian_map(f, jacobian, A[b].numpy()), rtol=1e-6)


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
@pytest.mark.parametrize("dim", CONV)
def test_a_map_has_as_many_spatial_dimensions_as_its_layer(kind, dim):
    encoder, x = seeded(lambda: kind(dim)), random(2, 3, *[5] * dim)
    z, A = run(encoder, x)
    s = random(2, z.shape[1], seed=2)
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=s)
    assert maps.shape == (2, 1, *[3] * dim)
    for b in range(2):
        f = oracle.pair_weights(z[b].numpy(), s.numpy(), b, "cosine")
        if kind is HeadEncoder:  # a gradient of W / n at each of n places
            f = encoder.head.weight.detach().numpy().T @ f
        close(maps[b, 0], oracle.aligned_map(f, A[b].numpy()))


@pytest.mark.parametrize("normalize", ["minmax", None])
@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder, FlatEncoder])
def test_the_mean_of_a_map_is_what_all_dimensions_weigh(kind, normalize):
    """sum_k w_k abs(z_k), where all between the layer and the embedding is homogeneous of degree one."""
    encoder, x = seeded(kind), random(3, 3, 6, 6)
    if kind is HeadEncoder:
        torch.nn.init.zeros_(encoder.head.bias)
    z = encoder(x).detach()
    s = random(3, z.shape[1], seed=2)
    w = contribution_weights(channel_contributions(z, s), normalize)
    maps = FeatureActivationMap(encoder, encoder.layer, normalize=normalize).attribute(x, reference_embedding=s)
    close(maps.mean((1, 2, 3)), (w * z.abs()).sum(1))


@pytest.mark.parametrize("asked", [QUESTIONS["self"], QUESTIONS["threshold"]], ids=["self", "threshold"])
def test_every_reference_at_once_and_a_pair_answer_to_self_and_threshold(asked):
    encoder, x, references = seeded(HeadEncoder), random(3, 3, 6, 6), random(3, 3, 8, 8, seed=2)
    (z, A), (s, R) = run(encoder, x), run(encoder, references)
    head = encoder.head.weight.detach().numpy()
    fam = FeatureActivationMap(encoder, encoder.layer)
    every = fam.attribute_all(x, reference=references, **asked)
    here, there = fam.attribute_pair(x, references, **asked)
    for b in range(3):
        for k in range(3):
            f = oracle.pair_weights(z[b].numpy(), s.numpy(), k, "cosine", **asked)
            close(every[b, k], oracle.aligned_map(head.T @ f, A[b].numpy()))
        close(here[b], every[b, b][None])
        back = oracle.pair_weights(s[b].numpy(), z.numpy(), b, "cosine", **asked)
        close(there[b, 0], oracle.aligned_map(head.T @ back, R[b].numpy()))


def test_self_leaves_nothing_of_an_image_with_itself_and_a_threshold_of_its_score_is_self():
    encoder, x, s = seeded(HeadEncoder), random(2, 3, 6, 6), random(1, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    close(fam.attribute(x, reference=x, contrast="self"), torch.zeros(2, 1, 3, 3).double())
    for b in range(2):
        score = torch.cosine_similarity(encoder(x[b : b + 1]), s).item()
        close(
            fam.attribute(x[b : b + 1], reference_embedding=s, threshold=score),
            fam.attribute(x[b : b + 1], reference_embedding=s, contrast="self"),
        )


@pytest.mark.parametrize(
    ("options", "asked", "error", "match"),
    [
        ({"similarity": "euclidean"}, {"contrast": "self"}, ValueError, "self.*euclidean"),
        ({"similarity": "euclidean"}, {"threshold": -1.0}, ValueError, "`threshold`.*euclidean"),
        ({"similarity": manhattan}, {"contrast": "self"}, ValueError, "self.*0"),
        ({"similarity": manhattan}, {"threshold": -1.0}, ValueError, "`threshold`.*0"),
        ({}, {"threshold": 0.5, "contrast": "self"}, ValueError, "`contrast` or `threshold`.*both"),
        ({}, {"threshold": "0.5"}, TypeError, "`threshold`.*'0.5'"),
        ({}, {"threshold": True}, TypeError, "`threshold`.*True"),
        ({}, {"threshold": float("nan")}, ValueError, "`threshold`.*nan"),
    ],
)
@pytest.mark.parametrize("call", ["attribute", "attribute_all", "attribute_pair"])
def test_a_share_of_no_score_and_a_threshold_that_is_no_score_are_refused(call, options, asked, error, match):
    encoder, x = seeded(HeadEncoder), random(2, 3, 6, 6)
    fam = FeatureActivationMap(encoder, encoder.layer, **options)
    with pytest.raises(error, match=match):
        getattr(fam, call)(x, reference=x.flip(0), **asked)


@pytest.mark.parametrize("route", ["auto", "aligned", "jacobian"])
def test_a_layer_without_spatial_dimensions_gives_one_number_per_input(route):
    encoder, x = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh())), random(3, 5)
    s = random(1, 4, seed=2)
    maps = FeatureActivationMap(encoder, encoder[1], channel_weights=route).attribute(x, reference_embedding=s)
    z = encoder(x).detach()
    assert (z < 0).any()
    close(maps, (contribution_weights(channel_contributions(z, s)) * z.abs()).sum(1, keepdim=True))


# The two routes


@pytest.mark.parametrize("contrast", [None, 0])
def test_both_routes_agree_where_the_embedding_is_the_spatial_mean(contrast):
    encoder, x, s = seeded(PooledEncoder), random(4, 3, 6, 6), random(3, 6, seed=2)
    maps = [f.attribute(x, [1, 2, 1, 2], reference_embedding=s, contrast=contrast) for f in both(encoder)]
    close(*maps)
    assert (maps[0].abs().amax((1, 2, 3)) > 0).all()


def chosen(encoder, x, s, **options):
    """The route that auto takes, told from the two maps, which differ."""
    aligned, jacobian = (f.attribute(x, reference_embedding=s, **options) for f in both(encoder))
    auto = FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=s, **options)
    assert not torch.allclose(aligned, jacobian, rtol=1e-6)
    if torch.allclose(auto, aligned, rtol=1e-9):
        return "aligned"
    return "jacobian" if torch.allclose(auto, jacobian, rtol=1e-9) else "neither"


@pytest.mark.parametrize(
    "modify", [nn.functional.normalize, lambda z: 1e-3 * z, lambda z: 9 * z, lambda z: z * z.norm(dim=1, keepdim=True)]
)
def test_an_embedding_that_is_a_positive_multiple_of_the_mean_is_aligned(modify):
    encoder = Modified(seeded(PooledEncoder), modify)
    assert chosen(encoder, random(3, 3, 6, 6), random(1, 6, seed=2)) == "aligned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_normalised_embedding_is_aligned_in_every_dtype(dtype):
    encoder = Modified(seeded(PooledEncoder), nn.functional.normalize).to(dtype)
    x, s = random(8, 3, 12, 12, dtype=dtype), random(1, 6, seed=2, dtype=dtype)
    aligned, jacobian = (f.attribute(x, reference_embedding=s) for f in both(encoder))
    auto = FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=s)
    assert auto.dtype == dtype
    assert torch.equal(auto, aligned)
    assert not torch.allclose(aligned, jacobian, rtol=0.1)


@pytest.mark.parametrize(
    "modify",
    [
        pytest.param(lambda z: -z, id="sign flipped"),
        pytest.param(lambda z: z.roll(1, 1), id="channels in another order"),
        pytest.param(lambda z: z.square(), id="not linear"),
        pytest.param(lambda z: 2 * z + 0.01, id="shifted"),
        pytest.param(lambda z: z * torch.tensor([1.01, 1, 1, 1, 1, 1]), id="one channel scaled"),
    ],
)
def test_an_embedding_that_is_another_function_of_the_mean_is_not_aligned(modify):
    encoder = Modified(seeded(PooledEncoder), modify)
    assert chosen(encoder, random(3, 3, 6, 6), random(1, 6, seed=2)) == "jacobian"


def test_a_head_with_as_many_dimensions_as_channels_is_not_aligned():
    encoder = seeded(lambda: HeadEncoder(embedding=6))
    assert chosen(encoder, random(3, 3, 6, 6), random(1, 6, seed=2)) == "jacobian"


def test_power_pooling_is_not_aligned():
    assert chosen(seeded(PowerPooledEncoder), random(3, 3, 6, 6), random(1, 6, seed=2)) == "jacobian"


def test_auto_chooses_for_each_call_and_aligned_must_hold_for_every_input():
    def flip_dark(z):
        return torch.where(dark[: len(z), None], -z, z)

    encoder, x, s = Modified(seeded(PooledEncoder), flip_dark), random(3, 3, 6, 6), random(1, 6, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    dark = torch.tensor([False, False, True])
    aligned, jacobian = (f.attribute(x, reference_embedding=s) for f in both(encoder))
    close(aligned[:2], jacobian[:2])  # where the embedding is the mean, the routes agree
    assert not torch.allclose(aligned[2], jacobian[2])
    close(fam.attribute(x, reference_embedding=s), jacobian)
    # A positive multiple tells the routes apart: aligned alone, not aligned beside a flipped input.
    encoder.modify = lambda z: 3 * flip_dark(z)
    aligned, jacobian = (f.attribute(x, reference_embedding=s) for f in both(encoder))
    close(jacobian[:2], 3 * aligned[:2])
    close(fam.attribute(x, reference_embedding=s), jacobian)
    close(fam.attribute(x[:2], reference_embedding=s), aligned[:2])
    close(fam.attribute(x, reference_embedding=s), jacobian)


def test_a_zero_embedding_is_set_aside_and_the_others_stay_aligned():
    def normalise_unless_dark(z):
        return nn.functional.normalize(z) * bright[: len(z), None]

    encoder, x, s = Modified(seeded(PooledEncoder), normalise_unless_dark), random(3, 3, 6, 6), random(1, 6, seed=2)
    bright = torch.tensor([1.0, 1.0, 0.0])
    aligned, jacobian = (f.attribute(x[:2], reference_embedding=s) for f in both(encoder))
    assert not torch.allclose(aligned, jacobian, rtol=1e-3)
    with pytest.warns(UserWarning, match=r"(?i)zero.*2"):
        maps = FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=s)
    close(maps[:2], aligned)
    assert (maps[2] == 0).all()


def normalise(z):
    return nn.functional.normalize(z)


CALLS = {
    "attribute": lambda fam, x, s: fam.attribute(x, reference_embedding=s),
    "self": lambda fam, x, s: fam.attribute(x, reference_embedding=s, contrast="self"),
    "attribute_all": lambda fam, x, s: fam.attribute_all(x, reference_embedding=s),
    "attribute_pair": lambda fam, x, s: fam.attribute_pair(x, x.flip(0))[0],
}


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("call", CALLS)
def test_a_normalisation_behind_a_head_is_told_as_it_takes_the_embedding_from_the_places(call, similarity):
    """v_i is the projection of what place i adds to z on what is orthogonal to z: summed up, nothing is left."""
    encoder, x, s = Modified(seeded(HeadEncoder), normalise), random(3, 3, 8, 8), random(1, 4, seed=2)
    encoder.encoder.head.bias.data.zero_()
    with pytest.warns(UserWarning, match=r"^The encoder ends in a normalisation\. .*encoder\.layer.* Leave") as caught:
        CALLS[call](FeatureActivationMap(encoder, encoder.layer, similarity=similarity), x, s)
    assert len(caught) == 1
    jacobian = SimilarityDecomposition(encoder, encoder.layer, dimension_weights=lambda z, s: z)
    with pytest.warns(UserWarning, match="do not add up"):
        sums = jacobian.attribute(x, reference_embedding=s).sum((1, 2, 3))
    close(sums, torch.zeros(3).double(), atol=1e-12)


@pytest.mark.filterwarnings("ignore:Embeddings are zero or not finite")
@pytest.mark.parametrize(
    ("dtype", "bad"), [(torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 0), (torch.float32, 1)]
)
def test_a_normalisation_is_told_in_any_precision_and_beside_images_that_cannot_be_explained(dtype, bad):
    encoder = Modified(seeded(HeadEncoder), normalise).to(dtype)
    x, s = random(40, 3, 8, 8, dtype=dtype), random(1, 4, seed=2, dtype=dtype)
    x[:bad] = torch.nan
    with pytest.warns(UserWarning, match="ends in a normalisation"):
        FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=s)


def test_of_several_layers_only_those_are_told_whose_map_takes_the_gradient_of_the_normalisation():
    encoder, x = Modified(seeded(PooledEncoder), normalise), random(3, 3, 8, 8)
    fam = FeatureActivationMap(encoder, [encoder.layer, encoder.encoder.early])
    with pytest.warns(UserWarning, match=r"ends in a normalisation.*'encoder\.early'") as caught:
        fam.attribute(x, reference=x.flip(0))
    assert len(caught) == 1


QUIET = {
    "without the normalisation": (HeadEncoder, {}),
    "a mean that is normalised": (lambda: Modified(PooledEncoder(), normalise), {}),
    "one of the lengths is another": (
        lambda: Modified(HeadEncoder(), lambda z: normalise(z) * (1 + 1e-4 * torch.arange(len(z)).double()[:, None])),
        {},
    ),
    "distances": (lambda: Modified(HeadEncoder(), normalise), {"similarity": "euclidean"}),
    "a path": (lambda: Modified(HeadEncoder(), normalise), {"n_steps": 2}),
}


@pytest.mark.parametrize("case", QUIET)
def test_of_what_a_normalisation_leaves_right_nothing_is_told(case):
    build, options = QUIET[case]
    encoder, x = seeded(build), random(3, 3, 8, 8)
    with silent():
        FeatureActivationMap(encoder, encoder.layer, **options).attribute(x, reference=x.flip(0))


# Against Captum


def jacobian_cases():
    return {
        "projection head": (seeded(HeadEncoder), lambda e: e.layer),
        "earlier layer of a pooled encoder": (seeded(PooledEncoder), lambda e: e.early),
        "earlier layer of a head encoder": (seeded(HeadEncoder), lambda e: e.conv1),
        "flattening encoder": (seeded(FlatEncoder), lambda e: e.layer),
        "earlier layer of a flattening encoder": (seeded(FlatEncoder), lambda e: e.early),
        "power pooling": (seeded(PowerPooledEncoder), lambda e: e.layer),
        "normalised head": (Modified(seeded(HeadEncoder), nn.functional.normalize), lambda e: e.layer),
        "residual block": (seeded(ResidualEncoder), lambda e: e.block),
        "inside a residual block": (seeded(ResidualEncoder), lambda e: e.block.body[1]),
        "stem before a residual block": (seeded(ResidualEncoder), lambda e: e.stem),
        "1D head": (seeded(lambda: HeadEncoder(1)), lambda e: e.layer),
        "3D head": (seeded(lambda: HeadEncoder(3)), lambda e: e.layer),
    }


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("case", jacobian_cases())
@pytest.mark.filterwarnings("ignore:The encoder ends in a normalisation")
def test_the_jacobian_map_is_captums_gradient_times_activation_of_the_weighted_embedding(case, similarity):
    encoder, layer_of = jacobian_cases()[case]
    layer, x = layer_of(encoder), random(3, 3, *[6] * int(case[0] if case[1] == "D" else 2))
    z = encoder(x).detach()
    s = random(3, z.shape[1], seed=2)
    f = fam_weights(z, s, similarity)
    fam = FeatureActivationMap(encoder, layer, similarity=similarity, channel_weights="jacobian")
    close(fam.attribute(x, reference_embedding=s), map_of_held_target(encoder, layer, x, f))
    terms = fam.attribute(x, reference_embedding=s, attr_dim_summation=False)
    close(terms, terms_of_held_target(encoder, layer, x, f))


@pytest.mark.parametrize(
    ("kind", "layer_of"),
    [
        pytest.param(ResidualEncoder, lambda e: e.block, id="a block whose input takes two paths"),
        pytest.param(ResidualEncoder, lambda e: e.block.body[2], id="a later layer of one of the paths"),
        pytest.param(HeadEncoder, lambda e: e.conv2, id="a convolution"),
        pytest.param(FlatEncoder, lambda e: e.conv1, id="the first layer, which takes the image"),
    ],
)
def test_the_map_of_a_layers_input_is_captums_of_that_input(kind, layer_of):
    encoder, x = seeded(kind), random(2, 3, 6, 6)
    layer, s = layer_of(encoder), random(2, encoder(x).shape[1], seed=2)
    kept = []
    handle = layer.register_forward_pre_hook(lambda m, args: kept.append(args[0].detach()))
    f = fam_weights(encoder(x), s)
    handle.remove()
    fam = FeatureActivationMap(encoder, layer, channel_weights="jacobian")
    maps = fam.attribute(x, reference_embedding=s, attribute_to_layer_input=True)
    assert not x.requires_grad
    close(maps, map_of_held_target(encoder, layer, x, f, attribute_to_layer_input=True))
    assert maps.abs().sum() > 0
    assert maps.shape[2:] == kept[0].shape[2:]


@pytest.mark.parametrize("down_first", [False, True])
def test_the_map_of_a_layers_input_counts_the_path_through_the_layer_alone(down_first):
    encoder, x, s = seeded(lambda: BranchedEncoder(down_first)), random(2, 3, 6, 6), random(2, 6, seed=2)
    f = fam_weights(encoder(x), s)
    fam = FeatureActivationMap(encoder, encoder.body, channel_weights="jacobian")
    maps = fam.attribute(x, reference_embedding=s, attribute_to_layer_input=True)
    encoder.body = nn.Sequential(nn.LeakyReLU(1.0), encoder.body)  # an identity, of which Captum sees that path
    close(maps, map_of_held_target(encoder, encoder.body[0], x, f))


def test_the_input_of_the_last_relu_is_not_what_the_mean_is_taken_of():
    encoder, x, s = seeded(PooledEncoder), random(2, 3, 6, 6), random(1, 6, seed=2)
    z, before = run(encoder, x, layer=encoder.conv2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    maps = fam.attribute(x, reference_embedding=s, attribute_to_layer_input=True)
    f = fam_weights(z, s)
    passed = before * (before > 0)  # the ReLU passes the gradient of the mean at the places where it is open
    assert (before < 0).any()
    close(maps, (f[..., None, None] * passed).sum(1, keepdim=True))


@pytest.mark.parametrize("modify", [None, nn.functional.normalize])
def test_ablating_channel_k_of_an_aligned_encoder_lowers_the_dot_score_by_c_k(modify):
    pooled, x, s = seeded(PooledEncoder), random(2, 3, 6, 6), random(4, 6, seed=2)
    encoder = pooled if modify is None else Modified(pooled, lambda z: z / lengths)
    lengths = pooled(x).norm(dim=1, keepdim=True)  # held, as the weights are
    score = SimilarityScore(encoder, s, "dot")
    drop = LayerFeatureAblation(score, encoder.layer).attribute(
        x, layer_baselines=0, target=3, layer_mask=torch.arange(6)[None, :, None, None]
    )
    c = channel_contributions(encoder(x).detach(), s[3], "dot")
    close(drop, c[..., None, None].expand(2, 6, 3, 3))
    signed = FeatureActivationMap(score, encoder.layer, normalize=None)
    _, A = run(encoder, x)
    close(signed.attribute(x, 3), (drop * A).sum(1, keepdim=True))


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_an_image_explained_by_itself_has_a_full_map_where_the_gradient_of_the_cosine_has_none(kind):
    encoder, x = seeded(kind), random(1, 3, 8, 8)
    z, A = run(encoder, x)
    gradient = LayerGradCam(SimilarityScore(encoder, z), encoder.layer).attribute(x, target=0)
    assert gradient.abs().max() < 1e-12
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(x, reference=x)
    assert (maps[0, 0][A[0].amax(0) > 0].abs() > 1e-6).all()
    f = oracle.pair_weights(z[0].numpy(), z.numpy(), 0, "cosine")
    assert np.abs(f).max() == 1
    head = encoder.head.weight.detach().numpy() if kind is HeadEncoder else np.eye(6)
    close(maps[0, 0], oracle.aligned_map(head.T @ f, A[0].numpy()))


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder, FlatEncoder])
def test_fam_stands_beside_grad_cam_on_the_same_score_in_the_same_call(kind):
    encoder, x = seeded(kind), random(4, 3, 6, 6)
    support, labels = random(6, 3, 6, 6, seed=2), [0, 0, 1, 1, 2, 2]
    score = SimilarityScore(encoder, prototypes(encoder(support), labels), "euclidean")
    for target in (2, [0, 1, 2, 0], torch.tensor([1, 1, 0, 2])):
        grad_cam, fam = (
            Method(score, encoder.layer).attribute(x, target=target) for Method in (LayerGradCam, FeatureActivationMap)
        )
        assert fam.shape == grad_cam.shape == (4, 1, 3, 3)
        assert fam.dtype == grad_cam.dtype
        assert not fam.requires_grad


def test_the_arguments_of_attribute_begin_with_those_of_grad_cam():
    ours = list(inspect.signature(FeatureActivationMap.attribute).parameters.values())
    theirs = list(inspect.signature(LayerGradCam.attribute).parameters.values())[:7]
    assert [(p.name, p.default, p.kind) for p in ours[:7]] == [(p.name, p.default, p.kind) for p in theirs]
    own = ["reference", "reference_embedding", "contrast", "threshold", "internal_batch_size"]
    assert [p.name for p in ours[7:]] == [*own, "return_convergence_delta"]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[7:])


def test_the_similarity_and_selector_of_a_score_are_used_unless_others_are_given():
    encoder = Modified(seeded(PooledEncoder), lambda z: {"z": z, "shifted": z + 1})
    x, s = random(2, 3, 6, 6), random(2, 6, seed=2)
    score = SimilarityScore(encoder, s, "dot", output_selector=lambda output: output["z"])
    plain = FeatureActivationMap(encoder.encoder, encoder.layer, similarity="dot")
    expected = plain.attribute(x, reference_embedding=s)
    assert torch.equal(FeatureActivationMap(score, encoder.layer).attribute(x), expected)
    other = FeatureActivationMap(
        score, encoder.layer, similarity="euclidean", output_selector=lambda output: output["shifted"]
    )
    moved = FeatureActivationMap(Modified(encoder.encoder, lambda z: z + 1), encoder.layer, similarity="euclidean")
    assert torch.equal(other.attribute(x), moved.attribute(x, reference_embedding=s))
    assert not torch.allclose(other.attribute(x), expected)


# Forms of the result


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder, FlatEncoder])
def test_the_terms_of_the_channels_add_up_to_the_map(kind):
    encoder, x = seeded(kind), random(2, 3, 6, 6)
    _, A = run(encoder, x)
    s = random(3, encoder(x).shape[1], seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    terms = fam.attribute(x, 1, attr_dim_summation=False, reference_embedding=s)
    assert terms.shape == A.shape
    close(terms.sum(1, keepdim=True), fam.attribute(x, 1, reference_embedding=s))
    close(terms, terms_of_held_target(encoder, encoder.layer, x, fam_weights(encoder(x), s[1:2])))


def test_relu_drops_the_negative_part_of_the_summed_map():
    encoder, x, s = seeded(HeadEncoder), random(3, 3, 6, 6), random(3, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer, normalize=None)
    signed = fam.attribute(x, reference_embedding=s)
    assert signed.min() < 0 < signed.max()
    assert torch.equal(fam.attribute(x, reference_embedding=s, relu_attributions=True), signed.relu())
    assert torch.equal(
        fam.attribute_all(x, reference_embedding=s, relu_attributions=True),
        fam.attribute_all(x, reference_embedding=s).relu(),
    )


def test_a_layer_that_gives_a_tuple_gets_a_tuple_of_maps():
    encoder, a, b = seeded(TwoInputEncoder), random(2, 3, 8, 8), random(2, 1, 9, 9, seed=2)
    z, A = run(encoder, a, b)
    s = random(1, 3, seed=3)
    maps = FeatureActivationMap(encoder, encoder.layer).attribute((a, b), reference_embedding=s)
    assert isinstance(maps, tuple)
    assert [m.shape for m in maps] == [(2, 1, 6, 6), (2, 1, 4, 4)]
    alpha = fam_weights(z, s) @ encoder.head.weight.detach()
    for m, activation, weight in zip(maps, A, alpha.split([4, 5], 1), strict=True):
        close(m, (weight[..., None, None] * activation).sum(1, keepdim=True))
    terms = FeatureActivationMap(encoder, encoder.layer).attribute(
        (a, b), reference_embedding=s, attr_dim_summation=False
    )
    assert isinstance(terms, tuple)
    close(tuple(t.sum(1, keepdim=True) for t in terms), maps)


@pytest.mark.parametrize("layer_input", [False, True])
def test_the_maps_of_a_layers_tuple_are_captums(layer_input):
    encoder, inputs, s = seeded(TwoInputEncoder), (random(2, 3, 8, 8), random(2, 1, 9, 9, seed=2)), random(1, 3, seed=3)
    f, options = fam_weights(encoder(*inputs), s), {"attribute_to_layer_input": layer_input}
    maps = FeatureActivationMap(encoder, encoder.layer).attribute(inputs, reference_embedding=s, **options)
    close(maps, map_of_held_target(encoder, encoder.layer, inputs, f, **options))


def assert_equal_to_single_calls(encoder, layers, x, s, **options):
    fam = FeatureActivationMap(encoder, layers, **options)
    singles = [FeatureActivationMap(encoder, layer, **options) for layer in layers]
    maps = fam.attribute(x, 1, reference_embedding=s)
    assert isinstance(maps, list)
    assert len(maps) == len(layers)
    for listed, single in zip(maps, singles, strict=True):
        close(listed, single.attribute(x, 1, reference_embedding=s))
    taken = fam.attribute(x, 1, attribute_to_layer_input=True, reference_embedding=s)
    for listed, single in zip(taken, singles, strict=True):
        close(listed, single.attribute(x, 1, attribute_to_layer_input=True, reference_embedding=s))
    for listed, single in zip(fam.attribute_all(x, reference_embedding=s), singles, strict=True):
        close(listed, single.attribute_all(x, reference_embedding=s))


@pytest.mark.parametrize("route", ["auto", "jacobian"])
@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_a_list_of_layers_gives_a_list_of_their_single_maps_in_any_order(kind, route):
    encoder, x = seeded(kind), random(2, 3, 6, 6)
    s = random(3, encoder(x).shape[1], seed=2)
    for layers in ([encoder.early, encoder.layer], [encoder.layer, encoder.conv1, encoder.early], [encoder.layer]):
        assert_equal_to_single_calls(encoder, layers, x, s, channel_weights=route)


def test_layers_inside_one_another_give_their_single_maps():
    encoder, x, s = seeded(ResidualEncoder), random(2, 3, 6, 6), random(3, 6, seed=2)
    block = encoder.block
    for layers in ([block, block.body[1]], [block.body, encoder.stem, block], [block.body, block.body[2], block]):
        assert_equal_to_single_calls(encoder, layers, x, s, channel_weights="jacobian")


def test_a_layer_listed_twice_gives_two_maps_without_a_word():
    encoder, x, s = seeded(HeadEncoder), random(2, 3, 6, 6), random(1, 4, seed=2)
    with silent():
        maps = FeatureActivationMap(encoder, [encoder.layer, encoder.layer]).attribute(x, reference_embedding=s)
    close(maps, [FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=s)] * 2)


@pytest.mark.filterwarnings("ignore:The encoder ends in a normalisation")
def test_a_list_of_layers_takes_each_layers_own_route():
    encoder, x, s = Modified(seeded(PooledEncoder), nn.functional.normalize), random(2, 3, 6, 6), random(2, 6, seed=2)
    last, early = FeatureActivationMap(encoder, [encoder.layer, encoder.encoder.early]).attribute(
        x, reference_embedding=s
    )
    close(last, both(encoder)[0].attribute(x, reference_embedding=s))
    jacobian = FeatureActivationMap(encoder, encoder.encoder.early, channel_weights="jacobian")
    close(early, jacobian.attribute(x, reference_embedding=s))


# Every reference at once, and both sides


@pytest.mark.parametrize(("similarity", "asked"), [p for p in ASKED if "another" not in p.id])
@pytest.mark.parametrize("normalize", ["minmax", None])
@pytest.mark.parametrize("K", [3, 11])  # fewer and more references than dimensions of a head, or places of any
@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder, FlatEncoder])
def test_every_reference_at_once_gives_the_maps_of_one_call_per_target(kind, K, normalize, similarity, asked):
    encoder, x = seeded(kind), random(2, 3, 6, 6)
    s = random(K, encoder(x).shape[1], seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer, similarity=SIMILARITIES[similarity], normalize=normalize)
    maps = fam.attribute_all(x, reference_embedding=s, **asked)
    assert maps.shape == (2, K, 3, 3)
    for k in range(K):
        close(maps[:, k : k + 1], fam.attribute(x, k, reference_embedding=s, **asked))


@pytest.mark.parametrize(
    ("embedding", "K"),
    [
        pytest.param(4, 3, id="a gradient for each reference"),
        pytest.param(4, 12, id="a gradient for each dimension"),
        pytest.param(20, 12, id="a derivative for each place"),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"contrast": "rest"}, {"contrast": "self"}], ids=["plain", "rest", "self"])
def test_whichever_way_is_cheapest_the_maps_are_those_of_the_reference_implementation(embedding, K, asked):
    """The head is no linear one, so its derivative is another at each input."""
    encoder, x = seeded(lambda: HeadEncoder(embedding=embedding)), random(2, 3, 6, 6)
    squared = Modified(encoder, lambda z: z + z.square() / 2)
    head, bias = encoder.head.weight.detach().numpy(), encoder.head.bias.detach().numpy()
    z, A = run(squared, x)
    s = random(K, embedding, seed=2)
    maps = FeatureActivationMap(squared, squared.layer).attribute_all(x, reference_embedding=s, **asked)
    for b in range(2):
        mean = head @ A[b].numpy().mean((1, 2)) + bias
        jacobian = np.tile(((1 + mean)[:, None] * head)[:, :, None, None] / 9, (1, 1, 3, 3))
        for k in range(K):
            f = oracle.pair_weights(z[b].numpy(), s.numpy(), k, "cosine", **asked)
            close(maps[b, k], oracle.jacobian_map(f, jacobian, A[b].numpy()))


class Doubled(torch.autograd.Function):
    """Twice its input, with a backward pass that autograd cannot look into, as that of a kernel of one's own."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(2 * gradient.detach().numpy())


@pytest.mark.parametrize("K", [3, 12])
def test_a_backward_pass_without_a_derivative_gives_the_same_maps(K):
    encoder, x, s = seeded(lambda: HeadEncoder(embedding=20)), random(2, 3, 6, 6), random(K, 20, seed=2)
    opaque, plain = Modified(encoder, lambda z: z + Doubled.apply(z)), Modified(encoder, lambda z: z + 2 * z)
    one, other = (FeatureActivationMap(e, e.layer).attribute_all(x, reference_embedding=s) for e in (opaque, plain))
    close(one, other)


def test_every_reference_at_once_from_inputs_and_from_a_score():
    encoder, x, references = seeded(HeadEncoder), random(2, 3, 6, 6), random(5, 3, 6, 6, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    maps = fam.attribute_all(x, reference=references)
    assert maps.shape == (2, 5, 3, 3)
    close(maps, fam.attribute_all(x, reference_embedding=encoder(references)))
    close(maps, FeatureActivationMap(SimilarityScore(encoder, encoder(references)), encoder.layer).attribute_all(x))


def test_every_reference_at_once_on_a_layer_that_gives_a_tuple():
    encoder, a, b = seeded(TwoInputEncoder), random(2, 3, 8, 8), random(2, 1, 9, 9, seed=2)
    fam, s = FeatureActivationMap(encoder, encoder.layer), random(4, 3, seed=3)
    maps = fam.attribute_all((a, b), reference_embedding=s)
    assert [m.shape for m in maps] == [(2, 4, 6, 6), (2, 4, 4, 4)]
    for k in range(4):
        close(tuple(m[:, k : k + 1] for m in maps), fam.attribute((a, b), k, reference_embedding=s))


@pytest.mark.parametrize("size", [6, 9])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_a_pair_gives_the_maps_of_two_calls(kind, K, size):
    encoder, x, references = seeded(kind), random(3, 3, 6, 6), random(K, 3, size, size, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer, similarity="euclidean")
    here, there = fam.attribute_pair(x, references)
    close(here, fam.attribute(x, reference=references))
    expected = fam.attribute(references.expand(3, -1, -1, -1), reference=x)
    assert there.shape == expected.shape == (3, 1, (size + 1) // 2, (size + 1) // 2)
    close(there, expected)


def test_a_pair_of_several_inputs_and_layers_gives_the_maps_of_two_calls():
    encoder = seeded(TwoInputEncoder)
    one, two = ((random(2, 3, n, n, seed=n), random(2, 1, n, n, seed=-n)) for n in (8, 11))
    fam = FeatureActivationMap(encoder, [encoder.layer, encoder.layer.two])
    for maps, inputs, reference in zip(fam.attribute_pair(one, two), (one, two), (two, one), strict=True):
        expected = fam.attribute(inputs, reference=reference)
        assert isinstance(maps, list)
        assert isinstance(maps[0], tuple)
        close(maps[0], expected[0])
        close(maps[1], expected[1])


@pytest.mark.parametrize("K", [0, 1])
@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_no_inputs_have_no_pairs(kind, K):
    encoder = seeded(kind)
    here, there = FeatureActivationMap(encoder, encoder.layer).attribute_pair(random(0, 3, 6, 6), random(K, 3, 8, 8))
    assert here.shape == (0, 1, 3, 3)
    assert there.shape == (0, 1, 4, 4)


def test_a_pair_of_unequal_numbers_is_refused():
    encoder = seeded(PooledEncoder)
    with pytest.raises(ValueError, match=r"`reference`.*3.*2"):
        FeatureActivationMap(encoder, encoder.layer).attribute_pair(random(3, 3, 6, 6), random(2, 3, 6, 6))


# Which reference


def test_a_shared_reference_equals_one_call_per_input():
    encoder, x, s = seeded(HeadEncoder), random(3, 3, 6, 6), random(1, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    maps = fam.attribute(x, reference_embedding=s)
    for b in range(3):
        close(maps[b : b + 1], fam.attribute(x[b : b + 1], reference_embedding=s))


def test_as_many_references_as_inputs_are_paired():
    encoder, x, s = seeded(HeadEncoder), random(3, 3, 6, 6), random(3, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    maps = fam.attribute(x, reference_embedding=s)
    for b in range(3):
        close(maps[b : b + 1], fam.attribute(x[b : b + 1], reference_embedding=s[b : b + 1]))


@pytest.mark.parametrize(
    "target", [[2, 0, 2], [(2,), (0,), (2,)], torch.tensor([2, 0, 2]), torch.tensor([2, 0, 2], dtype=torch.int32)]
)
def test_each_input_takes_the_reference_that_its_target_picks(target):
    encoder, x, s = seeded(HeadEncoder), random(3, 3, 6, 6), random(5, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    maps = fam.attribute(x, target, reference_embedding=s)
    close(maps, fam.attribute(x, reference_embedding=s[[2, 0, 2]]))


@pytest.mark.parametrize("target", [1, (1,), [1, 1, 1], torch.tensor(1), torch.tensor([1]), np.int64(1)])
def test_one_target_serves_the_whole_batch(target):
    encoder, x, s = seeded(HeadEncoder), random(3, 3, 6, 6), random(3, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    close(fam.attribute(x, target, reference_embedding=s), fam.attribute(x, reference_embedding=s[1:2]))


def test_a_reference_is_embedded_by_the_same_encoder():
    encoder, x, reference = seeded(HeadEncoder), random(2, 3, 6, 6), random(2, 3, 11, 7, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    close(fam.attribute(x, reference=reference), fam.attribute(x, reference_embedding=encoder(reference)))


def test_a_contrast_number_may_differ_for_each_input():
    encoder, x, s = seeded(HeadEncoder), random(3, 3, 6, 6), random(4, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    own, other = [0, 1, 2], [3, 2, 0]
    maps = fam.attribute(x, own, reference_embedding=s, contrast=other)
    close(fam.attribute(x, own, reference_embedding=s, contrast=torch.tensor(other)), maps)
    for b in range(3):
        one = fam.attribute(x[b : b + 1], own[b], reference_embedding=s, contrast=other[b])
        close(maps[b : b + 1], one)


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_contrast_with_itself_is_zero_and_turns_its_sign_when_the_references_are_swapped(kind):
    encoder, x = seeded(kind), random(2, 3, 6, 6)
    s = random(3, encoder(x).shape[1], seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    assert (fam.attribute(x, 1, reference_embedding=s, contrast=1) == 0).all()
    one, two = (fam.attribute(x, a, reference_embedding=s, contrast=b) for a, b in ((0, 2), (2, 0)))
    close(one, -two)
    assert one.abs().max() > 0


def test_the_rest_of_two_references_is_the_other_one():
    encoder, x, s = seeded(HeadEncoder), random(2, 3, 6, 6), random(2, 4, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer, similarity="euclidean")
    close(
        fam.attribute(x, 0, reference_embedding=s, contrast="rest"),
        fam.attribute(x, 0, reference_embedding=s, contrast=1),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "`reference`.*`reference_embedding`.*none"),
        (
            {"reference": torch.ones(1, 3, 6, 6).double(), "reference_embedding": random(1, 4)},
            ValueError,
            "(?i)exactly one.*but got .?reference.? and .?reference_embedding",
        ),
        ({"reference_embedding": random(2, 4)}, ValueError, "`target`.*2 references.*3 inputs"),
        ({"reference_embedding": random(4, 4)}, ValueError, "`target`.*4 references.*3 inputs"),
        ({"reference_embedding": random(2, 4), "target": 2}, ValueError, "`target`.*2"),
        ({"reference_embedding": random(2, 4), "target": [0, 1]}, ValueError, "`target`.*3"),
        ({"reference_embedding": random(2, 4), "target": 0.5}, TypeError, "`target`.*0.5"),
        ({"reference_embedding": random(2, 4), "target": "cat"}, TypeError, "`target`.*'cat'"),
        ({"reference_embedding": random(2, 4), "target": 0, "contrast": 2}, ValueError, "`contrast`.*2"),
        ({"reference_embedding": random(2, 4), "target": 0, "contrast": "all"}, ValueError, "`contrast`.*'all'"),
        ({"reference_embedding": random(1, 4), "contrast": "rest"}, ValueError, "rest.*two references"),
        ({"reference_embedding": random(1, 5)}, ValueError, "5.*4"),
        ({"reference_embedding": random(4)}, ValueError, r"`reference_embedding`.*\(4,\)"),
        ({"reference": random(2, 3, 6, 6)}, ValueError, "`target`.*2 references.*3 inputs"),
        ({"reference": (random(1, 3, 6, 6), random(1, 3, 6, 6))}, ValueError, "`reference`.*1.*2"),
        ({"reference": "photo.png"}, TypeError, "`reference`.*photo.png"),
    ],
)
def test_references_that_cannot_be_told_are_refused(arguments, error, match):
    encoder = seeded(HeadEncoder)
    with pytest.raises(error, match=match):
        FeatureActivationMap(encoder, encoder.layer).attribute(random(3, 3, 6, 6), **arguments)


@pytest.mark.parametrize("name", ["reference", "reference_embedding"])
def test_a_score_has_its_references_already(name):
    encoder, x = seeded(HeadEncoder), random(1, 3, 6, 6)
    fam = FeatureActivationMap(SimilarityScore(encoder, random(1, 4)), encoder.layer)
    given = {name: x if name == "reference" else random(1, 4)}
    for method in (fam.attribute, fam.attribute_all):
        with pytest.raises(ValueError, match=f"exactly one.*`{name}`.*SimilarityScore"):
            method(x, **given)


def test_every_reference_at_once_is_not_contrasted_with_the_one_of_a_number():
    encoder = seeded(HeadEncoder)
    with pytest.raises(ValueError, match=r"`contrast`.*rest"):
        FeatureActivationMap(encoder, encoder.layer).attribute_all(
            random(1, 3, 6, 6), reference_embedding=random(2, 4), contrast=1
        )


# Layouts, outputs and inputs


def patches(activation):
    """The tokens of the 3 x 3 patches, without CLS, as (B, C, 3, 3)."""
    return activation[:, 1:].mT.unflatten(2, (3, 3))


def test_tokens_with_a_cls_token_become_a_map_of_the_patches():
    encoder, x = seeded(TokenEncoder), random(2, 3, 12, 12)
    kept = []
    handle = encoder.layer.register_forward_hook(lambda m, args, out: kept.append(out))
    z, s = encoder(x), random(1, 6, seed=2)
    handle.remove()
    (gradient,) = torch.autograd.grad((fam_weights(z, s) * z).sum(), kept)
    expected = 9 * (kept[0].detach() * gradient)[:, 1:].sum(2).reshape(2, 1, 3, 3)  # CLS is no place
    fam = FeatureActivationMap(encoder, encoder.layer, reshape_transform=patches)
    close(fam.attribute(x, reference_embedding=s), expected)
    close(fam.attribute_all(x, reference_embedding=s), expected)
    assert fam.attribute(x, reference_embedding=s, attr_dim_summation=False).shape == (2, 6, 3, 3)


def test_a_mean_of_tokens_is_aligned():
    encoder = seeded(TokenEncoder)
    encoder.forward = lambda x: 2 * encoder.layer(encoder.patch(x).flatten(2).mT).mean(1)
    x, s = random(2, 3, 12, 12), random(1, 6, seed=2)

    def grid(activation):
        return activation.mT.unflatten(2, (3, 3))

    aligned, auto, jacobian = (
        FeatureActivationMap(encoder, encoder.layer, channel_weights=route, reshape_transform=grid).attribute(
            x, reference_embedding=s
        )
        for route in ("aligned", "auto", "jacobian")
    )
    assert torch.equal(auto, aligned)
    close(jacobian, 2 * aligned)


class ChannelsLast(nn.Module):
    """A pooled encoder whose last map has its channels last, as in a Swin model."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.layer = encoder, nn.Identity()

    def forward(self, x):
        return self.layer(self.encoder.features(x).movedim(1, -1)).mean((1, 2))


@pytest.mark.parametrize("route", ["auto", "jacobian"])
def test_channels_last_maps_become_those_of_channels_first(route):
    encoder, x, s = seeded(PooledEncoder), random(2, 3, 6, 6), random(2, 6, seed=2)
    expected = FeatureActivationMap(encoder, encoder.layer).attribute(x, reference_embedding=s)
    last = ChannelsLast(encoder)
    fam = FeatureActivationMap(
        last, last.layer, channel_weights=route, reshape_transform=lambda activation: activation.movedim(-1, 1)
    )
    close(fam.attribute(x, reference_embedding=s), expected)


@pytest.mark.parametrize(
    ("modify", "select"),
    [
        pytest.param(lambda z: {"pooled": z, "n": 3}, lambda output: output["pooled"], id="dict"),
        pytest.param(lambda z: (None, z), lambda output: output[1], id="tuple"),
        pytest.param(lambda z: z[..., None, None], lambda output: output.flatten(1), id="unflattened"),
    ],
)
@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_an_output_selector_takes_the_embedding_out_of_any_output(kind, modify, select):
    encoder, x, reference = seeded(kind), random(2, 3, 6, 6), random(1, 3, 6, 6, seed=2)
    plain = FeatureActivationMap(encoder, encoder.layer)
    wrapped = FeatureActivationMap(Modified(encoder, modify), encoder.layer, output_selector=select)
    assert torch.equal(wrapped.attribute(x, reference=reference), plain.attribute(x, reference=reference))
    assert torch.equal(wrapped.embed(x), encoder(x))
    with pytest.raises((TypeError, ValueError), match="output_selector"):
        FeatureActivationMap(Modified(encoder, modify), encoder.layer).attribute(x, reference=reference)


@pytest.mark.parametrize("as_score", [False, True])
def test_embed_gives_the_encoders_embedding_detached(as_score):
    encoder, x = seeded(HeadEncoder), random(2, 3, 6, 6)
    fam = FeatureActivationMap(SimilarityScore(encoder, random(3, 4)) if as_score else encoder, encoder.layer)
    z = fam.embed(x.requires_grad_())
    assert torch.equal(z, encoder(x))
    assert not z.requires_grad


@pytest.mark.parametrize("arguments", [2.0, (2.0,)])
def test_additional_arguments_reach_the_inputs_and_the_reference(arguments):
    encoder, x, reference = seeded(PowerPooledEncoder), random(2, 3, 6, 6), random(2, 3, 6, 6, seed=2)
    fam = FeatureActivationMap(encoder, encoder.layer)
    squared = FeatureActivationMap(lambda x: encoder(x, 2.0), encoder.layer)
    maps = fam.attribute(x, None, arguments, reference=reference)
    close(maps, squared.attribute(x, reference=reference))
    assert not torch.allclose(maps, fam.attribute(x, reference=reference), rtol=1e-3)
    close(fam.attribute_all(x, arguments, reference=reference), squared.attribute_all(x, reference=reference))
    assert torch.equal(fam.embed(x, arguments), encoder(x, 2.0))


def test_several_inputs_take_a_reference_of_several():
    encoder = seeded(TwoInputEncoder)
    inputs, reference = ((random(2, 3, 8, 8, seed=n), random(2, 1, 9, 9, seed=n + 1)) for n in (1, 3))
    fam = FeatureActivationMap(encoder, encoder.layer)
    maps = fam.attribute(inputs, reference=reference)
    close(maps, fam.attribute(inputs, reference_embedding=encoder(*reference)))
    assert torch.equal(fam.embed(inputs), encoder(*inputs))


def test_a_warning_points_at_the_line_of_the_call():
    encoder, x, zero = seeded(HeadEncoder), random(1, 3, 6, 6), torch.zeros(1, 4).double()
    fam = FeatureActivationMap(encoder, encoder.layer)
    for method in (fam.attribute, fam.attribute_all):
        with pytest.warns(UserWarning, match="zero") as caught:
            method(x, reference_embedding=zero)
        assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


def test_maps_of_ordinary_calls_come_without_a_warning_and_detached():
    encoder, x = seeded(HeadEncoder), random(2, 3, 6, 6)
    fam = FeatureActivationMap(encoder, encoder.layer)
    with silent():
        maps = [
            fam.attribute(x, reference=x),
            fam.attribute(x.clone().requires_grad_(), 0, reference_embedding=encoder(x), contrast=1),
            fam.attribute_all(x, reference=x),
            *fam.attribute_pair(x, x),
        ]
    assert not any(m.requires_grad for m in maps)


@pytest.mark.parametrize(("similarity", "asked"), ASKED)
@pytest.mark.parametrize("normalize", ["minmax", None])
@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_a_change_of_the_signs_of_dimensions_changes_no_score_and_no_map(kind, normalize, similarity, asked):
    encoder, images, references = seeded(kind), random(2, 3, 8, 8), random(3, 3, 8, 8, seed=2)
    signs = torch.tensor([1, -1, -1, 1, -1, 1]).double()[: encoder(images).shape[1]]
    turned = Modified(encoder, lambda z: z * signs)
    options = {"similarity": SIMILARITIES[similarity], "normalize": normalize}
    one, other = (
        FeatureActivationMap(e, encoder.layer, **options).attribute(images, 0, reference=references, **asked)
        for e in (encoder, turned)
    )
    assert one.abs().max() > 1e-6
    close(other, one)


@pytest.mark.parametrize("contrast", [None, 1, "self"])
def test_a_change_of_signs_changes_no_decomposition(contrast):
    encoder = seeded(HeadEncoder)
    torch.nn.init.zeros_(encoder.head.bias)
    turned = Modified(encoder, lambda z: z * torch.tensor([1, -1, -1, 1]).double())
    images, references = random(2, 3, 8, 8), random(3, 3, 8, 8, seed=2)
    one, other = (
        SimilarityDecomposition(e, encoder.layer).attribute(images, 0, reference=references, contrast=contrast)
        for e in (encoder, turned)
    )
    close(other, one)
