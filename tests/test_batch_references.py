"""The batch job with embeddings of the references in place of their images."""

# ruff: noqa: F811  # fixtures of other tests

from pathlib import Path

import numpy as np
import pytest
import torch
from test_batch import NAMES, contents, in_process, photos, read, run, write  # noqa: F401
from test_batch_options import SIZE, close, small, tensor_of, the_map  # noqa: F401

from captum_fam import FeatureActivationMap

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from captum_fam import batch  # noqa: E402  # after the skip
from captum_fam.batch import _part, _references  # noqa: E402

IDS = ["shoe", "007", "hat", "hat 2"]
HITS = [(NAMES[0], 2), (NAMES[1], 0), (NAMES[0], 0), (NAMES[3], 3)]


@pytest.fixture
def embeddings(small):
    """(4, 5), of no image."""
    return np.random.default_rng(0).normal(size=(4, 5))


def listed(embeddings, ids=IDS, file="index.parquet", kind=None):
    kind = kind or pa.list_(pa.float64())
    pq.write_table(pa.table({"embedding": pa.array(list(embeddings), kind), "id": ids}), file)
    return Path(file)


def explain(pairs, photos, reference_embeddings, out="out", **options):
    file = write(Path("pairs.csv"), pairs) if isinstance(pairs, list) else pairs
    options = {"encoder": "batch_small:small", "size": SIZE, "root": photos, "part_size": 3} | options
    return batch.explain_pairs(file, Path(out), reference_embeddings=reference_embeddings, **options)


def check(rows, photos, small, embeddings, numbers, **options):
    encoder = small.small().eval()
    fam = FeatureActivationMap(encoder, encoder[3])
    for row, number in zip(rows, numbers):
        query, s = tensor_of(photos / row["query"]), torch.from_numpy(embeddings[[number]]).double()
        close(the_map(row), fam.attribute(query, reference_embedding=s, **options)[0, 0])
        assert row["score"] == pytest.approx(torch.cosine_similarity(encoder(query), s).item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["<f8", "<f4", ">f4", "<f2", "fortran"])
def test_rows_of_an_array(photos, small, in_process, monkeypatch, embeddings, kind):
    stored = np.asfortranarray(embeddings) if kind == "fortran" else embeddings.astype(kind)
    np.save("index.npy", stored)
    opened = []
    monkeypatch.setattr(_part, "read_image", lambda path, read=_part.read_image: opened.append(path.name) or read(path))
    assert explain(HITS, photos, Path("index.npy")).explained == 4
    rows = read("out")
    assert [(row["query"], row["reference"]) for row in rows] == [(q, str(n)) for q, n in HITS]
    check(rows, photos, small, stored.astype(np.float64), [n for _, n in HITS])
    assert set(opened) == {query for query, _ in HITS}
    assert pq.read_schema("out/part-000000.parquet").names[:4] == ["id", "query", "reference", "score"]


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.list_(pa.float64()), pa.list_(pa.float32()), pa.list_(pa.float16()), pa.large_list(pa.float32())),
        pa.list_(pa.float32(), 5),
    ],
    ids=str,
)
def test_rows_of_a_table_by_their_ids(photos, small, in_process, embeddings, kind):
    stored = embeddings.astype(np.float16)  # which all of these hold
    file = listed(stored, kind=kind)
    assert explain([(q, IDS[n]) for q, n in HITS], photos, file).explained == 4
    check(read("out"), photos, small, stored.astype(np.float64), [n for _, n in HITS])


def test_numbers_may_be_integers_on_either_side(photos, small, in_process, embeddings):
    file = listed(embeddings, [10, 11, 12, 13])
    table = {"query": [q for q, _ in HITS], "reference": [10 + n for _, n in HITS]}
    pq.write_table(pa.table(table), "pairs.parquet")
    assert explain(Path("pairs.parquet"), photos, file).explained == 4
    check(read("out"), photos, small, embeddings, [n for _, n in HITS])
    np.save("index.npy", embeddings)
    pq.write_table(pa.table(table | {"reference": [n for _, n in HITS]}), "pairs.parquet")
    explain(Path("pairs.parquet"), photos, Path("index.npy"), "array")
    assert [the_map(row).tolist() for row in read("array")] == [the_map(row).tolist() for row in read("out")]


def test_what_is_missing_costs_its_own_pairs(photos, small, in_process, embeddings):
    embeddings[1] = 0
    np.save("index.npy", embeddings)
    bad = [(NAMES[0], r) for r in ("4", "-1", "1.0", "x", "", "1", "9" * 5000)]
    found = explain([*HITS, *bad, ("nope.jpg", 0)], photos, Path("index.npy"))
    assert found.explained == 4
    assert found.failures == {"no embedding": 5, "no path": 1, "no similarity": 1, "no such file": 1}
    rows = read("out")
    assert rows[4]["error"] == "there is no embedding of the reference '4'"
    check(rows[:4], photos, small, embeddings, [n for _, n in HITS])


