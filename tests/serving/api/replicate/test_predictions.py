"""Predictions as the package replicate asks for them, unchanged."""

import base64
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import replicate
from replicate.exceptions import ReplicateError

from tests.patience import patience
from tests.serving.api.calls import ended
from tests.serving.api.conftest import KEY
from tests.serving.api.editing import png
from tests.serving.api.fake_model import FakeModel

RED = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


@pytest.fixture
async def sdk(address: str) -> AsyncIterator[replicate.Client]:
    async with httpx.AsyncHTTPTransport() as transport:
        yield replicate.Client(
            api_token=KEY, base_url=f"http://{address}", transport=transport, timeout=patience()
        )


async def test_a_run_returns_the_files(
    sdk: replicate.Client, client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    asked = {"prompt": "a fox", "aspect_ratio": "2:1", "num_outputs": 2, "go_fast": True}
    start = {"prompt": "a cat", "image": RED, "strength": 0.5}

    files = await sdk.async_run("someone/sketch", input=asked | {"output_format": "jpg"})
    again = await sdk.async_run("weft/sketch:sketch", input=start)

    first, second = fake_model.requests
    assert (len(files), first.num_images, first.output.format) == (2, 2, "jpeg")
    assert (await client.get(urlsplit(files[0]).path)).content[:3] == b"\xff\xd8\xff"
    assert 1.8 < first.width / first.height < 2.2
    assert len(again) == 1
    assert second.edit is not None
    assert second.edit.strength == 0.5


async def test_a_prediction_is_followed_and_cancelled(
    sdk: replicate.Client, client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    fake_model.gate.clear()
    body = {"version": "sketch", "input": {"prompt": "a fox", "odd": 1}}

    begun = (await client.post("/v1/predictions", json=body, headers={"Prefer": "wait=0"})).json()
    await fake_model.began.wait()
    running = await sdk.predictions.async_get(begun["id"])
    status = running.status
    await running.async_cancel()
    fake_model.gate.set()
    await running.async_wait()
    listed = await sdk.predictions.async_list()

    assert (begun["status"], status, running.status) == ("starting", "processing", "canceled")
    assert "input odd is not known here" in (running.logs or "")
    assert running.progress is not None
    assert running.progress.total == 20
    assert [one.id for one in listed.results] == [begun["id"]]


@pytest.mark.parametrize(
    ("asked", "status", "field"),
    [
        ({}, 422, "prompt"),
        ({"prompt": "x", "num_outputs": 17}, 422, "num_outputs"),
        ({"prompt": "x", "image": "https://example.org/a.png"}, 422, "image"),
        ({"prompt": "x", "image": RED, "prompt_strength": 0.0001}, 422, "prompt_strength"),
        ({"prompt": "x", "output_format": "gif"}, 422, "output_format"),
    ],
)
async def test_errors_are_problem_details_and_name_the_input(
    sdk: replicate.Client, fake_model: FakeModel, asked: dict[str, Any], status: int, field: str
) -> None:
    with pytest.raises(ReplicateError) as refused:
        await sdk.models.predictions.async_create(model=("someone", "sketch"), input=asked)

    assert refused.value.status == status
    assert field in (refused.value.detail or "")
    assert fake_model.requests == []


async def test_what_is_unknown_or_not_allowed_is_refused(client: httpx.AsyncClient) -> None:
    body = {"version": "none", "input": {"prompt": "a fox"}}
    hook = {"version": "sketch", "webhook": "https://example.org/a", "input": {"prompt": "a fox"}}

    unknown = await client.post("/v1/predictions", json=body)
    hooked = await client.post("/v1/predictions", json=hook)
    gone = await client.get(f"/v1/predictions/{'0' * 32}")
    version = await client.get("/v1/models/someone/sketch/versions/2")

    assert (unknown.status_code, gone.status_code, version.status_code) == (404, 404, 404)
    assert (hooked.status_code, hooked.json()["invalid_field"]) == (403, "webhook")
    assert unknown.json().keys() == {"title", "status", "detail", "invalid_field"}
    assert (await client.get("/v1/models/someone/sketch")).json()["object"] == "model"


async def test_events_that_no_webhook_is_sent_for_are_said(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    body = {
        "version": "sketch",
        "webhook": "https://example.org/a",
        "webhook_events_filter": ["start"],
        "input": {"prompt": "a fox", "num_inference_steps": 99},
    }

    made = await client.post("/v1/predictions", json=body, headers={"Prefer": "wait"})

    assert (made.status_code, made.json()["status"]) == (201, "succeeded")
    assert "webhooks are sent for completed only" in made.json()["logs"]
    assert "runs 1-50 steps" in made.json()["logs"]
    assert made.json()["input"]["num_inference_steps"] == 50


async def test_the_sdxl_service_generates_and_refines(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    fields = {"prompt": "a fox", "negative_prompt": "blur", "width": 64, "height": 64, "steps": 3}
    image = base64.b64encode(png()).decode()

    made = await client.post("/generate", json={**fields, "guidance": 5, "seed": 7, "num_images": 2})
    refined = await client.post("/refine", json={"prompt": "a fox", "image": image, "strength": 0.4})
    await ended(client, made.json()["task_id"])
    await ended(client, refined.json()["task_id"])

    first = next(request for request in fake_model.requests if request.task.value == "t2i")
    second = next(request for request in fake_model.requests if request.task.value == "refine")
    assert (first.num_inference_steps, first.guidance_scale, first.seed, first.num_images) == (3, 5.0, 7, 2)
    assert second.edit is not None
    assert second.edit.strength == 0.4
