"""benchmarks.train_students: what its students are, and what they are taught."""

import math

import pytest
import torch
from PIL import Image

from benchmarks import train_students as students
from captum_fam import FeatureActivationMap, IntegratedDecomposition, SimilarityDecomposition

pytest.importorskip("timm")

SIDE, GRID, TILE = students.SIDE, students.GRID, students.TILE


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=2, seed=0):
    return torch.rand(n, 3, SIDE, SIDE, generator=seeded(seed)) * 2 - 1


def pool(n=4, seed=0):
    return torch.randint(256, (n, 3, SIDE, SIDE), dtype=torch.uint8, generator=seeded(seed))


# The transformers


@pytest.fixture(scope="module", params=["vit_token", "vit_mean"])
def transformer(request):
    if not (students.FOLDER / f"{request.param}.pt").exists():
        pytest.skip(f"{request.param} is not trained yet")
    return request.param, students.load(request.param)


def test_a_transformer_embeds_as_its_token_or_as_the_mean_of_its_places(transformer):
    name, net = transformer
    assert not net.training
    with torch.no_grad():
        x = images()
        z, (same, places) = net(x), net.head(net.trunk(x))
    assert z.shape == (2, 128)
    assert places.shape == (2, 128, GRID, GRID)
    assert z.isfinite().all()
    assert torch.equal(z, same)
    assert torch.allclose(places.mean((2, 3)), z, atol=1e-5) == (name == "vit_mean")


@pytest.mark.parametrize("kind", [FeatureActivationMap, SimilarityDecomposition, IntegratedDecomposition])
@pytest.mark.filterwarnings("ignore:The places of layer")  # of a class token, some passes by the patches
def test_its_maps_have_the_layers_places(transformer, kind):
    _, net = transformer
    method = kind(net, None if kind is IntegratedDecomposition else net.vit.blocks[-1].norm1)
    maps = method.attribute(images(1), reference=images(1, seed=1))
    # Without a layer, integrated places are those of the last stage of at least 14 by 14 places: in the trunk.
    side = 20 if kind is IntegratedDecomposition else GRID
    assert maps.shape == (1, 1, side, side)
    assert maps.isfinite().all()
    assert maps.std() > 0


@pytest.mark.filterwarnings("ignore:The places of layer")
def test_its_tokens_may_be_integrated_too(transformer):
    _, net = transformer
    method = IntegratedDecomposition(net, net.vit.blocks[-1].norm1)
    maps = method.attribute(images(1), reference=images(1, seed=1))
    assert maps.shape == (1, 1, GRID, GRID)
    assert maps.isfinite().all()


def test_its_trunk_is_the_packages(transformer):
    _, net = transformer
    ours = students.bundled.bundled_encoder().features[: students.TRUNK].state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in net.trunk.state_dict().items())


