"""The simulated device finds the faults it is there for, and only those: small_programs.py."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device_sim.costs import KINDS
from tests.device_sim.simulation import needs_compiler, run_module

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    counted: dict[str, Any] = run_module("tests.device_sim.small_programs")
    return counted


@pytest.mark.parametrize(
    ("name", "hazard"),
    [
        ("reads_before_another_stream_has_written", "uses what stream 0 still writes"),
        ("writes_while_another_stream_reads", "still reads"),
        ("frees_what_another_stream_uses", "may use it"),
        ("writes_pinned_memory_during_a_copy", "the host writes what a copy still reads"),
        ("reads_pinned_memory_during_a_copy", "the host uses what a copy still writes"),
    ],
)
def test_a_race_is_found(programs: dict[str, Any], name: str, hazard: str) -> None:
    assert any(hazard in found for found in programs[name]["hazards"])


@pytest.mark.parametrize(
    "name",
    [
        "reads_after_waiting_for_the_other_stream",
        "frees_with_the_stream_recorded",
        "writes_pinned_memory_after_the_copy",
        "uploads_from_pinned_memory",
        "reads_values_back",
    ],
)
def test_an_ordered_program_has_no_race(programs: dict[str, Any], name: str) -> None:
    assert programs[name]["hazards"] == []


def test_a_copy_from_pinned_memory_makes_the_host_wait_for_nothing(programs: dict[str, Any]) -> None:
    assert programs["uploads_from_pinned_memory"]["waits"] == 0


def test_every_copy_from_pageable_memory_makes_the_host_wait(programs: dict[str, Any]) -> None:
    assert programs["uploads_from_pageable_memory"]["waits"] == 3


def test_values_of_small_tensors_are_read_back_and_each_read_waits(programs: dict[str, Any]) -> None:
    counted = programs["reads_values_back"]

    assert counted["returned"] == [[0, 1, 2, 3, 4], 3, [3, 4], True]
    assert counted["waits"] == 5  # tolist, item, the mask's index and its copy, equal


def test_tensors_of_two_devices_are_refused_as_cuda_refuses_them(programs: dict[str, Any]) -> None:
    counted = programs["mixes_devices"]

    assert counted["mixing"] == 1
    assert "Expected all tensors to be on the same device" in counted["returned"]


def test_an_allocation_above_the_limit_fails_and_leaves_the_rest(programs: dict[str, Any]) -> None:
    total, refused, allocated, peak, at_end, was_empty = programs["runs_out_of_memory"]["returned"]

    assert was_empty
    assert total == KINDS["a10g"].memory_bytes
    assert refused.startswith(f"CUDA out of memory. Tried to allocate {total / 4 / 2**20:.2f} MiB.")
    assert (allocated, peak) == pytest.approx((1 / 8, 3 / 16))
    assert at_end == 0


def test_kernels_have_the_operations_of_their_sizes_and_views_none(programs: dict[str, Any]) -> None:
    counted = programs["multiplies"]

    assert counted["kernels"] == 2
    assert counted["flops"] == sum(counted["returned"])


def test_weights_of_8_bits_are_held_as_such_and_brought_to_16_bits_for_a_product(
    programs: dict[str, Any],
) -> None:
    held, forward = programs["multiplies_by_weights_of_8_bits"]["returned"]

    assert 512 * 512 <= held < 1.05 * 512 * 512
    assert 2 * 512 * 512 <= forward < 1.05 * 2 * 512 * 512


def test_events_measure_modelled_time_on_a_stream_with_priority(programs: dict[str, Any]) -> None:
    has_priority, milliseconds = programs["measures_time_on_a_stream_with_priority"]["returned"]

    assert has_priority
    assert milliseconds == pytest.approx(2**30 / 0.6e12 * 1e3)  # a GiB at the A10G's bandwidth


def test_noise_of_a_generator_on_the_device_has_a_shape_and_no_values(programs: dict[str, Any]) -> None:
    assert programs["makes_noise"]["returned"] == ["cuda:0", [3, 4], True]
