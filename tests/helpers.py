"""What tests have in common."""

import contextlib
import warnings

import numpy as np
import reference as oracle
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


def arrays(encoder, *inputs, layer=None):
    """As ``run``, in NumPy."""
    return tuple(t.numpy() for t in run(encoder, *inputs, layer=layer))


def similarity_of(z, s, similarity="cosine"):
    """The score of one embedding for one reference, by the reference implementation."""
    return oracle.contributions(z, s, similarity).sum()


def margin(z, references, own, contrast=None, similarity="cosine"):
    """The score of one embedding for its reference, less that of another or the mean of all the others."""
    scores = [similarity_of(z, s, similarity) for s in references]
    others = [score for k, score in enumerate(scores) if k != own] if contrast == "rest" else scores[contrast or 0]
    return scores[own] - (0 if contrast is None else np.mean(others))


def question(references, own, contrast=None, similarity="cosine"):
    """The margin as a function of an embedding."""
    return lambda z: margin(z, references.numpy(), own, contrast, similarity)


def held(model):
    """What a call may leave beside hooks, flags and values: attributes of modules, and the parameters' memory."""
    attributes = [{name: id(value) for name, value in vars(m).items()} for m in model.modules()]
    memory = [(id(t), t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]
    return attributes, memory
