"""The switches that are set before a batch size is proven."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# in a process of its own: the switches are the process's
SCRIPT = """
import json, os, sys
import torch
from deployments.protocol.card import load_card
from deployments.replica import ModelReplica
import deployments.runtime  # libraries look for a GPU when they are imported; cuBLAS makes no handle for that

started = []
is_available = torch.cuda.is_available
def first_look():
    started.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
    return is_available()
torch.cuda.is_available = first_look

card = load_card(__import__("pathlib").Path("configs/models/tiny-flux-schnell.yaml"))
serving = card.serving.model_copy(update={"exact": sys.argv[1], "warm_up": False})
replica = ModelReplica([card.model_copy(update={"serving": serving})])
replica.__del__()
print(json.dumps({
    "workspace": started[:1],
    "cudnn": [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark],
    "bf16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    "fp16": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    "algorithms": torch.are_deterministic_algorithms_enabled(),
}))
"""


def switches_of(exact: str, **environment: str) -> dict[str, object]:
    kept = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, exact],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=kept | environment,
    )
    switches: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return switches


@pytest.mark.parametrize("exact", ["prefer", "strict"])
def test_a_replica_that_proves_batch_sizes_sets_them_before_the_device_is_used(exact: str) -> None:
    assert switches_of(exact) == {
        "workspace": [":4096:8"],
        "cudnn": [True, False],
        "bf16": False,
        "fp16": False,
        "algorithms": False,
    }


def test_a_replica_that_proves_nothing_leaves_torch_as_it_is() -> None:
    assert switches_of("off") == {
        "workspace": [None],
        "cudnn": [False, False],
        "bf16": True,
        "fp16": True,
        "algorithms": False,
    }


def test_a_workspace_of_the_environment_is_kept() -> None:
    assert switches_of("prefer", CUBLAS_WORKSPACE_CONFIG=":16:8")["workspace"] == [":16:8"]
