"""Why a vector store returned these hits: answers of the stores' own packages, numbers of NumPy."""

import importlib.util
import re
import sys
import uuid
import warnings
from pathlib import Path
from types import SimpleNamespace

import helpers
import matplotlib as mpl
import numpy as np
import pytest
import torch
from encoders import PooledEncoder, random, seeded

from captum_fam import FeatureActivationMap, explain_retrieval
from captum_fam.tasks.hits import Hits, explain_hits
from captum_fam.tasks.stores import from_chroma, from_faiss, from_lancedb, from_milvus, from_qdrant

N, D, K = 64, 6, 4
ENCODER = seeded(PooledEncoder).float()
GALLERY, QUERY = random(N, 3, 8, 8, seed=5).float(), random(3, 3, 8, 8).float()
with torch.no_grad():
    VECTORS, Z = ENCODER(GALLERY).numpy(), ENCODER(QUERY).numpy()
UNIT, UNIT_Z = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (VECTORS, Z))
COSINE, DOT, L2 = UNIT_Z @ UNIT.T, Z @ VECTORS.T, ((Z[:, None] - VECTORS) ** 2).sum(2)
SIMILARITIES = {"cosine": COSINE, "dot": DOT, "euclidean": -L2}


def best(similarities, k=K):
    return np.argsort(-similarities, axis=1)[:, :k]


