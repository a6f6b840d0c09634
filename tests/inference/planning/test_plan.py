"""Plans of published models on known GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.planning.device_limit import GIB
from deployments.planning.gpus import GPUS
from deployments.planning.machine import Machine
from deployments.planning.part_plan import Placement, planned_part
from deployments.planning.plan import Plan, plan_of
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelFailed, OutOfMemory
from tests.inference.planning.published_cards import CARDS, card_of
from tests.inference.planning.published_models import MODELS
from tests.inference.planning.table import PAGE, table, written

VARIED = ["flux.1-dev", "flux.2-dev", "sdxl-base-1.0", "wan-2.2-t2v-a14b", "hunyuan-video", "z-image-turbo"]
GPU_NAMES = [name for name, gpu in GPUS.items() if gpu.total_gib is not None]


def on(name: str, gpu: str, **serving: Any) -> Plan:
    return plan_of(serving_as(card_of(name), **serving), GPUS[gpu].machine())


def serving_as(card: ModelCard, **serving: Any) -> ModelCard:
    return card.model_copy(update={"serving": card.serving.model_copy(update=serving)})


def with_memory(gib: float) -> Machine:
    return Machine("GPU", "cuda", int(gib * GIB), (8, 9))


@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize("name", VARIED)
def test_a_plan_fits_or_says_how_much_is_missing(name: str, gpu: str) -> None:
    machine = GPUS[gpu].machine()

    plan = plan_of(card_of(name), machine)

    if plan.refusal is None:
        assert plan.planned is not None
        assert machine.limit_bytes is not None
        assert 0 < sum(part.held_bytes for part in plan.parts) < plan.planned.peak <= machine.limit_bytes
    else:
        assert isinstance(plan.refusal.error(), OutOfMemory)
        assert plan.refusal.message.count("GiB") >= 2
    assert plan_of(card_of(name), machine) == plan


def rank(plan: Plan) -> tuple[Any, ...]:
    """The lower, the better."""
    if plan.refusal is not None:
        return (9,)
    forms = {None: 0, "fp8": 1, "nf4": 2}
    places = {"device": 0, "on_demand": 1, "streamed": 2, "sequential": 3}
    denoiser = next(part for part in plan.parts if part.name in ("transformer", "unet"))
    moves = places[denoiser.placement]
    return (moves, 0 if moves else forms[denoiser.quantisation], -denoiser.resident_blocks)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from([*MODELS]), gib=st.floats(2, 100), more=st.floats(0, 60))
def test_more_memory_never_gives_a_worse_plan(name: str, gib: float, more: float) -> None:
    card = card_of(name)

    assert rank(plan_of(card, with_memory(gib + more))) <= rank(plan_of(card, with_memory(gib)))


def test_flux_goes_down_the_ladder_as_memory_shrinks() -> None:
    steps = [
        (
            plan.part("transformer").placement,
            plan.part("transformer").quantisation,
            plan.part("text_encoder_2").placement,
            plan.part("text_encoder_2").quantisation,
        )
        for gib in (48, 34, 22, 20.5, 13.5, 10.9, 9, 4.3)
        if (plan := plan_of(card_of("flux.1-dev"), with_memory(gib)))
    ]

    assert steps == [
        ("device", None, "device", None),
        ("device", None, "on_demand", None),
        ("device", "fp8", "on_demand", None),
        ("device", "fp8", "device", "fp8"),
        ("device", "nf4", "on_demand", "fp8"),
        ("device", "nf4", "on_demand", "nf4"),
        ("streamed", "fp8", "streamed", "fp8"),
        ("sequential", "fp8", "sequential", "fp8"),
    ]


def test_a_t4_computes_in_float16_with_a_vae_in_float32() -> None:
    plan = on("sdxl-base-1.0", "t4")

    assert {part.name: part.dtype for part in plan.parts} == {
        "unet": "float16",
        "text_encoder": "float16",
        "text_encoder_2": "float16",
        "vae": "float32",
    }
    assert any("bfloat16" in note for note in plan.notes)


def test_what_a_card_says_is_obeyed() -> None:
    assert on("flux.1-dev", "h100", quantisation="nf4").part("transformer").quantisation == "nf4"
    assert on("flux.1-dev", "h100", offload="text_encoders").part("text_encoder_2").placement == "on_demand"
    assert on("flux.1-dev", "h100", offload="sequential").part("transformer").placement == "sequential"
    assert on("flux.1-dev", "h100", vae_tiling=True).vae_tiling
    assert on("flux.1-dev", "a10g", offload="balanced").part("transformer").resident_blocks > 0
    assert on("flux.1-dev", "h100", offload="balanced").part("transformer").placement == "device"


def test_a_setting_that_does_not_fit_is_refused_with_bytes_and_cure() -> None:
    refusal = on("flux.1-dev", "a10g", quantisation="none", offload="none").refusal

    assert refusal is not None
    assert "needs 34.7 GiB" in refusal.message
    assert "20.5 GiB are there" in refusal.message
    assert "set quantisation, offload and vae_tiling of its card to auto" in refusal.message
    assert "NVIDIA A100-SXM4-40GB" in refusal.message


def test_a_form_that_the_device_lacks_is_refused() -> None:
    refusal = on("flux.1-dev", "a100-80", quantisation="fp8_dynamic").refusal

    assert refusal is not None
    assert isinstance(refusal.error(), ModelFailed)
    assert "write fp8, int8 or auto" in refusal.message


def test_weights_that_the_host_cannot_keep_are_not_moved_there() -> None:
    machine = Machine("GPU", "cuda", 9 * GIB, (8, 9), host_bytes=8 * GIB)

    refusal = plan_of(card_of("flux.1-dev"), machine).refusal

    assert refusal is not None
    assert "more memory for the host, where 15.6 GiB of weights would be kept" in refusal.message
    assert plan_of(card_of("flux.1-dev"), replace(machine, host_bytes=32 * GIB)).refusal is None


def test_refiner_and_controlnets_are_counted_where_they_fit() -> None:
    card, refiner = CARDS["sdxl-base-1.0"], CARDS["sdxl-refiner-1.0"]

    large = plan_of(card, GPUS["l40s"].machine(), [refiner])
    small = plan_of(card, GPUS["rtx-3060"].machine(), [refiner])

    assert large.planned is not None
    assert large.planned.others == pytest.approx((3 * 1251.0 + 2259.5) * 2e6, rel=0.001)
    assert small.planned is not None
    assert small.planned.others == 0
    assert any(note.startswith("the refiner sdxl-refiner-1.0") for note in small.notes)


def test_models_of_a_group_are_counted_up_to_those_loaded_at_once() -> None:
    names = ("stable-diffusion-v1.5", "dreamshaper-8", "realistic-vision-v6")
    first, *others = (serving_as(CARDS[name], models_loaded=2) for name in names)

    plan = plan_of(first, GPUS["a10g"].machine(), others)

    assert plan.planned is not None
    nets = 3 * 361.3 * 2e6
    assert plan.planned.others - nets == pytest.approx(plan.planned.weights, rel=0.001)


def test_half_a_gpu_has_half_the_memory() -> None:
    half = plan_of(CARDS["sdxl-base-1.0"], GPUS["a10g"].machine(0.5))

    assert half.planned is not None
    assert half.planned.peak <= GPUS["a10g"].machine(0.5).limit_bytes < 11 * GIB  # type: ignore[operator]


@pytest.mark.parametrize("name", [name for name in CARDS if name.startswith("tiny")])
def test_a_card_without_memory_has_everything_on_the_device(name: str) -> None:
    plan = plan_of(CARDS[name], GPUS["t4"].machine())

    assert plan.planned is None
    assert {part.placement for part in plan.parts} <= {"device"}


def test_every_real_card_states_its_memory() -> None:
    assert [name for name, card in CARDS.items() if card.memory is None and "tiny" not in name] == []
    assert MODELS.keys() <= CARDS.keys()


def test_the_page_has_the_table_of_plans() -> None:
    assert written(PAGE.read_text(encoding="utf-8")) == table()


@pytest.mark.parametrize("placement", ["streamed", "sequential"])
def test_embeddings_of_an_encoder_whose_weights_move_stay_in_their_dtype(placement: Placement) -> None:
    card = CARDS["flux.1-dev"]
    assert card.memory is not None
    needs = card.memory.parts["text_encoder_2"]
    embeddings = needs.parameters * (1 - needs.linear)
    moving = {"streamed": needs.blocks[0].parameters, "sequential": needs.largest_layer}[placement]

    part = planned_part("text_encoder_2", needs, "bfloat16", placement, "int8")

    assert part.held_bytes == pytest.approx(1e6 * (2 * embeddings + 2 * moving), rel=0.01)
