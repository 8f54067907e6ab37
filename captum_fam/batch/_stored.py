"""What a batch job has written, as arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from captum_fam._checks import warn
from captum_fam._files import located, within
from captum_fam.batch._job import read_job, seal
from captum_fam.batch._part import finished, part_file
from captum_fam.images import read_image


@dataclass(frozen=True, eq=False)
class StoredPair:
    """
    What did a batch job find for one pair? A row of its output, from :func:`read_maps`.

    Attributes:
        id (str or int): The id of the pair, as in the list.
        query (str or None): The path of the query, as in the list.
        reference (str or None): The path or the id of the reference, as in the list.
        score (float or None): The similarity.
        map (array or None): The map of the query for the reference, float32 (h, w); None for a pair that failed, or a
                    job without that side.
        reference_map (array or None): The map of the reference for the query, in the same form.
        failure (str or None): The kind of failure, such as ``"no such file"``.
        error (str or None): Why there is neither score nor map.

    Examples::

        >>> pair = read_maps("maps")[0]  # doctest: +SKIP
        >>> visualize_pair(*pair.images(), pair.map, pair.reference_map)  # doctest: +SKIP
    """

    id: Any
    query: str | None
    reference: str | None
    score: float | None
    map: NDArray[np.float32] | None
    reference_map: NDArray[np.float32] | None
    failure: str | None
    error: str | None
    _root: Path | str | None = field(repr=False)

    def images(self) -> tuple[Image.Image, Image.Image]:
        """
        Which pictures belong to this pair? Those of the query and the reference, to draw their maps over.

        Returns:
            *tuple*: two PIL images, upright RGB.

        Raises:
            ValueError: a picture cannot be read, or the reference was an embedding.
        """
        if self._root is None:
            raise ValueError("the references of this job were embeddings, which have no images")
        if self.query is None or self.reference is None:
            raise ValueError(f"this pair has no images: {self.error}")
        return read_image(within(self._root, self.query)), read_image(within(self._root, self.reference))


class StoredPairs(Sequence[StoredPair]):
    """
    What did a batch job find? Its rows in the order of its list, read from their files when needed; made by
    :func:`read_maps`.

    Attributes:
        layer (str): The layer of the maps; empty for a method that takes none.
        job (dict): The options of the job.

    Examples::

        >>> maps = read_maps("maps")  # doctest: +SKIP
        >>> len(maps), maps[0].map.shape, [pair.error for pair in maps if pair.failure]  # doctest: +SKIP
        (5000, (7, 7), ['there is no image ...', 'there is no image ...'])
    """

    def __init__(self, folder: Path) -> None:
        try:
            about = read_job(folder)
        except ValueError:
            about = {}
        if not about:
            raise ValueError(
                f"{folder} is no folder that this version's captum-fam batch or explain_pairs wrote: pass their OUTPUT"
            )
        self.job: dict[str, Any] = about["job"]
        self._folder, self._size, self._seal = folder, int(about["part_size"]), seal(self.job)
        self._loaded: tuple[int, Any] = -1, None
        total = int(about["pairs"])
        parts = range(-(-total // self._size))
        self._parts = [part for part in parts if part_file(folder, part).exists()]
        if not self._parts:
            raise ValueError(f"the job in {folder} has no maps yet: start it again to go on with it")
        self._length = sum(min(self._size, total - part * self._size) for part in self._parts)
        if self._length < total:
            warn(
                f"The job in {folder} is not finished: it has {self._length:,} of {total:,} pairs. Start it again"
                " to go on with it."
            )
        self.layer = str(pq.read_schema(part_file(folder, self._parts[0])).metadata[b"layer"], "utf-8")

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> StoredPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredPair]: ...
    def __getitem__(self, index: int | slice) -> StoredPair | list[StoredPair]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        table, row = self._table(self._parts[number // self._size]), number % self._size

        def value(name: str) -> Any:
            return table[name][row].as_py() if name in table.column_names else None

        def values(prefix: str) -> NDArray[np.float32] | None:
            shape = value(f"{prefix}shape")
            if shape is None:
                return None
            half = table[f"{prefix}map"][row].values.to_numpy(zero_copy_only=False)
            return half.astype(np.float32).reshape(shape) * np.float32(value(f"{prefix}scale"))  # type: ignore[no-any-return]

        return StoredPair(
            map=values(""),
            reference_map=values("reference_"),
            _root=None if self.job["reference_embeddings"] else located(self.job["root"]),
            **{name: value(name) for name in ("id", "query", "reference", "score", "failure", "error")},
        )

    def __iter__(self) -> Iterator[StoredPair]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return f"StoredPairs({len(self):,} pairs of {self._folder})"

    def _table(self, part: int) -> pa.Table:
        """The table of a part; the last one is kept, and each is checked when it is read."""
        if self._loaded[0] != part:
            if finished(self._folder, part, self._seal) is None:
                raise ValueError(f"{part_file(self._folder, part)} is no longer there")
            self._loaded = part, pq.ParquetFile(part_file(self._folder, part)).read()
        return self._loaded[1]


def read_maps(folder: Path | str) -> StoredPairs:
    r"""
    How do I get the maps of a batch job? Reads what ``captum-fam batch`` or :func:`explain_pairs` has written, as
    arrays that :func:`~captum_fam.visualize_pair` takes.

    The result is a sequence of :class:`StoredPair` in the order of the list of pairs, failed ones included. Each file
    is read, and its checksum compared, when you ask for a pair of it; one file at a time is in memory. The values are
    those of ``attribute``, rounded to float16. To choose pairs by their scores, read the columns without the maps,
    which have the same order: ``pyarrow.parquet.read_table(folder, columns=["id", "score"])``.

    Args:
        folder (Path or str): The job's output.

    Returns:
        *StoredPairs*: a sequence that knows its layer and the options of its job.

    Raises:
        ValueError: the folder holds no job of this version, or nothing yet, or a file is not as the job wrote it.

    Warns if the job is not finished; the result then has the pairs so far.

    Examples::

        >>> maps = read_maps("maps")  # doctest: +SKIP
        >>> best = max((pair for pair in maps if not pair.failure), key=lambda pair: pair.score)  # doctest: +SKIP
        >>> figure, axes = visualize_pair(*best.images(), best.map, best.reference_map)  # doctest: +SKIP
    """
    return StoredPairs(Path(folder))