def check(hits, similarity, score, key=int, embeddings=True):
    """Hits against NumPy, and what is explained of them; ``score`` gives the store's from similarities."""
    order, exact = best(SIMILARITIES[similarity]), SIMILARITIES[similarity]
    expected = np.take_along_axis(exact, order, 1)
    assert hits.ids == [[key(i) for i in row] for row in order.tolist()]
    np.testing.assert_allclose(hits.scores.numpy(), score(expected), rtol=1e-4, atol=1e-5)
    assert (hits.embeddings is not None) == embeddings
    gallery = {key(i): image for i, image in enumerate(GALLERY)}
    with helpers.silent():
        found = explain_hits(QUERY, hits, ENCODER, ENCODER.layer, gallery, similarity=similarity)
    assert found.ids == hits.ids
    np.testing.assert_allclose(found.similarities.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (found.similarities.diff(dim=1) <= 0).all()
    assert torch.equal(found.scores, hits.scores)
    fam = FeatureActivationMap(ENCODER, ENCODER.layer, similarity=similarity)
    for b in range(len(QUERY)):
        pairs = fam.attribute_pair(QUERY[b : b + 1].expand(K, -1, -1, -1), GALLERY[order[b]])
        for maps, pair in zip((found.maps, found.hit_maps), pairs):
            helpers.close(maps[b], pair[:, 0], rtol=1e-3, atol=1e-4)


# Qdrant


@pytest.fixture(scope="module")
def qdrant():
    return pytest.importorskip("qdrant_client").QdrantClient(":memory:")


def points(models, ids=range(N), vectors=VECTORS):
    return [
        models.PointStruct(id=i, vector=v.tolist(), payload={"file": f"{n}.jpg"})
        for n, (i, v) in enumerate(zip(ids, vectors))
    ]


@pytest.mark.parametrize("with_vectors", [True, False])
@pytest.mark.parametrize(
    ("distance", "similarity", "score"),
    [("COSINE", "cosine", lambda s: s), ("DOT", "dot", lambda s: s), ("EUCLID", "euclidean", lambda s: np.sqrt(-s))],
)
def test_qdrant(qdrant, distance, similarity, score, with_vectors):
    from qdrant_client import models

    name = str(uuid.uuid4())
    qdrant.create_collection(name, models.VectorParams(size=D, distance=models.Distance[distance]))
    qdrant.upsert(name, points(models))
    requests = [models.QueryRequest(query=z.tolist(), limit=K, with_vector=with_vectors, with_payload=True) for z in Z]
    answer = qdrant.query_batch_points(name, requests)
    check(from_qdrant(answer), similarity, score, embeddings=with_vectors)
    check(from_qdrant(answer, id="file"), similarity, score, "{}.jpg".format, with_vectors)
    check(from_qdrant([one.points for one in answer]), similarity, score, embeddings=with_vectors)  # of older clients
    one = from_qdrant(qdrant.query_points(name, query=Z[1].tolist(), limit=K, with_vectors=with_vectors))
    assert (one.ids, one.scores.tolist()) == (from_qdrant(answer).ids[1:2], from_qdrant(answer).scores[1:2].tolist())


def test_manhattan_distances_of_qdrant(qdrant):
    from qdrant_client import models

    name = str(uuid.uuid4())
    qdrant.create_collection(name, models.VectorParams(size=D, distance=models.Distance.MANHATTAN))
    qdrant.upsert(name, points(models))
    hits = from_qdrant(qdrant.query_points(name, Z[0].tolist(), limit=K, with_vectors=True))
    distances = np.abs(Z[0] - VECTORS).sum(1)
    assert hits.ids == best(-distances[None]).tolist()
    with helpers.silent():
        found = explain_hits(QUERY[:1], hits, ENCODER, ENCODER.layer, similarity=lambda z, s: -(z - s).abs())
    helpers.close(found.similarities[0], -distances[hits.ids[0]], rtol=1e-4, atol=1e-5)
    helpers.close(found.similarities, -found.scores, rtol=1e-4, atol=1e-5)


def test_named_vectors_of_qdrant_and_ids_that_are_no_numbers(qdrant):
    from qdrant_client import models

    def parameters(size):
        return models.VectorParams(size=size, distance=models.Distance.COSINE)

    several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    tokens = models.VectorParams(size=2, distance=models.Distance.COSINE, multivector_config=several)
    qdrant.create_collection(
        "named",
        {"image": parameters(D), "text": parameters(D), "tokens": tokens},
        sparse_vectors_config={"words": models.SparseVectorParams()},
    )
    ids = [str(uuid.UUID(int=i)) for i in range(N)]
    words = models.SparseVector(indices=[0], values=[1.0])
    qdrant.upsert(
        "named",
        [
            models.PointStruct(
                id=i, vector={"image": v.tolist(), "text": v[::-1].tolist(), "words": words, "tokens": [[1.0, 2.0]] * 2}
            )
            for i, v in zip(ids, VECTORS)
        ],
    )

    def search(names):
        requests = [models.QueryRequest(query=z.tolist(), using="image", limit=K, with_vector=names) for z in Z]
        return qdrant.query_batch_points("named", requests)

    check(from_qdrant(search(["image"])), "cosine", lambda s: s, ids.__getitem__)
    check(from_qdrant(search(True), vector="image"), "cosine", lambda s: s, ids.__getitem__)
    with pytest.raises(ValueError, match=r"'image', 'text', 'tokens'.*vector='image'"):
        from_qdrant(search(True))
    with pytest.raises(ValueError, match=r"vector 'video'.*'image', 'text'"):
        from_qdrant(search(["image", "text"]), vector="video")
    with pytest.raises(ValueError, match=r"one vector .*\(2, 2\)"):
        from_qdrant(search(True), vector="tokens")
    answer = search(["image"])
    answer[0].points[1].vector = {}
    with pytest.raises(ValueError, match=rf"Hit '{ids[0][:6]}.*no vector 'image'"):
        from_qdrant(answer)


def test_queries_with_fewer_hits(qdrant):
    from qdrant_client import models

    name = str(uuid.uuid4())
    qdrant.create_collection(name, models.VectorParams(size=D, distance=models.Distance.COSINE))
    qdrant.upsert(name, points(models))
    ranked = -np.sort(-COSINE, axis=1)
    limits = (ranked[:, 1:] + ranked[:, :-1]) / 2  # lets one hit, two, ... pass
    requests = [
        models.QueryRequest(query=z.tolist(), limit=K, with_vector=True, score_threshold=t)
        for z, t in zip(Z, [limits[0, 1], 2, limits[2, 2]])
    ]
    hits = from_qdrant(qdrant.query_batch_points(name, requests))
    order = best(COSINE).tolist()
    assert hits.ids == [[*order[0][:2], None], [None] * 3, order[2][:3]]
    assert hits.scores.isnan().tolist() == [[False, False, True], [True] * 3, [False] * 3]
    with helpers.silent():
        found = explain_hits(QUERY, hits, ENCODER, ENCODER.layer, GALLERY)
    assert found.similarities.isneginf().tolist() == hits.scores.isnan().tolist()
    assert not found.maps[1].any()
    assert found.maps[0, :2].flatten(1).any(1).all()
    helpers.close(found.similarities[2], COSINE[2, order[2][:3]], rtol=1e-4, atol=1e-5)


# Chroma


@pytest.fixture(scope="module")
def chroma():
    return pytest.importorskip("chromadb").EphemeralClient()


@pytest.mark.parametrize(
    ("space", "similarity", "score"),
    [("cosine", "cosine", lambda s: 1 - s), ("ip", "dot", lambda s: 1 - s), ("l2", "euclidean", lambda s: -s)],
)
def test_chroma(chroma, space, similarity, score):
    collection = chroma.create_collection(str(uuid.uuid4()), metadata={"hnsw:space": space})
    files = [{"file": f"{i}.jpg"} for i in range(N)]
    collection.add([f"id {i}" for i in range(N)], VECTORS, files)
    every = collection.query(Z, n_results=K, include=["embeddings", "metadatas", "distances"])
    check(from_chroma(every), similarity, score, "id {}".format)
    check(from_chroma(every, id="file"), similarity, score, "{}.jpg".format)
    check(from_chroma(collection.query(Z, n_results=K)), similarity, score, "id {}".format, embeddings=False)
    plain = from_chroma(collection.query(Z[:1], n_results=K, include=[]))
    assert (plain.ids, plain.scores) == ([[f"id {i}" for i in best(SIMILARITIES[similarity])[0]]], None)
    with pytest.raises(ValueError, match=r'metadata of each hit.*"file".*leave out `id`'):
        from_chroma(collection.query(Z, n_results=K, include=[]), id="file")
    with pytest.raises(TypeError, match=r"collection\.query.*'ids', 'embeddings'"):
        from_chroma(collection.get(["id 1"]))
    with pytest.raises(ValueError, match="no hits"):
        from_chroma(collection.query(Z, n_results=K, where={"file": "none"}))


def test_scores_of_a_search_in_chromas_cloud(chroma):
    from chromadb.api.types import SearchResult

    hits = from_chroma(SearchResult(ids=[["a", "b"]], scores=[[0.1, 0.2]], embeddings=[None]) | {"embeddings": None})
    assert hits.ids == [["a", "b"]]
    helpers.close(hits.scores, torch.tensor([[0.1, 0.2]]))


# LanceDB


@pytest.fixture
def lance(tmp_path):
    return pytest.importorskip("lancedb").connect(tmp_path)


FORMS = {"list": "to_list", "arrow": "to_arrow", "pandas": "to_pandas"}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("distance", "similarity", "score"),
    [("cosine", "cosine", lambda s: 1 - s), ("dot", "dot", lambda s: 1 - s), ("l2", "euclidean", lambda s: -s)],
)
def test_lancedb(lance, distance, similarity, score, form):
    table = lance.create_table("t", [{"id": i, "path": f"{i}.jpg", "vector": v} for i, v in enumerate(VECTORS)])

    def search(z):
        return table.search(z).distance_type(distance).limit(K)

    check(from_lancedb(getattr(search(Z), form)()), similarity, score)
    check(from_lancedb([getattr(search(z), form)() for z in Z], id="path"), similarity, score, "{}.jpg".format)
    check(from_lancedb(getattr(search(Z).select(["id", "_distance"]), form)()), similarity, score, embeddings=False)
    single = from_lancedb(getattr(search(Z[0]), form)())
    assert single.ids == best(SIMILARITIES[similarity])[:1].tolist()


