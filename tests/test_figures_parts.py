"""The figure of shared parts: colours where parts lie, bars that add up to the score."""

import numpy as np
import pytest
import torch
from encoders import random
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from numpy.testing import assert_allclose

from captum_fam import SharedPartsExplanation, visualize_parts
from captum_fam.methods.factorisation import USUAL
from captum_fam.visualization._parts import part_colours

pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _closed():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def parts(shares, residual, score, maps=None, reference_maps=None):
    shares = torch.tensor(shares, dtype=torch.float64)
    B, n = shares.shape[:2]
    maps = torch.ones(B, n, 2, 2) if maps is None else maps
    return SharedPartsExplanation(
        maps, maps if reference_maps is None else reference_maps, shares, torch.tensor(residual), torch.tensor(score)
    )


def drawn(found, images=IMAGES, **options):
    images = images[: len(found.maps)]
    return visualize_parts(images, images.flip(0), found, **{"use_pyplot": False, **options})


def labels(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def test_bars_are_the_shares_of_each_part_alone_and_with_others_and_add_up_to_the_score():
    shares = [[0.4, 0.1], [0.05, 0.2]]
    figure, axes = drawn(parts([shares, shares], [0.05, 0.05], [0.8, 0.8]))
    assert axes.shape == (2, 3)
    assert len(figure.axes) == 6
    widths = [bar.get_width() for bar in axes[1, 2].patches]
    assert_allclose(widths, [0.4, 0.075, 0.2, 0.075, 0.05], atol=1e-12)
    assert_allclose([sum(widths)], [0.8], atol=1e-12)
    assert_allclose([bar.get_x() for bar in axes[1, 2].patches], [0, 0.4, 0, 0.2, 0.0], atol=1e-12)
    assert labels(axes[1, 2]) == ["part 1: 59 %", "part 2: 34 %", "no part: 6 %"]
    assert "0.8" in axes[1, 2].get_xlabel()


def test_of_a_score_that_is_not_positive_values_are_said_and_no_share_is_minus_zero():
    _, axes = drawn(parts([[[0.1, -0.3], [-0.2, 0.05]]], [0.05], [-0.3]))
    assert labels(axes[0, 2]) == ["part 1: -0.15", "part 2: -0.2", "no part: 0.05"]
    alone, rest = axes[0, 2].patches[:2]
    assert (alone.get_width(), rest.get_x()) == (0.1, 0)  # one to the right, one to the left
    assert_allclose([rest.get_width()], [-0.25], atol=1e-12)
    _, axes = drawn(parts([[[0.5]]], [-1e-9], [0.5]))
    assert labels(axes[0, 2]) == ["part 1: 100 %", "no part: 0 %"]


def test_each_place_has_the_colour_of_its_strongest_part_as_opaque_as_it_is_strong():
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 0, :, 0], maps[0, 1, :, 1] = 4.0, 1.0  # left and right
    _, axes = drawn(parts([[[0.5, 0], [0, 0.3]]], [0.0], [0.8], maps, torch.zeros(1, 2, 3, 3)))
    image, overlay = (np.asarray(shown.get_array()) for shown in axes[0, 0].images)
    assert overlay.shape[:2] == image.shape  # which is grey
    bars = axes[0, 2].patches
    assert_allclose(overlay[5, 5, :3], np.array(to_rgb(bars[0].get_facecolor())), atol=1e-12)
    assert_allclose(overlay[5, -5, :3], np.array(to_rgb(bars[2].get_facecolor())), atol=1e-12)
    assert_allclose(overlay[[5, 5], [5, -5], 3], np.array([0.85, 0.85 / 2]), atol=1e-12)
    assert not np.asarray(axes[0, 1].images[1].get_array())[..., 3].any()  # without any part, the image alone


@pytest.mark.parametrize("n", [1, 6, 9, 10, 20])
def test_parts_have_colours_of_their_own_and_none_is_grey(n):
    colours = part_colours(n)
    assert colours.shape == (n, 4)
    assert len(np.unique(colours.round(3), axis=0)) == n
    assert (np.ptp(colours[:, :3], axis=1) > 0.2).all()


# What is left of linear red, green and blue to eyes without one kind of cone: Machado, Oliveira, Fernandes (2009),
# severity 1.
EYES = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])


def lab(linear):
    """CIELAB (n, 3) of linear sRGB, white D65."""
    x, y, z = np.cbrt(linear.clip(1e-3, 1) @ XYZ.T / XYZ.sum(1)).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@pytest.mark.parametrize("eyes", EYES)
def test_the_colours_of_the_usual_parts_are_told_apart_by_the_colour_blind(eyes):
    colours = part_colours(USUAL)[:, :3]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = lab(linear @ np.array(EYES[eyes]).T)
    apart = np.linalg.norm(seen[:, None] - seen, axis=2)[~np.eye(USUAL, dtype=bool)]
    assert apart.min() > 12  # 2.3 is just noticeable, of two areas side by side


def test_titles_and_normalised_images():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    found = parts([[[0.5]]] * 2, [0.0] * 2, [0.5] * 2)
    raw = (IMAGES - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    _, axes = drawn(found, raw, mean=mean, std=std, titles=["a", "b"], reference_titles=["c", "d"])
    _, plain = drawn(found)
    shown, expected = (np.asarray(a[1, 0].images[0].get_array()).astype(int) for a in (axes, plain))
    assert abs(shown - expected).max() <= 1
    assert [axis.get_xlabel() for axis in axes[1, :2]] == ["query\nb", "reference\nd"]


def test_pyplot_has_the_figure_where_it_is_asked_to():
    found = parts([[[0.5]]], [0.0], [0.5])
    assert pyplot.get_fignums() == []
    figure, _ = drawn(found, use_pyplot=True)
    assert pyplot.figure(pyplot.get_fignums()[0]) is figure


def test_errors_say_what_can_be_drawn():
    with pytest.raises(TypeError, match=r"Expected `parts` to be what SharedParts\.explain returns, but got"):
        visualize_parts(IMAGES, IMAGES, random(2, 3, 4, 4))
    signals = parts([[[0.5]]], [0.0], [0.5], torch.ones(1, 1, 4))
    for found in (signals, parts([[[0.5]]] * 51, [0.0] * 51, [0.5] * 51)):
        with pytest.raises(ValueError, match="Expected `parts` to be those of 1 to 50 pairs of images"):
            drawn(found)
