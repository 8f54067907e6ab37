"""Scenes that share one object: what is where, and what tells nothing."""

import os
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn

from captum_fam.scenes import Scenes, removal_effects, shared_object_scenes

DATA = os.environ.get("CAPTUM_FAM_DATA")
DIFFICULTIES = ["easy", "medium", "hard"]
FIELDS = list(Scenes.__dataclass_fields__)
GREY = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # the mean colour as an embedding


def textures(classes=9, each=2, seed=0, height=40, width=30):
    """Noise of a random mean and contrast, each picture another."""
    rng = np.random.default_rng(seed)
    labels = [c for c in range(classes) for _ in range(each)]
    arrays = [
        rng.normal(rng.uniform(60, 200, 3), rng.uniform(15, 60, 3), (height, width, 3)).clip(0, 255).astype(np.uint8)
        for _ in labels
    ]
    return [Image.fromarray(a) for a in arrays], labels


def plain(classes=9, each=2):
    """One colour each, which tells the picture: red is its number."""
    labels = [c for c in range(classes) for _ in range(each)]
    return [Image.new("RGB", (30, 20), (10 * i, 255 - 10 * i, 128)) for i in range(len(labels))], labels


def discs(pictures):
    """Cut-outs in the form of a disc, off the centre; what alpha hides is bright green."""
    cuts = []
    for picture in pictures:
        alpha = Image.new("L", picture.size)
        ImageDraw.Draw(alpha).ellipse((4, 8, 23, 27), fill=255)
        cut = Image.composite(picture, Image.new("RGB", picture.size, (0, 255, 0)), alpha)
        cut.putalpha(alpha)
        cuts.append(cut)
    return cuts


def both(scenes):
    """The scenes as images, and their references as images."""
    return scenes, scenes.swapped()


