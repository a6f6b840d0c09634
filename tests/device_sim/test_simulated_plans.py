"""Plans carried out at real size on the simulated device: what they reckon with, and what they take."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device_sim.costs import KINDS
from tests.device_sim.plans import CASES
from tests.device_sim.simulation import needs_compiler, run_module

pytestmark = [needs_compiler, pytest.mark.device_sim_long]

LAYERS = 494  # of FLUX that a LoRA changes
Run = dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = run_module("tests.device_sim.plans", request.param, quiet_s=180.0)
    return found | {"case": CASES[request.param]}


def test_the_peak_is_within_a_tenth_of_the_plan(run: Run) -> None:
    planned = run["planned"]["peak"]

    assert run["met"] or not run["case"].has_lane, "a picture was decoded beside the denoiser"
    assert set(run["ends"]) == {"Done"}
    assert abs(planned / run["peak"] - 1) <= 0.1


def test_nothing_is_refused_and_the_device_is_not_full(run: Run) -> None:
    usable = KINDS[run["gpu"]].gpu.machine().limit_bytes

    assert usable is not None
    assert run["refused"] == 0
    assert max(run["peak"], run["loading_peak"]) <= usable


def test_no_operator_mixes_devices_and_no_streams_race(run: Run) -> None:
    assert (run["mixing"], run["hazards"]) == ({}, {})


def test_weights_take_what_is_planned(run: Run) -> None:
    assert run["loaded"] == pytest.approx(run["planned"]["weights"], rel=0.03)


def test_loras_of_several_requests_share_kernels_whatever_the_form_of_the_weights(run: Run) -> None:
    if not run["model"].startswith("flux"):
        pytest.skip("the number of layers is FLUX's")
    kernels = {int(rows): count for rows, count in run["lora_kernels"].items()}
    most = max(kernels)

    assert most >= 2
    assert LAYERS < kernels[most] <= 3 * LAYERS
    assert kernels[most] <= 1.05 * min(count for rows, count in kernels.items() if rows > 1)


def test_the_models_of_one_gpu_yaml_take_turns_on_48_gb() -> None:
    run = run_module("tests.device_sim.one_gpu", quiet_s=180.0)

    assert set(run["ends"]) == {"Done"}
    assert run["refused"] == 0
    assert run["peak"] <= run["usable"]
    assert "flux.1-schnell" not in run["loaded"][-2], "it made way for what SDXL needs"
    assert (run["mixing"], run["hazards"]) == ({}, {})
