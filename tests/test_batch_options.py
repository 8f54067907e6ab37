"""The batch job's methods, contrasts and sides: each row is what a call for its pair gives, in how many passes."""

# ruff: noqa: F811  # fixtures of other tests

import multiprocessing
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_batch import NAMES, PAIRS, contents, in_process, photos, read, run, stamps, write  # noqa: F401
from tqdm import auto, tqdm
from tqdm.std import TqdmDefaultWriteLock

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    IntegratedDecomposition,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
)
from captum_fam.engine import forward
from captum_fam.images import read_image, to_tensor

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from captum_fam import batch  # noqa: E402  # after the skip
from captum_fam.batch import _local, _part, _work  # noqa: E402

SIZE = 64
FACTORY = '''
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Conv2d(6, 8, 2, 2), nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()

class Counting(nn.Module):
    """Writes down which images come, by a number that the test knows them by."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = small(), []

    def forward(self, x):
        self.seen += [round(v, 5) for v in x.double().mean((1, 2, 3)).tolist()]
        return self.inner(x)

made = []

def counting():
    made.append(Counting())
    return made[-1]
'''


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An encoder on which every method works, in a module of the current folder."""
    (tmp_path / "batch_small.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "batch_small", raising=False)
    import batch_small

    return batch_small


def tensor_of(path):
    return to_tensor(read_image(Path(path)), SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None].double()


def explain(pairs, photos, out="out", **options):
    options = {"encoder": "batch_small:small", "size": SIZE, "root": photos} | options
    return batch.explain_pairs(write(Path("pairs.csv"), pairs), Path(out), **options)


def the_map(row, prefix=""):
    values = np.array(row[f"{prefix}map"], np.float64).reshape(row[f"{prefix}shape"])
    return values * row[f"{prefix}scale"]


def close(found, expected):
    """Within the rounding of float16, at the largest value."""
    expected = expected.detach().double().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-10 * max(np.abs(expected).max(), 1e-9))


class ShortRelax(Relax):
    """So does a class give options of its own."""

    def __init__(self, forward_func, *, similarity=None):
        super().__init__(forward_func, similarity=similarity, n_samples=20)


METHODS = {
    "FeatureActivationMap": (lambda e: FeatureActivationMap(e, e[3]), "3"),
    "SimilarityDecomposition": (lambda e: SimilarityDecomposition(e, e[3]), "3"),
    "IntegratedDecomposition": (IntegratedDecomposition, "1"),
    "LabelFreeActivationMap": (lambda e: LabelFreeActivationMap(e, e[3]), "3"),
    "RelevanceCam": (lambda e: RelevanceCam(e, e[3]), "3"),
    "ScoreCam": (lambda e: ScoreCam(e, e[3]), "3"),
    "CorrespondenceMap": (lambda e: CorrespondenceMap(e, e[3]), "3"),
    ShortRelax: (ShortRelax, ""),
}
FEW = [(NAMES[0], NAMES[1]), (NAMES[2], NAMES[1]), (NAMES[0], NAMES[3])]  # one query twice, not next to each other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS, ids=str)
def test_every_method_gives_what_its_own_call_does_on_both_sides(photos, small, in_process, name):
    make, layer = METHODS[name]
    found = explain(FEW, photos, method=name, sides="both", batch_size=4)
    assert (found.explained, found.layer) == (3, layer)
    encoder = small.small().eval()
    method = make(encoder)
    for row in read(Path("out")):
        query, reference = (tensor_of(photos / row[side]) for side in ("query", "reference"))
        close(the_map(row), method.attribute(query, reference=reference)[0, 0])
        close(the_map(row, "reference_"), method.attribute(reference, reference=query)[0, 0])
        assert row["score"] == pytest.approx(torch.cosine_similarity(encoder(query), encoder(reference)).item())
    before = stamps(Path("out"))
    (Path("out") / "part-000000.parquet").unlink()
    assert explain(FEW, photos, method=name, sides="both", batch_size=4) == found  # at the layer of then
    assert before.keys() == stamps(Path("out")).keys()


@pytest.mark.parametrize("options", [{"contrast": "self"}, {"threshold": 0.25}], ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_contrast_and_threshold_are_those_of_attribute_and_the_score_is_the_score(
    photos, small, in_process, options, similarity
):
    explain(FEW, photos, sides="both", similarity=similarity, **options)
    encoder = small.small().eval()
    fam = FeatureActivationMap(encoder, encoder[3], similarity=similarity)
    for row in read(Path("out")):
        query, reference = (tensor_of(photos / row[side]) for side in ("query", "reference"))
        close(the_map(row), fam.attribute(query, reference=reference, **options)[0, 0])
        close(the_map(row, "reference_"), fam.attribute(reference, reference=query, **options)[0, 0])
        z, s = encoder(query), encoder(reference)
        score = torch.cosine_similarity(z, s) if similarity == "cosine" else (z * s).sum(1)
        assert row["score"] == pytest.approx(score.item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_encoder_has_the_precision_that_is_asked_for(photos, small, in_process, precision):
    assert not explain(FEW, photos, precision=precision).failed
    encoder = small.small().eval().to(getattr(torch, precision))
    fam = FeatureActivationMap(encoder, encoder[3])
    for row in read(Path("out")):
        query, reference = (
            tensor_of(photos / row[side]).to(encoder[0].weight.dtype) for side in ("query", "reference")
        )
        close(the_map(row), fam.attribute(query, reference=reference)[0, 0])
    with pytest.raises(ValueError, match=rf"a job of other precision \('{precision}' then\)"):
        explain(FEW, photos)


def test_a_precision_that_torch_does_not_know_is_named(photos, small, in_process):
    with pytest.raises(
        ValueError, match="Expected `precision` to be 'float32' or 'bfloat16' or 'float16', or None, but got"
    ):
        explain(FEW, photos, precision="half")


@pytest.mark.parametrize("sides", ["query", "reference", "both"])
def test_a_job_has_the_columns_of_its_sides(photos, small, in_process, sides):
    explain(FEW, photos, sides=sides, part_size=2)
    names = [*("map", "shape", "scale"), *("reference_map", "reference_shape", "reference_scale")]
    kept = names[:3] if sides == "query" else names[3:] if sides == "reference" else names
    assert pq.read_schema("out/part-000000.parquet").names == [
        *("id", "query", "reference", "score"),
        *kept,
        *("failure", "error"),
    ]
    explain([pair[::-1] for pair in FEW], photos, "turned", sides="query", part_size=2)
    if sides == "reference":
        for row, turned in zip(read(Path("out")), read(Path("turned"))):
            np.testing.assert_array_equal(the_map(row, "reference_"), the_map(turned))
            assert row["score"] == pytest.approx(turned["score"])


class CentredMap(FeatureActivationMap):
    """A method of a user's own: FAM, halved."""

    def terms(self, z, s):
        return super().terms(z, s) / 2


