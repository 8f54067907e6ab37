"""ScoreCam, against a loop over channels."""

import numpy as np
import pytest
import reference as oracle
import torch
import torch.nn.functional as F
from encoders import (
    CONV,
    HAND_A,
    Classifier,
    Function,
    HeadEncoder,
    OfActivations,
    PooledEncoder,
    Shifted,
    TokenEncoder,
    TwoInputEncoder,
    random,
    seeded,
)
from helpers import arrays, close, question, silent, similarity_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_model_untouched import state
from torch import nn

from captum_fam import ScoreCam, SimilarityScore

X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)
VALUES = st.floats(-8, 8, width=32)


DIMENSIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}


def score_cam_of(encoder, layer, x, score, *arguments):
    """Score-CAM of one input (C, *spatial), channel by channel: ``score`` takes an embedding (D,) to a number."""
    _, A = arrays(encoder, x[None], *arguments, layer=layer)
    A, mode = torch.from_numpy(A[0]), DIMENSIONS[x.ndim - 1]
    with torch.no_grad():
        baseline = score(encoder(torch.zeros_like(x)[None], *arguments)[0].numpy())
        alpha = []
        for A_k in A:
            spread = A_k.max() - A_k.min()
            if spread == 0:
                alpha.append(0.0)
                continue
            up = F.interpolate(A_k[None, None], size=x.shape[1:], mode=mode, align_corners=False)[0]
            seen = x * ((up - A_k.min()) / spread)
            alpha.append(score(encoder(seen[None], *arguments)[0].numpy()) - baseline)
    return oracle.aligned_map(alpha, A.numpy())


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("contrast", [None, 1, "rest"])
def test_score_cam_is_a_loop_over_channels(contrast, similarity):
    encoder = seeded(PooledEncoder)
    maps = ScoreCam(encoder, encoder.layer, similarity=similarity).attribute(
        X, [3, 0, 2], reference_embedding=REFERENCES, contrast=contrast
    )
    for b, own in enumerate([3, 0, 2]):
        score = question(REFERENCES, own, contrast, similarity)
        close(maps[b, 0], score_cam_of(encoder, encoder.layer, X[b], score))


@pytest.mark.filterwarnings("ignore:The activations")
@pytest.mark.parametrize("layer", ["early", "conv2", "layer"])
@pytest.mark.parametrize("dim", CONV)
def test_score_cam_is_that_loop_in_each_number_of_dimensions_and_at_each_layer(dim, layer):
    encoder, x, s = seeded(lambda: HeadEncoder(dim)), random(2, 3, *[5, 7, 6][:dim]), random(2, 4, seed=2)
    maps = ScoreCam(encoder, getattr(encoder, layer)).attribute(x, reference_embedding=s)
    for b in range(2):
        close(maps[b, 0], score_cam_of(encoder, getattr(encoder, layer), x[b], question(s, b)))


def test_score_cam_by_hand():
    """The embedding is the mean of the 2 x 2 input, which is the layer's one map; the score is z s."""
    encoder = OfActivations()
    A = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]]).double()
    # H = (A - 1) / 4 = [[0, .25], [.5, 1]], so X H = [[0, .5], [1.5, 5]] with mean 1.75, and s = 2 gives alpha = 3.5
    maps = ScoreCam(encoder, encoder.layer, similarity="dot").attribute(
        A, reference_embedding=torch.tensor([[2.0]]).double()
    )
    close(maps, 3.5 * A)


def test_all_score_cam_maps_at_once_are_those_one_by_one():
    encoder = seeded(PooledEncoder)
    cam = ScoreCam(encoder, encoder.layer)
    for contrast in (None, "rest"):
        maps = cam.attribute_all(X, reference_embedding=REFERENCES, contrast=contrast)
        each = [cam.attribute(X, k, reference_embedding=REFERENCES, contrast=contrast) for k in range(4)]
        close(maps, torch.cat(each, 1))


@settings(deadline=None, max_examples=30)
@given(
    hnp.arrays(np.float64, (1, 3, 2, 3), elements=st.integers(-4, 4)), hnp.arrays(np.float64, (1, 3), elements=VALUES)
)
@pytest.mark.filterwarnings("ignore:Embeddings are zero")
def test_channels_with_a_constant_map_weigh_nothing(A, s):
    A[0, 1] = 2.0
    encoder = OfActivations()
    cam = ScoreCam(encoder, encoder.layer, similarity="dot")
    terms = cam.attribute(torch.from_numpy(A), attr_dim_summation=False, reference_embedding=torch.from_numpy(s))
    assert not terms[:, 1].any()
    assert terms.isfinite().all()
    close(terms.sum((0, 1)), score_cam_of(encoder, encoder.layer, torch.from_numpy(A[0]), lambda z: z @ s[0]))


def test_a_baseline_without_an_embedding_is_no_reason_to_warn():
    encoder = OfActivations()
    with silent():
        maps = ScoreCam(encoder, encoder.layer).attribute(HAND_A, reference_embedding=torch.ones(1, 2).double())
    close(maps[0, 0], score_cam_of(encoder, encoder.layer, HAND_A[0], lambda z: similarity_of(z, np.ones(2))))


@pytest.mark.parametrize("perturbations_per_eval", [1, 4, 6, 7, 100])
def test_score_cam_does_not_depend_on_the_number_of_masks_at_once(perturbations_per_eval):
    encoder = seeded(HeadEncoder)
    s = random(4, 4, seed=2)
    plain = ScoreCam(encoder, encoder.layer).attribute(X, [1, 0, 3], reference_embedding=s)
    batches = []
    handle = encoder.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    cam = ScoreCam(encoder, encoder.layer, perturbations_per_eval=perturbations_per_eval)
    close(cam.attribute(X, [1, 0, 3], reference_embedding=s), plain)
    handle.remove()
    assert max(batches[1:]) <= max(perturbations_per_eval, 3)


