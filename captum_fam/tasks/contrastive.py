"""The weighted k-nearest-neighbour decision over a memory bank, and the references that explain it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_fam._checks import check_labels, check_positive, describe
from captum_fam.similarity import unit, widen


class NearestReferences(NamedTuple):
    r"""
    Which class did the nearest neighbours vote for, and which of them agree? For B embeddings; made
    by :func:`~captum_fam.nearest_references`.

    Attributes:
        predicted (Tensor): The label with the most votes, (B,).
        classes (Tensor): All labels, sorted, (n_classes,).
        scores (Tensor): The share of the votes for each class, (B, n_classes); a row adds up to 1.
        indices (Tensor): The k nearest neighbours in the bank, nearest first, (B, k).
        agrees (Tensor): Which of these neighbours have the predicted label, (B, k), bool.
        reference_embedding (Tensor): The mean of the agreeing neighbours' unit embeddings, (B, D):
                    the reference for :meth:`~captum_fam.FeatureActivationMap.attribute`.

    Examples::

        >>> nearest = nearest_references(torch.rand(2, 4), torch.rand(9, 4), [0, 1, 2] * 3, k=5)
        >>> nearest.scores.shape, nearest.indices.shape, nearest.reference_embedding.shape
        (torch.Size([2, 3]), torch.Size([2, 5]), torch.Size([2, 4]))
    """

    predicted: Tensor
    classes: Tensor
    scores: Tensor
    indices: Tensor
    agrees: Tensor
    reference_embedding: Tensor

    def __repr__(self) -> str:
        shapes = (f"{name}={tuple(value.shape)}" for name, value in zip(self._fields, self))
        return f"{type(self).__name__}({', '.join(shapes)})"


def nearest_references(
    embedding: Tensor, bank: Tensor, labels: Tensor | Sequence[int], k: int = 200, temperature: float = 0.1
) -> NearestReferences:
    r"""
    Which class do the nearest neighbours in a memory bank vote for, and which neighbours agree? The
    weighted decision of Wu et al. (https://arxiv.org/abs/1805.01978, section 3.4).

    Each of the k bank entries with the highest cosine votes for its label, with the weight

    .. math:: \exp(\cos(z, s_i) / \tau)

    as in ``knn_predict`` of lightly on normalised features. To explain the decision, FAM takes the
    mean contributions of the agreeing neighbours, which all count alike. One reference gives the
    same map: the mean of their unit vectors. (The contributions to a cosine are linear in the unit
    vector of s; the length of the mean scales them all, which min-max undoes.) It is the
    ``reference_embedding`` of the result:

    .. code-block:: python

        nearest = nearest_references(fam.embed(images), bank, labels, k=20)
        maps = fam.attribute(images, reference_embedding=nearest.reference_embedding)

    Args:
        embedding (Tensor): Embeddings (B, D), as ``fam.embed`` gives them.
        bank (Tensor): Embeddings of the memory bank (N, D), from the same encoder.
        labels (Tensor or sequence of int): N integers, any values: the label of each bank entry.
        k (int): How many neighbours vote, at most N.
                    Default: 200
        temperature (float): :math:`\tau`, positive; the smaller, the more the nearest neighbours
                    count.
                    Default: 0.1

    Returns:
        *NearestReferences*: predicted labels, shares of the votes, neighbours, and a
        ``reference_embedding`` for each example, in the bank's dtype.

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> bank, labels = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), [7, 7, 3]
        >>> nearest = nearest_references(torch.tensor([[2.0, 1.0]]), bank, labels, k=3)
        >>> nearest.predicted, nearest.agrees
        (tensor([7]), tensor([[ True,  True, False]]))
    """
    for name, value in (("embedding", embedding), ("bank", bank)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 2:
            dimensions = value.ndim if isinstance(value, Tensor) else 2
            cure = f"; a single embedding is {name}[None]" if dimensions == 1 else ""
            cure = "; embed images first" if dimensions > 2 else cure
            raise TypeError(f"Expected `{name}` to be a floating-point tensor (N, D), but got {describe(value)}{cure}.")
    if embedding.shape[1] != bank.shape[1]:
        raise ValueError(
            f"Expected `embedding` and `bank` from one encoder, but their dimensions are {embedding.shape[1]} and"
            f" {bank.shape[1]}."
        )
    label = check_labels("labels", labels, len(bank), "the embeddings of `bank`", bank.device)
    check_positive("k", k)
    if k > len(bank):
        raise ValueError(f"Expected `k` to be at most the {len(bank)} embeddings of the bank, but got {k}.")
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise ValueError(f"Expected `temperature` to be a positive number, but got {describe(temperature)}.")

    z, s = unit(widen(embedding.detach())).to(bank.device), unit(widen(bank.detach()))
    cosines, indices = (z @ s.T.to(z.dtype)).topk(k)
    classes, number = label.unique(sorted=True, return_inverse=True)
    shares = (cosines / temperature).softmax(1)  # the votes exp(cos / T), divided by their sum
    scores = shares.new_zeros(len(z), len(classes)).scatter_add_(1, number[indices], shares)
    winner = scores.argmax(1)
    agrees = number[indices] == winner[:, None]
    mean = agrees.to(s.dtype) / agrees.sum(1, keepdim=True)
    references = torch.zeros(len(z), len(s), dtype=s.dtype, device=s.device).scatter_(1, indices, mean) @ s
    return NearestReferences(classes[winner], classes, scores, indices, agrees, references.to(bank.dtype))
