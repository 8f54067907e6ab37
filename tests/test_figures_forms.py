"""What images of a figure are taken for: what was meant, or a word is said."""

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from PIL import Image

from captum_fam import visualize_comparison, visualize_matches, visualize_pair
from captum_fam.visualization._forms import as_maps, panels
from captum_fam.visualization._panels import Photo, Signal, Slices

pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]


@pytest.fixture(autouse=True)
def _closed():
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def numbered(*shape):
    """Bytes of which no two images, rows or channels are alike."""
    return (np.arange(np.prod(shape)).reshape(shape) * 37 % 251).astype(np.uint8)


def taken(images, maps, name="query", **options):
    (found, (values,)) = panels(
        name, images, [as_maps(f"{name}_map", maps, images)], *map(options.get, ("mean", "std"))
    )
    return found, values


def drawn_of(panel):
    """What a panel shows, as an array: (C, T), (H, W, 3) or (D, H, W, 3)."""
    if isinstance(panel, Signal):
        return panel.channels
    if isinstance(panel, Photo):
        return np.asarray(panel.image)
    return np.stack([np.asarray(image) for image in panel.images])


def meant(image):
    """The same of an image (C, *spatial), by the words of the description."""
    if image.ndim == 2:
        return image.astype(float)
    colours = image[:3] if len(image) in ((3, 4) if image.ndim == 3 else (3,)) else image[[0, 0, 0]]
    return np.moveaxis(colours, 0, -1)


@st.composite
def figures(draw):
    """Images (C, *spatial), their form, and the form of their maps."""
    rank, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    channels = draw(st.sampled_from([1, 3, 4]) if rank == 2 else st.integers(1, 6))
    low = 5 if rank == 2 else 1  # smaller pictures may have their channels at both ends
    spatial = draw(st.tuples(*[st.integers(low, 7)] * rank))
    count = draw(st.sampled_from([1, rows]))
    images = numbered(count, channels, *spatial)

    each = images
    if channels == 1 and draw(st.booleans()):
        each = each[:, 0]
    elif rank == 2 and draw(st.booleans()):
        each = np.moveaxis(each, 1, -1)
    kind = draw(st.sampled_from([np.asarray, torch.from_numpy]))
    whole = draw(st.sampled_from(["batch", "list", "single"] if count == 1 else ["batch", "list"]))
    form = {"batch": lambda: kind(each), "list": lambda: [kind(e) for e in each], "single": lambda: kind(each[0])}[
        whole
    ]()

    places = draw(st.tuples(*[st.integers(1, size) for size in spatial]))
    maps = np.arange(rows * np.prod(places), dtype=float).reshape(rows, 1, *places)
    without = rank == 1 or places[0] > 1  # (B, 1, w) are maps of signals, (B, 1, h, w) of pictures
    # An image (1, H, W) with a map (h, w) is a picture, and (H, W) with a map of its own size.
    shape = (len(form), *form[0].shape) if isinstance(form, list) else tuple(form.shape)
    without = without and (rank != 1 or (count == rows and shape != (rows, *places)))
    squeezed = maps[:, 0] if without and draw(st.booleans()) else maps
    if rank == 2 and rows == 1 and draw(st.booleans()):
        squeezed = maps[0, 0]
    return images, form, maps[:, 0], squeezed


