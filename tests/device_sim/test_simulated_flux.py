"""FLUX.1-dev at real size, served by the real replica on the simulated device."""

from __future__ import annotations

from itertools import pairwise

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

# uploads the guidance and the scale of its ControlNets in every step
CONTROL_PIPELINE = "diffusers/pipelines/flux/pipeline_flux_controlnet.py:__call__"
LAYERS = 494  # of a LoRA over all linear layers of the blocks


@pytest.fixture(scope="module")
def run() -> list[Part]:
    # long enough for the second one to join on a busy machine, where its control picture takes its time
    waves = ("steps=4", "steps=3,loras=4,rank=8", "steps=10,requests=2,control=canny,cancel_after=2")
    return simulate("flux", "--rows", "4", *(word for wave in waves for word in ("--wave", wave)))


def test_every_request_ends_with_its_picture_but_the_one_that_is_cancelled(run: list[Part]) -> None:
    _, plain, with_loras, with_control = run

    assert ends(plain) == ends(with_loras) == ["Done"] * 4
    assert ends(with_control) == ["Done", "Step"]


def test_no_operator_mixes_devices_and_no_streams_race(run: list[Part]) -> None:
    assert faults(run) == []


def test_no_step_waits_for_the_device(run: list[Part]) -> None:
    _, plain, with_loras, with_control = run

    assert waits_per_step(plain) == waits_per_step(with_loras) == set()
    assert waits_per_step(with_control) == {CONTROL_PIPELINE}


def test_later_requests_do_not_read_their_position_ids(run: list[Part]) -> None:
    reads = [[sync["count"] for sync in part["syncs"] if "batch_key" in sync["source"]] for part in run[1:3]]

    assert reads == [[2], []]  # of the first request


def test_requests_share_forwards_with_and_without_loras(run: list[Part]) -> None:
    _, plain, with_loras, _ = run

    assert max(forward["rows"] for forward in denoising(plain)) == 4
    assert max(forward["rows"] for forward in denoising(with_loras)) == 4


def test_a_cancelled_request_leaves_the_forwards(run: list[Part]) -> None:
    rows = [forward["rows"] for forward in denoising(run[3])]

    assert (max(rows), rows[-1]) == (2, 1)


def test_kernels_of_a_forward_do_not_depend_on_its_rows(run: list[Part]) -> None:
    kernels = {forward["kernels"] for forward in denoising(run[1])}

    assert max(kernels) < 1.02 * min(kernels)
    assert max(kernels) < 4019


def test_loras_cost_kernels_only_in_the_layers_they_change(run: list[Part]) -> None:
    plain, with_loras = full_forward(run[1]), full_forward(run[2])

    assert lora_kernels(plain) == 0
    assert LAYERS <= lora_kernels(with_loras) <= 3 * LAYERS, "the plain product of each layer among them"
    assert with_loras["kernels"] < 1.11 * plain["kernels"]
    assert with_loras["flops"] < 1.01 * plain["flops"]


def test_weights_take_what_their_parameters_take(run: list[Part]) -> None:
    assert run[0]["memory"]["after"] / GIB == pytest.approx(31.42, abs=0.05)


def test_activations_grow_by_the_row(run: list[Part]) -> None:
    by_rows = {forward["rows"]: forward["peak"] / GIB for forward in denoising(run[1])}

    for (rows, peak), (more_rows, higher_peak) in pairwise(sorted(by_rows.items())):
        assert (higher_peak - peak) / (more_rows - rows) == pytest.approx(0.45, abs=0.05)
    assert by_rows[4] == pytest.approx(1.8, abs=0.1)


def test_decoding_takes_its_memory_per_picture(run: list[Part]) -> None:
    per_picture = [forward["peak"] / GIB / forward["rows"] for forward in decoding(run[1])]

    assert per_picture == pytest.approx([1.88] * len(per_picture), abs=0.02)


def test_a_wave_of_requests_leaves_only_cached_prompts_and_loaded_weights(run: list[Part]) -> None:
    _, plain, with_loras, with_control = run

    assert grown_gib(plain) < 0.05
    assert grown_gib(with_loras) < 1.0  # four LoRAs stay on the device
    assert grown_gib(with_control) == pytest.approx(4.1, abs=0.15)  # the ControlNet