def cell_of(mask, side):
    """The cell of a square grid that holds a mask."""
    rows, columns = (where // (mask.shape[0] // side) for where in mask.nonzero().T)
    (row,), (column,) = set(rows.tolist()), set(columns.tolist())
    return row, column


def extent(mask):
    rows, columns = mask.nonzero().T
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("n_objects", [2, 4, 5])
def test_just_one_class_is_in_both_scenes(difficulty, n_objects):
    scenes = shared_object_scenes(*textures(), 12, size=48, n_objects=n_objects, difficulty=difficulty)
    for first, second in zip(scenes.labels.tolist(), scenes.reference_labels.tolist()):
        assert first[0] == second[0]
        assert len({*first, *second}) == 2 * n_objects - 1
    assert len(set(scenes.labels[:, 0].tolist())) > 3


def test_shapes_and_types_are_as_documented():
    scenes = shared_object_scenes(*textures(), 3, size=50, n_objects=3)
    assert scenes.images.shape == scenes.references.shape == (3, 3, 50, 50)
    assert scenes.objects.shape == scenes.reference_objects.shape == (3, 50, 50)
    assert scenes.labels.shape == scenes.reference_labels.shape == scenes.backgrounds.shape == (3, 3)
    assert scenes.masks.shape == scenes.reference_masks.shape == (3, 1, 50, 50)
    dtypes = [getattr(scenes, name).dtype for name in FIELDS]
    assert dtypes == [torch.float32, torch.float32, torch.uint8, torch.uint8, torch.int64, torch.int64, torch.float32]
    assert scenes.masks.dtype == torch.bool
    assert scenes.images.min() >= 0 <= scenes.references.min()
    assert scenes.images.max() <= 1 >= scenes.references.max()


def test_the_numbers_of_objects_say_where_the_pictures_are():
    pictures, labels = plain(each=1)
    scenes = shared_object_scenes(pictures, labels, 10, size=64, difficulty="easy")
    for view in both(scenes):
        for i in range(10):
            assert set(view.objects[i].unique().tolist()) == {0, 1, 2, 3, 4}
            for j in range(4):
                colour = torch.tensor(pictures[view.labels[i, j]].getpixel((0, 0))) / 255
                pixels = view.images[i][:, view.objects[i] == j + 1]
                assert torch.allclose(pixels, colour[:, None].expand_as(pixels), atol=1e-5)
            bare = view.images[i][:, view.objects[i] == 0]
            assert torch.equal(bare, view.backgrounds[i][:, None].expand_as(bare))
        assert torch.equal(view.masks[:, 0], view.objects == 1)
    assert torch.equal(scenes.reference_masks[:, 0], scenes.reference_objects == 1)


def test_the_shared_object_is_never_in_the_same_cell_and_each_cell_has_one_object():
    scenes = shared_object_scenes(*textures(), 60, size=48)
    found = set()
    for i in range(60):
        cells = [[cell_of(view.objects[i] == j, 2) for j in range(1, 5)] for view in both(scenes)]
        assert all(len(set(of)) == 4 for of in cells)
        assert cells[0][0] != cells[1][0]
        found.add((cells[0][0], cells[1][0]))
    assert len(found) == 12  # every pair of two different cells


def test_longer_sides_are_three_quarters_to_all_of_a_cell_and_keep_their_aspect():
    scenes = shared_object_scenes(*textures(height=40, width=20), 30, size=128, difficulty="hard")
    longest, corners = [], []
    for view in both(scenes):
        for i in range(30):
            for j in range(1, 5):
                mask = view.objects[i] == j
                height, width = extent(mask)
                assert abs(width - height / 2) <= 0.5
                longest.append(height)
                corners.append(mask.nonzero().amin(0) % 64)
    assert (min(longest), max(longest)) == (45, 60)  # of 60: a cell of 64 less a margin of 2 on each side
    corners = torch.stack(corners)
    assert corners.amin(0).tolist() == [2, 2]
    assert (corners.amax(0) > torch.tensor([14, 36])).all()  # at most 2 + 60 - 45 down, 2 + 60 - 22 to the right


def test_an_easy_pair_shares_the_very_same_pixels():
    scenes = shared_object_scenes(*textures(), 8, size=64, difficulty="easy")
    for i in range(8):
        first, second = (view.images[i][:, view.objects[i] == 1] for view in both(scenes))
        assert torch.equal(first, second)


def test_a_hard_pair_shows_two_pictures_of_the_class_and_a_medium_pair_one_picture_mirrored():
    # The first picture of a class brightens to the right, the second downwards.
    ramp = np.linspace(40, 200, 32)
    sideways, down = np.broadcast_to(ramp, (32, 32)), np.broadcast_to(ramp[:, None], (32, 32))
    pictures = [Image.fromarray(a.astype(np.uint8)) for _ in range(9) for a in (sideways, down)]
    labels = [i // 2 for i in range(18)]

    def brightens(view, i):
        """How much the shared object brightens to the right, and downwards."""
        rows, columns = (view.objects[i] == 1).nonzero().T
        values = view.images[i, 0][rows, columns]
        return tuple(float(torch.corrcoef(torch.stack([where.float(), values]))[0, 1]) for where in (columns, rows))

    hard, medium = (
        shared_object_scenes(pictures, labels, 12, size=64, difficulty=difficulty) for difficulty in ("hard", "medium")
    )
    directions = set()
    for i in range(12):
        right, right_again = (brightens(view, i)[0] for view in both(hard))
        assert (abs(right) > 0.9) != (abs(right_again) > 0.9)
        directions.add((right if abs(right) > 0.9 else right_again) > 0)
        (right, below), (right_again, below_again) = (brightens(view, i) for view in both(medium))
        assert max(right, below) > 0.9
        assert (-right_again if right > 0.9 else below_again) > 0.8  # mirrored, and turned a little
    assert directions == {True, False}  # mirrored at random


def test_medium_references_have_another_gamma():
    ramp = Image.fromarray(np.broadcast_to(np.arange(40, 201, 4), (41, 41)).astype(np.uint8))
    scenes = shared_object_scenes([ramp] * 9, range(9), 12, size=64, difficulty="medium")

    def skewness(view):
        """Of the shared objects' brightness: none for a ramp, more than none where gamma is above one."""
        pixels = [view.images[i, 0][view.objects[i] == 1] for i in range(12)]
        return torch.stack([((x - x.mean()) ** 3).mean() / x.std() ** 3 for x in pixels])

    assert skewness(scenes).abs().max() < 0.02
    assert skewness(scenes.swapped()).min() < -0.1
    assert skewness(scenes.swapped()).max() > 0.1


def test_medium_references_are_turned_and_images_upright():
    scenes = shared_object_scenes(*textures(height=40, width=20), 12, size=96, difficulty="medium")

    def filling(view):
        """How much of its bounding box each object fills: all, if upright."""
        masks = [view.objects[i] == j for i in range(12) for j in range(1, 5)]
        return torch.tensor([float(mask.sum()) / np.prod(extent(mask)) for mask in masks])

    upright, turned = (filling(view) for view in both(scenes))
    assert (upright == 1).all()
    assert (turned > 0.5).all()  # at 20 degrees a rectangle of 2 to 1 fills 0.53 of its box
    assert (turned < 0.9).float().mean() > 0.5


@pytest.mark.parametrize("difficulty", ["medium", "hard"])
def test_all_objects_of_all_scenes_have_the_mean_of_the_background_and_one_standard_deviation(difficulty):
    pictures, labels = textures()
    pictures = [*pictures[:9], *discs(pictures[9:])]
    scenes = shared_object_scenes(pictures, labels, 12, size=64, difficulty=difficulty)
    assert (scenes.backgrounds == scenes.backgrounds[0]).all()
    stds = []
    for view in both(scenes):
        for i in range(12):
            for j in range(1, 5):
                pixels = view.images[i][:, view.objects[i] == j]
                assert torch.allclose(pixels.mean(1), view.backgrounds[i], atol=1e-3)
                stds.append(pixels.std(1, correction=0))
    stds = torch.stack(stds)
    assert (stds - stds.mean(0)).abs().max() < 0.005
    own = torch.tensor(np.mean([np.std(np.asarray(p)[np.asarray(p)[..., -1] > 0][:, :3], 0) for p in pictures[:9]], 0))
    assert (stds.mean(0) - own / 255).abs().max() < 0.03


@pytest.mark.parametrize(("contrast", "expected"), [(10, 0.1), (30, 30 / 255), (45, 45 / 255), (90, 0.2)])
def test_the_palette_has_the_standard_deviation_of_the_pictures_within_bounds(contrast, expected):
    noise = np.random.default_rng(0).normal(128, contrast, (14, 30, 30, 3)).clip(0, 255).astype(np.uint8)
    scenes = shared_object_scenes([Image.fromarray(a) for a in noise], [i // 2 for i in range(14)], 2, size=64)
    for j in range(1, 5):
        assert abs(scenes.images[0][:, scenes.objects[0] == j].std(1) - expected).max() < 0.004


def test_alpha_of_at_least_128_is_the_object():
    picture = Image.new("RGBA", (30, 30), (200, 0, 0, 128))
    picture.paste((0, 0, 200, 127), (0, 0, 30, 20))
    scenes = shared_object_scenes([picture] * 7, range(7), 1, size=128, difficulty="easy")
    height, width = extent(scenes.masks[0, 0])
    assert abs(width - 3 * height) <= 2
    red = torch.tensor([200, 0, 0])[:, None] / 255
    assert (scenes.images[0][:, scenes.masks[0, 0]] - red).abs().max() < 1e-6


def test_the_background_is_the_mean_colour_of_what_the_pictures_show():
    pictures = [Image.new("RGB", (20, 30), (100, 130, 150)) for _ in range(7)]
    hidden = discs(pictures)  # bright green beside the discs
    for difficulty in DIFFICULTIES:
        for given_pictures in (pictures, hidden):
            scenes = shared_object_scenes(given_pictures, range(7), 1, size=32, difficulty="easy")
            assert torch.allclose(scenes.backgrounds[0], torch.tensor([100, 130, 150]) / 255, atol=1e-6)
        dark = [Image.new("RGB", (20, 30), (0, 255, 128)) for _ in range(14)]
        scenes = shared_object_scenes(dark, [i // 2 for i in range(14)], 1, size=32, difficulty=difficulty)
        assert torch.allclose(scenes.backgrounds[0], torch.tensor([0.35, 0.65, 128 / 255]))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_pictures_of_one_colour_give_finite_images(difficulty):
    scenes = shared_object_scenes(*plain(), 5, size=32, difficulty=difficulty)
    assert all(x.isfinite().all() for x in (scenes.images, scenes.references))
    if difficulty != "easy":
        assert torch.allclose(scenes.images, scenes.backgrounds[..., None, None].expand_as(scenes.images), atol=1e-6)


@pytest.mark.parametrize("difficulty", ["easy", "medium"])
def test_a_cut_out_is_cropped_to_what_it_shows_and_keeps_its_colours_to_the_edge(difficulty):
    cuts = discs([Image.new("RGB", (40, 60), (200, 0, 100 + i)) for i in range(7)])
    scenes = shared_object_scenes(cuts, range(7), 6, size=128, difficulty=difficulty)
    for view in both(scenes):
        for i in range(6):
            for j in range(1, 5):
                mask = view.objects[i] == j
                height, width = extent(mask)
                assert 45 <= max(height, width) <= 60
                assert abs(height - width) <= 2
                assert abs(float(mask.sum()) / (height * width) - np.pi / 4) < 0.04
                if difficulty == "easy":
                    assert view.images[i, 1][mask].max() < 1e-6  # none of the green beside it


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pictures_of_other_modes_are_converted(mode):
    pictures, labels = textures()
    scenes = shared_object_scenes([p.convert(mode) for p in pictures], labels, 2, size=32, difficulty="easy")
    assert (scenes.objects > 0).any()
    channels_agree = bool((scenes.images[:, 0] == scenes.images[:, 1]).all())
    assert channels_agree == (mode in ("1", "L", "LA"))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_pair_depends_on_the_seed_and_its_number_alone(difficulty):
    few, many, again = (shared_object_scenes(*textures(), n, size=32, difficulty=difficulty, seed=3) for n in (2, 5, 5))
    other = shared_object_scenes(*textures(), 2, size=32, difficulty=difficulty, seed=4)
    for name in FIELDS:
        assert torch.equal(getattr(few, name), getattr(many, name)[:2])
        assert torch.equal(getattr(many, name), getattr(again, name))
    assert not torch.equal(few.objects, other.objects)
    assert len({tuple(row) for row in torch.cat([many.labels, many.reference_labels], 1).tolist()}) == 5


def test_global_random_numbers_are_untouched():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    removal_effects(GREY, shared_object_scenes(*textures(), 2, size=32, difficulty="medium"))
    assert states() == before


def test_without_an_object_the_background_is_there_and_nothing_else_changes():
    scenes = shared_object_scenes(discs(textures()[0]), textures()[1], 4, size=64)
    for j in range(1, 5):
        inside = (scenes.objects == j)[:, None].expand_as(scenes.images)
        plain_colour = scenes.backgrounds[..., None, None].expand_as(scenes.images)
        assert torch.equal(scenes.without(j), torch.where(inside, plain_colour, scenes.images))
        assert not torch.equal(scenes.without(j), scenes.images)


def test_swapped_exchanges_images_and_references():
    scenes = shared_object_scenes(*textures(), 3, size=32)
    swapped = scenes.swapped()
    for a, b in [("images", "references"), ("objects", "reference_objects"), ("labels", "reference_labels")]:
        assert torch.equal(getattr(swapped, a), getattr(scenes, b))
        assert torch.equal(getattr(swapped, b), getattr(scenes, a))
        assert not torch.equal(getattr(scenes, a), getattr(scenes, b))
    assert torch.equal(swapped.masks, scenes.reference_masks)


@pytest.mark.parametrize(
    "index", [slice(1, 3), torch.tensor([3, 0]), torch.tensor([True, False, False, True])], ids=str
)
def test_some_pairs_are_taken_of_every_field(index):
    scenes = shared_object_scenes(*textures(), 4, size=32)
    some = scenes[index]
    assert (len(scenes), len(some)) == (4, 2)
    for name in FIELDS:
        assert torch.equal(getattr(some, name), getattr(scenes, name)[index])
    assert repr(some) == "Scenes(images=(2, 3, 32, 32), n_objects=4)"


def made_by_hand():
    """One pair of 2 by 2 pixels with background 0.5: one shared pixel, one distractor in each."""
    images = torch.full((2, 1, 3, 2, 2), 0.5)
    objects = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    pixels = [(0, 1, 0, 0, 1.0), (0, 2, 1, 1, 0.0), (1, 1, 1, 0, 1.0), (1, 2, 0, 1, 0.8)]
    for scene, number, row, column, value in pixels:
        images[scene, 0, :, row, column] = value
        objects[scene, 0, row, column] = number
    return Scenes(*images, *objects, torch.tensor([[7, 1]]), torch.tensor([[7, 2]]), torch.full((1, 3), 0.5))


def test_removal_effects_of_a_linear_encoder_are_those_computed_by_hand():
    # z is the sum of the first channel: 1 + 0.5 + 0.5 + 0 = 2, and 1.5 without object 1, 2.5 without object 2;
    # s = 1 + 0.8 + 0.5 + 0.5 = 2.8.
    scenes = made_by_hand()
    effects = removal_effects(lambda x: x[:, 0].flatten(1).sum(1, keepdim=True), scenes, "dot")
    assert torch.allclose(effects, torch.tensor([[2.8 * 0.5, 2.8 * -0.5]]))
    effects = removal_effects(lambda x: x[:, 0].flatten(1).sum(1, keepdim=True), scenes, "euclidean")
    assert torch.allclose(effects, torch.tensor([[-(0.8**2) + 1.3**2, -(0.8**2) + 0.3**2]]))
    # By cosine, with the four pixels of a channel as the embedding: z = (1, .5, .5, 0), s = (.5, .8, 1, .5).
    effects = removal_effects(lambda x: {"z": x[:, 0]}, scenes, output_selector=lambda out: out["z"].flatten(1))
    s = torch.tensor([0.5, 0.8, 1.0, 0.5])
    z = torch.tensor([[1, 0.5, 0.5, 0], [0.5, 0.5, 0.5, 0], [1, 0.5, 0.5, 0.5]])
    scores = (z @ s) / (z.norm(dim=1) * s.norm())
    assert torch.allclose(effects[0], scores[0] - scores[1:], atol=1e-6)


def test_removal_effects_do_not_depend_on_the_batch_size_and_leave_the_encoder_as_it_is():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), *GREY)
    scenes = shared_object_scenes(*textures(), 5, size=32)
    sizes = []
    encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with pytest.warns(UserWarning, match="training mode and has batch norm"):
        removal_effects(encoder, scenes)
    assert encoder[1].num_batches_tracked == 0
    assert torch.equal(encoder[1].running_mean, torch.zeros(8))
    encoder.eval()
    sizes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, parts = (removal_effects(encoder, scenes, batch_size=n) for n in (32, 2))
    assert sizes == [5] * 6 + [2, 2, 1] * 6
    assert whole.shape == (5, 4)
    assert not whole.requires_grad
    assert torch.allclose(whole, parts, atol=1e-6)
    assert whole.abs().max() > 1e-6


def test_an_encoder_that_sees_the_shared_class_alone_has_its_effect_there():
    pictures, labels = plain(classes=9, each=1)
    scenes = shared_object_scenes(pictures, labels, 8, size=48, difficulty="easy")
    reds = torch.tensor([p.getpixel((0, 0))[0] / 255 for p in pictures])
    histogram = lambda x: ((x[:, :1].flatten(2) - reds[:, None]).abs() < 1e-3).float().mean(2)  # noqa: E731
    effects = removal_effects(histogram, scenes, "dot")
    assert (effects[:, 0] > 0.001).all()
    assert torch.allclose(effects[:, 1:], torch.zeros(8, 3), atol=1e-6)


def test_the_pairs_that_an_encoder_uses_are_chosen_and_there_may_be_none():
    pictures, labels = plain(classes=9, each=1)
    scenes = shared_object_scenes(pictures, labels, 12, size=48, difficulty="easy")
    reds = torch.tensor([p.getpixel((0, 0))[0] / 255 for p in pictures])[::2]  # of classes of even numbers
    even = lambda x: ((x[:, :1].flatten(2) - reds[:, None]).abs() < 1e-3).float().mean(2)  # noqa: E731
    chosen = {}
    for name, encoder in (("even", even), ("grey", lambda x: GREY(0 * x))):
        effects = removal_effects(encoder, scenes, "dot")
        chosen[name] = scenes[effects[:, 0] > effects[:, 1:].amax(1) + 1e-6]
    right = scenes.labels[:, 0] % 2 == 0
    assert 0 < right.sum() < 12
    assert torch.equal(chosen["even"].images, scenes.images[right])
    assert torch.equal(chosen["even"].labels, scenes.labels[right])
    assert len(chosen["grey"]) == len(chosen["grey"].masks) == len(chosen["grey"].swapped().without(1)) == 0
    assert removal_effects(GREY, chosen["grey"]).shape == (0, 4)


@pytest.mark.parametrize("difficulty", ["medium", "hard"])
def test_mean_colours_tell_neither_the_shared_object_nor_the_pair(difficulty):
    scenes = shared_object_scenes(*textures(), 20, size=64, difficulty=difficulty)
    assert removal_effects(GREY, scenes).abs().max() < 1e-6
    z, s = GREY(scenes.images), GREY(scenes.references)
    assert (z[:, None] - s).abs().max() < 1e-3
    easy = shared_object_scenes(*textures(), 20, size=64, difficulty="easy")
    assert removal_effects(GREY, easy).abs().max() > 1e-5


@settings(max_examples=40, deadline=None)
@given(
    difficulty=st.sampled_from(DIFFICULTIES),
    n_objects=st.integers(2, 5),
    size=st.integers(24, 70),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_every_scene_shows_every_object_in_its_own_cell(difficulty, n_objects, size, seed, data):
    classes = 2 * n_objects - 1 + data.draw(st.integers(0, 2))
    labels = data.draw(st.permutations([c - 3 for c in range(classes) for _ in range(2)]))
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in labels:
        height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
        array = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        array[rng.random((height, width)) < rng.random(), :3] = rng.integers(0, 256, 3)
        array[..., 3] = 255 * (rng.random((height, width)) < rng.random())  # may be a few scattered pixels
        array[rng.integers(height), rng.integers(width), 3] = 255
        pictures.append(Image.fromarray(array))
    scenes = shared_object_scenes(pictures, labels, 2, size=size, n_objects=n_objects, difficulty=difficulty, seed=seed)
    side = 2 if n_objects < 5 else 3
    for view in both(scenes):
        assert view.images.isfinite().all()
        assert 0 <= view.images.min() <= view.images.max() <= 1
        for i in range(2):
            cells = {cell_of(view.objects[i] == j, side) for j in range(1, n_objects + 1)}
            assert len(cells) == n_objects
            if difficulty != "easy":
                for j in range(1, n_objects + 1):
                    mean = view.images[i][:, view.objects[i] == j].mean(1)
                    assert torch.allclose(mean, view.backgrounds[i], atol=0.01)
    for i in range(2):
        assert cell_of(scenes.masks[i, 0], side) != cell_of(scenes.reference_masks[i, 0], side)
        assert scenes.labels[i, 0] == scenes.reference_labels[i, 0]
        assert len({*scenes.labels[i].tolist(), *scenes.reference_labels[i].tolist()}) == 2 * n_objects - 1
        assert {*scenes.labels[i].tolist(), *scenes.reference_labels[i].tolist()} <= set(labels)


def test_a_hard_pair_shares_a_class_with_two_pictures():
    pictures, labels = textures(classes=9, each=1)
    more = textures(classes=1, each=1, seed=1)[0]
    scenes = shared_object_scenes(pictures + more, [*labels, 5], 6, size=32)
    assert scenes.labels[:, 0].tolist() == [5] * 6
    with pytest.raises(ValueError, match=r"`labels` with two pictures of a class.*difficulty=\"medium\""):
        shared_object_scenes(pictures, labels, 1, size=32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"pictures": 3}, TypeError, "`pictures`.*sequence of PIL images.*3"),
        ({"pictures": []}, TypeError, "`pictures`"),
        ({"pictures": [np.zeros((3, 3))] * 14}, TypeError, "`pictures`.*ndarray.*fromarray"),
        ({"pictures": [Image.new("I;16", (4, 4))] * 14}, ValueError, r"`pictures`.*\[0\].*'I;16'"),
        ({"pictures": [Image.new("RGBA", (4, 4), (0, 0, 0, 127))] * 14}, ValueError, r"`pictures`\[0\].*alpha"),
        ({"labels": [0.5] * 14}, TypeError, "`labels`"),
        ({"labels": [1, 2]}, ValueError, "`labels`.*14"),
        ({"labels": [i % 6 for i in range(14)]}, ValueError, "`labels` of at least 7 classes.*4 objects.*got 6"),
        ({"n_pairs": 0}, ValueError, "`n_pairs`"),
        ({"size": 2.0}, TypeError, "`size`"),
        ({"size": 15}, ValueError, "`size` to be at least 16.*15"),
        ({"n_objects": 1}, ValueError, "`n_objects` to be 2 to 255.*1"),
        ({"n_objects": 256}, ValueError, "`n_objects` to be 2 to 255.*256"),
        ({"difficulty": "hrad"}, ValueError, "`difficulty`.*'medium'.*'hrad'. Did you mean 'hard'"),
        ({"difficulty": None}, ValueError, "`difficulty`.*None"),
        ({"seed": -1}, ValueError, "`seed`.*-1"),
        ({"seed": 0.5}, TypeError, "`seed`.*0.5"),
    ],
)
def test_wrong_arguments_are_named(changed, error, message):
    pictures, labels = textures(classes=7)
    arguments = {"pictures": pictures, "labels": labels, "n_pairs": 1, "size": 32, **changed}
    with pytest.raises(error, match=message):
        shared_object_scenes(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"encoder": 3}, TypeError, "`encoder`"),
        ({"scenes": torch.ones(2)}, TypeError, "`scenes`.*shared_object_scenes"),
        ({"similarity": "cosin"}, ValueError, "`similarity`"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"encoder": nn.Identity()}, ValueError, "output_selector"),
        ({"encoder": lambda x: x.mean((0, 2, 3))[None]}, ValueError, "one embedding for each.*`scenes`"),
    ],
)
def test_wrong_arguments_of_removal_effects_are_named(changed, error, message):
    scenes = shared_object_scenes(*textures(), 2, size=32)
    with pytest.raises(error, match=message):
        removal_effects(**{"encoder": GREY, "scenes": scenes, **changed})


