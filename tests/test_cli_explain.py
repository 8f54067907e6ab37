"""captum-fam explain: methods, contrasts, thresholds, sentences, broken images and what is written, in process."""

# ruff: noqa: F811  # fixtures of other tests

import json
import sys

import numpy as np
import pytest
import torch
from test_cli import BAD_ENCODERS, is_png, photos, run  # noqa: F401

from captum_fam import (
    CorrespondenceMap,
    Fame,
    FeatureActivationMap,
    IntegratedDecomposition,
    Relax,
    SimilarityDecomposition,
)
from captum_fam.bundled import BundledEncoder, bundled_encoder
from captum_fam.cli import _explain, _figure
from captum_fam.cli._rows import Asked, Row
from captum_fam.encoders import load_encoder
from captum_fam.images import read_image, to_tensor
from captum_fam.methods.by_name import OF_SIMILARITIES

SIZE = 32
TALKING = """
import torch
from captum_fam.bundled import bundled_encoder

def known(seed, encoder):
    return encoder(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))).detach()[0]

def encoder():
    model = bundled_encoder()
    model.embed_text = lambda sentences: torch.stack([known(len(sentence), model) for sentence in sentences])
    return model

def narrow():
    model = bundled_encoder()
    model.embed_text = lambda sentences: torch.ones(len(sentences), 3)
    return model

def failing():
    model = bundled_encoder()
    def embed_text(sentences):
        raise RuntimeError("no such token")
    model.embed_text = embed_text
    return model

def dead():
    model = bundled_encoder()
    model.embed_text = lambda sentences: torch.zeros(len(sentences), 512)
    return model
"""


@pytest.fixture
def three(photos):
    return [photos / name for name in ("query.png", "cat.jpg", "coffee.png")]


@pytest.fixture
def figures(monkeypatch):
    """What would be drawn, which takes most of the time."""
    drawn = []
    monkeypatch.setattr(_explain, "explanation_figure", lambda *given: drawn.append(given))
    monkeypatch.setattr(_explain, "write_figure", lambda figure, output: None)
    return drawn


@pytest.fixture
def report(run, figures, tmp_path):
    """The JSON of a run on small images that must go well."""

    def report(*arguments, status=0):
        found, out, _ = run("explain", *arguments, "--size", SIZE, "--json-maps", "-o", tmp_path / "out.png")
        assert found == status
        return json.loads(out)

    return report


@pytest.fixture
def talking(tmp_path, monkeypatch):
    (tmp_path / "talking.py").write_text(TALKING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "talking", raising=False)
    # A module of the user's own is taken to be normalised as ImageNet is.
    return ("--encoder", "talking:encoder", "--mean", *BundledEncoder.mean, "--std", *BundledEncoder.std)


def embedded(paths):
    encoder = bundled_encoder()
    images = [to_tensor(read_image(p), SIZE, encoder.mean, encoder.std)[None] for p in paths]
    with torch.no_grad():
        # As the command does: the query alone, then the references.
        z, s = encoder(images[0]), encoder(torch.cat(images[1:]))
    return encoder, images[0], torch.cat(images[1:]), z, s


def few_masks(monkeypatch, n_samples):
    made = Relax.__init__
    monkeypatch.setattr(made, "__kwdefaults__", made.__kwdefaults__ | {"n_samples": n_samples})


def values(reference, name, side="maps"):
    return torch.tensor(reference[side][name]["values"], dtype=torch.float64)


def close(found, expected, share=1e-6):
    expected = expected.double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=share * max(expected.abs().max().item(), 1e-6))


# Every method, on both sides

ASKED = {
    "nothing": ((), {}, {}),
    "rest": (("--contrast", "rest"), {"contrast": "rest"}, {}),
    "a number": (("--contrast", "2"), {"contrast": 1}, {}),
    "self": (("--contrast", "self"), {"contrast": "self"}, {"contrast": "self"}),
    "a threshold": (("--threshold", "0.4"), {"threshold": 0.4}, {"threshold": 0.4}),
}


def answered():
    """Methods and what they are asked, but for what they refuse: see below."""
    for name in OF_SIMILARITIES:
        for asked, (options, _, there) in ASKED.items():
            no_terms = name in ("ScoreCam", "FeatureFactorizationActivationMap") and there
            no_reference = name == "LabelFreeActivationMap" and options
            if name not in ("CorrespondenceMap", "Fame", "Relax") and not no_terms and not no_reference:
                yield name, asked


