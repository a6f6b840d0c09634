"""Text encoders that compute on the CPU beside a device, and VAEs that are on it for a call only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deployments.engine.call import Seam
from deployments.engine.intercept import intercept
from deployments.models.model_extras import _weights_of
from deployments.models.model_memory import held_bytes
from deployments.models.offload import OnCpu, OnDemand, offload, offloaded_part
from deployments.models.packed_weights import PackedWeights
from deployments.planning.machine import Machine
from deployments.planning.plan import PartPlan, Placement, Plan, plan_of
from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.events import Artifact, Event, Failed
from deployments.protocol.request import GenerationRequest, Lora
from deployments.replica import ModelReplica
from tests.inference.lora_files import file_of, random_lora
from tests.inference.models.test_offload import bench, blank, is_blank
from tests.inference.planning.published_cards import card_of

CARDS = Path(__file__).parents[3] / "configs/models"
CARD = load_card(CARDS / "tiny-flux-dev.yaml")
ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def placed(names: tuple[str, ...], placement: Placement) -> Plan:
    return Plan("float32", tuple(PartPlan(name, "float32", placement) for name in names))


# --- on the replica ----------------------------------------------------------------------------------------


def replica(monkeypatch: pytest.MonkeyPatch, plan: Plan | None) -> ModelReplica:
    """Of the small model, as planned: a CPU's own plan leaves every part where it is."""
    serving = CARD.serving.model_copy(update={"warm_up": False, "exact": "strict"})
    weights = CARD.weights.model_copy(update={"dtype": "float32"})
    card = CARD.model_copy(update={"serving": serving, "weights": weights})
    with monkeypatch.context() as patched:
        if plan is not None:
            patched.setattr("deployments.models.model_instance.plan_of", lambda *_arguments: plan)
        return ModelReplica([card])


async def answers(made: ModelReplica, requests: list[GenerationRequest]) -> list[list[Event]]:
    async def answer(request: GenerationRequest) -> list[Event]:
        return [event async for event in made.generate(request)]

    return await asyncio.gather(*map(answer, requests))


def picture(events: list[Event]) -> bytes:
    return next(event.data for event in events if isinstance(event, Artifact) and event.kind == "image")


def pixels(events: list[Event]) -> Any:
    from io import BytesIO

    from PIL import Image

    return np.asarray(Image.open(BytesIO(picture(events))))


REQUESTS = [
    GenerationRequest(model=CARD.id, prompt=prompt, seed=seed, num_inference_steps=2, width=256, height=256)
    for seed, prompt in enumerate(("a red circle", "two stars", "a red circle"))
]


