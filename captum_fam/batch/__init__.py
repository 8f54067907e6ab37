"""Many pairs as a batch job: worker processes or Ray explain them in parts, and you can stop them at any moment."""

import csv
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from captum_fam._checks import check_positive, describe
from captum_fam._files import irregular, is_address, located, opened, recorded_warnings, store
from captum_fam.batch._engines import ENGINES
from captum_fam.batch._images import all_pairs, images_of, nearest
from captum_fam.batch._job import digest, digest_of, locked, prepare, seal
from captum_fam.batch._pairs import dialect, write_pairs, write_tables
from captum_fam.batch._part import EMBEDDINGS, PAIRS, PartExplainer, layers_of, part_file
from captum_fam.batch._references import check_references, numbered
from captum_fam.batch._stored import StoredPair, StoredPairs, read_maps
from captum_fam.batch._work import NAMES, SIDES
from captum_fam.encoders._ready import PRECISIONS
from captum_fam.engine.question import less_of
from captum_fam.images import write_whole
from captum_fam.methods.by_name import OF_SIMILARITIES, method_named
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.margins import why_opposite
from captum_fam.methods.on_layer import OnLayer

__all__ = ["BatchResult", "StoredPair", "StoredPairs", "explain_pairs", "read_maps"]

# Endings of names that are files: a user who writes one expects a single file.
_FILES = (".csv", ".tsv", ".txt", ".parquet", ".json", ".npy", ".png", ".jpg", ".pdf", ".svg", ".html")


@dataclass(frozen=True)
class BatchResult:
    """
    How many pairs of a job were explained, and how many failed?

    Attributes:
        explained (int): The number of pairs that have a score and a map.
        failed (int): The number of pairs that have an error instead.
        error (str or None): The first error.
        layer (str): The layer of the maps; empty for a method that takes none.
        failures (dict): The number of failed pairs of each kind, the most frequent first: ``"no such file"``,
                    ``"cannot be read"``, ``"no path"``, ``"bad row"`` (it does not fit the list's header),
                    ``"no embedding"`` and ``"no similarity"`` (an embedding is zero or not finite).
    """

    explained: int
    failed: int
    error: str | None
    layer: str
    failures: dict[str, int]