@pytest.mark.parametrize(("name", "asked"), [*answered()])
def test_each_method_is_a_row_whose_maps_are_those_of_python(report, three, name, asked):
    options, here, there = ASKED[asked]
    # It masks the input once for each channel.
    layer = ("--layer", "features.0") if name == "ScoreCam" else ()
    found = report(*three, "--method", name, *options, *layer)["references"]
    encoder, query, images, z, s = embedded(three)
    kind = OF_SIMILARITIES[name]
    explained = encoder.features[0] if layer else encoder.features
    method = kind(encoder, None if kind is IntegratedDecomposition else explained)
    share = 1e-5 if name == "ScoreCam" or asked == "self" else 1e-6  # differences of scores, each rounded
    for k, reference in enumerate(found):
        close(values(reference, name), method.attribute(query, k, reference_embedding=s, **here)[0, 0], share)
        own = method.attribute(images[k : k + 1], reference_embedding=z, **there)[0, 0]
        close(values(reference, name, "reference_maps"), own, share)


@pytest.mark.parametrize("asked", ["nothing", "rest", "a number"])
def test_what_looks_alike_is_that_of_python_with_each_contrast_on_both_sides(report, three, asked):
    options = ASKED[asked][0]
    found = report(*three, "--method", "CorrespondenceMap", *options)["references"]
    encoder, query, images, _, _ = embedded(three)
    with torch.no_grad():
        units = [
            torch.nn.functional.normalize(encoder.features(x)[0].flatten(1).double(), dim=0)
            for x in (query, *images.split(1))
        ]
    best = [[(a.T @ b).amax(1) for b in units] for a in units]
    for k, reference in enumerate(found, 1):
        other = {"nothing": None, "rest": 3 - k, "a number": 2}[asked]
        for side, i, j in (("maps", 0, k), ("reference_maps", k, 0)):
            expected = best[i][j] - (0 if other is None else best[i][other])
            if other == k:  # less itself
                expected = torch.zeros_like(expected)
            shown = values(reference, "CorrespondenceMap", side).flatten()
            torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)


def test_relax_is_that_of_python(report, three, monkeypatch):
    few_masks(monkeypatch, 40)
    found = report(*three, "--method", "Relax", "--contrast", "2")["references"]
    encoder, query, images, z, s = embedded(three)
    relax = Relax(encoder, n_samples=40)
    expected = relax.attribute(query, 0, reference_embedding=s, contrast=1)[0, 0]
    torch.testing.assert_close(values(found[0], "Relax"), expected.double(), rtol=1e-4, atol=1e-6)
    back = relax.attribute(images[:1], reference_embedding=z)[0, 0]
    torch.testing.assert_close(values(found[0], "Relax", "reference_maps"), back.double(), rtol=1e-4, atol=1e-6)