def test_a_transformer_that_is_saved_is_loaded_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(students, "FOLDER", tmp_path)
    torch.manual_seed(0)
    model = students.build("vit_mean").eval()
    trunk = students.bundled.bundled_encoder().features[: students.TRUNK]
    model.trunk.load_state_dict(trunk.state_dict())
    file = students.save("vit_mean", model)
    assert file.parent == tmp_path
    assert not any(key.startswith("trunk.") for key in torch.load(file, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(students.load("vit_mean")(images(1)), model(images(1)), rtol=0.02, atol=0.02)


# What they are taught

MAPS = torch.eye(8)[:, None, :, None, None].expand(8, 2, 8, 2, 2).clone()  # eight pairs, each of a direction of its own
NUMBERS, SCENE, ZERO = torch.arange(8), torch.zeros(8, dtype=torch.bool), torch.zeros(8)


def loss(maps, taught=MAPS, positive=True, mean=ZERO, means=None, numbers=NUMBERS, scene=SCENE, norm=1.0):
    """Of a student that finds these maps (B, 2, C, h, w)."""
    torch.manual_seed(0)
    lesson = students.Lesson(mean, ZERO.expand(2, 8) if means is None else means, torch.tensor(norm), positive)
    return lesson.loss(lambda x: (x.mean((2, 3)), x), maps, taught, scene, numbers).item()


def least(positive=True, wrong=7, wrong_collages=6):
    """NT-Xent where an image is like its pair alone, and orthogonal to the others: by hand."""
    pairs = math.log(1 + wrong * math.exp(-1 / students.TEMPERATURE))
    collages = math.log(
        1 + wrong_collages * math.exp(-(0.5**0.5) / students.TEMPERATURE)
    )  # half of each is the image's
    return pairs + collages * positive


@pytest.mark.parametrize("positive", [True, False])
def test_who_has_the_teachers_relations_has_nothing_left_to_learn_but_who_is_a_pair(positive):
    assert loss(MAPS, positive=positive) == pytest.approx(least(positive), abs=1e-6)
    turned, _ = torch.linalg.qr(torch.randn(8, 8, generator=seeded()))  # other features of the same relations
    assert loss(torch.einsum("dc, bpchw -> bpdhw", turned, MAPS), positive=positive) == pytest.approx(
        least(positive), abs=1e-5
    )
    for seed in range(3):
        random = torch.rand(MAPS.shape, generator=seeded(seed))
        assert loss(random, positive=positive) > least(positive) + 1


@pytest.mark.parametrize("positive", [True, False])
def test_what_all_places_share_is_not_taught(positive):
    common = torch.full((8,), 3.0)
    taught = MAPS + common[:, None, None]
    norm = taught[0, 0, :, 0, 0].norm().item()  # of all places: all weigh the same
    found = loss(MAPS, taught, positive, mean=common, means=common.expand(2, 8), norm=norm)
    assert found == pytest.approx(loss(MAPS, positive=positive), abs=1e-5)
    assert loss(MAPS, taught, positive, norm=norm) > found + 1


def test_features_that_are_not_negative_learn_the_positive_part_of_the_cosines():
    signed = torch.cat([MAPS[:4], -MAPS[:4]])  # cosines of -1, too
    assert loss(MAPS, signed, positive=True) == pytest.approx(least(), abs=1e-6)
    assert loss(MAPS, signed, positive=False) > least() + 1
    opposite = math.log(1 + 6 * math.exp(-10) + math.exp(-20))  # six are orthogonal, one is the opposite
    assert loss(signed, signed, positive=False) == pytest.approx(opposite, abs=1e-6)
    assert loss(signed, signed, positive=True) > least() + 1


def test_views_and_scenes_have_means_of_their_own():
    means = torch.stack([torch.full((8,), 3.0), torch.full((8,), -5.0)])
    scene = NUMBERS % 2 == 1
    taught = MAPS + means[scene.long()][:, None, :, None, None]
    right, wrong = (loss(MAPS, taught, False, means=means, scene=kind) for kind in (scene, ~scene))
    assert right < wrong - 1


def test_two_pairs_of_one_photo_are_not_told_apart():
    same = torch.cat([MAPS[:4], MAPS[:4]])
    numbers = torch.arange(8) % 4
    assert loss(same, same, numbers=numbers) == pytest.approx(least(wrong=6, wrong_collages=4), abs=1e-6)
    assert loss(same, same) > math.log(2)


def test_a_collage_has_half_of_a_map_beside_half_of_the_next():
    torch.manual_seed(0)
    maps = torch.arange(16.0).reshape(4, 1, 1, 4)
    made = students._halves(maps)[:, 0, 0].tolist()
    for n, row in enumerate(made):
        own, after = ([maps[m % 4, 0, 0, :2].tolist(), maps[m % 4, 0, 0, 2:].tolist()] for m in (n, n + 1))
        assert row[:2] in own
        assert row[2:] in after
    assert len({row[0] % 4 for row in made}) == 2  # at either end


# The pictures


def test_views_are_pictures_that_a_seed_gives_again():
    made, again = (students.view(pool(), SIDE, 0.25, seeded(3)) for _ in range(2))
    assert made.shape == (4, 3, SIDE, SIDE)
    assert made.isfinite().all()
    assert 0 <= made.min() < made.max() <= 1
    assert torch.equal(made, again)
    assert not torch.equal(made, students.view(pool(), SIDE, 0.25, seeded(4)))


def test_a_view_of_the_whole_is_the_picture_in_another_light():
    y = torch.linspace(0, 1, SIDE)[:, None].expand(-1, SIDE)
    picture = (255 * torch.stack([y, y, y]))[None].expand(40, -1, -1, -1)
    made = students.view(picture, SIDE, 1.0, seeded()).mean(1)
    downward = [torch.corrcoef(torch.stack([one.flatten(), y.flatten()]))[0, 1].item() for one in made]
    assert min(downward) > 0.85  # turned by 20 degrees at most, never upside down


@pytest.mark.parametrize("content", ["noise", "black", "white"])
def test_pieces_are_pictures_and_where_they_are(content):
    of = {"noise": pool(64), "black": torch.zeros_like(pool(64)), "white": torch.full_like(pool(64), 255)}[content]
    ground = 0.3 + 0.4 * torch.rand(64, 3, 1, 1, generator=seeded(1))
    (made, inside), (again, _) = (students.pieces(of, ground, seeded(3)) for _ in range(2))
    assert made.shape == (64, 3, TILE, TILE)
    assert inside.shape == (64, 1, TILE, TILE)
    assert made.isfinite().all()
    assert 0 <= made.min() <= made.max() <= 1
    assert torch.equal(made, again)
    assert set(inside.unique().tolist()) == {0.0, 1.0}
    share = inside.mean((1, 2, 3))
    assert share.min() > 0.2
    assert 0.1 < (share == 1).float().mean() < 0.45  # a quarter are squares
    colour = (made * inside).sum((2, 3)) / inside.sum((2, 3))
    of_ground = ((colour - ground[:, :, 0, 0]).abs().amax(1) < 0.02).float().mean()
    assert 0.3 < of_ground < 0.75  # half of them


def test_scenes_share_one_picture(monkeypatch):
    shown = []

    def spy(images, ground, generator):
        shown.append(images[:, 0, 0, 0].tolist())
        tile = images[:, :, :1, :1].float().expand(-1, -1, TILE, TILE) / 255
        return tile, torch.ones(len(images), 1, TILE, TILE)

    colours = torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, SIDE, SIDE)
    monkeypatch.setattr(students, "pieces", spy)
    shared = torch.tensor([5, 240, 30])
    one, two = students.scenes(colours, shared, seeded())
    assert shown[0] == shown[4] == shared.tolist()
    for scene, others in ((one, shown[1:4]), (two, shown[5:8])):
        tiles = scene.unflatten(3, (2, TILE)).unflatten(2, (2, TILE))[:, 0]  # (n, 2, TILE, 2, TILE)
        middles = (tiles[:, :, TILE // 2, :, TILE // 2] * 255).flatten(1)
        expected = torch.tensor([shared.tolist(), *others]).T.float()
        torch.testing.assert_close(middles.sort(1).values, expected.sort(1).values, rtol=0, atol=0.01)


def test_scenes_are_pictures_that_a_seed_gives_again():
    made, again = (students.scenes(pool(8), torch.arange(3), seeded(3)) for _ in range(2))
    assert [scene.shape for scene in made] == [(3, 3, SIDE, SIDE)] * 2
    assert all(scene.isfinite().all() and 0 <= scene.min() < scene.max() <= 1 for scene in made)
    assert all(torch.equal(a, b) for a, b in zip(made, again))
    assert not torch.equal(made[0], made[1])


def test_a_student_learns_but_its_trunk_does_not(monkeypatch):
    trunk = students.BundledEncoder().features[: students.TRUNK]
    monkeypatch.setattr(students, "teacher", lambda: (trunk, None))
    monkeypatch.setattr(students, "used", lambda *args: "")
    monkeypatch.setattr(students, "BATCH", 8)
    n = 16
    given = {
        "trunk": torch.rand(n, 2, 112, 10, 10, generator=seeded()).half(),
        "teacher": torch.rand(n, 2, 1280, 5, 5, generator=seeded()).half(),
        "scene": torch.arange(n) % 2 == 0,
        "numbers": torch.arange(n),
    }
    torch.manual_seed(0)
    before = students.build("bundled").state_dict()
    after = students.train("bundled", given, None).state_dict()
    parts = [(name, int(name.split(".")[1]) < students.TRUNK) for name in before if name.endswith("weight")]
    for name, is_trunk in parts:
        value = trunk.state_dict()[name.removeprefix("features.")] if is_trunk else before[name]
        assert torch.equal(after[name], value) == is_trunk, name


def test_middles_are_square():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    assert students.square(wide).shape == (SIDE, SIDE, 3)
    assert (students.square(wide)[2:-2, 2:-2] == (0, 0, 255)).all()
