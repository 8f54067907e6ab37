"""
    python -m mutation [--mutants 10] [--seed 0] [MODULE ...]

Breaks a copy of the package in small ways, one at a time, and runs the tests that reach the broken line. They should
fail ("killed"); a mutant that they miss ("survived") is printed: no test looks at what it changes. Those of
`equivalent.py` make no difference that could be tested. Tests that take far longer than they used to have failed too
("timeout"). MODULE is as in `tests.py`, such as `engine/formula`; without, all of them.
"""

import argparse
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not outlive a fork
os.environ.setdefault("CI", "true")  # the same examples of property tests each time
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # which cost more than the tests

from mutation._mutants import sample
from mutation._reached import Reached
from mutation.equivalent import EQUIVALENT
from mutation.tests import TESTS

ROOT = Path(__file__).parent.parent
NEEDED = ("captum_fam", "tests", "pyproject.toml", "README.md", "CONTRIBUTING.md")
SLOW_TO_IMPORT = ("captum.attr", "hypothesis.extra.numpy", "matplotlib.pyplot", "scipy.stats", "skimage", "torchvision")
MEMORY = 24 * 2**30  # bytes of addresses: a mutant may ask for tensors of any size
FIRST = 40  # tests, drawn of all that reach a line; most mutants need no more
KINDS = ("killed", "timeout", "survived", "equivalent")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mutation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--mutants", type=int, default=10, metavar="N", help="of each module; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; default: %(default)s")
    given = parser.parse_args()
    modules = given.modules or list(TESTS)
    if unknown := [name for name in modules if name not in TESTS]:
        parser.error(f"no such MODULE: {', '.join(unknown)}; there are {', '.join(TESTS)}")

    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as copy:
        for name in NEEDED:
            whole = (ROOT / name).is_dir()
            (shutil.copytree if whole else shutil.copy)(ROOT / name, Path(copy, name))
        os.chdir(copy)
        files = dict.fromkeys(f"tests/test_{name}.py" for module in modules for name in TESTS[module].split())
        reached = Reached(Path(copy, "reached.pickle"))
        if run(list(files), 3600, reached) != 0:
            sys.exit(f"Tests fail before anything is broken: pytest {' '.join(files)}")
        reached.load()
        print(f"{len(reached.seconds)} tests of {sum(reached.seconds.values()):.0f} s pass", flush=True)
        counts = {module: tried(module, given.mutants, given.seed, reached) for module in modules}
    print("\n" + table(counts))


def tried(module: str, number: int, seed: int, reached: Reached) -> Counter[str]:
    path = Path("captum_fam", f"{module}.py")
    code = path.read_text(encoding="utf-8")
    counts = Counter[str]()
    for mutant in sample(path, number, seed):
        if (module, mutant.old, mutant.new) in EQUIVALENT:
            counts["equivalent"] += 1
            continue
        files = [f"tests/test_{name}.py" for name in TESTS[module].split()]
        tests = reached.tests(path, mutant.lines, files, random.Random(seed))
        break_into(path, mutant.code)
        found = outcome(tests[:FIRST], reached)
        if found == "survived":
            found = outcome(tests[FIRST:], reached)
        break_into(path, code)
        counts[found] += 1
        if found != "killed":
            print(f"{found}: captum_fam/{module}.py:{mutant.lines[0]}\n  - {mutant.old}\n  + {mutant.new}", flush=True)
    print(f"{module}: {dict(counts)}", flush=True)
    return counts


def break_into(path: Path, code: str) -> None:
    path.write_text(code, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


def outcome(tests: list[str], reached: Reached) -> str:
    if not tests:
        return "survived"
    ended = run(tests, 30 + 4 * sum(reached.seconds[test] for test in tests))
    if ended in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return "timeout"
    return "survived" if ended == 0 else "killed"


def run(tests: list[str], seconds: float, plugin: object = None) -> int:
    """The exit code of pytest, in a process that has the libraries already and nothing of the package."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
        signal.alarm(int(10 * seconds))  # for what waits for ever
        if plugin is None:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
        options = ["-x", "-q", "--tb=short", "--no-header", "--disable-warnings", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*options, *tests], plugins=[plugin] if plugin else []))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def table(counts: dict[str, Counter[str]]) -> str:
    rows = {**counts, "all": sum(counts.values(), Counter[str]())}
    lines = [f"| module | {' | '.join(KINDS)} | found |", "|---|" + "--:|" * (len(KINDS) + 1)]
    for module, of in rows.items():
        found = of["killed"] + of["timeout"]
        share = f"{found / (found + of['survived']):.0%}" if found + of["survived"] else ""
        lines.append(f"| {module} | {' | '.join(str(of[kind]) for kind in KINDS)} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