def test_fame_is_that_of_python(report, three, monkeypatch):
    made = Fame.__init__
    monkeypatch.setattr(made, "__kwdefaults__", made.__kwdefaults__ | {"n_steps": 3})
    found = report(*three, "--method", "Fame", "--contrast", "2")["references"]
    encoder, query, images, z, s = embedded(three)
    fame = Fame(encoder)
    expected = fame.attribute(query, 0, reference_embedding=s, contrast=1)[0, 0]
    torch.testing.assert_close(values(found[0], "Fame"), expected.double(), rtol=1e-4, atol=1e-6)
    back = fame.attribute(images[:1], reference_embedding=z)[0, 0]
    torch.testing.assert_close(values(found[0], "Fame", "reference_maps"), back.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_methods_take_the_similarity_that_was_asked_for(report, three, similarity):
    found = report(*three, "--method", "SimilarityDecomposition", "--similarity", similarity)["references"]
    _, _, _, z, s = embedded(three)
    # The mean of the map is the score, or that plus the squared length of the reference.
    scores = {"dot": s @ z[0], "euclidean": -(z - s).square().sum(1)}[similarity]
    beside = s.square().sum(1) if similarity == "euclidean" else torch.zeros(2)
    assert [r["score"] for r in found] == pytest.approx(scores.tolist(), rel=1e-5)
    assert [r["maps"]["SimilarityDecomposition"]["mean"] for r in found] == pytest.approx(
        (scores + beside).tolist(), rel=1e-4
    )


def test_a_threshold_is_what_the_score_is_less_of(report, three):
    found = report(*three, "--method", "SimilarityDecomposition", "--threshold", "0.5")
    assert (found["threshold"], found["contrast"]) == (0.5, None)
    for reference in found["references"]:
        assert reference["margin"] == pytest.approx(reference["score"] - 0.5)
        for side in ("maps", "reference_maps"):  # the encoder's embedding is the mean of its map
            assert reference[side]["SimilarityDecomposition"]["mean"] == pytest.approx(reference["margin"], abs=1e-6)


def test_rows_are_in_the_order_of_the_options_and_each_once(run, figures, three, tmp_path):
    names = ("RelevanceCam", "FeatureActivationMap", "RelevanceCam", "CorrespondenceMap")
    arguments = [a for name in names for a in ("--method", name)]
    status, out, err = run(
        "explain", *three, *arguments, "--contrast", "rest", "--size", SIZE, "-o", tmp_path / "out.png"
    )
    assert (status, err) == (0, "")
    ((_, _, rows, captions, names),) = figures
    assert [row.label for row in rows] == [
        "RelevanceCam:\ncontrast to the rest",
        "FeatureActivationMap:\ncontrast to the rest",
        "CorrespondenceMap:\ncontrast to the rest",
    ]
    assert [row.there_label for row in rows] == [
        "RelevanceCam",
        "FeatureActivationMap",
        "CorrespondenceMap:\ncontrast to the rest",
    ]
    for words in captions:
        assert words[0].startswith("for 1: cosine 0.")
        assert "\nmargin " in words[0]
    assert names == ["1: cat.jpg", "2: coffee.png"]
    assert "weights" not in out


def test_without_a_method_the_first_row_takes_contrast_and_threshold(run, figures, three, tmp_path):
    labels = []
    for options in ((), ("--contrast", "2"), ("--contrast", "self"), ("--threshold", "0.5")):
        assert run("explain", *three, *options, "--size", SIZE, "-o", tmp_path / "out.png")[0] == 0
        rows = figures[-1][2]
        labels.append((rows[0].label, rows[0].there_label))
        assert [row.name for row in rows] == ["map", "self", "alike"]
        has_margin = [["margin" in words for words in captions] for captions in figures[-1][3]]
        # "self" and what looks alike explain no such margin.
        assert has_margin == [[len(options) > 1 and options[1] != "self"] * 2, [False] * 2, [False] * 2]
    assert labels == [
        ("in common: FAM", "in common: FAM"),
        ("contrast to reference 2", "in common: FAM"),
        ('FAM: "self"', 'FAM: "self"'),
        ("FAM: less the threshold 0.5", "FAM: less the threshold 0.5"),
    ]


def test_the_layer_of_the_integrated_decomposition_is_its_own_unless_one_is_named(run, figures, photos, tmp_path):
    (tmp_path / "deep.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def encoder():\n"
        "    torch.manual_seed(0)\n"
        "    parts = [nn.Conv2d(3, 4, 3, 2), nn.SiLU(), nn.Conv2d(4, 8, 3, 2), nn.SiLU()]\n"
        "    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        arguments = ("explain", photos / "query.png", photos / "cat.jpg", "--encoder", "deep:encoder", "--size", SIZE)
        options = ("--method", "IntegratedDecomposition", "-o", "out.png")
        first = run(*arguments, *options)[1].splitlines()
        own = json.loads(run(*arguments, *options, "--json")[1])
        named = json.loads(run(*arguments, *options, "--json", "--layer", "2")[1])
    assert first[:2] == [
        "encoder deep:encoder, layer 3 (SiLU), the last with a map",
        "IntegratedDecomposition: layer 1, which it found",
    ]
    assert (own["layer"], own["layers"]) == ("3", {"IntegratedDecomposition": "1"})
    assert own["references"][0]["maps"]["IntegratedDecomposition"]["shape"] == [15, 15]
    assert (named["layer"], named["layers"]) == ("2", {})
    assert named["references"][0]["maps"]["IntegratedDecomposition"]["shape"] == [7, 7]


# What cannot be answered

REFUSED = {
    "no such method": (["--method", "Relaxx"], "Did you mean 'Relax'?"),
    "a method of Captum": (["--method", "LayerGradCam"], "captum-fam compare has those of Captum"),
    "a method of classifiers": (["--method", "ClassActivationMap"], "--method must be one of CorrespondenceMap, "),
    "something of Captum that is no method": (["--method", "visualization"], "--method must be one of"),
    "Relax with a threshold": (["--method", "Relax", "--threshold", "0.5"], "Relax has no --threshold: take --method"),
    "ScoreCam with self": (["--method", "ScoreCam", "--contrast", "self"], "ScoreCam has no --contrast self: take"),
    "CorrespondenceMap with self": (
        ["--method", "CorrespondenceMap", "--contrast", "self"],
        "CorrespondenceMap has no --contrast self",
    ),
    "a second method that cannot": (
        ["--method", "FeatureActivationMap", "--method", "Relax", "--threshold", "1"],
        "Relax has no --threshold",
    ),
    "LaFAM with a contrast": (
        ["--method", "LabelFreeActivationMap", "--contrast", "2"],
        "knows of no reference, so it has no --contrast 2",
    ),
    "a distance with self": (["--similarity", "euclidean", "--contrast", "self"], "--similarity cosine or dot"),
    "a distance with a threshold": (["--similarity", "euclidean", "--threshold", "-3"], "--threshold needs"),
    "both": (["--threshold", "0.5", "--contrast", "rest"], "--contrast and --threshold were both given"),
    "a threshold that is none": (["--threshold", "nan"], "--threshold must be a finite score"),
    "a threshold in words": (["--threshold", "high"], "(see captum-fam explain --help)"),
    "a contrast that is none": (["--contrast", "0"], '--contrast must be "rest", "self" or a reference\'s number'),
    "an encoder without sentences": (["--text", "a red shoe"], "has no text tower"),
    "an empty sentence": (["--text", " "], "--text"),
    "an unknown option": (["--methods", "Relax"], "(see captum-fam explain --help)"),
    "a page with a method": (["--method", "Relax", "-o", "{tmp}/page.html"], "a page has no --method"),
    "a page with a sentence": (["--text", "shoe", "-o", "{tmp}/page.html"], "a page has no --method, --text"),
    "a page with a contrast": (["--contrast", "2", "-o", "{tmp}/page.html"], "a page has no"),
    "a page with a threshold": (["--threshold", "0", "-o", "{tmp}/page.html"], "a page has no"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_answered_is_one_line_before_anything_is_computed(
    run, three, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.setattr(bundled_encoder().__class__, "forward", None)
    status, out, err = run("explain", *three, *(a.format(tmp=tmp_path) for a in arguments))
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert not any(word in err for word in ("`contrast`", "`threshold`", "contrast=", "method="))


def test_a_method_that_fails_on_an_encoder_is_named(run, three, tmp_path, monkeypatch):
    (tmp_path / "bad_encoders.py").write_text(BAD_ENCODERS)
    monkeypatch.chdir(tmp_path)
    arguments = ("--encoder", "bad_encoders:tokens", "--layer", "patches", "--size", 64, "-o", "out.png")
    for name in ("FeatureActivationMap", "RelevanceCam"):  # which has no rule for what comes after the layer
        status, out, err = run("explain", *three, *arguments, "--method", name)
        assert (status == 0) == (name == "FeatureActivationMap")
    assert (status, out) == (2, "")
    assert "RelevanceCam failed on bad_encoders:tokens (LRP has no rule for a module after layer 'patches'" in err
    assert "`rule`" not in err
    assert err.endswith("): take another --method or --layer\n")


def test_nothing_to_compare_with_is_said(run, three):
    status, out, err = run("explain", three[0])
    assert (status, out) == (2, "")
    assert "name an image as REFERENCE, or a sentence with --text" in err


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["explain", "--nope"], "captum-fam explain"),
        (["compare", "--nope"], "captum-fam compare"),
        (["explore", "a.png"], "captum-fam explore"),
        (["batch", "--nope"], "captum-fam batch"),
        (["demo", "--nope"], "captum-fam demo"),
        (["nope"], "captum-fam"),
        (["--nope"], "captum-fam"),
    ],
)
def test_a_mistake_in_the_options_names_the_command(run, arguments, command):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("captum-fam: ")
    assert err.endswith(f" (see {command} --help)\n")


# A map and a margin of opposite sign


def test_a_map_and_a_margin_of_opposite_sign_come_with_a_word(run, figures, three, tmp_path, monkeypatch):
    arguments = ("explain", *three, "--method", "FeatureActivationMap", "--method", "Relax", "--contrast", "2")
    arguments = (*arguments, "--size", SIZE, "-o", tmp_path / "out.png")
    few_masks(monkeypatch, 9)
    assert "note" not in run(*arguments)[1]
    maps = FeatureActivationMap._maps
    monkeypatch.setattr(FeatureActivationMap, "_maps", lambda *a, **k: [-M for M in maps(*a, **k)])
    out = run(*arguments)[1].splitlines()
    note = (
        "FeatureActivationMap: contrast to reference 2: the map for 1 adds up to the opposite sign of the margin: FAM's"
        " places do not add up to the margin; see --method SimilarityDecomposition"
    )
    assert [line for line in out if line.startswith("note")] == [f"note: {note}"]
    assert json.loads(run(*arguments, "--json")[1])["notes"] == [note]


def test_the_map_of_a_reference_that_was_asked_the_same_comes_with_a_word_too(report, three, monkeypatch):
    options = ("--method", "FeatureActivationMap", "--threshold", "0.999")
    turned = lambda maps, margin: [M if M.mean() * margin > 0 else -M for M in maps]  # noqa: E731
    maps = FeatureActivationMap._maps
    # All margins are negative: maps of the query agree, those of the references do not, then both do not.
    calls = []

    def made(*given, wrong=(1,), **options):
        calls.append(None)
        return turned(maps(*given, **options), 1 if (len(calls) - 1) % 2 in wrong else -1)

    for wrong, words in (((1,), "the map of 1, 2 adds"), ((0, 1), "the map for 1, 2 and the map of 1, 2 add")):
        calls.clear()
        monkeypatch.setattr(FeatureActivationMap, "_maps", lambda *a, wrong=wrong, **k: made(*a, wrong=wrong, **k))
        found = report(*three, *options)
        for reference in found["references"]:
            assert reference["margin"] < 0
            assert reference["reference_maps"]["FeatureActivationMap"]["mean"] > 0
        (note,) = found["notes"]
        assert f"less the threshold 0.999: {words} up to the opposite sign of the margin: FAM's places" in note
    # Of other references it is the query alone that is asked.
    calls.clear()
    assert not report(*three, *options[:2], "--contrast", "self")["notes"]


def test_a_row_that_does_not_explain_the_margin_has_no_such_word(run, figures, three, tmp_path, monkeypatch):
    for kind in (SimilarityDecomposition, CorrespondenceMap):  # "self", and what looks alike less the others
        name = "_maps" if kind is SimilarityDecomposition else "match"
        made = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, made=made, **k: opposite(made(*a, **k)))
    for options in (("--contrast", "rest"), ("--contrast", "2"), ("--threshold", "0.9"), ("--threshold", "-0.9")):
        status, out, err = run("explain", *three, *options, "--size", SIZE, "-o", tmp_path / "out.png")
        assert (status, err) == (0, "")
        assert "adds up to the opposite sign" not in out


def opposite(maps):
    return [opposite(M) for M in maps] if isinstance(maps, list) else -M if (M := maps).mean() > 0 else M - 1


@pytest.mark.parametrize(
    ("mean", "margin", "said"),
    [(1.0, -1.0, True), (-1.0, 1.0, True), (1.0, 1.0, False), (1.0, 0.0, False), (1e-6, -1.0, False)],
)
def test_a_sign_is_compared_where_there_is_one(mean, margin, said):
    method = SimilarityDecomposition(bundled_encoder(), bundled_encoder().features)
    row = Row("a", method, Asked(), None, "a", [torch.full((2, 2), mean), None], "a", [None, None])
    assert row.against([margin, -margin], [1.0, float("nan")]) == ([0] if said else [])


def test_margins_by_hand():
    scores = [0.5, 0.1, 0.3]
    assert Asked().margins(scores) == Asked("self").margins(scores) == []
    assert Asked(1).margins(scores) == pytest.approx([0.4, 0, 0.2])
    assert Asked("rest").margins(scores) == pytest.approx([0.3, -0.3, 0])
    assert Asked(None, 0.2).margins(scores) == pytest.approx([0.3, -0.1, 0.1])


# Sentences


@pytest.mark.parametrize(
    ("contrast", "numbers"), [("rest", "1, 2, 3"), ("3", "1, 2"), ("2", "3"), ("self", ""), (None, "")]
)
def test_scores_of_images_less_those_of_sentences_come_with_a_word(report, three, talking, contrast, numbers):
    options = () if contrast is None else ("--contrast", contrast)
    notes = report(*three, "--text", "a red shoe", *options, *talking)["notes"]
    about = [note for note in notes if "differ in most encoders" in note]
    assert [note.split(", scores of images and of sentences")[0] for note in about] == (
        [f"--contrast {contrast}: for {numbers}"] if numbers else []
    )
    if contrast == "rest":  # of one kind alone there is nothing to say
        assert not report(*three, "--contrast", "rest")["notes"]
        sentences = ("--text", "a red shoe", "--text", "a hat")
        assert len(report(three[0], *sentences, "--contrast", "rest", *talking)["notes"]) == 1


def of_sentences(sentences):
    encoder = bundled_encoder()
    noise = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(len(x))) for x in sentences]
    with torch.no_grad():
        return torch.cat([encoder(x) for x in noise])


