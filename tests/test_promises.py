"""The page of promises names tests, pages and commands that exist."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`((?:tests|fuzz)/\w+\.py)`", PAGE)))


def test_every_row_names_what_tests_it():
    rows = [row for row in re.findall(r"^\| .* \|$", PAGE, re.M) if "tested in" not in row]
    assert len(rows) > 15
    assert [row for row in rows if not re.search(r"`(tests|fuzz)/\w+\.py`[^|]*\|$", row)] == []


@pytest.mark.parametrize("name", FILES)
def test_each_file_that_is_named_has_tests(name):
    assert re.search(r"^def test_", (ROOT / name).read_text(encoding="utf-8"), re.M)


def test_each_command_that_is_named_exists():
    modules = re.findall(r"`python -m ([\w.]+)", PAGE)
    assert modules
    assert [m for m in modules if importlib.util.find_spec(m) is None] == []
    assert (ROOT / ".ci" / "run").exists()
    assert "--examples" in (ROOT / "fuzz" / "conftest.py").read_text(encoding="utf-8")


def test_each_page_that_is_named_exists():
    pages = re.findall(r"\]\((\w+\.md)\)", PAGE)
    assert pages
    assert [page for page in pages if not (ROOT / "docs" / page).exists()] == []


def test_what_is_fuzzed_is_fuzzed_before_a_merge():
    assert "pytest -q fuzz" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
