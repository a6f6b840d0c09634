"""Plans of models of real size, carried out by the real replica on the simulated device.

    python -m tests.device_sim.plans flux-8-bit

prints as JSON what the plan reckons with and what the device saw. Requests fill the plan: as many rows and
LoRAs as it has, with pictures decoded while the denoiser runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

from deployments.engine.scheduled_job import ParkedCall
from deployments.planning.account import WITH_GUIDANCE
from deployments.planning.plan import Plan
from deployments.protocol.card import ModelCard, Quantisation, Serving, Weights
from deployments.protocol.request import Control, ControlType, GenerationRequest, Lora, OutputOptions, Video
from tests.device_sim import run
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.lora_files import lora_file
from tests.device_sim.measurements import is_denoiser
from tests.inference.planning.published_cards import CARDS, card_of


@dataclass(frozen=True, slots=True)
class Case:
    """A model on a GPU with what is used beside it."""

    gpu: str  # one of costs.KINDS
    cards: Callable[[], Sequence[ModelCard]]  # the first is served, the others are loaded beside it
    loras: int = 1  # LoRA files that the requests use in turns
    rank: int = 32  # of each
    controls: tuple[ControlType, ...] = ()
    images: int = 1  # of each request
    steps: int = 2  # of requests that fill the rows, more than the card's fewest
    has_lane: bool = True  # results are decoded on the engine's other lane; videos are on a thread of theirs


CONTROLS: tuple[ControlType, ...] = ("canny", "depth")  # in the case with ControlNets


def _flux_in_8_bits() -> ModelCard:
    """Where 4 bits would fit without moving weights."""
    card = CARDS["flux.1-dev"]
    forms: dict[str, Quantisation] = {"transformer": "int8", "text_encoder_2": "int8"}
    return card.model_copy(update={"serving": card.serving.model_copy(update={"quantisation": forms})})


def _sdxl() -> ModelCard:
    """With two ControlNets."""
    card = CARDS["sdxl-base-1.0"]
    return card.model_copy(update={"controls": {kind: card.controls[kind] for kind in CONTROLS}})


def _group() -> list[ModelCard]:
    """Stable Diffusion 1.5 and two models made of it, all loaded, with safety checkers and without nets."""
    names = ("stable-diffusion-v1.5", "dreamshaper-8", "realistic-vision-v6")
    cards = [CARDS[name].model_copy(update={"controls": {}}) for name in names]
    checked = Weights(repo="stable-diffusion-v1-5/with-safety-checker")
    serving = cards[0].serving.model_copy(update={"models_loaded": len(cards)})
    return [cards[0].model_copy(update={"weights": checked, "serving": serving}), *cards[1:]]


CASES: Mapping[str, Case] = {
    "flux-8-bit": Case("a10g", lambda: [CARDS["flux.1-dev"]], loras=2, rank=16),
    "flux-bf16": Case("l40s", lambda: [CARDS["flux.1-dev"]], controls=CONTROLS[:1]),
    "flux-streamed": Case("rtx-3060", lambda: [_flux_in_8_bits()]),
    "sdxl-with-others": Case(
        "a10g", lambda: [_sdxl(), CARDS["sdxl-refiner-1.0"]], rank=96, controls=CONTROLS
    ),
    "sd15-group": Case("t4", _group, loras=2, rank=128, images=4),
    "wan-small": Case("a10g", lambda: [card_of("wan-2.1-t2v-1.3b")], has_lane=False),
}


class PlannedScheduler(run.TogetherScheduler):
    """Puts as many calls into one forward as the plan has rows and as are known to fit; of other modules than
    the denoiser one call, until that is known."""

    rows = 1  # of the plan

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        picked = super().pick(waiting, now, observe=observe)
        known = self.row_limit(waiting[picked[0]].key) if picked else None
        most = self.rows if known is None and observe else min(self.rows, known or 1)
        rows = 0
        for count, index in enumerate(picked):
            rows += waiting[index].batch_size
            if rows > most:
                return picked[: max(1, count)]
        return picked


async def carry_out(case: Case, device: SimulatedDevice) -> dict[str, Any]:
    """Load the models and serve requests that fill the plan of the first."""
    from deployments import runtime  # after torch.cuda is the device's
    from deployments.encoder import VideoEncoder
    from deployments.replica import ModelReplica

    run.replace_scheduler(runtime, PlannedScheduler)
    first, *others = [_quick(card) for card in case.cards()]
    refiners = {first.id: one for one in others if one.id == first.refiner}  # noqa: B035  one at most
    group = [first, *(other for other in others if other.id != first.refiner)]
    replica = ModelReplica(group, refiners, encoder=VideoEncoder() if first.videos else None)
    model = replica._runtime.models.models[0]
    plan: Plan = model.plan
    PlannedScheduler.rows = plan.rows or 1
    loaded = device.memory.live
    ends = [await run.outcome(replica, request) for request in _loading(case, first, others)]
    loading_peak = device.memory.peak
    shapes = await replica.layers(first.id)
    files = [lora_file(shapes, case.rank, number + 1) for number in range(case.loras)]
    device.begin_part()
    device.measurements.meeting.wanted = True
    requests = _filling(case, first, plan, files)
    async with AsyncExitStack() as kept:
        await run.load_loras(replica, requests, kept)
        ends += await asyncio.gather(*(run.outcome(replica, request) for request in requests))
    return _result(first.id, case, device, plan) | {
        "loaded": loaded,
        "loading_peak": loading_peak,
        "ends": [f"{end.last} {end.error}".strip() for end in ends],
        "account": await run.account_of(replica),
    }


def _result(card: str, case: Case, device: SimulatedDevice, plan: Plan) -> dict[str, Any]:
    """What the plan says, and what the device saw since the models are loaded."""
    assert plan.planned is not None
    memory, measurements = device.memory, device.measurements
    largest: dict[str, int] = {}
    for forward in measurements.forwards:
        name = f"{forward.module}, {forward.rows} rows"
        largest[name] = max(forward.memory.peak, largest.get(name, 0))
    return {
        "model": card,
        "gpu": case.gpu,
        "plan": [asdict(part) for part in plan.parts],
        "rows": plan.rows,
        "lora_slots": plan.lora_slots,
        "planned": asdict(plan.planned) | {"peak": plan.planned.peak},
        "peak": memory.peak,
        "refused": memory.refused,
        "met": measurements.meeting.met,
        "forwards": largest,
        "grown": memory.grown(),
        "lora_kernels": _lora_kernels(device),
        "mixing": dict(measurements.mixing),
        "hazards": dict(memory.hazards),
    }


def _lora_kernels(device: SimulatedDevice) -> dict[int, int]:
    """By rows of the denoiser's forwards, the fewest kernels that one of them took for LoRAs."""
    fewest: dict[int, int] = {}
    for forward in device.measurements.forwards:
        if is_denoiser(forward.module):
            cost = forward.cost.by_source.get("deployments/loras")
            kernels = 0 if cost is None else cost.kernels
            fewest[forward.rows] = min(kernels, fewest.get(forward.rows, kernels))
    return fewest