def test_wrong_numbers_of_objects_and_pairs_are_named():
    scenes = shared_object_scenes(*textures(), 2, size=32)
    with pytest.raises(ValueError, match=r"`index`.*4 objects.*5"):
        scenes.without(5)
    with pytest.raises(ValueError, match=r"`index`.*0"):
        scenes.without(0)
    with pytest.raises(TypeError, match=r"`index`.*scenes\[i : i \+ 1\]"):
        scenes[0]


@pytest.mark.skipif(DATA is None, reason="set CAPTUM_FAM_DATA to the folder of pretrained encoders and photos")
def test_a_trained_encoder_rests_on_the_shared_photo_and_mean_colours_do_not():
    import importlib.util
    from pathlib import Path

    from benchmarks import objects

    spec = importlib.util.spec_from_file_location("pretrained_encoders", Path(DATA) / "encoders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    encoder = module.load("mobilenet_v2_imagenet")
    mean, std = (torch.tensor(encoder.meta[name])[:, None, None] for name in ("mean", "std"))
    scenes = shared_object_scenes(*objects.coco_cutouts(DATA), 16, difficulty="medium")
    effects = removal_effects(lambda x: encoder.net((x - mean) / std), scenes)
    assert (effects[:, 0] > effects[:, 1:].max(1).values).float().mean() > 0.6  # chance: 0.25, by 0.11 more or less
    assert effects[:, 0].mean() > 5 * effects[:, 1:].mean()
    assert removal_effects(GREY, scenes).abs().max() < 1e-5
