"""The explorer's mode of shared parts: its numbers by hand and from SharedParts, and what a browser shows of them."""

import sys

import numpy as np
import pytest
import torch
from browser import chromium, needs_axe, no_wider_than_the_window, opened, pixels, violations
from encoders import HeadEncoder, random, seeded
from test_explorer import numbers, seen
from test_explorer_page import go_by_tab, named, number, point
from torch import nn

from captum_fam import CorrespondenceMap, SharedParts, SimilarityDecomposition, explore_pair

pytest.importorskip("sklearn")

SIDES = {"query": (3, 5), "reference": (4, 2)}  # grids
COLOURS = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0)]  # blue, orange, green, vermilion
N = 3  # parts


class Pixels(nn.Module):
    """Each pixel is a place; the embedding is a head's of their mean."""

    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Identity()
        self.head = nn.Linear(len(weight[0]), len(weight), bias=False)
        self.head.weight.data = torch.tensor(weight, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.layer(x).mean((2, 3)))


ENCODER = Pixels([[1.0, 0.2, 0.0], [0.1, 1.0, 0.3], [0.0, -0.4, 1.0]])
OTHER = Pixels([[1.0, 1.0, 1.0]])
PARTS = SharedParts(ENCODER, ENCODER.layer, N)
QUERY, REFERENCES, CONTROL = (
    torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    for seed, shape in enumerate([(1, 3, 3, 5), (2, 3, 4, 2), (1, 3, 4, 2)])
)
QUERY[..., 2, 4] = 0  # a place without any part
ALL = [*REFERENCES[:, None], CONTROL]
FOUND = [PARTS.explain(QUERY, reference) for reference in ALL]
PHOTOS = [image[0].repeat_interleave(16, 1).repeat_interleave(16, 2).numpy() for image in (QUERY, *ALL)]


def explore(method=PARTS, **options):
    photos = [photo.transpose(1, 2, 0) for photo in PHOTOS]
    return explore_pair(QUERY, REFERENCES, method, control=CONTROL, photos=photos, **options)


def shared(page):
    """What a page holds of the mode, for each reference."""
    return [one["modes"]["shared parts"] for one in seen(page)["references"]]