def _quick(card: ModelCard) -> ModelCard:
    """Without what is no part of the plan: warm-up, and proofs of batch sizes."""
    return card.model_copy(
        update={"serving": Serving(**(card.serving.model_dump() | {"warm_up": False, "exact": "off"}))}
    )


def _loading(case: Case, first: ModelCard, others: Sequence[ModelCard]) -> list[GenerationRequest]:
    """Requests that load what is beside the model."""
    wanted: list[dict[str, Any]] = [{"controls": [control]} for control in _controls(case, first)]
    if first.refiner is not None and others:
        wanted.append({"refiner": True})
    wanted += [{"model": other.id} for other in others if other.id != first.refiner]
    fewest = {card.id: max(2, card.steps.min) for card in (first, *others)}
    return [
        _request(first, number, fewest[one.get("model", first.id)], **one)
        for number, one in enumerate(wanted)
    ]


def _filling(case: Case, card: ModelCard, plan: Plan, files: Sequence[bytes]) -> list[GenerationRequest]:
    """As many as fill the plan's rows for all their steps, and two that end before them: beside the first
    picture, what decoding takes is learnt, beside the second one the denoiser runs."""
    assert plan.rows is not None
    rows = case.images * (2 if card.family in WITH_GUIDANCE else 1)
    calls = max(1, plan.rows // rows)
    few = card.steps.min
    steps = [few, few + 1, *[few + case.steps] * calls]
    controls = _controls(case, card)
    return [
        _request(
            card,
            100 * (number + 1),
            count,
            files=[files[number % len(files)]],
            controls=controls,
            images=case.images,
        )
        for number, count in enumerate(steps)
    ]


def _controls(case: Case, card: ModelCard) -> list[Control]:
    picture = run.png(card.sizes.width, card.sizes.height)
    return [Control(image=picture, type=kind, is_map=True) for kind in case.controls]


def _request(
    card: ModelCard,
    seed: int,
    steps: int,
    *,
    model: str = "",
    files: Sequence[bytes] = (),
    controls: Sequence[Control] = (),
    images: int = 1,
    refiner: bool = False,
) -> GenerationRequest:
    return GenerationRequest(
        model=model or card.id,
        prompt="a picture",  # encoded once
        seed=seed,
        num_inference_steps=steps,
        num_images=images,
        width=card.sizes.width,
        height=card.sizes.height,
        loras=[Lora.of(file, 0.8) for file in files],
        controls=list(controls),
        refiner=refiner or None,
        output=OutputOptions(format="jpeg"),
        video=Video() if card.videos and not card.videos.framewise else None,
    )


def main() -> None:
    case = CASES[sys.argv[1]]
    found: list[dict[str, Any]] = []

    async def work(device: SimulatedDevice) -> None:
        found.append(await carry_out(case, device))

    run.on_device(case.gpu, work)
    print(json.dumps(found[0]), flush=True)
    os._exit(0)  # threads of the replica would keep the process


if __name__ == "__main__":
    main()
