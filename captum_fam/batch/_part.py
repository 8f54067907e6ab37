"""A part of a batch job: its pairs are explained and written at once and whole."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from captum_fam._checks import warn_once
from captum_fam._files import irregular, printable, recorded_warnings
from captum_fam.encoders import find_layer, one_line
from captum_fam.encoders._ready import ReadyEncoder, planes, ready_encoder, running
from captum_fam.engine.question import Question, usable
from captum_fam.images import read_image
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.similarity import channel_contributions, widen

# Names that begin with _ are no data for those who read the folder as one table.
JOB, PAIRS, LOCK, PARTIAL = "_batch.json", "_pairs.arrow", "_lock", "_tmp-"


def part_file(output: Path, part: int) -> Path:
    return output / f"part-{part:06}.parquet"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """
    A temporary file; its content gets its name at once and whole, or not at all.

    Raises:
        ValueError: it cannot be written, as on a disk that is full.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{uuid4().hex}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({one_line(error)}): make room, or pass another folder with -o; what is written stays"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Row:
    score: float | None = None
    map: np.ndarray[Any, Any] | None = None
    shape: list[int] | None = None
    scale: float | None = None
    error: str | None = None


_TYPES = {
    "score": pa.float64(),
    "map": pa.list_(pa.float16()),
    "shape": pa.list_(pa.int32()),
    "scale": pa.float32(),
    "error": pa.string(),
}
_OPEN = b"0" * 64  # in place of a seal
Warned: TypeAlias = list[tuple[str, str]]  # texts, and the files that they are about, or ""
_Read: TypeAlias = dict[str, "Future[Tensor | str]"]


def _seal(job: str, part: int, content: bytes) -> bytes:
    return hashlib.sha256(f"{job} {part} ".encode() + content).hexdigest().encode()


def write_part(file: Path, table: pa.Table, layer: str, job: str, part: int) -> None:
    """With a seal on every bit of it, and on its place: in the file's metadata, which readers of Parquet pass over."""
    pq.write_table(table.replace_schema_metadata({"layer": layer, "seal": _OPEN}), file, compression="zstd")
    head, _, tail = file.read_bytes().rpartition(_OPEN)
    with file.open("rb+") as stream:
        stream.seek(len(head))
        stream.write(_seal(job, part, head + tail))


def finished(output: Path, part: int, job: str) -> str | None:
    """
    The layer of a part whose file is there, or None; the file is read as a whole.

    Raises:
        ValueError: the file is not as this job wrote it.
    """
    file = part_file(output, part)
    if not os.path.lexists(file):
        return None
    try:
        if other := irregular(file):
            raise ValueError(f"it is {other}")
        content = file.read_bytes()
        about = pq.read_metadata(pa.BufferReader(content)).metadata
        head, _, tail = content.rpartition(about[b"seal"])
        if about[b"seal"] != _seal(job, part, head + tail):
            raise ValueError(f"it is no part {part} of this job, or damaged")
    except Exception as error:  # a broken file makes Arrow raise many kinds
        raise ValueError(
            f"{file} is not as this job wrote it ({one_line(error)}): delete it, and start again"
        ) from error
    return str(about[b"layer"], "utf-8")


def layers_of(output: Path, parts: Iterable[int], job: str) -> dict[int, str]:
    """
    The layers of the parts whose files are there: it is one.

    Raises:
        ValueError: a file in the folder is not as this job wrote it.
    """
    own = {part_file(output, part) for part in parts}
    for file in sorted(output.glob("*.parquet")):
        if file not in own and not file.name.startswith(("_", ".")):
            raise ValueError(f"{file} is no part of this job, but would be read with it: delete or move it")
    layers = {part: layer for part in parts if (layer := finished(output, part, job)) is not None}
    for (part, layer), (other, layer_of_other) in pairwise(layers.items()):
        if layer != layer_of_other:
            raise ValueError(
                f"{part_file(output, part)} is of layer {layer}, but {part_file(output, other)} of {layer_of_other}:"
                " delete one of them"
            )
    return layers


