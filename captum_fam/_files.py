"""Files of the user, on disk or in a store: whether they can be read, their names, and warnings about them."""

import logging
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

FOLDER = "a folder"
_KINDS = {stat.S_IFREG: "", stat.S_IFDIR: FOLDER, stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def irregular(path: Path) -> str:
    """
    What a path is instead of a regular file, or "". A pipe may make its reader wait for ever, and a device may have no
    end.

    Raises:
        OSError: the path does not exist, or cannot be reached.
    """
    return _KINDS.get(stat.S_IFMT(path.stat().st_mode), "a device")


class StoreError(ValueError):
    """A store cannot be read, for another reason than a missing file."""


def is_address(path: Path | str) -> bool:
    """Whether a path is an address for fsspec: s3://bucket/photo.jpg, zip://photo.jpg::s3://bucket/photos.zip."""
    text = path if isinstance(path, str) else path.as_posix().replace(":/", "://", 1)  # a slash of which is lost
    return re.match(r"([a-z][a-z\d+.-]+::)*[a-z][a-z\d+.-]+://", text) is not None  # a letter alone is a drive


def located(path: Path | str) -> Path | str:
    """
    A path of the file system, or an address in a store as text; file:///photo.jpg is a path.

    Raises:
        ValueError: an address came as a Path.
    """
    if not is_address(path):
        return Path(path)
    if isinstance(path, Path):
        raise ValueError(f"{path} is an address, and a Path loses one of its slashes: pass it as text")
    if not path.startswith(("file://", "local://")):
        return path
    from fsspec.core import strip_protocol

    return Path(strip_protocol(path))


def within(root: Path | str, path: str) -> Path | str:
    """Where a file is: below the root, if its path is relative."""
    found = located(path)
    if isinstance(found, str) or found.is_absolute():
        return found
    return root / found if isinstance(root, Path) else f"{root}{'' if root.endswith('/') else '/'}{path}"


@contextmanager
def store(address: str) -> Iterator[tuple[Any, str]]:
    """
    The file system of fsspec for an address, and the path there.

    Raises:
        FileNotFoundError: the store has no such file.
        StoreError: the store fails in another way, here or within the context.
    """
    try:
        from fsspec.core import url_to_fs  # most have no addresses

        yield url_to_fs(address)
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise StoreError(f"cannot read {address}: {error}") from error
    except Exception as error:  # each library has its own kinds
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise StoreError(
            f"cannot read {address} ({why}): check the address, the network and your credentials"
        ) from error


def opened(path: Path | str) -> IO[bytes]:
    """Opens a file, or an address, to read from."""
    if isinstance(path, Path):
        return path.open("rb")
    with store(path) as (system, name):
        file: IO[bytes] = system.open(name)
        return file


def fetched(address: str) -> bytes:
    """The whole content of an address, in one request where the store allows it."""
    with store(address) as (system, name):
        content: bytes = system.cat_file(name)
        return content


def printable(text: object) -> str:
    """Text to print: control characters, and bytes of names that are no UTF-8, are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def utf8(text: object) -> str:
    """Text for programs, whose JSON must be UTF-8: only those bytes are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


_read = threading.local()


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Within the context, warnings of this thread are about this file."""
    _read.path = path
    try:
        yield
    finally:
        _read.path = None


@contextmanager
def recorded_warnings() -> Iterator[dict[tuple[str, str], None]]:
    """Records the warnings of all threads, each once: its text, and the file that was being read, or ""."""
    found: dict[tuple[str, str], None] = {}

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        path = getattr(_read, "path", None)
        if issubclass(category, UserWarning) or (path and issubclass(category, RuntimeWarning)):  # a large image
            found[" ".join(str(message).split()), str(path or "")] = None

    pillow = logging.getLogger("PIL")
    level = pillow.level
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):  # for each file, unless the user has set another filter
            warnings.simplefilter("always", category, append=True)
        warnings.showwarning = show
        pillow.setLevel(logging.CRITICAL)  # an error that it logs it raises, too
        try:
            yield found
        finally:
            pillow.setLevel(level)