async def test_pictures_of_encoders_on_the_cpu_are_those_of_encoders_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, split = replica(monkeypatch, None), replica(monkeypatch, placed(ENCODERS, "cpu"))
    threads: set[str] = set()
    call = OnCpu.call

    def noted(part: OnCpu, *arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        return call(part, *arguments)

    monkeypatch.setattr(OnCpu, "call", noted)
    try:
        expected = await answers(plain, REQUESTS)
        got = await answers(split, REQUESTS)
        (model,) = split._runtime.models.models
        misses = model.prompts.misses
        again = await answers(split, REQUESTS[:1])
    finally:
        for made in (plain, split):
            made.__del__()

    assert threads, "the encoders have computed"
    assert all(name.startswith("auxiliary") for name in threads), "while the device goes on with steps"
    for ours, theirs in zip([*got, *again], [*expected, expected[0]], strict=True):
        assert np.array_equal(pixels(ours), pixels(theirs))
    assert model.prompts.misses == misses, "embeddings are kept as ever"
    assert model.plan.part("text_encoder_2").placement == "cpu"


async def test_a_lora_for_an_encoder_on_the_cpu_is_refused_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = replica(monkeypatch, placed(ENCODERS, "cpu"))
    (model,) = made._runtime.models.models
    pipeline = model.pipelines._pipeline
    files = [
        file_of(random_lora(pipeline, [part], rank=4, seed=1)) for part in ("text_encoder", "transformer")
    ]
    requests = [REQUESTS[0].model_copy(update={"loras": (Lora.of(file),)}) for file in files]
    try:
        refused, used = await answers(made, requests)
    finally:
        made.__del__()

    assert isinstance(refused[-1], Failed)
    assert "the LoRA changes text_encoder, which computes on the CPU here" in refused[-1].message
    assert picture(used)


# --- inputs and outputs ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_inference")
def test_outputs_of_an_encoder_on_the_cpu_go_to_the_device() -> None:
    encoder = nn.Linear(4, 4)
    offload(encoder, PartPlan("text_encoder_2", "float32", "cpu"), torch.device("meta"))
    seams: list[Seam] = []
    intercept([encoder], seams, _weights_of)

    output = encoder(torch.ones(1, 4))

    part = offloaded_part(encoder)
    assert part is not None
    assert (part.held_bytes, part.used_bytes, part.host_bytes) == (0, 0, 4 * (16 + 4))
    assert output.device.type == "meta"
    assert encoder.weight.device.type == "cpu"
    assert [seam.auxiliary for seam in seams] == [True]


# --- the plan ----------------------------------------------------------------------------------------------

RTX_4090 = Machine("NVIDIA GeForce RTX 4090", "cuda", int(21.9 * 2**30), (8, 9), 64 * 2**30)


def as_set(name: str, **serving: Any) -> ModelCard:
    card = card_of(name)
    return card.model_copy(update={"serving": card.serving.model_copy(update=serving)})


def test_a_denoiser_in_8_bits_with_encoders_on_the_cpu_comes_before_one_in_4_bits() -> None:
    plan = plan_of(as_set("wan-2.1-t2v-14b"), RTX_4090)
    without_host = plan_of(as_set("wan-2.1-t2v-14b"), replace(RTX_4090, host_bytes=8 * 2**30))

    assert (plan.part("transformer").quantisation, plan.part("text_encoder").placement) == ("fp8", "cpu")
    assert plan.part("text_encoder").quantisation is None
    assert plan.part("text_encoder").device_bytes == 0
    assert plan.host_bytes == plan.part("text_encoder").weight_bytes
    assert any("text_encoder computes on the CPU for each new prompt" in note for note in plan.notes)
    assert without_host.part("text_encoder").placement != "cpu"


def test_a_card_may_ask_for_encoders_on_the_cpu() -> None:
    plan = plan_of(as_set("flux.1-dev", offload="text_encoders_on_cpu"), RTX_4090)
    unlimited = plan_of(
        load_card(CARDS / "tiny-flux-dev.yaml").model_copy(
            update={"serving": CARD.serving.model_copy(update={"offload": "text_encoders_on_cpu"})}
        ),
        RTX_4090,
    )

    assert plan.part("text_encoder_2").placement == "cpu"
    assert plan.part("transformer").placement == "device"
    assert unlimited.part("text_encoder").placement == "cpu"


def test_loras_for_encoders_keep_these_off_the_cpu() -> None:
    """A stable-diffusion LoRA changes text encoders."""
    for limit in (1.2, 2, 3, 4, 6):
        plan = plan_of(card_of("sdxl-base-1.0"), replace(RTX_4090, limit_bytes=int(limit * 2**30)))
        assert {part.placement for part in plan.parts} <= {"device", "on_demand", "streamed", "sequential"}


# --- VAEs that are on the device for a call only --------------------------------------------------------


@pytest.mark.usefixtures("_inference")
@pytest.mark.parametrize("name", ["tiny-flux-dev", "tiny-sd15"])
def test_a_batch_decodes_with_a_vae_that_leaves_the_device_after_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use_host(packed: PackedWeights) -> None:
        packed.use([blank(weight) for weight in packed._on_host])

    monkeypatch.setattr(PackedWeights, "use_host", use_host)
    plain, moving = bench(name), bench(name, placed(("vae",), "on_demand"))
    vae = moving.model._pipeline.vae
    halves = [offloaded_part(half) for half in (vae.encoder, vae.decoder)]
    sizes = [half.used_bytes for half in halves if isinstance(half, OnDemand)]
    held = held_bytes([vae])
    copied: list[int] = []
    copy_to = PackedWeights.copy_to

    def noted(packed: PackedWeights, block: Tensor) -> None:
        copied.append(packed.size_bytes)
        copy_to(packed, block)

    monkeypatch.setattr(PackedWeights, "copy_to", noted)
    fibers = moving.together(moving.requests)

    assert set(copied) == set(sizes), "for pictures that are given, and for those that are made"
    assert [half._block for half in halves if isinstance(half, OnDemand)] == [None, None], "it is free again"
    assert all(is_blank(weight) for half in (vae.encoder, vae.decoder) for weight in half.parameters())
    assert held < sum(sizes) / 50
    for request, fiber in zip(moving.requests, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert fiber.result.same_bits(plain.expected(request))


def test_the_last_way_to_hold_a_model_moves_its_vae_too() -> None:
    plan = plan_of(as_set("flux.1-dev", offload="sequential"), RTX_4090)
    vae = plan.part("vae")

    assert vae.placement == "on_demand"
    assert plan.planned is not None
    assert plan.planned.auxiliary >= vae.device_bytes > vae.held_bytes == 0