def test_a_table_s_missing_embeddings_cost_their_own_pairs(photos, small, in_process, embeddings):
    file = listed([embeddings[0], None, [np.nan] * 5, embeddings[3]], ["a", "b", "c", None])
    found = explain([(NAMES[0], r) for r in ("a", "b", "c", "d")], photos, file)
    assert (found.explained, found.failures) == (1, {"no embedding": 2, "no similarity": 1})
    check(read("out")[:1], photos, small, embeddings, [0])


def indexed(embeddings, kind, file="gallery.index"):
    """An index of faiss; an IndexIDMap numbers its vectors 7, 8, ..."""
    faiss = pytest.importorskip("faiss", reason="needs the extra retrieval")
    index, vectors = faiss.index_factory(embeddings.shape[1], kind), embeddings.astype(np.float32)
    index.train(vectors)
    if kind.startswith("IDMap"):
        index.add_with_ids(vectors, np.arange(7, 7 + len(vectors)))
    else:
        index.add(vectors)
    faiss.write_index(index, str(file))
    return Path(file)


@pytest.mark.parametrize("kind", ["Flat", "HNSW4,Flat", "IDMap,Flat", "IDMap2,HNSW4,Flat"])
def test_vectors_of_an_index_by_its_numbers(photos, small, in_process, embeddings, kind):
    first = 7 if kind.startswith("IDMap") else 0
    hits = [(query, str(first + n)) for query, n in HITS]
    found = explain([*hits, (NAMES[0], str(first + 4))], photos, indexed(embeddings, kind))
    assert (found.explained, found.failures) == (4, {"no embedding": 1})
    check(read("out")[:4], photos, small, embeddings.astype(np.float32).astype(np.float64), [n for _, n in HITS])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("SQ8", "IndexScalarQuantizer"), ("IDMap,SQ8", "IndexScalarQuantizer"), ("IVF1,Flat", "IndexIVFFlat")],
)
def test_an_index_that_does_not_keep_its_vectors_is_refused(photos, small, in_process, embeddings, kind, name):
    with pytest.raises(ValueError, match=f"gallery.faiss holds an {name}, which does not keep its vectors one by one"):
        explain(HITS, photos, indexed(embeddings, kind, "gallery.faiss"))
    assert not Path("out").exists()


def test_an_index_of_others_or_of_nothing_or_of_one_number_twice_is_named(photos, small, in_process, embeddings):
    faiss = pytest.importorskip("faiss", reason="needs the extra retrieval")
    Path("z.index").write_bytes(b"no index")
    with pytest.raises(
        ValueError, match=r"cannot read z\.index as an index of faiss: pass one that faiss.write_index wrote"
    ):
        explain(HITS, photos, Path("z.index"))
    faiss.write_index(faiss.IndexFlatL2(5), "z.index")
    with pytest.raises(ValueError, match=r"z\.index holds no embeddings: call index\.add\(embeddings\)"):
        explain(HITS, photos, Path("z.index"))
    index = faiss.IndexIDMap(faiss.IndexFlatIP(5))
    index.add_with_ids(embeddings.astype(np.float32), np.array([1, 2, 3, 2]))
    faiss.write_index(index, "z.index")
    with pytest.raises(ValueError, match=r"z\.index has more than one row of id '2'"):
        explain(HITS, photos, Path("z.index"))


def test_contrast_and_threshold_need_no_images(photos, small, in_process, embeddings):
    np.save("index.npy", embeddings)
    explain(HITS, photos, Path("index.npy"), threshold=0.1)
    check(read("out"), photos, small, embeddings, [n for _, n in HITS], threshold=0.1)


def test_a_large_table_is_copied_a_few_rows_at_a_time(tmp_path):
    values = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    ids = [f"{i}" for i in range(1000)]
    pq.write_table(
        pa.table({"id": ids, "embedding": pa.array(list(values), pa.list_(pa.float32()))}),
        tmp_path / "index.parquet",
        row_group_size=70,
    )
    numbers = _references.numbered(tmp_path / "index.parquet", tmp_path / "copy")
    np.testing.assert_array_equal(np.load(tmp_path / "copy"), values)
    assert numbers(pa.array(["999", "x", None, "0", "999"])).to_pylist() == [999, None, None, 0, 999]


