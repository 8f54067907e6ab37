"""Relax, against its formula, mask by mask."""

import numpy as np
import pytest
import torch
from encoders import CONV, Classifier, PooledEncoder, random, seeded
from helpers import close, question, run
from test_model_untouched import state
from torch import nn

from captum_fam import Relax, SimilarityScore
from captum_fam.methods.relax import masks_of

X = random(3, 3, 8, 8)
REFERENCES = random(4, 6, seed=2)


class Seen(nn.Module):
    """Keeps what an encoder is shown."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.seen = encoder, []

    def forward(self, x, *arguments):
        self.seen.append(x.detach().clone())
        return self.encoder(x, *arguments)


def masks_for(size, **options):
    """The masks (N, *size), as an encoder sees them when its input is all ones."""
    seen = Seen(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)).double())
    with torch.no_grad():
        seen(torch.ones(1, 1, *size, dtype=torch.float64))
        seen.seen.clear()
        Relax(seen, **options).attribute(torch.ones(1, 1, *size).double(), reference_embedding=random(1, 2))
    return torch.cat(seen.seen)[:, 0].numpy()


def relax_of(encoder, x, masks, score):
    """The formula for one input (C, *spatial), mask by mask."""
    with torch.no_grad():
        f = [score(encoder((x * torch.from_numpy(M))[None])[0].numpy()) for M in masks]
    R = sum(f_n * M for f_n, M in zip(f, masks, strict=True)) / sum(masks)
    return R - sum(f) / len(f)


@pytest.mark.parametrize("contrast", [None, 1, "rest"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_relax_is_the_mean_of_the_scores_weighted_by_the_masks(similarity, contrast):
    encoder, options = seeded(PooledEncoder), {"n_samples": 40, "grid": 3, "seed": 5}
    masks = masks_for((8, 8), **options)
    assert masks.shape == (40, 8, 8)
    maps = Relax(encoder, similarity=similarity, **options).attribute(
        X, [3, 0, 2], reference_embedding=REFERENCES, contrast=contrast
    )
    assert maps.shape == (3, 1, 8, 8)
    for b, own in enumerate([3, 0, 2]):
        expected = relax_of(encoder, X[b], masks, question(REFERENCES, own, contrast, similarity))
        close(maps[b, 0], expected, rtol=1e-5, atol=1e-7)  # masks are float32


@pytest.mark.parametrize("dim", CONV)
def test_relax_is_that_mean_in_each_number_of_dimensions(dim):
    encoder, x = seeded(lambda: PooledEncoder(dim)), random(2, 3, *[5, 8, 7][:dim])
    masks = masks_for(x.shape[2:], n_samples=60, grid=2)
    maps = Relax(encoder, n_samples=60, grid=2).attribute(x, reference_embedding=REFERENCES[:2])
    assert maps.shape == (2, 1, *x.shape[2:])
    for b in range(2):
        close(maps[b, 0], relax_of(encoder, x[b], masks, question(REFERENCES, b)), rtol=1e-5, atol=1e-7)


def interpolated(grid, lengths):
    """Linear interpolation of an array to other lengths, pixels as areas: an axis at a time, by np.interp."""
    for axis, length in enumerate(lengths):
        n = grid.shape[axis]
        at = (np.arange(length) + 0.5) * n / length - 0.5
        grid = np.apply_along_axis(lambda line, at=at, n=n: np.interp(at, np.arange(n), line), axis, grid)
    return grid


SIZES = [(7,), (8, 8), (9, 5), (2, 3), (1, 1), (14, 15), (4, 6, 5)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grid", [1, 2, 4])
def test_a_mask_is_a_shifted_part_of_an_interpolated_grid(size, grid):
    kept = (random(5, *[grid] * len(size)) > 0).double()
    shifts = random(5, len(size), seed=3).sigmoid()
    masks = masks_of(kept, shifts, size)
    assert masks.shape == (5, *size)
    for mask, cells, shift in zip(masks, kept.numpy(), shifts.numpy(), strict=True):
        cell = [-(-s // grid) for s in size]
        large = interpolated(cells, [(grid + 1) * c for c in cell])
        start = [int(part * c) for part, c in zip(shift, cell, strict=True)]
        part = large[tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))]
        close(mask.double(), part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grid", [1, 3, 7])
def test_masks_have_the_size_of_the_input_and_are_between_zero_and_one(size, grid):
    masks = masks_for(size, n_samples=30, grid=grid)
    assert masks.shape == (30, *size)
    assert masks.min() >= 0
    assert masks.max() <= 1 + 1e-6  # masks are float32
    assert masks.std() > 0.1


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("grid", [1, 4])
def test_masks_show_on_average_what_is_to_be_kept(grid, keep):
    masks = masks_for((12, 12), n_samples=2000, grid=grid, keep=keep)
    assert np.abs(masks.mean(0) - keep).max() < 0.06  # five deviations of the mean of 2,000 coins
    assert abs(masks.mean() - keep) < 0.05


def test_masks_are_neither_alike_nor_aligned_with_a_grid():
    masks = masks_for((12, 12), n_samples=800, grid=3)
    assert len(np.unique(masks.reshape(800, -1), axis=0)) > 600
    jumps = np.abs(np.diff(masks, axis=2)).mean((0, 1))[3:-3]  # at the edges, interpolation is constant
    assert jumps.max() < 1.25 * jumps.min()  # borders of cells are at each column alike


@pytest.mark.parametrize("perturbations_per_eval", [1, 7, 30, 500])
def test_relax_does_not_depend_on_the_number_of_masks_at_once(perturbations_per_eval):
    encoder = Seen(seeded(PooledEncoder))
    maps = Relax(encoder, n_samples=30, grid=3, perturbations_per_eval=perturbations_per_eval).attribute(
        X, [1, 0, 3], reference_embedding=REFERENCES
    )
    assert max(len(x) for x in encoder.seen) <= perturbations_per_eval
    assert sum(len(x) for x in encoder.seen) == 3 * 30
    plain = Relax(encoder, n_samples=30, grid=3).attribute(X, [1, 0, 3], reference_embedding=REFERENCES)
    close(maps, plain, rtol=1e-6, atol=1e-9)


def test_relax_of_an_input_does_not_depend_on_its_batch():
    encoder = seeded(PooledEncoder)
    relax = Relax(encoder, n_samples=30, grid=3)
    maps = relax.attribute(X, [1, 0, 3], reference_embedding=REFERENCES)
    order = [2, 0]
    close(relax.attribute(X[order], [3, 1], reference_embedding=REFERENCES), maps[order], rtol=1e-6, atol=1e-9)


def test_relax_neither_uses_nor_moves_the_global_random_numbers():
    encoder, maps = seeded(PooledEncoder), []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)
            before = torch.get_rng_state(), np.random.get_state()[1].tolist()
            maps.append(Relax(encoder, n_samples=20, grid=3).attribute(X, 1, reference_embedding=REFERENCES))
            assert torch.equal(torch.get_rng_state(), before[0])
            assert np.random.get_state()[1].tolist() == before[1]
    close(*maps, rtol=0, atol=0)


def test_a_seed_is_a_set_of_masks():
    encoder = seeded(PooledEncoder)
    one, same, other = (
        Relax(encoder, n_samples=20, grid=3, seed=seed).attribute(X, 1, reference_embedding=REFERENCES)
        for seed in (4, 4, 5)
    )
    close(one, same, rtol=0, atol=0)
    assert (one - other).abs().max() > 1e-3
    relax = Relax(encoder, n_samples=20, grid=3, seed=4)
    for _ in range(2):
        close(relax.attribute(X, 1, reference_embedding=REFERENCES), one, rtol=0, atol=0)


def test_the_default_masks_are_of_seven_cells_kept_by_a_coin_and_of_seed_zero():
    explicit = masks_for((8, 8), n_samples=10, seed=0, grid=7, keep=0.5)
    np.testing.assert_array_equal(masks_for((8, 8), n_samples=10), explicit)


@pytest.mark.parametrize("corner", [(0, 0), (8, 0), (8, 8), (4, 4)])
def test_what_alone_an_encoder_sees_is_most_important(corner):
    top, left = corner

    def encoder(x):
        return x[:, :, top : top + 8, left : left + 8].mean((2, 3))

    x = random(1, 3, 16, 16).abs()
    relax = Relax(encoder, similarity="dot", n_samples=1500, grid=4)
    maps = relax.attribute(x, reference_embedding=torch.ones(1, 3).double())
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[top : top + 8, left : left + 8] = True
    assert inside.flatten()[maps.argmax()]
    assert maps[0, 0][inside].mean() > 2 * maps[0, 0][~inside].mean().abs()


def test_a_pixel_that_makes_no_difference_has_importance_zero():
    maps = Relax(lambda x: torch.ones(len(x), 3).double(), n_samples=50).attribute(X, reference_embedding=random(1, 3))
    close(maps, np.zeros((3, 1, 8, 8)), atol=1e-6)


def test_the_contrast_of_relax_is_the_difference_of_two_maps():
    encoder = seeded(PooledEncoder)
    relax = Relax(encoder, n_samples=25, grid=3)
    maps = [relax.attribute(X, k, reference_embedding=REFERENCES) for k in range(4)]
    by_number = relax.attribute(X, 0, reference_embedding=REFERENCES, contrast=2)
    rest = relax.attribute(X, 0, reference_embedding=REFERENCES, contrast="rest")
    close(by_number, maps[0] - maps[2], rtol=1e-5, atol=1e-8)
    close(rest, maps[0] - (maps[1] + maps[2] + maps[3]) / 3, rtol=1e-5, atol=1e-8)


def test_relax_of_the_input_itself_is_the_papers_case():
    encoder = seeded(PooledEncoder)
    masks = masks_for((8, 8), n_samples=25, grid=3)
    z = run(encoder, X)[0]
    maps = Relax(encoder, n_samples=25, grid=3).attribute(X, reference=X)
    for b in range(3):
        close(maps[b, 0], relax_of(encoder, X[b], masks, question(z, b)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_samples": 0}, ValueError, "`n_samples`.*positive int.*0"),
        ({"n_samples": 1.5}, TypeError, "`n_samples`.*positive int.*1.5"),
        ({"grid": 0}, ValueError, "`grid`.*positive int.*0"),
        ({"grid": (7, 7)}, TypeError, r"`grid`.*positive int.*tuple|`grid`.*\(7, 7\)"),
        ({"keep": 0.0}, ValueError, "`keep`.*between 0 and 1.*0.0"),
        ({"keep": 1.0}, ValueError, "`keep`.*between 0 and 1.*1.0"),
        ({"keep": -0.5}, ValueError, "`keep`.*between 0 and 1.*-0.5"),
        ({"keep": float("nan")}, ValueError, "`keep`.*between 0 and 1.*nan"),
        ({"keep": "half"}, TypeError, "`keep`.*between 0 and 1.*half"),
        ({"seed": "a"}, TypeError, "`seed`.*int.*a"),
        ({"seed": 1.5}, TypeError, "`seed`.*int.*1.5"),
        ({"seed": None}, TypeError, "`seed`.*int.*None"),
        ({"similarity": "cosin"}, ValueError, "`similarity`.*Did you mean 'cosine'"),
        ({"output_selector": 1}, TypeError, "`output_selector`.*function.*1"),
    ],
)
def test_wrong_options_of_relax_are_refused_when_it_is_made(options, error, match):
    with pytest.raises(error, match=match):
        Relax(seeded(PooledEncoder), **options)


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [((X, X), r"\(3, 3, 8, 8\), \(3, 3, 8, 8\)"), (X[:, :, 0, 0], r"\(3, 3\)")],
    ids=["two", "no locations"],
)
def test_inputs_that_relax_cannot_mask_are_refused(inputs, shapes):
    with pytest.raises(ValueError, match=rf"one input \(B, C, \*spatial\).*{shapes}"):
        Relax(lambda *_: REFERENCES[:3]).attribute(inputs, 1, reference_embedding=REFERENCES)


def test_relax_explains_functions_that_return_more_than_an_embedding():
    encoder, options = seeded(PooledEncoder), {"n_samples": 12, "grid": 3}
    plain = Relax(encoder, **options).attribute(X, 1, reference_embedding=REFERENCES)
    selected = Relax(lambda x: {"z": encoder(x)}, output_selector=lambda output: output["z"], **options)
    close(selected.attribute(X, 1, reference_embedding=REFERENCES), plain)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_relax_says_which_reference_cannot_be_compared_with(bad, similarity):
    encoder, s = seeded(PooledEncoder), torch.stack([random(6), torch.full((6,), bad).double()])
    with pytest.warns(UserWarning, match=r"Embeddings are zero or not finite \(references \[1\]\)") as caught:
        maps = Relax(encoder, n_samples=20, similarity=similarity).attribute(X[:2], [0, 1], reference_embedding=s)
    assert len(caught) == 1
    assert maps[0].any()
    assert not maps[1].any()


@pytest.mark.parametrize("contrast", [None, 3, "rest"])
def test_relax_explains_the_logit_of_a_classifier_by_the_unit_vectors(contrast):
    model = seeded(Classifier)
    score = SimilarityScore(model, torch.eye(5).double(), "dot")
    maps = Relax(score, n_samples=30, grid=3).attribute(X, [4, 0, 2], contrast=contrast)
    masks = masks_for((8, 8), n_samples=30, grid=3)
    for b, own in enumerate([4, 0, 2]):

        def logit(z, own=own):
            others = {None: 0, 3: z[3], "rest": np.mean(np.delete(z, own))}
            return z[own] - others[contrast]

        close(maps[b, 0], relax_of(model, X[b], masks, logit), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [PooledEncoder, Classifier])
def test_a_forgotten_reference_is_an_error_also_for_a_classifier(kind):
    model = seeded(kind)
    relax, before = Relax(model, n_samples=10), state(model, X)
    for call in (lambda: relax.attribute(X, 1), lambda: relax.attribute(X)):
        with pytest.raises(ValueError, match=r"exactly one of `reference`.*got none.*torch\.eye"):
            call()
    assert state(model, X) == before


def test_relax_explains_differences_of_scores_and_nothing_else():
    with pytest.raises(ValueError, match=r"Relax.*contrast='self'"):
        Relax(seeded(PooledEncoder)).attribute(X, 1, reference_embedding=REFERENCES, contrast="self")


@pytest.mark.parametrize("show", [True, False])
def test_a_progress_bar_counts_the_passes(capsys, show):
    relax = Relax(nn.Flatten(), n_samples=3, grid=2, perturbations_per_eval=4, show_progress=show)
    relax.attribute(random(2, 1, 2, 2), reference_embedding=random(1, 4))
    err = capsys.readouterr().err
    assert ("Relax: 100%" in err and "6/6" in err) if show else err == ""
