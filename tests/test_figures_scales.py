"""What has the strongest colour, and that the bar says so; scores and titles of both sides."""

import io

import numpy as np
import pytest
import torch
from matplotlib import colormaps, pyplot
from PIL import Image

from captum_fam import visualize_comparison, visualize_matches, visualize_pair

pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

NAN, INF = float("nan"), float("inf")
TOP = 0.85  # opacity of the strongest value
DARK = np.zeros((32, 32))


@pytest.fixture(autouse=True)
def _closed():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def pair(maps, reference_maps=None, **options):
    reference_maps = maps if reference_maps is None else reference_maps
    return visualize_pair(DARK, DARK, maps, reference_maps, **{"use_pyplot": False, **options})


def compared(maps, **options):
    return visualize_comparison(DARK, maps, use_pyplot=False, **options)


def flat(*levels):
    """Maps (B, 1, 4, 4) of one value each, but for a place that is zero, where captions say nothing."""
    maps = np.ones((len(levels), 1, 4, 4)) * np.reshape(levels, (-1, 1, 1, 1))
    maps[:, 0, 0, 0] = 0
    return maps


def share(axis):
    """Of the strongest colour, in a map that is not signed, far from the place that is zero."""
    return (np.asarray(axis.images[1].get_array())[-1, -1, 3] / TOP) ** 2


def bars(figure, axes):
    return [bar for bar in figure.axes if bar not in list(axes.flat)]


def rendered(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=60)
    return np.asarray(Image.open(file).convert("RGB"))


# Of all, of each row


def test_all_maps_are_on_one_scale_and_the_bar_says_no_more_than_its_label():
    figure, axes = pair(flat(1, 4), flat(2, 8), label="here")
    assert [share(axis) for axis in axes[:, 1::2].flat] == pytest.approx([1 / 8, 2 / 8, 4 / 8, 1])
    (bar,) = bars(figure, axes)
    assert (bar.get_ylim(), bar.get_ylabel()) == ((0, 8), "here")


def test_each_row_has_a_scale_and_a_bar_beside_it():
    figure, axes = pair(flat(1, 4, 0), flat(2, 8, 0), label="here", scale="row")
    assert [share(axis) for axis in axes[:, 1::2].flat] == pytest.approx([1 / 2, 1, 1 / 2, 1, 0, 0])
    figure.draw_without_rendering()
    found = bars(figure, axes)
    assert [bar.get_ylim() for bar in found] == [(0, 2), (0, 8), (0, 1)]
    assert {bar.get_ylabel() for bar in found} == {"here\n(scale of this row)"}
    for bar, row in zip(found, axes):
        middle = (bar.get_position().y0 + bar.get_position().y1) / 2
        assert row[3].get_position().y0 < middle < row[3].get_position().y1
        assert bar.get_position().x0 > row[3].get_position().x1


def test_rows_are_signed_together():
    figure, axes = pair(flat(-1, 4), flat(2, 8), scale="row")
    assert [bar.get_ylim() for bar in bars(figure, axes)] == [(-2, 2), (-8, 8)]
    reds = [np.asarray(axis.images[1].get_array())[-1, -1] for axis in axes[:, 1::2].flat]
    assert [bool(c[0] > c[2]) for c in reds] == [False, True, True, True]
    assert [c[3] / TOP for c in reds] == pytest.approx([0.5, 1, 0.5, 1])


def test_of_a_comparison_each_method_has_a_scale_for_each_row():
    maps = {"a": flat(1, 4), "b": flat(30, 10)}
    figure, axes = compared(maps)
    assert [share(axis) for axis in axes[:, 1:].flat] == pytest.approx([1 / 4, 1, 1, 1 / 3])
    assert bars(figure, axes)[0].get_ylabel() == "share of the largest value"
    figure, axes = compared(maps, scale="row")
    assert [share(axis) for axis in axes[:, 1:].flat] == pytest.approx([1, 1, 1, 1])
    (bar,) = bars(figure, axes)
    assert (bar.get_ylabel(), bar.get_ylim()) == ("share of the largest value of each row", (0, 1))


