"""Processes that commands start see the device that a replica of the card would have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.protocol.card import ModelCard, load_card
from serve_app.cli import bench, planned_machines, visible_gpus
from serve_app.cli.visible_gpus import as_replica, only_gpu
from serve_app.settings import ROOT, Settings

NVIDIA, AMD = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def _nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_gpus, "AMD_DRIVER", Path("/nowhere"))


def card(num_gpus: float) -> ModelCard:
    read = load_card(ROOT / "configs/models/tiny-sd15.yaml")
    return read.model_copy(update={"serving": read.serving.model_copy(update={"num_gpus": num_gpus})})


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "environment", "device", "variables"),
    [
        (None, 1, {}, None, {}),
        ("cuda", 0.5, {}, "cuda", {}),
        ("cuda:1", 1, {}, "cuda", {NVIDIA: "1"}),
        ("cuda:1", 1, {NVIDIA: "4, 6"}, "cuda", {NVIDIA: "6"}),
        ("cuda:2", 1, {NVIDIA: "4,6"}, "cuda", {NVIDIA: ""}),
        ("cuda:1", 0, {}, None, {NVIDIA: ""}),
        (None, 0, {}, None, {NVIDIA: ""}),
        ("cpu", 0, {}, "cpu", {NVIDIA: ""}),
        ("mps", 0, {}, "mps", {NVIDIA: ""}),
    ],
)
def test_a_process_sees_what_ray_would_give_the_replica(
    wanted: str | None, num_gpus: float, environment: dict[str, str], device: str | None, variables: Any
) -> None:
    assert as_replica(wanted, num_gpus, environment) == (device, variables)


def test_gpus_of_amd_have_a_variable_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(visible_gpus, "AMD_DRIVER", tmp_path)

    assert only_gpu(1, {NVIDIA: "7", AMD: "2,3"}) == {AMD: "3"}


class _Started(Exception):
    """A process was about to be started."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def start(command: list[str], **options: Any) -> Any:
        found.update(options, command=command)
        raise _Started

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def test_the_plan_of_the_device_at_hand_is_for_the_gpu_of_the_setting(started: dict[str, Any]) -> None:
    with pytest.raises(_Started):
        planned_machines.machine_at_hand(card(0.5), "cuda:1", alone=True)

    assert started["env"][NVIDIA] == "1"
    assert started["command"][2:] == [
        *("deployments.models.devices", "machine"),
        *("--num-gpus", "0.5", "--device", "cuda", "--alone"),
    ]


def test_what_is_measured_is_the_gpu_of_the_setting(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_DEVICE", "cuda:1")
    on_gpu = card(1)
    monkeypatch.setattr(bench, "known_cards", lambda _settings: {on_gpu.id: on_gpu})
    jobs: list[str] = []
    measure = bench._measure
    monkeypatch.setattr(bench, "_measure", lambda job, env: jobs.append(job) or measure(job, env))

    with pytest.raises(_Started):
        bench.bench(on_gpu.id, 1)

    assert started["env"][NVIDIA] == "1"
    assert json.loads(jobs[0])["installation"]["device"] == "cuda"
    assert Settings.load().model_device == "cuda:1"


def test_the_program_prints_the_devices_and_what_a_plan_depends_on() -> None:
    def ask(*arguments: str) -> Any:
        command = [sys.executable, "-m", "deployments.models.devices", *arguments]
        return json.loads(subprocess.check_output(command, cwd=ROOT, text=True))

    devices, machine = ask("list"), ask("machine", "--num-gpus", "0", "--device", "cpu", "--alone")

    assert devices[-1] == "cpu"
    assert (machine["name"], machine["kind"], machine["limit_bytes"]) == ("CPU", "cpu", None)
    assert machine["host_bytes"] > 0
