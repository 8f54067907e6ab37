"""Which tests reach a line, and how long they take."""

import pickle
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest


class Reached:
    """A plugin of pytest that writes what it has seen into a file, for another process to load."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}
        self.lines: dict[tuple[str, int], set[str]] = defaultdict(set)

    def pytest_sessionstart(self) -> None:
        self.coverage = coverage.Coverage(data_file=None, include=["captum_fam/*"])
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self.coverage.switch_context(item.nodeid)
        begin = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - begin
        self.coverage.switch_context("")
        return result

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        for file in data.measured_files():
            for line, tests in data.contexts_by_lineno(file).items():
                self.lines[str(Path(file).relative_to(Path.cwd())), line] |= set(tests)
        self.file.write_bytes(pickle.dumps((self.seconds, self.lines)))

    def load(self) -> None:
        self.seconds, self.lines = pickle.loads(self.file.read_bytes())

    def tests(self, path: Path, lines: range, files: list[str], draw: random.Random) -> list[str]:
        """Those that reach a line, in random order; after them, of a line that runs on import, all of the files."""
        found = set[str]().union(*(self.lines.get((str(path), line), set()) for line in lines))
        of_files = {test for test in self.seconds if test.partition("::")[0] in files} if "" in found else set[str]()
        reaching, others = sorted(found - {""}), sorted(of_files - found)
        draw.shuffle(reaching)
        draw.shuffle(others)
        return reaching + others
