"""The pair explorer's page in a real browser: what is drawn, printed and said, against NumPy."""

import json
import re

import numpy as np
import pytest
import torch
from browser import chromium, needs_axe, no_wider_than_the_window, opened, pixels, violations
from encoders import HeadEncoder, PatchEncoder, random, seeded

from captum_fam import FeatureActivationMap, SimilarityDecomposition
from captum_fam.demo import photographs
from captum_fam.explorer import explore_pair

SIDES = {"query": (3, 5), "reference": (4, 2)}  # grids
STEP, CONTROL = 8, 3  # pixels of a place; the references are 0 to 2
TITLES = ["cat.jpg", "tom.jpg", "rocket.jpg", "cup.jpg", "nothing.jpg"]
QUERY, REFERENCES = random(1, 3, 24, 40), random(4, 3, 32, 16, seed=2)
PHOTOS = [*(QUERY / 10 + 0.5).clamp(0, 1), *(REFERENCES / 10 + 0.5).clamp(0, 1)]
HOSTILE = [
    "<img src=x onerror=\"alert('title')\">",
    "</script><script>alert('script')</script>",
    "<!--<script>\"'`&amp;\\u003c/* data */",
    "two\nlines\t\x00and \U0001f431\u200d\u2764 \u0645\u0631\u062d\u0628\u0627 \u202egpj.exe",
    "long" * 75 + "\udcff.jpg",
]


