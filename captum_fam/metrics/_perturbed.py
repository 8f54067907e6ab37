"""Scores of changed inputs, and maps in the form that metrics take."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from captum_fam._captum import TargetType, run_forward
from captum_fam._checks import check_callable, check_positive, describe, reference_index, warn_once
from captum_fam.adapters import resize
from captum_fam.engine.chunks import cut_arguments
from captum_fam.engine.untouched import buffers_restored, warnings_of_training
from captum_fam.score import SimilarityScore

Baselines: TypeAlias = str | float | Tensor
# Makes changed inputs (n, C, *spatial), from the numbers (n,) of the inputs and of the steps.
Perturb: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# The blur of Fong and Vedaldi (https://arxiv.org/abs/1704.03296): 10 pixels, for images of 224.
_SIGMA = 10 / 224


def maps_of(attributions: Any, size: Sequence[int] | None = None, name: str = "attributions") -> Tensor:
    """Maps (B, *size): attributions (B, C, *spatial), summed over their channels, in at least single precision."""
    if isinstance(attributions, (tuple, list)) and len(attributions) == 1:
        attributions = attributions[0]
    if not isinstance(attributions, Tensor) or not attributions.is_floating_point():
        raise TypeError(
            f"Expected `{name}` to be a floating-point tensor (B, C, *spatial), but got {describe(attributions)}."
        )
    if attributions.ndim < 3 or (size is not None and attributions.ndim != len(size) + 2):
        raise ValueError(
            f"Expected `{name}` (B, C, *spatial) with {'some' if size is None else len(size)} spatial dimensions, but"
            f" got shape {tuple(attributions.shape)}."
        )
    if not attributions.isfinite().all():
        raise ValueError(f"Expected `{name}` to be finite, but {int((~attributions.isfinite()).sum())} values are not.")
    maps = attributions.detach().to(torch.promote_types(attributions.dtype, torch.float32)).sum(1, keepdim=True)
    if size is None or maps.shape[2:] == tuple(size):
        return maps[:, 0]
    low, high = (bound(dim=tuple(range(1, maps.ndim)), keepdim=True) for bound in (maps.amin, maps.amax))
    return resize(maps, size).clamp(low, high)[:, 0]  # a flat map stays flat: rounding must not look like structure


def check_inputs(inputs: Any, name: str = "inputs") -> None:
    if not isinstance(inputs, Tensor) or inputs.ndim < 3 or not inputs.is_floating_point():
        raise TypeError(
            f"Expected `{name}` to be one floating-point tensor (B, C, *spatial), but got {describe(inputs)}; bind"
            " other inputs in `forward_func`."
        )


def maps_for(inputs: Any, attributions: Any, name: str = "attributions") -> Tensor:
    """Maps (B, *spatial) at the size of inputs (B, C, *spatial) and on their device."""
    check_inputs(inputs)
    maps = maps_of(attributions, inputs.shape[2:], name)
    if len(maps) != len(inputs):
        raise ValueError(f"Expected `{name}` with a map for each of {len(inputs)} inputs, but got {len(maps)}.")
    return maps.to(inputs.device)


def unit_range(maps: Tensor) -> Tensor:
    """The positive part of maps (B, *spatial), from its smallest value to its largest in [0, 1]; flat maps are zero."""
    flat = maps.clamp(min=0).flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - low) / torch.where(high > low, high - low, 1)).reshape(maps.shape)


def ranks(maps: Tensor, seed: int) -> Tensor:
    """The place of each location of maps (B, *spatial) in their order, 0 for the largest; ties in random order."""
    flat = maps.flatten(1)
    shuffled = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(maps.device)
    order = shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).reshape(maps.shape)


def baseline_of(inputs: Tensor, baselines: Baselines, name: str = "inputs") -> Tensor:
    """The baseline that replaces the inputs, in their shape."""
    if isinstance(baselines, str):
        if baselines == "zero":
            return torch.zeros_like(inputs)
        if baselines == "mean":
            return inputs.flatten(2).mean(2).reshape(*inputs.shape[:2], *[1] * (inputs.ndim - 2)).expand_as(inputs)
        if baselines == "blur":
            if inputs.ndim != 4:
                raise ValueError(
                    f"`baselines='blur'` is for images (B, C, H, W), but got inputs of shape {tuple(inputs.shape)};"
                    ' pass "mean", "zero" or a tensor.'
                )
            sigma = _SIGMA * min(inputs.shape[2:])
            reach = [min(int(3 * sigma) + 1, n - 1) for n in inputs.shape[:1:-1]]  # of the kernel: (x, y), reflected
            blurred: Tensor = gaussian_blur(inputs, [2 * r + 1 for r in reach], [sigma, sigma])
            return blurred
    elif isinstance(baselines, (Tensor, int, float)) and not isinstance(baselines, bool):
        try:
            return torch.as_tensor(baselines, dtype=inputs.dtype, device=inputs.device).expand_as(inputs)
        except RuntimeError as error:
            raise ValueError(
                f"Expected `baselines` of a shape that expands to that of `{name}`, {tuple(inputs.shape)}, but got"
                f" {describe(baselines)}."
            ) from error
    raise ValueError(f'Expected `baselines` to be "blur", "mean", "zero", a number or a tensor, but got {baselines!r}.')


def scores_of(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    perturb: Perturb,
    n_steps: int,
    targets: dict[str, TargetType],
    additional_forward_args: Any,
    max_examples_per_batch: int | None,
) -> Tensor:
    """Scores (targets, B, n_steps) of what ``perturb`` makes of the inputs; targets by the names of their arguments."""
    check_callable("forward_func", forward_func)
    limit = max(len(inputs), 1) if max_examples_per_batch is None else max_examples_per_batch
    check_positive("max_examples_per_batch", limit)
    if not len(inputs):
        return torch.zeros(len(targets), 0, n_steps, device=inputs.device)
    found, warned = [], list[str]()
    with torch.no_grad():
        for index in torch.arange(len(inputs) * n_steps, device=inputs.device).split(limit):
            step, row = index // len(inputs), index % len(inputs)
            args = cut_arguments(additional_forward_args, row, len(inputs))
            changed = perturb(row, step).to(inputs.dtype)
            with buffers_restored(forward_func) as guard:
                output = run_forward(forward_func, changed, None, args)
                warned += [w for w in warnings_of_training(forward_func, guard.called) if w not in warned]
            found.append(torch.stack([_select(forward_func, output, *t, row, len(inputs)) for t in targets.items()]))
    warn_once(warned)
    scores: Tensor = torch.cat(found, 1).unflatten(1, (n_steps, len(inputs))).mT
    return scores


def _select(forward_func: object, output: Any, name: str, target: TargetType, rows: Tensor, inputs: int) -> Tensor:
    """One score (n,) of each output."""
    if not isinstance(output, Tensor) or output.ndim not in (1, 2) or len(output) != len(rows):
        raise ValueError(
            f"Expected `forward_func` to return scores ({len(rows)},) or ({len(rows)}, K), but got {describe(output)};"
            " pass a SimilarityScore."
        )
    scores = output.reshape(len(rows), -1)
    if target is None and scores.shape[1] > 1 and not isinstance(forward_func, SimilarityScore):
        raise ValueError(f"`{name}` is needed: one of the {scores.shape[1]} outputs of `forward_func`.")
    index = reference_index(name, target, scores.shape[1], inputs).to(rows.device)[rows]
    chosen = scores.gather(1, index[:, None].to(scores.device))[:, 0]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def column(values: Tensor, maps: Tensor) -> Tensor:
    """Values (n,) in a shape that broadcasts to maps (n, *spatial)."""
    return values.reshape(-1, *[1] * (maps.ndim - 1))
