"""What the explorer's page holds: numbers against NumPy; what is refused. In a browser: see test_explorer_page."""

import html
import json
import re

import numpy as np
import pytest
import torch
from encoders import HeadEncoder, random, seeded
from helpers import arrays
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as drawn_arrays
from test_cli import photos, run  # noqa: F401
from torch import nn

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    IntegratedDecomposition,
    Relax,
    SimilarityDecomposition,
    SimilarityScore,
    explore_pair,
)
from captum_fam.bundled import bundled_encoder
from captum_fam.demo import another_view, photographs
from captum_fam.explorer._stored import digits, matrix
from captum_fam.images import to_tensor

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def seen(page):
    """What a browser reads in a page."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.S)
    return json.loads(data)


def numbers(stored):
    """Stored numbers, read one by one."""
    count, text = stored["digits"], stored["text"]
    top = 31 if count == 1 else 2047
    found = []
    for i in range(0, len(text), count):
        code = int("".join(f"{ALPHABET.index(c):06b}" for c in text[i : i + count]), 2)
        level = code - top
        found.append(float("nan") if level > top else np.sign(level) * stored["largest"] * level**2 / top**2)
    return np.array(found)


def matrix_of(mode):
    rows, columns = (np.prod(mode[side]) for side in ("query", "reference"))
    if "whole" in mode:
        return numbers(mode["whole"]).reshape(rows, columns)
    return numbers(mode["left"]).reshape(rows, -1) @ numbers(mode["right"]).reshape(columns, -1).T


class Pooled(nn.Module):
    """The embedding is the spatial mean: places add up to it exactly."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, x):
        return self.layer(x).mean((2, 3))


POOLED, HEAD = seeded(Pooled), seeded(HeadEncoder)
QUERY, SHELF, CONTROL = random(1, 3, 12, 20), random(2, 3, 16, 8, seed=1), random(1, 3, 16, 8, seed=2)


