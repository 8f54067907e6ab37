"""What a forward pass has recorded of layers (see forward.py), and the gradients of its embedding."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_fam import _captum
from captum_fam._checks import describe
from captum_fam.engine.checkpoints import CUT, checkpointing_named
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.layers import last_map
from captum_fam.engine.order import Layouts
from captum_fam.engine.path import Path
from captum_fam.engine.pools import Pool, pools_of
from captum_fam.engine.report import Dependence, Report
from captum_fam.engine.ways import NotInOneBatchError
from captum_fam.similarity import widen
from captum_fam.tokens import images_of

T = TypeVar("T")

_NO_GRAPH = (
    "The embedding's dimensions are not the layer's channels, so the weights need a gradient, which"
    " torch.inference_mode() rules out; use torch.no_grad() instead."
)
# How many values of a layer's gradients are computed in one batch: more are no faster, but need more memory.
_AT_ONCE = 2**20
_ELSEWHERE = 16  # on a GPU, this many times as many products by place, as small batches make it wait


@dataclass(frozen=True)
class Encoder:
    """A forward function, and how its embeddings and its layers' activations are read."""

    forward_func: Callable[..., Any]
    output_selector: Callable[[Any], Tensor] | None = None
    reshape_transform: Callable[[Tensor], Tensor] | None = None
    device_ids: list[int] | None = None
    confirmed: set[object] = field(default_factory=set)  # questions that the encoder has answered (see order.py)

    @cached_property
    def layouts(self) -> Layouts:
        return Layouts(self.forward_func)

    def to_map(self, activation: Tensor, inputs: Tensors, dimensions: int | None) -> Tensor:
        """
        A layer's activations, or a tensor of their shape, as (B, C, *spatial); unchanged where the layout is in doubt.
        ``dimensions`` are the embedding's.
        """
        if self.reshape_transform is not None:
            return self.reshape_transform(activation)
        found = self.layouts.to_map(activation, inputs, dimensions)
        return activation if found is None else found


