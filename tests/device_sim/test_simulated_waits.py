"""Where the host waits for the simulated device: never in every step, and seldom once per request."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device_sim.guard import compiler
from tests.device_sim.simulation import simulate

pytestmark = pytest.mark.skipif(compiler() is None, reason="the simulated device needs g++")

Report = dict[str, Any]
REQUESTS = 3


@pytest.fixture(scope="module", params=["pndm", "dpmpp_2m_sde"])
def sd15(request: pytest.FixtureRequest) -> Report:
    options = ("--requests", str(REQUESTS), "--rows", "8", "--previews", "2", "--images", "2")
    return simulate("sd15", *options, "--scheduler", request.param)


@pytest.fixture(scope="module")
def flux() -> Report:
    return simulate("flux", "--requests", str(REQUESTS), "--rows", "4")


def waits(report: Report, **wanted: Any) -> list[dict[str, Any]]:
    """Of the engine's thread."""
    return [
        sync
        for sync in report["syncs"]
        if sync["thread"] == "engine" and all(sync[name] == value for name, value in wanted.items())
    ]


def test_no_step_waits_for_the_device(sd15: Report) -> None:
    assert [request["last"] for request in sd15["requests"]] == ["Done"] * REQUESTS
    assert waits(sd15, per_step=True) == []
    assert sd15["hazards"] == {}


def test_a_request_waits_once_in_our_code_and_otherwise_where_it_begins(sd15: Report) -> None:
    ours = [sync for sync in waits(sd15) if sync["source"] == sync["ours"]]

    assert [sync["count"] for sync in ours] == [REQUESTS]  # whether the last latents are finite
    assert "_check_finite" in ours[0]["source"]


def test_later_flux_requests_do_not_read_their_position_ids(flux: Report) -> None:
    read = [sync["count"] for sync in waits(flux) if "digest" in sync["source"]]

    assert waits(flux, per_step=True) == []
    assert read == [2]  # of the first request
    assert flux["hazards"] == {}
