"""How the suite shares out its tests among processes (`make test`): the tests of a file stay together, and
all that start a Ray stay in one process, one after another. That one begins first, as it takes longest.
Those in FLEETS take longer than all others together: `make fleets` runs them, `make test` leaves them out.
A test with a Ray, dozens of processes on perhaps a busy machine, has a second try; the summary counts them.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

WITH_RAY = "tests/graph/"
FLEETS = tuple(
    WITH_RAY + name
    for name in ("test_autoscaling", "test_examples", "test_fleet", "test_node_", "test_one_gpu")
)  # many nodes or models


class OneRay(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return WITH_RAY if nodeid.startswith(WITH_RAY) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRay:
    return OneRay(config, log)


class ToldAtOnce:
    """A failure is printed when it happens, not half an hour later when all else has run."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write_line(f"\nFAILED {report.when} of {report.nodeid}\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ToldAtOnce(terminal))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(FLEETS):
            item.add_marker(pytest.mark.fleet)
        if item.nodeid.startswith(WITH_RAY):
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=lambda item: not item.nodeid.startswith(WITH_RAY))