def test_shares_and_their_sum_by_hand():
    """Two parts of two places: of red and of green, which the head makes alike."""
    encoder = Pixels([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    query, reference = torch.zeros(2, 1, 3, 1, 2, dtype=torch.float64)
    query[0, 0, 0, 0], query[0, 1, 0, 1] = 2, 1  # vectors (1, 0) and (1/2, 1/2)
    reference[0, 0, 0, 0], reference[0, 1, 0, 1] = 1, 3  # (1/2, 0) and (3/2, 3/2)
    parts = SharedParts(encoder, encoder.layer, 2, similarity="dot")
    (mode,) = shared(explore_pair(query, reference, parts, photos=[np.zeros((4, 4))] * 2))
    expected = {"part 1": 1.5, "part 2": 0.5, "others": 1.75, "no_part": 0, "sum": 3.75, "score": 3.75, "remainder": 0}
    assert list(mode["sums"]) == list(expected)
    assert mode["sums"] == pytest.approx(expected, abs=0.01)
    assert mode["sums"]["sum"] == pytest.approx(3.75, abs=1e-9)
    assert mode["totals"] == pytest.approx([2.375, 1.375], abs=0.01)
    green, red = numbers(mode["whole"]).reshape(2, 4)
    np.testing.assert_allclose([green, red], [[0, 1 / 3, 0, 1], [2 / 3, 0, 1 / 3, 0]], atol=0.01)


@pytest.mark.parametrize(
    "method",
    [
        PARTS,
        [CorrespondenceMap(ENCODER, ENCODER.layer), PARTS],
        [PARTS, SimilarityDecomposition(ENCODER, ENCODER.layer)],
    ],
)
def test_numbers_are_those_of_shared_parts_and_add_up(method):
    page = explore(method)
    data = seen(page)
    assert data["names"] == ["score", "alike", "shared parts"]
    assert data["modes"]["shared parts"] == {"colours": [list(colour) for colour in COLOURS[:N]]}
    for mode, found, one in zip(shared(page), FOUND, data["references"], strict=True):
        assert (mode["query"], mode["reference"]) == ([3, 5], [4, 2])
        W = torch.cat([found.maps[0].flatten(1), found.reference_maps[0].flatten(1)], 1).numpy()
        np.testing.assert_allclose(np.sqrt(numbers(mode["whole"]).reshape(N, -1)), np.sqrt(W / W.max()), atol=3e-4)
        shares, sums = found.shares[0], mode["sums"]
        assert [sums[f"part {a + 1}"] for a in range(N)] == pytest.approx(shares.diagonal().tolist(), abs=1e-12)
        off = sum(shares[a, b].item() for a in range(N) for b in range(N) if a != b)
        assert sums["others"] == pytest.approx(off, abs=1e-12)
        assert sums["no_part"] == found.residual.item()
        terms = [value for part, value in sums.items() if part not in ("sum", "score", "remainder")]
        assert len(terms) == N + 2
        assert sums["sum"] == pytest.approx(sum(terms), abs=1e-15)
        assert sums["sum"] == pytest.approx(one["score"], abs=1e-6)
        assert abs(sums["remainder"]) < 1e-9
        assert mode["totals"] == pytest.approx(found.totals[0].tolist(), rel=1e-4)


def test_what_no_place_has_is_in_no_part():
    encoder = seeded(HeadEncoder)  # with biases
    images = random(2, 3, 24, 24)
    parts = SharedParts(encoder, encoder.layer)
    with pytest.warns(UserWarning, match="stretched"):  # random images
        (mode,) = shared(explore_pair(images[:1], images[1:], parts))
    with pytest.warns(UserWarning, match="do not add up"):
        found = parts.explain(images[:1], images[1:])
    assert abs(found.residual.item()) > 0.01
    assert mode["sums"]["no_part"] == pytest.approx(found.residual.item(), abs=1e-9)
    assert mode["sums"]["remainder"] == pytest.approx(0, abs=1e-9)


def test_without_scikit_learn_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ValueError, match="scikit-learn is not installed"):
        explore()


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ([PARTS, PARTS], TypeError, "a FeatureActivationMap or a SharedParts, a list of different ones"),
        (SharedParts(ENCODER, ENCODER.layer, similarity="euclidean"), ValueError, "SharedParts needs a similarity"),
        (
            [PARTS, SimilarityDecomposition(ENCODER, ENCODER.layer, similarity="dot")],
            ValueError,
            "methods of one similarity",
        ),
        ([PARTS, SimilarityDecomposition(OTHER, OTHER.layer)], ValueError, "methods of one encoder"),
    ],
)
def test_what_does_not_go_together_is_named(method, error, message):
    with pytest.raises(error, match=message):
        explore(method)


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "parts.html"
    explore().save(path)
    return path


def go(page):
    page.check("[name=mode][value='shared parts']")
    return page


@pytest.fixture
def page(browser, file):
    with opened(browser, file) as page:
        yield go(page)


def strengths(k):
    """Of both sides, (n, N): how strong parts are, relative to the strongest place of the pair."""
    W = [maps[0].flatten(1).numpy() for maps in (FOUND[k].maps, FOUND[k].reference_maps)]
    return {side: w / max(W[0].max(), W[1].max()) for side, w in zip(SIDES, W)}


def shows(page, k, alone=None):
    """Both images in the colours of their parts, or of one alone; and its row of the table."""
    for side, w in strengths(k).items():
        part = w.argmax(0) if alone is None else np.full(w.shape[1], alone)
        actual = pixels(page, f"#{side}").reshape(-1, 4)
        assert pixels(page, f"#{side}").shape[:2] == SIDES[side]
        opacity = 255 * 0.85 * np.sqrt(w[part, np.arange(len(part))])
        np.testing.assert_allclose(actual[:, 3], opacity, atol=1)
        seen_well = opacity > 50  # the canvas keeps colours times opacity
        assert seen_well.any()
        np.testing.assert_allclose(actual[seen_well, :3], np.array(COLOURS)[part[seen_well]], atol=4)
    rows = page.locator("#sums tr.alone th").all_inner_texts()
    assert rows == ([] if alone is None else [f"part {alone + 1}"])
    if alone is not None:
        said, found = page.inner_text("#live"), FOUND[k]
        share, score = found.shares[0, alone, alone].item(), found.score.item()
        assert number(f"Part {alone + 1} adds", said) == pytest.approx(share, rel=0.006)
        assert number("the score of", said) == pytest.approx(score, rel=0.006)
        assert f"({100 * share / score:.1f}% of it)".replace("-", "\u2212") in said
        assert number("other parts,", said) == pytest.approx(found.totals[0, alone].item(), rel=0.006)