# A percentile

RAMP = np.arange(100.0).reshape(1, 1, 10, 10)


@pytest.mark.parametrize("percentile", [1, 50, 90.0, np.float32(75), np.int64(99), 99.5, 100])
def test_a_percentile_is_that_of_all_absolute_values_that_are_not_zero(percentile):
    here, there = RAMP, -3 * RAMP[..., ::-1].copy()
    here[0, 0, 0, 0] = 0
    there[0, 0, 5, 5] = NAN
    figure, axes = pair(here, there, scale=percentile, label="here")
    values = np.abs(np.concatenate([here.ravel(), there.ravel()]))
    values = values[np.isfinite(values) & (values > 0)]
    limit = np.percentile(values, float(percentile))
    (bar,) = bars(figure, axes)
    assert bar.get_ylim() == pytest.approx((-limit, limit))
    beyond = [int((np.abs(m[np.isfinite(m)]) > limit).sum()) for m in (here, there)]
    assert bar.get_ylabel() == f"here\n(up to percentile {percentile:g};\n{sum(beyond)} of 200 values are beyond it)"
    for axis, count in zip(axes[0, 1::2], beyond):
        assert (f"({count} of 100 beyond the scale)" in axis.get_xlabel()) == (count > 0)
    rendered(figure)


@pytest.mark.parametrize(("sign", "tips"), [(1, "max"), (-1, "both")])
def test_the_bar_has_tips_where_values_are_beyond_it(sign, tips):
    figure, axes = pair(RAMP, sign * RAMP, scale=90)
    ends = [bar._colorbar.extend for bar in bars(figure, axes)]
    assert ends == [tips]
    figure, axes = pair(RAMP, sign * RAMP, scale=100)
    assert [bar._colorbar.extend for bar in bars(figure, axes)] == ["neither"]
    assert "0 of 200" in bars(figure, axes)[0].get_ylabel()


@pytest.mark.parametrize("extreme", [1e6, INF, 1e300])
def test_one_extreme_place_hides_nothing_and_colours_nothing_around_it(extreme):
    calm, wild = RAMP.copy(), RAMP.copy()
    wild[0, 0, 4, 4], calm[0, 0, 4, 4] = extreme, 0 if extreme == INF else 99
    _, axes = pair(np.concatenate([RAMP, wild]), scale=99)
    _, plain = pair(np.concatenate([RAMP, calm]), scale=99)
    limit = np.percentile(np.concatenate([RAMP, wild]).ravel()[1:], 99) if extreme != INF else None
    assert limit is None or limit < 100
    one, other = (np.asarray(a[1, 1].images[1].get_array()) for a in (axes, plain))
    np.testing.assert_allclose(one, other, atol=0.02)


def test_one_extreme_hit_of_eight_hides_nothing():
    levels = np.array([1, 2, 3, 4, 5, 6, 7, 1e6])
    _, axes = pair(flat(*levels), scale=86)
    assert [share(axis) for axis in axes[:, 1]] == pytest.approx([n / 7 for n in range(1, 8)] + [1])
    said = [[line for line in axis.get_xlabel().split("\n") if "beyond" in line] for axis in axes[:, 1]]
    assert said == [[]] * 7 + [["(15 of 16 beyond the scale)"]]


def test_a_percentile_of_maps_that_are_nearly_zero_is_that_of_the_rest():
    maps = np.zeros((2, 1, 8, 8))
    maps[0, 0, 3, 3] = 5
    figure, axes = pair(maps, scale=50)
    assert bars(figure, axes)[0].get_ylim() == (0, 5)
    figure, axes = pair(0 * maps, scale=50)
    assert bars(figure, axes)[0].get_ylim() == (0, 1)
    rendered(figure)


