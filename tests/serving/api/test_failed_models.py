"""A model that cannot be loaded: what its jobs, its entry and requests without a model say."""

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from deployments.protocol.errors import ModelFailed
from deployments.protocol.events import Failed
from serve_app.api.app import create_app
from serve_app.api.state import ApiState, ModelFailure
from tests.serving.api.calls import ended, submitted
from tests.serving.api.conftest import client_of
from tests.serving.api.fake_model import FakeModel

REASON = "the hub gives them only to those who accepted their licence; set HF_TOKEN"


@pytest.fixture
async def client(state: ApiState, fake_model: FakeModel) -> AsyncIterator[httpx.AsyncClient]:
    async def states() -> dict[str, str]:
        return {"sketch": "failed", "tiny-flux-schnell": "idle"}

    async def failures() -> dict[str, ModelFailure]:
        return {"sketch": ModelFailure("model_failed", REASON, 1.0, 2, 31.0)}

    fake_model.failure = Failed.of(ModelFailed(REASON))
    async with client_of(create_app(replace(state, model_states=states, model_failures=failures))) as client:
        yield client


async def test_its_job_fails_at_its_first_attempt_with_the_reason(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    job = await ended(client, await submitted(client))

    assert job["status"] == "failed"
    assert job["error"] == {"kind": "model_failed", "message": REASON, "param": None}
    assert len(fake_model.requests) == 1


async def test_a_call_that_waits_for_it_is_answered_for_good(client: httpx.AsyncClient):
    answer = await client.post("/v1/images/generations", json={"model": "sketch", "prompt": "a red fox"})

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_failed"
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers


async def test_its_entry_says_since_when_why_and_when_it_is_tried_again(client: httpx.AsyncClient):
    failed = (await client.get("/api/models/sketch")).json()
    other = (await client.get("/api/models/tiny-flux-schnell")).json()

    assert failed["state"] == "failed"
    assert failed["failure"] == {
        "kind": "model_failed",
        "message": REASON,
        "since": 1.0,
        "tries": 2,
        "retry_at": 31.0,
    }
    assert (other["state"], other["failure"]) == ("idle", None)


async def test_a_request_without_a_model_goes_to_another(client: httpx.AsyncClient, fake_model: FakeModel):
    answer = await client.post("/api/generate/image", json={"prompt": "a red fox"})
    job = await ended(client, answer.json()["id"])

    assert job["request"]["model"] == "tiny-flux-schnell"


async def test_a_service_of_failed_models_only_is_not_ready(state: ApiState):
    async def states() -> dict[str, str]:
        return {"sketch": "failed"}

    async with client_of(create_app(replace(state, model_states=states))) as client:
        answer = await client.get("/ready")

    assert answer.status_code == 503
    assert answer.json()["models"] == {"sketch": "failed"}