def test_a_method_of_one_s_own_is_passed_as_a_class_and_is_another_job(photos, small, in_process):
    explain(FEW, photos, method=CentredMap)
    assert batch.read_maps("out").job["method"] == f"{__name__}.CentredMap"
    with pytest.raises(ValueError, match="other method"):
        explain(FEW, photos)


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        ({}, {"method": "SimilarityDecomposition"}, "method ('FeatureActivationMap' then)"),
        ({}, {"contrast": "self"}, "contrast (None then)"),
        ({"threshold": 0.5}, {"threshold": 0.25}, "threshold (0.5 then)"),
        ({"sides": "both"}, {}, "sides ('both' then)"),
    ],
    ids=str,
)
def test_what_is_explained_is_part_of_the_job(photos, small, in_process, first, then, named):
    explain(FEW, photos, **first)
    before = contents(Path("out"))
    with pytest.raises(ValueError, match="holds a job of other") as error:
        explain(FEW, photos, **then)
    assert f"of other {named}: pass" in str(error.value)
    assert contents(Path("out")) == before


BAD = {
    "an unknown method": ({"method": "FeatureActivation"}, "Did you mean 'FeatureActivationMap'"),
    "a method of Captum": ({"method": "Saliency"}, "It is Captum's"),
    "a contrast to others": ({"contrast": "rest"}, '`contrast` of explain_pairs to be "self" or None'),
    "both": ({"contrast": "self", "threshold": 0.5}, "Expected `contrast` or `threshold`, but got both"),
    "no finite threshold": ({"threshold": float("nan")}, "a finite score"),
    "self by a distance": ({"contrast": "self", "similarity": "euclidean"}, "with itself"),
    "self of scores": ({"contrast": "self", "method": "Relax"}, "Relax"),
    "self of places": ({"contrast": "self", "method": "CorrespondenceMap"}, "CorrespondenceMap"),
    "a layer of none": ({"method": "Relax", "layer": "3"}, "Relax takes no layer: leave out --layer"),
    "a side": ({"sides": "left"}, "Expected `sides` to be 'query' or 'reference' or 'both', but got 'left'"),
    "neighbours of a list": ({"neighbours": 2}, "lists the pairs"),
    "no neighbours": ({"neighbours": 0}, "neighbours"),
}


