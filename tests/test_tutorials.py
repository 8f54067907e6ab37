"""The notebooks are kept as they were run, from top to bottom and without an error."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "tutorials").glob("*.ipynb"))
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_readme_lists_the_notebooks():
    assert re.findall(r"\(tutorials/(.*?)\)", README) == [path.name for path in NOTEBOOKS]


def test_cells_were_run_in_order_and_outputs_are_kept(notebook):
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert "display_data" in kinds or "execute_result" in kinds


def test_the_first_cell_installs_what_is_missing(notebook):
    assert '%pip install --quiet "{source}[tutorials]"' in "".join(code(notebook)[0]["source"])


def test_the_end_says_what_can_go_wrong(notebook):
    headings = [
        line
        for cell in notebook["cells"]
        if cell["cell_type"] == "markdown"
        for line in "".join(cell["source"]).splitlines()
        if line.startswith("#")
    ]
    assert "What can go wrong" in headings[-1]


def test_nothing_of_the_machine_is_shown(notebook):
    assert not re.search(r"/(work|tmp|home|root|usr)/|site-packages", json.dumps(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_not_large(path):
    assert path.stat().st_size < 1_000_000
