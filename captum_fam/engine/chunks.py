"""Inputs and references a few at a time, and their maps put together."""

from typing import Any

from torch import Tensor

Tensors = tuple[Tensor, ...]


def slices(length: int, most: int | None) -> list[slice]:
    """Slices of at most ``most``, one after another; for length 0 one empty slice."""
    step = most or max(1, length)
    return [slice(i, min(i + step, length)) for i in range(0, max(1, length), step)]


def cut(inputs: Tensors, rows: slice) -> Tensors:
    """Some rows of tensors; a tensor with another number of rows than the first is shared by all and stays whole."""
    return tuple(t[rows] if len(t) == len(inputs[0]) else t for t in inputs)


def cut_arguments(additional_forward_args: Any, rows: Tensor | slice, inputs: int) -> Any:
    """The arguments of some inputs: tensors with a row for each input, on any device, are split, as in Captum."""
    if additional_forward_args is None:
        return None
    given = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)

    def own(a: Tensor) -> Tensor:
        return a[rows.to(a.device) if isinstance(rows, Tensor) else rows]

    return tuple(own(a) if isinstance(a, Tensor) and a.ndim and len(a) == inputs else a for a in given)


class Assembled:
    """Tensors of B rows and P columns, put together from parts of some rows and some columns."""

    def __init__(self, rows: int) -> None:
        self.tensors: list[Tensor] = []
        self._rows = rows

    def put(
        self, rows: slice, columns: slice | None, parts: list[Tensor], n_columns: int = 0, add: bool = False
    ) -> None:
        """Puts parts into rows and ``columns`` of ``n_columns`` (None: all); ``add`` adds to what is there."""
        whole = columns is None or columns.stop - columns.start == n_columns
        if whole and rows.stop - rows.start == self._rows and not add:
            self.tensors = parts
            return
        if not self.tensors:
            self.tensors = [
                p.new_empty(self._rows, *(p.shape[1:] if whole else (n_columns, *p.shape[2:]))) for p in parts
            ]
        for tensor, part in zip(self.tensors, parts):
            where = tensor[rows, slice(None) if columns is None else columns]
            where.add_(part) if add else where.copy_(part)
