"""
How the places of maps answer where the encoder's input changes.

The changed input is noise, not the user's image. The answer is remembered, so it must not depend on what the first
image shows; and on photos, trained attentions pass so much on that some cells of a map seem to lie elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import cast

import torch
from torch import Tensor

from captum_fam.similarity import widen

# How many cells of a map are changed: all cells of a small one, several times if they are few.
CHANGES = 16
# How many noises are used if the first does not confirm the layer.
NOISES = 3
# How far from a cell the places that answer may lie, relative to all places; and for what share of the cells the
# place itself or the next must answer most (benchmarks/order.md).
NEAR, _MOST = 0.5, 0.75
# How much each cell is answered, relative to their mean: less than 0.2 if its patch was left out, else 0.4 and more.
_PEAK = 0.25


@dataclass(frozen=True)
class Answer:
    """
    How places have answered to changes of an input.

    Attributes:
        cells: the cells that were changed.
        mean: how far from the changed cells the places that answer lie, beside all places: about 1 by chance.
        is_near: whether that holds for all cells.
        is_local: whether it does, for most cells the place itself or the next answers most, and the right tokens were
            left out.
        is_open: whether for each cell the place itself answers most, though others answer too.
        of_tokens: whether the map was made of tokens; other maps may be blurred by large kernels.
    """

    cells: int = 0
    mean: float = math.inf
    of_tokens: bool = False
    is_near: bool = False
    is_local: bool = False
    is_open: bool = False


def answers_of(
    run: Callable[[Tensor], Sequence[Tensor | None]],
    to_map: Callable[[Tensor], Tensor | None],
    x: Tensor,
    is_enough: Callable[[int, Answer], bool],
) -> list[Answer]:
    """
    The answers of the layers whose activations ``run`` returns, as maps: to changes of one noise like x (B, ...) where
    that answer ``is_enough``, else to changes of several.
    """
    x = x.detach().nan_to_num(0, 0, 0) if x.is_floating_point() else x.detach()
    state, is_random = _random_state(), True

    def same_run(x: Tensor) -> Sequence[Tensor | None]:
        if is_random:  # so that it draws the same each time
            _set_random_state(state)
        return run(x)

    try:
        given = run(noise := _noise(x, 0))
        is_random = not all(map(torch.equal, state, _random_state()))
        return _answers_to(same_run, same_run(noise) if is_random else given, to_map, x, is_enough)
    finally:
        if is_random:
            _set_random_state(state)


def _answers_to(
    run: Callable[[Tensor], Sequence[Tensor | None]],
    given: Sequence[Tensor | None],
    to_map: Callable[[Tensor], Tensor | None],
    x: Tensor,
    is_enough: Callable[[int, Answer], bool],
) -> list[Answer]:
    """The same, with the activations ``given`` for the first of the noises."""

    def maps(activations: Sequence[Tensor | None]) -> list[Tensor | None]:
        found = [None if a is None else to_map(a) for a in activations]
        return [None if A is None or A.ndim < 3 else A for A in found]

    before = [maps(given)]
    answers = [Answer()] * len(given)
    for spatial in dict.fromkeys(tuple(A.shape[2:]) for A in before[0] if A is not None):
        cells = _cells(spatial)
        cells = cells * -(-CHANGES // len(cells))
        of_size = {i: A for i, A in enumerate(before[0]) if A is not None and A.shape[2:] == spatial}
        found: dict[int, dict[tuple[int, ...], Answer]] = {i: {} for i in of_size}
        changes: dict[tuple[int, tuple[int, ...]], list[Tensor]] = {}
        # The axes that a map may lie on; the channels of images are none.
        all_axes = list(combinations(range(1 if x.ndim < 4 else 2, x.ndim), len(spatial)))
        for number, axes in product(range(NOISES), reversed(all_axes)):
            asked = {i for i in of_size if not answers[i].is_local and not (number and is_enough(i, answers[i]))}
            if not asked:
                continue
            noise = _noise(x, number)
            if number == len(before):
                before.append(maps(run(noise)))
            for seed, cell in enumerate(cells, number * len(cells)):
                after = maps(run(_changed(noise, axes, spatial, cell, seed)))
                for i in asked:
                    if (A := before[number][i]) is not None and (B := after[i]) is not None and A.shape == B.shape:
                        changes.setdefault((i, axes), []).append((widen(B) - widen(A))[0].norm(dim=0).flatten())
            for i in asked:
                if len(changed := changes.get((i, axes), [])) == (number + 1) * len(cells):
                    of_cells = torch.stack(changed).double().cpu()
                    a, A, n = cast(Tensor, given[i]), of_size[i], len(set(cells))
                    mean = of_cells.unflatten(0, (-1, n)).mean(0)
                    answer = answer_of(mean, spatial, cells[:n], A.numel() < a.numel())
                    found[i][axes] = replace(answer, of_tokens=A.ndim != a.ndim)
                    answers[i] = min(found[i].values(), key=lambda a: a.mean)
    return answers


def _random_state() -> list[Tensor]:
    """The random state of torch on the CPU, and on the GPUs if they are in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def _cells(spatial: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All cells of a small map; of a large one the corners, the second along each axis, and some by chance."""
    places = math.prod(spatial)
    corners = list(product(*((0, n - 1) for n in spatial)))
    seconds = [tuple(int(axis == i and n > 1) for i, n in enumerate(spatial)) for axis in range(len(spatial))]
    by_chance = torch.randperm(places, generator=torch.Generator().manual_seed(0))[: 2 * CHANGES].tolist()
    others = [tuple(int(i) for i in torch.unravel_index(torch.tensor(n), spatial)) for n in by_chance]
    cells = list(dict.fromkeys([*corners, *seconds, *others]))
    return cells[: max(CHANGES, len(corners) + len(seconds))]


def _noise(x: Tensor, number: int) -> Tensor:
    """Random values between the smallest and the largest of x. What is not continuous, such as words, stays."""
    return _fill(x.clone(), x, 10**6 + number) if x.is_floating_point() else x


def _changed(x: Tensor, axes: tuple[int, ...], spatial: tuple[int, ...], cell: tuple[int, ...], number: int) -> Tensor:
    """The input with random values, between its smallest and its largest, in the part that a cell of the map covers."""
    where: list[slice] = [slice(None)] * x.ndim
    for axis, n, i in zip(axes, spatial, cell):
        begin, end = i * x.shape[axis] // n, -(-(i + 1) * x.shape[axis] // n)
        where[axis] = slice(begin, max(end, begin + 1))
    changed = x.clone()
    _fill(changed[tuple(where)], x, number)
    return changed


def _fill(part: Tensor, x: Tensor, number: int) -> Tensor:
    """Random values for a part, between the smallest and the largest of x."""
    random = torch.rand(part.shape, generator=torch.Generator().manual_seed(number), dtype=torch.double).to(x.device)
    if x.is_floating_point():
        low, high = x.double().min(), x.double().max()
        part.copy_(low + random * torch.where(high > low, high - low, torch.ones_like(low)))
    elif x.is_complex():
        part.copy_(part * torch.polar(torch.ones_like(random), 2 * math.pi * random).to(x.dtype))
    else:  # others of the values that there are
        low, high = x.long().min(), x.long().max()
        values = (high - low).clamp(min=1) + 1
        part.copy_((low + (part.long() - low + 1 + (random * (values - 1)).long()) % values).to(x.dtype))
    return part


def answer_of(changes: Tensor, spatial: tuple[int, ...], cells: list[tuple[int, ...]], partial: bool) -> Answer:
    """
    Where the changes (cells, places) of a map lie; ``partial``: the layer has tokens that are not on the map.

    Places that change with every cell, as a class token does, are taken out first. The rest of the changes are weights
    for the distance from the cell.
    """
    if not changes.isfinite().all():
        return Answer()

    def own_of(changes: Tensor) -> Tensor:
        return (changes - (changes.sum(0) - changes) / max(1, len(cells) - 1)).clamp(min=0)

    # A patch that was left out in favour of another token answers at no place, or a little at all places.
    peaks = own_of(changes).amax(1)
    is_whole = not partial or bool((peaks >= _PEAK * peaks.mean()).all())
    own = own_of(changes / changes.mean(1, keepdim=True))  # some changes reach all places more than others do
    largest = own.amax(1, keepdim=True)
    if not (largest > 0).all():  # nor where a change reaches no place
        return Answer()
    weights = (own / largest).square()
    sizes = torch.tensor(spatial, dtype=torch.double)
    number = torch.arange(math.prod(spatial))

    def distances(places: Tensor) -> Tensor:
        where = torch.stack(torch.unravel_index(places % len(number), spatial), 1) / sizes
        return torch.cdist(torch.tensor(cells, dtype=torch.double) / sizes, where, p=1)

    def found(places: Tensor) -> Tensor:
        return (weights * distances(places)).sum(1) / weights.sum(1)

    near = found(number)
    # The wrong tokens may have been left out: then the places fit better shifted by one, or those of one side do.
    better = near > torch.stack([found(number - 1), found(number + 1)]).amin(0) + 1e-9
    ratios = near / distances(number).mean(1)
    is_near = bool((ratios < NEAR).all())
    # In an order of windows, or of every second row, corners look near; but the strongest answer lies elsewhere.
    first = torch.stack(torch.unravel_index(own.argmax(1), spatial), 1)
    away = (first - torch.tensor(cells)).abs().amax(1)
    beside = float((away <= 1).double().mean())
    is_right = is_whole and not (partial and int(better.sum()) > 1)
    # If one of two patches is left out, there is none to compare.
    is_local = is_right and is_near and beside >= _MOST and not (partial and len(cells) < 3)
    is_open = is_right and not is_local and not away.any()
    return Answer(len(cells), float(ratios.mean()), is_near=is_near, is_local=is_local, is_open=is_open)