def test_a_sentence_is_a_reference_after_the_images(run, report, three, talking):
    sentences = ("a red shoe", "hat")
    found = report(*three, *talking, "--text", sentences[0], "--text", sentences[1], "--contrast", "4")
    encoder, query, _, z, s = embedded(three)
    s = torch.cat([s, of_sentences(sentences)])
    references = found["references"]
    assert [(r["number"], r.get("path") is None, r.get("text")) for r in references] == [
        (1, False, None),
        (2, False, None),
        (3, True, sentences[0]),
        (4, True, sentences[1]),
    ]
    scores = torch.cosine_similarity(z, s)
    assert [r["score"] for r in references] == pytest.approx(scores.tolist(), abs=1e-6)
    assert [r["margin"] for r in references] == pytest.approx((scores - scores[3]).tolist(), abs=1e-6)
    fam = FeatureActivationMap(encoder, encoder.features)
    for k, reference in enumerate(references):
        shown = torch.tensor(reference["map"]["values"], dtype=torch.float64)
        close(shown, fam.attribute(query, k, reference_embedding=s, contrast=3)[0, 0])
        assert (reference["alike"] is None) == (reference["reference_map"] is None) == (k > 1)
    # What looks alike is less the other image: sentences are none of the others.
    alike = CorrespondenceMap(encoder, encoder.features).attribute_all(
        query, reference=embedded(three)[2], contrast="rest"
    )
    close(torch.tensor(references[0]["alike"]["values"], dtype=torch.float64), alike[0, 0])
    assert "sentences have no places" in found["notes"][0]


