"""Exactness in every dialect: asked for, refused before acceptance, and reported with the result."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai.types import ImageGenCompletedEvent
from websockets.asyncio.client import connect

from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.storage.results import ResultStore
from tests.patience import patience
from tests.serving.api.calls import ended, submitted
from tests.serving.api.cards import CARDS
from tests.serving.api.conftest import client_of
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.test_job_events import events_of, messages_of

MERGED = ("UNet2DConditionModel.forward",)
BODY = {"model": "sketch", "prompt": "a red fox"}
PATHS = {
    "native": "/api/generate/image",
    "tasks": "/generate-image",
    "openai": "/v1/images/generations",
}
every_dialect = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def codes(answer: dict[str, Any]) -> list[str]:
    return [warning["code"] for warning in answer["warnings"]]


@pytest.mark.parametrize(
    "path",
    ["/api/generate/image", "/generate-image", "/v1/images/generations"],
    ids=["native", "tasks", "openai"],
)
async def test_every_dialect_takes_the_policy(
    path: str, client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    for exact in ("strict", "prefer", "off", None):
        answer = await client.post(path, json=BODY | {"exact": exact})
        assert answer.status_code < 300, answer.text
        job_id = answer.json().get("id") or answer.json()["task_id"]
        job = await ended(client, job_id)
        assert job["request"]["exact"] == (exact or "prefer")

    assert [request.exact for request in fake_model.requests] == ["strict", "prefer", "off", "prefer"]


@pytest.mark.parametrize(
    "path",
    ["/api/generate/image", "/generate-image", "/v1/images/generations"],
    ids=["native", "tasks", "openai"],
)
async def test_a_policy_that_does_not_exist_is_named(path: str, client: httpx.AsyncClient) -> None:
    answer = await client.post(path, json=BODY | {"exact": "always"})

    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] == "exact"


@pytest.fixture
async def client_without_proofs(
    state: ApiState, store: JobStore, results: ResultStore
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an installation whose model proves nothing."""
    card = CARDS["sketch"]
    serving = card.serving.model_copy(update={"exact": "off"})
    cards = {card.id: card.model_copy(update={"serving": serving})}
    job_service = JobService(store, results, cards, state.settings)
    async with client_of(create_app(replace(state, job_service=job_service, cards=cards))) as client:
        yield client
    await job_service.aclose()


async def test_strict_is_refused_before_the_job_is_accepted_where_it_cannot_be_had(
    client_without_proofs: httpx.AsyncClient,
) -> None:
    refused = await client_without_proofs.post("/api/generate/image", json=BODY | {"exact": "strict"})

    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "exact"
    assert "proves no batch sizes" in refused.json()["error"]["message"]
    assert (await client_without_proofs.get("/api/generate/")).json()["jobs"] == []


async def test_a_late_warning_is_in_the_job_its_last_event_and_the_result_of_its_task(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    fake_model.merged_unproven = MERGED
    job_id = await submitted(client)

    events = (await client.get(f"/api/generate/{job_id}/events")).text
    job = (await client.get(f"/api/generate/{job_id}")).json()
    result = (await client.get(f"/task/{job_id}/result")).json()

    last = events_of(events)[-1]["data"]
    assert codes(last["job"]) == codes(job) == codes(result) == ["merged_unproven"]
    assert MERGED[0] in job["warnings"][0]["message"]


async def test_a_late_warning_is_in_the_last_message_of_the_socket(
    address: str, fake_model: FakeModel
) -> None:
    fake_model.merged_unproven = MERGED
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job_id = await submitted(client)
    async with connect(f"ws://{address}/ws/{job_id}") as socket:
        messages = await messages_of(socket)

    assert codes(messages[-1]["job"]) == ["merged_unproven"]


async def test_openais_dialect_reports_it_in_the_answer_and_in_the_stream(
    address: str, fake_model: FakeModel
) -> None:
    fake_model.merged_unproven = MERGED
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=patience()) as sdk:
        answer = await sdk.images.generate(prompt="a red fox", model="sketch")
        stream = await sdk.images.generate(prompt="a red fox", model="sketch", stream=True)
        completed = [event async for event in stream if isinstance(event, ImageGenCompletedEvent)]

    assert codes(answer.model_dump()) == ["merged_unproven"]
    assert [codes(event.model_dump()) for event in completed] == [["merged_unproven"]]


async def test_a_model_shows_its_policy_and_what_its_replica_has_proven(state: ApiState) -> None:
    proof = {
        "module": MERGED[0],
        "shape": "4x64x64 bfloat16",
        "call_rows": 2,
        "proven": (2, 4, 8),
        "refused": (6,),
        "pending": (),
    }
    asked: list[list[str]] = []

    async def model_proofs(models: Iterable[str]) -> dict[str, list[dict[str, object]]]:
        asked.append(list(models))
        return {"sketch": [proof]}

    async with client_of(create_app(replace(state, model_proofs=model_proofs))) as client:
        one = (await client.get("/api/models/sketch")).json()
        models = (await client.get("/api/models/")).json()["models"]

    assert asked == [["sketch"], list(CARDS)]
    assert one["exact"] == "prefer"
    assert one["proofs"] == [proof | {"proven": [2, 4, 8], "refused": [6], "pending": []}]
    assert {model["id"]: model["proofs"] for model in models} == {
        "sketch": one["proofs"],
        "tiny-flux-schnell": None,
    }
