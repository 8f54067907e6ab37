"""
Encoders that average a layer's places first. All places then share one gradient, that of their mean
divided by their number, and only the part behind the mean is run to find it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass(frozen=True)
class Pool:
    """
    The mean of a tensor over some of its dimensions; the embedding depends on the tensor only
    through this mean.

    Attributes:
        edge: of the mean in the graph.
        sizes: of an example's dimensions; those that were averaged have size 1.
        places: how many were averaged.
    """

    edge: GradientEdge
    sizes: tuple[int, ...]
    places: int

    def numbers(self, shape: torch.Size) -> Tensor:
        """For each value of a tensor of that shape, the number of the value of the mean that it went into."""
        return torch.arange(float(math.prod(self.sizes))).reshape(self.sizes).expand(shape)


def pools_of(embedding: Tensor, tensors: list[Tensor]) -> list[Pool] | None:
    """How the embedding averages each of the tensors, or None where it does not average all of them."""
    if embedding.grad_fn is None:
        return None
    users: dict[Node, list[Node]] = {embedding.grad_fn: []}
    waiting = [embedding.grad_fn]
    while waiting:
        node = waiting.pop()
        for child, _ in node.next_functions:
            if child is not None:
                if child not in users:
                    waiting.append(child)
                users.setdefault(child, []).append(node)
    with torch.enable_grad():  # without it, torch 2.3 finds no leaf
        pools = [_pool_of(tensor, users) for tensor in tensors]
    found = [pool for pool in pools if pool is not None]
    return found if len(found) == len(pools) else None


def _pool_of(tensor: Tensor, users: dict[Node, list[Node]]) -> Pool | None:
    node = get_gradient_edge(tensor).node
    for name in ("CloneBackward0", "MeanBackward1"):  # a copy of the tensor goes on (see forward.py)
        if len(of_node := users.get(node, [])) != 1 or of_node[0].name() != name:
            return None
        node = of_node[0]
    saved: Any = node
    dims = {(dim - 2**64 if dim >= 2**63 else dim) % tensor.ndim for dim in saved._saved_dim}  # shown without a sign
    if 0 in dims:
        return None
    sizes = tuple(1 if dim in dims else tensor.shape[dim] for dim in range(1, tensor.ndim))
    return Pool(GradientEdge(node, 0), sizes, math.prod(tensor.shape[dim] for dim in dims))