def explain_pairs(
    pairs: Path | str | Sequence[Path | str],
    output: Path | str,
    *,
    encoder: str = "bundled",
    weights: Path | str | None = None,
    layer: str | None = None,
    method: str | type = "FeatureActivationMap",
    similarity: str = "cosine",
    contrast: Literal["self"] | None = None,
    threshold: float | None = None,
    sides: Literal["query", "reference", "both"] = "query",
    neighbours: int | None = None,
    reference_embeddings: Path | str | None = None,
    size: int | None = None,
    device: str = "cpu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    root: Path | str = Path(),
    precision: Literal["float32", "bfloat16", "float16"] | None = None,
    part_size: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    engine: Literal["local", "ray"] | str = "local",
    errors: Path | str | None = None,
) -> BatchResult:
    r"""
    How do I explain thousands of pairs of images? Runs a job, as ``captum-fam batch`` does, for the pairs that a file
    lists or those of the images in a folder. You can stop it at any moment and start it again.

    The output folder gets Parquet files with a row for each pair, in the order of the list;
    :func:`read_maps` gives them as arrays:

    - ``id`` (the row's number where the list has none), ``query`` and ``reference``
    - ``score``: the similarity
    - ``map``, of the query for the reference, float16, and its ``shape``. The values are ``map * scale``; the scale is
      1, or a power of two where the largest magnitude is above 2**15 or below 2**-3. With ``sides="reference"`` or
      ``"both"`` also ``reference_map``, ``reference_shape`` and ``reference_scale``, of the reference for the query
    - ``failure`` and ``error``: if there is neither score nor map, the kind and the reason. An image that cannot be
      read affects only its own rows

    Each file is written whole or not at all. If you start the job again after a stop, it finishes what is left. A
    failed pair is not tried again unless you delete its file.

    In each part, an image goes through the encoder once as a query, for its activations, and once as a reference, for
    its embedding (or its activations, if its map is wanted), whatever the order of the list. CorrespondenceMap runs it
    again after each ``batch_size`` pairs.

    Args:
        pairs (Path or list of Path): A list: a .parquet, .csv or .tsv file (commas, semicolons or tabs) with the
                    columns query, reference and, if you like, id. Or images: a folder, with all its subfolders; a
                    pattern such as ``"photos/*.jpg"``; or a list of paths. Each image is paired with each other, in
                    both orders, or once with ``sides="both"``. All of these, and the paths in a list, may be addresses
                    of a store, as text, such as ``"s3://bucket/photos/"``: fsspec opens them, with its library for each
                    kind (s3fs, gcsfs, aiohttp).
        output (Path): A folder of the file system: new, empty, or that of the same job. It is another job if one of
                    these differs: pairs, encoder (its name and the content of ``weights``; the code of a factory is not
                    compared), layer, method, similarity, contrast, threshold, sides, neighbours, embeddings, size,
                    mean, std, root, precision or part_size.
        encoder, weights, size: As in :func:`~captum_fam.load_encoder`.
        layer (str, optional): Dotted name of the layer to explain.
                    Default: None, the last module with a map that the embedding depends on, or what the method finds
        method (str or type): A method of similarities by name or class: FeatureActivationMap,
                    SimilarityDecomposition, IntegratedDecomposition, CorrespondenceMap, RelevanceCam, ScoreCam,
                    LabelFreeActivationMap, or Relax, which takes no layer.
                    Default: ``"FeatureActivationMap"``
        similarity (str): As in :func:`~captum_fam.channel_contributions`.
                    Default: ``"cosine"``
        contrast (str, optional): ``"self"``, as in :meth:`.FeatureActivationMap.attribute`: what a match has beyond the
                    match of the image with itself.
                    Default: None
        threshold (float, optional): The maps show why scores lie above or below this value. The column ``score`` is the
                    score itself.
                    Default: None
        sides (str): Which images get maps: ``"query"``, ``"reference"`` or ``"both"``.
                    Default: ``"query"``
        neighbours (int, optional): For images instead of a list: pairs each image with this many others, the most
                    similar first. All images are embedded in this process before the first pair is explained; if you
                    stop it before that, this work is lost.
                    Default: None, all pairs
        reference_embeddings (Path, optional): Embeddings of the references, by this encoder, instead of their images. A
                    .npy file (N, D): the column reference has numbers of rows, from 0. A .parquet file with the columns
                    id and embedding: the column reference has ids. A .index or .faiss file of ``faiss.write_index``, of
                    an index that keeps its vectors unchanged (flat, HNSWFlat, or an IndexIDMap of one): the column
                    reference has its numbers. Only for ``sides="query"``, and not for CorrespondenceMap.
                    Default: None
        device (str): A torch device; with ``"cuda"``, each worker has a GPU of its own.
                    Default: ``"cpu"``
        mean, std (Sequence[float], optional): What images are normalised with, for the RGB channels in [0, 1].
                    Default: None, the encoder's
        root (Path): Where relative paths in a list start: a folder, or an address. Images in this folder get such paths
                    in the output.
                    Default: the current folder
        precision (str, optional): ``"float32"``, ``"bfloat16"`` or ``"float16"`` for the encoder. Scores and maps are
                    computed in float32 from its activations.
                    Default: None, as the encoder is loaded, usually float32
        part_size (int, optional): Pairs in each file, the unit of work.
                    Default: None, 512; for less than 8,192 pairs a sixteenth of them, but at least 64
        batch_size (int): How many images go through the encoder at a time. It changes results only by rounding.
                    Default: 32
        workers (int, optional): Processes, each with its own encoder.
                    Default: None, one for each CPU, or each GPU with ``device="cuda"``
        engine (str): ``"local"``, or ``"ray"`` for Ray, whose nodes must all see the files.
                    Default: ``"local"``
        errors (Path, optional): A .csv file to write, with the id, query, reference, failure and error of failed pairs,
                    separated as in the list.
                    Default: None

    Returns:
        *BatchResult*: of the whole job, including earlier runs.

    Raises:
        TypeError, ValueError: an argument is not as described above, another run is working in the same folder, the
                    encoder failed, or a worker died.

    The worker processes import the script that calls this: guard it with
    ``if __name__ == "__main__":``.

    Examples::

        >>> explain_pairs("photos", Path("maps"), neighbours=5, sides="both")  # doctest: +SKIP
        BatchResult(explained=4998, failed=2, error='there is no image ...', layer='features', failures={...})
    """
    given = _paths(pairs)
    output, root = Path(output), located(root)
    weights, reference_embeddings, errors = (
        None if path is None else Path(path) for path in (weights, reference_embeddings, errors)
    )
    for name, number in {
        "part_size": 1 if part_size is None else part_size,
        "batch_size": batch_size,
        "workers": 1 if workers is None else workers,
        "neighbours": 1 if neighbours is None else neighbours,
    }.items():
        check_positive(name, number)
    if engine not in ENGINES:
        raise ValueError(f"Expected `engine` to be {' or '.join(map(repr, ENGINES))}, but got {engine!r}.")
    if sides not in SIDES:
        raise ValueError(f"Expected `sides` to be {' or '.join(map(repr, SIDES))}, but got {sides!r}.")
    if precision not in (None, *PRECISIONS):
        raise ValueError(
            f"Expected `precision` to be {' or '.join(map(repr, PRECISIONS))}, or None, but got {precision!r}."
        )
    kind = _check_method(method, similarity, contrast, threshold, layer)
    _check_output(output, errors, given)
    for file in (weights, reference_embeddings):
        if file is not None and (problem := _no_file(file)):
            raise ValueError(f"there is no file {file}: {problem}")
    if isinstance(root, str):
        with store(root):  # or its library is missing
            pass
    elif not root.is_dir():
        raise ValueError(f"there is no folder {root}: pass the one where relative paths start as --root")
    images = images_of(given, root)
    if images is None and (problem := _no_file(given[0])):
        raise ValueError(f"there is no file {given[0]}: {problem}")
    if images is None and neighbours is not None:
        raise ValueError(f"--neighbours is for a folder of images, but {given[0]} lists the pairs: leave it out")
    if reference_embeddings is not None:
        _check_embeddings(reference_embeddings, kind, sides, images)

    what: dict[str, Any] = {"encoder": encoder, "layer": layer, "method": _name(kind), "similarity": similarity}
    what |= {"contrast": contrast, "threshold": threshold, "sides": sides, "size": size, "mean": mean, "std": std}
    what |= {"precision": precision, "root": root if isinstance(root, str) else str(root.resolve())}
    job = what | {"pairs": digest(given[0]) if images is None else digest_of("\n".join(images)), "part_size": part_size}
    job |= {"weights": weights and digest(weights), "neighbours": neighbours}
    job["reference_embeddings"] = reference_embeddings and digest(reference_embeddings)
    job = json.loads(json.dumps(job))
    copied = reference_embeddings is not None and reference_embeddings.suffix.lower() != ".npy"
    rows = reference_embeddings and (output / EMBEDDINGS if copied else reference_embeddings).resolve()
    options: dict[str, Any] = what | {
        "output": output.resolve(),
        "job": seal(job),
        "method": kind,
        "references": rows,
        "weights": weights and weights.resolve(),
        "device": device,
        "batch_size": batch_size,
    }

    def write(to: Path, embeddings: Path | None = None) -> tuple[int, int]:
        if images is None:
            numbers = None if reference_embeddings is None else numbered(reference_embeddings, embeddings)
            return write_pairs(given[0], to, part_size, numbers)
        if neighbours is None:
            return write_tables(all_pairs(images, once=sides == "both"), to, part_size)
        with recorded_warnings():  # the workers that explain these images repeat the warnings
            embedded = PartExplainer(**options, threads=torch.get_num_threads()).embeddings(images)
        return write_tables(nearest(images, embedded, similarity, neighbours), to, part_size)

    with locked(output):
        total, size_of_part = prepare(output, job, [PAIRS, EMBEDDINGS] if copied else [PAIRS], write)
        parts = range(-(-total // size_of_part))
        layers = layers_of(output, parts, seal(job))
        layer = next(iter(layers.values()), layer)  # if none is named, and the encoder is no longer what it was
        left = [part for part in parts if part not in layers]
        done = sum(min(size_of_part, total - part * size_of_part) for part in layers)
        warned: dict[str, str] = {}
        with tqdm(total=total, initial=done, desc="captum-fam batch", unit="pair", disable=None) as progress:
            for count, new in ENGINES[engine](left, options | {"layer": layer}, workers, len(parts)) if left else ():
                progress.update(count)
                warned = dict(new) | warned
        for text, path in warned.items():
            warnings.warn(f"{text} ({path}, for one)" if path else text, stacklevel=2)
        is_text = images is None and Path(given[0]).suffix.lower() != ".parquet"
        files = [part_file(output, part) for part in parts]
        found, opposite = _result(files, errors, dialect(given[0])[0] if is_text else ",")
        counts = [f"{count} maps of the {name}" for name, count in zip(NAMES, opposite) if count]
        if counts:
            warnings.warn(
                f"{' and '.join(counts)}, of {found.explained} pairs, add up to the opposite sign of score - threshold:"
                f" {why_opposite(kind, similarity)}",
                stacklevel=2,
            )
        return found


def _paths(pairs: Any) -> list[Path | str]:
    given = [pairs] if isinstance(pairs, (str, Path)) else pairs
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(path, (str, Path)) for path in given):
        raise TypeError(
            "Expected `pairs` to be the path of a list or a folder, or a list of paths of images, but got"
            f" {describe(pairs)}; write pairs to a .csv or .parquet file with the columns query and reference."
        )
    return [located(path) for path in given]


def _check_method(
    method: str | type, similarity: str, contrast: str | None, threshold: float | None, layer: str | None
) -> type[Any]:
    kind = method_named(method, "explain_pairs")
    if contrast not in (None, "self"):
        raise ValueError(
            f'Expected `contrast` of explain_pairs to be "self" or None, but got {contrast!r}; its pairs have no other'
            " references."
        )
    less_of(contrast, threshold, similarity, 1, 1)  # or an error
    if layer is not None and not issubclass(kind, OnLayer):
        raise ValueError(f"{kind.__name__} takes no layer: leave out --layer")
    return kind


def _name(kind: type[Any]) -> str:
    own = OF_SIMILARITIES.get(kind.__name__) is kind
    return kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"


def _check_output(output: Path, errors: Path | None, given: Sequence[Path | str]) -> None:
    if is_address(output):
        raise ValueError(
            "-o must be a folder of the file system, where the job can lock and rename, not an address: copy the folder"
            " to the store when the job is done"
        )
    if output.suffix.lower() in _FILES and not output.is_dir():
        raise ValueError(
            f"the job writes a folder of Parquet files, but -o {output} is named as a file: pass a folder, such as -o"
            f" {output.with_suffix('')}; read_maps gives its rows as arrays"
        )
    if errors is None:
        return
    if errors.suffix.lower() != ".csv" or not errors.absolute().parent.is_dir():
        raise ValueError(
            f"cannot write {errors}: name a file that ends in .csv, in a folder that exists, with --errors"
        )
    if any(isinstance(path, Path) and errors.resolve() == path.resolve() for path in given):
        raise ValueError(f"cannot write {errors}: it lists the pairs; name another file with --errors")


def _check_embeddings(file: Path, kind: type[Any], sides: str, images: list[str] | None) -> None:
    if images is not None:
        raise ValueError("--reference-embeddings needs a list of pairs, whose column reference names their rows")
    if sides != "query":
        raise ValueError(f"--sides {sides} needs the references' images: leave out --reference-embeddings, or --sides")
    if issubclass(kind, CorrespondenceMap):
        raise ValueError(
            f"{kind.__name__} compares places, and embeddings have none: leave out --reference-embeddings, or take"
            " another --method"
        )
    check_references(file)


def _no_file(path: Path | str) -> str:
    if isinstance(path, str):
        try:
            opened(path).close()
        except FileNotFoundError:
            return "check the address"
        return ""
    try:
        return (other := irregular(path)) and f"it is {other}"
    except (OSError, ValueError):
        return "it is an address; save what is there, and name its file" if is_address(path) else "check the path"


def _result(parts: list[Path], errors: Path | None, delimiter: str) -> tuple[BatchResult, list[int]]:
    """Of the parts, and how many maps of each side have another sign than their margins."""
    total, kinds, first, text, opposite = 0, Counter[str](), None, StringIO(), [0, 0]
    rows = csv.writer(text, delimiter=delimiter)
    rows.writerow(columns := ["id", "query", "reference", "failure", "error"])
    for part in parts:
        file = pq.ParquetFile(part)
        about, table = file.metadata.metadata, file.read(columns if errors else columns[3:])
        opposite = [sum(both) for both in zip(opposite, json.loads(about[b"opposite"]))]
        total += len(table)
        failed = table.filter(table["failure"].is_valid())
        kinds.update(failed["failure"].to_pylist())
        first = first or next(iter(failed["error"].to_pylist()), None)
        if errors:
            rows.writerows(zip(*(failed[name].to_pylist() for name in columns)))
    if errors:
        write_whole(text.getvalue().encode(), errors)
    layer = about[b"layer"].decode()
    failures = dict(kinds.most_common())
    return BatchResult(total - kinds.total(), kinds.total(), first, layer, failures), opposite
