"""Where the host waits for the simulated device: never in every step, and seldom once per picture."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device_sim.expectations import Part, ends, faults, waits_per_step
from tests.device_sim.simulation import needs_compiler, simulate

pytestmark = needs_compiler

SCHEDULERS = ("pndm", "dpmpp_2m_sde")
REQUESTS, PICTURES = 3, 2  # of each request


@pytest.fixture(scope="module")
def run() -> list[Part]:
    waves = [word for scheduler in SCHEDULERS for word in ("--wave", f"scheduler={scheduler}")]
    options = ("--requests", str(REQUESTS), "--rows", "8", "--previews", "2", "--images", str(PICTURES))
    return simulate("sd15", *options, *waves)


@pytest.fixture(params=SCHEDULERS)
def sd15(run: list[Part], request: pytest.FixtureRequest) -> Part:
    return run[1 + SCHEDULERS.index(request.param)]


def test_no_step_waits_for_the_device(sd15: Part) -> None:
    assert ends(sd15) == ["Done"] * REQUESTS
    assert waits_per_step(sd15) == set()
    assert faults([sd15]) == []


def test_a_picture_waits_once_in_our_code_and_otherwise_where_it_begins(sd15: Part) -> None:
    ours: list[dict[str, Any]] = [
        sync for sync in sd15["syncs"] if sync["thread"] == "engine" and sync["source"] == sync["ours"]
    ]

    assert [sync["count"] for sync in ours] == [REQUESTS * PICTURES]  # whether the last latents are finite
    assert "_check_finite" in ours[0]["source"]
