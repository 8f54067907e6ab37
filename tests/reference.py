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


def own(z, similarity):
    """t(z, z) / score(z, z): what one unit of the score of z with itself is made of."""
    c = contributions(z, z, similarity)
    return c / c.sum()


def pair_weights(z, references, own_number, similarity, normalize="minmax", contrast=None, threshold=None):
    """FAM's f (D,) for one embedding and the reference of that number among (K, D)."""
    z = np.asarray(z, dtype=np.float64)
    c = contributions(z, references[own_number], similarity)
    if threshold is not None:
        t = c - threshold * own(z, similarity)
    elif contrast == "self":
        t = c - c.sum() * own(z, similarity)
    elif contrast is not None:
        t = contrasted(z, references, own_number, contrast, similarity)
    else:
        t = weights(c, normalize)
    return t * np.sign(z)


FACTORS = {
    "cosine": lambda z, s: s / norm(s) / norm(z),
    "dot": lambda z, s: s,
    "euclidean": lambda z, s: 2 * s - z,
}


def decomposition_weights(z, references, own_number, similarity, contrast=None, threshold=None):
    """SimilarityDecomposition's f (D,) for one embedding and the reference of that number among (K, D)."""
    f_of = FACTORS[similarity]
    z, references = np.asarray(z, dtype=np.float64), np.asarray(references, dtype=np.float64)
    f = f_of(z, references[own_number])
    if threshold is not None or contrast == "self":
        itself = f_of(z, z)
        return f - (threshold if threshold is not None else f @ z) * itself / (itself @ z)
    if contrast is None:
        return f
    others = [k for k in range(len(references)) if k != own_number] if contrast == "rest" else [contrast]
    return f - sum(f_of(z, references[k]) for k in others) / len(others)


def aligned_map(f, activation):
    """sum_k f_k A_k, over the channels of one example's activations (C, *spatial)."""
    return sum(f_k * A_k for f_k, A_k in zip(f, activation, strict=True))


def place_embeddings(jacobian, activation):
    """v (D, *spatial), what each place gives the embedding: sum_k A_ki dz/dA_ki, for dz/dA (D, C, *spatial)."""
    return sum(A_k * dz_dA_k for A_k, dz_dA_k in zip(activation, jacobian.swapaxes(0, 1), strict=True))


def jacobian_map(f, jacobian, activation):
    """N f.v_i, for a jacobian dz/dA (D, C, *spatial) and one example's activations (C, *spatial)."""
    v = place_embeddings(jacobian, activation)
    return v[0].size * sum(f_k * v_k for f_k, v_k in zip(f, v, strict=True))


def numeric_jacobian(function, activation, step=1e-5):
    """dz/dA (D, C, *spatial) by central differences, of a function from (C, *spatial) to (D,)."""
    columns = []
    for index in np.ndindex(activation.shape):
        moved = np.zeros_like(activation)
        moved[index] = step
        columns.append((function(activation + moved) - function(activation - moved)) / (2 * step))
    return np.stack(columns, 1).reshape(-1, *activation.shape)
