"""Which number of an image is black and which is white: what would be black in whole is seen, or a word is said."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from captum_fam import visualize_comparison, visualize_matches, visualize_pair

pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

RAMP = np.arange(1001).reshape(1, 1, 7, 143)  # from 0 to 1000
MASK = np.arange(48).reshape(1, 1, 6, 8) % 2


def drawn(axis):
    """The grey of what is drawn without a map, resized by nothing: the panel's array."""
    return np.asarray(axis.images[0].get_array())[..., 0]


def compared(images, rank=2, **options):
    """Drawn over the whole range, and each image's corners."""
    maps = np.ones((len(images), 1, *[2] * rank))
    _, axes = visualize_comparison(images, {"a": maps}, use_pyplot=False, **options)
    return [drawn(axis) for axis in axes[:, 0]]


TINY = {
    # images (1, 1, H, W), and the largest value that is said
    "floats far below 1": (RAMP * 1e-6, "0.001"),
    "volts": (RAMP * 2e-8, "2e-05"),
    "tesla": (RAMP * 1e-16, "1e-13"),
    "the smallest floats": (RAMP * 5e-324, "4.94066e-321"),
    "float16": ((RAMP * 1e-5).astype(np.float16), "0.0100021"),
    "12 bits in 16": (RAMP.astype(np.uint16), "1000"),
    "8 bits in 16": ((RAMP % 251).astype(np.uint16), "250"),
    "a mask of bytes": (MASK.astype(np.uint8), "1"),
    "a mask of integers": (MASK.astype(np.int64), "1"),
    "a mask that is one everywhere": (np.ones((1, 1, 6, 8), np.uint8), "1"),
    "labels of bytes": ((RAMP % 6).astype(np.uint8), "5"),
}


@pytest.mark.parametrize(("images", "largest"), TINY.values(), ids=TINY)
@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, list], ids=["array", "tensor", "list"])
def test_numbers_that_would_all_be_black_are_stretched_with_a_warning(images, largest, form):
    said = rf"`images` has values from [01] to {largest}, not from 0 to [0-9]+: all are below 2% of white; they are"
    with pytest.warns(UserWarning, match=said) as warned:
        (image,) = compared(form(images))
    assert [w.filename for w in warned] == [__file__]
    assert image.max() == 255
    assert image[0, 0] == round(255 * images[0, 0, 0, 0] / images.max())  # zero is black


def test_black_is_zero_or_the_lowest_value_below_it():
    for low, black in ((500, 128), (-1000, 0)):
        values = np.full((1, 1, 6, 8), low)
        values[..., 4:] = 1000
        with pytest.warns(UserWarning, match="all are below 2% of white"):
            (image,) = compared(values * 1e-6)
        assert (image[0, 0], image[0, -1]) == (black, 255)
    with pytest.warns(UserWarning, match="values from -0.001 to -0.0005, not from 0 to 1: all are below 2% of white;"):
        (image,) = compared(np.repeat([-1e-3, -5e-4], 48).reshape(1, 1, 8, 12))
    assert (image[0, 0], image[-1, 0]) == (0, 128)


def test_signals_of_a_network_that_takes_them_for_pictures_are_seen():
    signals = torch.linspace(-1e-4, 1e-4, 22 * 50).reshape(1, 1, 22, 50)  # (B, 1, C, T), in volts
    with pytest.warns(UserWarning, match=r"values from -0.0001 to 0.0001.*: all are below 2% of white"):
        (image,) = compared(signals)
    assert (image[0, 0], image[-1, -1]) == (0, 255)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_volumes_are_seen(dtype):
    volume = np.broadcast_to(RAMP[:, :, None], (1, 1, 2, 7, 143)) * (1e-6 if dtype is np.float32 else 1)
    with pytest.warns(UserWarning, match="all are below 2% of white"):
        (image,) = compared(volume.astype(dtype), rank=3)
    assert image[:, :252].max() == 255
    assert image[0, 0] == 0


def test_two_per_cent_of_white_is_the_limit():
    for white, dtype in ((1.0, np.float64), (255, np.uint8), (65535, np.uint16)):
        at = np.full((1, 1, 6, 8), int(np.ceil(0.02 * white)) if white > 1 else 0.02, dtype)
        assert compared(at)[0].max() in (5, 6)  # as it is, without a word
        with pytest.warns(UserWarning, match="stretched"):
            assert compared(at - (1 if white > 1 else 1e-6))[0].max() == 255


DARK = {
    "black": (np.zeros((2, 3, 6, 8)), {}),
    "black bytes": (np.zeros((2, 3, 6, 8), np.uint8), {}),
    "a photograph of the night": (np.full((2, 3, 6, 8), 8, np.uint8), {}),
    "a black image beside another": (np.stack([np.full((3, 6, 8), 0.001), np.full((3, 6, 8), 0.9)]), {}),
    "a black scan beside another": (np.stack([np.full((3, 6, 8), v, np.uint16) for v in (7, 9000)]), {}),
}