def test_sentences_alone_are_explained_on_the_query(run, figures, three, talking, tmp_path):
    arguments = ("explain", three[0], *talking, "--text", "a red shoe", "--text", "hat", "--size", SIZE)
    status, out, err = run(*arguments, "-o", tmp_path / "out.png")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].startswith("1  cosine ")
    assert lines[1].endswith('  "a red shoe"')
    assert lines[3].startswith("note: sentences have no places")
    ((_, shown, rows, _, names),) = figures
    assert shown == ["a red shoe", "hat"]
    assert [row.name for row in rows] == ["map", "self"]
    assert all(there is None for row in rows for there in row.there)
    assert names == ["1", "2"]


def test_of_sentences_and_images_those_are_compared_that_have_places(run, report, three, talking):
    found = report(*three[:2], *talking, "--text", "hat", "--method", "CorrespondenceMap")
    one, two = found["references"]
    encoder, query, images, _, _ = embedded(three[:2])
    alike = CorrespondenceMap(encoder, encoder.features).attribute(query, reference=images)
    close(values(one, "CorrespondenceMap"), alike[0, 0])
    assert two["maps"] == two["reference_maps"] == {"CorrespondenceMap": None}
    assert two["score"] is not None


SPEECHLESS = {
    "nothing to look alike": (["--method", "CorrespondenceMap", "--text", "hat"], "needs an image: a sentence has no"),
    "a single image": (
        ["{cat}", "--method", "CorrespondenceMap", "--text", "hat", "--contrast", "rest"],
        "needs two images for --contrast rest",
    ),
    "a sentence to contrast with": (
        ["{cat}", "--method", "CorrespondenceMap", "--text", "hat", "--contrast", "2"],
        "needs an image for --contrast 2",
    ),
    "a number too large": (["{cat}", "--text", "hat", "--contrast", "3"], "a reference's number, 1 to 2"),
    "a tower of another space": (["--text", "hat", "--encoder", "talking:narrow"], "3 dimensions and images 512"),
    "a tower that fails": (
        ["--text", "hat", "--encoder", "talking:failing"],
        "failed on --text (RuntimeError: no",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), SPEECHLESS.values(), ids=SPEECHLESS)
