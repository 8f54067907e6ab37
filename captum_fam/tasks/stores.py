"""Turns answers of vector stores, as they are, into hits to explain. None of the stores' packages is needed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_fam._checks import describe
from captum_fam.tasks.hits import Hits


class _Hit(NamedTuple):
    """A hit, and the values that may be its embedding, by name."""

    id: Any
    score: float | None
    vectors: Mapping[str, Any]


def from_faiss(answer: Any, embeddings: Any = None) -> Hits:
    r"""
    How do I explain a search of faiss with vectors of my own? Makes the hits for :func:`~captum_fam.explain_hits`. Use
    it for an index that is lossy, or does not return its vectors: only its answer is needed.

    Args:
        answer (tuple): What ``index.search(z, k)`` returns, scores and numbers (B, k); or
                    ``index.search_and_reconstruct(z, k)``, whose vectors are the embeddings.
        embeddings (optional): The embeddings of the gallery, by the numbers of the index: an array or tensor (N, D), a
                    memory map, or another object whose ``embeddings[number]`` is a vector (D,).
                    Default: None, the images of the hits are embedded

    Returns:
        *Hits*

    Raises:
        TypeError, ValueError: the answer is not as described above, or a hit has no embedding.

    Examples::

        >>> import faiss
        >>> from captum_fam.tasks.stores import from_faiss
        >>> vectors = torch.rand(100, 8)
        >>> index = faiss.index_factory(8, "SQ8")
        >>> index.train(vectors.numpy())
        >>> index.add(vectors.numpy())
        >>> from_faiss(index.search(vectors[:2].numpy(), 5), vectors)
        Hits(queries=2, hits=5)
    """
    parts = [_tensor(part) for part in answer] if isinstance(answer, (tuple, list)) else []
    forms = [] if None in parts else [(part.ndim, part.is_floating_point()) for part in parts if part is not None]
    if forms not in ([(2, True), (2, False)], [(2, True), (2, False), (3, True)]):
        got = f"({', '.join(describe(a if p is None else p) for a, p in zip(answer, parts))})" if parts else None
        raise TypeError(
            "Expected `answer` to be what index.search(z, k) returns, scores (B, k) and numbers (B, k), but got"
            f" {got or describe(answer)}; pass it as it is."
        )
    scores, numbers, *vectors = parts
    ids = [[None if number < 0 else number for number in row] for row in numbers.tolist()]  # type: ignore[union-attr]
    if embeddings is None:
        return Hits(ids, scores, vectors[0] if vectors else None)
    return Hits(ids, scores, _stacked([[_own(embeddings, number) for number in row] for row in ids]))


def from_qdrant(answer: Any, *, id: str | None = None, vector: str | None = None) -> Hits:
    r"""
    How do I explain a search of Qdrant? Makes the hits for :func:`~captum_fam.explain_hits`.

    Args:
        answer (QueryResponse): What ``client.query_points`` returns, or the list that ``client.query_batch_points``
                    returns. Search with ``with_vectors=True`` to get the embeddings, too.
        id (str, optional): Field of the payload that is the image's id in the gallery, such as a file's name.
                    Default: None, the points' own ids
        vector (str, optional): Name of the vector that was searched, if points have several.
                    Default: None, the only one

    Returns:
        *Hits*: the scores are Qdrant's: a cosine, a dot product or a distance (not squared).

    Raises:
        TypeError, ValueError: the answer is not as described above, or lacks what the arguments name.

    Examples::

        >>> from qdrant_client import QdrantClient, models
        >>> from captum_fam.tasks.stores import from_qdrant
        >>> client, vectors = QdrantClient(":memory:"), torch.rand(9, 4)
        >>> config = models.VectorParams(size=4, distance=models.Distance.COSINE)
        >>> client.create_collection("shoes", vectors_config=config)
        True
        >>> client.upload_collection("shoes", vectors.numpy(), ids=range(9))
        >>> from_qdrant(client.query_points("shoes", query=vectors[0].tolist(), limit=3, with_vectors=True))
        Hits(queries=1, hits=3)
    """
    wanted = "what client.query_points or client.query_batch_points returns"
    batch = isinstance(answer, list) and not any(hasattr(point, "score") for point in answer)
    found = []
    for one in answer if batch else [answer]:
        points = getattr(one, "points", one)
        if not isinstance(points, list) or not all(hasattr(point, "score") for point in points):
            raise _refused(wanted, one)
        hits = []
        for point in points:
            vectors = point.vector if isinstance(point.vector, Mapping) else {"": point.vector}
            hits.append(_Hit(_named(point.id, point.payload, id, "payload"), point.score, vectors))
        found.append(hits)
    return _hits(found, vector)


def from_chroma(answer: Any, *, id: str | None = None) -> Hits:
    r"""
    How do I explain a search of Chroma? Makes the hits for :func:`~captum_fam.explain_hits`.

    Args:
        answer (QueryResult): What ``collection.query`` returns. Search with ``include=["embeddings", "distances"]`` to
                    get the embeddings, too.
        id (str, optional): Field of the metadata that is the image's id in the gallery; include "metadatas" in the
                    search, too.
                    Default: None, Chroma's own ids

    Returns:
        *Hits*: the scores are Chroma's distances: 1 - cosine, 1 - dot product, or squared L2.

    Raises:
        TypeError, ValueError: the answer is not as described above, or lacks what the arguments name.

    Examples::

        >>> import chromadb
        >>> from captum_fam.tasks.stores import from_chroma
        >>> shoes, vectors = chromadb.EphemeralClient().create_collection("shoes"), torch.rand(9, 4).numpy()
        >>> shoes.add(ids=[f"{i}.jpg" for i in range(9)], embeddings=vectors)
        >>> answer = shoes.query(query_embeddings=vectors[:2], n_results=3, include=["embeddings", "distances"])
        >>> from_chroma(answer)
        Hits(queries=2, hits=3)
    """
    rows = answer.get("ids") if isinstance(answer, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise _refused("what collection.query returns, with a list of ids for each query", answer)
    scores = answer.get("distances", answer.get("scores"))  # the latter of collection.search
    embeddings, metadata = answer.get("embeddings"), answer.get("metadatas")
    found = []
    for b, row in enumerate(rows):
        fields = metadata[b] if metadata is not None else [None] * len(row)
        found.append(
            [
                _Hit(
                    _named(number, fields[k], id, "metadata"),
                    None if scores is None else scores[b][k],
                    {} if embeddings is None else {"": embeddings[b][k]},
                )
                for k, number in enumerate(row)
            ]
        )
    return _hits(found)


def from_lancedb(answer: Any, *, id: str = "id", vector: str | None = None) -> Hits:
    r"""
    How do I explain a search of LanceDB? Makes the hits for :func:`~captum_fam.explain_hits`.

    Args:
        answer (list, Table or DataFrame): What ``table.search(z).limit(k)`` gives by ``to_list()``, ``to_arrow()``,
                    ``to_pandas()`` or ``to_polars()``, also for several queries at once; or a list of such answers.
        id (str): Column that is the image's id in the gallery.
                    Default: ``"id"``
        vector (str, optional): Column that was searched, if several hold vectors.
                    Default: None, the only one; if there is none, the images of the hits are embedded

    Returns:
        *Hits*: the scores are the column ``_distance``: 1 - cosine, 1 - dot product, or squared L2.

    Raises:
        TypeError, ValueError: the answer is not as described above, or lacks what the arguments name.

    Examples::

        >>> import tempfile
        >>> import lancedb
        >>> from captum_fam.tasks.stores import from_lancedb
        >>> folder, vectors = tempfile.TemporaryDirectory(), torch.rand(9, 4).numpy()
        >>> rows = [{"id": f"{i}.jpg", "vector": v} for i, v in enumerate(vectors)]
        >>> shoes = lancedb.connect(folder.name).create_table("shoes", rows)
        >>> from_lancedb(shoes.search(vectors[0]).distance_type("cosine").limit(3).to_arrow())
        Hits(queries=1, hits=3)
    """
    several = isinstance(answer, list) and answer and not isinstance(answer[0], Mapping)
    found: list[list[_Hit]] = []
    for one in answer if several else [answer]:
        rows = _rows(one)
        numbers = [int(row.get("query_index", 0)) for row in rows]
        hits: list[list[_Hit]] = [[] for _ in range(max(numbers, default=0) + 1)]
        for number, row in zip(numbers, rows):
            if id not in row:
                raise ValueError(
                    f'Expected the answer to have a column "{id}" of ids, but got {sorted(row)}; pass its name, as'
                    ' from_lancedb(answer, id="path").'
                )
            hits[number].append(
                _Hit(row[id], row.get("_distance"), {name: value for name, value in row.items() if name != id})
            )
        found += hits
    return _hits(found, vector)


def from_milvus(answer: Any, *, id: str | None = None, vector: str | None = None) -> Hits:
    r"""
    How do I explain a search of Milvus? Makes the hits for :func:`~captum_fam.explain_hits`.

    Args:
        answer (SearchResult): What ``client.search`` of a ``MilvusClient`` returns. Search with
                    ``output_fields=["vector"]`` to get the embeddings, too.
        id (str, optional): Output field that is the image's id in the gallery.
                    Default: None, the primary key
        vector (str, optional): Output field that was searched, if several hold vectors.
                    Default: None, the only one

    Returns:
        *Hits*: the scores are Milvus's: a cosine, a dot product, or squared L2.

    Raises:
        TypeError, ValueError: the answer is not as described above, or lacks what the arguments name.

    Examples::

        >>> from captum_fam.tasks.stores import from_milvus
        >>> answer = [[{"id": 7, "distance": 0.9, "entity": {"vector": [0.6, 0.8]}}]]  # of client.search(...)
        >>> from_milvus(answer)
        Hits(queries=1, hits=1)
    """
    if not isinstance(answer, list) or not all(
        isinstance(row, list) and all(isinstance(hit, Mapping) and "distance" in hit for hit in row) for row in answer
    ):
        raise _refused("what client.search returns, a list of hits for each query", answer)
    found = []
    for row in answer:
        hits = []
        for hit in row:
            fields = hit.get("entity") or {}
            number = hit.id if hasattr(hit, "id") else hit["id"]  # the key's name may be another
            hits.append(_Hit(_named(number, fields, id, "output fields"), hit["distance"], fields))
        found.append(hits)
    return _hits(found, vector)


def _tensor(value: Any) -> Tensor | None:
    return torch.as_tensor(value) if isinstance(value, (Tensor, np.ndarray)) else None


def _own(embeddings: Any, number: int | None) -> Any:
    """The user's own embedding of this number; None if nothing was found."""
    try:
        return None if number is None else embeddings[number]
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected `embeddings` to give that of number {number} as embeddings[{number}], but that failed:"
            f" {type(error).__name__}: {error}; pass all of the gallery's, by their numbers in the index."
        ) from error


