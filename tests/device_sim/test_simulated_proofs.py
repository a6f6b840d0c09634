"""Trials of batch sizes and padded forwards at real size, on the simulated device.

It has no values to compare: the scenario says whether trials find equal bits.
"""

from __future__ import annotations

import pytest

from tests.device_sim.expectations import GIB, Part, denoising, ends, faults, waits_per_step
from tests.device_sim.simulation import needs_compiler, simulate

pytestmark = [needs_compiler, pytest.mark.device_sim_long]

WAVES = ("--wave", "requests=1,steps=1", "--wave", "proven=true,requests=5,steps=3")


def served(model: str, *options: str) -> list[Part]:
    return simulate(model, "--rows", "8", *options, *WAVES, quiet_s=300.0)


@pytest.fixture(scope="module")
def padded() -> list[Part]:
    return served("flux", "--exact", "prefer")


@pytest.fixture(scope="module")
def unproven() -> dict[str, Part]:
    return {exact: served("sd15", "--exact", exact, "--no-proofs")[-1] for exact in ("prefer", "strict")}


def test_after_the_trials_five_rows_run_as_six(padded: list[Part]) -> None:
    assert ends(padded[-1]) == ["Done"] * 5
    assert max(forward["rows"] for forward in denoising(padded[-1])) == 6


def test_trials_and_padded_forwards_mix_no_devices_and_wait_for_nothing(padded: list[Part]) -> None:
    assert faults(padded) == []
    assert waits_per_step(padded[-1]) == set()


def test_trials_take_the_memory_of_their_rows(padded: list[Part]) -> None:
    trials = [f for part in padded for f in part["forwards"] if f["is_proof"] and f["rows"] > 1]
    transformer = [f for f in trials if f["module"] == "FluxTransformer2DModel.forward"]

    assert {forward["rows"] for forward in transformer} == {2, 3, 4, 6, 8}
    assert all(forward["peak"] / GIB / forward["rows"] < 0.55 for forward in transformer)


def test_where_no_size_is_proven_prefer_shares_forwards_and_strict_does_not(
    unproven: dict[str, Part],
) -> None:
    rows = {exact: max(f["rows"] for f in denoising(part)) for exact, part in unproven.items()}

    assert [ends(part) for part in unproven.values()] == [["Done"] * 5] * 2
    assert rows == {"prefer": 8, "strict": 2}
