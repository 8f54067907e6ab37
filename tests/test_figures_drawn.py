"""Signals and volumes as they are drawn: lines over a band, slices, each with its map where it belongs."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps, pyplot
from PIL import Image
from torch import nn

from captum_fam import FeatureActivationMap, visualize_comparison, visualize_pair
from captum_fam.visualization._panels import Slices

pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

NAN, INF = float("nan"), float("inf")
TOP = 0.85  # opacity of the strongest value


@pytest.fixture(autouse=True)
def _closed():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def pair(images, maps, reference=None, reference_map=None, **options):
    reference = images if reference is None else reference
    reference_map = maps if reference_map is None else reference_map
    return visualize_pair(images, reference, maps, reference_map, **{"use_pyplot": False, **options})


def lines(axis):
    return [line.get_ydata() for line in axis.lines]


def band(axis):
    """Colours and opacity of the columns behind the lines."""
    (image,) = axis.images
    (row,) = np.asarray(image.get_array())
    return row[:, :3], row[:, 3]


def rendered(figure, dpi=80):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return np.asarray(Image.open(file).convert("RGB")) / 255


# Signals


def test_each_channel_is_a_line_in_its_lane_from_its_lowest_to_its_highest_value():
    signal = np.array([[[0.0, 4, 2, 1], [1000, -1000, 0, 500], [3, 3, 3, 3]]])
    figure, axes = pair(signal, np.ones((1, 1, 2)))
    expected = [[-0.5, 0.5, 0, -0.25], [-0.5, -1.5, -1, -0.75], [-2, -2, -2, -2]]
    for axis in axes.flat:
        np.testing.assert_allclose(lines(axis), expected)
        assert [line.get_xdata().tolist() for line in axis.lines] == [[0, 1, 2, 3]] * 3
        assert axis.get_xlim() == (-0.5, 3.5)
        low, high = axis.get_ylim()
        assert low < -2.5 - 0.3  # room below the lines, where nothing hides the map
        assert high > 0.5
    rendered(figure)


def test_a_map_is_a_band_over_the_whole_height_at_its_places():
    values = np.array([0.0, 1.0, 0.25, 0.5, 0.0])
    _, axes = pair(np.random.default_rng(0).normal(size=(1, 2, 1000)), values[None, None])
    assert [len(axis.images) for axis in axes[0]] == [0, 1, 0, 1]
    for axis in axes[0, 1::2]:
        colours, opacity = band(axis)
        left, right, bottom, top = axis.images[0].get_extent()
        assert ((left, right), (bottom, top)) == (axis.get_xlim(), axis.get_ylim())
        centres = (np.arange(512) + 0.5) * 5 / 512 - 0.5  # of columns, among those of places
        shares = np.interp(centres, np.arange(5), values)
        np.testing.assert_allclose(opacity, TOP * np.sqrt(shares), atol=1e-6)
        np.testing.assert_allclose(colours, colormaps["turbo"](shares)[:, :3], atol=0.02)
        assert axis.images[0].get_zorder() < min(line.get_zorder() for line in axis.lines)


def test_a_signed_map_of_a_signal_is_red_and_blue_where_it_is_seen():
    figure, axes = pair(np.zeros((1, 1, 90)), np.array([[[1.0, 0, -1.0]]]))
    seen, axis = rendered(figure), axes[0, 1]
    box = axis.get_window_extent()
    scale = 80 / figure.dpi
    y = int(seen.shape[0] - (box.y0 + 0.06 * (box.y1 - box.y0)) * scale)  # below the line
    red, white, blue = (seen[y, int((box.x0 + share * (box.x1 - box.x0)) * scale)] for share in (0.1, 0.5, 0.9))
    assert red[0] > red[2] + 0.5
    assert white.min() > 0.9
    assert blue[2] > blue[0] + 0.5


def test_a_loud_signal_does_not_hide_its_map():
    signal = np.random.default_rng(0).normal(size=(1, 1, 20_000))
    figure, axes = pair(signal, np.ones((1, 1, 3)))
    low, high = axes[0, 1].get_ylim()
    seen = rendered(figure)
    box = axes[0, 1].get_window_extent()
    scale = 80 / figure.dpi
    x = int((box.x0 + box.x1) / 2 * scale)
    column = seen[int(seen.shape[0] - box.y1 * scale) : int(seen.shape[0] - box.y0 * scale), x]
    free = (lines(axes[0, 1])[0].min() - low) / (high - low)
    assert free > 0.1
    assert (column.max(1) - column.min(1) > 0.3).mean() > 0.8 * free


@pytest.mark.parametrize("place", [0, 1, 77_777, 199_999])
def test_no_peak_of_a_long_signal_is_lost(place):
    signal = np.zeros((1, 2, 200_000))
    signal[0, 0, place], signal[0, 1, place] = 1, -1
    _, axes = pair(signal, np.ones((1, 1, 9)))
    high, low = axes[0, 0].lines
    assert len(high.get_ydata()) <= 1100
    at = [int(np.argmax(high.get_ydata())), int(np.argmin(low.get_ydata()))]
    assert (high.get_ydata()[at[0]], low.get_ydata()[at[1]]) == (0.5, -1.5)
    assert [abs(line.get_xdata()[k] - place) < 400 for line, k in zip((high, low), at)] == [True, True]


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (2, 2), (16, 16), (17, 16), (64, 16)])
def test_of_many_channels_some_are_drawn_from_the_first_to_the_last_which_is_said(count, drawn):
    signal = np.arange(count)[None, :, None] + np.tile([0.0, 1.0, NAN], 22)  # each NaN is a gap
    signal[:, 1:-1, 1] += 1
    _, axes = pair(signal, np.ones((1, 1, 2)))
    assert {len(axis.lines) for axis in axes.flat} == {drawn}
    assert axes[0, 0].get_xlabel().split("\n")[1:] == (
        []
        if count == 1
        else [f"({count} channels, own scales)"]
        if count <= 16
        else [f"(16 of {count} channels, own scales)"]
    )
    assert "channels" not in axes[0, 1].get_xlabel()


def test_values_that_are_not_finite_are_gaps_and_change_nothing_else():
    signal = np.array([[[0.0, NAN, 1.0, INF, 2.0], [NAN] * 5, [-INF, 0, 1, 0, 1]]])
    figure, axes = pair(signal, np.ones((1, 1, 5)))
    expected = [[-0.5, NAN, 0, NAN, 0.5], [NAN] * 5, [NAN, -2.5, -1.5, -2.5, -1.5]]
    np.testing.assert_allclose(lines(axes[0, 0]), expected)
    rendered(figure)
    long = np.full((1, 1, 5000), NAN)
    long[0, 0, 100:4000] = np.arange(3900)
    figure, axes = pair(long, np.ones((1, 1, 5)))
    assert (np.nanmin(lines(axes[0, 0])), np.nanmax(lines(axes[0, 0]))) == (-0.5, 0.5)
    rendered(figure)


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e300, 1.7e308])
def test_signals_of_any_size_are_drawn(size):
    figure, axes = pair(size * np.array([[[-1.0, 1.0, 0.0]]]), np.ones((1, 1, 2)))
    np.testing.assert_allclose(lines(axes[0, 0])[0], [-0.5, 0.5, 0] if size else [0, 0, 0])
    rendered(figure)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, bool, np.float16, torch.bfloat16, torch.float32, torch.int64])
def test_signals_of_every_dtype(dtype):
    numbers = np.array([[[0, 1, 0, 1]]])
    signal = torch.tensor(numbers).to(dtype) if isinstance(dtype, torch.dtype) else numbers.astype(dtype)
    _, axes = pair(signal, np.ones((1, 1, 2)))
    np.testing.assert_allclose(lines(axes[0, 0])[0], [-0.5, 0.5, -0.5, 0.5])


def test_what_the_map_of_a_signal_lacks_is_said_under_it():
    _, axes = pair(
        np.zeros((2, 1, 50)), np.array([[[0.0] * 5], [[1.0, NAN, 2, 3, 4]]]), reference_map=np.ones((2, 1, 2))
    )
    said = [[line for line in axis.get_xlabel().split("\n")[1:] if line.startswith("(")] for axis in axes.flat]
    constant = ["(the map is constant)", "(the map has 2 locations)"]
    assert said == [[], ["(the map is zero)"], [], constant, [], ["(1 of 5 values are not finite)"], [], constant]


def test_a_comparison_of_methods_on_signals():
    signals, maps = torch.randn(2, 3, 40), torch.rand(2, 1, 10)
    figure, axes = visualize_comparison(
        signals, {"a": maps, "b": 5 * maps, "c": torch.rand(2, 1, 40)}, use_pyplot=False
    )
    assert axes.shape == (2, 4)
    for row, values in zip(axes, maps):
        np.testing.assert_allclose(band(row[1])[1], band(row[2])[1], atol=1e-5)
        shown = np.interp((np.arange(512) + 0.5) * 10 / 512 - 0.5, np.arange(10), values[0] / maps.max())
        np.testing.assert_allclose(band(row[1])[1], TOP * np.sqrt(shown), atol=1e-5)
        assert row[0].get_xlabel() == "(3 channels, own scales)"
    rendered(figure)


def test_a_signal_may_be_beside_a_picture():
    figure, axes = pair(torch.randn(2, 1, 50), torch.rand(2, 1, 9), torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4))
    assert [len(axis.lines) for axis in axes[0]] == [1, 1, 0, 0]
    assert [len(axis.images) for axis in axes[0]] == [0, 1, 1, 2]
    rendered(figure)


def test_a_normalisation_of_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="`mean` and `std` to have one number for each of 2 channels"):
        pair(torch.randn(1, 2, 50), torch.rand(1, 1, 9), mean=(0, 0, 0))


def test_the_pair_that_a_method_explains_is_drawn_as_it_is():
    """Three signals, and three volumes: what an encoder takes, and what attribute_pair returns."""
    for convolution, pool, size in (
        (nn.Conv1d, nn.AdaptiveAvgPool1d, (40,)),
        (nn.Conv3d, nn.AdaptiveAvgPool3d, (6, 7, 8)),
    ):
        torch.manual_seed(0)
        encoder = nn.Sequential(convolution(1, 8, 3, stride=2), nn.ReLU(), pool(1), nn.Flatten()).eval()
        images, others = torch.rand(2, 3, 1, *size)
        fam = FeatureActivationMap(encoder, encoder[1])
        maps = fam.attribute_pair(images, others)
        figure, axes = visualize_pair(images, others, *maps, scores=[0.1, 0.2, 0.3], use_pyplot=False)
        assert axes.shape == (3, 4)
        assert [bool(axis.lines) for axis in axes.flat] == [len(size) == 1] * 12
        (bar,) = set(figure.axes) - set(axes.flat)
        assert bar.get_ylim()[1] == pytest.approx(max(m.max().item() for m in maps))
        rendered(figure)


# Volumes


def shown(axis):
    """The numbers of the slices, and the tiles of the image and of the map."""
    numbers = [int(text.get_text()) for text in axis.texts]
    across = int(np.ceil(np.sqrt(len(numbers))))
    wholes = [np.asarray(image.get_array()) for image in axis.images]
    down = int(np.ceil(len(numbers) / across))
    h, w = (round((size + 4) / n - 4) for size, n in zip(wholes[0].shape, (down, across)))
    corners = [(n // across * (h + 4), n % across * (w + 4)) for n in range(len(numbers))]
    return numbers, *([whole[y : y + h, x : x + w] for y, x in corners] for whole in wholes)


def test_a_volume_is_drawn_as_slices_in_order_with_the_strongest_among_them():
    volume = np.repeat(np.arange(24) / 23, 64).reshape(1, 1, 24, 8, 8)
    maps = np.zeros((1, 1, 24, 8, 8))
    maps[0, 0, 16, 2, 5] = 1
    figure, axes = pair(volume, maps)
    for axis in axes[0]:
        numbers, tiles = shown(axis)[:2]
        assert len(numbers) == 9
        assert numbers == sorted(numbers)
        assert {0, 16, 23} <= set(numbers)
        assert max(np.diff(numbers)) <= 6
        assert [int(tile.mean().round()) for tile in tiles] == [round(255 * n / 23) for n in numbers]
    assert axes[0, 0].get_xlabel() == "query\n(slices of 24, from 0)"
    assert axes[0, 1].get_xlabel() == "map of the query\n(strongest in slice 16)"
    numbers, _, overlay = shown(axes[0, 1])
    assert [n for n, tile in zip(numbers, overlay) if tile[..., 3].any()] == [16]
    tile = overlay[numbers.index(16)]
    y, x = np.unravel_index(tile[..., 3].argmax(), tile.shape[:2])
    assert (int(y / tile.shape[0] * 8), int(x / tile.shape[1] * 8)) == (2, 5)
    rendered(figure)


@given(st.integers(1, 40), st.lists(st.integers(0, 39), max_size=12))
def test_which_slices(depth, strongest):
    maps = []
    for s in strongest:
        values = torch.zeros(depth, 1, 1)
        values[s % depth] = -1
        maps.append(values)
    found = Slices.of([Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(depth)], "", maps)
    assert found.numbers == sorted(set(found.numbers))
    assert len(found.numbers) == min(depth, 9)
    assert [image.getpixel((0, 0))[0] for image in found.images] == found.numbers
    wanted = list(dict.fromkeys(s % depth for s in strongest))
    assert set(wanted[:9]) <= set(found.numbers)
    if not wanted:
        assert found.numbers == np.linspace(0, depth - 1, min(depth, 9)).round().astype(int).tolist()


def test_a_map_is_interpolated_along_the_depth_as_along_the_sides():
    values = np.array([0.0, 1.0, 0.5, 0.25])
    maps = np.broadcast_to(values[:, None, None], (4, 2, 2))[None, None]
    _, axes = pair(np.zeros((1, 1, 9, 8, 8)), maps)
    numbers, _, overlay = shown(axes[0, 1])
    assert numbers == list(range(9))
    expected = np.interp((np.arange(9) + 0.5) * 4 / 9 - 0.5, np.arange(4), values)
    for tile, share in zip(overlay, expected / 1.0):
        np.testing.assert_allclose(tile[..., 3], TOP * np.sqrt(share), atol=1e-6)


@pytest.mark.parametrize("place", [0, 20, 63])
def test_a_single_value_of_a_map_with_more_slices_than_the_volume_is_seen(place):
    maps = np.zeros((1, 1, 64, 4, 4))
    maps[0, 0, place, 1, 1] = 1
    _, axes = pair(np.zeros((1, 1, 5, 8, 8)), maps)
    assert max(tile[..., 3].max() for tile in shown(axes[0, 1])[2]) > 0


def test_the_scale_is_that_of_the_whole_map_also_of_slices_that_are_not_drawn():
    maps = np.zeros((2, 1, 40, 2, 2))
    maps[0, 0, 1], maps[1, 0, 2, 0, 0] = 1, 2
    figure, axes = pair(np.zeros((2, 1, 40, 8, 8)), maps)
    (bar,) = set(figure.axes) - set(axes.flat)
    assert bar.get_ylim() == (0, 2)
    assert max(t[..., 3].max() for t in shown(axes[0, 1])[2]) == pytest.approx(TOP * np.sqrt(0.5))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_clear_in_signals_and_volumes(bad):
    values = np.zeros((1, 1, 9))
    values[..., 4], values[..., 8] = bad, 1
    _, axes = pair(np.zeros((1, 1, 90)), values)
    assert band(axes[0, 1])[1][512 * 9 // 18] == 0
    volume = np.zeros((1, 1, 9, 8, 8))
    values = np.zeros((1, 1, 9, 2, 2))
    values[:, :, 4], values[:, :, 8] = bad, 1
    _, axes = pair(volume, values)
    assert [bool(tile[..., 3].any()) for tile in shown(axes[0, 1])[2]] == [False] * 8 + [True]
    assert "(4 of 36 values are not finite)" in axes[0, 1].get_xlabel()


def test_a_volume_is_stretched_as_a_whole():
    volume = np.repeat(np.arange(5) * 100, 64).reshape(1, 1, 5, 8, 8).astype(np.int16)
    with pytest.warns(UserWarning, match="`query` has values from 0 to 400, not from 0 to 255"):
        _, axes = pair(volume, np.ones((1, 1, 2, 2, 2)), np.zeros_like(volume))
    assert [int(tile.mean().round()) for tile in shown(axes[0, 0])[1]] == [0, 64, 128, 191, 255]


def test_a_normalised_volume_is_drawn_as_it_was():
    volume = np.linspace(0, 1, 9 * 64).reshape(1, 1, 9, 8, 8)
    _, axes = pair((volume - 0.3) / 0.2, np.ones((1, 1, 2, 2, 2)), mean=[0.3], std=[0.2])
    _, plain = pair(volume, np.ones((1, 1, 2, 2, 2)))
    for one, other in zip(shown(axes[0, 0])[1], shown(plain[0, 0])[1]):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_frames_of_a_video_are_in_colour():
    video = np.zeros((1, 3, 4, 8, 8))
    video[0, 0, 0], video[0, 1, 1], video[0, 2, 2], video[0, :, 3] = 1, 1, 1, 1
    _, axes = pair(video, np.ones((1, 1, 2, 2, 2)))
    colours = [tuple(tile[5, 5].tolist()) for tile in shown(axes[0, 0])[1]]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert "channel" not in axes[0, 0].get_xlabel()


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_of_other_volumes_the_first_channel_is_drawn_which_is_said(channels):
    volume = np.zeros((1, channels, 4, 8, 8))
    volume[:, 0] = 1
    _, axes = pair(volume, np.ones((1, 1, 2, 2, 2)))
    assert {int(tile.mean()) for tile in shown(axes[0, 0])[1]} == {255}
    assert axes[0, 0].get_xlabel() == f"query\n(slices of 4, from 0)\n(channel 0 of {channels})"


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 300), (40, 300, 2), (9, 7, 90), (5, 2, 2)], ids=str)
def test_volumes_of_any_size_are_drawn_with_the_strongest_of_maps_that_are_odd(shape):
    maps = np.full((1, 1, 3, 2, 2), NAN)
    figure, axes = pair(np.zeros((1, 1, *shape)), maps, reference_map=np.zeros((1, 1, 1, 1, 1)))
    for axis in (axes[0, 1], axes[0, 3]):
        assert "strongest" not in axis.get_xlabel()
        assert not any(tile[..., 3].any() for tile in shown(axis)[2])
    assert "no value is finite" in axes[0, 1].get_xlabel()
    assert "(the map is zero)\n(1 x 1 x 1 locations)" in axes[0, 3].get_xlabel()
    rendered(figure, 40)


def test_a_comparison_shows_the_strongest_slice_of_every_method():
    maps = {}
    for name, s in {"a": 3, "b": 11, "c": 30}.items():
        maps[name] = torch.zeros(2, 1, 32, 4, 4)
        maps[name][0, 0, s, 0, 0] = -7
    figure, axes = visualize_comparison(np.zeros((1, 1, 32, 8, 8)), maps, use_pyplot=False)
    assert {3, 11, 30} <= set(shown(axes[0, 0])[0])
    assert len({tuple(shown(axis)[0]) for axis in axes[0]}) == 1
    assert [a.get_xlabel().split("\n")[1] for a in axes[0, 1:]] == [f"(strongest in slice {s})" for s in (3, 11, 30)]
    assert axes[1, 1].get_xlabel() == "0 to 0\n(the map is zero)"
    rendered(figure, 40)
