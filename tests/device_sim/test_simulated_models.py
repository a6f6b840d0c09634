"""Models of real size on the simulated device, served by the real replica; a process for each."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device_sim.guard import compiler
from tests.device_sim.simulation import simulate

pytestmark = pytest.mark.skipif(compiler() is None, reason="the simulated device needs g++")

Report = dict[str, Any]


@pytest.fixture(scope="module")
def sd15() -> Report:
    return simulate("sd15", "--requests", "3", "--rows", "8")


def test_every_request_ends_with_its_picture(sd15: Report) -> None:
    assert [request["last"] for request in sd15["requests"]] == ["Done"] * 3


def test_no_operator_mixes_devices_and_no_streams_race(sd15: Report) -> None:
    assert sd15["mixing"] == {}
    assert sd15["hazards"] == {}


def test_requests_share_forwards(sd15: Report) -> None:
    rows = [forward["rows"] for forward in sd15["forwards"] if forward["module"].startswith("UNet")]

    assert max(rows) == 6  # three requests with classifier-free guidance
