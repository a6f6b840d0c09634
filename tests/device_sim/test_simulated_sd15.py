"""Stable Diffusion 1.5 at real size, served by the real replica on the simulated device."""

from __future__ import annotations

import pytest

from tests.device_sim.expectations import GIB, Part, denoising, ends, faults, full_forward, waits_per_step
from tests.device_sim.simulation import needs_compiler, simulate

pytestmark = [needs_compiler, pytest.mark.device_sim_long]


@pytest.fixture(scope="module")
def run() -> list[Part]:
    waves = ("scheduler=auto", "scheduler=dpmpp_2m", "scheduler=euler_a", "sizes=512x512/512x768,images=2")
    words = [word for wave in waves for word in ("--wave", wave)]
    return simulate("sd15", "--rows", "8", "--steps", "5", *words, quiet_s=200.0)


def test_requests_of_every_noise_scheduler_end_with_their_pictures(run: list[Part]) -> None:
    assert [ends(part) for part in run[1:]] == [["Done"] * 4] * 4


def test_no_operator_mixes_devices_and_no_streams_race(run: list[Part]) -> None:
    assert faults(run) == []


def test_no_step_waits_for_the_device(run: list[Part]) -> None:
    assert [waits_per_step(part) for part in run[1:]] == [set()] * 4


def test_guided_requests_fill_the_rows(run: list[Part]) -> None:
    assert [max(forward["rows"] for forward in denoising(part)) for part in run[1:]] == [8, 8, 8, 8]


def test_a_row_takes_its_activations(run: list[Part]) -> None:
    largest = full_forward(run[1])

    assert largest["peak"] / GIB / largest["rows"] == pytest.approx(0.064, abs=0.005)
