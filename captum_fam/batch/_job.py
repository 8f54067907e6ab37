"""The folder of a batch job: the options of the job, and a lock that lets one run work in it."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from captum_fam._files import irregular, opened
from captum_fam.batch._part import JOB, LOCK, PARTIAL, whole
from captum_fam.encoders import one_line

_FILES = ("pairs", "weights", "reference_embeddings")  # whose digest tells nobody anything


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Within the context, only this run works in the folder. If no job is made, the folder is left as it was."""
    try:
        read_job(output)  # before a folder of others gets a lock
        made = [folder for folder in (output, *output.parents) if not folder.exists()]
        mine = not os.path.lexists(output / LOCK)
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK, timeout=0).acquire()
    except Timeout:
        raise ValueError(f"another run is at work in {output}: wait for it, or pass another folder with -o") from None
    except OSError as error:
        raise ValueError(f"cannot write to {output} ({one_line(error)}): pass another folder with -o") from error
    with lock:
        try:
            yield
        finally:
            if mine and not (output / JOB).exists():
                with suppress(OSError):  # for systems where an open file cannot be deleted
                    (output / LOCK).unlink()
                    for folder in made:
                        folder.rmdir()


def digest(path: Path | str) -> str:
    digest = hashlib.sha256()
    with opened(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _started(output: Path) -> list[str]:
    return [path.name for path in output.iterdir() if not path.name.startswith(("_", "."))] if output.is_dir() else []


def seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_job(output: Path) -> dict[str, Any] | None:
    """The options of the job in the folder; None if the folder is new or empty."""
    file = output / JOB
    if not os.path.lexists(file):
        if started := _started(output):
            raise ValueError(f"{output} is not empty (it has {min(started)}): pass another folder with -o")
        return None
    try:
        found: dict[str, Any] = {} if irregular(file) else json.loads(file.read_bytes())
        if found.pop("seal") == seal(found):
            return found
    except Exception:  # whatever is in it
        pass
    raise ValueError(f"{file} is not as this version writes it: pass another folder with -o")


def prepare(
    output: Path, job: dict[str, Any], names: Sequence[str], write: Callable[..., tuple[int, int]]
) -> tuple[int, int]:
    """
    Begins this job in the folder, or finds it there. Returns the number of pairs, and that of pairs
    in a part. ``write`` gets the files of these names to write what all parts share.
    """
    before, file, copies = read_job(output), output / JOB, [output / name for name in names]
    then: dict[str, Any] = before["job"] if before else {}
    if before and then != job:
        if _started(output):
            changed = [
                name if name in _FILES else f"{name} ({then.get(name)!r} then)"
                for name in job
                if then.get(name) != job[name]
            ]
            raise ValueError(
                f"{output} holds a job of other {', '.join(changed)}: pass the same, or another folder with -o"
            )
        file.unlink()  # comes first: this file says that the pairs are complete and belong to the job
    if before is None or then != job or not all(map(os.path.lexists, copies)):
        with ExitStack() as stack:
            total, size = write(*[stack.enter_context(whole(copy)) for copy in copies])
        before = {"job": job, "pairs": total, "part_size": size, "sha256": [digest(copy) for copy in copies]}
        with whole(file) as partial:
            partial.write_text(json.dumps(before | {"seal": seal(before)}, indent=2))
    else:
        for copy, sha256 in zip(copies, before["sha256"]):
            if irregular(copy) or digest(copy) != sha256:
                raise ValueError(f"{copy} is not as this job wrote it: delete it, and start again")
    for path in output.iterdir():
        if re.fullmatch(rf"{PARTIAL}\d+-[0-9a-f]{{32}}", path.name) and path.is_file():
            path.unlink()
    return int(before["pairs"]), int(before["part_size"])
