"""The strongest mutual matches: found as a slow search finds them, and drawn where they are."""

import math

import numpy as np
import pytest
import torch
from encoders import PooledEncoder, random, seeded
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib import colormaps, pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.text import Annotation
from PIL import Image

from captum_fam import CorrespondenceMap, SimilarityDecomposition, visualize_matches
from captum_fam.matches import as_matrices, check_squares, strongest_matches

# What matplotlib or numpy warn of is an error here.
pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

NAN, INF = float("nan"), float("inf")
PHOTO = np.random.default_rng(0).integers(0, 256, (384, 512, 3)).astype(np.uint8)  # as large as images are drawn
APART = 3, 5  # a grid of which the places 0, 2, 4, 10, 12, 14 do not touch


@pytest.fixture(autouse=True)
def _closed():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def sparse(entries, one=APART, two=APART):
    """A matrix (h, w, h', w') that is zero but for the values of pairs of places."""
    values = torch.zeros(math.prod(one), math.prod(two), dtype=torch.float64)
    for (i, j), value in entries.items():
        values[i, j] = value
    return values.reshape(*one, *two)


def slowly(values, n):
    """The same, by the words of the description."""
    h, w, h2, w2 = values.shape
    matrix = values.reshape(h * w, h2 * w2)
    rows, columns = range(h * w), range(h2 * w2)

    def first_largest(i, j, others):
        value = matrix[i, j]
        return all(
            not np.isfinite(matrix[a, b]) or matrix[a, b] < value or (matrix[a, b] == value and (a, b) >= (i, j))
            for a, b in others
        )

    found = [
        (-matrix[i, j], i, j)
        for i in rows
        for j in columns
        if np.isfinite(matrix[i, j])
        and matrix[i, j] > 0
        and first_largest(i, j, [(i, b) for b in columns])
        and first_largest(i, j, [(a, j) for a in rows])
    ]
    kept = []
    for _, i, j in sorted(found):
        near = (
            (abs(i // w - a // w) <= 1 and abs(i % w - a % w) <= 1)
            or (abs(j // w2 - b // w2) <= 1 and abs(j % w2 - b % w2) <= 1)
            for a, b in kept
        )
        if not any(near):
            kept.append((i, j))
    return kept[:n]


sides = st.integers(1, 4)
matrices = st.tuples(sides, sides, sides, sides).flatmap(
    lambda shape: arrays(
        np.float64, shape, elements=st.one_of(st.integers(-2, 4).map(float), st.sampled_from([NAN, INF, -INF, 0.5]))
    )
)


# Which matches


@given(matrices, st.integers(1, 9))
def test_matches_are_those_of_a_slow_search(values, n):
    assert strongest_matches(torch.from_numpy(values), n) == slowly(values, n)


@given(st.permutations([0, 2, 4, 10, 12, 14]))
def test_a_permutation_is_found_exactly(permuted):
    pairs = list(zip([0, 2, 4, 10, 12, 14], permuted))
    values = sparse({pair: 6 - k for k, pair in enumerate(pairs)}) + 0.1
    assert strongest_matches(values, 6) == pairs
    assert strongest_matches(values, 100) == pairs
    assert strongest_matches(values, 4) == pairs[:4]
    assert strongest_matches(values.permute(2, 3, 0, 1), 6) == [(j, i) for i, j in pairs]


def test_a_place_that_is_liked_and_likes_another_has_no_match():
    assert strongest_matches(sparse({(0, 4): 2, (14, 4): 3}), 8) == [(14, 4)]  # the column's largest is another
    assert strongest_matches(sparse({(0, 4): 2, (0, 14): 3}), 8) == [(0, 14)]  # the row's


@pytest.mark.parametrize(
    ("other", "kept"), [(1, False), (5, False), (6, False), (2, True), (7, True), (10, True), (4, True)]
)
def test_of_matches_that_touch_on_either_side_the_stronger_is_kept(other, kept):
    """Beside, below and across the corner of place 0, in a grid of 5 columns."""
    assert strongest_matches(sparse({(0, 0): 2, (other, 14): 1}), 8) == [(0, 0)] + [(other, 14)] * kept
    assert strongest_matches(sparse({(0, 0): 2, (14, other): 1}), 8) == [(0, 0)] + [(14, other)] * kept


def test_ends_of_rows_are_no_neighbours():
    """Places 4 and 5 follow each other, at the end of one row and the beginning of the next."""
    assert strongest_matches(sparse({(4, 0): 2, (5, 14): 1}), 8) == [(4, 0), (5, 14)]


def test_a_match_that_was_left_out_leaves_none_out_itself():
    """Of a chain of three neighbours the first and the last are kept, and fill n."""
    values = sparse({(0, 10): 3, (1, 12): 2, (2, 14): 1})
    assert strongest_matches(values, 2) == [(0, 10), (2, 14)]


def test_of_equal_values_the_first_counts():
    assert strongest_matches(torch.ones(2, 3, 3, 2), 8) == [(0, 0)]
    assert strongest_matches(sparse({(0, 2): 1, (0, 4): 1, (14, 2): 1}), 8) == [(0, 2)]
    assert strongest_matches(sparse({(12, 0): 1, (0, 4): 1, (4, 12): 1}), 2) == [(0, 4), (4, 12)]


def test_many_equal_values_come_in_the_order_of_their_places():
    """Of two sizes, in turn, so that they must be sorted; places p and p + 2 do not touch."""
    places = range(0, 200, 2)
    values = sparse({(p, p): 1 + p // 2 % 2 for p in places}, (1, 200), (1, 200))
    assert strongest_matches(values, 200) == [(p, p) for size in (1, 0) for p in places if p // 2 % 2 == size]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_matches_nothing_and_hides_nothing(bad):
    values = sparse({(0, 4): 1, (0, 2): bad, (12, 4): bad})
    assert strongest_matches(values, 8) == [(0, 4)]
    assert strongest_matches(torch.full((2, 2, 2, 2), bad), 8) == []


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0])
def test_only_positive_values_match(value):
    assert strongest_matches(torch.full((2, 3, 2, 3), value), 8) == []
    assert strongest_matches(torch.full((1, 1, 1, 1), 1e-300, dtype=torch.float64), 8) == [(0, 0)]


# What is given


@pytest.mark.parametrize("make", [lambda m: m, lambda m: m.numpy(), lambda m: m.numpy()[::-1, ::-1][::-1, ::-1]])
@pytest.mark.parametrize(
    ("given_shape", "shape"),
    [
        ((6, 15), None),
        ((4, 9), (1, 2, 2, 3, 3)),
        ((5, 9, 4), (5, 3, 3, 2, 2)),
        ((1, 1), (1, 1, 1, 1, 1)),
        ((2, 3, 5, 1), (1, 2, 3, 5, 1)),
        ((2, 2, 3, 1, 4), (2, 2, 3, 1, 4)),
    ],
)
def test_matrices_are_told_by_their_shape(make, given_shape, shape):
    matrix = torch.arange(math.prod(given_shape)).reshape(given_shape)
    if shape is None:
        with pytest.raises(ValueError, match=r"`m` .*got shape \(6, 15\).*m\.reshape\(-1, h, w, h', w'\)"):
            as_matrices("m", make(matrix))
    else:
        found = as_matrices("m", make(matrix))
        assert [f.dtype for f in found] == [torch.float64] * shape[0]
        assert torch.stack(found).equal(matrix.reshape(shape).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.bool])
def test_matrices_of_any_real_dtype(dtype):
    matrix = torch.tensor([[1, 0], [0, 1]]).to(dtype)[None, :, None, :]
    assert as_matrices("m", matrix.requires_grad_(dtype.is_floating_point))[0].equal(matrix.detach().double())


@pytest.mark.parametrize(
    ("matrix", "error", "match"),
    [
        ([[1.0]], TypeError, "`matrix` to be a real tensor or array, but got list"),
        (None, TypeError, "`matrix` to be a real tensor or array, but got None"),
        (torch.ones(4, 4, dtype=torch.complex64), TypeError, "`matrix`.*complex64"),
        (np.array([["a"]]), TypeError, "`matrix`.*<U1"),
        (torch.ones(4), ValueError, r"`matrix`.*\(4,\)"),
        (torch.tensor(1.0), ValueError, r"`matrix`.*\(\)"),
        (torch.ones(2, 4, 5), ValueError, r"`matrix`.*\(B, N, N'\).*\(B, h, w, h', w'\).*got shape \(2, 4, 5\)"),
        (torch.ones(2, 5, 4), ValueError, r"`matrix`.*got shape \(2, 5, 4\)"),
        (torch.ones(0, 4, 4), ValueError, r"`matrix`.*\(0, 4, 4\)"),
        (torch.ones(4, 0), ValueError, r"`matrix`.*\(4, 0\)"),
        (torch.ones(2, 0, 2, 2), ValueError, r"`matrix`.*\(2, 0, 2, 2\)"),
        (torch.ones(1, 1, 2, 2, 2, 2), ValueError, r"`matrix`.*\(1, 1, 2, 2, 2, 2\)"),
    ],
)
def test_what_is_no_matrix_is_refused(matrix, error, match):
    with pytest.raises(error, match=match):
        visualize_matches(PHOTO, PHOTO, matrix)
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n": 0}, ValueError, "`n` to be a positive int, but got 0"),
        ({"n": 2.0}, TypeError, r"`n` to be a positive int, but got 2\.0"),
        ({"n": True}, TypeError, "`n`.*True"),
        ({"titles": "one"}, ValueError, "`titles` to be a list of 2"),
        ({"titles": ["one"]}, ValueError, "`titles` to be a list of 2"),
        ({"query": [PHOTO] * 3}, ValueError, "`query` to be one image or 2, one for each row, but got 3"),
        ({"reference": [PHOTO] * 3}, ValueError, "`reference` to be one image or 2, one for each row, but got 3"),
        ({"reference": "photo.png"}, TypeError, "`reference` to be a tensor, an array or a PIL image"),
        ({"mean": [0.5, 0.5]}, ValueError, "`mean` and `std`"),
    ],
)
def test_other_arguments_are_refused_and_leave_no_figure(options, error, match):
    with pytest.raises(error, match=match):
        visualize_matches(**{"query": PHOTO, "reference": PHOTO, "matrix": torch.ones(2, 4, 4), **options})
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("size", "places", "grid"),
    [
        ((64, 144), 36, "9 x 4"),
        ((144, 64), 36, "4 x 9"),
        ((1920, 1080), 576, "18 x 32"),
        ((100, 380), 64, "16 x 4"),
        ((2, 50), 25, "25 x 1"),
        ((64, 64), 36, None),
        ((640, 480), 196, None),
        ((600, 400), 576, None),
        ((230, 224), 49, None),
        ((64, 144), 1, None),
    ],
)
@pytest.mark.parametrize("side", ["query", "reference"])
def test_a_square_grid_is_not_taken_where_the_image_says_another(size, places, grid, side):
    """Places of 36 in an image of 64 x 144 are 9 x 4 of 16 pixels, as well as 6 x 6."""
    image, square = Image.new("RGB", size), Image.new("RGB", (32, 32))
    first = side == "query"
    matrix = torch.ones((places, 4) if first else (4, places))
    images = [[image], [square]] if first else [[square], [square, image]]
    if grid is None:
        check_squares("m", matrix, images)
        return
    with pytest.raises(ValueError, match=rf"grid of the {side}'s {places} places in `m`.*or {grid}, as.*Pass m"):
        check_squares("m", matrix, images)
    check_squares("m", matrix[None, :, None], images)
    if places == 36:
        with pytest.raises(ValueError, match=r"grid of the .* in `matrix`"):
            visualize_matches(images[0][0], images[1][-1], matrix)


# The figure


def draw(query=PHOTO, reference=PHOTO, matrix=None, n=8, **options):
    matrix = sparse({(0, 14): 2, (12, 2): 1}) if matrix is None else matrix
    return visualize_matches(query, reference, matrix, n, **{"use_pyplot": False, **options})


def boxes(axis):
    """(x, y, width, height) of each, as numbers of pixels from the image's corner."""
    return [tuple(np.round([b.get_x() + 0.5, b.get_y() + 0.5, b.get_width(), b.get_height()], 6)) for b in axis.patches]


def drawn(figure, kind):
    return [artist for artist in figure.artists if isinstance(artist, kind)]


def pixels(figure, dpi=100):
    """The figure as it is seen, (height, width, 3) in [0, 1], from below as matplotlib counts."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255


def turbo(share):
    return colormaps["turbo"](float(share))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_is_a_query_beside_its_reference(rows):
    images = [np.full((8, 8), value) for value in (0.0, 0.4, 1.0)][:rows]
    figure, axes = draw(images, images[::-1], torch.eye(4).expand(rows, 4, 4), titles=list("abc")[:rows], label="$cos$")
    assert isinstance(figure, Figure)
    assert axes.shape == (rows, 2)
    means = [[int(axis.images[0].get_array().mean()) for axis in row] for row in axes]
    assert means == [[a, b] for a, b in zip([0, 102, 255][:rows], [0, 102, 255][:rows][::-1])]
    assert [[axis.get_xlabel() for axis in row] for row in axes] == [[f"query\n{t}", "reference"] for t in "abc"[:rows]]
    (bar,) = set(figure.axes) - set(axes.flat)
    assert bar.get_ylabel() == "$cos$"
    assert not bar.yaxis.label.get_parse_math()


def test_pyplot_knows_of_the_figure_where_asked():
    draw()
    assert not pyplot.get_fignums()
    figure, _ = visualize_matches(PHOTO, PHOTO, torch.ones(4, 4))
    assert pyplot.get_fignums() == [figure.number]


def test_boxes_are_where_the_places_are():
    """Of a grid of 3 x 4 on an image of 384 x 512 pixels, and of 2 x 5 on one of 512 x 256."""
    matrix = sparse({(5, 0): 2, (3, 8): 1}, (3, 4), (2, 5))
    _, axes = draw(PHOTO, np.zeros((512, 256)), matrix)
    assert boxes(axes[0, 0]) == [(128, 128, 128, 128), (384, 0, 128, 128)]
    assert boxes(axes[0, 1]) == [(0, 0, 51.2, 256), (153.6, 256, 51.2, 256)]


def test_boxes_fit_images_of_any_size():
    """An image of 100 x 50 is drawn with 512 x 256 pixels, one of 10 x 1000 with 128 x 512."""
    matrix = sparse({(3, 3): 1}, (2, 2), (2, 2))
    _, axes = draw(np.zeros((100, 50)), np.zeros((10, 1000)), matrix)
    assert boxes(axes[0, 0]) == [(128, 256, 128, 256)]
    assert boxes(axes[0, 1]) == [(256, 64, 256, 64)]


def test_the_rest_of_the_images_is_dimmed_and_boxes_are_not():
    figure, axes = draw(np.zeros((300, 500)), np.zeros((300, 500)), sparse({(0, 14): 2, (12, 2): 1}))
    seen = pixels(figure)
    for axis, bright in zip(axes[0], ({0, 12}, {14, 2})):
        for place in {0, 2, 12, 14, 10, 4}:
            centre = np.array([place % 5 + 0.5, place // 5 + 0.6]) * [512 / 5, 307 / 3]  # below the line
            x, y = axis.transData.transform(centre).astype(int)
            assert seen[y, x] == pytest.approx(0 if place in bright else 0.65, abs=0.01)


def test_the_axes_are_as_large_as_the_images():
    _, axes = draw()
    assert {(axis.get_xlim(), axis.get_ylim()) for axis in axes.flat} == {((-0.5, 511.5), (383.5, -0.5))}


def test_there_is_room_for_lines_between_wide_images():
    figure, axes = draw(np.zeros((30, 120)), np.zeros((30, 120)))
    pixels(figure, dpi=30)
    one, two = (axis.get_position() for axis in axes[0])
    assert two.x0 - one.x1 > 0.15 * one.width


@pytest.mark.parametrize("size", [(60, 30), (30, 60)])
def test_images_are_in_the_middle_of_their_halves(size):
    figure, axes = draw(np.zeros(size), np.zeros(size))
    pixels(figure, dpi=30)
    for axis in axes.flat:
        half, image = axis.get_position(original=True), axis.get_position()
        assert (half.x0 + half.x1, half.y0 + half.y1) == pytest.approx((image.x0 + image.x1, image.y0 + image.y1))


def test_lines_join_the_boxes_of_their_number_at_the_sides_that_face():
    figure, axes = draw(matrix=sparse({(0, 14): 2, (12, 2): 1, (4, 10): 3}))
    lines = drawn(figure, ConnectionPatch)
    numbers = drawn(figure, Annotation)
    assert [n.get_text() for n in numbers] == ["1", "1", "2", "2", "3", "3"]
    pairs = [(4, 10), (0, 14), (12, 2)]  # strongest first
    width, height = 512 / 5, 384 / 3  # of a place
    for (i, j), line, one, two in zip(pairs, lines, numbers[::2], numbers[1::2], strict=True):
        (x, y), (u, v) = (i % 5, i // 5), (j % 5, j // 5)
        assert (line.axesA, line.axesB) == tuple(axes[0])
        assert line.xy1 == pytest.approx(((x + 1) * width - 0.5, (y + 0.5) * height - 0.5))
        assert line.xy2 == pytest.approx((u * width - 0.5, (v + 0.5) * height - 0.5))
        assert one.xy == pytest.approx((x * width - 0.5, y * height - 0.5))
        assert two.xy == pytest.approx(((u + 1) * width - 0.5, v * height - 0.5))
        assert one.get_zorder() > line.get_zorder()
        assert two.get_zorder() > line.get_zorder()


def test_lines_are_seen_between_the_images_in_their_colour():
    figure, axes = draw(matrix=sparse({(0, 4): 2, (10, 14): 1}))
    seen = pixels(figure, dpi=200)
    for axis_y, share in ((64, 1), (320, 0.5)):
        (left, y), (right, _) = (axis.transData.transform((x, axis_y)) for axis, x in zip(axes[0], (512, 0)))
        assert right - left > 50
        column = seen[int(y) - 4 : int(y) + 5, int(left + right) // 2]
        assert abs(column - turbo(share)[:3]).max(1).min() < 0.1
    assert seen[int(y) + 60, int(left + right) // 2] == pytest.approx(1)


def test_colours_are_by_value_on_one_scale_from_zero():
    matrix = torch.stack([sparse({(0, 14): 4, (12, 2): 1}), sparse({(4, 10): 2, (0, 0): 3, (14, 14): -9})])
    figure, axes = draw(matrix=matrix)
    shares = [1, 0.25, 0.75, 0.5]
    assert [p.get_edgecolor() for p in drawn(figure, ConnectionPatch)] == [turbo(s) for s in shares]
    for axis in axes.T:
        assert [p.get_edgecolor() for row in axis for p in row.patches] == [turbo(s) for s in shares]
    edges = [n.get_bbox_patch().get_edgecolor() for n in drawn(figure, Annotation)]
    assert edges == [turbo(s) for s in shares for _ in range(2)]
    assert figure.axes[-1].get_ylim() == (0, 4)


@pytest.mark.parametrize("size", [(60, 60), (60, 240), (240, 60)])
@pytest.mark.parametrize("rows", [1, 2])
def test_numbers_are_inside_the_figure_and_beside_their_boxes(size, rows):
    """Of boxes in all corners, numbers of two digits too."""
    places = [y * 7 + x for y in range(0, 7, 2) for x in range(0, 7, 2)]
    matrix = sparse({(p, p): 20 - k for k, p in enumerate(places)}, (7, 7), (7, 7)).expand(rows, 7, 7, 7, 7)
    figure, axes = draw(np.zeros(size), np.zeros(size), matrix, 16)
    pixels(figure)
    numbers = drawn(figure, Annotation)
    assert len(numbers) == 32 * rows
    for number in numbers:
        ground = number.get_bbox_patch().get_window_extent()
        assert figure.bbox.x0 <= ground.x0 < ground.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= ground.y0 < ground.y1 <= figure.bbox.y1
    first = numbers[0].get_bbox_patch().get_window_extent()
    box = axes[0, 0].patches[0].get_window_extent()
    middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    assert first.x1 < middle[0]
    assert first.y0 > middle[1]


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.zeros(4, 4), ["(no mutual matches)"]),
        (-torch.eye(4), ["(no mutual matches)"]),
        (torch.full((4, 4), NAN), ["(16 of 16 values are not finite)", "(no mutual matches)"]),
        (torch.eye(4).index_fill(0, torch.tensor(3), INF), ["(4 of 16 values are not finite)"]),
        (torch.eye(4), []),
    ],
)
def test_what_is_missing_is_said_under_the_images(matrix, said):
    figure, axes = draw(matrix=torch.stack([matrix, torch.eye(4)]))
    assert [axis.get_xlabel().split("\n") for axis in axes[0]] == [["query", *said], ["reference", *said]]
    assert [axis.get_xlabel() for axis in axes[1]] == ["query", "reference"]
    assert len(axes[0, 0].patches) == ("(no mutual matches)" not in said)
    pixels(figure, dpi=30)


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-300, 1e-30, 1e30])
def test_values_of_any_size_are_drawn(value):
    figure, axes = draw(matrix=torch.full((4, 4), value, dtype=torch.float64))
    assert len(axes[0, 0].patches) == (value > 0)
    pixels(figure, dpi=30)


@pytest.mark.parametrize(("value", "limit"), [(0, 1), (-3, 1), (1e-30, 1e-30), (1e30, 1e30)])
def test_the_scale_goes_to_the_strongest_match_or_to_one(value, limit):
    figure, _ = draw(matrix=torch.full((4, 4), value, dtype=torch.float64))
    assert figure.axes[-1].get_ylim() == pytest.approx((0, limit), abs=0)


def test_matrices_of_both_methods_are_drawn_and_a_reference_is_shared():
    encoder = seeded(PooledEncoder)
    x, s = random(2, 3, 8, 8), random(1, 3, 8, 8, seed=2)
    for method in (SimilarityDecomposition, CorrespondenceMap):
        matrix = method(encoder, encoder.layer).attribute_matrix(x, s)
        _, axes = draw(x.sigmoid(), s[0].sigmoid(), matrix, 1)
        side = math.isqrt(matrix.shape[1])
        for values, row in zip(matrix, axes):
            i, j = divmod(int(values.argmax()), side * side)
            for place, axis in zip((i, j), row):
                assert boxes(axis) == [
                    pytest.approx((place % side * 512 / side, place // side * 512 / side, 512 / side, 512 / side))
                ]
