"""Chapter 4: three HTTP dialects translate to the same requests and use the same job service."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import httpx
import pytest

from deployments.protocol.card import ModelCard
from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.settings import Settings
from tests.patience import patience


@pytest.fixture
async def client(job_service: JobService, card: ModelCard) -> AsyncIterator[httpx.AsyncClient]:
    async def states() -> dict[str, str]:
        return {card.id: "ready"}

    app = create_app(
        ApiState(
            job_service=job_service, cards={card.id: card}, settings=Settings.load(), model_states=states
        )
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1", timeout=patience()
    ) as client:
        yield client


async def test_the_native_dialect_answers_202_without_waiting(
    client: httpx.AsyncClient, job_service: JobService
) -> None:
    answer = await client.post("/api/generate/image", json={"prompt": "a red circle", "steps": 30})

    assert answer.status_code == 202
    assert "Overriding 30 -> 4" in answer.json()["warnings"][0]["message"]
    await job_service.wait(answer.json()["id"], "local", timeout_s=patience())
    job = (await client.get(f"/api/generate/{answer.json()['id']}")).json()
    image = await client.get(job["artifacts"][0]["url"])
    assert image.headers["content-type"] == "image/png"


async def test_the_openai_dialect_waits_and_returns_the_image(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/v1/images/generations", json={"prompt": "a red circle", "response_format": "b64_json"}
    )

    assert base64.b64decode(answer.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")


async def test_the_task_dialect_answers_with_a_task_id(
    client: httpx.AsyncClient, job_service: JobService
) -> None:
    task = (await client.post("/generate-image", json={"prompt": "a red circle"})).json()

    task_id = task["task_id"]
    await job_service.wait(task_id, "local", timeout_s=patience())

    assert (await client.get(f"/task/{task_id}/status")).json()["status"] == "completed"
