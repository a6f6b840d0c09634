"""How the suite shares out its tests among processes (`make test`): the tests of a file stay together, and
all that start a Ray stay in one process, one after another. That one begins first, as it takes longest."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
WITH_RAY = {"graph"}  # folders


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item.path)))
    items.sort(key=lambda item: _group(item.path) != "ray")


def _group(path: Path) -> str:
    inside = path.relative_to(HERE)
    return "ray" if inside.parts[0] in WITH_RAY else inside.as_posix()
