"""The non-negative factorisation of activations into parts, by scikit-learn's NMF."""

import warnings
from typing import Any

import torch
from torch import Tensor

from captum_fam._checks import check_positive

USUAL = 6  # parts
MOST_STEPS = 500


def check_n_parts(n_parts: object) -> None:
    if n_parts is not None:
        check_positive("n_parts", n_parts)


def parts_of(n_parts: int | None, places: int, channels: int) -> int:
    """
    Into how many parts activations of this many places and channels are factorised.

    Raises:
        ValueError: ``n_parts`` is more than the places or channels allow.
    """
    most = min(places, channels)
    if n_parts is None:
        return min(USUAL, most)
    if n_parts > most:
        raise ValueError(
            f"Expected `n_parts` to be at most {most}, as the layer has {channels} channels and the images have"
            f" {places} places, but got {n_parts}."
        )
    return n_parts


def factorised(A: Tensor, n_parts: int) -> Tensor:
    """
    How strong each of n parts is at each of N places: W (N, n) in float64. The activations A (N, C), less each
    channel's minimum where that is negative, are

        A - min(A, 0) = W H + what is left        W, H >= 0, the rows of H (n, C) of length one

    It is deterministic: it starts from singular vectors (nndsvda) and takes at most MOST_STEPS steps.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    V = A.detach().cpu().double()
    V = V - V.amin(0).clamp(max=0)
    size = float(V.max()) if V.numel() else 0.0
    if size == 0:
        return V.new_zeros(len(V), n_parts)
    model = _nmf()(n_parts, init="nndsvda", max_iter=MOST_STEPS, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it could go on; any W is good enough here
        W: Tensor = torch.from_numpy(model.fit_transform((V / size).numpy()))
    return W.mul_(torch.from_numpy(model.components_).norm(dim=1) * size)


def _nmf() -> Any:
    try:
        from sklearn.decomposition import NMF
    except ModuleNotFoundError as error:
        raise ValueError("scikit-learn is not installed: pip install 'captum-fam[parts]'") from error
    return NMF