def _refused(wanted: str, answer: Any) -> TypeError:
    got = describe(answer)
    if isinstance(answer, (list, tuple)) and answer:
        got += f" of {describe(answer[0])}"
    elif isinstance(answer, Mapping):
        got += f" with the keys {list(answer)}"
    return TypeError(f"Expected `answer` to be {wanted}, but got {got}.")


def _rows(answer: Any) -> list[dict[str, Any]]:
    """The rows of a table in any of its forms."""
    if hasattr(answer, "to_pylist"):  # of Arrow
        answer = answer.to_pylist()
    elif hasattr(answer, "to_dicts"):  # of Polars
        answer = answer.to_dicts()
    elif hasattr(answer, "iloc"):  # of pandas
        answer = answer.to_dict("records")
    if not isinstance(answer, list) or not all(isinstance(row, Mapping) for row in answer):
        raise _refused("rows, as table.search(z).limit(k).to_list() gives", answer)
    return answer


def _named(number: Any, fields: Mapping[str, Any] | None, name: str | None, what: str) -> Any:
    """The id of a hit: its own, or a field of it."""
    if name is None:
        return number
    fields = fields or {}
    if name not in fields:
        raise ValueError(
            f'Expected the {what} of each hit to have "{name}", but those of hit {number!r} have {sorted(fields)};'
            " ask the store for it, or leave out `id`."
        )
    return fields[name]


