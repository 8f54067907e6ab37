"""Pages in docs keep up: messages are the package's, the table of Captum's versions is what the script gives."""

import ast
import re
from pathlib import Path

import captum
import captum.attr
import pytest

import captum_fam
from benchmarks import compatibility

ROOT = Path(__file__).parent.parent
ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
FILLED_IN = "\0"  # by an f-string


def strings(source):
    """The strings of a source file; a docstring is none."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return node.value if isinstance(node, ast.Constant) else FILLED_IN

    nodes = list(ast.walk(ast.parse(source)))
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    kinds = [n for n in nodes if isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and type(n.value) is str)]
    return [text(node) for node in kinds if id(node) not in documentation]


def pattern(quote):
    """What a quoted message means, in which an ellipsis stands for what is filled in."""
    return re.compile(
        f".*{FILLED_IN}.*".join(re.escape(part.strip()) for part in quote.split("\N{HORIZONTAL ELLIPSIS}")), re.S
    )


def messages():
    return [text for file in ROOT.glob("captum_fam/**/*.py") for text in strings(file.read_text(encoding="utf-8"))]


def test_strings_are_those_of_the_code_and_not_its_documentation():
    source = 'def f(n):\n    """No message."""\n    raise ValueError(f"Expected {n}" " things, but got none.")'
    found = strings(source)
    assert f"Expected {FILLED_IN} things, but got none." in found
    assert "No message." not in found
    assert any(map(pattern("Expected \N{HORIZONTAL ELLIPSIS} things").search, found))
    assert not any(map(pattern("Expected \N{HORIZONTAL ELLIPSIS} thing, but").search, found))


def test_each_message_on_the_page_of_errors_is_one_of_the_package():
    rows = re.findall(r"^\| (.+?) \| ", ERRORS, re.M)
    quotes = [quote for row in rows for quote in re.findall(r"``(.+?)``", row)]
    known = messages()
    assert len(quotes) > 150
    assert [quote for quote in quotes if not any(map(pattern(quote).search, known))] == []
    assert [row for row in rows if "``" not in row and row != "message"] == []


def table():
    """The rows of the table of Captum's versions: for each version what is tried and what came of it."""
    rows = re.findall(r"^\| (.+) \|$", COMPATIBILITY, re.M)
    head, *rest = [row.split(" | ") for row in rows if row.count(" | ") == 3]
    return {version: {row[0]: row[i] for row in rest} for i, version in enumerate(head) if i}


def test_the_versions_of_captum_that_were_measured_are_listed_beside_those_required():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.findall(r'^    "((?:captum|torch|torchvision)\b(?!-)[^"]*)",$', project, re.M)
    (python,) = re.findall(r'^requires-python = "(.+)"$', project, re.M)
    assert len(required) == 3
    rows = [
        *(f"| `{requirement}` |" for requirement in required),
        f"| Python `{python}` |",
        f"| {', '.join(table())} |",
    ]
    assert [row for row in rows if row not in COMPATIBILITY] == []


@pytest.mark.skipif(captum.__version__ not in table(), reason="this Captum is not in the table")
def test_the_column_of_this_captum_is_what_the_script_gives():
    pytest.importorskip("sklearn", reason="KernelShap and Lime need it")
    outcomes = {what: compatibility.outcome(what, function) for what, function in compatibility.rows().items()}
    found = {what: result for what, (result, _) in outcomes.items()}
    assert found == table()[captum.__version__]
    assert [what for what, (_, as_it_should_be) in outcomes.items() if not as_it_should_be] == []


def test_every_attribution_method_of_captum_is_in_the_table_or_named_as_left_out():
    methods = [name for name in captum.attr.__all__ if is_method(getattr(captum.attr, name))]
    assert len(methods) > 30
    tried = set(re.findall(r"`(\w+)", " ".join(compatibility.rows())))
    left_out = set(re.findall(r"`(\w+)`", COMPATIBILITY.partition("Left out")[2]))
    assert [n for n in methods if not n.startswith("Neuron") and n not in tried | left_out] == []


def is_method(value):
    return isinstance(value, type) and issubclass(value, captum.attr.Attribution)


def test_the_version_is_that_of_the_last_release_everywhere():
    changes, citation, readme = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff", "README.md")
    )
    version, date = re.search(r"^## ([\d.]+), ([\d-]+)$", changes, re.M).groups()
    assert version == captum_fam.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation
    assert f"version {version};" in readme