@pytest.mark.parametrize(("images", "options"), DARK.values(), ids=DARK)
def test_what_is_dark_in_truth_is_left_dark(images, options):
    white = {"float64": 1, "uint8": 255, "uint16": 65535}[images.dtype.name]
    for image, values in zip(compared(images, **options), images):
        assert (image == round(values.max() / white * 255)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_black_image_that_was_normalised_is_black(dtype):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    black = (torch.zeros(1, 3, 6, 8) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert compared(black.to(dtype), mean=mean, std=std)[0].max() <= 1


def test_a_small_scan_that_was_normalised_is_seen():
    scan = (torch.linspace(0, 1e-3, 48).reshape(1, 1, 6, 8) - 4e-4) / 2e-4
    with pytest.warns(UserWarning, match="from .* to 0.001.*: all are below 2% of white"):
        (image,) = compared(scan, mean=[4e-4], std=[2e-4])
    assert (image[0, 0], image[-1, -1]) == (0, 255)


def test_images_of_one_array_keep_their_brightness_to_each_other_and_those_of_a_list_do_not():
    scans = np.stack([RAMP[0], RAMP[0] // 2]).astype(np.uint16)
    with pytest.warns(UserWarning, match="from 0 to 1000") as warned:
        assert [int(image.max()) for image in compared(scans)] == [255, pytest.approx(128, abs=3)]  # resized
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="stretched") as warned:
        assert [image.max() for image in compared(list(scans))] == [255, 255]
    assert ["to 1000" in str(w.message) for w in warned] == [True, False]


def test_a_list_may_have_a_mask_beside_a_photograph():
    with pytest.warns(UserWarning, match="from 0 to 1, not from 0 to 255: all are below 2% of white"):
        mask, photo = compared([MASK[0].astype(np.uint8), np.full((3, 6, 8), 100, np.uint8)])
    assert (mask.max(), photo.max()) == (255, 100)


PILS = {
    "a mask": Image.fromarray(MASK[0, 0].astype(np.uint8)),
    "a mask in colours": Image.fromarray(MASK[0, 0].astype(np.uint8)).convert("RGB"),
    "12 bits in 16": Image.fromarray(RAMP[0, 0].astype(np.uint16)),
    "12 bits in 32": Image.fromarray(RAMP[0, 0].astype(np.int32)),
    "floats": Image.fromarray((RAMP[0, 0] * 1e-6).astype(np.float32)),
}


@pytest.mark.parametrize("image", PILS.values(), ids=PILS)
def test_pillow_images_are_seen_too_and_never_normalised(image):
    with pytest.warns(UserWarning, match="all are below 2% of white; they are stretched"):
        (shown,) = compared([image], mean=[0.5], std=[0.25])
    assert (shown.min(), shown.max()) == (0, 255)
    assert len(np.unique(shown)) > (100 if image.mode[0] in "IF" else 1)  # of the numbers as they were given


def test_a_pair_names_its_side_and_matches_are_drawn_over_what_is_seen():
    bright, dim = np.full((1, 3, 8, 8), 0.5), np.linspace(0, 1e-3, 192).reshape(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="`reference` has values from 0 to 0.001"):
        visualize_pair(bright, dim, np.ones((2, 2)), np.ones((2, 2)), use_pyplot=False)
    with pytest.warns(UserWarning, match="`query` has values from 0 to 0.001"):
        visualize_matches(dim, bright, np.eye(4), use_pyplot=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rank", [2, 3])
def test_an_image_without_a_finite_value_is_said_to_be_black(value, rank):
    with pytest.warns(UserWarning, match="`images` has no finite value; it is drawn black"):
        (image,) = compared(np.full((1, 1, *[6] * rank), value), rank)
    assert image.min() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_signal_without_a_finite_value_is_said_to_have_none(value):
    signals = np.random.default_rng(0).normal(size=(3, 4, 60))
    signals[0], signals[1, 1], signals[2, 2, 5] = value, value, value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, axes = visualize_comparison(signals, {"a": np.ones((3, 1, 6))}, use_pyplot=False)
    said = [axis.get_xlabel() for axis in axes[:, 0]]
    assert "(no value is finite)" in said[0]
    assert "(no value is finite in 1 of 4 channels)" in said[1]
    assert "finite" not in said[2]
    _, axes = visualize_comparison(np.full(60, value), {"a": np.ones((1, 1, 6))}, use_pyplot=False)
    assert axes[0, 0].get_xlabel() == "(no value is finite)"
