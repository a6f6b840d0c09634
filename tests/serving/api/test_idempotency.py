"""The header Idempotency-Key, the cache and webhooks as callers of the HTTP API meet them."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from serve_app.api.native.image_body import ImageBody
from serve_app.api.native.video_body import VideoBody
from serve_app.api.openai.image_schemas import OpenAIImageBody
from serve_app.api.openai.video_schemas import ExtendRequest, OpenAIVideoBody, RemixRequest
from tests.serving.api.calls import ended, submitted
from tests.serving.api.conftest import client_of
from tests.serving.api.fake_model import FakeModel

BODY = {"model": "tiny-flux-schnell", "prompt": "a red fox"}
HEADER = {"Idempotency-Key": "0f8fad5b-d9cb-469f-a165-70867728950e"}


async def test_the_same_call_again_is_answered_with_the_same_job(client: httpx.AsyncClient):
    answers = await asyncio.gather(
        *(client.post("/api/generate/image", json=BODY, headers=HEADER) for _ in range(10))
    )

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len((await client.get("/api/generate/")).json()["jobs"]) == 1


async def test_another_call_under_the_same_key_is_refused_with_the_reason(client: httpx.AsyncClient):
    await client.post("/api/generate/image", json=BODY, headers=HEADER)

    answer = await client.post("/api/generate/image", json={**BODY, "seed": 1}, headers=HEADER)

    assert answer.status_code == 409
    assert answer.json()["error"]["param"] == "Idempotency-Key"
    assert "new key" in answer.json()["error"]["message"]


async def test_another_kind_of_call_under_the_same_key_is_refused(client: httpx.AsyncClient):
    await client.post("/api/generate/image", json=BODY, headers=HEADER)

    answer = await client.post("/v1/images/generations", json=BODY, headers=HEADER)

    assert answer.status_code == 409


def test_the_digest_of_a_body_survives_another_name_of_its_class():
    class Renamed(ImageBody):
        pass

    assert Renamed(**BODY).digest() == ImageBody(**BODY).digest()


def test_each_kind_of_body_has_a_digest_of_its_own():
    kinds = [
        (ImageBody, "image"),
        (VideoBody, "video"),
        (OpenAIImageBody, "openai image"),
        (OpenAIVideoBody, "openai video"),
        (RemixRequest, "openai remix"),
        (ExtendRequest, "openai extension"),
    ]

    assert [body.kind for body, _ in kinds] == [kind for _, kind in kinds]


@pytest.mark.parametrize("key", ["", "x" * 256, "two words"])
async def test_a_key_that_is_none_is_refused(client: httpx.AsyncClient, key: str):
    answer = await client.post("/api/generate/image", json=BODY, headers={"Idempotency-Key": key})

    assert answer.status_code == 422
    assert "Idempotency-Key" in answer.json()["error"]["message"]


async def test_a_synchronous_call_again_waits_for_the_same_pictures(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    body = {"prompt": "a red fox", "model": "sketch"}

    first, second = [await client.post("/v1/images/generations", json=body, headers=HEADER) for _ in range(2)]

    assert first.status_code == 200
    assert second.json() == first.json()


async def test_a_repeated_seed_is_answered_from_the_cache_until_that_is_emptied(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    body = {"model": "tiny-flux-schnell", "seed": 7, "width": 128, "height": 128}
    first = await ended(client, await submitted(client, **body))
    second = await ended(client, await submitted(client, **body))

    emptied = await client.delete("/api/cache")
    third = await ended(client, await submitted(client, **body))

    assert emptied.status_code == 204
    assert [job["cached"] for job in (first, second, third)] == [False, True, False]
    pictures = [(await client.get(job["artifacts"][0]["url"])).content for job in (first, second)]
    assert pictures[0] == pictures[1]


async def test_a_webhook_is_refused_while_no_host_is_allowed(client: httpx.AsyncClient):
    answer = await client.post("/api/generate/image", json={**BODY, "webhook_url": "https://example.org/"})

    assert answer.status_code == 403
    assert answer.json()["error"]["param"] == "webhook_url"
    assert "webhook_hosts" in answer.json()["error"]["message"]


async def test_a_caller_reads_the_secret_of_its_own_webhooks_only(app: FastAPI):
    async with client_of(app) as client:
        secrets = {(await client.get("/api/webhooks/secret")).json()["secret"] for _ in range(2)}

    assert len(secrets) == 1
    assert secrets.pop().startswith("whsec_")