def near(actual, expected, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(np.asarray(actual, float), np.asarray(expected, float), rtol, atol)


def unit(v, axis):
    return v / np.linalg.norm(v, axis=axis, keepdims=True)


def explored(method, **options):
    with pytest.warns(UserWarning, match="stretched"):  # random images
        return seen(explore_pair(QUERY, SHELF, method, control=CONTROL, **options))


def by_numpy(similarity):
    """Matrices (K, N, N') of pairs of places and scores (K,) of a spatial mean; the control is last."""
    (z, A), (s, R) = (arrays(POOLED, images) for images in (QUERY, torch.cat([SHELF, CONTROL])))
    A, R = A[0].reshape(6, -1), R.reshape(3, 6, -1)
    P = A.T @ R / (A.shape[1] * R.shape[2])
    if similarity == "cosine":
        return P / np.linalg.norm(z) / np.linalg.norm(s, axis=1)[:, None, None], unit(s, 1) @ unit(z[0], 0)
    if similarity == "dot":
        return P, s @ z[0]
    return 2 * P, -np.square(s - z).sum(1)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_pairs_of_places_scores_and_sums_are_those_of_numpy(similarity):
    data = explored(SimilarityDecomposition(POOLED, POOLED.layer, similarity=similarity))
    matrices, scores = by_numpy(similarity)
    assert data["similarity"] == similarity
    assert data["control"] == 2
    for P, score, one in zip(matrices, scores, data["references"]):
        mode = one["modes"]["score"]
        assert (mode["query"], mode["reference"]) == ([3, 5], [4, 2])
        near(matrix_of(mode), P, 0, mode["error"] + 1e-9)
        assert mode["error"] <= 0.001 * abs(P).max()
        near(one["score"], score, 1e-5)
        sums = mode["sums"]
        near(sums["pairs"], P.sum(), 1e-5, 1e-7)
        near(sums["sum"], score, 1e-5)
        near(sums["score"] - sums["sum"], sums["remainder"], 1e-9)
        assert abs(sums["remainder"]) < 1e-6 * abs(P).sum()
        assert ("lengths" in sums) == (similarity == "euclidean")


def test_rows_and_columns_are_told_from_what_was_not_stored_yet():
    matrices, _ = by_numpy("cosine")
    data = explored(SimilarityDecomposition(POOLED, POOLED.layer))
    for P, one in zip(matrices, data["references"]):
        for lines, values in (("rows", P), ("columns", P.T)):
            found = one["modes"]["score"][lines]
            assert found["best"] == values.argmax(1).tolist()
            near(found["value"], values.max(1).tolist(), 1e-4)
            near(found["sum"], values.sum(1).tolist(), 1e-4, 1e-7)


def test_what_looks_alike_is_the_cosine_of_activations():
    data = explored(CorrespondenceMap(POOLED, POOLED.layer))
    A, R = (arrays(POOLED, images)[1] for images in (QUERY, torch.cat([SHELF, CONTROL])))
    A, R = unit(A[0].reshape(6, -1), 0), unit(R.reshape(3, 6, -1), 1)
    for one, r in zip(data["references"], R):
        mode = one["modes"]["alike"]
        near(matrix_of(mode), A.T @ r, 0, mode["error"] + 1e-7)
        near(mode["sums"]["average"], (A.T @ r).mean(), 1e-4, 1e-6)
        near(mode["sums"]["largest"], (A.T @ r).max(), 1e-4, 1e-6)
    near(data["modes"]["alike"]["centre"], np.mean([A.T @ r for r in R[:2]]), 1e-4, 1e-6)
    assert data["modes"]["score"]["centre"] == 0


def test_with_a_path_the_parts_of_a_network_with_biases_add_up_and_without_it_the_page_says_what_is_missing():
    path = explored(SimilarityDecomposition(HEAD, HEAD.layer, n_steps=64, baseline="mean"))
    first = explored(SimilarityDecomposition(HEAD, HEAD.layer))
    z, s = (arrays(HEAD, images)[0] for images in (QUERY, torch.cat([SHELF, CONTROL])))
    for score, integrated, plain in zip(unit(s, 1) @ unit(z[0], 0), path["references"], first["references"]):
        mode = integrated["modes"]["score"]
        sums = mode["sums"]
        parts = [sums[part] for part in ("pairs", "query_rest", "reference_rest", "rest")]
        near(sum(parts), sums["sum"], 1e-9)
        near(sums["sum"], score, 1e-4)
        assert abs(sums["remainder"]) < 1e-4
        near(sum(mode["query_rest"]), sums["query_rest"], 1e-3, 1e-6)
        # The page's map is made of the rows, and what a place has with the other image's baseline.
        made = integrated["maps"]["made"]
        for side, lines in (("query", "rows"), ("reference", "columns")):
            total = np.add(mode[lines]["sum"], mode[f"{side}_rest"])
            near(total, made[side]["values"], 1e-3, 1e-6)
        mode = plain["modes"]["score"]
        assert abs(mode["sums"]["remainder"]) > 0.01
        for side, lines in (("query", "rows"), ("reference", "columns")):
            near(mode[lines]["sum"], plain["maps"]["made"][side]["values"], 1e-3, 1e-6)


def test_whole_maps_are_those_of_the_methods():
    data = explored(SimilarityDecomposition(POOLED, POOLED.layer))
    references = torch.cat([SHELF, CONTROL])
    decomposition = SimilarityDecomposition(POOLED, POOLED.layer)
    wanted = {
        "own": decomposition.attribute_pair(references, QUERY, contrast="self"),
        "common": FeatureActivationMap(POOLED, POOLED.layer).attribute_pair(references, QUERY),
    }
    for name, (there, here) in wanted.items():
        for one, mine, other in zip(data["references"], here, there):
            near(one["maps"][name]["query"]["values"], mine.flatten().double(), 1e-4, 1e-7)
            near(one["maps"][name]["reference"]["values"], other.flatten().double(), 1e-4, 1e-7)
        largest = max(there[:2].abs().max(), here[:2].abs().max()).item()  # of the references, not of the control
        assert data["limits"][name] == pytest.approx(largest)
    rest = decomposition.attribute_all(QUERY, reference=SHELF, contrast="rest")[0]
    for one, mine in zip(data["references"], rest):
        near(one["maps"]["rest"]["query"]["values"], mine.flatten().double(), 1e-4, 1e-7)
        assert one["maps"]["rest"]["reference"] is None
    assert "rest" not in data["references"][2]["maps"]  # the control is no alternative


def test_what_looks_alike_as_a_whole_is_less_what_looks_like_the_others():
    data = explored(CorrespondenceMap(POOLED, POOLED.layer))
    A, R = (arrays(POOLED, images)[1] for images in (QUERY, torch.cat([SHELF, CONTROL])))
    A, R = unit(A[0].reshape(6, -1), 0), unit(R.reshape(3, 6, -1), 1)
    best = [(A.T @ r).max(1) for r in R]
    for k, one in enumerate(data["references"]):
        others = [b for j, b in enumerate(best) if j != k]
        near(one["maps"]["alike"]["query"]["values"], best[k] - np.mean(others, 0), 1e-3, 1e-5)
        back = (R[k].T @ A).max(1) - np.mean([(R[k].T @ R[j]).max(1) for j in range(3) if j != k], 0)
        near(one["maps"]["alike"]["reference"]["values"], back, 1e-3, 1e-5)


@pytest.mark.parametrize(
    "method",
    [
        lambda: IntegratedDecomposition(HEAD),
        lambda: [CorrespondenceMap(HEAD, HEAD.layer), IntegratedDecomposition(HEAD)],
        lambda: CorrespondenceMap(SimilarityScore(HEAD, torch.ones(1, 3), "dot"), HEAD.layer),
        lambda: SimilarityDecomposition(SimilarityScore(HEAD, torch.ones(1, 3), "dot"), HEAD.layer),
    ],
)
def test_what_is_not_given_is_made_for_the_same_encoder(method):
    data = explored(method())
    z, s = (arrays(HEAD, images)[0] for images in (QUERY, torch.cat([SHELF, CONTROL])))
    scores = s @ z[0] if data["similarity"] == "dot" else unit(s, 1) @ unit(z[0], 0)
    assert list(data["modes"]) == ["score", "alike"]
    assert data["maps"] == ["own", "rest", "common", "made", "alike"]
    near([one["score"] for one in data["references"]], scores.tolist(), 1e-4)


def test_matrices_of_a_user_need_no_encoder():
    values = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 1))
    picture = np.zeros((8, 8, 3), np.uint8)
    data = seen(explore_pair(picture, [picture, picture], {"MaxSim": values}, titles=["a", "b", "c"]))
    assert list(data["modes"]) == ["MaxSim"]
    assert data["maps"] == []
    for P, one in zip(values, data["references"]):
        mode = one["modes"]["MaxSim"]
        assert one["score"] is None
        near(matrix_of(mode), P.reshape(6, 4), 0, mode["error"] + 1e-9)
        near(mode["sums"]["pairs"], P.sum(), 1e-6)
    tall = np.zeros((64, 144, 3), np.uint8)
    with pytest.raises(ValueError, match=r"6 x\s?6, or 4 x 9"):
        explore_pair(tall, tall, torch.eye(36))
    square = seen(explore_pair(picture, picture, torch.eye(9)))
    assert square["references"][0]["modes"]["matches"]["rows"]["best"] == list(range(9))
    assert square["control"] is None


