"""The command ``captum-fam``."""

import logging
import sys
from pathlib import Path

import click

from captum_fam import __version__, _interrupt
from captum_fam._files import recorded_warnings
from captum_fam.cli._batch import batch
from captum_fam.cli._common import say
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


for _one in (batch, explain, explore, compare):
    command.add_command(_one)


def main() -> None:
    """Runs the command; an error is one line on stderr and exit status 2."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of each glyph that a font lacks
    try:
        with _interrupt.raised(), recorded_warnings() as warned:
            status = command.main(sys.argv[1:] or ["--help"], "captum-fam", standalone_mode=False) or 0
            for text, path in () if status > 1 else warned:
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
        context = getattr(error, "ctx", None)
        see = f" (see {context.command_path} --help)" if context else ""
        return " ".join(error.format_message().split()) + see
    return " ".join(str(error).split()) if isinstance(error, ValueError) else one_line(error)
