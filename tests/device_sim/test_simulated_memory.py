"""The account of the device's memory against the bytes that models of real size allocate."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device_sim.expectations import ends, planned_bytes
from tests.device_sim.simulation import needs_compiler, simulate

pytestmark = needs_compiler

# one request for several pictures: with more requests, lanes overlap as the machine has it
OPTIONS = {
    "sdxl": ("--requests", "1", "--images", "4", "--rows", "8", "--steps", "3"),
    "flux": ("--requests", "1", "--images", "2", "--rows", "4", "--steps", "2", "--loras", "1"),
}

Part = dict[str, Any]


@pytest.fixture(scope="module", params=OPTIONS)
def parts(request: pytest.FixtureRequest) -> list[Part]:
    return simulate(request.param, *OPTIONS[request.param], quiet_s=120.0)


def test_the_account_is_within_a_tenth_of_the_peak(parts: list[Part]) -> None:
    served = parts[-1]

    error = planned_bytes(served) / served["memory"]["peak"] - 1

    assert ends(served) == ["Done"]
    assert 0 <= error <= 0.1


def test_weights_are_counted_as_allocated(parts: list[Part]) -> None:
    loaded = parts[0]["memory"]

    assert loaded["account"]["weights"] == pytest.approx(loaded["after"], rel=0.001)
