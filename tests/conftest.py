"""How `make test` distributes the tests over processes.

The tests of a file stay in one process, and all tests that start Ray share one, which begins first because it
takes longest.  `make fleets` runs FLEET_TESTS, which take longer than all others together.  A test with Ray
starts dozens of processes: it has a second try, and the summary counts those.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from tests import service_settings
from tests.patience import slowness

RAY_TESTS = "tests/graph/"
FLEET_TESTS = tuple(
    RAY_TESTS + name
    for name in (
        *("test_autoscaling", "test_cluster_doctor", "test_examples", "test_fleet", "test_node_"),
        *("test_one_gpu", "test_read_only_root", "test_rolling_upgrade"),
    )
)  # many nodes or models


# hypothesis fails an example that takes over 200 ms: on a busy machine any may
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


class RayTestsInOneProcess(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return RAY_TESTS if nodeid.startswith(RAY_TESTS) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayTestsInOneProcess | None:
    """None: the one that `--dist` names, as benchmarks/exact.py does for the tests of one file."""
    return RayTestsInOneProcess(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests that run after those of the graph in the same process do not see its service's settings."""
    if item.nodeid.startswith(RAY_TESTS):
        return (yield)
    with service_settings.hidden():
        return (yield)


class ImmediateFailureReport:
    """Prints a failure when it happens instead of at the end of the run."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write_line(f"\nFAILED {report.when} of {report.nodeid}\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there
def pytest_configure(config: pytest.Config) -> None:
    slowness()  # measured before the workers start, which inherit it
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ImmediateFailureReport(terminal))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(FLEET_TESTS):
            item.add_marker(pytest.mark.fleet)
        if item.nodeid.startswith(RAY_TESTS):
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=lambda item: not item.nodeid.startswith(RAY_TESTS))
