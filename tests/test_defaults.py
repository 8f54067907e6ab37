"""The defaults that docstrings promise are those of the signatures."""

import ast
import importlib
import inspect
import pkgutil
import re

import pytest

import captum_fam


def documented():
    """(place, parameter, what the docstring says, the signature) of everything public that has a docstring of Args."""
    owners = {}
    for info in pkgutil.walk_packages(captum_fam.__path__, "captum_fam."):
        if info.name.rpartition(".")[2] == "__main__":
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("captum_fam"):
                owners[f"{value.__module__}.{name}"] = value
                if inspect.isclass(value):
                    methods = {key: one for key, one in vars(value).items() if inspect.isfunction(one)}
                    owners |= {f"{value.__module__}.{name}.{key}": method for key, method in methods.items()}
    for place, owner in owners.items():
        text = inspect.getdoc(owner) or ""
        args = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.S | re.M)
        for entry in re.split(r"^    (?=\S)", args[1], flags=re.M)[1:] if args else ():
            named = re.match(r"([\w, *]+?)(?: \([^\n]*\))?:", entry)
            default = re.search(r"^\s+Default: (.*?)\s*\Z", entry, re.S | re.M)
            if named and default:
                yield place, named[1].split(", "), " ".join(default[1].split()), inspect.signature(owner).parameters


def values(names, text):
    """What is promised to each of the parameters: one value for all, or one for each, joined by "and"."""
    several = text.split(" and ") if len(names) > 1 and " and " in text else [text] * len(names)
    for one in several:
        value = re.match(r'``(".*?")``|(None|True|False|-?[\d.]+)(?=,|$| )', one)
        yield ast.literal_eval(value[1] or value[2]) if value else None


DOCUMENTED = list(documented())
WORDS = {"10, 20, ... 90": tuple(range(10, 100, 10))}


@pytest.mark.parametrize(
    ("names", "text", "parameters"), [one[1:] for one in DOCUMENTED], ids=[f"{p}-{n[0]}" for p, n, *_ in DOCUMENTED]
)
def test_a_documented_default_is_that_of_the_signature(names, text, parameters):
    for name, value in zip(names, values(names, text)):
        if not name.startswith("*"):
            default, value = parameters[name].default, WORDS.get(text, value)
            assert default is not inspect.Parameter.empty
            if value is not None or text.startswith("None"):  # not where words describe it
                assert (default, type(default)) == (value, type(value))


def test_that_defaults_are_found():
    assert len(DOCUMENTED) > 100
