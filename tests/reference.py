"""The formulas of the method, written a second time: NumPy, float64, one pair at a time, and no torch."""

import numpy as np


def norm(v):
    """Length of a vector, also where its squares leave the range of a float."""
    largest = np.abs(v).max()
    return largest * np.sqrt(np.sum((v / largest) ** 2)) if largest else 0.0


def cosine(z, s):
    if not norm(z) or not norm(s):
        return np.zeros_like(z)
    return (z / norm(z)) * (s / norm(s))


def dot(z, s):
    return z * s


def euclidean(z, s):
    return -np.square(z - s)


def manhattan(z, s):
    """Stands for a caller's own similarity."""
    return -np.abs(z - s)


SIMILARITIES = {"cosine": cosine, "dot": dot, "euclidean": euclidean, "manhattan": manhattan}


def contributions(z, s, similarity):
    """c (D,) of one embedding and one reference."""
    return SIMILARITIES[similarity](np.asarray(z, dtype=np.float64), np.asarray(s, dtype=np.float64))


def weights(c, normalize="minmax"):
    """w (D,) of one pair's contributions."""
    c = np.asarray(c, dtype=np.float64)
    if normalize is None:
        return c
    if c.max() == c.min():
        return np.ones_like(c)
    return (c - c.min()) / (c.max() - c.min())


def contrasted(z, references, own, other, similarity):
    """c(z, s_own) - c(z, s_other), or minus the mean over all the others for ``other="rest"``."""
    others = [k for k in range(len(references)) if k != own] if other == "rest" else [other]
    mean = sum(contributions(z, references[k], similarity) for k in others) / len(others)
    return contributions(z, references[own], similarity) - mean


def pair_weights(z, references, own, similarity, normalize="minmax", contrast=None):
    """The weights (D,) that explain one embedding's similarity to the reference ``own`` among (K, D)."""
    if contrast is None:
        return weights(contributions(z, references[own], similarity), normalize)
    return contrasted(z, references, own, contrast, similarity)


def aligned_map(w, activation):
    """sum_k w_k A_k, over the channels of one example's activations (C, *spatial)."""
    return sum(w_k * A_k for w_k, A_k in zip(w, activation, strict=True))


def jacobian_map(w, jacobian, activation):
    """sum_k alpha_k A_k with alpha_k = sum over locations of d(w.z)/dA_k, for a jacobian dz/dA (D, C, *spatial)."""
    D, C = jacobian.shape[:2]
    alpha = [sum(w[d] * jacobian[d, k].sum() for d in range(D)) for k in range(C)]
    return aligned_map(alpha, activation)


def numeric_jacobian(function, activation, step=1e-5):
    """dz/dA (D, C, *spatial) by central differences, of a function from (C, *spatial) to (D,)."""
    columns = []
    for index in np.ndindex(activation.shape):
        moved = np.zeros_like(activation)
        moved[index] = step
        columns.append((function(activation + moved) - function(activation - moved)) / (2 * step))
    return np.stack(columns, 1).reshape(-1, *activation.shape)
