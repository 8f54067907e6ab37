"""The examples of the docstrings run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import captum_fam
from captum_fam import metrics

MODULES = ["captum_fam", *(m.name for m in pkgutil.walk_packages(captum_fam.__path__, "captum_fam."))]
NAMES = {"torch": torch, "nn": nn, **{name: getattr(captum_fam, name) for name in captum_fam.__all__}}
METRICS = [name for name in metrics.__all__ if name.islower()]  # the functions


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_show(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs=NAMES).failed == 0


@pytest.mark.parametrize("name", captum_fam.__all__)
def test_every_public_name_has_an_example(name):
    assert ">>> " in getattr(captum_fam, name).__doc__


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_an_example(name):
    assert ">>> " in getattr(metrics, name).__doc__


def test_the_reference_has_every_public_name_and_an_example_of_each():
    pages = "".join(p.read_text(encoding="utf-8") for p in (Path(__file__).parent.parent / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^\.\. auto\w+:: (\S+)$", pages, re.M))
    public = {f"captum_fam.{name}" for name in captum_fam.__all__} | {
        f"captum_fam.metrics.{n}" for n in metrics.__all__
    }
    assert public <= listed
    without = [
        n
        for n in listed
        if ">>> " not in getattr(importlib.import_module(n.rpartition(".")[0]), n.split(".")[-1]).__doc__
    ]
    assert without == ["captum_fam.batch.BatchResult"]  # its job starts processes