def test_columns_of_lancedb_are_named(lance):
    import pyarrow

    column = pyarrow.list_(pyarrow.float32(), D)
    schema = pyarrow.schema([("path", pyarrow.string()), ("image", column), ("text", column)])
    rows = [{"path": f"{i}.jpg", "image": v, "text": v[::-1]} for i, v in enumerate(VECTORS)]
    table = lance.create_table("t", rows, schema)
    answer = table.search(Z, vector_column_name="image").distance_type("cosine").limit(K).to_arrow()
    check(from_lancedb(answer, id="path", vector="image"), "cosine", lambda s: 1 - s, "{}.jpg".format)
    with pytest.raises(ValueError, match=r'"id".*\'image\', \'path\'.*id="path"'):
        from_lancedb(answer)
    with pytest.raises(ValueError, match=r"\['image', 'text'\].*vector='image'"):
        from_lancedb(answer, id="path")
    with pytest.raises(TypeError, match=r"to_list\(\).*LanceVectorQueryBuilder"):
        from_lancedb(table.search(Z, vector_column_name="image"))


def test_queries_of_lancedb_without_hits(lance):
    table = lance.create_table("t", [{"id": i, "vector": v} for i, v in enumerate(VECTORS)])
    answers = [
        table.search(z).distance_type("cosine").distance_range(upper_bound=bound).limit(2).to_list()
        for z, bound in zip(Z, [2, 0, 2])
    ]
    order = best(COSINE, 2).tolist()
    assert from_lancedb(answers).ids == [order[0], [None, None], order[2]]
    frame = SimpleNamespace(to_dicts=lambda: answers[0])  # of Polars
    assert from_lancedb(frame).ids == [order[0]]
    with pytest.raises(ValueError, match="no hits"):
        from_lancedb(answers[1])


