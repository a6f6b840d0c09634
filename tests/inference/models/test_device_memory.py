"""The account of a device's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.models import hardware
from deployments.models.device_memory import CONTEXT_BYTES, GIB, usable_bytes, use_expandable_segments

ROOT = Path(__file__).parents[3]
# GiB that are there in all, that no other process has, and the replica's num_gpus
DEVICES = [
    (80, 79, 1.0),
    (80, 30, 1.0),  # another process holds 50
    (80, 79, 0.5),
    (80, 20, 0.5),
    (24, 23, 0.25),
    (24, 23, 0.0),  # not known
]


@pytest.mark.parametrize(("total", "free", "share"), DEVICES)
def test_a_process_counts_on_its_part_of_a_gpu_and_on_what_others_leave(
    total: int, free: int, share: float
) -> None:
    usable = usable_bytes(total * GIB, free * GIB, share)

    own = total * (share or 1.0) * GIB - CONTEXT_BYTES
    assert usable == int(0.95 * min(own, free * GIB))


def test_parts_of_one_gpu_fit_beside_each_other() -> None:
    total = 80 * GIB

    parts = [usable_bytes(total, total, share) + CONTEXT_BYTES for share in (0.5, 0.3, 0.2)]

    assert sum(parts) <= total


class Calls(list[Any]):
    def add(self, *arguments: Any) -> None:
        self.append(arguments)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 0.5 - CONTEXT_BYTES / (48 * GIB)), (1.0, None), (0.0, None)]
)
def test_torch_is_limited_to_the_part_of_the_gpu(
    share: float, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, device = Calls(), torch.device("cuda")
    properties = type("Properties", (), {"total_memory": 48 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", calls.add)

    hardware.limit_to_share(device, share)

    assert calls == ([] if expected is None else [(expected, device)])


def test_a_cpu_has_no_limit() -> None:
    assert hardware.memory_bytes(torch.device("cpu"), 1.0) is None


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_operators_setting_of_the_allocator_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")

    use_expandable_segments()

    settings = {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")}
    assert settings == {name: "max_split_size_mb:64"}


def test_torch_understands_the_setting_of_its_allocator() -> None:
    code = (
        "from deployments.models.device_memory import use_expandable_segments as use; use()\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )

    assert (result.returncode, result.stdout.strip()) == (0, "expandable_segments:True")
