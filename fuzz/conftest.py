"""How much is tried: ``pytest fuzz --examples 5000``. With the variable CI set, always the same examples."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--examples", type=int, default=60, help="examples of each fuzz test")


def pytest_configure(config):
    settings.register_profile(
        "fuzz",
        max_examples=config.getoption("--examples"),
        deadline=None,
        derandomize="CI" in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("fuzz")


def pytest_terminal_summary(terminalreporter):
    """The figures of docs/promises.md."""
    for report in terminalreporter.getreports(""):  # of setting up and tearing down
        for what, number in report.user_properties:
            terminalreporter.write_line(f"{number} {what}")