def test_of_a_comparison_the_percentile_is_each_methods_own():
    maps = {"a": np.concatenate([RAMP, 2 * RAMP]), "b": -1000 * np.concatenate([RAMP, RAMP])}
    figure, axes = compared(maps, scale=80)
    beyond = 0
    for column, values in enumerate(maps.values(), 1):
        limit = np.percentile(np.abs(values[values != 0]), 80)
        for axis, m in zip(axes[:, column], values):
            count = int((np.abs(m) > limit).sum())
            beyond += count
            shown = np.asarray(axis.images[1].get_array())
            for place in (0, -1):
                assert shown[-1, place, 3] / TOP == pytest.approx(min(1, np.abs(m[0, -1, place]) / limit))
            low, high = (f"{x:.3g}" for x in (m.min(), m.max()))
            said = [f"{low} to {high}", f"({count} of 100 beyond the scale)"]
            assert axis.get_xlabel().split("\n") == said[: 1 + (count > 0)]
    (bar,) = bars(figure, axes)
    assert bar.get_ylim() == (-1, 1)
    assert bar.get_ylabel() == (
        f"share of the limit of its method\n(up to percentile 80;\n{beyond} of 400 values are beyond it)"
    )


@pytest.mark.parametrize(
    "scale",
    [
        "rows",
        "",
        None,
        True,
        0,
        0.99,
        -1,
        101,
        NAN,
        INF,
        "99",
        [99],
        torch.tensor(99),
        np.array([99, 1]),
        99j,
        np.complex64(99),
    ],
    ids=repr,
)
@pytest.mark.parametrize("draw", [pair, lambda m, **o: compared({"a": m}, **o), lambda m, **o: matched(m, **o)])
def test_another_scale_is_refused_and_leaves_no_figure(draw, scale):
    with pytest.raises(
        ValueError, match=r'`scale` to be "all", "row" or a percentile from 1 to 100, such as 99, but got'
    ):
        draw(flat(1), scale=scale, use_pyplot=True) if draw is pair else draw(flat(1), scale=scale)
    assert not pyplot.get_fignums()


# Matches


def matched(maps=None, **options):
    """Two pairs with two matches each: 4 and 1, 2 and 3."""
    matrix = torch.zeros(2, 15, 15)
    matrix[0, 0, 14], matrix[0, 12, 2], matrix[1, 4, 10], matrix[1, 0, 0] = 4, 1, 2, 3
    matrix = matrix.reshape(2, 3, 5, 3, 5)
    return visualize_matches(DARK, DARK, matrix, **{"use_pyplot": False, **options})


@pytest.mark.parametrize(
    ("scale", "limits", "words"),
    [
        ("all", [4, 4], "match"),
        ("row", [4, 3], "match\n(scale of this row)"),
        (50, [2.5, 2.5], "match\n(up to percentile 50;\n2 of 4 values are beyond it)"),
    ],
)
def test_matches_are_on_the_scale_that_is_asked(scale, limits, words):
    figure, axes = matched(scale=scale)
    turbo = colormaps["turbo"]
    for row, values, limit in zip(axes, ([4, 1], [3, 2]), limits):
        expected = [turbo(min(1.0, value / limit)) for value in values]
        assert [patch.get_edgecolor() for patch in row[0].patches] == expected
        assert [patch.get_edgecolor() for patch in row[1].patches] == expected
    found = bars(figure, axes)
    assert [bar.get_ylim() for bar in found] == [(0, limit) for limit in limits][: len(found)]
    assert len(found) == (2 if scale == "row" else 1)
    assert {bar.get_ylabel() for bar in found} == {words}
    rendered(figure)


# Scores and titles


def captions(axes, columns):
    return [[row[c].get_xlabel().split("\n") for c in columns] for row in axes]


