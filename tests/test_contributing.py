"""The worked example of CONTRIBUTING.md is a method, in at most five lines."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from encoders import HeadEncoder, PooledEncoder, random, seeded
from helpers import close

from captum_fam import SimilarityDecomposition
from captum_fam.methods.dimension_attribution import DimensionAttribution
from captum_fam.similarity import norm, unit

CONTRIBUTING = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
X, S, OTHERS = random(2, 3, 8, 8), random(3, 4, seed=2), random(9, 4, seed=3)


@pytest.fixture(scope="module")
def example():
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.S)
    assert sum(bool(line.strip()) for line in code[code.index("class ") :].splitlines()) <= 5
    names = {}
    exec(code, names)
    return names["CentredDecomposition"]


def by_captum(encoder, s, background):
    """N times gradient times activation of f.z, with f held constant."""
    z = encoder(X).detach()
    f = (F.normalize(s, dim=-1) - background) / z.norm(dim=1, keepdim=True)
    terms = LayerGradientXActivation(lambda x: (f * encoder(x)).sum(1), encoder.layer).attribute(X).detach()
    return terms.sum(1, keepdim=True) * terms[0, 0].numel()


@pytest.mark.parametrize("build", [HeadEncoder, lambda: PooledEncoder(channels=4)], ids=["head", "mean"])
def test_the_worked_example_is_the_centred_decomposition(example, build):
    encoder = seeded(build)
    method = example(encoder, encoder.layer)
    method.background = F.normalize(OTHERS, dim=1).mean(0)
    expected = [by_captum(encoder, s, method.background) for s in S]
    close(method.attribute(X, 1, reference_embedding=S), expected[1])
    close(method.attribute(X, 0, reference_embedding=S, contrast=2), expected[0] - expected[2])
    close(method.attribute_all(X, reference_embedding=S), torch.cat(expected, 1))
    close(method.attribute(X, reference_embedding=S[:1], internal_batch_size=1), expected[0])


def test_the_same_function_serves_without_a_class(example):
    encoder = seeded(HeadEncoder)
    method = example(encoder, encoder.layer)
    background = method.background = F.normalize(OTHERS, dim=1).mean(0)
    own = SimilarityDecomposition(
        encoder, encoder.layer, dimension_weights=lambda z, s: (unit(s) - background) / norm(z)
    )
    for options in ({}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.2}):
        close(*(m.attribute(X, 1, reference_embedding=S, **options) for m in (method, own)))


def test_a_method_without_terms_has_no_map():
    encoder = seeded(HeadEncoder)
    with pytest.raises(NotImplementedError):
        DimensionAttribution(encoder, encoder.layer).attribute(X, reference_embedding=S[:1])
