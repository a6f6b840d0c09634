"""The models of configs/serve/one_gpu.yaml on a GPU of 48 GB, by the real replica, in turns.

python -m tests.device_sim.one_gpu prints as JSON what the device saw.
"""

from __future__ import annotations

import json
import os
from typing import Any

from deployments.protocol.card import ModelCard, load_cards
from deployments.protocol.request import Control, GenerationRequest
from serve_app.cli.serve_config import read_config, served_cards
from tests.device_sim import run
from tests.device_sim.costs import KINDS
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.models import ROOT

CONFIG = ROOT / "configs/serve/one_gpu.yaml"
GPU = "l40s"


def cards() -> list[ModelCard]:
    """Those that share the GPU, as the config has them."""
    served = served_cards(read_config(CONFIG, None, None), CONFIG)
    return [card for card in served.values() if card.serving.group is not None]


async def take_turns(device: SimulatedDevice) -> dict[str, Any]:
    """Both models, then what SDXL loads for its first requests with a refiner and control pictures, and the
    first model again."""
    from deployments.replica import ModelReplica  # after torch.cuda is the device's

    group = cards()
    flux, sdxl = group
    known = load_cards(ROOT / "configs/models")
    replica = ModelReplica(group, {sdxl.id: known[str(sdxl.refiner)]})
    picture = run.png(sdxl.sizes.width, sdxl.sizes.height)
    canny, depth = (Control(image=picture, type=kind, is_map=True) for kind in ("canny", "depth"))
    loaded, ends = [], []
    for model, wanted in (
        (flux, {}),
        (sdxl, {}),
        (sdxl, {"refiner": True}),
        (sdxl, {"controls": [canny]}),
        (sdxl, {"controls": [depth]}),
        (flux, {}),
    ):
        request = GenerationRequest(
            model=model.id,
            prompt=f"picture {len(ends)}",
            seed=len(ends),
            num_inference_steps=max(4, model.steps.min),
            **wanted,
        )
        end = await run.outcome(replica, request)
        ends.append(f"{end.last} {end.error}".strip())
        loaded.append(list(replica._runtime.models.loaded))
    return {
        "ends": ends,
        "loaded": loaded,
        "peak": device.memory.peak,
        "usable": KINDS[GPU].gpu.machine().limit_bytes,
        "refused": device.memory.refused,
        "mixing": dict(device.measurements.mixing),
        "hazards": dict(device.memory.hazards),
    }


def main() -> None:
    found: list[dict[str, Any]] = []

    async def work(device: SimulatedDevice) -> None:
        found.append(await take_turns(device))

    run.on_device(GPU, work)
    print(json.dumps(found[0]), flush=True)
    os._exit(0)  # threads of the replica would keep the process


if __name__ == "__main__":
    main()
