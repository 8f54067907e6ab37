"""How the commands speak."""

import sys
from pathlib import Path

import click

from captum_fam._files import printable


def say(line: object, err: bool = False) -> None:
    """Prints a line of ours, which may hold names and messages of others, in safe characters."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    click.echo(printable(line).encode(encoding, "backslashreplace").decode(encoding), err=err)


def short(path: Path, longest: int = 30) -> str:
    name = printable(path.name)
    return name if len(name) <= longest else f"{name[: longest // 2]}\N{HORIZONTAL ELLIPSIS}{name[-longest // 2 :]}"