@given(
    drawn_arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf, 0.0]))
)
@example(np.zeros(2))
def test_numbers_lose_at_most_half_a_step_and_what_python_reads_a_page_reads(values):
    stored, read = digits(values)
    near(numbers(stored), read, 1e-12)
    assert (np.isnan(read) == ~np.isfinite(values)).all()
    largest = np.abs(values[np.isfinite(values)]).max(initial=0) or 1.0
    kept = np.isfinite(values)
    share, back = np.abs(values[kept]) / largest, np.abs(read[kept]) / largest
    assert (np.abs(np.sqrt(share) - np.sqrt(back)) <= 0.5 / 2047 + 1e-9).all()
    assert (np.sign(read[kept]) * np.sign(values[kept]) >= 0).all()


@pytest.mark.parametrize(("rank", "factored"), [(3, True), (400, False)])
def test_a_large_matrix_is_stored_as_factors_where_these_are_close_and_smaller(rank, factored):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(400, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    values = (left @ right.T).reshape(20, 20, 20, 20)
    mode = matrix(values)
    assert ("rank" in mode) == factored
    off = np.abs(matrix_of(mode) - values.reshape(400, 400).numpy())
    assert off.max() == pytest.approx(mode["error"], rel=1e-3)
    assert off.max() <= 0.02 * values.abs().max()
    assert len(json.dumps(mode)) < (2 if factored else 3) * 400 * 400
    assert mode["rows"]["best"] == values.reshape(400, 400).argmax(1).tolist()


def test_what_is_not_finite_is_no_match_and_no_number():
    values = torch.full((2, 2, 2, 2), float("nan"))
    values[0, 0, 1, 1], values[1, 1, 0, 0] = 3.0, float("inf")
    mode = seen(explore_pair(torch.rand(3, 8, 8), torch.rand(3, 8, 8), values))["references"][0]["modes"]["matches"]
    found = matrix_of(mode)
    assert found[0, 3] == 3
    assert np.isnan(found).sum() == 15
    assert mode["strongest"] == [[0, 3]]
    assert mode["rows"]["value"] == [3, None, None, None]
    assert mode["sums"]["pairs"] == 3
    assert mode["unknown"] == 15


def test_an_image_compared_with_itself_has_nothing_of_its_own_and_its_rounding_is_white():
    data = seen(
        explore_pair(QUERY, QUERY, SimilarityDecomposition(POOLED, POOLED.layer), photos=[np.zeros((4, 4))] * 2)
    )
    assert data["references"][0]["score"] == pytest.approx(1)
    assert data["limits"]["own"] == pytest.approx(1e-3)
    assert np.abs(data["references"][0]["maps"]["own"]["query"]["values"]).max() < 1e-6


def test_a_matrix_that_is_nearly_all_zero_is_seen():
    values = torch.zeros(40, 40, 1, 2)
    values[3, 5, 0, 1] = 0.02
    assert seen(explore_pair(torch.rand(3, 8, 8), torch.rand(3, 8, 8), values))["modes"]["matches"][
        "limit"
    ] == pytest.approx(0.02)


def test_a_page_is_one_text_that_is_the_same_each_time_and_a_notebook_has_it_in_a_frame(tmp_path):
    decomposition = SimilarityDecomposition(POOLED, POOLED.layer)
    first, second = (
        explore_pair(QUERY, SHELF, decomposition, photos=[torch.rand(3, 4, 4).mul(0) for _ in range(3)])
        for _ in range(2)
    )
    first.save(tmp_path / "pair.html")
    assert (tmp_path / "pair.html").read_text(encoding="utf-8") == first.html == second.html
    (source,) = re.findall(r'srcdoc="([^"]*)"', first._repr_html_())
    assert html.unescape(source) == first.html
    assert "http:" not in first.html
    assert "https:" not in first.html
    assert repr(first).startswith("PairExplorer(2 references, 0.")
    with pytest.raises(ValueError, match="cannot write"):
        first.save(tmp_path / "nowhere" / "pair.html")


def test_names_are_text_and_never_end_the_data():
    names = ["</script><script>alert(1)</script>", "<!--", "\udcff"]
    page = explore_pair(
        QUERY, SHELF, SimilarityDecomposition(POOLED, POOLED.layer), titles=names, photos=[np.zeros((4, 4))] * 3
    )
    assert [seen(page)["query"]["name"], *(one["name"] for one in seen(page)["references"])] == names
    assert page.html.count("<script") == 2
    assert "alert(1)</script>" not in page.html
    page.html.encode()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": SHELF}, ValueError, "`query` to be one image"),
        ({"query": QUERY[0]}, ValueError, "batch dimension, reference|`query` to be one image"),
        ({"reference": SHELF[:0]}, ValueError, "`reference` to be images"),
        ({"control": SHELF}, ValueError, "`control` to be one image"),
        ({"control": QUERY}, ValueError, "`control` to have the size of `reference`"),
        ({"query": "cat.jpg"}, TypeError, "`query` to be a tensor"),
        ({"method": POOLED}, TypeError, "`method` to be a SimilarityDecomposition"),
        ({"method": []}, TypeError, "`method` to be a SimilarityDecomposition"),
        ({"method": Relax(POOLED)}, TypeError, r"but got \['Relax'\]"),
        ({"method": [CorrespondenceMap(POOLED, POOLED.layer)] * 2}, TypeError, "a list of different ones"),
        ({"method": SimilarityDecomposition(POOLED, [POOLED.layer])}, ValueError, "one layer"),
        (
            {"method": SimilarityDecomposition(POOLED, POOLED.layer, dimension_weights=lambda z, s: s)},
            ValueError,
            "sum over pairs of places",
        ),
        ({"titles": ["one"]}, ValueError, "`titles` to be a list of 3"),
        ({"photos": [np.zeros((4, 4))]}, ValueError, "`photos` to be 3"),
        ({"method": torch.rand(3, 4, 4)}, ValueError, "one matrix for each of 2 references"),
        ({"method": {}}, ValueError, "empty"),
        ({"method": torch.rand(2, 4, 4), "query": SHELF}, ValueError, "`query` to be one picture"),
        (
            {"method": [CorrespondenceMap(HEAD, HEAD.layer), SimilarityDecomposition(POOLED, POOLED.layer)]},
            ValueError,
            "methods of one encoder",
        ),
        (
            {
                "method": [
                    SimilarityDecomposition(POOLED, POOLED.layer, similarity="dot"),
                    FeatureActivationMap(POOLED, POOLED.layer, similarity="euclidean"),
                ]
            },
            ValueError,
            "methods of one similarity",
        ),
    ],
)
def test_what_is_wrong_is_named(change, error, message):
    given = {"query": QUERY, "reference": SHELF, "method": SimilarityDecomposition(POOLED, POOLED.layer)} | change
    with pytest.raises(error, match=message):
        explore_pair(**given)


