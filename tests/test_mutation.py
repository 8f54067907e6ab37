"""The lists of `python -m mutation` speak of the package as it is."""

from pathlib import Path

import pytest

from mutation.equivalent import EQUIVALENT
from mutation.tests import TESTS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", TESTS)
def test_a_module_and_its_tests_are_files(module):
    assert (ROOT / "captum_fam" / f"{module}.py").is_file()
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in TESTS[module].split())


@pytest.mark.parametrize(("module", "old", "new"), EQUIVALENT)
def test_an_equivalent_mutant_is_one_of_a_line_that_is_there(module, old, new):
    code = (ROOT / "captum_fam" / f"{module}.py").read_text(encoding="utf-8")
    assert old != new
    assert old in " ".join(line.strip() for line in code.splitlines())