def _hits(found: Sequence[Sequence[_Hit]], vector: str | None = None) -> Hits:
    """Hits of all queries, filled up to the same number for each."""
    every = [hit for hits in found for hit in hits]
    if not every:
        raise ValueError("The answer holds no hits, so there is nothing to explain; look at what was searched.")
    k, name = max(map(len, found)), _searched(every, vector)
    ids = [[_plain(hit.id) for hit in hits] + [None] * (k - len(hits)) for hits in found]
    scores = None
    if all(hit.score is not None for hit in every):
        scores = torch.tensor([[float(hit.score or 0) for hit in h] + [torch.nan] * (k - len(h)) for h in found])
    if name is None:
        return Hits(ids, scores)
    for hit in every:
        if hit.vectors.get(name) is None:
            raise ValueError(
                f"Hit {hit.id!r} has no vector {name!r}, as others have; ask the store for all or for none."
            )
    return Hits(ids, scores, _stacked([[hit.vectors[name] for hit in h] + [None] * (k - len(h)) for h in found]))


def _searched(every: Iterable[_Hit], vector: str | None) -> str | None:
    """The name of the vectors, or None if the hits have none."""
    names = sorted({name for hit in every for name, value in hit.vectors.items() if vector == name or _dense(value)})
    if vector is None and len(names) > 1:
        raise ValueError(
            f"The hits have several vectors, {names}; name the one that was searched, as vector={names[0]!r}."
        )
    if vector is not None and vector not in names:
        raise ValueError(f"Expected the hits to have a vector {vector!r}, but they have {names}; ask the store for it.")
    return names[0] if vector is None and names else vector


def _dense(value: Any) -> bool:
    """Whether a value may be an embedding."""
    if isinstance(value, np.ndarray):
        return np.issubdtype(value.dtype, np.floating)
    return isinstance(value, list) and bool(value) and all(isinstance(number, (float, list)) for number in value)


def _plain(number: Any) -> Any:
    return number.item() if isinstance(number, np.generic) else number


def _stacked(vectors: Sequence[Sequence[Any]]) -> Tensor:
    """Vectors (B, k, D); ones where there is none."""
    rows = [[None if v is None else _vector(v) for v in row] for row in vectors]
    shapes = {tuple(v.shape) for row in rows for v in row if v is not None}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(
            f"Expected one vector (D,) for each hit, all of one length, but got shapes {sorted(shapes)}; name the"
            " vectors that were searched, and of hits found by several tokens see explain_maxsim."
        )
    (shape,) = shapes or {(1,)}
    return torch.stack([torch.stack([torch.ones(shape) if v is None else v for v in row]) for row in rows])


def _vector(value: Any) -> Tensor:
    try:
        v = (
            value.detach().cpu()
            if isinstance(value, Tensor)
            else torch.tensor(value if isinstance(value, list) else np.array(value))
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected the vectors of hits to be numbers, but got {describe(value)}.") from error
    return v if v.is_floating_point() else v.float()