def test_the_command_writes_a_page_with_a_control_beside_the_query(run, photos):  # noqa: F811
    status, out, err = run("explore", photos / "query.png", photos / "cat.jpg", photos / "coffee.png")
    assert (status, err) == (0, "")
    page = (photos / "query_explore.html").read_text(encoding="utf-8")
    assert "wrote" in out
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.S)
    data = json.loads(data)
    assert [data["query"]["name"], *(one["name"] for one in data["references"][:2])] == [
        "query.png",
        "cat.jpg",
        "coffee.png",
    ]
    assert data["control"] == 2
    assert data["references"][2]["name"] in photographs()
    for one in data["references"]:
        assert f"{one['score']: .4f}" in out
        assert abs(one["modes"]["score"]["sums"]["remainder"]) < 1e-4
        assert data["references"][2]["score"] <= one["score"]


def test_the_command_takes_a_control_a_layer_and_a_similarity(run, photos, tmp_path):  # noqa: F811
    output = tmp_path / "pair.html"
    arguments = [
        "--control",
        photos / "coffee.png",
        "--layer",
        "features.4",
        "--size",
        "32",
        "--similarity",
        "dot",
        "-o",
        output,
    ]
    status, out, err = run("explore", photos / "query.png", photos / "cat.jpg", *arguments)
    assert (status, err) == (0, "")
    assert "layer features.4" in out
    (data,) = re.findall(r'id="data">(.*?)</script>', output.read_text(encoding="utf-8"), re.S)
    data = json.loads(data)
    assert data["similarity"] == "dot"
    assert [one["name"] for one in data["references"]] == ["cat.jpg", "coffee.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "there is no image"),
        (["cat.jpg", "-o", "pair.png"], "ends in .html"),
        (["cat.jpg", "--control", "missing.png"], "there is no image"),
        (["cat.jpg", "-o", "nowhere/pair.html"], "in a folder that can be written to"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(run, photos, monkeypatch, arguments, message):  # noqa: F811
    monkeypatch.chdir(photos)
    status, out, err = run("explore", "query.png", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_page_of_37_by_37_places_of_photographs_has_less_than_four_megabytes():
    encoder, images = bundled_encoder(), photographs()
    cat, view = (to_tensor(p, 37 * 16, encoder.mean, encoder.std) for p in (images["cat"], another_view(images["cat"])))
    decomposition = SimilarityDecomposition(encoder, encoder.features)
    page = explore_pair(cat[None], view[None], decomposition, mean=encoder.mean, std=encoder.std)
    (one,) = seen(page)["references"]
    assert one["modes"]["score"]["query"] == one["modes"]["alike"]["reference"] == [37, 37]
    assert len(page.html.encode()) < 4e6
    for mode in one["modes"].values():
        assert mode["rank"] < 300
        assert mode["error"] <= 0.02 * mode["largest"]
