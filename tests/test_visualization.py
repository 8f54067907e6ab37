"""Figures of maps: what is drawn, read back from their axes, and what is said where there is little to see."""

import io
import itertools
import os
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import HeadEncoder, random, seeded
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from PIL.Image import MODES as MODES_OF_PILLOW

from captum_fam import SimilarityScore, compare_attributions, visualize_comparison, visualize_pair
from captum_fam.images import read_image

# What matplotlib or numpy warn of is an error here.
pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

NAN, INF = float("nan"), float("inf")
PHOTO = np.random.default_rng(0).integers(0, 256, (384, 512, 3)).astype(np.uint8)  # as large as images are drawn
GRAY = PHOTO[..., 0]
MAP = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) + 0.1
SIGNED = MAP - 0.6


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    """Figures are for no display, none is left open, and none is shown."""
    monkeypatch.setattr(pyplot, "show", lambda *_, **__: pytest.fail("shown"))
    monkeypatch.setattr(Figure, "show", lambda *_, **__: pytest.fail("shown"))
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def pair(query=PHOTO, query_map=MAP, reference=PHOTO, reference_map=MAP, **options):
    return visualize_pair(query, reference, query_map, reference_map, **{"use_pyplot": False, **options})


def comparison(images=PHOTO, attributions=None, **options):
    return visualize_comparison(images, attributions or {"one": MAP}, **{"use_pyplot": False, **options})


