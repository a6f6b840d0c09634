"""Every dialect takes LoRAs in every form: one table of dialects, one of forms."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deployments.protocol.card import load_card
from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.loras.builtin import BuiltInLoras
from serve_app.services import Services
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.api.cards import CARDS
from tests.serving.api.conftest import client_of
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.lora_files import digest, lora_file
from tests.serving.fakes import eventually

WAN = load_card(Path(__file__).parents[3] / "configs/models/tiny-wan.yaml")
ANY_FAMILY = "transformer.transformer_blocks.0.attn.to_q"
INK, FOG = lora_file(7, layer=ANY_FAMILY), lora_file(8, layer=ANY_FAMILY)
SHIPPED = "models/tiny-flux-schnell/loras/lora_night/pytorch_lora_weights.safetensors"
AS_TEXT = base64.b64encode(INK).decode()
ENDPOINTS = {  # path -> the model that the calls name
    "/api/generate/image": "sketch",
    "/generate-image": "sketch",
    "/api/generate/video": "tiny-wan",
    "/generate-video": "tiny-wan",
    "/v1/videos": "tiny-wan",
}
LIST_AS_TEXT = json.dumps([{"id": "ink", "weight": 0.8}])
WAYS: dict[str, dict[str, Any]] = {
    "list by id": {"loras": [{"id": "ink", "weight": 0.8}]},
    "list by name and scale": {"loras": [{"name": "ink", "scale": 0.8}]},
    "list by digest": {"loras": [{"id": digest(INK), "weight": 0.8}]},
    "list with the file": {"loras": [{"base64": AS_TEXT, "weight": 0.8}]},
    "text": {"loras": "ink:0.8"},
    "JSON text": {"loras": LIST_AS_TEXT},
    "model_id": {"model_id": "ink", "lora_weight": 0.8},
    "lora_base64": {"lora_base64": AS_TEXT, "lora_weight": 0.8},
    "tag": {"prompt": "a fox <lora:ink:0.8>"},
    "vLLM-Omni": {"lora": {"name": "ink", "scale": 0.8, "int_id": 1}},
}
FORM_WAYS: dict[str, dict[str, str | bytes]] = {  # bytes are files
    "text": {"loras": "ink:0.8"},
    "JSON text": {"loras": LIST_AS_TEXT},
    "upload": {"loras": json.dumps([{"upload": "mine", "weight": 0.8}]), "mine": INK},
    "lora_file": {"lora_weight": "0.8", "lora_file": INK},
    "lora_base64": {"lora_base64": AS_TEXT, "lora_weight": "0.8"},
    "model_id": {"model_id": "ink", "lora_weight": "0.8"},
    "tag": {"prompt": "a fox <lora:ink:0.8>"},
    "vLLM-Omni": {"lora": json.dumps({"name": "ink", "scale": 0.8})},
}


async def no_replicas(_digest: str) -> None:
    """There are no replicas here."""


@pytest.fixture
async def state(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[ApiState]:
    async def model_states() -> dict[str, str]:
        return {"sketch": "ready", WAN.id: "ready"}

    cards = CARDS | {WAN.id: WAN}
    job_service = JobService(store, results, cards, settings)
    lora_service = Services(settings, store, results).lora_service(BuiltInLoras(cards.values()), no_replicas)
    yield ApiState(job_service, cards, settings, model_states, lora_service=lora_service)
    await job_service.aclose()


@pytest.fixture(autouse=True)
async def _registered(client: httpx.AsyncClient) -> None:
    for file, name in ((INK, "ink"), (FOG, "fog")):
        answer = await client.post("/api/loras", files={"file": file}, data={"name": name})
        assert answer.status_code == 201, answer.text


async def asked_for(client: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    """The request of the job that was accepted; weights by digest, for a file is called after itself."""
    assert answer.status_code in (200, 202), answer.text
    accepted = answer.json()
    job = (await client.get(f"/api/generate/{accepted.get('id') or accepted['task_id']}")).json()
    request: dict[str, Any] = job["request"]
    return {**request, "loras": {lora["sha256"]: lora["weight"] for lora in request["loras"]}}


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_json_asks_for_a_lora_in_any_way(client: httpx.AsyncClient, path: str) -> None:
    for way, body in WAYS.items():
        answer = await client.post(path, json={"prompt": "a fox", "model": ENDPOINTS[path], **body})

        request = await asked_for(client, answer)
        assert request["loras"] == {digest(INK): 0.8}, way
        assert request["prompt"] == "a fox", way


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_form_asks_for_a_lora_in_any_way(client: httpx.AsyncClient, path: str) -> None:
    for way, fields in FORM_WAYS.items():
        form = {"prompt": "a fox", "model": ENDPOINTS[path], **fields}
        parts = {name: (None if isinstance(value, str) else name, value) for name, value in form.items()}

        answer = await client.post(path, files=parts)  # type: ignore[arg-type]  # texts without a file name

        request = await asked_for(client, answer)
        assert request["loras"] == {digest(INK): 0.8}, way
        assert request["prompt"] == "a fox", way


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_several_add_up_whichever_way_they_are_named(client: httpx.AsyncClient, path: str) -> None:
    body = {
        "prompt": "a fox <lora:fog:-0.5>",
        "model": ENDPOINTS[path],
        "lora": {"name": "ink", "scale": 1.5},
    }

    request = await asked_for(client, await client.post(path, json=body))

    assert request["loras"] == {digest(INK): 1.5, digest(FOG): -0.5}


async def test_openai_pictures_ask_in_any_way(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    for way, body in WAYS.items():
        body = {"prompt": "a fox", "model": "sketch", **body}

        answer = await client.post("/v1/images/generations", json=body)

        assert answer.status_code == 200, (way, answer.text)
        assert [(lora.id, lora.weight) for lora in fake_model.requests[-1].loras] == [(digest(INK), 0.8)], way


async def test_the_openai_sdk_asks_by_extra_body(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    sdk = openai.AsyncOpenAI(
        api_key="none", base_url="http://127.0.0.1/v1", http_client=client, max_retries=0
    )

    picture = await sdk.images.generate(
        model="sketch", prompt="a fox", extra_body={"lora": {"name": "ink", "scale": 0.8}}
    )
    video = await sdk.videos.create(model="tiny-wan", prompt="a fox", extra_body={"loras": "ink:0.8"})

    assert picture.data
    assert [(lora.id, lora.weight) for lora in fake_model.requests[-1].loras] == [(digest(INK), 0.8)]
    job = (await client.get(f"/api/generate/{video.id}")).json()
    assert [lora["name"] for lora in job["request"]["loras"]] == ["ink"]


async def test_a_path_in_vllms_object_is_that_of_a_shipped_adapter(client: httpx.AsyncClient) -> None:
    def body(path: str) -> dict[str, Any]:
        lora = {"name": "night", "path": path, "scale": 0.5}
        return {"prompt": "a fox", "model": "tiny-flux-schnell", "lora": lora}

    known = await client.post("/api/generate/image", json=body(SHIPPED))
    other = await client.post("/api/generate/image", json=body("/etc/passwd"))

    assert list((await asked_for(client, known))["loras"].values()) == [0.5]
    assert (other.status_code, other.json()["error"]["param"]) == (404, "lora.path")


BAD_OBJECTS: list[tuple[Any, str, str]] = [
    ({"scale": 1.0}, "lora", "needs a name or a path"),
    ({"name": "unknown"}, "lora.name", "there is no adapter 'unknown'"),
    ({"name": "ink", "scale": 3}, "lora.scale", "less than or equal to 2"),
    ({"name": "ink", "strength": 1}, "lora.strength", "not a field"),
    ("ink", "lora", "cannot be read as JSON"),
    ('{"name": 5}', "lora.name", "string"),
    ("[" * 100_000, "lora", "cannot be read as JSON"),
]


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_bad_object_is_refused_by_its_field(client: httpx.AsyncClient, path: str) -> None:
    for lora, param, part in BAD_OBJECTS:
        answer = await client.post(path, json={"prompt": "a fox", "model": ENDPOINTS[path], "lora": lora})

        error = answer.json()["error"]
        assert answer.status_code in (400, 404, 422)
        assert error["param"] == param, error
        assert part in error["message"], error


async def test_a_wrong_shape_is_refused_in_every_dialect_before_there_is_a_job(
    state: ApiState, store: JobStore, results: ResultStore
) -> None:
    async def layers(_model: str) -> dict[str, tuple[int, ...]]:
        return {f"{part}.transformer_blocks.0.attn.to_q": (4, 640) for part in ("transformer", "unet")}

    lora_service = Services(state.settings, store, results).lora_service(
        BuiltInLoras(state.cards.values()), no_replicas, layers
    )
    async with client_of(create_app(replace(state, lora_service=lora_service))) as client:
        for path, model in ENDPOINTS.items():
            for way in ({"loras": "ink"}, {"lora_base64": AS_TEXT}):
                answer = await client.post(path, json={"prompt": "a fox", "model": model, **way})

                assert answer.status_code in (400, 422), answer.text
                assert "(2, 4), and its layer needs (rank, 640)" in answer.json()["error"]["message"]
                assert answer.json()["error"]["param"] == next(iter(way))
        assert (await client.get("/api/generate/")).json()["jobs"] == []


async def completed(client: httpx.AsyncClient, job_id: str) -> bool:
    status: str = (await client.get(f"/api/generate/{job_id}")).json()["status"]
    return status == "completed"


async def collected(state: ApiState, results: ResultStore, content: bytes) -> bool:
    """Whether the file is gone: at its deletion already, where no job needed it then."""
    assert state.lora_service is not None
    await state.lora_service.collect_all()
    return digest(content) not in await results.adapters()


class Projector(FakeModel):
    """Its videos hold pictures; that they ended is all that matters here."""

    def free_slots(self) -> Mapping[str, int]:
        return {WAN.id: 8}


@pytest.fixture
async def projector(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[Projector]:
    projector = Projector()
    dispatcher = Dispatcher(store, results, projector, settings)
    running = asyncio.create_task(dispatcher.run())
    yield projector
    await dispatcher.drain()
    await running


async def test_a_remix_uses_the_loras_of_its_original_while_their_files_are_there(
    client: httpx.AsyncClient, state: ApiState, results: ResultStore, projector: Projector
) -> None:
    body = {"prompt": "a fox", "model": "tiny-wan", "loras": "ink:0.8"}
    video = (await client.post("/v1/videos", json=body)).json()["id"]
    await eventually(lambda: completed(client, video), 30)
    remix = f"/v1/videos/{video}/remix"

    again = await asked_for(client, await client.post(remix, json={"prompt": "a cat"}))
    both = await asked_for(client, await client.post(remix, json={"prompt": "a cat <lora:fog:0.3>"}))
    await client.delete("/api/loras/ink")
    await eventually(lambda: collected(state, results, INK), 30)  # as soon as no job needs it
    gone = await client.post(remix, json={"prompt": "a dog"})

    assert again["loras"] == {digest(INK): 0.8}
    assert both["loras"] == {digest(INK): 0.8, digest(FOG): 0.3}
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "loras")
    assert "the file of the LoRA ink is gone" in gone.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/api/generate/video", "/v1/videos"])
async def test_a_lora_of_another_family_is_no_use_to_a_video_model(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.post(path, json={"prompt": "a fox", "model": "tiny-wan", "loras": "night"})

    assert answer.status_code in (400, 422)
    assert "made for tiny-flux-schnell" in answer.json()["error"]["message"]