class Rows(nn.Module):
    """Counts the inputs that go through an encoder, and notes the pass of zeros."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.layer, self.rows, self.baseline = encoder, encoder.layer, [], None

    def forward(self, x, *arguments):
        if self.baseline is None and not x.any():
            self.baseline = len(self.rows)
        self.rows.append(len(x))
        return self.encoder(x, *arguments)


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("perturbations_per_eval", [1, 5, 32])
def test_score_cam_takes_a_pass_for_each_channel_and_one_more_for_any_number_of_references(perturbations_per_eval, K):
    counted = Rows(seeded(PooledEncoder))
    cam = ScoreCam(counted, counted.layer, perturbations_per_eval=perturbations_per_eval)
    cam.attribute_all(X, reference_embedding=REFERENCES[:K])
    assert counted.rows[0] == 3  # the pass that records the layer
    assert sum(counted.rows[1:]) <= 3 * (6 + 1)
    masked = [rows for i, rows in enumerate(counted.rows) if i != counted.baseline]
    assert max(masked[1:]) <= perturbations_per_eval


def test_score_cam_refuses_what_it_cannot_mask():
    two, tokens = seeded(TwoInputEncoder), seeded(TokenEncoder)
    with pytest.raises(ValueError, match=r"one input \(B, C, \*spatial\).*\(3, 3, 8, 8\), \(3, 1, 8, 8\)"):
        ScoreCam(two, two.layer).attribute((X, X[:, :1]), reference_embedding=random(1, 3))
    as_they_are = ScoreCam(tokens, tokens.layer, reshape_transform=lambda a: a)
    with pytest.raises(ValueError, match=r"activations of shape \(2, 10, 6\).*reshape_transform"):
        as_they_are.attribute(random(2, 3, 12, 12), reference_embedding=random(1, 6))


def test_score_cam_of_tokens_needs_only_a_reshape_transform():
    tokens, x, s = seeded(TokenEncoder), random(2, 3, 12, 12), random(2, 6, seed=2)

    def on_the_grid(activation):
        return activation[:, 1:].mT.unflatten(2, (3, 3))

    maps = ScoreCam(tokens, tokens.layer, reshape_transform=on_the_grid).attribute(x, reference_embedding=s)
    grid = Function(on_the_grid)

    def show_grid(module, args, output):
        grid(output)

    tokens.layer.register_forward_hook(show_grid)
    for b in range(2):
        close(maps[b, 0], score_cam_of(tokens, grid, x[b], question(s, b)))


def test_score_cam_gives_each_masked_input_its_own_row_of_arguments():
    encoder, shift = seeded(Shifted), random(3, 6, seed=7)
    maps = ScoreCam(encoder, encoder.layer, perturbations_per_eval=4).attribute(
        X, 2, (shift, 0.5), reference_embedding=REFERENCES
    )
    for b in range(3):
        expected = score_cam_of(encoder, encoder.layer, X[b], question(REFERENCES, 2), shift[b : b + 1], 0.5)
        close(maps[b, 0], expected)


@pytest.mark.parametrize("contrast", [None, 3, "rest"])
def test_score_cam_explains_the_logit_of_a_classifier_by_the_unit_vectors(contrast):
    model = seeded(Classifier)
    score = SimilarityScore(model, torch.eye(5).double(), "dot")
    maps = ScoreCam(score, model.layer).attribute(X, [4, 0, 2], contrast=contrast)
    for b, own in enumerate([4, 0, 2]):

        def logit(z, own=own):
            others = {None: 0, 3: z[3], "rest": np.mean(np.delete(z, own))}
            return z[own] - others[contrast]

        close(maps[b, 0], score_cam_of(model, model.layer, X[b], logit))


@pytest.mark.parametrize("kind", [PooledEncoder, Classifier])
def test_a_forgotten_reference_is_an_error_also_for_a_classifier(kind):
    model = seeded(kind)
    cam, before = ScoreCam(model, model.layer), state(model, X)
    for call in (lambda: cam.attribute(X, 1), lambda: cam.attribute(X), lambda: cam.attribute_all(X)):
        with pytest.raises(ValueError, match=r"exactly one of `reference`.*got none.*torch\.eye"):
            call()
    assert state(model, X) == before


@pytest.mark.parametrize("less", [{"contrast": "self"}, {"threshold": 0.3}], ids=str)
def test_score_cam_explains_differences_of_scores_and_nothing_else(less):
    encoder = seeded(PooledEncoder)
    cam, options = ScoreCam(encoder, encoder.layer), {"reference_embedding": REFERENCES, **less}
    for call in (
        lambda: cam.attribute(X, 1, **options),
        lambda: cam.attribute_all(X, **options),
        lambda: cam.attribute_pair(X, X, **less),
    ):
        with pytest.raises(ValueError, match=f"ScoreCam.*{next(iter(less))}"):
            call()


def test_several_inputs_are_refused_whatever_their_dimensions():
    encoder = seeded(Shifted)
    with pytest.raises(ValueError, match=r"\(3, 3, 8, 8\), \(3, 6\)\]\.$"):  # and no word of the activations, which fit
        ScoreCam(encoder, encoder.layer).attribute(
            (random(3, 3, 8, 8), random(3, 6)), 1, reference_embedding=REFERENCES
        )