def test_what_a_sentence_cannot_answer_is_one_line(run, three, talking, arguments, words):
    arguments = [a.format(cat=three[1]) for a in arguments]
    status, out, err = run("explain", three[0], *([] if "--encoder" in arguments else talking), *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_sentence_without_a_direction_is_numbered_as_the_user_counts(run, figures, three, talking, tmp_path):
    arguments = ("explain", *three[:2], "--text", "hat", "--encoder", "talking:dead", "--size", SIZE)
    status, _, err = run(*arguments, "-o", tmp_path / "out.png")
    assert status == 0
    assert err == (
        "captum-fam: warning: Embeddings are zero or not finite (references [2]): the maps that depend on them are"
        " zero.\n"
    )


def test_sentences_of_a_real_text_tower_are_compared_with_images(run, report, three, tmp_path):
    from test_encoders import open_clip, save_open_clip

    folder = tmp_path / "clip"
    folder.mkdir()
    save_open_clip(folder, "ViT")
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    transform = load_encoder(f"open_clip:local-dir:{folder}").transform  # of the whole image, where theirs crops
    sentences = ["a red shoe", "hat"]
    arguments = [a for sentence in sentences for a in ("--text", sentence)]
    status, out, _ = run(
        *("explain", *three[:2], *arguments, "--encoder", f"open_clip:local-dir:{folder}"),
        *("--contrast", "2", "--json", "-o", tmp_path / "out.png"),
    )
    assert status == 0
    with torch.no_grad():
        z, image = (model.encode_image(transform(read_image(path))[None]) for path in three[:2])
        s = torch.cat([image, model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(sentences))])
    scores = torch.cosine_similarity(z, s)
    found = json.loads(out)["references"]
    assert [r["score"] for r in found] == pytest.approx(scores.tolist(), abs=1e-5)
    assert [r["margin"] for r in found] == pytest.approx((scores - scores[1]).tolist(), abs=1e-5)


