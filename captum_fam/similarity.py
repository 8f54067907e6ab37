"""Channel contributions to a similarity score, and the weights that FAM makes of them."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from captum_fam._checks import describe, did_you_mean
from captum_fam._distances import of_distance

Similarity: TypeAlias = str | Callable[[Tensor, Tensor], Tensor]
Normalize: TypeAlias = str | None


def _cosine(z: Tensor, s: Tensor) -> Tensor:
    return unit(z) * unit(s)


def _dot(z: Tensor, s: Tensor) -> Tensor:
    return z * s


def _euclidean(z: Tensor, s: Tensor) -> Tensor:
    return -((z - s) ** 2)


_SIMILARITIES = {"cosine": _cosine, "dot": _dot, "euclidean": _euclidean}


def channel_contributions(embedding: Tensor, reference: Tensor, similarity: Similarity = "cosine") -> Tensor:
    r"""
    What does each embedding dimension contribute to a similarity score? The contributions add up to
    the score.

    ================  =================================  ==================================
    similarity        :math:`c_k`                        :math:`\sum_k c_k`
    ================  =================================  ==================================
    ``"cosine"``      :math:`z_k s_k / (\|z\| \|s\|)`    cosine similarity
    ``"dot"``         :math:`z_k s_k`                    dot product
    ``"euclidean"``   :math:`-(z_k - s_k)^2`             negative squared Euclidean distance
    ================  =================================  ==================================

    The cosine rule is that of Feature Activation Map (Liao, Gao, Zhang,
    https://arxiv.org/abs/2307.05017). The Euclidean rule is our reading of it: the
    terms of the logit of Prototypical Networks (https://arxiv.org/abs/1703.05175).
    A vector of zeros contributes zeros under ``"cosine"``.

    Args:
        embedding (Tensor): Embeddings z of the explained inputs, (..., D), floating point.
        reference (Tensor): Reference embeddings s, (..., D), broadcastable with ``embedding``.
        similarity (str or Callable): ``"cosine"``, ``"dot"`` or ``"euclidean"``; or a function
                    ``(z, s) -> c`` from two tensors of one shape (..., D) to the contributions of
                    that shape; or a ``CosineSimilarity``, ``DotProductSimilarity`` or
                    ``LpDistance`` of pytorch-metric-learning, normalised and to a power, too. For
                    these, the score is the library's, with a minus for a distance: :math:`c_k = z_k
                    s_k (z \cdot s)^{power-1}`, or :math:`-d^{power} |z_k - s_k|^p / d^p` with
                    :math:`d = \|z - s\|_p`.
                    Default: ``"cosine"``

    Returns:
        *Tensor*: contributions c in the broadcast shape (..., D) and the inputs' dtype; float16 and
        bfloat16 are computed in float32. Gradients pass through it.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``similarity`` is neither a name nor
                    a function.
        ValueError: the embedding dimensions differ, the similarity's name is unknown, or a
                    function returned another shape.

    Examples::

        >>> z, s = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
        >>> channel_contributions(z, s, "dot")
        tensor([12., 12.])
    """
    contribute = check_similarity(similarity)
    for name, value in (("embedding", embedding), ("reference", reference)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"Expected `{name}` to be a floating-point tensor (..., D), but got {describe(value)}.")
    if not embedding.ndim or not reference.ndim or not 0 < embedding.shape[-1] == reference.shape[-1]:
        raise ValueError(
            "Expected `embedding` and `reference` of one embedding dimension, (..., D), but got shapes"
            f" {tuple(embedding.shape)} and {tuple(reference.shape)}; embed both with the same encoder."
        )
    try:
        shape = torch.broadcast_shapes(embedding.shape, reference.shape)
    except RuntimeError as error:
        raise ValueError(
            "Expected `embedding` and `reference` of broadcastable shapes, but got"
            f" {tuple(embedding.shape)} and {tuple(reference.shape)}; for all pairs, pass embedding[:, None]."
        ) from error
    z, s = widen(embedding), widen(reference)
    # The named rules broadcast by themselves, so that norms of repeated vectors are computed once.
    named = isinstance(similarity, str)
    c = contribute(z, s) if named else contribute(z.expand(shape), s.expand(shape))
    if not isinstance(c, Tensor) or c.shape != shape:
        raise ValueError(
            f"Expected the `similarity` function to return contributions of shape {tuple(shape)}, one per"
            f" embedding dimension, but got {describe(c)}; leave out its sum over the last dimension."
        )
    return c.to(torch.promote_types(embedding.dtype, reference.dtype))


def contribution_weights(contributions: Tensor, normalize: Normalize = "minmax") -> Tensor:
    r"""
    How much weight does FAM give to each embedding dimension, by its contribution to the score?

    .. math:: w = \frac{c - \min c}{\max c - \min c}

    with the minimum and the maximum over the D dimensions of each pair (Liao, Gao, Zhang,
    https://arxiv.org/abs/2307.05017). Where all contributions are equal, all weights are one.

    Args:
        contributions (Tensor): Contributions c, (..., D), floating point.
        normalize (str, optional): ``"minmax"``, or None to leave w = c, signed.
                    Default: ``"minmax"``

    Returns:
        *Tensor*: weights w, (..., D), same dtype; in [0, 1] with ``"minmax"``.

    Raises:
        TypeError: ``contributions`` is no floating-point tensor.
        ValueError: ``normalize`` is neither ``"minmax"`` nor None, or there is no dimension D.

    Examples::

        >>> contribution_weights(torch.tensor([0.5, -0.5, 0.0]))
        tensor([1.0000, 0.0000, 0.5000])
    """
    check_normalize(normalize)
    if not isinstance(contributions, Tensor) or not contributions.is_floating_point():
        raise TypeError(
            f"Expected `contributions` to be a floating-point tensor (..., D), but got {describe(contributions)}."
        )
    if not contributions.ndim or not contributions.shape[-1]:
        raise ValueError(
            f"Expected `contributions` of shape (..., D) with D > 0, but got {tuple(contributions.shape)}."
        )
    if normalize is None:
        return contributions
    c = widen(contributions)
    low, high = c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)
    flat, wide = low == high, (high - low).isinf()
    half = torch.where(wide, 0.5, torch.ones_like(low))  # for differences that do not overflow
    w = (c * half - low * half) / torch.where(flat, torch.ones_like(low), high * half - low * half)
    return torch.where(flat, torch.ones_like(w), w).to(contributions.dtype)


def check_similarity(similarity: Similarity) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of a similarity that is given by name or as a function; an error that says what would work."""
    if isinstance(similarity, str):
        if similarity in _SIMILARITIES:
            return _SIMILARITIES[similarity]
        raise ValueError(
            f"Expected `similarity` to be one of {sorted(_SIMILARITIES)} or a function (z, s) -> contributions,"
            f" but got {similarity!r}.{did_you_mean(similarity, _SIMILARITIES)}"
        )
    distance = of_distance(similarity)
    if distance is not None:
        return distance
    if not callable(similarity) or isinstance(similarity, type):
        raise TypeError(
            f"Expected `similarity` to be one of {sorted(_SIMILARITIES)} or a function (z, s) -> contributions,"
            f" but got {f'the class {similarity.__name__}' if isinstance(similarity, type) else describe(similarity)}."
        )
    return similarity


def check_normalize(normalize: Normalize) -> None:
    if normalize not in ("minmax", None):
        raise ValueError(f'Expected `normalize` to be "minmax" or None, but got {normalize!r}.')


def widen(x: Tensor) -> Tensor:
    """Half precision as float32: contributions are products as small as 1 / D."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exact(x: Tensor) -> torch.autocast:
    """Without the half precision that autocast would choose for products of matrices."""
    return torch.autocast(x.device.type, enabled=False)


def unit(x: Tensor) -> Tensor:
    """x divided by its norm over the last dimension; zeros stay zeros."""
    # Scaled by the largest entry first, so that no square over- or underflows.
    x = x / nonzero(largest(x.detach()))
    return x / nonzero(torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def largest(x: Tensor) -> Tensor:
    """The largest magnitude over the last dimension, kept, without the magnitudes of all."""
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))


def norm(x: Tensor) -> Tensor:
    """The norm over the last dimension, kept, of vectors of any size."""
    return (unit(x) * x).sum(-1, keepdim=True)


def nonzero(x: Tensor) -> Tensor:
    """A divisor for which 0 / 0 is 0."""
    return torch.where(x > 0, x, torch.ones_like(x))
