"""How the suite shares out its tests among processes (`make test`): the tests of a file stay together. Those
of the one service that all share stay in one process, those that start clusters of their own in another; they
begin first, as they take longest."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

WITH_RAY = "tests/graph/"
OWN_CLUSTERS = ("test_examples", "test_node_", "test_serve_deploy", "test_weft_serve")


def _place(nodeid: str) -> int:
    """0: on the shared service, 1: on clusters of its own, 2: without Ray."""
    if not nodeid.startswith(WITH_RAY):
        return 2
    return int(nodeid.removeprefix(WITH_RAY).startswith(OWN_CLUSTERS))


class OneRayEach(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        place = _place(nodeid)
        return super()._split_scope(nodeid) if place == 2 else f"{WITH_RAY}{place}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRayEach:
    return OneRayEach(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _place(item.nodeid))