@pytest.mark.parametrize(("options", "advice"), BAD.values(), ids=BAD)
def test_what_cannot_be_explained_is_refused_before_anything_is_written(photos, small, in_process, options, advice):
    with pytest.raises(ValueError, match=r"^") as error:
        explain(FEW, photos, **options)
    assert advice.lower() in str(error.value).lower()
    assert not list(Path("out").glob("*.parquet"))


def test_the_command_has_the_options(photos, small, run):
    pairs = write(Path("pairs.csv"), [*FEW, ("nope.jpg", NAMES[0])])
    status, out, err = run(
        *(pairs, "-o", "out", "--root", photos, "--encoder", "batch_small:small", "--size", SIZE, "--sides", "both"),
        *("--method", "SimilarityDecomposition", "--threshold", "-1", "--errors", "errors.csv"),
    )
    assert (status, "explained 3 pairs, 1 failed (1 no such file); the first:" in out) == (1, True)
    encoder = small.small().eval()
    method = SimilarityDecomposition(encoder, encoder[3])
    row = read(Path("out"))[0]
    query, reference = (tensor_of(photos / row[side]) for side in ("query", "reference"))
    with pytest.warns(UserWarning, match="add up"):
        close(the_map(row), method.attribute(query, reference=reference, threshold=-1.0)[0, 0])
    assert err.count("captum-fam: warning:") == 1  # of those that some failed, too
    assert "add up" in err


SPOKEN = {
    "a short name": (("--method", "fam"), "--method must be one of", "Did you mean 'FeatureActivationMap'?"),
    "one of Captum": (("--method", "Saliency"), "--method must be one of", "captum-fam compare has those"),
    "a distance": (("--threshold", 1, "--similarity", "euclidean"), "--threshold needs --similarity cosine or dot", ""),
    "no number": (("--threshold", "nan"), "--threshold must be a finite score", ""),
    "both": (("--threshold", 1, "--contrast", "self"), "--contrast and --threshold were both given", ""),
    "scores": (("--contrast", "self", "--method", "Relax"), "Relax has no --contrast self: take --method", ""),
}


@pytest.mark.parametrize(("options", "begins", "ends"), SPOKEN.values(), ids=SPOKEN)
def test_the_command_speaks_of_its_own_options(tmp_path, run, options, begins, ends):
    status, out, err = run(write(tmp_path / "pairs.csv", FEW), "-o", tmp_path / "out", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"captum-fam: {begins}")
    assert ends in err
    assert "`" not in err
    assert not (tmp_path / "out").exists()