@given(figures())
@settings(max_examples=600)
def test_images_are_what_was_meant_or_a_word_is_said(figure):
    images, form, maps, squeezed = figure
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found, values = taken(form, squeezed)
        except (ValueError, TypeError) as error:
            assert re.search(r"`query(_map)?`.* (pass|those of|maps of) ", str(error))  # noqa: PT017
            return
    expected = [meant(image) for image in images] * (len(maps) // len(images))
    right = len(found) == len(maps) and all(np.array_equal(drawn_of(f), e) for f, e in zip(found, expected))
    right = right and np.array_equal(np.stack(values), maps)
    assert right or said
    assert all("query[None]" in str(w.message) for w in said)


FORMS = {
    # images (each form), their maps, and what they are: kind of panel, how many different ones
    "three signals of four channels": ((3, 4, 50), (3, 1, 9), Signal, 3),
    "three signals of three channels": ((3, 3, 50), (3, 1, 9), Signal, 3),
    "four signals of one channel": ((4, 1, 50), (4, 1, 9), Signal, 4),
    "a signal": ((1, 22, 50), (1, 1, 9), Signal, 1),
    "a signal in every row": ((1, 22, 50), (3, 1, 9), Signal, 1),
    "a signal without a batch": ((22, 50), (1, 1, 9), Signal, 1),
    "a signal without channels": ((50,), (1, 1, 9), Signal, 1),
    "a signal without channels in every row": ((50,), (3, 1, 9), Signal, 1),
    "maps of eight signals without a channel": ((8, 22, 50), (8, 9), Signal, 8),
    "a signal and its map without channels": ((50,), (1, 9), Signal, 1),
    "maps as long as their signals": ((2, 3, 50), (2, 1, 50), Signal, 2),
    "grey images, batched": ((3, 1, 28, 28), (3, 1, 7, 7), Photo, 3),
    "grey images": ((5, 28, 28), (5, 1, 7, 7), Photo, 5),
    "grey images, maps without a channel": ((5, 28, 28), (5, 7, 7), Photo, 5),
    "one grey image": ((1, 28, 28), (1, 1, 7, 7), Photo, 1),
    "one grey image in every row": ((1, 28, 28), (3, 1, 7, 7), Photo, 1),
    "one image of three channels": ((3, 28, 28), (1, 1, 7, 7), Photo, 1),
    "one image of three channels in every row": ((3, 28, 28), (5, 1, 7, 7), Photo, 1),
    "one grey image, a map of its size": ((28, 30), (28, 30), Photo, 1),
    "one image of four channels, a map alone": ((4, 28, 28), (7, 7), Photo, 1),
    "volumes": ((3, 1, 8, 28, 28), (3, 1, 4, 7, 7), Slices, 3),
    "maps of volumes without a channel": ((3, 2, 8, 28, 28), (3, 4, 7, 7), Slices, 3),
    "maps of volumes with one slice": ((3, 2, 8, 28, 28), (3, 1, 7, 7), Slices, 3),
    "a volume of four channels": ((4, 8, 28, 28), (1, 1, 4, 7, 7), Slices, 1),
    "a volume without channels in every row": ((8, 28, 28), (4, 1, 4, 7, 7), Slices, 1),
}


@pytest.mark.parametrize(("shape", "maps", "kind", "count"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("given_as", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_forms_are_told_by_the_maps(shape, maps, kind, count, given_as):
    found, values = taken(given_as(numbered(*shape)), given_as(numbered(*maps)))
    rows = maps[0] if len(maps) > 2 or kind is Signal else 1
    assert len(found) == len(values) == rows
    assert {type(panel) for panel in found} == {kind}
    assert len({drawn_of(panel).tobytes() for panel in found}) == count
    assert {v.ndim for v in values} == {{Signal: 1, Photo: 2, Slices: 3}[kind]}


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("given_as", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_three_or_four_grey_images_are_as_many_which_is_said(count, given_as):
    images = numbered(count, 28, 30)
    said = rf"`query` of shape \({count}, 28, 30\) is drawn as {count} images.*query\[:, None\].*query\[None\]"
    with pytest.warns(UserWarning, match=said) as warned:
        _, axes = visualize_pair(
            given_as(images), numbered(count, 1, 8, 8), np.ones((count, 4, 4)), np.ones((count, 4, 4)), use_pyplot=False
        )
    assert [w.filename for w in warned] == [__file__]
    for row, image in zip(axes, images):
        expected = np.asarray(Image.fromarray(image).convert("RGB").resize((512, 478)))
        np.testing.assert_array_equal(row[0].images[0].get_array(), expected)


@pytest.mark.parametrize("form", [lambda x: x[:, None], lambda x: x[..., None], list], ids=["BCHW", "BHWC", "list"])
def test_with_the_channel_or_as_a_list_nothing_is_said(form):
    images = numbered(3, 28, 30)
    found, _ = taken(form(images), np.ones((3, 7, 7)))
    assert [drawn_of(f)[..., 0].tolist() for f in found] == images.tolist()


@pytest.mark.parametrize("options", [{"mean": [0.5] * 3}, {"std": (1, 1, 1)}, {"mean": [0.5], "std": torch.ones(3)}])
def test_a_mean_of_three_channels_says_that_it_is_one_image(options):
    image = torch.rand(3, 28, 30) * 0.5
    found, _ = taken(image, np.ones((3, 7, 7)), **options)
    assert len({drawn_of(f).tobytes() for f in found}) == 1


WORDS = {
    "as many grey images as maps, or a picture": (
        (32, 32, 3),
        (32, 1, 8, 8),
        r"`query` of shape \(32, 32, 3\).*query\[:, None\].*query\[None\]",
    ),
    "signals or channels": (
        (3, 50),
        (3, 1, 9),
        r"`query` to be 3 signals \(B, C, T\).*query\[:, None\].*query\[None\]",
    ),
    "channels or a wrong number of signals": ((5, 50), (3, 1, 9), r"3 signals \(B, C, T\).*got \(5, 50\)"),
    "volumes or channels": (
        (3, 8, 9, 9),
        (3, 1, 4, 4, 4),
        r"3 volumes \(B, C, D, H, W\).*query\[:, None\].*query\[None\]",
    ),
    "another number of signals": ((4, 3, 50), (3, 1, 9), r"`query` to be one image or 3.*got 4.*\(B, 1, h, w\)"),
    "another number of volumes": ((4, 3, 5, 6, 7), (3, 1, 2, 2, 2), "`query` to be one image or 3.*got 4"),
    "a picture under the map of a signal": (
        (3, 50, 60),
        (1, 1, 9),
        r"`query`.*got 3; maps of pictures are \(B, 1, h, w\)",
    ),
    "time before channels": ((2, 1000, 3), (2, 1, 50), r"`query` to have its channels first.*\(1000, 3\)"),
    "colours last in a volume": ((2, 8, 28, 28, 3), (2, 1, 4, 4, 4), r"`query` to have its channels first"),
    "a picture under a volume's map": ((384, 512, 3), (1, 1, 4, 4, 4), "`query` to have its channels first"),
    "a batch of pictures under volumes' maps": (
        (2, 3, 8, 8),
        (2, 1, 4, 4, 4),
        r"`query` to be 2 volumes \(B, C, D, H, W\)",
    ),
    "a volume under a picture's map": ((2, 3, 8, 8, 8), (2, 1, 1, 4, 4, 4), r"`query_map` to be maps \(B, 1, h, w\)"),
    "signals under a picture's map": ((5, 64, 50), (2, 1, 4, 4), r"`query` to be images.*\(5, 64, 50\)"),
    "maps of three signals or a map of a picture": (
        (3, 22, 50),
        (3, 9),
        r"`query_map` of shape \(3, 9\).*query_map\[:, None\].*\[None, None\]",
    ),
    "the map of one signal or of a picture": (
        (1, 22, 50),
        (1, 9),
        r"`query_map` of shape \(1, 9\).*query_map\[:, None\]",
    ),
    "the map of a signal or a picture": ((22, 50), (1, 9), r"`query_map` of shape \(1, 9\).*query_map\[:, None\]"),
    "maps of eight signals or a map of a picture": (
        (8, 1000),
        (8, 50),
        r"`query_map` of shape \(8, 50\) may be maps of 8 signals",
    ),
    "an empty signal": ((1, 3, 0), (1, 1, 9), r"`query` to be signals.*\(3, 0\)"),
}


@pytest.mark.parametrize(("shape", "maps", "said"), WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("given_as", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_what_may_be_two_things_is_refused_with_what_to_pass(shape, maps, said, given_as):
    images, maps = given_as(numbered(*shape)), given_as(numbered(*maps))
    with pytest.raises(ValueError, match=said):
        visualize_pair(images, images, maps, maps)
    with pytest.raises(ValueError, match=said.replace("query_map", r"attributions\['a'\]").replace("query", "images")):
        visualize_comparison(images, {"a": maps})
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("images", "maps", "said"),
    [
        (Image.new("RGB", (8, 8)), (1, 1, 4, 4, 4), "`query` to be tensors or arrays, volumes"),
        ([numbered(3, 50), "signal"], (2, 1, 9), "`query` to be a tensor, an array or a PIL image"),
        ([numbered(3, 8, 8), None], (2, 1, 4, 4, 4), "`query` to be tensors or arrays, volumes.*None"),
    ],
)
def test_other_types_are_refused_by_name(images, maps, said):
    with pytest.raises(TypeError, match=said):
        taken(images, np.ones(maps))


def test_methods_of_signals_and_of_pictures_do_not_go_together():
    with pytest.raises(ValueError, match=r"maps of as many dimensions.*'b'"):
        visualize_comparison(numbered(2, 3, 50), {"a": np.ones((2, 1, 4, 4)), "b": np.ones((2, 1, 4, 4, 4))})


def test_maps_of_a_picture_with_one_row_need_their_channel_or_a_picture():
    for images in (numbered(2, 3, 8, 40), list(numbered(2, 3, 8, 40)), Image.new("RGB", (40, 8)), numbered(8, 40, 3)):
        found, values = taken(images, np.ones((2, 1, 5)))
        assert {type(f) for f in found} == {Photo}
        assert {v.shape for v in values} == {(1, 5)}
    found, _ = taken(numbered(2, 8, 40), np.ones((2, 1, 1, 5)))
    assert {type(f) for f in found} == {Photo}


def test_a_list_of_one_array_with_a_map_of_one_row_may_be_two_things_and_with_as_many_signals_as_maps_is_not():
    with pytest.raises(ValueError, match=r"`query_map` of shape \(1, 5\) may be maps of 1 signals"):
        taken([numbered(8, 40)], np.ones((1, 5)))
    found, values = taken(list(numbered(2, 8, 40)), np.ones((2, 5)))
    assert {type(f) for f in found} == {Signal}
    assert {v.shape for v in values} == {(5,)}


def test_matches_take_the_number_of_images_from_the_matrix():
    images = numbered(5, 28, 30)
    _, axes = visualize_matches(images, images, torch.eye(4).expand(5, 4, 4), use_pyplot=False)
    drawn = [axis.images[0].get_array()[0, 0, 0] for axis in axes[:, 0]]
    assert len(set(drawn)) > 1


LISTS = {
    # images, a map of each as it is in a list, and the batch that it means
    "stored maps": ((3, 3, 28, 28), (4, 5), (3, 1, 4, 5)),
    "maps with a channel": ((3, 3, 28, 28), (1, 4, 5), (3, 1, 4, 5)),
    "maps of one call each": ((3, 3, 28, 28), (1, 1, 4, 5), (3, 1, 4, 5)),
    "maps of one row": ((3, 3, 28, 28), (1, 5), (3, 1, 1, 5)),
    "signals": ((3, 22, 50), (9,), (3, 1, 9)),
    "signals with a channel": ((3, 22, 50), (1, 9), (3, 1, 9)),
    "signals of one call each": ((3, 22, 50), (1, 1, 9), (3, 1, 9)),
    "volumes": ((3, 1, 8, 9, 9), (4, 5, 6), (3, 1, 4, 5, 6)),
    "volumes with a channel": ((3, 1, 8, 9, 9), (1, 4, 5, 6), (3, 1, 4, 5, 6)),
    "volumes of one call each": ((3, 1, 8, 9, 9), (1, 1, 4, 5, 6), (3, 1, 4, 5, 6)),
    "one in a list": ((1, 3, 28, 28), (4, 5), (1, 1, 4, 5)),
}


@pytest.mark.parametrize(("shape", "one", "batch"), LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("given_as", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_maps_may_be_a_list_of_them(shape, one, batch, given_as, kind):
    images, maps = given_as(numbered(*shape)), numbered(*batch)
    found, values = taken(images, kind(given_as(m.reshape(one)) for m in maps))
    wanted, expected = taken(images, maps)
    assert [type(f) for f in found] == [type(f) for f in wanted]
    assert [v.tolist() for v in values] == [v.tolist() for v in expected]


def test_lists_of_maps_are_drawn_and_so_are_lists_of_matrices():
    photos, maps, matrices = numbered(2, 28, 28, 3), numbered(2, 4, 4), torch.eye(4).expand(2, 4, 4)
    for listed, whole in (
        (visualize_pair(photos, photos, list(maps), list(maps)), visualize_pair(photos, photos, maps, maps)),
        (visualize_comparison(photos, {"a": list(maps)}), visualize_comparison(photos, {"a": maps})),
    ):
        for axis, other in zip(listed[1].flat, whole[1].flat):
            np.testing.assert_array_equal(axis.images[-1].get_array(), other.images[-1].get_array())
    for each in (
        list(matrices),
        [m[None] for m in matrices],
        [m.reshape(2, 2, 2, 2) for m in matrices],
        [m.reshape(1, 2, 2, 2, 2) for m in matrices],
    ):
        _, axes = visualize_matches(photos, photos, each, use_pyplot=False)
        _, whole = visualize_matches(photos, photos, matrices, use_pyplot=False)
        assert axes.shape == (2, 2)
        np.testing.assert_array_equal(axes[1, 0].images[1].get_array(), whole[1, 0].images[1].get_array())
    with pytest.raises(ValueError, match="tell the grid"):  # of a list, too
        visualize_matches(np.ones((2, 3, 32, 128)), photos, [np.ones((16, 4))] * 2)


BAD_LISTS = {
    "nothing": ([], ValueError, "is empty"),
    "a failed pair": (
        [np.ones((4, 4)), None],
        ValueError,
        r"`{}\[1\]` is None: leave out those without a map, or pass None for all",
    ),
    "maps of two sizes": (
        [np.ones((4, 4)), np.ones((5, 4))],
        ValueError,
        r"`{}` to hold arrays of one shape, .*got \(4, 4\) and \(5, 4\).*figure of its own",
    ),
    "numbers": ([[0.5]], TypeError, "`{}` to be a real tensor or array, but got list of list"),
    "texts": ([np.full((4, 4), "a")] * 2, TypeError, "`{}` to be a real"),
    "channels": ([np.ones((3, 4, 4))] * 2, ValueError, "sum attributions over their channels"),
}


@pytest.mark.parametrize(("maps", "error", "said"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_list_that_is_none_of_maps_is_refused(maps, error, said):
    photos = numbered(2, 28, 28, 3)
    with pytest.raises(error, match=said.format("query_map")):
        visualize_pair(photos, photos, maps, np.ones((2, 4, 4)))
    with pytest.raises(error, match=said.format("reference_map")):
        visualize_pair(photos, photos, np.ones((2, 4, 4)), maps)
    with pytest.raises(error, match=said.format(r"attributions\['a'\]")):
        visualize_comparison(photos, {"a": maps})
    if "sum" not in said:
        with pytest.raises(error, match=said.format("matrix")):
            visualize_matches(photos, photos, maps)
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(("shape", "said"), [((70, 64), True), ((64, 64), False), ((3, 500), False), ((1, 1), False)])
def test_more_channels_than_values_are_said_as_time_may_have_come_first(shape, said):
    _, axes = visualize_comparison(numbered(1, *shape), {"a": np.ones((1, 1, 1))}, use_pyplot=False)
    assert ("(more channels than values: 64)" in axes[0, 0].get_xlabel().split("\n")) is said
