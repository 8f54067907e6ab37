"""Weights as constants, so that torch keeps nothing for their gradients, which nobody asks for."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class WeightsNeededError(Exception):
    """An encoder takes gradients in its own forward pass; they may be gradients of its weights."""


# The hooks for tensors saved for backward; torch 2.3 has no function that returns them.
_TOP: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
# Without them, a checkpointed part would look like any other, and would get wrong gradients.
CAN_BE_CONSTANT = _TOP is not None


class ConstantWeights(TorchFunctionMode):
    """
    Makes weights constants in linear layers, convolutions and norms: torch then keeps for backward
    nothing that only their gradients would need. Batch norm in evaluation is run as the affine map
    that it is, because torch would keep its input all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False  # whether the encoder has taken a gradient
        self._hooks = _hooks()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:
            self.asked = True
            raise WeightsNeededError
        if func not in _WEIGHED or not args or not args[0].requires_grad or isinstance(args[0], nn.Parameter):
            return func(*args, **kwargs)
        if (
            _hooks() != self._hooks
        ):  # gradient checkpointing runs the same again without this mode: it must save the same
            return func(*args, **kwargs)
        args = tuple(a.detach() if isinstance(a, nn.Parameter) else a for a in args)
        kwargs = {name: a.detach() if isinstance(a, nn.Parameter) else a for name, a in kwargs.items()}
        return _batch_norm(*args, **kwargs) if func is F.batch_norm else func(*args, **kwargs)


def _hooks() -> Any:
    return _TOP(True)


_BACKWARD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
_WEIGHED = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.group_norm, F.batch_norm}


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.batch_norm; in evaluation, without its input for backward."""
    given = [v for v in (running_mean, running_var, weight, bias) if v is not None]
    usual = x.dtype in (torch.float32, torch.float64) and all(v.shape == x.shape[1:2] for v in given)
    mixed = any(v.dtype != x.dtype for v in given)
    if training or running_mean is None or running_var is None or not usual or mixed:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - running_mean * scale
    channels = (-1, *[1] * (x.ndim - 2))
    return (x * scale.reshape(channels)).add_(shift.reshape(channels))
