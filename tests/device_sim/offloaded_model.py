"""Serves tiny FLUX with parts on the host by the real replica on the simulated device.

python -m tests.device_sim.offloaded_model prints what was counted, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deployments.models import model_instance, offload, parts
from deployments.planning.plan import PartPlan, Plan
from deployments.protocol.card import load_card
from deployments.protocol.request import GenerationRequest
from tests.device_sim import patches
from tests.device_sim.costs import KINDS
from tests.device_sim.device import SimulatedDevice

ROOT = Path(__file__).parents[2]
PLAN = Plan(
    "bfloat16",
    (
        PartPlan("transformer", "bfloat16", "streamed", resident_blocks=1),
        PartPlan("text_encoder", "bfloat16", "sequential"),
        PartPlan("text_encoder_2", "bfloat16", "on_demand"),
    ),
)


def install() -> None:
    """Have modules read on the host and brought to the device weight by weight: nn.Module.to would write a
    tensor of the device into one of the host, which the simulated one is not able to."""
    read_and_place = parts.PartFiles.load

    def load(files: parts.PartFiles, device: torch.device) -> nn.Module:
        if files.plan.placement != "device":
            return read_and_place(files, device)
        module = read_and_place(files, torch.device("cpu")).requires_grad_(False)
        offload._move_others(module, set(), device)
        return module

    kind: Any = parts.PartFiles
    kind.load = load
    instance: Any = model_instance
    instance.plan_of = lambda *_arguments: PLAN
    vars(offload)["SMALL_BYTES"] = 0


async def serve(device: SimulatedDevice) -> dict[str, Any]:
    from deployments.replica import ModelReplica  # after torch.cuda is the device's

    card = load_card(ROOT / "configs/models/tiny-flux-dev.yaml")
    serving = card.serving.model_copy(update={"warm_up": False, "exact": "off"})
    card = card.model_copy(
        update={
            "weights": card.weights.model_copy(update={"dtype": "bfloat16"}),
            "serving": serving,
            "refiner": None,
        }
    )
    replica = ModelReplica([card])
    loaded, account = device.memory.live, replica._runtime.memory_bytes
    device.begin_part()
    ends = await asyncio.gather(*(end_of(replica, card.id, seed) for seed in range(4)))
    memory, measurements = device.memory, device.measurements
    return {
        "ends": ends,
        "loaded": loaded,
        "weights": account["weights"],
        "working": account["working"],
        "after": memory.live,
        "hazards": list(memory.hazards),
        "mixing": dict(measurements.mixing),
        "waits": [source for source in map(str, measurements.syncs) if "offload" in source],
    }


async def end_of(replica: Any, model: str, seed: int) -> str:
    """How a request ended."""
    request = GenerationRequest(
        model=model, prompt=f"circle {seed}", seed=seed, width=64, height=64, num_inference_steps=4
    )
    last: Any = None
    async with aclosing(replica.generate(request, unlimited_wait=True)) as events:
        async for event in events:
            last = event
    return f"{type(last).__name__} {getattr(last, 'message', '')}".strip()


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    device = SimulatedDevice(KINDS["a10g"])
    patches.install(device)
    install()
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(serve(device))))
    thread.start()
    thread.join()
    print(json.dumps(found[0]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