def test_a_worker_s_progress_bars_make_no_semaphore_that_it_would_leave_behind(monkeypatch):
    monkeypatch.setattr(tqdm, "_lock", None, raising=False)  # put back at the end
    for kind in auto.tqdm.__mro__:  # as in a new process
        if "_lock" in vars(kind):
            monkeypatch.delattr(kind, "_lock")
    monkeypatch.setattr(_local, "PartExplainer", dict)
    monkeypatch.setattr(_local, "_explainer", None, raising=False)
    made = []
    monkeypatch.setattr(TqdmDefaultWriteLock, "__init__", lambda self: made.append(self))
    _local._start({"device": "cpu"}, multiprocessing.Value("i", 1))
    auto.tqdm(disable=True).close()
    assert not made


def test_of_what_is_beyond_the_own_share_it_is_not_said_that_it_does_not_add_up(photos, small, run):
    pairs = write(Path("pairs.csv"), FEW)
    options = (pairs, "-o", "out", "--root", photos, "--encoder", "batch_small:small", "--size", SIZE)
    assert run(*options, "--contrast", "self", "--method", "SimilarityDecomposition")[::2] == (0, "")


@pytest.mark.parametrize("sides", ["query", "reference", "both"])
def test_maps_and_margins_of_opposite_sign_are_counted_on_each_side(photos, small, in_process, sides):
    options = {"threshold": 0.99, "sides": sides, "part_size": 2}
    with pytest.warns(UserWarning, match=r"^") as warned:
        explain(PAIRS, photos, **options)
    counts = []
    for prefix, name in (("", "query"), ("reference_", "reference")):
        rows = [row for row in read(Path("out")) if f"{prefix}map" in row]
        opposite = [(row["score"] - 0.99) * the_map(row, prefix).mean() < -1e-7 for row in rows]
        assert not rows or 0 < sum(opposite) < len(opposite)
        counts += [f"{sum(opposite)} maps of the {name}"] if rows else []
    (text,) = [str(w.message) for w in warned if "opposite sign" in str(w.message)]
    assert text.startswith(f"{' and '.join(counts)}, of {len(PAIRS)} pairs, add up to the opposite sign of score -")
    # Said of the whole job by the run that finishes it, whichever parts that makes.
    Path("out/part-000001.parquet").unlink()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"^") as warned:
            explain(PAIRS, photos, **options)
        assert text in [str(w.message) for w in warned]


def test_where_no_map_is_opposite_nothing_is_said(photos, small, in_process, recwarn):
    explain(PAIRS, photos, threshold=-5.0, similarity="dot", method="SimilarityDecomposition")
    explain(PAIRS, photos, out="plain")
    assert not [w for w in recwarn if "opposite sign" in str(w.message)]


# How often an image goes through the encoder


def counted(small, photos, pairs, **options):
    """
    How often each image went through, and the rows. What the layer's layout is asked by is left out: parts of the first
    image are changed, twice, once in a process.
    """
    small.made.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "check_order", lambda *_, **__: None)
        found = explain(pairs, photos, encoder="batch_small:counting", layer="inner.3", **options)
    assert not found.failed
    number = {round(tensor_of(photos / name).mean().item(), 5): name for name in NAMES}
    return Counter(number[v] for v in small.made[0].seen if v in number), read(Path("out"))


SHUFFLED = [PAIRS[i] for i in np.random.default_rng(0).permutation(len(PAIRS))]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("pairs", [PAIRS, SHUFFLED], ids=["by query", "shuffled"])
def test_an_image_goes_through_once_for_all_of_its_pairs_however_they_are_ordered(
    photos, small, in_process, pairs, batch_size
):
    passes, rows = counted(small, photos, pairs, batch_size=batch_size)
    assert passes == dict.fromkeys(NAMES, 2)  # once as a query, once as a reference
    assert [(row["query"], row["reference"]) for row in rows] == pairs
    assert [row["id"] for row in rows] == list(range(25))
    encoder = small.small().eval()
    fam = FeatureActivationMap(encoder, encoder[3])
    for row in rows[::6]:
        query, reference = (tensor_of(photos / row[side]) for side in ("query", "reference"))
        close(the_map(row), fam.attribute(query, reference=reference)[0, 0])