class Recording:
    """
    The embeddings of one forward pass and the activations of its layers.

    Attributes:
        encoder, inputs, additional_forward_args: of the forward pass.
        layer_input: whether the layers' inputs were recorded, instead of their outputs.
        embedding: z (B, D), detached.
        given: all tensors that the layers gave, as they were, detached.
        activations: all tensors that the layers gave, as (B, C, *spatial), detached.
        moved: these less the baseline of the path; without a path, these themselves.
        on_path: embeddings (nodes, B, D) of the path's points, detached.
        names: the layer's name for each of the activations.
        sizes: how many activations each layer gave.
        partial: for each of them, whether the layer gave more, such as tokens that are no patches.
        has_graph: whether the pass was recorded for backward, from the layers on.
        checkpointed: whether a layer lies in a part of the encoder that keeps no graph (see checkpoints.py).
        report: of the call that the pass is a part of.
    """

    def __init__(
        self,
        encoder: Encoder,
        inputs: Tensors,
        additional_forward_args: Any,
        layer_input: bool,
        embedding: Tensor,
        layers: list[str],
        tensors: list[list[Tensors]],
        has_graph: bool,
        report: Report,
        path: Path | None = None,
    ) -> None:
        self.inputs = inputs
        self.additional_forward_args = additional_forward_args
        self.layer_input = layer_input
        with torch.set_grad_enabled(has_graph):  # a subclass may do what it likes in the following
            self._embedding = embedding.as_subclass(Tensor)
        self.path = path
        self._points = 1 if path is None else 1 + len(path.nodes)
        # The encoder may use its tensor again.
        at_points = self._by_point(self._embedding.detach().clone())
        self.embedding, self.on_path = at_points[0], at_points[1:]
        self.has_graph = has_graph
        self.checkpointed = False
        self.report = report
        self.encoder = encoder
        self._tensors = tensors  # of each layer, by device (one, but for DataParallel)
        reduced = [_captum.reduce_list([tuple(self._own(a) for a in t) for t in devices]) for devices in tensors]
        self.sizes = [len(layer) for layer in reduced]
        self.names = [name for name, layer in zip(layers, reduced) for _ in layer]
        self.given = given = [a.as_subclass(Tensor) for layer in reduced for a in layer]
        self.activations = [self._layout(a, name) for a, name in zip(given, self.names)]
        self.moved = self.activations if path is None else [path.moved(A) for A in self.activations]
        if path is not None and path.baseline_is_mean:
            report.warnings += [
                f"Layer {name} has one place, which is its own mean, so its integrated map is zero; pass"
                ' baseline="zero", or choose an earlier layer.'
                for name, A in zip(self.names, self.activations)
                if A.shape[2:].numel() == 1
            ]
        if images_of(inputs).shape[2:].numel() > 1:
            for name, A in zip(self.names, self.activations):
                if A.shape[2:].numel() == 1:
                    report.note_pooled(name, self._elsewhere())
        self.partial = [A.numel() < a.numel() for A, a in zip(self.activations, given)]
        self._shared: dict[object, Any] = {}
        self._asked: Tensor | None = None
        self._mixed: list[Tensor] = []  # whether points of a path depend on each other
        self._on_map: list[Tensor] = []  # whether a gradient by each of the activations is not zero

    def once(self, what: object, compute: Callable[[], T]) -> T:
        """A result that all chunks of references share; it is computed for the first of them."""
        if what not in self._shared:
            self._shared[what] = compute()
        return cast(T, self._shared[what])

    def layers(self) -> list[tuple[str, slice]]:
        """The name of each layer, and which of the activations are its own."""
        ends = list(accumulate(self.sizes))
        return [(self.names[end - 1], slice(end - size, end)) for size, end in zip(self.sizes, ends)]

    def gradients(self, u: Tensor) -> Iterator[list[Tensor]]:
        """For each of R rows of u (B, R, D), the gradients of u.z, one (B, C, *spatial) for each of the activations."""
        self._check_graph()
        flat = self._flat()
        for rows in u.split(_rows_at_once(flat), 1):
            self._note_asked(rows)
            found, scale = self._gradients(rows.transpose(0, 1), flat)
            for r in range(rows.shape[1]):
                laid_out = self._laid_out([None if g is None else g[r] for g in found])
                gradients = [scale[r].reshape(-1, *[1] * (g.ndim - 1)) * widen(g) for g in laid_out]
                self._used_by(gradients)
                yield gradients

    def shared_gradients(self, u: Tensor) -> list[Tensor] | None:
        """
        For R rows of u (B, R, D), the gradients of u.z (B, R, C) that all places of an activation share, one for each
        of the activations; None if the encoder does not first average the places of all of them.
        """
        self._check_graph()
        pools = self.once("pools", self._pools)
        if pools is None:
            return None
        parts = []
        for rows in u.split(_rows_at_once([A.flatten(2)[..., 0] for A in self.activations]), 1):
            found, scale = self._gradients(rows.transpose(0, 1), [pool.edge for pool, _ in pools])
            of_means = [widen(g).reshape(*g.shape[:2], -1) for g in found if g is not None]
            if len(of_means) < len(pools):
                return None
            laid_out = [g[..., channels] / pool.places for g, (pool, channels) in zip(of_means, pools)]
            parts.append([(scale[..., None] * g).transpose(0, 1) for g in laid_out])
            self._note_asked(rows)
            self._used_by(parts[-1])
        return [torch.cat(of_one, 1) for of_one in zip(*parts)]

    def _pools(self) -> list[tuple[Pool, Tensor]] | None:
        """How the encoder averages the places of each activation, and which value of the mean each channel has."""
        pools = pools_of(self._embedding, self._flat())
        if pools is None or len(pools) != len(self.given):  # of several devices
            return None
        found = []
        for pool, given in zip(pools, self.given):
            numbers = self.reshape(pool.numbers(given.shape).to(given.device)).flatten(2)
            if not numbers.eq(numbers[:1, :, :1]).all():
                return None
            found.append((pool, numbers[0, :, 0].long()))
        return found

    def _note_asked(self, rows: Tensor) -> None:
        """Notes rows (B, R, D) whose gradients were asked for, as one, whose terms do not cancel by chance."""
        shares = torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
        mixed = (shares[:, None] * rows).sum(1)
        self._asked = mixed if self._asked is None else self._asked + mixed

    def place_products(self) -> list[Tensor] | None:
        """
        v (B, D, N) for each of the activations, by one forward-mode product for each place: the derivative of
        sum_k A_ki d(u.z)/dA_ki by u. None where the encoder has no second derivative.
        """
        self._check_graph()
        flat = self._flat()
        u = torch.zeros_like(self.embedding, requires_grad=True)
        try:
            with torch.enable_grad():
                given = torch.autograd.grad(
                    self._embedding, flat, self._at_points(u), create_graph=True, allow_unused=True
                )
                gradients = self._laid_out([None if g is None else self._over_points(g) for g in given])
                sums = [(A * g).sum(1).reshape(len(A), -1) for A, g in zip(self.moved, gradients)]
            at_once = _rows_at_once(flat) * (1 if u.device.type == "cpu" else _ELSEWHERE)
            found = [_derivative(y, u, at_once) for y in sums]
        except RuntimeError:
            return None
        self._used_by(found)
        self._asked = torch.linspace(1, 2, u.shape[1], dtype=u.dtype, device=u.device).expand(u.shape)
        return found

    def _check_graph(self) -> None:
        if not self.has_graph:
            raise RuntimeError(_NO_GRAPH)
        if self.checkpointed:
            raise ValueError(CUT)

    def _used_by(self, gradients: list[Tensor]) -> None:
        found = [g.any() for g in gradients]
        self._on_map = [a | b for a, b in zip(found, self._on_map or found)]

    def settle(self) -> None:
        """Reports how the embeddings depend on the layers, from all gradients that were asked for."""
        if self._mixed and torch.stack(self._mixed).any():
            raise NotInOneBatchError
        if self._asked is None:
            return
        on_map = torch.stack(self._on_map).tolist() if self._on_map else []
        for i, (name, tensors) in enumerate(self.layers()):
            found = Dependence.BY_THE_MAP
            if not any(on_map[tensors]):
                if not self._asked.any():
                    continue
                gradients = self._gradients(self._asked[None], self._flat(self._tensors[i : i + 1]))[0]
                used = any(g is not None and bool(g.any()) for g in gradients)
                found = Dependence.OFF_THE_MAP if used else Dependence.NONE
            self.report.note_dependence((i, name), found, self._elsewhere())

    def _elsewhere(self) -> Callable[[], str | None]:
        """A function that finds a layer with a map."""
        encoder = self.encoder
        where = (encoder.forward_func, self.inputs, self.additional_forward_args, encoder.output_selector)
        return partial(last_map, *where)

    def _flat(self, layers: list[list[Tensors]] | None = None) -> list[Tensor]:
        """The tensors of all devices, as the layers gave them."""
        return [a for devices in layers or self._tensors for tensors in devices for a in tensors]

    def _laid_out(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Gradients by the tensors that the layers gave, laid out as the activations; None stands for zero."""
        rest = iter(values)
        laid_out = []
        for devices in self._tensors:
            filled = [
                tuple(torch.zeros_like(self._own(a)) if (g := next(rest)) is None else g for a in t) for t in devices
            ]
            laid_out += [self.reshape(g) for g in _captum.reduce_list(filled)]
        return laid_out

    def _gradients(
        self, u: Tensor, by: Sequence[Tensor] | Sequence[GradientEdge]
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """
        Gradients (R, ...) of a multiple of u.z, for u (R, B, D), in the range of half precision, and the scale (R, B)
        that undoes the multiple.
        """
        largest = u.abs().amax(2).clamp(min=torch.finfo(u.dtype).tiny)
        half = any(t.dtype == torch.float16 for t in (self._embedding, *self.given))
        if not half and len(u[0]):  # one scale for a batch, whose examples may depend on each other
            largest = largest.amax(1, keepdim=True).expand_as(largest)
        if not self._embedding.requires_grad:
            return [None] * len(by), largest
        for gain in (4096.0, 1.0) if half else (1.0,):  # float16 rounds to zero below 6e-8 and overflows at 65504
            v = self._at_points((u / largest[..., None] * gain).to(self._embedding.dtype))
            given = _vector_jacobian_products(self._embedding, by, v)
            found = [None if g is None else self._over_points(g, 1) for g in given]
            if gain == 1 or all(g is None or bool(g.isfinite().all()) for g in found):
                break
        return found, largest / gain

    def _own(self, activation: Tensor) -> Tensor:
        """The batch of the activations themselves, of a tensor with a batch for each point, detached."""
        return self._by_point(activation.detach())[0]

    def _by_point(self, values: Tensor, dim: int = 0) -> Tensor:
        """Values with a batch for each point, (points, batch, ...)."""
        by_point: Tensor = values.unflatten(dim, (self._points, values.shape[dim] // self._points))
        return by_point

    def _at_points(self, u: Tensor) -> Tensor:
        """u (..., B, D) for the embeddings of all points, by the weights of the path."""
        if self.path is None:
            return u
        weights = torch.tensor((0.0, *self.path.weights), dtype=u.dtype, device=u.device)
        return (weights[:, None, None] * u[..., None, :, :]).flatten(-3, -2)

    def _over_points(self, gradient: Tensor, dim: int = 0) -> Tensor:
        """
        The sum over the points of gradients with a batch for each point. Points of no weight are left out: their
        gradients are zero where the points are independent, or undefined.
        """
        if self.path is None:
            return gradient
        points = self._by_point(gradient, dim).movedim(dim, 0)
        weighed = [n for n, weight in enumerate((0.0, *self.path.weights)) if weight]
        own = points[0].detach()
        self._mixed.append(((own != 0) & own.isfinite()).any())
        return sum((points[n] for n in weighed), torch.zeros_like(points[0]))

    def reshape(self, activation: Tensor) -> Tensor:
        return self.encoder.to_map(activation, self.inputs, self.embedding.shape[1])

    def _layout(self, activation: Tensor, name: str) -> Tensor:
        """Activations as (B, C, *spatial), or an error that says how to make them so."""
        B, given = len(self.embedding), self.encoder.reshape_transform is not None
        A = self.reshape(activation) if given or len(activation) == B else activation
        if not isinstance(A, Tensor) or A.ndim < 2 or len(A) != B:
            origin = "`reshape_transform` to return" if given else f"layer {name} to give"
            raise ValueError(
                f"Expected {origin} activations (B, C, *spatial) with B = {B}, but got {describe(A)}; choose another"
                " layer, or pass a reshape_transform that returns that layout."
            )
        images = images_of(self.inputs)
        if not given and self.encoder.layouts.to_map(activation, self.inputs, self.embedding.shape[1]) is None:
            raise ValueError(
                f"The activations {tuple(A.shape)} of layer {name} look like tokens or channels-last maps, but how they"
                f" lie on inputs {tuple(images.shape)} cannot be told from their shape. Pass"
                " reshape_transform=patch_tokens(height, width) with the grid of the patches,"
                " reshape_transform=channels_last for maps (B, h, w, C), or, if dimension 1 is the channels after all,"
                " reshape_transform=lambda a: a."
            )
        return A


def _rows_at_once(tensors: list[Tensor]) -> int:
    """How many products may be one batch: each needs about the size of the tensors for what lies behind them."""
    return max(1, _AT_ONCE // max(1, *(a.numel() for a in tensors)))


def _vector_jacobian_products(
    output: Tensor, by: Sequence[Tensor] | Sequence[GradientEdge], rows: Tensor
) -> Sequence[Tensor | None]:
    """The gradients (R, ...) of rows (R, *output.shape), in one batch where the operations between can be batched."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if len(rows) > 1:
        try:
            return torch.autograd.grad(output, by, rows, is_grads_batched=True, **options)
        except RuntimeError:  # an operation that torch cannot batch
            pass
    with checkpointing_named():
        found = [torch.autograd.grad(output, by, row, **options) for row in rows]
    if len(found) == 1:
        return [None if g is None else g[None] for g in found[0]]
    return [None if of_one[0] is None else torch.stack(of_one) for of_one in zip(*found)]


def _derivative(y: Tensor, u: Tensor, at_once: int) -> Tensor:
    """dy/du (B, D, N) for y (B, N), each row of which depends on its own row of u (B, D) alone."""
    rows = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:, None].expand(-1, len(y), -1)
    parts = [_vector_jacobian_products(y, [u], r)[0] for r in rows.split(at_once)]
    if not parts or any(p is None for p in parts):
        raise RuntimeError("y does not depend on u")
    return torch.cat([p for p in parts if p is not None]).permute(1, 2, 0)