@pytest.mark.parametrize(
    "scores",
    [
        [0.87654, -1234.56],
        (0.87654, -1234.56),
        np.array([0.87654, -1234.56], np.float32),
        torch.tensor([0.87654, -1234.56], dtype=torch.float64, requires_grad=True),
        [torch.tensor(0.87654), torch.tensor(-1234.56, requires_grad=True)],
    ],
    ids=["list", "tuple", "array", "tensor", "tensors"],
)
def test_scores_and_titles_are_written_on_their_sides(scores):
    words = {"scores": scores, "titles": ["a", "b"], "reference_titles": ["hit 1\nof 2", "hit 2"]}
    expected = [
        [["query", "a"], ["reference", "hit 1", "of 2", "score 0.8765"]],
        [["query", "b"], ["reference", "hit 2", "score -1235"]],
    ]
    figure, axes = pair(flat(1, 2), **words)
    assert captions(axes, (0, 2)) == expected
    assert captions(axes, (1, 3)) == [[["map of the query"], ["map of the reference"]]] * 2
    rendered(figure)
    _, axes = matched(**words)
    assert captions(axes, (0, 1)) == expected


@pytest.mark.parametrize("scores", [0.5, [0.5], np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), np.array(0.5)])
def test_the_score_of_one_pair_is_a_number_or_a_list_of_one(scores):
    _, axes = pair(flat(1), scores=scores)
    assert captions(axes, (0, 2)) == [[["query"], ["reference", "score 0.5"]]]


@pytest.mark.parametrize(("score", "words"), [(NAN, "nan"), (INF, "inf"), (0, "0"), (1, "1"), (1e-7, "1e-07")])
def test_any_score_is_written(score, words):
    _, axes = pair(flat(1), scores=[score])
    assert captions(axes, (2,)) == [[["reference", f"score {words}"]]]


@pytest.mark.parametrize(
    ("titles", "words"),
    [
        ([0, 1], ["0", "1"]),
        (np.array([3, 4]), ["3", "4"]),
        (torch.tensor([3, 4]), ["3", "4"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ({"a": 1, "b": 2}.keys(), ["a", "b"]),
        ([None, ""], [None, None]),
        ([0.5, None], ["0.5", None]),
    ],
    ids=repr,
)
def test_titles_may_be_labels_of_any_kind(titles, words):
    _, axes = pair(flat(1, 2), titles=titles, reference_titles=titles)
    expected = [[[side, *filter(None, [word])] for side in ("query", "reference")] for word in words]
    assert captions(axes, (0, 2)) == expected


@pytest.mark.parametrize(
    "draw", [lambda **o: pair(flat(1, 2), use_pyplot=True, **o), lambda **o: matched(use_pyplot=True, **o)]
)
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"scores": [0.5]}, ValueError, r"`scores` to be 2 numbers, one for each row, but got shape \(1,\)"),
        ({"scores": 0.5}, ValueError, r"`scores` to be 2 numbers.*\(1,\)"),
        ({"scores": torch.ones(2, 1)}, ValueError, r"`scores`.*\(2, 1\)"),
        ({"scores": ["0.5", "0.1"]}, TypeError, "`scores` to be 2 real numbers, but got list"),
        ({"scores": "ab"}, TypeError, "`scores` to be 2 real numbers, but got 'ab'"),
        ({"scores": [0.5, None]}, TypeError, "`scores` to be 2 real numbers"),
        ({"scores": [1j, 1]}, TypeError, "`scores` to be 2 real numbers"),
        ({"scores": [torch.ones(2), 1.0]}, TypeError, "`scores` to be 2 real numbers"),
        ({"titles": ["a"]}, ValueError, r"`titles` to be a list of 2, one for each row, but got \['a'\]"),
        ({"reference_titles": ["a"]}, ValueError, r"`reference_titles` to be a list of 2, one for each row"),
        ({"reference_titles": "ab"}, ValueError, "`reference_titles` to be a list of 2"),
        ({"titles": 3}, ValueError, "`titles` to be a list of 2"),
        ({"titles": torch.tensor(3)}, ValueError, "`titles` to be a list of 2"),
    ],
    ids=str,
)
def test_other_scores_and_titles_are_refused_and_leave_no_figure(draw, options, error, said):
    with pytest.raises(error, match=said):
        draw(**options)
    assert not pyplot.get_fignums()