ENCODER = seeded(PatchEncoder)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def places(images):
    """What the encoder has of each place, (B, N, 6), without torch."""
    B, _, H, W = images.shape
    patches = images.numpy().reshape(B, 3, H // STEP, STEP, W // STEP, STEP).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, -1, 3 * STEP**2) @ ENCODER.layer.weight.detach().numpy().reshape(6, -1).T


def expected():
    """The matrices (K, N, N') of both modes, and the scores."""
    head = ENCODER.head.weight.detach().numpy()
    (here,), there = places(QUERY), places(REFERENCES)
    z, s = here.mean(0) @ head.T, there.mean(1) @ head.T
    parts = (here @ head.T / 15) @ (there @ head.T / 8).transpose(0, 2, 1)
    scores = unit(s) @ unit(z)
    return {
        "score": parts / np.linalg.norm(z) / np.linalg.norm(s, axis=1)[:, None, None],
        "alike": unit(here) @ unit(there).transpose(0, 2, 1),
    }, scores


MATRICES, SCORES = expected()
# One scale for all references: the control, which comes last, is judged by it.
CENTRES = {"score": 0, "alike": MATRICES["alike"][:CONTROL].mean()}
LIMITS = {mode: np.quantile(abs(M[:CONTROL] - CENTRES[mode]), 0.999) for mode, M in MATRICES.items()}


def explore(titles=TITLES, **options):
    return explore_pair(
        QUERY,
        REFERENCES[:CONTROL],
        SimilarityDecomposition(ENCODER, ENCODER.layer),
        control=REFERENCES[CONTROL:],
        photos=PHOTOS,
        titles=titles,
        **options,
    )


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "pair.html"
    explore().save(path)
    return path


@pytest.fixture
def page(browser, file):
    with opened(browser, file) as page:
        yield page


def point(page, side, place, grid=None, tap=False):
    """Goes to the middle of a place of an image, as somebody who looks at it."""
    h, w = grid or SIDES[side]
    page.locator(f"#{side} img").scroll_into_view_if_needed()
    image = page.locator(f"#{side} img").bounding_box()
    at = image["x"] + (place % w + 0.5) / w * image["width"], image["y"] + (place // w + 0.5) / h * image["height"]
    page.touchscreen.tap(*at) if tap else page.mouse.move(*at)


def other(side):
    return "reference" if side == "query" else "query"


def line(mode, k, side, place):
    """The row of a place of the query, or the column of one of the reference, as an image of the other."""
    M = MATRICES[mode][k]
    return (M[place] if side == "query" else M[:, place]).reshape(SIDES[other(side)])


def colours(values, centre, limit, opacity=1.0):
    """Opacities of 255, positive for red."""
    share = (values - centre) / limit
    return np.sign(share) * 255 * 0.85 * opacity * np.minimum(1, abs(share))


def drawn(page, side):
    red, _, blue, opacity = np.moveaxis(pixels(page, f"#{side}"), -1, 0)
    return np.where(red > blue, opacity, -opacity)


def close_to(actual, expected):
    """But for what the page says is lost: less than a step or two of 255."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1.5)


def number(pattern, text):
    """The number that follows in a sentence."""
    return float(re.search(pattern + r" ([-+]?[\d.]*\d)", text.replace("\u2212", "-"))[1])


def named(text):
    """All places in a sentence, counted from 0: row, column."""
    return [(int(row) - 1, int(column) - 1) for row, column in re.findall(r"row (\d+), column (\d+)", text)]


def boxes(page, side):
    """Places of the numbered boxes, by number; each lies where its place is in the image."""
    h, w = SIDES[side]
    image, found = page.locator(f"#{side} img").bounding_box(), {}
    for box in page.locator(f"#{side} .box").all():
        at, place = box.bounding_box(), int(box.get_attribute("data-place"))
        actual = [(at["x"] - image["x"]) / image["width"], (at["y"] - image["y"]) / image["height"]]
        assert actual == pytest.approx([place % w / w, place // w / h], abs=0.01)
        assert [at["width"] / image["width"], at["height"] / image["height"]] == pytest.approx([1 / w, 1 / h], abs=0.01)
        assert box.get_attribute("data-number") == box.inner_text()
        found[int(box.inner_text())] = place
    return found


def shows(page, mode, k, side, place, number_of_box=1):
    """The page shows the matches of a place: in colours, by the box of the best, and in words."""
    values = line(mode, k, side, place)
    best = int(values.argmax())
    close_to(drawn(page, other(side)), colours(values, CENTRES[mode], LIMITS[mode]))
    assert not drawn(page, side).any()
    assert boxes(page, side)[number_of_box] == place
    assert boxes(page, other(side))[number_of_box] == best
    said = page.inner_text("#live")
    assert named(said) == [divmod(place, SIDES[side][1]), divmod(best, SIDES[other(side)][1])]
    assert said.startswith(f"The {side}'s row")
    assert f"of the {other(side)}" in said
    if mode == "score":
        assert number("adds", said) == pytest.approx(values.sum(), rel=0.006)
        assert number("score of", said) == pytest.approx(SCORES[k], abs=0.0006)
        assert number(rf"of the {other(side)}:", said) == pytest.approx(values.max(), rel=0.006)
        assert ("the average pair" in said) == (SCORES[k] > 0)  # there is none of what is not there
        if SCORES[k] > 0:
            times = float(re.search(r"([\d.]+)\s\u00d7 the average pair", said)[1])
            assert times == pytest.approx(values.max() / SCORES[k] * 15 * 8, abs=0.051)
    else:
        assert number("cosine", said) == pytest.approx(values.max(), abs=0.0006)


def overview(page):
    """Nothing is pointed at or kept."""
    assert not named(page.inner_text("#live"))
    assert page.locator(".box.here").count() == 0


PLACES = [("query", 0), ("query", 4), ("query", 7), ("query", 14), ("reference", 0), ("reference", 3), ("reference", 7)]


@pytest.mark.parametrize("mode", MATRICES)
def test_pointing_at_a_place_shows_what_numpy_computes(page, mode):
    page.check(f"[name=mode][value={mode}]")
    for side, place in PLACES:
        point(page, side, place)
        shows(page, mode, 0, side, place)
    for end, sign in (("low", -1), ("high", 1)):
        assert number("", f" {page.inner_text(f'#{end}')}") == pytest.approx(
            CENTRES[mode] + sign * LIMITS[mode], rel=0.006
        )
    assert len({line(mode, 0, *at).argmax() for at in PLACES}) > 2  # else a constant would do
    page.mouse.move(1, 1)
    overview(page)


def test_before_anybody_points_the_strongest_matches_are_numbered(page):
    for mode in MATRICES:
        page.check(f"[name=mode][value={mode}]")
        i, j = divmod(int(MATRICES[mode][0].argmax()), 8)
        here, there = boxes(page, "query"), boxes(page, "reference")
        assert (here[1], there[1]) == (i, j)
        assert here.keys() == there.keys() == set(range(1, len(here) + 1))
        listed = page.locator("#matches li").all_inner_texts()
        for n, text in enumerate(listed, start=1):
            assert named(text) == [divmod(here[n], 5), divmod(there[n], 2)]
            amount = number("column \\d+:", text)
            assert amount == pytest.approx(MATRICES[mode][0, here[n], there[n]], rel=0.006)


def go_by_tab(page, name):
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == name:
            return
    raise AssertionError(f"the tab key does not come to {name}")


@pytest.mark.parametrize("mode", MATRICES)
def test_the_keyboard_alone_does_the_same(page, mode):
    page.keyboard.press("m") if mode == "alike" else None
    assert page.is_checked(f"[name=mode][value={mode}]")
    starts = divmod(int(MATRICES[mode][0].argmax()), 8)
    for side, start in zip(SIDES, starts):
        go_by_tab(page, side)
        (h, w), (row, column) = SIDES[side], divmod(start, SIDES[side][1])
        shows(page, mode, 0, side, start)
        for key in ["Up"] * 2 + ["Left"] * 3 + ["Down"] * (h + 1) + ["Right"] * (w + 1) + ["Up", "Left"]:
            page.keyboard.press(f"Arrow{key}")
            row += (key == "Down") - (key == "Up")
            column += (key == "Right") - (key == "Left")
            row, column = min(h - 1, max(0, row)), min(w - 1, max(0, column))  # at the edge it stays
            if key in ("Up", "Left"):
                shows(page, mode, 0, side, row * w + column)
        at = row * w + column
        shows(page, mode, 0, side, at)
        page.keyboard.press("Enter")
        page.keyboard.press("Shift+Tab" if side == "query" else "Tab")  # to something that is no image
        shows(page, mode, 0, side, at)  # kept
        page.keyboard.press("Escape")
        overview(page)
    go_by_tab(page, "query")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowUp" if starts[0] >= 5 else "ArrowDown")
    assert len(boxes(page, "query")) == 2
    page.keyboard.press("Shift+Tab")
    shows(page, mode, 0, "query", starts[0])
    assert page.evaluate("scrollY") == 0  # neither arrows nor space scroll the page


def test_a_finger_does_the_same(browser, file):
    with opened(browser, file, width=400, has_touch=True, is_mobile=True) as page:
        for side, place in PLACES[::3]:
            point(page, side, place, tap=True)
            shows(page, "score", 0, side, place)
            point(page, side, place, tap=True)  # again: lets go
            overview(page)
        # A finger that scrolls the page points at nothing.
        page.dispatch_event("#query", "pointermove", {"pointerType": "touch", "clientX": 50, "clientY": 50})
        overview(page)
        point(page, "query", 3, tap=True)
        point(page, "reference", 6, tap=True)
        shows(page, "score", 0, "reference", 6, number_of_box=2)
        assert boxes(page, "query")[1] == 3


def test_a_click_keeps_a_pair_and_escape_frees_all(page):
    for n, place in enumerate((4, 11, 0), start=1):
        point(page, "query", place)
        page.mouse.down()
        page.mouse.up()
        page.mouse.move(1, 1)
        shows(page, "score", 0, "query", place, number_of_box=n)
    assert boxes(page, "query") == {1: 4, 2: 11, 3: 0}
    assert len(page.locator("#matches li").all()) == 3
    point(page, "reference", 5)  # pointing at another shows that one, and the kept ones stay
    shows(page, "score", 0, "reference", 5, number_of_box=4)
    point(page, "query", 11)  # one that is kept has its number
    shows(page, "score", 0, "query", 11, number_of_box=2)
    page.mouse.down()
    page.mouse.up()  # lets it go
    page.mouse.move(1, 1)
    assert boxes(page, "query") == {1: 4, 2: 0}
    page.keyboard.press("m")  # what is kept stays, with the best match of the mode
    shows(page, "alike", 0, "query", 0, number_of_box=2)
    page.keyboard.press("Escape")
    overview(page)
    assert len(boxes(page, "query")) == len(page.locator("#matches li").all())


def test_each_reference_and_the_control_have_their_own(page):
    def is_shown(k):
        assert page.is_checked(f"[name=shown][value='{k}']")
        assert page.inner_text("#reference-name") == TITLES[1 + k]
        assert page.inner_text("#query-name") == TITLES[0]
        assert f"{SCORES[k]:.3f}".replace("-", "\u2212") in page.inner_text("#score")
        assert page.get_attribute("#control", "aria-pressed") == ("true" if k == CONTROL else "false")
        assert page.evaluate("document.querySelector('#reference img').src") == data["references"][k]["picture"]
        point(page, "query", 7)
        shows(page, "score", k, "query", 7)

    data = json.loads(page.locator("#data").text_content())
    for k in (1, 2, 0, CONTROL, 2):
        page.check(f"[name=shown][value='{k}']")
        is_shown(k)
    for _ in range(2):  # there and back, to the reference before
        page.keyboard.press("c")
        is_shown(CONTROL)
        page.click("#control")
        is_shown(2)


def sums(page):
    """The table: the parts and their numbers, printed as they are."""
    found = {}
    for cell in page.locator("#sums [data-part]").all():
        value = float(cell.get_attribute("data-value"))
        assert cell.inner_text() == f"{round(value, 6) + 0.0:.6f}".replace("-", "\u2212")
        found[cell.get_attribute("data-part")] = value
    return found


def test_what_is_printed_adds_up_to_the_cosine(page):
    for k in range(4):
        page.check(f"[name=shown][value='{k}']")
        page.check("[name=mode][value=score]")
        found = sums(page)
        assert found.keys() == {"pairs", "sum", "score", "remainder"}
        assert found["score"] == pytest.approx(SCORES[k], abs=1e-9)
        assert found["pairs"] == found["sum"] == pytest.approx(MATRICES["score"][k].sum(), abs=1e-9)
        assert found["remainder"] == pytest.approx(0, abs=1e-9)
        page.check("[name=mode][value=alike]")
        values = MATRICES["alike"][k]
        assert sums(page) == pytest.approx({"average": values.mean(), "largest": values.max()}, abs=1e-9)


def test_with_a_path_both_baselines_are_among_the_parts(browser, tmp_path):
    """An encoder with biases: places of one side with the baseline of the other, and both baselines."""
    encoder = seeded(HeadEncoder)
    query, reference = random(1, 3, 24, 24), random(1, 3, 24, 24, seed=2)
    z, s = (encoder(x).detach().numpy()[0] for x in (query, reference))
    path = tmp_path / "pair.html"
    decomposition = SimilarityDecomposition(encoder, encoder.layer, n_steps=8, baseline="zero")
    explore_pair(query, reference, decomposition, photos=[PHOTOS[0]] * 2).save(path)
    parts = decomposition.attribute_matrix(query, reference, return_baselines=True)
    with opened(browser, path) as page:
        found = sums(page)
        names = ["pairs", "query_rest", "reference_rest", "rest"]
        assert found.keys() == {*names, "sum", "score", "remainder"}
        for name, part in zip(names, parts):
            assert found[name] == pytest.approx(part.sum().item(), abs=1e-9)
        assert found["sum"] == pytest.approx(sum(found[name] for name in names), abs=1e-9)
        assert found["score"] == pytest.approx(unit(z) @ unit(s), abs=1e-5)
        assert found["remainder"] == pytest.approx(found["score"] - found["sum"], abs=1e-9)
        point(page, "query", 5, grid=(12, 12))
        # What the place adds is its row and its part with the reference's baseline.
        adds = (parts[0][0, 5].sum() + parts[1][0, 5]).item()
        assert number("adds", page.inner_text("#live")) == pytest.approx(adds, rel=0.006)
        point(page, "reference", 9, grid=(12, 12))
        adds = (parts[0][0, :, 9].sum() + parts[2][0, 9]).item()
        assert number("adds", page.inner_text("#live")) == pytest.approx(adds, rel=0.006)


def test_the_opacity_is_that_of_the_slider(page):
    for opacity in (0.5, 0.0, 1.0):
        page.fill("#opacity", str(opacity))
        point(page, "query", 7)
        close_to(drawn(page, "reference"), colours(line("score", 0, "query", 7), 0, LIMITS["score"], opacity))
        grey = page.evaluate("getComputedStyle(document.querySelector('#reference img')).filter")
        assert (grey == "none") == (opacity == 0)


def test_the_whole_maps_are_those_of_the_methods(page):
    """Those of cosines and sums by NumPy, the others by the methods, which have tests of their own."""
    fam = FeatureActivationMap(ENCODER, ENCODER.layer)
    match = SimilarityDecomposition(ENCODER, ENCODER.layer)
    shared = QUERY, REFERENCES[:CONTROL]
    rest = match.attribute_all(shared[0], reference=shared[1], contrast="rest")[0]
    found = []
    for k in range(CONTROL):
        reference = REFERENCES[k : k + 1]
        made = [MATRICES["score"][k].sum(axis) for axis in (1, 0)]
        maps = {
            "own": match.attribute_pair(QUERY, reference, contrast="self"),
            "common": fam.attribute_pair(QUERY, reference),
            "made": [torch.from_numpy(values) for values in made],
            "rest": (rest[k], None),
        }
        found.append(
            {
                name: [None if m is None else m.numpy().reshape(SIDES[side]) for m, side in zip(sides, SIDES)]
                for name, sides in maps.items()
            }
        )
    for k, maps in enumerate(found):
        page.check(f"[name=shown][value='{k}']")
        for name, sides in maps.items():
            page.check(f"[name=map][value={name}]")
            # One scale for all references.
            limit = max(abs(m).max() for of_one in found for m in of_one[name] if m is not None)
            for side, values in zip(SIDES, sides):
                if values is None:
                    assert not drawn(page, side).any()
                else:
                    close_to(drawn(page, side), colours(values, 0, limit))
    page.check("[name=map][value=none]")
    assert not any(drawn(page, side).any() for side in SIDES)
    assert page.is_hidden("#scale")


def test_the_same_pair_is_the_same_file_and_the_same_page(browser, tmp_path):
    path, contents, seen = tmp_path / "pair.html", [], []
    for _ in range(2):
        explore().save(path)
        contents.append(path.read_bytes())
        with opened(browser, path) as page:
            point(page, "query", 7)
            seen.append((page.content(), page.screenshot()))
    assert len(set(contents)) == 1, "the same pair makes another file"  # of a megabyte: no differences are listed
    assert len(set(seen)) == 1, "the same file makes another page"


def test_nothing_outside_the_page_is_named():
    """Beside what a browser asks for, which every test counts: addresses that it may look up beforehand."""
    page = explore().html
    assert not re.search(r"https?:|[\"'(=]//|<(?:link|base|iframe|object|embed)\b|@import|@font-face", page)
    assert all(
        address.startswith("data:image/jpeg;base64,") for address in re.findall(r"(?:src|href)=\"([^\"]*)", page)
    )


@pytest.mark.parametrize(
    "fault",
    [
        "<img src='http://127.0.0.1:9/x.png'>",
        "<link rel=icon href='http://127.0.0.1:9/x.png'>",
        "<script>throw Error('page')</script>",
        "<script>console.log('page')</script>",
        "<iframe srcdoc='<script>fetch(`http://127.0.0.1:9`)</script>'></iframe>",
    ],
)
def test_a_page_that_asks_or_complains_is_noticed(browser, tmp_path, fault):
    path = tmp_path / "page.html"
    path.write_text(f"<title>page</title>{fault}")
    with pytest.raises(AssertionError, match="the page"), opened(browser, path) as page:
        page.wait_for_load_state("networkidle")


def test_the_policy_of_the_page_forbids_what_it_does_not_need(browser, file):
    with opened(browser, file, quiet=False) as page:
        page.evaluate("new Image().src = 'http://127.0.0.1:9/x.png'")
        assert page.evaluate("fetch('http://127.0.0.1:9').then(() => 'sent', () => 'refused')") == "refused"
    assert len(page.heard.faults) >= 2
    assert all("Content Security Policy" in fault for fault in page.heard.faults[:2])


def test_names_are_text_whatever_they_hold(browser, tmp_path):
    path = tmp_path / "pair.html"
    explore(HOSTILE).save(path)
    with opened(browser, path, width=320) as page:
        for k in range(4):
            page.check(f"[name=shown][value='{k}']")
            for side, name in (("query", HOSTILE[0]), ("reference", HOSTILE[k + 1])):
                assert page.evaluate(f"document.querySelector('#{side}-name').textContent") == name
                assert name in page.evaluate(f"document.querySelector('#{side}').ariaLabel")
            title = page.evaluate("document.querySelector('h1').textContent")
            assert HOSTILE[0] in title
            assert HOSTILE[k + 1] in title
            assert no_wider_than_the_window(page)
            point(page, "query", 3)
            shows(page, "score", k, "query", 3)
        assert page.locator("img").count() == 2 + 4
        assert page.locator("script").count() == 2


def test_a_notebooks_styles_and_the_pages_do_not_meet(browser, file, tmp_path):
    path, titles = tmp_path / "notebook.html", [HOSTILE[2], HOSTILE[1], *TITLES[2:]]
    path.write_text(
        "<!doctype html><title>notebook</title>"
        "<style>* { color: red !important; font-size: 40px !important } .stage, table { display: none }</style>"
        f"<main><h1>out</h1><div class=box>out</div>{explore(titles)._repr_html_()}</main>"
    )
    with opened(browser, file) as page:
        font = "getComputedStyle(document.querySelector('#live')).fontSize"
        alone = page.evaluate(font)
    with opened(browser, path) as page:
        (frame,) = page.frames[1:]
        assert frame.evaluate(font) == alone != "40px"
        outside = (
            "(name) => { const s = getComputedStyle(document.querySelector(name)); return [s.maxWidth, s.position] }"
        )
        assert page.evaluate(outside, "main") == ["none", "static"]
        assert page.evaluate(outside, "div.box") == ["none", "static"]
        for side, name in zip(SIDES, titles):
            assert frame.evaluate(f"document.querySelector('#{side}-name').textContent") == name
        frame.hover("#query", position={"x": 5, "y": 5})
        shows(frame, "score", 0, "query", 0)
        frame.hover("#reference", position={"x": 5, "y": 5})
        shows(frame, "score", 0, "reference", 0)
        # The page cannot reach what it is shown in.
        reached = "() => { try { return parent.document.title } catch (error) { return error.name } }"
        assert frame.evaluate(reached) == "SecurityError"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1400])
def test_it_is_read_on_any_screen_and_on_paper(browser, file, width, scheme):
    with opened(browser, file, width=width, color_scheme=scheme) as page:
        assert no_wider_than_the_window(page)
        light, dark = page.evaluate(
            """() => {
                const style = getComputedStyle(document.body);
                return [style.backgroundColor, style.color].map((c) => c.match(/\\d+/g).reduce((a, b) => a + +b, 0));
            }"""
        )
        assert (light > 600 and dark < 200) if scheme == "light" else (light < 200 and dark > 600)
        for side in SIDES:  # images have their own shape, and both are beside each other
            image = page.locator(f"#{side} img").bounding_box()
            assert image == page.locator(f"#{side} canvas").bounding_box()
            assert image["width"] / image["height"] == pytest.approx(5 / 3 if side == "query" else 1 / 2, rel=0.02)
        query, reference = (page.locator(f"#{side} img").bounding_box() for side in SIDES)
        assert query["y"] == reference["y"]
        assert query["x"] + query["width"] < reference["x"]

        point(page, "query", 7)
        page.mouse.down()
        page.mouse.up()
        page.mouse.move(1, 1)
        assert no_wider_than_the_window(page)
        page.emulate_media(media="print")
        shows(page, "score", 0, "query", 7)
        assert page.is_visible("#sums")
        assert page.is_visible("#matches")
        assert page.is_hidden("#switches")
        # Browsers leave the ground white.
        ink = page.evaluate("getComputedStyle(document.querySelector('#live')).color")
        assert sum(map(int, re.findall(r"\d+", ink))) < 200


def test_what_is_not_there_is_not_offered(browser, tmp_path):
    """Matrices that somebody has computed, for one reference, with holes."""
    matrix = random(3, 5, 4, 2).numpy()
    matrix[0, 0] = np.nan
    matrix[1, 1, 2, 0] = np.inf
    path = tmp_path / "pair.html"
    explore_pair(PHOTOS[0], PHOTOS[1], {"a & b <i>": matrix}).save(path)
    with opened(browser, path) as page:
        for name in ("#references", "#control", "#why", "#maps", "#scale"):
            assert page.is_hidden(name), name
        assert page.locator("[name=mode]").evaluate_all("all => all.map((one) => one.value)") == ["a & b <i>"]
        assert "Score" not in page.inner_text("main")
        finite = matrix[np.isfinite(matrix)]
        limit = np.quantile(abs(finite), 0.999)
        for place, hidden in ((6, [4]), (0, range(8)), (13, [])):
            point(page, "query", place)
            values = matrix.reshape(15, 8)[place]
            known = np.isfinite(values)
            actual = drawn(page, "reference").ravel()
            close_to(actual[known], colours(values[known], 0, limit))
            assert not known[hidden].any()
            assert not actual[~known].any()
            said = page.inner_text("#live")
            if known.any():
                best = int(np.where(known, values, -np.inf).argmax())
                assert named(said) == [divmod(place, 5), divmod(best, 2)]
                assert number("of the reference:", said) == pytest.approx(values[best], rel=0.006)
                assert number("add up to", said) == pytest.approx(values[known].sum(), rel=0.006)
                assert boxes(page, "reference") == {1: best}
            else:
                assert "no match" in said
                assert boxes(page, "reference") == {}


def test_parts_without_a_score_are_parts_of_no_score(browser, tmp_path):
    path = tmp_path / "pair.html"
    explore_pair(PHOTOS[0], PHOTOS[1], {"score": MATRICES["score"][0].reshape(3, 5, 4, 2)}).save(path)
    with opened(browser, path) as page:
        point(page, "query", 7)
        said = page.inner_text("#live")
        assert "no number" not in said
        assert number("adds", said) == pytest.approx(MATRICES["score"][0][7].sum(), rel=0.006)


@pytest.mark.parametrize("zero", [0.0, np.nan])
def test_an_empty_matrix_is_said_to_be_one(browser, tmp_path, zero):
    path = tmp_path / "pair.html"
    explore_pair(PHOTOS[0], PHOTOS[1], np.full((3, 5, 4, 2), zero)).save(path)
    with opened(browser, path) as page:
        assert "No two places" in page.inner_text("#live")
        assert page.locator(".box").count() == 0
        go_by_tab(page, "query")
        page.keyboard.press("ArrowRight")
        assert named(page.inner_text("#live"))[0] == (0, 1)
        assert not drawn(page, "reference").any()
        assert "NaN" not in page.inner_text("main")


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1400])
def test_axe_finds_no_violation(browser, file, width, scheme):
    with opened(browser, file, width=width, color_scheme=scheme) as page:
        assert violations(page) == []
        point(page, "query", 7)
        page.mouse.down()
        page.mouse.up()
        page.mouse.move(1, 1)
        page.keyboard.press("c")
        page.keyboard.press("m")
        assert violations(page) == []


@needs_axe
def test_axe_finds_a_violation_that_is_there(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='>")
    with opened(browser, path) as page:
        assert any(found.startswith("image-alt") for found in violations(page))


def test_a_name_from_right_to_left_does_not_turn_what_comes_after_it(browser, tmp_path):
    path = tmp_path / "pair.html"
    explore(["\u202egpj.exe", "\u202eevil", "\u0645\u0631\u062d\u0628\u0627", "b", "c"]).save(path)
    with opened(browser, path) as page:
        # Where the characters of a text are, from left to right.
        order = """(selector) => {
            const text = [...document.querySelectorAll(selector)].map((one) => {
                const walker = document.createTreeWalker(one, NodeFilter.SHOW_TEXT);
                const found = [];
                while (walker.nextNode()) {
                    for (let i = 0; i < walker.currentNode.length; i++) {
                        const range = new Range();
                        range.setStart(walker.currentNode, i);
                        range.setEnd(walker.currentNode, i + 1);
                        const {left, width} = range.getBoundingClientRect();
                        if (width) found.push([left, range.toString()]);
                    }
                }
                return found.sort((a, b) => a[0] - b[0]).map((pair) => pair[1]).join("");
            });
            return text;
        }"""
        (title,) = page.evaluate(order, "h1")
        assert title.startswith("Why is \u201c")
        assert "\u201d similar to \u201c" in title
        assert title.endswith("\u201d?")
        for text, score in zip(page.evaluate(order, "#references label"), SCORES):
            assert f"{score:.3f}".replace("-", "\u2212") in text


def test_modes_may_have_any_name(browser, tmp_path):
    """Also names that objects of JavaScript have of their own, and numbers, which they put first."""
    names = ["b", "constructor", "__proto__", "10", "2", "toString"]
    matrices = {name: random(3, 5, 4, 2, seed=n).numpy() for n, name in enumerate(names)}
    path = tmp_path / "pair.html"
    explore_pair(PHOTOS[0], PHOTOS[1], matrices).save(path)
    with opened(browser, path) as page:
        assert [label.strip() for label in page.locator("#modes label").all_inner_texts()] == names
        for name in names:
            assert page.is_checked(f"[name=mode][value='{name}']")
            point(page, "query", 7)
            values = matrices[name].reshape(15, 8)[7]
            close_to(drawn(page, "reference").ravel(), colours(values, 0, np.quantile(abs(matrices[name]), 0.999)))
            page.keyboard.press("m")
        assert page.is_checked("[name=mode][value=b]")


def test_keys_of_the_browser_and_of_screen_readers_are_left_to_them(page):
    go_by_tab(page, "query")
    before = page.inner_text("#live")
    page.evaluate("window.kept = []; addEventListener('keydown', (event) => kept.push(event.defaultPrevented))")
    for key in ("Alt+ArrowRight", "Control+ArrowDown", "Meta+ArrowLeft", "Control+Alt+ArrowUp", "Control+Enter"):
        page.keyboard.press(key)
    for key in ("Control+c", "Alt+m"):
        page.keyboard.press(key)
    assert page.inner_text("#live") == before
    assert not any(page.evaluate("kept"))
    page.keyboard.press("ArrowRight")
    assert page.evaluate("kept").pop()


@pytest.mark.parametrize("scale", [1, 1.25, 3])
def test_the_edges_of_an_image_are_places(browser, file, scale):
    with opened(browser, file, device_scale_factor=scale) as page:
        image = page.locator("#query img").bounding_box()
        left, top = image["x"] + 0.5, image["y"] + 0.5
        right, bottom = left + image["width"] - 1, top + image["height"] - 1
        for place, at in ((0, (left, top)), (4, (right, top)), (10, (left, bottom)), (14, (right, bottom))):
            page.mouse.move(*at)
            shows(page, "score", 0, "query", place)
        page.mouse.move(right + 3, bottom)
        overview(page)


def test_the_control_is_called_one(page):
    labels = page.locator("#references label").all_inner_texts()
    assert ["control" in label for label in labels] == [False, False, False, True]


def low_rank(*grids):
    left, right = (random(h * w, 5, seed=seed).numpy() for seed, (h, w) in enumerate(grids))
    return left @ right.T


def with_a_hole(*grids):
    M = random(grids[0][0] * grids[0][1], grids[1][0] * grids[1][1]).numpy()
    M[-1, -1] = np.nan
    return M


@pytest.mark.parametrize(
    ("make", "grids", "stored", "lost"),
    [
        (low_rank, ((16, 18), (17, 15)), "rank 32", 0.01),
        (with_a_hole, ((16, 15), (9, 14)), "few digits", 0.033),  # half a step of 1 digit of 64, squared
    ],
)
def test_large_matrices_are_read_as_they_are_stored(browser, tmp_path, monkeypatch, make, grids, stored, lost):
    monkeypatch.setattr("captum_fam.explorer._stored.SHORT", 30_000)  # as if it was one of a million numbers
    M = make(*grids)
    path = tmp_path / "pair.html"
    explore_pair(PHOTOS[0], PHOTOS[1], M.reshape(*grids[0], *grids[1])).save(path)
    finite = M[np.isfinite(M)]
    limit = np.quantile(abs(finite), 0.999)
    with opened(browser, path) as page:
        assert stored in page.inner_text("#stored")
        for side, place in (("query", 5), ("query", 217), ("reference", 101), ("reference", 7)):
            point(page, side, place, grid=grids[side == "reference"])
            there = grids[side == "query"]
            values = (M[place] if side == "query" else M[:, place]).reshape(there)
            actual, exact = drawn(page, other(side)), colours(values, 0, limit)
            assert actual.shape == there
            np.testing.assert_allclose(actual, exact, atol=1 + 255 * 0.85 * lost * abs(finite).max() / limit)
            best = divmod(int(values.argmax()), there[1])
            assert named(page.inner_text("#live")) == [divmod(place, grids[side == "reference"][1]), best]


def test_a_page_of_14_by_14_places_and_three_references_is_below_a_megabyte():
    names = ["cat", "coffee", "motorcycle", "admiral"]
    pictures = [photographs()[name] for name in names]
    noise = random(3, 14, 14, 14, 14)  # of which no digit can be left out
    assert len(explore_pair(pictures[0], pictures[1:], {"a": noise, "b": noise.flip(1)}).html) < 1e6
