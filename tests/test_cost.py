"""The measurement of cost runs, and explains the same thing by all methods."""

import csv

import pytest
from click.testing import CliRunner

pytest.importorskip("torchcam")
pytest.importorskip("pytorch_grad_cam")
pytest.importorskip("timm")
from benchmarks import cost


def test_a_small_run_writes_its_table_and_figures(tmp_path):
    result = CliRunner().invoke(cost.main, ["--smoke", "--threads", "1", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "README.md").read_text()
    assert "## Goals" in text
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} >= {cost.PLAIN, cost.OURS, cost.CAPTUM}
    assert all(float(row["median"]) > 0 for row in rows if row["quantity"] == cost.TIME)