# A broken image


@pytest.fixture
def broken(three):
    path = three[0].with_name("broken.jpg")
    path.write_bytes(three[1].read_bytes()[:900])
    yield path
    path.unlink()


def test_a_broken_reference_costs_itself_alone(run, report, figures, three, broken):
    whole = report(*three, "--contrast", "2")
    query, cat, coffee = three
    found = report(query, cat, broken, coffee, "--contrast", "3", status=1)
    assert [r["number"] for r in found["references"]] == [1, 2, 3]
    assert "truncated" in found["references"][1]["error"]
    assert found["references"][1]["path"] == str(broken)
    assert found["references"][1]["score"] is None
    for one, other in zip(whole["references"], (found["references"][0], found["references"][2])):
        assert other["error"] is None
        assert {k: v for k, v in one.items() if k != "number"} == {k: v for k, v in other.items() if k != "number"}
    assert figures[-1][4] == ["1: cat.jpg", "3: coffee.png"]
    assert figures[-1][3][0][1].startswith("for 3: ")
    assert figures[-1][2][0].label == "contrast to reference 3"


def test_of_a_broken_reference_stderr_has_a_line_and_stdout_the_rest(run, figures, three, broken, tmp_path):
    missing = tmp_path / "nope.jpg"
    status, out, err = run("explain", three[0], broken, three[1], missing, "--size", SIZE, "-o", tmp_path / "out.png")
    assert status == 1
    assert [line.split()[0] for line in out.splitlines()] == ["encoder", "2", "wrote", "bundled"]
    first, second = err.splitlines()
    assert first.startswith(f"captum-fam: reference 1 is left out: cannot read {broken} as an image: ")
    assert second.startswith(f"captum-fam: reference 3 is left out: there is no image {missing}: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{broken}", "{cat}"], "cannot read {broken} as an image"),
        (["{query}", "{broken}"], "cannot read {broken} as an image"),
        (["{query}", "{broken}", "{broken}"], "no reference can be read; the first: cannot read {broken}"),
        (["{query}", "{cat}", "{broken}", "--contrast", "2"], "--contrast 2 is an image that cannot be read"),
        (["{query}", "{cat}", "{broken}", "--contrast", "rest"], "two references, of which all but one can be read"),
    ],
)
def test_nothing_is_written_where_the_query_the_other_or_all_are_broken(run, three, broken, tmp_path, arguments, words):
    names = {"query": three[0], "cat": three[1], "broken": broken}
    status, out, err = run("explain", *(a.format(**names) for a in arguments), "-o", tmp_path / "out.png")
    assert (status, out) == (2, "")
    assert words.format(**names) in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("layer", "advice"), [("feature", "did you mean features"), ("xyz", "name another, such as ")])
def test_an_unknown_layer_is_told_with_one_that_there_is(run, three, tmp_path, layer, advice):
    arguments = ("explain", *three[:2], "--layer", layer, "--size", SIZE, "-o", tmp_path / "out.png")
    status, _, err = run(*arguments)
    assert status == 2
    assert err.startswith(f"captum-fam: the encoder has no layer {layer!r}: {advice}")
    assert "features" in err


