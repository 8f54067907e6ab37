"""Files of others: which can be read to an end, how their names are shown, and which one a warning is about."""

import logging
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = "a folder"
_KINDS = {stat.S_IFREG: "", stat.S_IFDIR: FOLDER, stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def irregular(path: Path) -> str:
    """
    What a path is in place of a file, or "": who opens a pipe may wait for ever, and a device may have no end.

    Raises:
        OSError: there is nothing, or it cannot be reached.
    """
    return _KINDS.get(stat.S_IFMT(path.stat().st_mode), "a device")


def printable(text: object) -> str:
    """With escapes for what a terminal would obey, and for bytes of names that are no UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def utf8(text: object) -> str:
    """With escapes for those bytes only: for programs, whose JSON must be UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()


_read = threading.local()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Warnings of this thread are about this file."""
    _read.path = path
    try:
        yield
    finally:
        _read.path = None


@contextmanager
def recorded_warnings() -> Iterator[dict[tuple[str, str], None]]:
    """The warnings in all threads, each once: its text, and the file that was being read, or ""."""
    found: dict[tuple[str, str], None] = {}

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        path = getattr(_read, "path", None)
        if issubclass(category, UserWarning) or (path and issubclass(category, RuntimeWarning)):  # a large image
            found[" ".join(str(message).split()), str(path or "")] = None

    pillow = logging.getLogger("PIL")
    level = pillow.level
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):  # for each file, but for who has another filter
            warnings.simplefilter("always", category, append=True)
        warnings.showwarning = show
        pillow.setLevel(logging.CRITICAL)  # an error that it logs it raises, too
        try:
            yield found
        finally:
            pillow.setLevel(level)
