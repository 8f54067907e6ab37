"""The command ``captum-fam``."""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from captum_fam import __version__, _interrupt
from captum_fam._files import recorded_warnings
from captum_fam.cli._common import encoder_options, say
from captum_fam.cli._compare import compare
from captum_fam.cli._explain import explain
from captum_fam.cli._explore import explore
from captum_fam.encoders import one_line
from captum_fam.images import check_output, write_figure


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Which parts of an image make its embedding similar to another's."""


@command.command()
@click.option("-o", "--output", type=Path, default=Path("captum_fam_demo.png"), show_default=True, help="PNG to write.")
def demo(output: Path) -> None:
    """Explain a collage of photographs with the bundled encoder; needs no network.

    Writes a figure, and beside it a page to explore in a browser, OUTPUT with .html in place of .png.
    """
    from captum_fam.demo import demo_figure, demo_page

    page = output.with_suffix(".html")
    check_output(output, ".png")
    check_output(page, ".html")
    figure, table = demo_figure()
    write_figure(figure, output)
    demo_page().save(page)
    click.echo("\n".join(table))
    click.echo()
    say(f"wrote {output}")
    say(f"wrote {page}: open it in a browser")


@command.command()
@click.argument("pairs", type=Path)
@click.option("-o", "--output", type=Path, required=True, help="Folder of Parquet files to write, or to finish.")
@click.option("--root", type=Path, default=Path(), help="Where relative paths start.  [default: the current folder]")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes, each with its own encoder.  [default: one for each CPU, or each GPU with --device cuda]",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Pairs that are explained at once."
)
@click.option(
    "--part-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Pairs in each file: what a stop can cost each worker.",
)
@encoder_options
def batch(pairs: Path, output: Path, **options: Any) -> None:
    """
    Explain each pair of images that the file PAIRS lists.

    PAIRS is Parquet or CSV with the columns query, reference and, if there is one, id. The
    folder OUTPUT gets a row for each pair: its score, the query's map for the reference, or
    the error. Stopped at any moment and started again, it finishes what is left.
    """
    try:
        from captum_fam.batch import explain_pairs
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'captum-fam[batch]'") from error

    found = explain_pairs(pairs, output, **options)
    if not found.explained:
        raise ValueError(f"none of {found.failed} pairs could be explained, see {output}; the first: {found.error}")
    say(f"encoder {options['encoder']}, layer {found.layer}")
    say(f"explained {found.explained} pairs, {found.failed} failed" + (f": {found.error}" if found.error else ""))
    say(f"wrote {output}")


for _one in (explain, explore, compare):
    command.add_command(_one)


def main() -> None:
    """Runs the command; an error is one line on stderr and exit status 2."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of each glyph that a font lacks
    try:
        with _interrupt.raised(), recorded_warnings() as warned:
            status = command.main(sys.argv[1:] or ["--help"], "captum-fam", standalone_mode=False) or 0
            for text, path in () if status else warned:
                say(f"captum-fam: warning: {text}" + (f" ({path})" if path else ""), err=True)
    except (click.Abort, KeyboardInterrupt):
        say("captum-fam: interrupted", err=True)
        status = _interrupt.STATUS
    except Exception as error:
        say(f"captum-fam: {_message(error)}", err=True)
        status = 2
    sys.exit(status)


def _message(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return " ".join(error.format_message().split())
    return " ".join(str(error).split()) if isinstance(error, ValueError) else one_line(error)
