"""Serves requests with the real ModelReplica of a card on the simulated device."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from deployments.engine.scheduled_job import ParkedCall
from deployments.engine.step_scheduler import StepScheduler
from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.events import Failed, Step
from deployments.protocol.request import Control, ControlType, GenerationRequest, Lora, OutputOptions
from tests.device_sim import models, patches
from tests.device_sim.costs import KINDS
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.lora_files import lora_file

CARD_FOLDER = Path(__file__).parents[2] / "configs/models"


class TogetherScheduler(StepScheduler):
    """Puts all calls that may share a forward into one, without learning first whether that pays."""

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        picked: list[int] = []
        rows = 0
        for index, call in enumerate(waiting):
            alone = not picked or (call.key is not None and call.key == waiting[picked[0]].key)
            if alone and rows + call.batch_size <= max(self.max_batch_size, call.batch_size):
                picked.append(index)
                rows += call.batch_size
        return picked


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is served on what."""

    model: str  # one of models.CARDS
    gpu: str = "a100"
    requests: int = 4
    rows: int = 4  # max_rows of the card
    steps: int = 4
    loras: int = 0  # LoRA files; the requests take turns with them
    rank: int = 16  # of the files with even index; the others have twice as much
    cold_loras: bool = False  # LoRAs are read and copied while other requests run
    sizes: tuple[tuple[int, int], ...] = ()  # width and height; empty: the card's
    scheduler: str = "auto"
    images: int = 1  # of each request
    previews: int = 0
    control: ControlType | None = None  # type of a control picture for every request
    cancel_after: int = 0  # the last request is cancelled after so many of its steps
    together: bool = True  # forwards take all rows that wait from the start, as the step scheduler learns to
    deterministic: bool = False
    proofs: bool = True  # whether proofs find equal bits; without values there is nothing to compare
    memory_gib: float = 0.0  # an allocation above it fails; 0: the GPU's memory


@dataclass(slots=True)
class Outcome:
    """What became of one request."""

    events: Counter[str] = field(default_factory=Counter)
    last: str = ""
    error: str = ""


@dataclass(slots=True)
class Finished:
    """A run: the device with its measurements, and the requests' outcomes."""

    scenario: Scenario
    device: SimulatedDevice
    outcomes: list[Outcome]
    weights_bytes: int
    account: dict[str, int | None]  # the replica's own count of the device's memory, at the end


def serve(scenario: Scenario) -> Finished:
    """Run the scenario to the end of all requests. Changes this process for good: call it in its own."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    device = SimulatedDevice(KINDS[scenario.gpu])
    if scenario.memory_gib:
        device.memory.limit = int(scenario.memory_gib * 2**30)
    device.equal = lambda _file: scenario.proofs
    patches.install(device)
    models.install(device)
    finished: list[Finished] = []

    def main() -> None:
        finished.append(asyncio.run(_serve(scenario, device)))

    thread = threading.Thread(target=main, name="asyncio")
    thread.start()  # threads have the device; this one does not
    thread.join()
    return finished[0]


async def _serve(scenario: Scenario, device: SimulatedDevice) -> Finished:
    from deployments import runtime  # after torch.cuda is the device's
    from deployments.replica import ModelReplica

    card = _card_of(scenario)
    if scenario.together:
        vars(runtime)["StepScheduler"] = TogetherScheduler
    replica = ModelReplica([card])
    logging.getLogger("deployments").setLevel(logging.ERROR)
    weights_bytes = device.memory.live
    shapes = await replica.layers(card.id)
    files = [lora_file(shapes, scenario.rank * (1 + index % 2), index + 1) for index in range(scenario.loras)]
    requests = [_request(scenario, card, files, index) for index in range(scenario.requests)]
    async with AsyncExitStack() as kept:
        if not scenario.cold_loras:
            await _load_loras(replica, requests, kept)
        outcomes = await asyncio.gather(
            *(
                _outcome(replica, request, scenario.cancel_after if request is requests[-1] else 0)
                for request in requests
            )
        )
    status: Any = await replica.status()
    return Finished(scenario, device, outcomes, weights_bytes, status["memory_bytes"])


async def _load_loras(replica: Any, requests: Sequence[GenerationRequest], kept: AsyncExitStack) -> None:
    """Bring the requests' LoRAs to the device before the first of them starts, so that all start together."""
    runtime = replica._runtime
    for request in requests:
        using = runtime.models.models[0].loras.using(request.loras, runtime.worker.run_on_thread)
        await kept.enter_async_context(using)


def _card_of(scenario: Scenario) -> ModelCard:
    card = load_card(CARD_FOLDER / f"{models.CARDS[scenario.model]}.yaml")
    changes = {"warm_up": False, "max_rows": scenario.rows, "slots": max(16, scenario.requests)}
    serving = card.serving.model_copy(update=changes | {"deterministic": scenario.deterministic})
    return card.model_copy(update={"serving": serving, "refiner": None})


def _request(scenario: Scenario, card: ModelCard, files: Sequence[bytes], index: int) -> GenerationRequest:
    sizes = scenario.sizes or ((card.sizes.width, card.sizes.height),)
    width, height = sizes[index % len(sizes)]
    loras = [Lora.of(files[index % len(files)], 0.8)] if files else []
    controls = [Control(image=_png(width, height), type=scenario.control)] if scenario.control else []
    return GenerationRequest(
        model=card.id,
        prompt=f"picture {index}",
        seed=index,
        num_inference_steps=scenario.steps,
        width=width,
        height=height,
        num_images=scenario.images,
        loras=loras,
        controls=controls,
        scheduler=scenario.scheduler,
        output=OutputOptions(previews=scenario.previews, format="jpeg"),
    )


async def _outcome(replica: Any, request: GenerationRequest, cancel_after: int) -> Outcome:
    outcome = Outcome()
    async with aclosing(replica.generate(request, unlimited_wait=True)) as events:
        async for event in events:
            outcome.last = type(event).__name__
            outcome.events[outcome.last] += 1
            if isinstance(event, Failed):
                outcome.error = f"{event.kind}: {event.message}"
            if cancel_after and isinstance(event, Step) and event.step >= cancel_after:
                break
    return outcome


def _png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
