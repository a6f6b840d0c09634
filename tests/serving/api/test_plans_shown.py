"""`GET /api/models` shows how a loaded model runs."""

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
    plan = report(plan_of(flux, GPUS["l4"].machine()))
    model = next(iter(state.cards))

    async def model_plans(models: Iterable[str]) -> dict[str, dict[str, dict[str, object]] | None]:
        return {one: {model: plan} if one == model else None for one in models}

    async with client_of(create_app(replace(state, model_plans=model_plans))) as client:
        shown = (await client.get("/api/models/")).json()["models"]

    assert {one["id"]: one["plan"] for one in shown} == dict.fromkeys(state.cards) | {model: plan}
    assert plan["quantised"] == {"transformer": "fp8", "text_encoder_2": "fp8"}
