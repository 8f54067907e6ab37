"""What is imported when: a command's help waits for no library, and the package brings none but Captum's."""

import os
import subprocess
import sys

import pytest

import captum_fam
from captum_fam.comparison import DEFAULT

# Prints, after all else, which libraries (neither Python's own nor there from its start) a program has imported.
LIBRARIES = """
import atexit, sys
start = {name.partition(".")[0] for name in sys.modules}
def libraries():
    found = {name.partition(".")[0] for name in sys.modules} - start - set(sys.stdlib_module_names)
    return sorted(found)
"""
COMMAND = LIBRARIES + "atexit.register(lambda: print(*libraries()))\nfrom captum_fam.cli import main\nmain()"


def fresh(program, *arguments, **variables):
    """Runs a program in a process of its own: its exit status, its lines, what it said of errors."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=os.environ | variables
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("command", [[], ["batch"], ["compare"], ["demo"], ["explain"], ["explore"]], ids="".join)
def test_help_waits_for_no_library(command):
    status, lines, errors = fresh(COMMAND, *command, "--help")
    assert (status, errors, lines[-1]) == (0, "", "captum_fam click")
    assert lines[0].startswith(" ".join(["Usage: captum-fam", *command, "["]))


def test_neither_does_the_version():
    status, lines, _ = fresh(COMMAND, "--version")
    assert (status, lines[-1]) == (0, "captum_fam click")
    assert captum_fam.__version__ in lines[0]


MISTAKES = {
    "no such command": (["explian"], "explian"),
    "an unknown option": (["explain", "a.png", "b.png", "--layers", "x"], "--layers"),
    "no argument": (["compare", "a.png"], "REFERENCE"),
    "not a number": (["batch", "a", "-o", "b", "--workers", "none"], "--workers"),
    "not a choice": (["explore", "a.png", "b.png", "--similarity", "l2"], "--similarity"),
    "nothing to compare with": (["explain", "a.png"], "--text"),
    "an empty sentence": (["explain", "a.png", "--text", " "], "--text"),
}


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_nor_does_an_error_of_usage(arguments, named):
    status, lines, errors = fresh(COMMAND, *arguments)
    assert (status, lines) == (2, ["captum_fam click"])
    assert named in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "position", "offered"),
    [("captum-fam exp", "1", {"plain,explain", "plain,explore"}), ("captum-fam compare --siz", "2", {"plain,--size"})],
)
def test_nor_does_completion_in_a_shell(words, position, offered):
    asked = {"_CAPTUM_FAM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": position}
    _, lines, errors = fresh(
        COMMAND.replace("import atexit, sys", "import atexit, sys\nsys.argv = ['captum-fam']"), **asked
    )
    assert errors == ""
    assert {*lines[:-1]} == offered
    assert lines[-1] == "captum_fam click"


def test_the_help_of_compare_names_what_is_compared():
    _, lines, _ = fresh(COMMAND, "compare", "--help")
    assert f"[default: {', '.join(DEFAULT)}]" in " ".join(" ".join(lines).split())


def test_a_library_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12:\\n cannot open')")
    status, lines, errors = fresh(COMMAND, "explain", "a.png", "b.png", PYTHONPATH=str(tmp_path))
    assert (status, errors) == (2, "captum-fam: ImportError: libcudart.so.12: cannot open\n")
    assert "torch" not in lines[-1].split()


def test_the_package_imports_nothing_before_it_is_used():
    assert fresh(LIBRARIES + "import captum_fam\nprint(*libraries())") == (0, ["captum_fam"], "")


def test_its_classes_bring_no_library_that_captum_does_not():
    program = LIBRARIES + (
        "import torch, captum.attr\nbefore = libraries()\n"
        "from captum_fam import *\nprint(*{*libraries()} - {*before})\nprint(FeatureActivationMap.__module__)"
    )
    assert fresh(program) == (0, ["captum_fam", "captum_fam.methods.feature_activation_map"], "")


@pytest.fixture
def unused():
    """The package as if nobody had imported it."""

    def take_away():
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "captum_fam"}

    before = take_away()
    yield
    take_away()
    sys.modules.update(before)


@pytest.mark.parametrize(
    "use",
    [
        "from captum_fam import FeatureActivationMap, explain_hits\nassert callable(explain_hits)",
        "from captum_fam import *\nassert callable(explain_hits)",
        "import captum_fam\nassert captum_fam.RelevanceCam.__name__ == 'RelevanceCam'",
        "import captum_fam\nassert captum_fam.visualization.visualize_pair is captum_fam.visualize_pair",
        "import captum_fam\nassert {*captum_fam.__all__, '__version__'} <= {*dir(captum_fam)}",
        "import captum_fam\nassert hasattr(captum_fam, 'Relax') and not hasattr(captum_fam, 'Rilax')",
        "import captum_fam\nassert not hasattr(captum_fam, '__wrapped__')",
        "import pickle\nfrom captum_fam import Relax\nassert pickle.loads(pickle.dumps(Relax)) is Relax",
        "from captum_fam import batch\nassert batch.explain_pairs",
        "from captum_fam.score import SimilarityScore\nimport captum_fam\n"
        "assert captum_fam.SimilarityScore is SimilarityScore",
        "import captum_fam\ncaptum_fam.explain_hits = 1\ncaptum_fam.Relax, dir(captum_fam)\n"
        "assert captum_fam.explain_hits == 1",
    ],
)
def test_each_way_to_a_name_is_open_from_the_start(unused, use):
    exec(use, {})


def test_a_misspelt_name_is_said_and_python_can_offer_the_right_one(unused):
    import captum_fam

    with pytest.raises(AttributeError, match="module 'captum_fam' has no attribute 'RelevanceCAM'") as raised:
        captum_fam.RelevanceCAM  # noqa: B018
    assert (raised.value.name, raised.value.obj) == ("RelevanceCAM", captum_fam)  # from which it makes its hint


def test_a_module_comes_by_itself():
    program = LIBRARIES + "import captum_fam\ncaptum_fam._files.printable\nprint(*libraries())"
    assert fresh(program) == (0, ["captum_fam"], "")
