"""Ctrl-C in the command: one line and exit status 130, at any moment. The package imports it before all else."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = 130  # 128 and the number of the signal, as shells have it


def _end(*_: object) -> None:
    """Ends the process at once: while libraries are imported, as some swallow exceptions, and while Python ends."""
    os.write(2, b"captum-fam: interrupted\n")
    os._exit(STATUS)


def _raise(*_: object) -> None:
    signal.signal(signal.SIGINT, _end)  # a second one waits for nothing
    raise KeyboardInterrupt


def _is_the_command() -> bool:
    argument = getattr(sys, "argv", [""])[0]
    as_module = argument == "-m" and ("-m", "captum_fam") in zip(sys.orig_argv, sys.orig_argv[1:])
    return as_module or Path(argument).stem == "captum-fam"


if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup has it ignored
    signal.signal(signal.SIGINT, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Within the context, Ctrl-C raises an exception."""
    before = signal.getsignal(signal.SIGINT)
    if before not in (_end, signal.default_int_handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
