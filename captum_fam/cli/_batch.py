"""``captum-fam batch``: many pairs of images, as a job that can be stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captum_fam.cli._explain import asked_of
from captum_fam.cli._rows import check_method
from captum_fam.cli._say import say

SOME_FAILED = 1  # the status, where others were explained


def batch(pairs: Sequence[str], output: Path, **options: Any) -> int:
    try:
        from captum_fam.batch import explain_pairs
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'captum-fam[batch]'") from error

    asked = asked_of(options["contrast"], options["threshold"], [], [])
    check_method(options["method"], asked, options["similarity"], 1)
    found = explain_pairs(pairs, output, **options)
    if not found.explained:
        raise ValueError(
            f"none of {found.failed} pairs could be explained ({_kinds(found.failures)}), see {output}; the first:"
            f" {found.error}"
        )
    say(f"encoder {options['encoder']}" + (f", layer {found.layer}" if found.layer else ""))
    failed = f" ({_kinds(found.failures)}); the first: {found.error}" if found.failed else ""
    say(f"explained {found.explained} pairs, {found.failed} failed{failed}")
    say(f"wrote {output}")
    return SOME_FAILED if found.failed else 0


def _kinds(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in failures.items())