class PartExplainer:
    """
    Explains parts of a job, by number. It loads the encoder for the first; engines only make it, in each worker, and
    feed it.
    """

    def __init__(
        self,
        output: Path,
        job: str,
        encoder: str,
        layer: str | None,
        similarity: str,
        root: str,
        batch_size: int,
        threads: int,
        **loading: Any,
    ) -> None:
        self.output, self.job, self.encoder, self.layer, self.similarity = output, job, encoder, layer, similarity
        self.root, self.batch_size, self.threads, self.loading = Path(root), batch_size, threads, loading

    def __call__(self, part: int) -> tuple[int, Warned]:
        """Writes the file of a part, if there is none; the number of its pairs, and what is doubtful in them."""
        with pa.memory_map(str(self.output / PAIRS)) as source:
            pairs = pa.table(pa.ipc.open_file(source).get_batch(part))
        if finished(self.output, part, self.job) is not None:  # made by a worker that outlived its run
            return len(pairs), []
        with recorded_warnings() as warned:
            rows = self._explain(list(zip(pairs["query"].to_pylist(), pairs["reference"].to_pylist())))
            layer = self._loaded[1]
        for name, kind in _TYPES.items():
            pairs = pairs.append_column(name, pa.array([getattr(row, name) for row in rows], kind))
        with whole(part_file(self.output, part)) as partial:
            write_part(partial, pairs, layer, self.job, part)
        return len(pairs), list(warned)

    @cached_property
    def _loaded(self) -> tuple[ReadyEncoder, str, FeatureActivationMap]:
        torch.set_num_threads(self.threads)
        with self._running():
            encoder = ready_encoder(self.encoder, **self.loading)
            # Not an image of the job, or the layer could be another in each worker; noise has something of everything.
            noise = np.random.default_rng(0).integers(0, 256, (encoder.size, encoder.size, 3), np.uint8)
            image = encoder.batch([encoder.tensor(Image.fromarray(noise))])
            named = find_layer(encoder.model, self.layer, image) if self.layer is not None else None
            encoder.embed(image)
            name, layer = named or find_layer(encoder.model, None, image)
        return encoder, name, FeatureActivationMap(encoder.model, layer, similarity=self.similarity)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with running(self.encoder, self.loading["size"], "--size, a smaller --batch-size, or another --layer"):
            yield

    def _explain(self, pairs: list[tuple[str | None, str | None]]) -> list[_Row]:
        _ = self._loaded  # before the threads that use it
        chunks = [pairs[i : i + self.batch_size] for i in range(0, len(pairs), self.batch_size)]
        rows: list[_Row] = []
        with ThreadPoolExecutor(self.threads) as threads:

            def read(chunk: list[tuple[str | None, str | None]], before: _Read) -> _Read:
                paths = dict.fromkeys(path for pair in chunk for path in pair if path is not None)
                return {path: before.get(path) or threads.submit(self._image, path) for path in paths}

            images = read(chunks[0], {})
            for chunk, after in zip(chunks, [*chunks[1:], []]):
                following = read(after, images)  # while the model is at work
                rows += self._explain_batch(chunk, {path: future.result() for path, future in images.items()})
                images = following
        return rows

    def _image(self, path: str) -> Tensor | str:
        """The tensor of an image, or what is wrong with it."""
        try:
            return self._loaded[0].tensor(read_image(self.root / path))
        except Exception as error:  # whatever a broken file makes Pillow raise: it costs its own rows only
            return printable(str(error) if isinstance(error, ValueError) else one_line(error))

    def _explain_batch(self, pairs: list[tuple[str | None, str | None]], images: dict[str, Tensor | str]) -> list[_Row]:
        rows = [_Row(error=self._unreadable(pair, images)) for pair in pairs]
        readable = [i for i, row in enumerate(rows) if row.error is None]
        if not readable:
            return rows
        encoder, layer, fam = self._loaded
        sides = [[pairs[i][side] for i in readable] for side in (0, 1)]
        distinct = [list(dict.fromkeys(paths)) for paths in sides]
        query_of, reference_of = (torch.tensor([d.index(p) for p in paths]) for d, paths in zip(distinct, sides))
        with self._running():
            queries, references = (encoder.batch([images[path] for path in paths]) for paths in distinct)  # type: ignore[index, misc]  # readable
            scores, maps, places = _explain(fam, queries, encoder.embed(references), query_of, reference_of)
            found = planes(maps, layer)[places].numpy()
        for i, score, values in zip(readable, scores.tolist(), found):
            if np.isfinite(score) and np.isfinite(values).all():
                half, scale = _half(values)
                rows[i] = _Row(score, half.ravel(), list(half.shape), scale)
            else:
                rows[i] = _Row(error="no similarity to explain: an embedding is zero or not finite, or they overflow")
        return rows

    @staticmethod
    def _unreadable(pair: tuple[str | None, str | None], images: dict[str, Tensor | str]) -> str | None:
        for name, path in zip(("query", "reference"), pair):
            image = f"there is no path in the column {name!r}" if path is None else images[path]
            if isinstance(image, str):
                return image
        return None


def _explain(
    fam: FeatureActivationMap, queries: Tensor, s: Tensor, query_of: Tensor, reference_of: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Scores (N,) of the queries with these numbers (N,) and the references, embedded as s, with those: not finite where
    an embedding is zero or not finite. And maps (B, P, h, w) from one pass over the B queries, with the places (N,) of
    the pairs in their first two dimensions.
    """
    counts, order = [0] * len(queries), []  # of each pair among those of its query
    for query in query_of.tolist():
        order.append(counts[query])
        counts[query] += 1
    own = torch.zeros(len(queries), max(counts), dtype=torch.long)
    own[query_of, order] = reference_of
    found = fam.explain((queries,), lambda z, rows: Question(s, own))
    z = widen(found.embedding)
    scores = channel_contributions(z[query_of], widen(s)[reference_of], fam.similarity or "cosine").sum(1)
    valid = usable(z)[query_of] & usable(s)[reference_of]
    found.report.unusable.clear()  # those have an error each
    warn_once(found.report.texts())
    return torch.where(valid, scores, torch.nan), found.maps[0], query_of * max(counts) + torch.tensor(order)


def _half(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], float]:
    """As float16, and the scale that they are to be multiplied with."""
    largest = float(np.abs(values).max(initial=0))
    fits = largest == 0 or 2**-3 <= largest <= 2**15
    scale = 1.0 if fits else 2.0 ** (np.frexp(largest)[1] - 1)
    return (values / scale).astype(np.float16), scale
