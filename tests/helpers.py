"""What tests have in common."""

import contextlib
import warnings

import numpy as np
import torch


def close(actual, expected, rtol=1e-9, atol=1e-12, **options):
    """That two results are equal but for rounding: tensors, arrays, numbers, or tuples and lists of such."""
    if isinstance(actual, (tuple, list)):
        assert type(actual) is type(expected)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            close(one, other, rtol, atol, **options)
        return
    expected = expected if isinstance(expected, torch.Tensor) else torch.as_tensor(np.asarray(expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, **options)


@contextlib.contextmanager
def silent():
    """A warning is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(encoder, *inputs, layer=None):
    """Embeddings and the layer's activations of an ordinary forward pass, detached."""
    kept = []
    handle = (encoder.layer if layer is None else layer).register_forward_hook(lambda m, i, o: kept.append(o))
    with torch.no_grad():
        z = encoder(*inputs)
    handle.remove()
    return z, kept[-1]
