"""The machines that the command line makes plans for: a known GPU, or the device at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from deployments.planning.gpus import GPUS, limited, machine_of_replica
from deployments.planning.machine import Machine
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, ModelUnavailable
from serve_app.cli.visible_gpus import as_replica
from serve_app.settings import ROOT

THIS_MACHINE_TIMEOUT_S = 120.0


def known_machine(card: ModelCard, name: str) -> Machine:
    """What a replica of this card has of this GPU. Raises BadRequest for a name that is not known."""
    if name not in GPUS:
        raise BadRequest(f"there is no GPU {name!r} in the table; there is {', '.join(GPUS)}")
    return machine_of_replica(card, name)


def machine_at_hand(card: ModelCard, model_device: str | None, *, alone: bool = False) -> Machine:
    """The device that a replica of this card would have here, asked in a child process: torch is large.

    model_device: the setting MODEL_DEVICE. alone: as if no other process, such as a running service, had any
    of its memory.
    Raises ModelUnavailable when that fails.
    """
    device, visible = as_replica(model_device, card.serving.num_gpus)
    asked = ["--num-gpus", str(card.serving.num_gpus)]
    asked += ["--device", device] if device else []
    asked += ["--alone"] if alone else []
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deployments.models.devices", "machine", *asked],
            cwd=ROOT,
            env={**os.environ, **visible},
            capture_output=True,
            text=True,
            timeout=THIS_MACHINE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _not_asked(f"no answer within {THIS_MACHINE_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise _not_asked((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return limited(_machine(json.loads(done.stdout.splitlines()[-1])), card)


def _not_asked(cause: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"the device cannot be asked ({cause}); correct its driver or the installation of torch, or use "
        "weft plan with --gpu, which needs no device"
    )


def _machine(facts: Mapping[str, Any]) -> Machine:
    capability = facts["capability"]
    return Machine(**{**facts, "capability": None if capability is None else tuple(capability)})
