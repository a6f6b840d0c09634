"""Offloaded parts on the simulated device: offloaded_programs.py."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device_sim.simulation import needs_compiler, run_module

pytestmark = needs_compiler

RIGHT = ("streams_blocks", "keeps_some_blocks", "copies_each_layer", "copies_on_demand")


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    counted: dict[str, Any] = run_module("tests.device_sim.offloaded_programs", quiet_s=20.0)
    return counted


@pytest.mark.parametrize("name", RIGHT)
def test_no_stream_races_and_no_device_is_mixed(programs: dict[str, Any], name: str) -> None:
    assert programs[name]["hazards"] == []
    assert programs[name]["mixing"] == 0


@pytest.mark.parametrize(
    ("name", "hazard"),
    [
        ("computes_before_the_copy_is_done", "still writes"),
        ("copies_over_what_still_computes", "still reads"),
    ],
)
def test_a_copy_that_waits_for_nothing_is_found(programs: dict[str, Any], name: str, hazard: str) -> None:
    assert any(hazard in found for found in programs[name]["hazards"])


@pytest.mark.parametrize("name", RIGHT[:3])
def test_a_forward_allocates_no_weights(programs: dict[str, Any], name: str) -> None:
    """So it cannot run out of memory because of them."""
    run = programs[name]["returned"]

    assert run["device"] == "cuda:0"
    assert run["loaded"] == run["held"]
    assert run["peak"] < run["weights"] / 100


def test_the_device_holds_what_does_not_move_and_two_places(programs: dict[str, Any]) -> None:
    blocks, some, layers = (programs[name]["returned"] for name in RIGHT[:3])
    outside = 2 * 512 * 513 * 4
    block = (blocks["weights"] - outside) / 6

    assert blocks["loaded"] == pytest.approx(outside + 2 * block, rel=0.001)
    assert some["loaded"] == pytest.approx(outside + 3 * block + 2 * block, rel=0.001)
    assert layers["loaded"] == pytest.approx(outside / 2 + 2 * block / 2, rel=0.001)


def test_weights_on_demand_are_on_the_device_for_a_use(programs: dict[str, Any]) -> None:
    run = programs["copies_on_demand"]["returned"]

    assert (run["before"], run["after"]) == (0, 0)
    assert run["during"] == run["used"] == pytest.approx(run["weights"], rel=0.001)


def test_a_replica_serves_from_the_host_without_races() -> None:
    run = run_module("tests.device_sim.offloaded_model", quiet_s=60.0)

    assert run["ends"] == ["Done"] * 4
    assert run["mixing"] == {}, "inputs are where the weights are brought to"
    assert run["hazards"] == []
    assert run["waits"] == [], "nothing waits for a copy"
    assert run["loaded"] == pytest.approx(run["weights"], rel=0.01)
    assert run["after"] < run["loaded"] + run["working"], "the encoder is not there any more"