def test_a_broken_reference_of_a_page_costs_itself_alone(run, three, broken, tmp_path):
    arguments = ("explore", three[0], broken, three[1], "--size", SIZE, "-o", tmp_path / "page.html")
    status, out, err = run(*arguments)
    assert status == 1
    assert err.startswith("captum-fam: reference 1 is left out: cannot read")
    assert [line.split()[0] for line in out.splitlines()] == ["encoder", "2", "control", "wrote"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# What is written


def test_the_maps_of_the_json_are_those_of_python_to_the_bit(report, three):
    one, two = report(*three)["references"]
    encoder, query, images, z, s = embedded(three)
    fam = FeatureActivationMap(encoder, encoder.features)
    maps, back = fam.attribute_all(query, reference_embedding=s), fam.attribute(images, reference_embedding=z)
    for k, reference in enumerate((one, two)):
        assert torch.equal(torch.tensor(reference["map"]["values"]), maps[0, k])
        assert torch.equal(torch.tensor(reference["reference_map"]["values"]), back[k, 0])
        for name in ("map", "self", "alike", "reference_map", "reference_self", "reference_alike"):
            shown = np.array(reference[name]["values"])
            assert list(shown.shape) == reference[name]["shape"] == [SIZE // 16] * 2
            assert (shown.min(), shown.max()) == (reference[name]["min"], reference[name]["max"])


def test_json_holds_the_maps_if_it_is_asked_to(run, figures, three, tmp_path):
    out = run("explain", *three, "--json", "--size", SIZE, "-o", tmp_path / "out.png")[1]
    assert "values" not in out
    assert json.loads(out)["references"][0]["map"].keys() == {"shape", "min", "max", "mean"}


def test_a_single_reference_stands_below_the_query_and_each_method_is_a_column(run, three, tmp_path, monkeypatch):
    figures, draw = [], _explain.explanation_figure
    monkeypatch.setattr(_explain, "explanation_figure", lambda *given: figures.append(draw(*given)) or figures[-1])
    methods = ("--method", "FeatureActivationMap", "--method", "CorrespondenceMap")
    assert run("explain", *three[:2], *methods, "--size", SIZE, "-o", tmp_path / "out.png")[0] == 0
    drawn = [axis for axis in figures[0].axes if axis.axison and axis.get_label() != "<colorbar>"]
    above, below = drawn[:3], drawn[3:]
    assert [axis.get_xlabel().split(":")[0] for axis in above] == ["query", "for 1", "for 1"]
    assert below[0].get_xlabel().startswith("1: cat")
    assert not any("cat.jpg" in axis.get_xlabel() for axis in below[1:])
    for one, other in zip(above, below):
        assert one.get_position().x0 == pytest.approx(other.get_position().x0)
        assert one.get_position().y0 > other.get_position().y1
    labels = [axis.get_ylabel() for axis in figures[0].axes if axis.get_label() == "<colorbar>"]
    assert sorted(labels) == ["CorrespondenceMap", "FeatureActivationMap"]  # one scale for both images


@pytest.mark.parametrize(("command", "suffix", "begins"), [("explain", ".pdf", b"%PDF"), ("compare", ".SVG", b"<?xml")])
def test_the_figure_is_of_the_kind_that_its_name_says(run, three, tmp_path, command, suffix, begins):
    output = tmp_path / f"out{suffix}"
    status, out, err = run(command, *three[:2], "--method", "FeatureActivationMap", "--size", SIZE, "-o", output)
    assert (status, err) == (0, "")
    assert output.read_bytes().startswith(begins)
    assert f"wrote {output}" in out


def test_a_page_is_that_of_explore_and_json_has_the_same_scores(run, three, tmp_path):
    pages = []
    for command in ("explain", "explore"):
        output = tmp_path / f"{command}.html"
        status, out, err = run(command, *three, "--size", SIZE, "-o", output)
        assert (status, err) == (0, "")
        pages.append(output.read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    status, out, _ = run("explain", *three, "--size", SIZE, "-o", tmp_path / "third.html", "--json")
    assert json.loads(out)["figure"].endswith("third.html")
    assert [f'"score":{r["score"]:.6g}' in pages[0] for r in json.loads(out)["references"]] == [True, True]


def test_sentences_are_drawn_in_place_of_pictures(run, three, talking, tmp_path, monkeypatch):
    figures, draw = [], _explain.explanation_figure
    monkeypatch.setattr(_explain, "explanation_figure", lambda *given: figures.append(draw(*given)) or figures[-1])
    long, fam, alike = (
        "a very long sentence about a shoe " * 9,
        *(("--method", name) for name in ("FeatureActivationMap", "CorrespondenceMap")),
    )
    output = tmp_path / "out.png"
    for arguments in ((*three[:2], "--text", "$x^$ shoe", *alike), (three[0], "--text", long)):
        assert run("explain", *arguments, *fam, *talking, "--size", SIZE, "-o", output)[0] == 0
        assert is_png(output)
    drawn = [[axis for axis in figure.axes if axis.axison and axis.get_label() != "<colorbar>"] for figure in figures]
    texts = [[text.get_text() for axis in axes for text in axis.texts] for axes in drawn]
    assert texts[0] == ['"$x^$ shoe"']
    (text,) = texts[1]
    assert text.startswith('"a very long\nsentence about')
    assert text.endswith("\n\N{HORIZONTAL ELLIPSIS}")
    assert text.count("\n") == _figure._LINES - 1
    # The query; what is alike, for the image; FAM for both; below the image with both, and beside it the sentence.
    assert [axis.get_xlabel().split(":")[0] for axis in drawn[0]] == [
        *("query", "for 1", "for 1", "for 2"),
        *("1", "2", "1"),
    ]
    assert [axis.get_xlabel().split(":")[0] for axis in drawn[1]] == ["query", "for 1", "1"]
    # Each bar is at the end of its row.
    ends = max(axis.get_position().x1 for axis in drawn[0])
    bars = [axis for axis in figures[0].axes if axis.get_label() == "<colorbar>"]
    assert len(bars) == 4
    assert all(bar.get_position().x0 >= ends for bar in bars)