# Milvus


@pytest.fixture(scope="module")
def milvus(tmp_path_factory):
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    client = pymilvus.MilvusClient(str(tmp_path_factory.mktemp("milvus") / "milvus.db"))
    yield client
    client.close()


@pytest.mark.parametrize(
    ("metric", "similarity", "score"),
    [("COSINE", "cosine", lambda s: s), ("IP", "dot", lambda s: s), ("L2", "euclidean", lambda s: -s)],
)
def test_milvus(milvus, metric, similarity, score):
    milvus.create_collection(metric, dimension=D, metric_type=metric)
    milvus.insert(metric, [{"id": i, "vector": v.tolist(), "file": f"{i}.jpg"} for i, v in enumerate(VECTORS)])
    answer = milvus.search(metric, Z.tolist(), limit=K, output_fields=["vector", "file"])
    check(from_milvus(answer), similarity, score)
    check(from_milvus(answer, id="file"), similarity, score, "{}.jpg".format)
    answer = milvus.search(metric, Z.tolist(), limit=K, output_fields=["file"])
    check(from_milvus(answer), similarity, score, embeddings=False)
    with pytest.raises(ValueError, match=r"""output fields .* "path", .*hit \d+ have \['file'\].*leave out `id`"""):
        from_milvus(answer, id="path")
    with pytest.raises(ValueError, match="no hits"):
        from_milvus(milvus.search(metric, Z.tolist(), limit=K, filter="id > 1000"))
    with pytest.raises(TypeError, match=r"client\.search"):
        from_milvus(milvus.query(metric, filter="id < 3"))


