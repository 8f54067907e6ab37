"""Does the map depend on what it should: the model's weights, the reference, the method?"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from captum_fam._captum import TargetType
from captum_fam._checks import check_callable, check_positive, describe
from captum_fam.metrics._perturbed import Baselines, baseline_of, maps_for, maps_of, scores_of

# A smaller change of a map, as a share of it, is only rounding.
_ROUNDING = 1e-5


class Randomization(NamedTuple):
    """
    How similar are maps to those of the trained model as its weights become random?

    Attributes:
        modules (list of str): Names of the modules, in the order in which they lost their weights.
        rank_correlation (Tensor): Of the maps with those of the trained model, (len(modules), B).

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> fam, inputs = FeatureActivationMap(encoder, encoder[1]), torch.rand(2, 3, 16, 16)
        >>> cascading_randomization(fam.attribute, encoder, inputs, reference=inputs).modules
        ['0']
    """

    modules: list[str]
    rank_correlation: Tensor


class ReferenceDependence(NamedTuple):
    """
    How well does a map follow the reference?

    Attributes:
        agreement (Tensor): The correlation of the map's change with the change that occlusion
                    shows, from -1 to 1, (B,); 0 for a map that does not change.
        change (Tensor): How much of the map moves, from 0 to 1, (B,).
        expected (Tensor): How much of the effect of occlusion moves, from 0 to 1, (B,).

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> maps = torch.rand(2, 1, 14, 14)
        >>> reference_dependence(score, inputs, maps, maps, target=0, other_target=1).change  # the same map
        tensor([0., 0.])
    """

    agreement: Tensor
    change: Tensor
    expected: Tensor


def rank_correlation(attributions: Tensor, others: Tensor) -> Tensor:
    r"""
    Do two methods agree? Spearman's rank correlation of the values of two maps. Ties take the mean
    of their ranks.

    Args:
        attributions (Tensor): Maps (B, C, \*spatial), floating point; channels are summed.
        others (Tensor): Maps (B, C', \*spatial); the smaller maps are resized to the larger,
                    linearly.

    Returns:
        *Tensor*: from -1 to 1, (B,); 0 where a map is flat.

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> maps = torch.rand(2, 1, 7, 7)
        >>> rank_correlation(maps, -maps)
        tensor([-1., -1.])
    """
    one, other = maps_of(attributions), maps_of(others, name="others")
    if one.ndim != other.ndim or len(one) != len(other):
        raise ValueError(
            "Expected `attributions` and `others` of one batch size and number of dimensions, but got shapes"
            f" {tuple(attributions.shape)} and {tuple(others.shape)}."
        )
    size = [max(pair) for pair in zip(one.shape[1:], other.shape[1:])]
    one, other = maps_of(attributions, size), maps_of(others, size).to(one.device)
    return _correlation(_mean_ranks(one.flatten(1)), _mean_ranks(other.flatten(1))).to(one.dtype)


def cascading_randomization(
    explanation_func: Callable[..., Any], model: nn.Module, inputs: Any, seed: int = 0, **kwargs: Any
) -> Randomization:
    r"""
    Does the map depend on what the model has learned? In cascading randomisation (Adebayo et al.,
    https://arxiv.org/abs/1810.03292) the weights of one module after the other, from the output
    down, are drawn anew. After each, the map is compared with that of the trained model. A map that
    stays the same does not explain what the model has learned.

    Modules come in the reverse of their order in ``model.modules()``. A module with weights of its
    own is reset by its ``reset_parameters``; if it has none, the values of each parameter are
    shuffled. The model is restored when the function returns or raises.

    Maps from random weights resemble trained ones to some degree: compare the numbers of two
    methods, not one number with zero. Let ``explanation_func`` embed its references itself
    (``reference=``), so that they are embedded by the same weights.

    Args:
        explanation_func (Callable): A function from inputs to maps (B, C, \*spatial), or a tuple of
                    one: an ``attribute``, or an ``explanation_func`` of this package.
        model (torch.nn.Module): The model that ``explanation_func`` explains; its weights are
                    randomised.
        inputs (Any): Passed to ``explanation_func``.
        seed (int): Seed of the random weights. The global random state is left alone.
                    Default: 0
        **kwargs (Any, optional): Passed to ``explanation_func``.

    Returns:
        *Randomization*: ``modules``, names, and ``rank_correlation`` (len(modules), B), see
        :func:`rank_correlation`.

    Raises:
        TypeError: ``explanation_func`` is not callable, or ``model`` no module.
        ValueError: ``model`` has no weights.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> fam = FeatureActivationMap(encoder, encoder[1])
        >>> inputs, reference = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16)
        >>> found = cascading_randomization(fam.attribute, encoder, inputs, reference=reference)
        >>> found.modules, found.rank_correlation.shape
        (['0'], torch.Size([1, 2]))
    """
    check_callable("explanation_func", explanation_func)
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be a module, but got {describe(model)}.")
    modules = [(name, m) for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))][::-1]
    if not modules:
        raise ValueError("Expected `model` to have weights, but it has no parameters.")
    found = []
    with _weights_restored(model):
        trained = maps_of(explanation_func(inputs, **kwargs))[:, None]
        for number, (_, module) in enumerate(modules):
            _randomize(module, seed + number)
            found.append(rank_correlation(trained, maps_of(explanation_func(inputs, **kwargs))[:, None]))
    return Randomization([name for name, _ in modules], torch.stack(found))


def reference_dependence(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    other_attributions: Tensor,
    target: TargetType,
    other_target: TargetType,
    baselines: Baselines = "blur",
    additional_forward_args: object | None = None,
    n_cells: int = 7,
    max_examples_per_batch: int | None = None,
) -> ReferenceDependence:
    r"""
    Does a map follow the reference? Compares how it changes with the reference to how it should.

    How it should change is measured on the model: each cell of a grid is occluded in turn, and its
    effects on the two scores, :math:`O_k = f_k(x) - f_k(x \setminus k)`, make a map for each
    reference. Maps M and effects O are averaged over the cells and divided by the sum of their
    absolute values, so that a mere change of scale does not count. Then

    .. math::
        agreement = corr(M_a - M_b, O_a - O_b), \quad
        change = \tfrac12 \sum |M_a - M_b|, \quad expected = \tfrac12 \sum |O_a - O_b|

    with Pearson's correlation over the cells. A map that ignores the reference has an
    agreement of exactly 0; so has, on average, one that changes at random. The metric is this
    package's own; occlusion is that of Zeiler and Fergus (https://arxiv.org/abs/1311.2901),
    and the correlation that of the faithfulness measure of Bhatt et al.
    (https://arxiv.org/abs/2005.00631), of a difference of maps.

    Args:
        forward_func (Callable): A function from inputs to scores (B, K), such as a
                    :class:`~captum_fam.SimilarityScore`.
        inputs (Tensor): The explained inputs, (B, C, \*spatial), floating point.
        attributions (Tensor): Maps (B, C', \*spatial) of the score ``target``.
        other_attributions (Tensor): Maps of the score ``other_target``.
        target (int, list or Tensor): The reference of ``attributions``.
        other_target (int, list or Tensor): The reference of ``other_attributions``.
        baselines (str, float or Tensor): What occluded cells show, as in :func:`deletion`.
                    Default: ``"blur"``
        additional_forward_args, max_examples_per_batch (optional): As in :func:`deletion`.
                    Default: None
        n_cells (int): Cells along each spatial dimension, at most its size.
                    Default: 7

    Returns:
        *ReferenceDependence*: ``agreement``, ``change`` and ``expected``, each (B,).

    Raises:
        TypeError, ValueError: an argument is not as described above; the message names it.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score, inputs = SimilarityScore(encoder, torch.rand(5, 8)), torch.rand(2, 3, 16, 16)
        >>> lafam = LabelFreeActivationMap(score, encoder[1])
        >>> maps = [lafam.attribute(inputs, k) for k in (0, 1)]
        >>> reference_dependence(score, inputs, *maps, target=0, other_target=1).agreement
        tensor([0., 0.])
    """
    maps, others = maps_for(inputs, attributions), maps_for(inputs, other_attributions, "other_attributions")
    check_positive("n_cells", n_cells)
    if n_cells > min(inputs.shape[2:]):
        raise ValueError(
            f"Expected `n_cells` to be at most the size of `inputs`, {tuple(inputs.shape[2:])}, but got {n_cells}."
        )
    if target is None or other_target is None:
        raise ValueError("`target` and `other_target` are needed: the references of the two maps.")
    cell, nothing = _cells(inputs.shape[2:], n_cells).to(inputs.device), baseline_of(inputs, baselines)
    n = n_cells ** (inputs.ndim - 2)

    def perturb(row: Tensor, step: Tensor) -> Tensor:  # the last step occludes nothing
        hidden = cell == step.reshape(-1, *[1] * cell.ndim)
        return torch.where(hidden[:, None], nothing[row], inputs[row])

    scores = scores_of(
        forward_func,
        inputs,
        perturb,
        n + 1,
        {"target": target, "other_target": other_target},
        additional_forward_args,
        max_examples_per_batch,
    )
    effects = scores[:, :, -1:] - scores[:, :, :-1]
    maps, others = maps.double(), others.double()
    member = nn.functional.one_hot(cell.flatten(), n).to(maps)
    member = member / member.sum(0)
    changes = [
        _share(one.to(maps)) - _share(other.to(maps))
        for one, other in ((maps.flatten(1) @ member, others.flatten(1) @ member), effects)
    ]
    moved, expected = (c.abs().sum(1) / 2 for c in changes)
    agreement = torch.where(moved > _ROUNDING, _correlation(*changes), 0)
    return ReferenceDependence(*(x.to(scores.dtype) for x in (agreement, moved, expected)))


def _cells(size: torch.Size, n_cells: int) -> Tensor:
    """The number of the cell that each location belongs to, (*size)."""
    cell = torch.zeros(size, dtype=torch.long)
    for dimension, length in enumerate(size):
        along = torch.arange(length) * n_cells // length
        cell = cell * n_cells + along.reshape(-1, *[1] * (len(size) - dimension - 1))
    return cell


def _share(x: Tensor) -> Tensor:
    """Rows divided by the sum of their absolute values; zeros stay zeros."""
    total = x.abs().sum(1, keepdim=True)
    return x / torch.where(total > 0, total, 1)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of the rows of x and y, 0 where one is constant."""
    spread = (x.amax(1) > x.amin(1)) & (y.amax(1) > y.amin(1))
    x, y = (v.double() - v.double().mean(1, keepdim=True) for v in (x, y))
    size = torch.where(spread, x.norm(dim=1) * y.norm(dim=1), 1)
    return torch.where(spread, (x * y).sum(1) / size, 0).clamp(-1, 1)


def _mean_ranks(x: Tensor) -> Tensor:
    """Ranks of the values of each row, ties with the mean of theirs."""
    ordered = x.sort(1).values
    below, up_to = (torch.searchsorted(ordered, x.contiguous(), side=side) for side in ("left", "right"))
    return (below + up_to).double() / 2


def _randomize(module: nn.Module, seed: int) -> None:
    """The module's own weights, drawn anew."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
            return
        for parameter in module.parameters(recurse=False):
            order = torch.randperm(parameter.numel()).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))


@contextmanager
def _weights_restored(model: nn.Module) -> Iterator[None]:
    """
    At the end, each module holds the same tensors with the same values as before: a backward pass
    of the caller's that still needs them finds nothing changed.
    """
    slots_of = [slots for module in model.modules() for slots in (module._parameters, module._buffers)]
    held: list[tuple[Any, dict[str, Tensor | None]]] = [(slots, dict(slots)) for slots in slots_of]
    kept = [(t, t.detach().clone()) for _, tensors in held for t in tensors.values() if t is not None]
    with ExitStack() as stack:
        for tensor, _ in kept:
            if not tensor.is_inference():  # which has no version
                stack.enter_context(_unsafe_preserve_version_counter(tensor))
        try:
            yield
        finally:
            for slots, tensors in held:
                slots.clear()
                slots.update(tensors)
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