def test_both_sides_take_one_pass_more_of_the_references_and_each_part_its_own(photos, small, in_process):
    assert counted(small, photos, SHUFFLED, sides="both")[0] == dict.fromkeys(NAMES, 3)
    parts = [SHUFFLED[i : i + 10] for i in (0, 10, 20)]
    expected = Counter(name for part in parts for side in zip(*part) for name in set(side))
    assert counted(small, photos, SHUFFLED, out="parts", part_size=10)[0] == expected


def test_images_of_which_all_pairs_fail_are_not_explained(photos, small, in_process):
    small.made.clear()
    pairs = [(NAMES[0], "nope.jpg"), (NAMES[0], None), (None, NAMES[1]), (NAMES[2], NAMES[3])]
    found = explain(pairs, photos, encoder="batch_small:counting", layer="inner.3")
    assert found.failures == {"no path": 2, "no such file": 1}
    seen = small.made[0].seen
    assert not any(round(tensor_of(photos / NAMES[i]).mean().item(), 5) in seen for i in (0, 1))


def test_places_are_compared_a_few_references_at_a_time(photos, small, in_process, monkeypatch):
    """All of a query's at once would not fit in memory: their activations are needed, not their embeddings alone."""
    most, explained = [], _work.explain_references

    def watched(method, inputs, ask, images, **options):
        most.append((len(inputs[0]), len(images[0])))
        return explained(method, inputs, ask, images, **options)

    monkeypatch.setattr(_work, "explain_references", watched)
    pairs = [(NAMES[0], name) for name in NAMES] + [(NAMES[1], NAMES[2])]
    explain(pairs, photos, method="CorrespondenceMap", batch_size=2)
    assert sorted(most) == [(1, 2), (1, 2), (2, 2)]
    encoder = small.small().eval()
    for row in read(Path("out")):
        query, reference = (tensor_of(photos / row[side]) for side in ("query", "reference"))
        close(the_map(row), CorrespondenceMap(encoder, encoder[3]).attribute(query, reference=reference)[0, 0])


def test_queries_of_few_pairs_are_explained_together_and_one_of_many_alone(photos, small, in_process, monkeypatch):
    sizes, explained = [], _work.explain_references

    def watched(method, inputs, ask, *rest, **options):
        sizes.append(len(inputs[0]))
        return explained(method, inputs, ask, *rest, **options)

    monkeypatch.setattr(_work, "explain_references", watched)
    pairs = [*[(NAMES[0], name) for name in NAMES], *[(name, NAMES[0]) for name in NAMES[1:]]]
    explain(pairs, photos, batch_size=4)
    assert sizes == [4, 1]
    sizes.clear()
    pairs = [(query, name) for query in NAMES[:2] for name in NAMES[:3]]
    explain(pairs, photos, "three", batch_size=4)
    assert sizes == [1, 1]  # two of three do not make six maps at once


def test_an_image_that_is_lost_between_two_readings_costs_its_own_rows(photos, small, in_process, monkeypatch):
    """With both sides, references are read twice."""
    times = Counter()

    def lost(path):
        times[path.name] += 1
        if path.name == NAMES[1] and times[path.name] > 1:
            raise ValueError("it is gone")
        return read_image(path)

    monkeypatch.setattr(_part, "read_image", lost)
    pairs = [(NAMES[0], NAMES[1]), (NAMES[2], NAMES[3]), (NAMES[4], NAMES[3])]
    found = explain(pairs, photos, sides="both", batch_size=1)
    assert (found.explained, found.failures) == (2, {"cannot be read": 1})
    assert [row["error"] for row in read(Path("out"))] == ["it is gone", None, None]
    assert read(Path("out"))[0]["map"] is None