def rendered(figure, dpi=60):
    """The pixels of the figure, (height, width, 3) in [0, 1]."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return np.asarray(Image.open(file).convert("RGB")) / 255


def photo(axis):
    return np.asarray(axis.images[0].get_array())


def colours(axis):
    return np.asarray(axis.images[1].get_array())[..., :3]


def opacity(axis):
    return np.asarray(axis.images[1].get_array())[..., 3]


def enlarged(values, size=(384, 512)):
    return F.interpolate(values[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0].numpy()


DRAWINGS = {
    "pair": lambda image, values, **options: pair(image, values, **options),
    "comparison": lambda image, values, **options: comparison(image, {"one": values}, **options),
}
each_drawing = pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)


# The figure and its axes


@pytest.mark.parametrize("rows", [1, 3])
def test_a_pair_is_a_row_of_each_image_beside_its_map(rows):
    images, maps = torch.rand(rows, 3, 24, 32), torch.rand(rows, 1, 4, 5)
    figure, axes = pair(images, maps, images.flip(0), maps.flip(0))
    assert isinstance(figure, Figure)
    assert axes.shape == (rows, 4)
    assert all(isinstance(axis, Axes) for axis in axes.flat)
    assert [[len(axis.images) for axis in row] for row in axes] == [[1, 2, 1, 2]] * rows
    assert [axis.get_xlabel() for axis in axes[0]] == ["query", "map of the query", "reference", "map of the reference"]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("methods", [1, 4])
def test_a_comparison_is_a_row_for_each_image_and_a_column_for_each_method(rows, methods):
    maps = {f"method {i}": torch.rand(rows, 1, 5, 6) for i in range(methods)}
    figure, axes = comparison(torch.rand(rows, 3, 24, 32), maps, titles=[f"title {i}" for i in range(rows)])
    assert isinstance(figure, Figure)
    assert axes.shape == (rows, 1 + methods)
    assert [[len(axis.images) for axis in row] for row in axes] == [[1, *[2] * methods]] * rows
    assert [axis.get_title() for axis in axes[0, 1:]] == list(maps)
    assert [axis.get_xlabel() for axis in axes[:, 0]] == [f"title {i}" for i in range(rows)]


def test_each_map_is_in_its_row_and_column():
    def spot(place):
        return (
            F.one_hot(torch.tensor(place), 4).float().reshape(1, 2, 2).repeat_interleave(8, 1).repeat_interleave(8, 2)
        )

    def found(axis):
        strongest = opacity(axis)[[100, 100, -100, -100], [100, -100, 100, -100]]
        return int(strongest.argmax()) if strongest.max() > 0.5 else None

    image = np.zeros((512, 512))
    maps = {"a": torch.cat([spot(0), spot(1)]), "b": torch.cat([spot(2), spot(3)])}
    _, axes = comparison(image, maps)
    assert [[found(axis) for axis in row[1:]] for row in axes] == [[0, 2], [1, 3]]
    _, axes = pair(image, maps["a"], image, maps["b"])
    assert [[found(row[1]), found(row[3])] for row in axes] == [[0, 2], [1, 3]]


def test_each_image_is_in_its_row_and_below_its_maps():
    images = [np.full((8, 8), value) for value in (0.0, 0.4, 1.0)]
    _, axes = comparison(images, {"one": torch.rand(3, 4, 4)})
    assert [[int(photo(axis).mean()) for axis in row] for row in axes] == [[0, 0], [102, 102], [255, 255]]
    _, axes = pair(images, torch.rand(3, 4, 4), images[::-1], torch.rand(3, 4, 4))
    expected = [[0, 0, 255, 255], [102, 102, 102, 102], [255, 255, 0, 0]]
    assert [[int(photo(axis).mean()) for axis in row] for row in axes] == expected


@pytest.mark.parametrize("use_pyplot", [False, True])
def test_only_pyplot_knows_of_a_figure_that_it_made(use_pyplot):
    assert not pyplot.get_fignums()
    first, _ = pair(use_pyplot=use_pyplot)
    second, _ = comparison(use_pyplot=use_pyplot)
    assert pyplot.get_fignums() == ([first.number, second.number] if use_pyplot else [])


def test_pyplot_is_the_default_and_a_refusal_leaves_no_figure_in_it():
    visualize_pair(PHOTO, PHOTO, MAP, MAP)
    visualize_comparison(PHOTO, {"one": MAP})
    assert len(pyplot.get_fignums()) == 2
    with pytest.raises(ValueError, match="titles"):
        visualize_pair(PHOTO, PHOTO, MAP, MAP, titles=[])
    with pytest.raises(ValueError, match="images"):
        visualize_comparison([], {"one": MAP})
    assert len(pyplot.get_fignums()) == 2


def test_figures_are_made_and_saved_without_a_display(tmp_path):
    script = (
        "import torch, sys\n"
        "from captum_fam import visualize_comparison, visualize_pair\n"
        "image, maps = torch.rand(3, 16, 16), torch.rand(4, 4)\n"
        "for i, use_pyplot in enumerate((True, False)):\n"
        "    visualize_pair(image, image, maps, maps, use_pyplot=use_pyplot)[0].savefig(f'pair{i}.png')\n"
        "    visualize_comparison(image, {'m': maps}, use_pyplot=use_pyplot)[0].savefig(f'comparison{i}.png')\n"
    )
    unset = ("MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    root = os.path.dirname(os.path.dirname(sys.modules["captum_fam"].__file__))
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{kind}{i}.png" for kind in ("comparison", "pair") for i in (0, 1)
    ]


# Images are drawn as they are

RGBA = np.dstack([PHOTO, GRAY[::-1]])
CHW = torch.from_numpy(PHOTO).permute(2, 0, 1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = {
    "a tensor (C, H, W)": (CHW / 255, PHOTO),
    "a contiguous tensor (C, H, W)": ((CHW / 255).contiguous(), PHOTO),
    "a tensor (C, H, W) of doubles": (CHW.double() / 255, PHOTO),
    "a tensor (C, H, W) of bytes": (CHW, PHOTO),
    "a tensor (H, W, C)": (torch.from_numpy(PHOTO) / 255, PHOTO),
    "a tensor that requires gradients": ((CHW / 255).requires_grad_(), PHOTO),
    "an array (H, W, C)": (PHOTO / 255, PHOTO),
    "an array (H, W, C) of bytes": (PHOTO, PHOTO),
    "an array (C, H, W)": (PHOTO.transpose(2, 0, 1) / 255, PHOTO),
    "an array (C, H, W) of bytes": (PHOTO.transpose(2, 0, 1), PHOTO),
    "an array with negative strides": (PHOTO[::-1, ::-1] / 255, PHOTO[::-1, ::-1]),
    "an array that is read-only": (
        np.broadcast_to(PHOTO[:1] / 255, PHOTO.shape),
        np.broadcast_to(PHOTO[:1], PHOTO.shape),
    ),
    "an array of integers": (PHOTO.astype(np.int64), PHOTO),
    "a PIL image": (Image.fromarray(PHOTO), PHOTO),
    "a gray PIL image": (Image.fromarray(GRAY), np.dstack([GRAY] * 3)),
    "a PIL image with opacity": (Image.fromarray(RGBA), PHOTO),
    "a gray tensor (H, W)": (torch.from_numpy(GRAY) / 255, np.dstack([GRAY] * 3)),
    "a gray tensor (1, H, W)": (torch.from_numpy(GRAY)[None] / 255, np.dstack([GRAY] * 3)),
    "a gray array (H, W)": (GRAY / 255, np.dstack([GRAY] * 3)),
    "a gray array (H, W, 1)": (GRAY[..., None], np.dstack([GRAY] * 3)),
    "a binary array": (GRAY > 99, np.dstack([255 * (GRAY > 99)] * 3)),
    "four channels (C, H, W)": (torch.from_numpy(RGBA).permute(2, 0, 1) / 255, PHOTO),
    "four channels (H, W, C)": (RGBA, PHOTO),
}


@each_drawing
@pytest.mark.parametrize(("image", "expected"), IMAGES.values(), ids=IMAGES)
def test_an_image_is_drawn_with_its_own_pixels(draw, image, expected):
    _, axes = draw(image, MAP)
    assert np.array_equal(photo(axes[0, 0]), expected)


def test_below_its_map_an_image_is_gray():
    _, axes = comparison(PHOTO)
    assert np.array_equal(photo(axes[0, 1]), np.asarray(Image.fromarray(PHOTO).convert("L")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_drawn_to_its_rounding(dtype):
    _, axes = comparison((CHW / 255).to(dtype), {"one": MAP.to(dtype)})
    assert np.abs(photo(axes[0, 0]).astype(int) - PHOTO).max() <= 1
    assert opacity(axes[0, 1]).max() > 0.5


NORMALISED = (PHOTO / 255 - MEAN) / STD


@pytest.mark.parametrize("as_sequence", [tuple, list, np.array, torch.tensor], ids=["tuple", "list", "array", "tensor"])
@pytest.mark.parametrize(
    "image",
    [NORMALISED, NORMALISED.transpose(2, 0, 1), torch.from_numpy(NORMALISED).permute(2, 0, 1).float()],
    ids=["array (H, W, C)", "array (C, H, W)", "tensor (C, H, W)"],
)
@each_drawing
def test_a_normalisation_is_undone_to_within_a_level(draw, image, as_sequence):
    _, axes = draw(image, MAP, mean=as_sequence(MEAN), std=as_sequence(STD))
    assert np.abs(photo(axes[0, 0]).astype(int) - PHOTO).max() <= 1


@pytest.mark.parametrize(
    ("image", "options"),
    [(PHOTO / 255 - MEAN, {"mean": MEAN}), (PHOTO / 255 / 2, {"std": (2, 2, 2)}), (GRAY / 255 - 0.5, {"mean": [0.5]})],
    ids=["mean", "std", "gray"],
)
def test_a_mean_or_a_standard_deviation_may_come_alone(image, options):
    _, axes = comparison(image, **options)
    expected = PHOTO if image.ndim == 3 else np.dstack([GRAY] * 3)
    assert np.abs(photo(axes[0, 0]).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("image", "options"),
    [(PHOTO, {"mean": (0, 0)}), (PHOTO, {"std": (1, 1, 1, 1)}), (GRAY, {"mean": MEAN, "std": STD})],
    ids=["two", "four", "three for one"],
)
def test_a_normalisation_of_other_channels_is_refused(image, options):
    with pytest.raises(ValueError, match=r"`mean` and `std`.*channels"):
        comparison(image / 255, **options)


@pytest.mark.parametrize("shape", [(3, 3, 3), (3, 5, 3), (4, 4, 3), (1, 3, 4), (3, 2, 1)], ids=str)
def test_where_both_ends_could_be_channels_tensors_have_them_first_and_arrays_last(shape):
    values = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)

    def expected(pixels):
        pixels = np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels[..., :3]
        height, width = (round(n * 512 / max(pixels.shape[:2])) for n in pixels.shape[:2])
        return np.asarray(Image.fromarray(pixels).resize((width, height)))

    _, axes = pair(torch.from_numpy(values), MAP, values, MAP)
    assert np.array_equal(photo(axes[0, 0]), expected(values.transpose(1, 2, 0)))
    assert np.array_equal(photo(axes[0, 2]), expected(values))


def test_a_batch_may_be_a_tensor_an_array_or_a_list_of_anything():
    photos = [PHOTO, PHOTO[::-1].copy(), np.full_like(PHOTO, 7)]
    for batch in (
        torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2) / 255,
        np.stack(photos),
        tuple(photos),
        [photos[0] / 255, Image.fromarray(photos[1]), torch.from_numpy(photos[2]).permute(2, 0, 1)],
    ):
        _, axes = comparison(batch, {"one": MAP.expand(3, 1, -1, -1)})
        for row, expected in zip(axes, photos):
            assert np.array_equal(photo(row[0]), expected)


@pytest.mark.parametrize("single", [PHOTO, PHOTO[None], [PHOTO], CHW[None]], ids=["image", "array", "list", "tensor"])
def test_one_image_is_drawn_in_every_row(single):
    _, axes = comparison(single, {"one": MAP.expand(3, -1, -1)})
    assert all(np.array_equal(photo(row[0]), PHOTO) for row in axes)
    _, axes = pair(single, MAP.expand(3, -1, -1), [GRAY, PHOTO, GRAY], MAP.expand(3, -1, -1))
    assert all(np.array_equal(photo(row[0]), PHOTO) for row in axes)
    assert np.array_equal(photo(axes[1, 2]), PHOTO)


@pytest.mark.parametrize(("width", "height"), [(700, 3), (3, 700), (1, 1), (2, 2), (1, 40), (1600, 900)])
def test_an_image_of_any_size_keeps_its_proportions_up_to_four_to_one(width, height):
    image = np.zeros((height, width, 3))
    figure, axes = pair(image, MAP)
    drawn = photo(axes[0, 0]).shape[:2]
    ratio = min(max(width / height, 1 / 4), 4)
    assert max(drawn) == 512
    assert drawn[1] / drawn[0] == pytest.approx(ratio, rel=0.01)
    assert opacity(axes[0, 1]).shape == drawn
    rendered(figure)


@pytest.mark.parametrize("values", [(-2.0, 2.0), (0.0, 1.5), (-0.2, 1.0), (0.0, 255.0)], ids=str)
def test_an_image_that_is_not_from_0_to_1_is_stretched_with_a_warning(values):
    image = torch.linspace(*values, 384 * 512).reshape(1, 384, 512)
    said = rf"`query` has values from {values[0]:.3g} to {values[1]:.3g}.*mean and std"
    with pytest.warns(UserWarning, match=said) as warned:
        _, axes = pair(image, MAP)
    assert warned[0].filename == __file__
    drawn = photo(axes[0, 0])[..., 0]
    assert (drawn[0, 0], drawn[-1, -1]) == (0, 255)
    assert np.abs(drawn.ravel().astype(float) - np.linspace(0, 255, drawn.size)).max() <= 1


def test_rounding_beyond_0_and_1_is_no_reason_to_warn():
    _, axes = pair(torch.tensor([-0.004, 1.004]).reshape(1, 1, 2), MAP)
    assert (photo(axes[0, 0]).min(), photo(axes[0, 0]).max()) == (0, 255)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 7.0, -3.0, NAN, INF])
def test_a_constant_image_is_drawn(value):
    said = "no finite value" if not np.isfinite(value) else "stretched" if value in (7.0, -3.0) else None
    with pytest.warns(UserWarning, match=said) if said else io.StringIO():
        figure, axes = pair(np.full((8, 8, 3), value), MAP)
    assert len(np.unique(photo(axes[0, 0]))) == 1
    if 0 <= value <= 1:
        assert photo(axes[0, 0])[0, 0, 0] == round(value * 255)
    rendered(figure)


def test_pixels_that_are_not_finite_do_not_spoil_the_others():
    image = PHOTO / 255
    image[0, 0], image[0, 1], image[0, 2] = NAN, INF, -INF
    _, axes = pair(image, MAP)
    assert np.array_equal(photo(axes[0, 0])[1:], PHOTO[1:])


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(2, 8, 8),
        torch.rand(5, 8, 8),
        torch.rand(8),
        torch.rand(3, 0, 8),
        np.zeros((0, 8, 3)),
        np.zeros((8, 8, 2)),
    ],
    ids=lambda image: str(tuple(image.shape)),
)
@pytest.mark.parametrize("name", ["query", "reference", "images"])
def test_what_is_no_image_is_refused_by_its_name_and_shape(name, image):
    with pytest.raises(ValueError, match=f"`{name}`.*{re.escape(str(tuple(image.shape)))}"):
        pair(**{name: image}) if name != "images" else comparison(image)


@pytest.mark.parametrize("image", [None, 3, "photo.png", ["photo.png"]], ids=str)
@pytest.mark.parametrize("name", ["query", "reference", "images"])
def test_a_wrong_type_of_image_is_refused_by_its_name(name, image):
    with pytest.raises(TypeError, match=f"`{name}`"):
        pair(**{name: image}) if name != "images" else comparison(image)


# Maps: one colour scale

TURBO = matplotlib.colormaps["turbo"]


@each_drawing
@pytest.mark.parametrize(
    "values", [MAP, MAP.double(), MAP.numpy(), MAP[None, None], MAP[None].requires_grad_()], ids=str
)
def test_a_map_without_negative_values_is_sequential_and_as_opaque_as_the_root_of_its_value(draw, values):
    _, axes = draw(PHOTO, values)
    share = enlarged(MAP) / MAP.max().item()
    assert np.abs(colours(axes[0, 1]) - TURBO(share)[..., :3]).max() < 0.03
    top = opacity(axes[0, 1]).max() / np.sqrt(share.max())
    assert 0.5 < top < 1  # the image shines through
    np.testing.assert_allclose(opacity(axes[0, 1]), top * np.sqrt(share), atol=1e-4)


@each_drawing
def test_a_signed_map_is_red_for_positive_blue_for_negative_and_clear_at_zero(draw):
    values = torch.zeros(384, 512)
    values[:100], values[-100:] = 1.0, -0.5
    figure, axes = draw(np.full((384, 512), 0.5), values)
    rgb, alpha = colours(axes[0, 1]), opacity(axes[0, 1])
    assert (rgb[:100, :, 0] > rgb[:100, :, 2] + 0.5).all()
    assert (rgb[-100:, :, 2] > rgb[-100:, :, 0] + 0.5).all()
    assert (alpha[100:-100] == 0).all()
    np.testing.assert_allclose(alpha[:100], 2 * alpha[-100:].max(), rtol=1e-5)  # opacity carries the value
    assert alpha.max() < 1
    pixels = rendered(figure)
    box = axes[0, 1].get_window_extent()
    scale = 60 / figure.dpi
    x = int((box.x0 + box.x1) / 2 * scale)
    top, middle, bottom = (
        pixels[int(pixels.shape[0] - (box.y0 + share * (box.y1 - box.y0)) * scale), x] for share in (0.9, 0.5, 0.1)
    )
    assert top[0] > top[2] + 0.3
    assert np.ptp(middle) < 0.02
    assert bottom[2] > bottom[0] + 0.2


def test_equal_values_have_one_colour_and_opacity_in_all_panels_of_a_pair():
    two, mixed = torch.full((1, 4, 4), 2.0), torch.tensor([2.0, 2, 2, 5, 5, 5]).expand(1, 6, 6)
    for offset in (0.0, -9.0):  # sequential, and diverging
        low = torch.full((1, 4, 4), 1.0 + offset)
        _, axes = pair(PHOTO, torch.cat([two, low]), PHOTO, F.interpolate(torch.cat([mixed, mixed])[:, None], (4, 6)))
        for axis in (axes[0, 3], axes[1, 3]):
            np.testing.assert_allclose(colours(axis)[200, 10], colours(axes[0, 1])[200, 10], atol=1e-6)
            np.testing.assert_allclose(opacity(axis)[200, 10], opacity(axes[0, 1])[200, 10], atol=1e-6)
            assert opacity(axis)[200, -10] > opacity(axis)[200, 10]


def test_a_comparison_scales_each_method_by_its_own_largest_value():
    maps = torch.stack([MAP, MAP.flip(0) / 4])
    _, axes = comparison(PHOTO, {"small": maps, "large": 1000 * maps, "negative": -maps, "positive": maps * 1e-6})
    for row in axes:
        for column in (2, 4):
            np.testing.assert_allclose(opacity(row[column]), opacity(row[1]), atol=1e-5)
            np.testing.assert_allclose(colours(row[column]), colours(row[1]), atol=1e-6)
        np.testing.assert_allclose(opacity(row[3]), opacity(row[1]), atol=1e-5)
        assert (colours(row[3])[..., 2] > colours(row[3])[..., 0]).all()
    np.testing.assert_allclose(opacity(axes[1, 1]), opacity(axes[0, 1])[::-1] / 4, atol=1e-4)


def test_the_range_of_each_map_is_written_under_it_in_its_own_units():
    maps = {"a": torch.stack([MAP, 2 * MAP]), "b": torch.stack([-3000 * MAP, SIGNED])}
    _, axes = comparison(PHOTO, maps)
    for column, values in enumerate(maps.values(), 1):
        for row, value in zip(axes, values):
            low, high = map(float, row[column].get_xlabel().split("\n")[0].split(" to "))
            assert low == pytest.approx(value.min().item(), rel=0.06)
            assert high == pytest.approx(value.max().item(), rel=0.06)


@pytest.mark.parametrize(
    ("query_map", "reference_map", "limits"),
    [(MAP, 3 * MAP, (0, 3)), (MAP, -3 * MAP, (-3, 3)), (-MAP, MAP / 2, (-1, 1))],
    ids=["positive", "signed", "signed query"],
)
def test_the_colour_bar_shows_the_scale_of_a_pair(query_map, reference_map, limits):
    figure, axes = pair(PHOTO, query_map, PHOTO, reference_map, label="similarity")
    (bar,) = set(figure.axes) - set(axes.flat)
    assert bar.get_ylim() == pytest.approx(np.array(limits) * MAP.max().item())
    assert bar.get_ylabel() == "similarity"


@pytest.mark.parametrize(("values", "limits"), [(7 * MAP, (0, 1)), (7 * SIGNED, (-1, 1))], ids=["positive", "signed"])
def test_the_colour_bar_of_a_comparison_is_in_shares(values, limits):
    figure, axes = comparison(PHOTO, {"one": values, "two": MAP})
    (bar,) = set(figure.axes) - set(axes.flat)
    assert bar.get_ylim() == limits
    assert "share" in bar.get_ylabel()


def test_maps_of_one_figure_may_differ_in_size():
    _, axes = comparison(PHOTO, {"a": torch.rand(2, 1, 3, 5), "b": torch.rand(2, 40, 20), "c": np.ones((2, 1, 1, 1))})
    assert {opacity(axis).shape for axis in axes[:, 1:].flat} == {(384, 512)}


@pytest.mark.parametrize("place", [0, 1, 777, 2047])
def test_a_single_value_of_a_map_larger_than_the_picture_is_seen(place):
    values = torch.zeros(2048, 2048)
    values[place, place] = 1.0
    _, axes = pair(np.zeros((8, 8)), values)
    assert opacity(axes[0, 1]).max() > 0


def test_arguments_are_left_as_they_were():
    image, values = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4) - 0.5
    values[0, 0, 0, 0] = NAN
    kept = image.clone(), values.clone()
    pair(image, values, image.numpy(), values.numpy(), mean=(0, 0, 0), std=(1, 1, 1))
    comparison(image, {"one": values})
    torch.testing.assert_close((image, values), kept, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    "values",
    [
        MAP.numpy()[:, ::-1],
        np.broadcast_to(MAP.numpy(), (1, 6, 8)),
        MAP.mT,
        MAP[None].expand(1, 6, 8),
        MAP.half(),
        MAP > 0.5,
    ],
    ids=["negative strides", "read-only", "not contiguous", "expanded", "half", "binary"],
)
@each_drawing
def test_maps_may_be_any_tensor_or_array(draw, values):
    _, axes = draw(PHOTO, values)
    flat = torch.from_numpy(np.array(values)).float().reshape(-1, *values.shape[-2:])[0]
    assert opacity(axes[0, 1]).argmax() == enlarged(flat).argmax()


# What a map lacks is said under it

BROKEN = torch.tensor([[NAN, 1.0, 2.0, 3.0], [INF, 1.0, 2.0, 3.0], [-INF, 4.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
LACKING = {
    "zero": (torch.zeros(8, 8), ["zero"]),
    "constant": (torch.full((8, 8), 3.0), ["constant"]),
    "constant and negative": (torch.full((8, 8), -3.0), ["constant"]),
    "not finite in places": (BROKEN, ["3 of 16 values are not finite"]),
    "not finite anywhere": (torch.full((4, 4), NAN), ["no value is finite"]),
    "infinite": (torch.full((4, 4), INF), ["no value is finite"]),
    "negative infinite": (torch.full((4, 4), -INF), ["no value is finite"]),
    "1 x 1": (torch.ones(1, 1), ["constant", "1 x 1 locations"]),
    "2 x 2": (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ["2 x 2 locations"]),
    "2 x 2 and signed": (torch.tensor([[1.0, -2.0], [3.0, 4.0]]), ["2 x 2 locations"]),
    "1 x 9": (torch.arange(9.0)[None], ["1 x 9 locations"]),
    "1 x 1 and not finite": (torch.full((1, 1), NAN), ["no value is finite", "1 x 1 locations"]),
    "1 x 1 and zero": (torch.zeros(1, 1), ["zero", "1 x 1 locations"]),
    "tiny": (1e-30 * MAP, []),
    "tiny and signed": (1e-30 * SIGNED, []),
    "subnormal": (1e-41 * MAP, []),
    "huge": (1e38 * MAP, []),
    "huge and signed": (1e38 * SIGNED, []),
    "beyond single precision": (1e60 * MAP.double(), []),
    "below single precision": (1e-60 * MAP.double(), []),
    "ordinary": (MAP, []),
}


@pytest.mark.parametrize(("values", "said"), LACKING.values(), ids=LACKING)
@each_drawing
def test_what_a_map_lacks_is_said_under_it_and_nothing_else(draw, values, said):
    figure, axes = draw(PHOTO, values)
    rendered(figure)
    caption = axes[0, 1].get_xlabel()
    assert [words for words in said if words not in caption] == []
    lacks = ("zero", "constant", "finite", "locations")
    assert {word for word in lacks if word in caption} == {word for word in lacks if word in " ".join(said)}
    if draw is DRAWINGS["pair"]:
        assert axes[0, 3].get_xlabel() == "map of the reference"


@pytest.mark.parametrize("name", ["zero", "not finite anywhere"])
@each_drawing
def test_where_there_is_nothing_to_see_nothing_is_drawn(draw, name):
    _, axes = draw(PHOTO, LACKING[name][0])
    assert (opacity(axes[0, 1]) == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-41, 1e30])
@each_drawing
def test_the_size_of_values_changes_nothing_that_is_drawn(draw, scale):
    options = {"reference_map": scale * MAP} if draw is DRAWINGS["pair"] else {}
    _, ordinary = draw(PHOTO, SIGNED)
    _, scaled = draw(PHOTO, scale * SIGNED, **options)
    np.testing.assert_allclose(opacity(scaled[0, 1]), opacity(ordinary[0, 1]), atol=1e-3)
    seen = opacity(ordinary[0, 1]) > 0.01
    np.testing.assert_allclose(colours(scaled[0, 1])[seen], colours(ordinary[0, 1])[seen], atol=1e-3)


@each_drawing
def test_values_that_are_not_finite_do_not_spoil_the_others(draw):
    _, axes = draw(np.zeros((512, 512)), BROKEN)
    alpha = opacity(axes[0, 1])
    assert np.isfinite(alpha).all()
    assert alpha[32, 32] == 0
    assert 0 < alpha[32, 480] < 1


def test_an_odd_map_beside_others_leaves_their_scale():
    maps = {"zero": torch.zeros(4, 4), "nan": torch.full((4, 4), NAN), "one": torch.ones(1, 1), "map": MAP}
    figure, axes = comparison(PHOTO, maps)
    rendered(figure)
    _, alone = comparison(PHOTO, {"map": MAP})
    np.testing.assert_array_equal(opacity(axes[0, 4]), opacity(alone[0, 1]))
    assert [("zero" in a.get_xlabel(), "finite" in a.get_xlabel()) for a in axes[0, 1:]] == [
        (True, False),
        (False, True),
        (False, False),
        (False, False),
    ]


def test_a_map_with_values_that_are_not_finite_has_the_range_of_the_others():
    _, axes = comparison(PHOTO, {"one": torch.tensor([[NAN, 3.0, 4.0, 5.0]] * 4)})
    assert axes[0, 1].get_xlabel().startswith("3 to 5\n")


# Refusals


@pytest.mark.parametrize(
    "values",
    [
        torch.rand(1, 3, 4, 4),
        torch.rand(2, 2, 1, 4, 4),
        torch.rand(1, 1, 1, 1, 4, 4),
        torch.rand(4),
        torch.tensor(1.0),
        torch.rand(0, 1, 4, 4),
        torch.rand(1, 1, 0, 4),
    ],
    ids=lambda v: str(tuple(v.shape)),
)
@pytest.mark.parametrize("as_type", [torch.Tensor, torch.Tensor.numpy], ids=["tensor", "array"])
@pytest.mark.parametrize("name", ["query_map", "reference_map", "attributions"])
def test_what_is_no_map_is_refused_by_its_name(name, values, as_type):
    values = as_type(values) if as_type is not torch.Tensor else values
    with pytest.raises(ValueError, match=rf"`{name}.*\(B, 1, h, w\)"):
        pair(**{name: values}) if name != "attributions" else comparison(attributions={"mine": values})


@pytest.mark.parametrize("values", [["none"], "map", MAP * 1j], ids=["list", "text", "complex"])
@pytest.mark.parametrize("name", ["query_map", "reference_map", "attributions"])
def test_a_wrong_type_of_map_is_refused_by_its_name(name, values):
    with pytest.raises((TypeError, ValueError), match=f"`{name}"):
        pair(**{name: values}) if name != "attributions" else comparison(attributions={"mine": values})


@pytest.mark.parametrize("values", [SIGNED, MAP], ids=["signed", "positive"])
def test_a_reference_without_a_map_is_shown_beside_that_of_the_query(values):
    figure, axes = pair(query_map=values, reference_map=None, reference_titles=["a hit"], scores=[0.5])
    assert axes.shape == (1, 3)
    assert axes[0, 2].get_xlabel() == "reference\na hit\nscore 0.5"
    assert len(figure.axes) == 4
    _, other = pair(query_map=values, reference_map=values)
    np.testing.assert_array_equal(photo(axes[0, 2]), photo(other[0, 2]))
    drawn = [np.asarray(panel.images[-1].get_array()) for panel in (axes[0, 1], other[0, 1])]
    np.testing.assert_array_equal(*drawn)


TWO = MAP.expand(2, -1, -1)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: pair(reference_map=TWO), "`reference_map`.*1.*2"),
        (lambda: pair(query=[PHOTO] * 3, query_map=TWO, reference_map=TWO), "`query`.*2.*3"),
        (lambda: pair(reference=[PHOTO] * 2), "`reference`.*1.*2"),
        (lambda: pair(titles=["a", "b"]), "`titles`.*1"),
        (lambda: pair(titles="a"), "`titles`"),
        (lambda: comparison(attributions={"a": MAP, "b": TWO}), "`attributions`.*'a': 1.*'b': 2"),
        (lambda: comparison([PHOTO] * 3, {"a": TWO}), "`images`.*2.*3"),
        (lambda: comparison([], {"a": TWO}), "`images`.*2.*0"),
        (lambda: comparison(torch.rand(0, 3, 8, 8), {"a": TWO}), "`images`.*2.*0"),
        (lambda: comparison(titles=[]), "`titles`.*1"),
    ],
    ids=[
        "reference maps",
        "queries",
        "references",
        "titles",
        "text",
        "methods",
        "images",
        "none",
        "batch",
        "no titles",
    ],
)
def test_counts_that_do_not_match_are_refused_by_name(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()


@pytest.mark.parametrize("attributions", [{}, [MAP], MAP, None, "maps"], ids=["empty", "list", "map", "none", "text"])
def test_attributions_that_are_no_dict_of_maps_are_refused(attributions):
    with pytest.raises(TypeError, match="`attributions`"):
        visualize_comparison(PHOTO, attributions, use_pyplot=False)


# Words

ODD = [r"$\frac{$", "a_b^c \\ % # & {}", "x" * 70, "two\nlines", "  ", ""]


@pytest.mark.parametrize("text", ODD)
def test_any_words_are_drawn_as_they_are(text):
    figure, axes = pair(titles=[text])
    rendered(figure)
    assert text in axes[0, 0].get_xlabel()
    figure, axes = comparison(attributions={text: MAP}, titles=[text])
    rendered(figure)
    assert axes[0, 1].get_title() == text
    assert axes[0, 0].get_xlabel() == text


@pytest.mark.parametrize("label", ODD)
def test_any_label_of_the_scale_is_drawn(label):
    rendered(pair(label=label)[0])


def failing(reason, name="my method", rows=2):
    encoder = seeded(HeadEncoder)
    score = SimilarityScore(encoder, random(1, 4, seed=2))

    def broken(inputs, target):
        raise RuntimeError(reason)

    methods = {name: broken, "ok": "LayerGradCam"}
    with pytest.warns(UserWarning, match="has no map"):
        return compare_attributions(score, encoder.layer, random(rows, 3, 8, 8), methods=methods, show_progress=False)


@pytest.mark.parametrize("reason", ["no rule for $\\frac{ $ $", "a long reason " * 30, "unbroken" * 60, ""])
def test_methods_that_failed_are_written_at_the_foot_with_their_reasons(reason):
    maps = failing(reason, "my $method")
    figure, axes = comparison(PHOTO, maps)
    rendered(figure)
    assert axes.shape == (2, 2)
    (foot,) = [text.get_text() for text in figure.texts]
    said = f"my $method has no map: {maps.failures['my $method']}"
    assert "".join(foot.split()) == "".join(said.split())  # wrapped, perhaps within a long word
    assert figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() == foot)


def test_no_failures_leave_no_foot():
    figure, _ = comparison()
    assert [text.get_text() for text in figure.texts] == [""]


SQUARE, TALL = np.zeros((400, 400)), np.zeros((800, 100))
STRIPS = np.linspace(-1.234e-5, 1, 60).reshape(3, 1, 1, 20)
SIGNALS, TWO_BANDS = np.random.default_rng(0).normal(size=(1, 22, 1000)), SIGNED[:2, None]
VOLUME, CUBES = np.zeros((1, 4, 24, 40, 40)), SIGNED.reshape(1, 1, 3, 4, 4).repeat(2, 1, 1, 1, 1)
REASON = "a reason of some length, " * 8
NAMES = ["SimilarityDecomposition", "LabelFreeActivationMap", "FeatureActivationMap"]
ORDINARY = {
    "a pair": lambda: pair(titles=["a title of some length, 0.123"]),
    "a pair that lacks much": lambda: pair(query_map=torch.full((2, 2), NAN)),
    "a pair of square images": lambda: pair(SQUARE, SIGNED, SQUARE, SIGNED),
    "a pair of tall images": lambda: pair(TALL, SIGNED, TALL, SIGNED),
    "rows of tall images that lack much": lambda: pair(TALL, STRIPS, TALL, STRIPS, scores=[0.5, 0.1, 0.2]),
    "rows of methods of tall images": lambda: comparison(TALL, dict.fromkeys(NAMES, STRIPS)),
    "mixed up signals": lambda: pair(
        SIGNALS.transpose(0, 2, 1), SIGNED[:1, None], SIGNALS.transpose(0, 2, 1) * NAN, SIGNED[:1, None]
    ),
    "a row of methods": lambda: comparison(PHOTO, dict.fromkeys(NAMES, MAP), titles=["query: photo.png\ncosine 0.5"]),
    "a grid": lambda: comparison(PHOTO, dict.fromkeys(NAMES, torch.stack([MAP, SIGNED]))),
    "a row and a failure": lambda: comparison(PHOTO, failing(REASON, rows=1), titles=["query: photo.png\ncosine 0.5"]),
    "a pair with scores and titles": lambda: pair(scores=[0.5], titles=["query 12"], reference_titles=["a/photo.png"]),
    "a pair up to a percentile": lambda: pair(SQUARE, SIGNED, SQUARE, SIGNED, scale=90),
    "signals": lambda: pair(SIGNALS, SIGNED[:1, None], SIGNALS, SIGNED[:1, None], scores=[0.5], reference_titles=["a"]),
    "signals in rows": lambda: pair(SIGNALS, TWO_BANDS, SIGNALS, TWO_BANDS, scale="row", titles=["a", "b"]),
    "volumes": lambda: pair(VOLUME, CUBES, VOLUME, CUBES, scores=[0.5, 0.25], titles=["a", "b"]),
    "rows of their own scales": lambda: pair(SQUARE, TWO, SQUARE, -TWO, scale="row"),
    "a grid of shares": lambda: comparison(PHOTO, dict.fromkeys(NAMES, torch.stack([MAP, SIGNED])), scale=90),
    "a grid and a failure": lambda: comparison(PHOTO, failing(REASON), titles=["query: photo.png\ncosine 0.5", "b"]),
}


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_words_of_ordinary_length_are_in_the_figure_and_do_not_overlap(make):
    figure, axes = make()
    figure.draw_without_rendering()
    words = [*figure.texts, *(text for axis in axes.flat for text in (axis.title, axis.xaxis.label))]
    boxes = [(text.get_text(), text.get_window_extent()) for text in words if text.get_text()]
    for bar in set(figure.axes) - set(axes.flat):
        boxes += [("the colour bar", bar.get_window_extent()), ("its label", bar.yaxis.label.get_window_extent())]
    margin = 8  # pixels of 290 or more: what the box around a line has above and below its letters
    (left, bottom), (right, top) = figure.bbox.min - margin, figure.bbox.max + margin
    outside = [w for w, box in boxes if box.x0 < left or box.x1 > right or box.y0 < bottom or box.y1 > top]
    assert outside == []

    def overlap(one, other):
        return all(min(one.max[i], other.max[i]) - max(one.min[i], other.min[i]) > 2 for i in (0, 1))

    pairs = itertools.combinations(boxes, 2)
    assert [(one, other) for (one, box), (other, another) in pairs if overlap(box, another)] == []


def test_figures_are_saved_in_every_format(tmp_path):
    figure, _ = comparison(PHOTO, {"signed": SIGNED, "zero": torch.zeros(3, 3)})
    for suffix in ("png", "pdf", "svg"):
        figure.savefig(tmp_path / f"figure.{suffix}")
        assert (tmp_path / f"figure.{suffix}").stat().st_size > 5000


def test_an_image_of_bytes_was_never_normalised():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    _, axes = comparison(pixels, mean=[0.5] * 3, std=[0.2] * 3)
    _, plain = comparison(pixels)
    np.testing.assert_array_equal(axes[0, 0].images[0].get_array(), plain[0, 0].images[0].get_array())


# Pictures of every kind: hand-computed means of what is drawn

HALVES = np.zeros((64, 64), bool)
HALVES[:, 32:] = True  # black and white, or the least and the largest value: its mean is 127.5
TONE = np.full((64, 64), 100, np.uint8)
COLOUR = np.dstack([np.full((64, 64), value, np.uint8) for value in (200, 100, 50)])
RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)  # its mean is half of the range


def palette(transparency=None):
    image = Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def of_mode(mode, like=COLOUR):
    return Image.fromarray(like).convert(mode)


def with_alpha(pixels, mode):
    """Half transparent: what it looks like on no ground at all is its own colour."""
    return Image.fromarray(np.dstack([pixels, np.full((64, 64), 128, np.uint8)])).convert(mode)


# Of each mode of Pillow a picture, the mean of each channel that is right, and how far a conversion may round.
MODES = {
    "1": (Image.fromarray(HALVES), (127.5,) * 3, 0),
    "L": (Image.fromarray(TONE), (100,) * 3, 0),
    "LA": (with_alpha(TONE, "LA"), (100,) * 3, 0),
    "La": (with_alpha(TONE, "LA").convert("La"), (100,) * 3, 1),
    "P": (palette(), (200, 100, 50), 0),
    "P with a transparent colour": (palette(0), (200, 100, 50), 0),
    "P with an opacity for each colour": (palette(bytes([128])), (200, 100, 50), 0),
    "PA": (palette().convert("PA"), (200, 100, 50), 4),  # Pillow puts it in its web palette
    "RGB": (Image.fromarray(COLOUR), (200, 100, 50), 0),
    "RGBX": (of_mode("RGBX"), (200, 100, 50), 0),
    "RGBA": (with_alpha(COLOUR, "RGBA"), (200, 100, 50), 0),
    "RGBa": (with_alpha(COLOUR, "RGBA").convert("RGBa"), (200, 100, 50), 1),
    "CMYK": (of_mode("CMYK"), (200, 100, 50), 0),
    "YCbCr": (of_mode("YCbCr"), (200, 100, 50), 2),
    "HSV": (of_mode("HSV"), (200, 100, 50), 2),
    "LAB": (of_mode("LAB"), (200, 100, 50), 2),
    "I;16": (Image.fromarray(RAMP.astype(np.uint16)), (127.5,) * 3, 0.5),
    "I;16B": (Image.fromarray(RAMP.astype(">u2")), (127.5,) * 3, 0.5),
    "I;16L": (Image.new("I;16L", (64, 64), 25700), (100,) * 3, 0),
    "I;16N": (Image.new("I;16N", (64, 64), 25700), (100,) * 3, 0),
    "I": (Image.fromarray(RAMP.astype(np.int32)), (127.5,) * 3, 0.5),
    "I, all black": (Image.new("I", (64, 64), 0), (0,) * 3, 0),
    "F": (Image.fromarray((RAMP / 65535).astype(np.float32)), (127.5,) * 3, 0.5),
    "F, with what is not finite": (Image.fromarray(np.where(HALVES, 0.4, NAN).astype(np.float32)), (51,) * 3, 0.1),
}


@pytest.mark.parametrize(("image", "expected", "rounding"), MODES.values(), ids=MODES)
def test_a_picture_of_any_mode_is_drawn_right(image, expected, rounding):
    _, axes = DRAWINGS["pair"](image, MAP)
    means = photo(axes[0, 0]).mean((0, 1))
    np.testing.assert_allclose(means, expected, atol=rounding + 1e-9)
    gray = float(np.dot(means, (0.299, 0.587, 0.114)))  # below its map
    assert photo(axes[0, 1]).mean() == pytest.approx(gray, abs=1)


def test_every_mode_of_pillow_is_drawn_above():
    assert set(MODES_OF_PILLOW) - {"BGR;15", "BGR;16", "BGR;24"} <= {image.mode for image, _, _ in MODES.values()}


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("name", ["I;16", "I", "F", "L", "1", "P with an opacity for each colour", "LAB", "CMYK"])
def test_the_command_line_reads_the_same_pixels(tmp_path, suffix, name):
    image = MODES[name][0]
    if suffix == "png" and name in ("I", "F", "LAB", "CMYK"):
        pytest.skip("PNG has no such mode")
    image.save(tmp_path / f"picture.{suffix}")
    _, axes = pair(image, MAP)
    read = np.asarray(read_image(tmp_path / f"picture.{suffix}").resize((512, 512)))
    np.testing.assert_array_equal(photo(axes[0, 0]), read)


UNKNOWN = {
    "I above 16 bits": (np.int32, [0, 65536]),
    "I below 0": (np.int32, [-1, 65535]),
    "I that may be of 8 bits": (np.int32, [0, 255]),
    "F above 1": (np.float32, [0, 1.5]),
    "F below 0": (np.float32, [-0.5, 1]),
    "F of 8 bits": (np.float32, [0, 255]),
}


@pytest.mark.parametrize(("dtype", "values"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_picture_of_no_known_range_is_refused_with_what_to_pass(dtype, values):
    image = Image.fromarray(np.array([values], dtype))
    said = rf"mode {image.mode}.*values from {values[0]:g} to {values[1]:g}.*from 0 to 1"
    with pytest.raises(ValueError, match=said):
        DRAWINGS["pair"](image, MAP)


@pytest.mark.parametrize(("dtype", "values"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_file_of_no_known_range_is_refused_by_its_name(tmp_path, dtype, values):
    path = tmp_path / "picture.tiff"
    Image.fromarray(np.array([values], dtype)).save(path)
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))}.*values from {values[0]:g} to {values[1]:g}.*0 to 1"
    ):
        read_image(path)


@pytest.mark.parametrize("name", ["query", "reference", "images"])
def test_a_refused_picture_is_named(name):
    image = Image.new("F", (8, 8), 255)
    with pytest.raises(ValueError, match=f"`{name}`"):
        pair(**{name: image}) if name != "images" else comparison(image)


class Kept(torch.Tensor):
    """Stays what it is in whatever is done with it."""


# What numbers from 0 to 1 are in every dtype: a share of the largest value that stands for white.
EVERY_DTYPE = {
    **{f"array of {d}": (1, d) for d in ("f2", "f4", "f8", ">f4", ">f8", "longdouble")},
    **{f"array of {d}": (255, d) for d in ("u1", "i2", "i4", "i8", "u4", "u8", ">i4")},
    **{f"array of {d}": (65535, d) for d in ("u2", ">u2")},
    **{f"tensor of {d}": (1, d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)},
    **{f"tensor of {d}": (255, d) for d in (torch.uint8, torch.int16, torch.int32, torch.int64)},
    "tensor of torch.uint16": (65535, torch.uint16),
}


@pytest.mark.parametrize(("white", "dtype"), EVERY_DTYPE.values(), ids=EVERY_DTYPE)
def test_numbers_of_any_dtype_are_drawn_from_black_to_white(white, dtype):
    def given(shares):
        numbers = np.asarray(shares, np.float64) * white
        return torch.from_numpy(numbers).to(dtype) if isinstance(dtype, torch.dtype) else numbers.astype(dtype)

    _, axes = pair(given(np.linspace(0, 1, 48 * 64).reshape(48, 64)), given(MAP / MAP.max()))
    drawn = photo(axes[0, 0])[..., 0]
    assert drawn.mean() == pytest.approx(127.5, abs=1)  # the mean of an even ramp
    assert (drawn[0, 0], drawn[-1, -1]) == (0, 255)
    share = opacity(axes[0, 1]) / opacity(axes[0, 1]).max()
    np.testing.assert_allclose(share, np.sqrt(enlarged(MAP) / enlarged(MAP).max()), atol=0.01)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("as_given", [np.full, torch.full], ids=["array", "tensor"])
def test_truth_values_are_white_and_black(as_given, value):
    _, axes = pair(as_given((8, 8), value), MAP)
    assert (photo(axes[0, 0]) == 255 * value).all()


@pytest.mark.parametrize("largest", [255, 1])
def test_sixteen_bits_that_may_be_eight_are_not_drawn_black_without_a_word(largest):
    values = np.where(HALVES, largest, 0).astype(np.uint16)
    with pytest.warns(UserWarning, match=rf"`query` has values from 0 to {largest}, not from 0 to 65535.*uint8"):
        _, axes = pair(values, MAP)
    assert photo(axes[0, 0]).mean() == 127.5


@pytest.mark.parametrize("values", [(0, 65535), (-255, 255), (0, 256)], ids=str)
def test_integers_beyond_bytes_are_stretched_with_a_warning_about_their_own_values(values):
    image = np.where(HALVES, values[1], values[0]).astype(np.int32)
    with pytest.warns(UserWarning, match=rf"values from {values[0]} to {values[1]}, not from 0 to 255.*uint8"):
        _, axes = pair(image, MAP)
    assert photo(axes[0, 0]).mean() == 127.5


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_values_that_are_not_finite_do_not_change_how_the_others_are_stretched(bad):
    image = np.where(HALVES, 300.0, 100.0)
    image[0, 0] = bad
    with pytest.warns(UserWarning, match="values from 100 to 300"):
        _, axes = pair(image, MAP)
    drawn = photo(axes[0, 0])
    assert (drawn[-1, 0, 0], drawn[-1, -1, 0]) == (0, 255)
    assert (drawn[0, 0] == 0).all()


def test_values_beyond_single_precision_are_drawn():
    with pytest.warns(UserWarning, match=r"values from 0 to 1e\+60"):
        _, axes = pair(np.where(HALVES, 1e60, 0.0), MAP)
    assert photo(axes[0, 0]).mean() == 127.5


@pytest.mark.parametrize(
    "image",
    [np.ones((8, 8), complex), torch.ones(8, 8) * 1j, np.full((8, 8), "a"), np.full((8, 8), None)],
    ids=["complex array", "complex tensor", "text", "objects"],
)
@pytest.mark.parametrize("name", ["query", "query_map"])
def test_what_is_no_real_number_is_refused_by_name(name, image):
    with pytest.raises(TypeError, match=f"`{name}` to be .*real"):
        pair(**{name: image})


@each_drawing
def test_maps_of_a_subclass_of_tensor_are_drawn(draw):
    _, axes = draw(PHOTO, SIGNED.as_subclass(Kept))
    _, plain = draw(PHOTO, SIGNED)
    np.testing.assert_array_equal(opacity(axes[0, 1]), opacity(plain[0, 1]))
    assert axes[0, 1].get_xlabel() == plain[0, 1].get_xlabel()