def test_started_again_it_is_the_same_job_and_other_embeddings_are_another(photos, small, run, embeddings):
    pairs = write(Path("pairs.csv"), [(q, IDS[n]) for q, n in HITS])
    arguments = (pairs, "-o", "out", "--root", photos, "--encoder", "batch_small:small", "--size", SIZE)
    arguments += ("--part-size", 2, "--reference-embeddings", listed(embeddings))
    assert run(*arguments)[0] == 0
    before = contents(Path("out"))
    (Path("out") / "part-000001.parquet").unlink()
    assert run(*arguments)[0] == 0
    assert contents(Path("out")) == before
    (Path("out") / "part-000001.parquet").unlink()
    copy = Path("out") / "_references.npy"
    good = copy.read_bytes()
    copy.write_bytes(good[:-1] + b"\x7f")
    status, _, err = run(*arguments)
    assert (status, f"{copy} is not as this job wrote it: delete it, and start again" in err) == (2, True)
    copy.unlink()
    assert run(*arguments)[0] == 0
    assert (copy.read_bytes(), contents(Path("out"))) == (good, before)
    listed(embeddings + 1)
    status, _, err = run(*arguments)
    assert (status, "holds a job of other reference_embeddings: pass" in err) == (2, True)


def test_a_job_that_wrote_nothing_yet_may_take_another_file(photos, small, in_process, embeddings):
    np.save("index.npy", embeddings[:, :4])
    with pytest.raises(ValueError, match=r"have 4 dimensions, but those of batch_small:small 5: pass what this"):
        explain(HITS, photos, Path("index.npy"))
    np.save("index.npy", embeddings)
    assert explain(HITS, photos, Path("index.npy")).explained == 4


def table(**columns):
    return lambda file: pq.write_table(pa.table(columns), file)


def array(values):
    return lambda file: np.save(file, values, allow_pickle=True)


ONE = [[1.0, 2.0, 3.0, 4.0, 5.0]]
BAD = {
    "another suffix": (
        "z.pt",
        lambda file: file.write_bytes(b"x"),
        "pass an array (N, D) that ends in .npy, a table with",
    ),
    "no array": ("z.npy", lambda file: file.write_bytes(b"x"), "cannot read z.npy as embeddings ("),
    "objects": ("z.npy", array(np.array([None, 1])), "cannot read z.npy as embeddings ("),
    "one dimension": ("z.npy", array(np.ones(5)), "(N, D) of floats, but it holds float64 of shape (5,)"),
    "integers": ("z.npy", array(np.ones((2, 5), int)), "of floats, but it holds int64 of shape (2, 5)"),
    "no rows": ("z.npy", array(np.ones((0, 5))), "of shape (0, 5)"),
    "no table": ("z.parquet", lambda file: file.write_bytes(b"x"), "cannot read z.parquet ("),
    "no ids": (
        "z.parquet",
        table(embedding=ONE),
        "must have one column 'id' and one 'embedding', but its columns are emb",
    ),
    "no embeddings": ("z.parquet", table(id=["a"], vector=ONE), "but its columns are id, vector"),
    "no floats": ("z.parquet", table(id=["a"], embedding=[[1, 2]]), "must hold lists of floats, but holds list<"),
    "no lists": ("z.parquet", table(id=["a"], embedding=[1.0]), "must hold lists of floats, but holds double"),
    "two lengths": ("z.parquet", table(id=["a", "b"], embedding=[[1.0], [1.0, 2.0]]), "must hold lists of one length"),
    "an id twice": ("z.parquet", table(id=["a", "b", "a"], embedding=ONE * 3), "more than one row of id 'a'"),
    "ids of floats": ("z.parquet", table(id=[1.5], embedding=ONE), "must hold text or integers, but holds double"),
    "no row at all": (
        "z.parquet",
        table(id=pa.array([], pa.string()), embedding=pa.array([], pa.list_(pa.float32()))),
        "lists no embeddings",
    ),
}


@pytest.mark.parametrize(("name", "make", "advice"), BAD.values(), ids=BAD)
def test_a_file_that_holds_no_embeddings_is_one_line(photos, small, run, name, make, advice):
    make(Path(name))
    pairs = write(Path("pairs.csv"), HITS)
    status, out, err = run(pairs, "-o", "out", "--root", photos, "--reference-embeddings", name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert advice in err
    assert not Path("out").exists()


REFUSED = {
    "the other side": ({"sides": "reference"}, "--sides reference needs the references' images"),
    "both": ({"sides": "both"}, "--sides both needs the references' images"),
    "places": ({"method": "CorrespondenceMap"}, "CorrespondenceMap compares places, and embeddings have none"),
}


@pytest.mark.parametrize(("options", "advice"), REFUSED.values(), ids=REFUSED)
def test_what_needs_images_says_so(photos, small, in_process, embeddings, options, advice):
    np.save("index.npy", embeddings)
    with pytest.raises(ValueError, match=advice):
        explain(HITS, photos, Path("index.npy"), **options)


def test_a_reference_that_is_no_number_needs_embeddings_or_is_a_path(photos, small, in_process):
    pq.write_table(pa.table({"query": [NAMES[0]], "reference": [3]}), "pairs.parquet")
    with pytest.raises(ValueError, match="must hold paths as text, but holds int64"):
        explain(Path("pairs.parquet"), photos, None)
