"""`GET /api/models` shows how a model runs, or would run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from deployments.planning.gpus import GPUS
from deployments.planning.plan import plan_of
from deployments.planning.report import report
from deployments.protocol.card import load_cards
from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.settings import Settings
from tests.serving.api.conftest import client_of


async def test_a_model_shows_the_plan_that_its_replica_reports(state: ApiState) -> None:
    flux = load_cards(Settings().cards_dir)["flux.1-dev"]
    plan = report(plan_of(flux, GPUS["l4"].machine()), "NVIDIA L4", loaded=True)
    model = next(iter(state.cards))

    async def model_plans(models: Iterable[str]) -> dict[str, dict[str, dict[str, object]] | None]:
        return {one: {model: plan} if one == model else None for one in models}

    async with client_of(create_app(replace(state, model_plans=model_plans))) as client:
        shown = (await client.get("/api/models/")).json()["models"]

    assert next(one["plan"] for one in shown if one["id"] == model) == plan
    assert plan["quantised"] == {"transformer": "fp8", "text_encoder_2": "fp8"}


async def test_without_a_replica_it_is_the_plan_for_the_device_that_the_card_names(state: ApiState) -> None:
    known = load_cards(Settings().cards_dir)
    flux = known["flux.1-dev"]
    on_l4 = flux.model_copy(update={"serving": flux.serving.model_copy(update={"accelerator_type": "L4"})})
    cards = {one.id: one for one in (known["tiny-sd15"], on_l4, known["sdxl-base-1.0"])}

    async with client_of(create_app(replace(state, cards=cards))) as client:
        shown = {one["id"]: one["plan"] for one in (await client.get("/api/models/")).json()["models"]}

    assert shown["flux.1-dev"] == report(plan_of(on_l4, GPUS["l4"].machine()), "NVIDIA L4", loaded=False)
    assert shown["tiny-sd15"]["device"] == "CPU"
    assert not shown["tiny-sd15"]["loaded"]
    assert shown["sdxl-base-1.0"] is None, "any GPU may run it"