def labels(page, side):
    """The numbers on an image, and their places."""
    found = page.locator(f"#{side} .box").all()
    return {box.inner_text(): int(box.get_attribute("data-place")) for box in found}


def test_at_first_each_place_has_the_colour_of_its_strongest_part_which_is_numbered(page):
    shows(page, 0)
    for side, w in strengths(0).items():
        own = w.argmax(0)
        tops = {
            str(part + 1): int(np.where(own == part, w[part], -1).argmax()) for part in range(N) if (own == part).any()
        }
        assert len(tops) > 1
        assert labels(page, side) == tops
    assert "strongest part" in page.inner_text("#live")
    for name in ("#scale", "#maps"):
        assert page.is_hidden(name)
    assert page.locator("#matches li").count() == 0
    page.check("[name=mode][value=score]")  # and back
    assert page.is_visible("#maps")
    assert page.locator("#matches li").count() > 0
    assert page.locator("#sums button").count() == page.locator("#sums .bar").count() == 0


@pytest.mark.parametrize("side", SIDES)
def test_pointing_at_a_place_shows_its_part_alone_on_both_images(page, side):
    w, met = strengths(0)[side], set()
    for place in np.flatnonzero(w.any(0)).tolist():
        part = int(w[:, place].argmax())
        point(page, side, place, grid=SIDES[side])
        shows(page, 0, part)
        assert labels(page, side) == {str(part + 1): place}
        other = "reference" if side == "query" else "query"
        assert labels(page, other) == {str(part + 1): int(strengths(0)[other][part].argmax())}
        said = page.inner_text("#live")
        assert named(said) == [divmod(place, SIDES[side][1])]
        assert f", belongs most to part {part + 1}." in said
        met.add(part)
    assert len(met) > 1
    page.mouse.move(1, 1)
    shows(page, 0)


def test_a_place_may_have_no_part(page):
    point(page, "query", 14, grid=SIDES["query"])
    assert "row 3, column 5, has no part." in page.inner_text("#live")
    assert labels(page, "query") == {"\u2013": 14}
    shows(page, 0)
    page.mouse.down()
    page.mouse.up()  # keeps nothing
    assert page.is_disabled("#free")


def test_an_image_without_activations_has_no_parts(browser, tmp_path):
    path, black = tmp_path / "parts.html", torch.zeros_like(QUERY)
    with pytest.warns(UserWarning, match="zero or not finite"):
        explore_pair(QUERY, black, PARTS).save(path)
    with opened(browser, path) as page:
        go(page)
        go_by_tab(page, "reference")
        assert "row 1, column 1, has no part." in page.inner_text("#live")
        assert not pixels(page, "#reference")[..., 3].any()
        page.keyboard.press("Tab")
        assert "Part 1 adds 0 " in page.inner_text("#live")
        assert "NaN" not in page.inner_text("main")


def test_pointing_at_a_bar_shows_its_part_and_a_click_keeps_it(page):
    rows = page.locator("#sums tr[data-own]")
    assert rows.count() == N
    for part in range(N):
        rows.nth(part).locator(".bar").hover()
        shows(page, 0, part)
    page.keyboard.press("m")  # the bar is gone
    assert page.locator("#sums .bar").count() == page.locator(".box.here").count() == 0
    go(page)
    page.hover("h2")
    shows(page, 0)
    rows.nth(2).locator("button").click()
    page.mouse.move(1, 1)
    shows(page, 0, 2)
    assert [row.get_attribute("aria-pressed") for row in page.locator("#sums button").all()] == ["false"] * 2 + ["true"]
    point(page, "query", 0, grid=SIDES["query"])  # another, while it is pointed at
    shows(page, 0, int(strengths(0)["query"][:, 0].argmax()))
    page.mouse.move(1, 1)
    shows(page, 0, 2)
    page.click("#free")
    page.mouse.move(1, 1)
    shows(page, 0)


