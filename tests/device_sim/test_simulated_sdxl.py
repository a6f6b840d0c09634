"""SDXL at real size, served by the real replica on the simulated device."""

from __future__ import annotations

import pytest

from tests.device_sim.expectations import (
    GIB,
    Part,
    decoding,
    denoising,
    ends,
    faults,
    full_forward,
    grown_gib,
    lora_kernels,
    waits_per_step,
)
from tests.device_sim.simulation import needs_compiler, simulate

pytestmark = needs_compiler

LAYERS = 739  # of a LoRA over all linear layers of the blocks


@pytest.fixture(scope="module")
def run() -> list[Part]:
    waves = ("steps=4", "steps=3,loras=4,rank=8", "steps=4,requests=2,control=canny,cancel_after=2")
    return simulate("sdxl", "--rows", "8", *(word for wave in waves for word in ("--wave", wave)))


@pytest.fixture(scope="module")
def small_gpu() -> Part:
    return simulate("sdxl", "--memory-gib", "8.6", "--rows", "16", "--requests", "8", "--steps", "3")[1]


def test_every_request_ends_with_its_picture_but_the_one_that_is_cancelled(run: list[Part]) -> None:
    _, plain, with_loras, with_control = run

    assert ends(plain) == ends(with_loras) == ["Done"] * 4
    assert ends(with_control) == ["Done", "Step"]


def test_no_operator_mixes_devices_and_no_streams_race(run: list[Part]) -> None:
    assert faults(run) == []


def test_no_step_waits_for_the_device(run: list[Part]) -> None:
    assert [waits_per_step(part) for part in run[1:]] == [set(), set(), set()]


def test_guided_requests_share_forwards_with_and_without_loras(run: list[Part]) -> None:
    _, plain, with_loras, with_control = run

    assert max(forward["rows"] for forward in denoising(plain)) == 8
    assert max(forward["rows"] for forward in denoising(with_loras)) == 8
    assert [forward["rows"] for forward in denoising(with_control)][-1] == 2  # the other is cancelled


def test_loras_cost_kernels_only_in_the_layers_they_change(run: list[Part]) -> None:
    plain, with_loras = full_forward(run[1]), full_forward(run[2])

    assert plain["kernels"] < 2280
    assert lora_kernels(plain) == 0
    assert LAYERS <= lora_kernels(with_loras) <= 3 * LAYERS, "the plain product of each layer among them"
    assert with_loras["kernels"] < 1.45 * plain["kernels"]
    assert with_loras["flops"] < 1.03 * plain["flops"]


def test_weights_and_activations_take_their_bytes(run: list[Part]) -> None:
    largest = full_forward(run[1])
    per_picture = [forward["peak"] / GIB / forward["rows"] for forward in decoding(run[1])]

    assert run[0]["memory"]["after"] / GIB == pytest.approx(6.46, abs=0.05)
    assert largest["peak"] / GIB / largest["rows"] == pytest.approx(0.155, abs=0.01)
    assert per_picture == pytest.approx([1.88] * len(per_picture), abs=0.02)


def test_a_wave_of_requests_leaves_only_cached_prompts_and_loaded_weights(run: list[Part]) -> None:
    _, plain, with_loras, with_control = run

    assert grown_gib(plain) < 0.05
    assert grown_gib(with_loras) < 1.0  # four LoRAs stay on the device
    assert grown_gib(with_control) == pytest.approx(2.34, abs=0.02)  # the ControlNet


def test_requests_that_do_not_fit_together_are_served_in_parts(small_gpu: Part) -> None:
    failed = [forward for forward in small_gpu["forwards"] if forward["failed"]]

    assert {forward["failed"] for forward in failed} == {"OutOfMemoryError"}
    assert small_gpu["memory"]["peak"] <= small_gpu["memory"]["limit"]
    assert ends(small_gpu) == ["Done"] * 8
