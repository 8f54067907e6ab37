"""What libraries do for the explanation of a similarity: each cell of the table is tried, on a tiny random encoder.

    pip install 'captum-fam[test]' xaitk-saliency && python -m benchmarks.peers

writes ``peers.md`` with the date and the versions.
"""

import contextlib
import datetime
import importlib.util
import inspect
import io
import platform
import re
import textwrap
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from benchmarks import peers_rows_encoders, peers_rows_tools  # noqa: F401  # their rows
from benchmarks.peers_rows import Question
from benchmarks.report import table

OUTPUT = Path(__file__).with_suffix(".md")
LIBRARIES = {  # its name in the rows: that of the table, its folder, the package that has its version
    "captum_fam": ("captum_fam", "captum_fam", "captum-fam"),
    "captum": ("Captum", "captum", "captum"),
    "grad_cam": ("pytorch-grad-cam", "pytorch_grad_cam", "grad-cam"),
    "torchcam": ("torchcam", "torchcam", "torchcam"),
    "xaitk": ("xaitk-saliency", "xaitk_saliency", "xaitk-saliency"),
}
PAGE = """# Beside other libraries

Made by `python -m benchmarks.peers`, which tries each cell, on a CPU, {date}, with
{versions}.

What can each library do for the explanation of a similarity, and how much must you write yourself?

* *yes*: the library did it, and its result passed the check.
* *by hand (n lines)*: the same, with n lines that you write yourself. Lines of a helper count only in the first row
  that uses it.
* *with Captum*: a class of Captum did it, on a `SimilarityScore`.
* *no*: what we tried failed, as listed below, or no public name of the library promises such a thing.

One line by hand is not much. The table does not say how good a map is, or what it costs: see [the
study](faithfulness/README.md) and [the costs](cost/README.md).

{table}

What was tried and failed:

{reasons}

The encoder has two convolutions, a mean over the places and a linear head, with random weights. Images are noise of
16 by 16 pixels. Each library is used in the best way that we know from its own pages: pytorch-grad-cam and torchcam
with a custom target, xaitk-saliency with `SBSMStack`, and Captum with any function. The files
`benchmarks/peers_rows*.py` have the rows and their checks.
"""


@cache
def public_names(folder: str) -> frozenset[str]:
    """The public classes, functions and methods of a library, as its source has them."""
    spec = importlib.util.find_spec(folder)
    assert spec is not None
    assert spec.origin is not None
    sources = [file.read_text(encoding="utf-8") for file in Path(spec.origin).parent.rglob("*.py")]
    return frozenset(re.findall(r"^ *(?:class|def) ([A-Za-z]\w*)", "\n".join(sources), re.M))


def outcome(question: type[Question], library: str) -> tuple[str, str | None]:
    """What the table says, and why not."""
    function = getattr(question, library, None)
    if function is None:
        alike = [name for name in sorted(public_names(LIBRARIES[library][1])) if re.search(question.public, name)]
        if alike:
            raise AssertionError(f"{question.name}: {LIBRARIES[library][0]} has {', '.join(alike)}: try it")
        return "no", None
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            wrong = question.check(function)
        except Exception as error:
            wrong = f"{type(error).__name__}: {textwrap.shorten(str(error), 90, placeholder=' ...')}"
    if isinstance(wrong, int):  # a number of methods
        return str(wrong), None
    if wrong:
        return "no", wrong
    lines = sum(by_hand(f) for f in (function, question.helpers.get(library)) if f)
    if library == "captum_fam" and question.with_captum:
        return "with Captum", None
    return (f"by hand ({lines} line{'s' * (lines > 1)})" if lines else "yes"), None


def versions() -> str:
    others = [f"{name} {version(package)}" for name, folder, package in LIBRARIES.values() if folder != "captum_fam"]
    below = f"torch {torch.__version__.partition('+')[0]}", f"Python {platform.python_version()}"
    return ", ".join(["captum_fam as in this repository", *others, *below])


def by_hand(function: Callable[..., Any]) -> int:
    return len(re.findall(r"# by hand$", inspect.getsource(function), re.M))


@click.command(help=__doc__)
def main() -> None:
    torch.set_num_threads(1)
    rows, reasons = [], []
    for question in tqdm(Question.rows):
        found = {library: outcome(question, library) for library in LIBRARIES}
        rows.append([question.name, *(cell for cell, _ in found.values())])
        why = [f"{LIBRARIES[library][0]}: {reason}" for library, (_, reason) in found.items() if reason]
        reasons += [f"* {question.name}. {'; '.join(why)}"] if why else []
    heads = [name for name, *_ in LIBRARIES.values()]
    page = PAGE.format(
        date=datetime.date.today().isoformat(),
        versions=versions(),
        table=table(["", *heads], rows),
        reasons="\n".join(reasons),
    )
    OUTPUT.write_text(page, encoding="utf-8")
    click.echo(page)


if __name__ == "__main__":
    main()
