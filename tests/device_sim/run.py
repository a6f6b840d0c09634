"""Serves requests with the real ModelReplica of a card on the simulated device."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from deployments.engine.scheduled_job import ParkedCall
from deployments.engine.step_scheduler import StepScheduler
from deployments.protocol.card import ModelCard, Serving
from deployments.protocol.events import Failed, Step
from deployments.protocol.request import Control, GenerationRequest, Lora, OutputOptions, Video
from tests.device_sim import models, patches
from tests.device_sim.costs import KINDS
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.lora_files import lora_file
from tests.device_sim.repository import Repository
from tests.device_sim.scenario import Scenario, Wave

PROOFS_S = 600.0  # at most, for the proofs before a wave


class TogetherScheduler(StepScheduler):
    """Puts all calls that may share a forward into one, without learning first whether that pays."""

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        picked: list[int] = []
        rows = 0
        for index, call in enumerate(waiting):
            may_join = not picked or (call.key is not None and call.key == waiting[picked[0]].key)
            if may_join and rows + call.batch_size <= max(self.max_batch_size, call.batch_size):
                picked.append(index)
                rows += call.batch_size
        return picked


@dataclass(slots=True)
class Outcome:
    """What became of one request."""

    events: Counter[str] = field(default_factory=Counter)
    last: str = ""
    error: str = ""


Account = dict[str, int | None]  # bytes by part, as the replica counts them
OnPart = Callable[[SimulatedDevice, Wave | None, Sequence[Outcome], Account], None]


def serve(scenario: Scenario, on_part: OnPart) -> None:
    """Load the model and serve the waves. Changes this process for good: call it in one of its own.

    on_part: called after the model is loaded and after the proofs before a wave, without a wave, and after
    each wave.
    """
    on_device(
        scenario.gpu,
        lambda device: _serve(scenario, device, on_part),
        memory_gib=scenario.memory_gib,
        equal=scenario.proofs,
    )


def on_device(
    gpu: str,
    work: Callable[[SimulatedDevice], Awaitable[None]],
    *,
    memory_gib: float = 0.0,
    equal: bool = True,
) -> None:
    """Have this process a simulated GPU of this kind, for good, and do the work on it.

    memory_gib: an allocation above it fails; 0: the GPU's memory. equal: what tensors without values are.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    device = SimulatedDevice(KINDS[gpu])
    if memory_gib:
        device.memory.limit = int(memory_gib * 2**30)
    device.equal = lambda _file: equal
    patches.install(device)
    Repository(device).install()
    errors: list[BaseException] = []

    async def all_of_it() -> None:
        await work(device)

    def main() -> None:
        try:
            asyncio.run(all_of_it())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=main, name="asyncio")
    thread.start()  # threads have the device; this one does not
    thread.join()
    if errors:
        raise errors[0]


def replace_scheduler(runtime: Any, scheduler: type[StepScheduler]) -> None:
    """Have replicas that are made from here on use it. runtime: the module."""
    vars(runtime)["Runtime"] = partial(runtime.Runtime, schedule=scheduler)


async def _serve(scenario: Scenario, device: SimulatedDevice, on_part: OnPart) -> None:
    from deployments import runtime  # after torch.cuda is the device's
    from deployments.encoder import VideoEncoder
    from deployments.replica import ModelReplica

    card = _card_of(scenario)
    if scenario.together:
        replace_scheduler(runtime, TogetherScheduler)
    replica = ModelReplica([card], encoder=VideoEncoder() if card.videos else None)
    logging.getLogger("deployments").setLevel(logging.ERROR)
    on_part(device, None, (), await account_of(replica))
    shapes = await replica.layers(card.id)
    for wave in scenario.waves:
        if wave.proven:
            device.begin_part()
            await replica._runtime.worker.prove_all(PROOFS_S)
            on_part(device, None, (), await account_of(replica))
        device.begin_part()
        outcomes = await _serve_wave(wave, card, replica, shapes)
        on_part(device, wave, outcomes, await account_of(replica))


async def account_of(replica: Any) -> Account:
    """What the replica says of its memory."""
    status = await replica.status()
    account: Account = status["memory_bytes"]
    return account


async def _serve_wave(
    wave: Wave, card: ModelCard, replica: Any, shapes: dict[str, tuple[int, ...]]
) -> list[Outcome]:
    files = [lora_file(shapes, wave.rank * (1 + index % 2), index + 1) for index in range(wave.loras)]
    requests = [_request(wave, card, files, index) for index in range(wave.requests)]
    async with AsyncExitStack() as kept:
        if not wave.cold_loras:
            await load_loras(replica, requests, kept)
        return await asyncio.gather(
            *(
                outcome(replica, request, wave.cancel_after if request is requests[-1] else 0)
                for request in requests
            )
        )


async def load_loras(replica: Any, requests: Sequence[GenerationRequest], kept: AsyncExitStack) -> None:
    """Bring the requests' LoRAs to the device before the first of them starts, so that all start together."""
    runtime = replica._runtime
    for request in requests:
        using = runtime.models.models[0].loras.using(request.loras, runtime.worker.run_on_thread)
        await kept.enter_async_context(using)


def _card_of(scenario: Scenario) -> ModelCard:
    card = models.MODELS[scenario.model]()
    requests = max(wave.requests for wave in scenario.waves)
    changes = {
        "max_rows": scenario.rows,
        "slots": max(16, requests),
        "warm_up": scenario.warm_up,
        "exact": scenario.exact,
    }
    serving = Serving(**(card.serving.model_dump() | changes))  # which refuses names that are gone
    return card.model_copy(update={"serving": serving, "refiner": None})


def _request(wave: Wave, card: ModelCard, files: Sequence[bytes], index: int) -> GenerationRequest:
    sizes = wave.sizes or ((card.sizes.width, card.sizes.height),)
    width, height = sizes[index % len(sizes)]
    video = Video(num_frames=wave.frames or None) if card.videos and not card.videos.framewise else None
    return GenerationRequest(
        model=card.id,
        prompt=f"picture {index}",
        seed=index,
        num_inference_steps=wave.steps,
        width=width,
        height=height,
        num_images=wave.images,
        loras=[Lora.of(files[index % len(files)], 0.8)] if files else [],
        controls=[Control(image=png(width, height), type=wave.control)] if wave.control else [],
        scheduler=wave.scheduler,
        output=OutputOptions(previews=wave.previews, format="jpeg"),
        video=video,
    )


async def outcome(replica: Any, request: GenerationRequest, cancel_after: int = 0) -> Outcome:
    """What becomes of a request. cancel_after: it is cancelled after so many of its steps; 0: not."""
    found = Outcome()
    async with aclosing(replica.generate(request, unlimited_wait=True)) as events:
        async for event in events:
            found.last = type(event).__name__
            found.events[found.last] += 1
            if isinstance(event, Failed):
                found.error = f"{event.kind}: {event.message}"
            if cancel_after and isinstance(event, Step) and event.step >= cancel_after:
                break
    return found


def png(width: int, height: int) -> bytes:
    """A picture of this size."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
