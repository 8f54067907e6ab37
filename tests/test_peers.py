"""The table of other libraries is what its script gives, and the script can say no."""

import re
from pathlib import Path

import pytest
import torch

LIBRARIES = ("captum", "pyarrow", "pytorch_grad_cam", "sklearn", "torchcam", "transformers", "xaitk_saliency")
for library in LIBRARIES:
    pytest.importorskip(library)
from benchmarks import peers  # noqa: E402  # after the skip
from benchmarks.peers_rows import Question, flaw  # noqa: E402

PAGE = (Path(peers.__file__).with_suffix(".md")).read_text(encoding="utf-8")
(HEAD, _, *ROWS) = (line.strip("| ").split(" | ") for line in re.findall(r"^\|.*\|$", PAGE, re.M))
TABLE = {row[0]: dict(zip(HEAD, row[1:])) for row in ROWS}
QUESTIONS = {question.name: question for question in Question.rows}


def test_the_page_has_the_rows_of_the_script():
    assert [name for name, *_ in peers.LIBRARIES.values()] == HEAD
    assert list(TABLE) == list(QUESTIONS)


def is_measured(library):
    """Ours always is; another library is if it has the version of the page."""
    name = peers.LIBRARIES[library][0]
    return library == "captum_fam" or f"{name} {peers.version(peers.LIBRARIES[library][2])}" in PAGE


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of pytorch-grad-cam's __del__
@pytest.mark.parametrize("name", [name for name in QUESTIONS if "a job" not in name])  # which test_batch.py kills
def test_the_cells_are_what_the_script_gives(name):
    libraries = [library for library in peers.LIBRARIES if is_measured(library)]
    found = {peers.LIBRARIES[library][0]: peers.outcome(QUESTIONS[name], library)[0] for library in libraries}
    assert found == {library: TABLE[name][library] for library in found}


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setattr(Question, "rows", [])

    class Row(Question):
        name = "does it"
        public = "CorrespondenceMap"

        @staticmethod
        def check(run):
            return flaw(run())

        def captum():
            return torch.arange(3.0)

        def grad_cam():
            both = torch.arange(3.0)  # by hand
            return both  # by hand

        def torchcam():
            return torch.ones(3)

        def xaitk():
            raise ValueError("Expected an image.")

    return Row


def test_a_cell_says_yes_by_hand_or_no(row):
    assert peers.outcome(row, "captum") == ("yes", None)
    assert peers.outcome(row, "grad_cam") == ("by hand (2 lines)", None)
    assert peers.outcome(row, "torchcam") == ("no", "the map is constant")
    assert peers.outcome(row, "xaitk") == ("no", "ValueError: Expected an image.")


def test_what_a_library_has_a_name_for_must_be_tried(row):
    with pytest.raises(AssertionError, match=r"^does it: captum_fam has .*CorrespondenceMap.*: try it$"):
        peers.outcome(row, "captum_fam")


def test_the_lines_of_a_helper_count(row):
    row.helpers = {"captum": row.grad_cam}
    assert peers.outcome(row, "captum") == ("by hand (2 lines)", None)


def test_a_map_of_nan_is_none():
    assert flaw(torch.tensor([0.0, torch.nan])) == "not finite"