def test_the_keyboard_alone_does_the_same(page):
    go_by_tab(page, "query")
    w = strengths(0)["query"]
    start = int(np.where(w.argmax(0) == 0, w[0], -1).argmax())
    shows(page, 0, 0)
    assert named(page.inner_text("#live")) == [divmod(start, 5)]
    page.keyboard.press("ArrowLeft" if start % 5 else "ArrowRight")
    at = start - 1 if start % 5 else start + 1
    shows(page, 0, int(w[:, at].argmax()))
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # the first of the table
    for part in range(N):
        assert page.evaluate("document.activeElement.textContent") == f"part {part + 1}"
        shows(page, 0, part)
        page.keyboard.press("Tab")
    shows(page, 0, int(w[:, at].argmax()))  # which is kept
    page.keyboard.press("Escape")
    shows(page, 0)
    page.keyboard.press("Shift+Tab")
    shows(page, 0, N - 1)
    page.keyboard.press("Tab")
    shows(page, 0)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("c")  # the parts of the control, from the same button
    shows(page, 2, N - 2)
    assert page.evaluate("document.activeElement.textContent") == f"part {N - 1}"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    assert page.locator("#sums [aria-pressed=true]").count() == 0  # that of another pair is not kept
    page.keyboard.press("m")
    assert page.is_checked("[name=mode][value=score]")


def test_a_finger_does_the_same(browser, file):
    with opened(browser, file, width=390, has_touch=True, is_mobile=True) as page:
        go(page)
        assert no_wider_than_the_window(page)
        part = int(strengths(0)["reference"][:, 3].argmax())
        point(page, "reference", 3, grid=SIDES["reference"], tap=True)
        shows(page, 0, part)
        page.locator("#sums button").nth(part).tap()  # again: lets go
        shows(page, 0)
        page.locator("#sums .bar").nth(1).tap()
        shows(page, 0, 1)


def test_bars_and_numbers_are_the_shares_and_add_up(page):
    for k, found in enumerate(FOUND):
        page.check(f"[name=shown][value='{k}']")
        shows(page, k)
        cells = page.locator("#sums td[data-part]").all()
        values = {cell.get_attribute("data-part"): float(cell.inner_text().replace("\u2212", "-")) for cell in cells}
        own, score = found.shares[0].diagonal().tolist(), found.score.item()
        terms = [*own, found.shares.sum().item() - sum(own), found.residual.item()]
        names = [f"part {a + 1}" for a in range(N)] + ["others", "no_part"]
        assert values == pytest.approx(
            dict(zip([*names, "sum", "score", "remainder"], [*terms, score, score, 0])), abs=6e-7
        )
        assert page.locator("#sums th").all_inner_texts()[:5] == [*names[:N], "other pairs of parts", "no part"]
        bars = [bar.bounding_box() for bar in page.locator("#sums .bar span").all()]
        scale = bars[N]["width"] / terms[N]
        np.testing.assert_allclose([bar["width"] for bar in bars], np.abs(terms) * abs(scale), atol=1)
        (zero,) = {round(bars[i]["x"] + (0 if terms[i] > 0 else bars[i]["width"])) for i in range(N + 1)}
        assert zero > 0
        colours = page.locator("#sums .bar span").evaluate_all("all => all.map((one) => one.style.background)")
        assert colours == [f"rgb{colour}" for colour in COLOURS[:N]] + [""] * 2


def test_a_bar_below_zero_ends_where_the_others_begin(browser, tmp_path):
    opposed = Pixels([[1.0, -1.0, 0.0], [0.0, 0.1, 0.1]])
    path = tmp_path / "parts.html"
    page = explore(SharedParts(opposed, opposed.layer, N))
    page.save(path)
    terms = list(shared(page)[0]["sums"].values())[: N + 1]
    assert min(terms) < -0.1 < 0.1 < max(terms)
    with opened(browser, path) as page:
        go(page)
        bars = [bar.bounding_box() for bar in page.locator("#sums .bar span").all()]
        zeros = [bar["x"] + (bar["width"] if term < 0 else 0) for bar, term in zip(bars, terms)]
        np.testing.assert_allclose(zeros, zeros[0], atol=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1400])
def test_it_is_read_on_any_screen_and_on_paper(browser, file, width, scheme):
    with opened(browser, file, width=width, color_scheme=scheme) as page:
        go(page)
        page.locator("#sums button").nth(1).click()
        page.mouse.move(1, 1)
        assert no_wider_than_the_window(page)
        page.emulate_media(media="print")
        shows(page, 0, 1)
        assert page.is_visible("#sums .bar")


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1400])
def test_axe_finds_no_violation(browser, file, width, scheme):
    with opened(browser, file, width=width, color_scheme=scheme) as page:
        go(page)
        assert violations(page) == []
        page.locator("#sums button").nth(1).click()
        assert violations(page) == []
