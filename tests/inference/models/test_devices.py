"""Devices by torch's names."""

from __future__ import annotations

import pytest
import torch

from deployments.models import devices
from deployments.models.devices import device_called
from deployments.protocol.errors import ModelUnavailable


def two_gpus() -> list[str]:
    return ["cuda:0 (A)", "cuda:1 (A)", "cpu"]


def test_a_gpu_by_its_number_is_that_gpu_for_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a current GPU of its own, which `cuda` without a number would mean."""
    current: list[int] = []
    monkeypatch.setattr(devices, "_devices", two_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)

    assert device_called("cuda:1") == torch.device("cuda", 1)
    assert device_called("cuda") == torch.device("cuda")
    assert current == [1]
    with pytest.raises(ModelUnavailable, match=r"MODEL_DEVICE is cuda:2, and there is cuda:0 \(A\), cuda:1"):
        device_called("cuda:2")