def test_a_key_of_milvus_with_a_name_of_its_own(milvus):
    from pymilvus import DataType

    schema = milvus.create_schema(auto_id=False)
    schema.add_field("path", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("image", DataType.FLOAT_VECTOR, dim=D)
    index = milvus.prepare_index_params()
    index.add_index("image", metric_type="COSINE", index_type="FLAT")
    milvus.create_collection("t", schema=schema, index_params=index)
    milvus.insert("t", [{"path": f"{i}.jpg", "image": v.tolist()} for i, v in enumerate(VECTORS)])
    hits = from_milvus(milvus.search("t", Z.tolist(), limit=K, output_fields=["image"]))
    check(hits, "cosine", lambda s: s, "{}.jpg".format)


# faiss


faiss = pytest.importorskip("faiss")
INNER, SQUARED = faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2
OWN_IDS = np.arange(N) * 7 + 5
EXACT = ["Flat", "HNSW8", "IVF4,Flat", "IDMap,Flat", "IDMap2,Flat", "IDMap,HNSW8", "IDMap,IVF4,Flat", "RR6,IVF4,Flat"]
EXACT += ["SQ8,RFlat", "IVF4,SQ8,RFlat"]
LOSSY = ["PQ2x4", "IVF4,PQ2x4", "IDMap,IVF4,PQ2x4", "HNSW8_SQ4", "IDMap,HNSW8_SQ4"]


def made(factory, metric, vectors):
    """An index as its factory makes it, with ids of our own where it takes them; and these, image by image."""
    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(vectors.shape[1], factory, metric)
    index.train(vectors)
    ids = OWN_IDS
    try:
        index.add_with_ids(vectors, ids)
    except RuntimeError:
        ids = np.arange(N)
        index.add(vectors)
    inner = faiss.downcast_index(getattr(index, "base_index", index))
    inverted = faiss.try_extract_index_ivf(inner) if not hasattr(inner, "hnsw") else None
    if inverted is not None:
        inverted.nprobe = 4
    if hasattr(index, "k_factor"):
        index.k_factor = N
    return index, ids


def state(index):
    return faiss.serialize_index(index).tobytes()


@pytest.mark.parametrize("factory", EXACT)
@pytest.mark.parametrize(
    ("metric", "similarity", "named", "score"),
    [
        (INNER, "dot", None, lambda s: s),
        (SQUARED, "euclidean", None, lambda s: -s),
        (INNER, "cosine", "cosine", lambda s: s),
        (SQUARED, "cosine", "cosine", lambda s: 2 - 2 * s),
    ],
)
def test_every_exact_index_of_faiss_is_explained_as_it_is(factory, metric, similarity, named, score):
    vectors, z = (UNIT, UNIT_Z) if named else (VECTORS, Z)
    index, ids = made(factory, metric, vectors)
    gallery, before = dict(zip(ids.tolist(), GALLERY)), state(index)
    scores, numbers = index.search(z, K)
    image = {number: i for i, number in enumerate(ids.tolist())}
    with helpers.silent():
        found = explain_retrieval(QUERY, index, ENCODER, ENCODER.layer, gallery, K, similarity=named)
    assert state(index) == before
    assert found.ids == numbers.tolist()
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-6, atol=1e-6)
    expected = np.take_along_axis(SIMILARITIES[similarity], np.vectorize(image.get)(numbers), 1)
    np.testing.assert_allclose(found.similarities.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores, score(expected), rtol=1e-4, atol=1e-5)
    hits = from_faiss(index.search(z, K))
    with helpers.silent():
        same = explain_hits(QUERY, hits, ENCODER, ENCODER.layer, gallery, similarity=similarity)
    assert same.ids == found.ids
    helpers.close(same.similarities, found.similarities, rtol=1e-4, atol=1e-5)
    helpers.close(same.maps, found.maps, rtol=1e-3, atol=1e-4)
    helpers.close(same.hit_maps, found.hit_maps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factory", LOSSY)
@pytest.mark.parametrize(("metric", "similarity"), [(SQUARED, None), (INNER, "cosine"), (SQUARED, "cosine")])
def test_a_lossy_index_of_faiss_is_explained_by_what_it_holds_or_by_your_own_embeddings(factory, metric, similarity):
    vectors, z = (UNIT, UNIT_Z) if similarity else (VECTORS, Z)
    index, ids = made(factory, metric, vectors)
    name = similarity or "euclidean"
    scores, numbers = index.search(z, K)
    inner = made(factory.removeprefix("IDMap,"), metric, vectors)[0]
    s, q = inner.search_and_reconstruct(z, K)[2], z[:, None]
    held = (q * s).sum(2) / np.linalg.norm(s, axis=2) if similarity else -((q - s) ** 2).sum(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = explain_retrieval(QUERY, index, ENCODER, ENCODER.layer, k=K, similarity=similarity)
    assert found.ids == numbers.tolist()
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-5)
    np.testing.assert_allclose(found.similarities.numpy(), held, rtol=1e-4, atol=1e-5)
    said = scores if metric == INNER else 1 - scores / 2 if similarity else -scores
    told = [str(w.message) for w in caught]
    assert len(told) == (not np.allclose(said, held, rtol=1e-3, atol=1e-5))
    assert all("lossy" in text and "from_faiss(index.search(z, k), embeddings)" in text for text in told)

    image = {number: i for i, number in enumerate(ids.tolist())}
    true = np.take_along_axis(SIMILARITIES[name], np.vectorize(image.get)(numbers), 1)
    assert not np.allclose(held, true, rtol=1e-3)
    own, gallery = (dict(zip(ids.tolist(), rows)) for rows in (VECTORS, GALLERY))
    for hits in (from_faiss((scores, numbers), own), from_faiss((scores, numbers))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "The similarities that are explained order")  # where the loss did
            mended = explain_hits(QUERY, hits, ENCODER, ENCODER.layer, gallery, similarity=name)
        np.testing.assert_allclose(mended.similarities.numpy(), true, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(mended.scores.numpy(), scores)
        assert mended.ids == numbers.tolist()


@pytest.mark.parametrize("factory", ["IVF4,PQ2x4fs", "ITQ4,LSH"])
def test_an_index_of_faiss_that_gives_back_no_vectors_is_explained_with_your_own(factory):
    index, ids = made(factory, SQUARED, VECTORS)
    with pytest.raises(ValueError, match=r"not give back its vectors.*explain_hits\(query, from_faiss\(index.search"):
        explain_retrieval(QUERY, index, ENCODER, ENCODER.layer, k=K)
    hits = from_faiss(index.search(Z, K), dict(zip(ids.tolist(), VECTORS)))
    image = {number: i for i, number in enumerate(ids.tolist())}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The similarities that are explained order")  # where the loss did
        found = explain_hits(QUERY, hits, ENCODER, ENCODER.layer, similarity="euclidean")
    true = np.take_along_axis(-L2, np.vectorize(image.get)(np.array(hits.ids)), 1)
    np.testing.assert_allclose(found.similarities.numpy(), true, rtol=1e-4, atol=1e-5)


def test_an_index_of_faiss_that_loses_the_lengths_of_normalised_vectors_says_so():
    index, _ = made("PCA3,Flat", INNER, UNIT)
    with pytest.raises(ValueError, match=r"normalize_L2.*lossy.*from_faiss"):
        explain_retrieval(QUERY, index, ENCODER, ENCODER.layer, k=K, similarity="cosine")


def test_an_index_of_bits_is_none_of_distances():
    index = faiss.IndexBinaryFlat(8)
    index.add(np.arange(9, dtype=np.uint8)[:, None])
    with pytest.raises(ValueError, match=r"`index`.*L2 distances.*IndexBinaryFlat\."):
        explain_retrieval(QUERY, index, ENCODER, ENCODER.layer)


def test_hits_of_faiss_may_be_fewer_and_hold_their_vectors():
    index, ids = made("IVF4,Flat", INNER, UNIT)
    index.nprobe = 1
    scores, numbers, vectors = index.search_and_reconstruct(UNIT_Z, N)
    hits = from_faiss((scores, numbers, vectors))
    assert hits.ids == [[None if i < 0 else i for i in row] for row in numbers.tolist()]
    assert None in hits.ids[0]
    with helpers.silent():
        found = explain_hits(QUERY, hits, ENCODER, ENCODER.layer)
        same = explain_hits(QUERY, from_faiss((scores, numbers), dict(zip(ids, VECTORS))), ENCODER, ENCODER.layer)
    there = numbers >= 0
    assert found.similarities.isfinite().tolist() == there.tolist()
    np.testing.assert_allclose(found.similarities.numpy()[there], scores[there], rtol=1e-4, atol=1e-5)
    helpers.close(same.maps, found.maps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "own",
    [
        lambda v: v.tolist(),
        lambda v: v.astype(np.float64),
        lambda v: torch.from_numpy(v).requires_grad_(),
        lambda v: torch.from_numpy(v),
        lambda v: dict(enumerate(v)),
    ],
    ids=["list", "float64", "with gradients", "tensor", "dict"],
)
def test_embeddings_of_your_own_come_in_any_form(own):
    index, _ = made("Flat", INNER, UNIT)
    hits = from_faiss(tuple(map(torch.from_numpy, index.search(UNIT_Z, K))), own(VECTORS))
    assert not hits.embeddings.requires_grad
    helpers.close(hits.embeddings.float(), VECTORS[best(COSINE)], rtol=1e-6)
    half = from_faiss(index.search(UNIT_Z, K), torch.from_numpy(VECTORS).bfloat16())
    helpers.close(half.embeddings.float(), VECTORS[best(COSINE)], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("answer", "embeddings", "match"),
    [
        (lambda scores, ids: (ids, scores), None, r"`answer`.*index\.search.*int64.*float32"),
        (lambda scores, ids: scores, None, r"`answer`.*index\.search.*ndarray"),
        (lambda scores, ids: (scores[0], ids[0]), None, r"`answer`.*\(4,\)"),
        (
            lambda scores, ids: (scores, ids),
            VECTORS[:3],
            r"embeddings\[\d+\].*IndexError.*all of the gallery",
        ),
        (lambda scores, ids: (scores, ids), GALLERY, r"one vector \(D,\).*\(3, 8, 8\)"),
    ],
)
def test_what_is_no_answer_of_faiss_is_named(answer, embeddings, match):
    index, _ = made("Flat", INNER, UNIT)
    with pytest.raises((TypeError, ValueError), match=match):
        from_faiss(answer(*index.search(UNIT_Z, K)), embeddings)


# What is no answer of a store


@pytest.mark.parametrize(
    ("connect", "wanted"),
    [
        (from_qdrant, r"client\.query_points"),
        (from_chroma, r"collection\.query"),
        (from_lancedb, r"to_list\(\)"),
        (from_milvus, r"client\.search"),
        (from_faiss, r"index\.search"),
    ],
)
@pytest.mark.parametrize(
    ("answer", "got"),
    [(None, "None"), (torch.rand(2, 3), r"float32 tensor of shape \(2, 3\)"), ([{1}], "set"), ({"a": 1}, "dict")],
)
def test_what_is_no_answer_of_a_store_is_named(connect, wanted, answer, got):
    with pytest.raises(TypeError, match=f"`answer`.*{wanted}.*{got}"):
        connect(answer)


def test_hits_need_vectors_of_numbers_of_one_length():
    def rows(*vectors):
        return [{"id": i, "v": v} for i, v in enumerate(vectors)]

    with pytest.raises(ValueError, match=r"numbers.*'abc'"):
        from_lancedb(rows("abc", "abd"), vector="v")
    with pytest.raises(ValueError, match=r"one length.*\(2,\), \(3,\)"):
        from_lancedb(rows([1.0, 2.0], [1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=r"Hit 1 has no vector 'v'"):
        from_lancedb(rows([1.0, 2.0], None))
    with pytest.raises(ValueError, match=r"vector 'w', but they have \['v'\]"):
        from_lancedb(rows([1.0, 2.0]), vector="w")
    assert from_lancedb(rows([1, 2]), vector="v").embeddings.tolist() == [[[1.0, 2.0]]]
    assert from_lancedb(rows([1, 2])).embeddings is None


def test_hits_that_are_none_are_told():
    with pytest.raises(ValueError, match=r"at least one hit.*got none"):
        explain_hits(QUERY, Hits(ids=[[], [], []]), ENCODER, ENCODER.layer, GALLERY)
    empty = explain_hits(QUERY[:0], Hits(ids=[]), ENCODER, ENCODER.layer, GALLERY)
    assert empty.ids == []
    assert len(empty.maps) == 0


def test_another_order_than_that_of_the_scores_may_come_of_a_lossy_search():
    hits = Hits([[0, 1, 2]], torch.tensor([[0.3, 0.2, 0.1]]), torch.from_numpy(np.stack([-Z[0], Z[0], -Z[0]]))[None])
    with pytest.warns(UserWarning, match=r"in another way.*With a lossy index, this can"):
        explain_hits(QUERY[:1], hits, ENCODER, ENCODER.layer)


# The page


class Label(dict):
    """A stand-in for FiftyOne's, which takes what FiftyOne takes."""

    def __init__(self, map=None, range=None, **fields):
        super().__init__(fields, map=map, range=range)
        assert map is None or (isinstance(map, np.ndarray) and map.ndim == 2 and map.dtype.kind == "f")
        assert range is None or (all(isinstance(bound, float) for bound in range) and range[0] < range[1])


PAGE = (Path(__file__).parent.parent / "docs" / "stores.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n((?:(?!^## ).)*)", PAGE, re.M | re.S))


@pytest.mark.filterwarnings("ignore:.* has values from")  # of images that are drawn
@pytest.mark.parametrize("title", BLOCKS)
def test_the_blocks_of_the_page_run(title, request, tmp_path, monkeypatch):
    mpl.use("agg")
    files = [f"{i}.jpg" for i in range(N)]
    query, z = QUERY[:1], torch.from_numpy(Z[:1])
    names = {
        "torch": torch,
        "Hits": Hits,
        "explain_hits": explain_hits,
        "encoder": ENCODER,
        "layer": ENCODER.layer,
        "query": query,
        "z": z,
        "photos": GALLERY,
        "loader": [GALLERY],
        "gallery": dict(zip(files, GALLERY)),
        "embeddings": VECTORS,
        "samples": [],
    }
    similarity = "cosine"
    if title == "Qdrant":
        from qdrant_client import models

        names["client"] = request.getfixturevalue("qdrant")
        names["client"].create_collection("photos", models.VectorParams(size=D, distance=models.Distance.COSINE))
        names["client"].upsert("photos", points(models))
    elif title == "Chroma":
        names["collection"] = request.getfixturevalue("chroma").create_collection("photos")
        names["collection"].add(files, VECTORS)
        similarity = "euclidean"
    elif title == "LanceDB":
        rows = [{"file": name, "vector": v} for name, v in zip(files, VECTORS)]
        names["table"] = request.getfixturevalue("lance").create_table("photos", rows)
    elif title == "Milvus":
        names["milvus"] = request.getfixturevalue("milvus")
        names["milvus"].create_collection("photos", dimension=D)  # cosine
        names["milvus"].insert("photos", [{"id": i, "vector": v.tolist()} for i, v in enumerate(VECTORS)])
        names["gallery"] = GALLERY
    elif title == "faiss":
        names["index"], names["quantised"] = made("Flat", SQUARED, UNIT)[0], made("SQ8", SQUARED, VECTORS)[0]
        similarity = "euclidean"
    elif title == "Another store":
        rows = [(files[i], 1 - COSINE[0, i], VECTORS[i]) for i in best(COSINE, 3)[0]]
        names["cursor"] = SimpleNamespace(fetchall=lambda: rows)
    elif title == "Stored places":
        monkeypatch.chdir(tmp_path)
    else:
        hits = Hits([[files[i] for i in best(COSINE, 3)[0]]])
        names["found"] = explain_hits(query, hits, ENCODER, ENCODER.layer, names["gallery"])
        if importlib.util.find_spec("fiftyone") is None:
            monkeypatch.setitem(sys.modules, "fiftyone", SimpleNamespace(Heatmap=Label, Sample=Label))
    for block in re.findall(r"^```python\n(.*?)^```$", BLOCKS[title], re.M | re.S):
        exec(block, names)
    order = best(SIMILARITIES[similarity], 3)[0].tolist()
    found = names["found"]
    if title == "Stored places":
        matrices = names["method"].attribute_matrix(query.expand(N, -1, -1, -1), GALLERY)
        helpers.close(found.scores, matrices.amax(2).mean(1), rtol=0, atol=1e-3)
        return
    assert found.ids == [order] if title in ("Milvus", "faiss") else [[files[i] for i in order]]
    helpers.close(found.similarities[0], SIMILARITIES[similarity][0, order], rtol=1e-4, atol=1e-5)
    assert found.hit_maps is not None
    if title == "Maps in FiftyOne":
        samples = names["samples"]
        assert [Path(s["filepath"]).name for s in samples] == [files[i] for i in order]
        for sample, M, s in zip(samples, found.hit_maps[0], found.similarities[0]):
            np.testing.assert_array_equal(sample["why"]["map"], M.numpy())
            assert sample["why"]["range"] == [0, M.max().item()]
            assert sample["similarity"] == s.item()
