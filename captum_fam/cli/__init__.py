"""The command ``captum-fam``."""

import logging
import sys

import click

from captum_fam import _interrupt
from captum_fam._files import recorded_warnings
from captum_fam.cli._commands import command
from captum_fam.cli._say import say


def main() -> None:
    """Runs the command; an error is one line on stderr and exit status 2."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of each glyph that a font lacks
    try:
        with recorded_warnings() as warned:
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
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
