"""LoRAs over HTTP: registered ones, those that a request brings along, and what becomes of their files."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.loras.builtin import BuiltInLoras
from serve_app.loras.service import LoraService
from serve_app.services import Services
from serve_app.storage.results import ResultStore, adapter_path
from serve_app.storage.url_fetcher import UrlFetcher
from tests.serving.api.cards import CARDS
from tests.serving.api.conftest import client_of
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.lora_files import NIGHT, digest, lora_file
from tests.serving.fakes import eventually, picture

INK = lora_file(1, ss_output_name="ink")
FOG = lora_file(2, ss_output_name="fog")
WIDE = lora_file(3, layer="transformer.single_transformer_blocks.0.attn.to_q")  # a FLUX


class Broadcast:
    """Records the digests that replicas were asked to unload."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    async def __call__(self, digest: str) -> None:
        self.digests.append(digest)


@pytest.fixture
def unload() -> Broadcast:
    return Broadcast()


@pytest.fixture
def lora_service(state: ApiState, store: Any, results: ResultStore, unload: Broadcast) -> LoraService:
    services = Services(state.settings, store, results)
    return services.lora_service(BuiltInLoras(CARDS.values()), unload)


@pytest.fixture
def app(state: ApiState, lora_service: LoraService) -> FastAPI:
    return create_app(replace(state, lora_service=lora_service))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


async def register(client: httpx.AsyncClient, file: bytes, **fields: str) -> dict[str, Any]:
    answer = await client.post("/api/loras", files={"file": ("a.safetensors", file)}, data=fields)
    assert answer.status_code == 201, answer.text
    lora: dict[str, Any] = answer.json()
    return lora


async def generate(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/api/generate/image", json={"model": "sketch", "prompt": "a fox", **body})


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async def has_ended() -> bool:
        job = (await client.get(f"/api/generate/{job_id}")).json()
        return job["status"] in ("completed", "failed", "cancelled")

    await eventually(has_ended, 30)
    job: dict[str, Any] = (await client.get(f"/api/generate/{job_id}")).json()
    return job


# ---- the register --------------------------------------------------------------------------------


async def test_an_uploaded_adapter_is_described_by_its_file(client: httpx.AsyncClient) -> None:
    file = lora_file(5, ss_output_name="ink", **{"modelspec.trigger_phrase": "inky, wet"})

    lora = await register(client, file, licence="MIT")

    assert lora["id"] == digest(file)[:16]
    assert lora["sha256"] == digest(file)
    assert (lora["name"], lora["family"], lora["rank"], lora["licence"]) == ("ink", "sd", 2, "MIT")
    assert lora["trigger_words"] == ["inky", "wet"]
    assert lora["size_bytes"] == len(file)
    assert (lora["source"], lora["mine"], lora["public"]) == ("upload", True, False)
    assert lora["created_at"] > 0
    assert (await client.get("/api/loras/ink")).json() == lora
    assert (await client.get(f"/api/loras/{lora['id']}")).json() == lora


def of_values(*values: float, **extra: float) -> bytes:
    """A LoRA of rank 1 of one layer, with these 8 values of float32; extra: further tensors of one value."""
    layer = "unet.down_blocks.0.attn.to_q"
    header = {
        f"{layer}.lora_A.weight": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]},
        f"{layer}.lora_B.weight": {"dtype": "F32", "shape": [4, 1], "data_offsets": [16, 32]},
    }
    for at, name in enumerate(extra, 8):
        header[f"{layer}.{name}"] = {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]}
    text = json.dumps(header).encode()
    return (
        len(text).to_bytes(8, "little") + text + struct.pack(f"<{8 + len(extra)}f", *values, *extra.values())
    )


@pytest.mark.parametrize(
    ("file", "key", "part"),
    [
        (of_values(*[1.0] * 7, math.nan), "lora_B.weight", "not finite"),
        (of_values(math.inf, *[1.0] * 7), "lora_A.weight", "not finite"),
        (of_values(1e30, *[1.0] * 7), "lora_A.weight", "values up to 1e+30"),
        (of_values(*[1.0] * 8, alpha=1e9), "alpha", "gives a change of 1e+09"),
        (of_values(*[1.0] * 8, alpha=math.nan), "alpha", "not finite"),
        (of_values(*[60000.0] * 8), "lora_B.weight", "gives a change of"),
        (of_values(*[1.0] * 8, diff_b=0.5), "diff_b", "as a plain LoRA"),
    ],
)
async def test_values_that_every_job_would_fail_with_are_refused_at_registration(
    client: httpx.AsyncClient, file: bytes, key: str, part: str
) -> None:
    answer = await client.post("/api/loras", files={"file": ("a.safetensors", file)})

    assert answer.status_code in (400, 422), answer.text
    assert f"unet.down_blocks.0.attn.to_q.{key}'" in answer.json()["error"]["message"]
    assert part in answer.json()["error"]["message"]
    assert not [
        lora for lora in (await client.get("/api/loras")).json()["loras"] if lora["source"] == "upload"
    ]
    job = await generate(client, lora_base64=base64.b64encode(file).decode())
    assert (job.status_code, job.json()["error"]["param"]) == (answer.status_code, "lora_base64")


async def test_layers_that_are_zero_are_noted(client: httpx.AsyncClient) -> None:
    lora = await register(client, of_values(*[1.0] * 8, diff_b=0.0))

    assert lora["notes"] == [
        "1 of its layers are zero and change nothing; the first is 'unet.down_blocks.0.attn.to_q.diff_b'."
    ]


async def test_base64_in_json_registers_too(client: httpx.AsyncClient) -> None:
    body = {"base64": base64.b64encode(INK).decode(), "name": "Ink 2", "trigger_words": ["inky"]}

    answer = await client.post("/api/loras", json=body)

    assert answer.status_code == 201
    assert answer.json()["name"] == "Ink 2"
    assert answer.json()["trigger_words"] == ["inky"]


async def test_the_lists_have_one_s_own_and_those_that_come_with_models(client: httpx.AsyncClient) -> None:
    await register(client, INK)

    loras = (await client.get("/api/loras")).json()["loras"]
    models = (await client.get("/api/models/")).json()

    assert [lora["id"] for lora in loras[1:]] == ["night", "mosaic", "outline"]
    assert loras[0]["name"] == "ink"
    assert models["adapters"] == loras
    night = next(lora for lora in loras if lora["id"] == "night")
    assert night["sha256"] == digest(NIGHT.read_bytes())
    assert (night["model"], night["family"], night["trigger_words"]) == (
        "tiny-flux-schnell",
        "flux",
        ["night"],
    )
    assert (night["source"], night["mine"], night["licence"]) == ("built-in", False, "Apache-2.0")
    assert (await client.get("/api/models/night")).json() == night
    assert (await client.get("/api/models/sketch")).json()["max_loras"] == 4


async def test_the_same_file_again_changes_its_description(client: httpx.AsyncClient) -> None:
    first = await register(client, INK)

    second = await register(client, INK, name="pen", trigger_words="pen, nib")

    assert second["id"] == first["id"]
    assert second["created_at"] == first["created_at"]
    assert second["trigger_words"] == ["pen", "nib"]
    assert (await client.get("/api/loras/ink")).status_code == 404
    assert (await client.get("/api/loras/pen")).status_code == 200


async def test_a_name_belongs_to_one_adapter_of_an_owner(client: httpx.AsyncClient) -> None:
    await register(client, INK)

    answer = await client.post("/api/loras", files={"file": FOG}, data={"name": "INK"})

    assert answer.status_code == 409
    assert answer.json()["error"]["param"] == "name"


async def test_a_preview_is_shown_as_a_small_webp(client: httpx.AsyncClient) -> None:
    files = {"file": INK, "preview": picture("blue", 600)}

    lora = (await client.post("/api/loras", files=files)).json()
    shown = await client.get(lora["preview_url"])

    assert shown.headers["content-type"] == "image/webp"
    assert shown.content[:4] == b"RIFF"
    assert len(shown.content) < 20_000


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"\x80\x02}q\x00.", "pickle"),
        (b"PK\x03\x04" + bytes(40), "pickle"),
        (INK[:-5], "truncated"),
        (INK + b"x", "after its last tensor"),
        ((2**40).to_bytes(8, "little") + bytes(100), "header is over"),
        (b"", "no safetensors"),
    ],
)
async def test_a_file_that_is_no_safe_lora_is_refused_with_the_reason(
    client: httpx.AsyncClient, results: ResultStore, file: bytes, reason: str
) -> None:
    answer = await client.post("/api/loras", files={"file": file})

    assert answer.status_code == 422
    assert reason in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "file"
    assert await results.adapters() == []


async def test_urls_and_the_hub_are_off_unless_allowed(client: httpx.AsyncClient) -> None:
    by_url = await client.post("/api/loras", json={"url": "https://example.org/a.safetensors"})
    by_hub = await client.post("/api/loras", json={"hub": "someone/some-lora"})

    assert by_url.status_code == 403
    assert by_hub.status_code == 403
    assert "WEFT_HUB_LORAS" in by_hub.json()["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"url": "https://a.org/x", "hub": "a/b"}, {"name": "ink"}])
async def test_registering_needs_exactly_one_source(client: httpx.AsyncClient, body: dict[str, str]) -> None:
    answer = await client.post("/api/loras", json=body)

    assert answer.status_code == 422
    assert "exactly one" in answer.json()["error"]["message"]


async def test_what_comes_with_a_model_cannot_be_deleted(client: httpx.AsyncClient) -> None:
    assert (await client.delete("/api/loras/night")).status_code == 403
    assert (await client.delete("/api/models/night")).status_code == 403
    assert (await client.delete("/api/models/sketch")).status_code == 403
    assert (await client.delete("/api/loras/unheard-of")).status_code == 404


async def test_a_deleted_lora_is_gone_with_its_file_and_replicas_unload_it(
    client: httpx.AsyncClient, results: ResultStore, unload: Broadcast
) -> None:
    lora = await register(client, INK)

    answer = await client.delete(f"/api/models/{lora['id']}")

    assert answer.json() == {"id": lora["id"], "deleted": True}
    assert (await client.get("/api/loras/ink")).status_code == 404
    assert await results.adapters() == []
    assert unload.digests == [digest(INK)]


async def test_an_upload_may_be_larger_than_a_request_but_not_endless(
    state: ApiState, lora_service: LoraService
) -> None:
    settings = state.settings.model_copy(update={"max_body_bytes": 4096, "max_adapter_bytes": 2**20})
    file = lora_file(1) + bytes(10_000)
    async with client_of(create_app(replace(state, lora_service=lora_service, settings=settings))) as client:
        larger = await client.post("/api/loras", files={"file": file})
        endless = await client.post("/api/loras", files={"file": file + bytes(3 * 2**20)})
        elsewhere = await client.post("/api/generate/image", files={"lora_file": file})

    assert "after its last tensor" in larger.json()["error"]["message"]
    assert endless.status_code == 413
    assert elsewhere.status_code == 413


# ---- in requests ---------------------------------------------------------------------------------


def by_digest(fake_model: FakeModel) -> list[tuple[str, float]]:
    return [(lora.id, lora.weight) for lora in fake_model.requests[-1].loras]


@pytest.mark.parametrize(
    "body",
    [
        {"loras": [{"id": "ink", "weight": 0.8}]},
        {"loras": [{"name": "INK", "scale": 0.8}]},
        {"loras": [{"id": digest(INK)[:16], "weight": 0.8}]},
        {"loras": "ink:0.8"},
        {"loras": json.dumps([{"id": "ink", "weight": 0.8}])},
        {"loras": [{"id": digest(INK), "weight": 0.8}]},
        {"model_id": "ink", "lora_weight": 0.8},
        {"prompt": "a fox <lora:ink:0.8>"},
        {"loras": [{"base64": base64.b64encode(INK).decode(), "weight": 0.8}]},
        {"lora_base64": base64.b64encode(INK).decode(), "lora_weight": 0.8},
    ],
)
async def test_every_way_to_name_an_adapter_leads_to_its_digest(
    client: httpx.AsyncClient, fake_model: FakeModel, body: dict[str, Any]
) -> None:
    await register(client, INK)

    job = await ended(client, (await generate(client, **body)).json()["id"])

    assert job["status"] == "completed"
    assert by_digest(fake_model) == [(digest(INK), 0.8)]
    assert fake_model.requests[-1].prompt == "a fox"
    assert fake_model.requests[-1].loras[0].file is None
    assert job["request"]["loras"] == [{"sha256": digest(INK), "name": "ink", "weight": 0.8}]


async def test_openai_clients_name_adapters_in_extra_body(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    body = {"prompt": "a fox", "model": "tiny-flux-schnell", "loras": [{"name": "night", "weight": 0.5}]}

    answer = await client.post("/v1/images/generations", json=body)

    assert answer.status_code == 200
    assert by_digest(fake_model) == [(digest(NIGHT.read_bytes()), 0.5)]


async def test_a_path_names_an_adapter_of_the_card_and_opens_nothing_else(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    path = "models/tiny-flux-schnell/loras/lora_night/pytorch_lora_weights.safetensors"

    known = await generate(client, model="tiny-flux-schnell", lora_path=path)
    other = await generate(client, model="tiny-flux-schnell", lora_path="/etc/passwd")

    assert known.status_code == 202
    assert other.status_code == 404
    assert other.json()["error"]["param"] == "lora_path"


async def test_a_form_carries_files_with_the_weight_of_each(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    loras = [{"upload": "second", "weight": -1.5}, {"upload": "first"}]
    form = {"prompt": "a fox", "model": "sketch", "loras": json.dumps(loras)}

    answer = await client.post("/api/generate/image", data=form, files={"first": INK, "second": FOG})
    await ended(client, answer.json()["id"])

    assert by_digest(fake_model) == [(digest(FOG), -1.5), (digest(INK), 1.0)]


async def test_a_form_with_one_file_needs_no_list(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    form = {"prompt": "a fox", "model": "sketch", "lora_weight": "0.5"}

    answer = await client.post("/generate-image", data=form, files={"lora_file": INK})
    await ended(client, answer.json()["task_id"])

    assert by_digest(fake_model) == [(digest(INK), 0.5)]


async def test_adapters_add_up_from_the_list_and_the_prompt(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    await register(client, INK)
    await register(client, FOG)

    answer = await generate(client, prompt="<lora:fog:0.3> a fox, calm", loras="ink:0.7")
    await ended(client, answer.json()["id"])

    assert by_digest(fake_model) == [(digest(INK), 0.7), (digest(FOG), 0.3)]
    assert fake_model.requests[-1].prompt == "a fox, calm"


@pytest.mark.parametrize(
    ("body", "status", "param", "part"),
    [
        ({"loras": [{"id": "unheard-of"}]}, 404, "loras", "GET /api/loras"),
        ({"prompt": "a fox <lora:unheard-of:1>"}, 404, "prompt", "unheard-of"),
        ({"loras": [{"id": "ink"}, {"id": "unknown"}]}, 404, "loras.1", "unknown"),
        ({"loras": [{"id": "ink", "weight": 2.5}]}, 422, "loras.0.weight", "less than or equal to 2"),
        ({"loras": "ink:9"}, 422, "loras.weight", "less than or equal to 2"),
        ({"prompt": "a fox <lora:ink:-9>"}, 422, "prompt", "-2 to 2"),
        ({"prompt": "a fox <lora:ink:much>"}, 422, "prompt", "<lora:name:weight>"),
        ({"prompt": "a fox <lora::1>"}, 422, "prompt", "<lora:name:weight>"),
        ({"loras": [{"id": "ink", "url": "https://a.org/x"}]}, 422, "loras.0", "exactly one"),
        ({"loras": [{"weight": 1}]}, 422, "loras.0", "exactly one"),
        ({"loras": "ink:0.5", "model_id": "ink"}, 422, "loras", "twice"),
        ({"loras": "ink,ink,ink,ink,ink"}, 422, "loras", "at most 4"),
        ({"loras": "ink", "prompt": "<lora:a><lora:b><lora:c><lora:d>"}, 422, "prompt", "at most 4"),
        ({"lora_weight": 0.5}, 422, "lora_weight", "needs an adapter"),
        ({"loras": [{"upload": "there"}]}, 422, "loras", "no file"),
        ({"loras": [{"base64": "%%"}]}, 422, "loras.0.base64", "not base64"),
        ({"lora_base64": base64.b64encode(b"\x80\x02.").decode()}, 422, "lora_base64", "pickle"),
        ({"lora_url": "https://example.org/a.safetensors"}, 403, None, "opens no addresses"),
        ({"loras": [{"hub": "a/b"}]}, 403, "loras", "hub"),
        ({"model": "tiny-flux-schnell", "loras": "ink"}, 422, "loras", "family flux"),
        ({"loras": "night"}, 422, "loras", "made for tiny-flux-schnell"),
        ({"lora_base64": base64.b64encode(WIDE).decode()}, 422, "lora_base64", "made for flux"),
    ],
)
async def test_what_cannot_be_is_refused_before_a_job_is_made(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, param: str | None, part: str
) -> None:
    await register(client, INK)

    answer = await generate(client, **body)

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert part in error["message"]
    assert (await client.get("/api/generate/")).json()["jobs"] == []


async def test_the_bracket_form_is_refused_because_it_lost_the_pairing(client: httpx.AsyncClient) -> None:
    form = {"prompt": "a fox", "loras[][name]": ["ink", "fog"], "loras[][weight]": "0.5"}

    answer = await client.post("/api/generate/image", data=form, files={"lora_file": INK})

    assert answer.status_code == 422
    assert "which weight belongs to which LoRA" in answer.json()["error"]["message"]


async def test_a_file_that_nothing_uses_is_refused(client: httpx.AsyncClient) -> None:
    form = {"prompt": "a fox", "model": "sketch"}

    answer = await client.post("/api/generate/image", data=form, files={"surprise": INK})

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "surprise"


# ---- what becomes of files -----------------------------------------------------------------------


async def test_a_waiting_job_keeps_the_file_of_a_deleted_adapter(
    client: httpx.AsyncClient,
    fake_model: FakeModel,
    lora_service: LoraService,
    results: ResultStore,
    unload: Broadcast,
) -> None:
    await register(client, INK)
    fake_model.gate.clear()
    job_id = (await generate(client, loras="ink")).json()["id"]

    await client.delete("/api/loras/ink")

    assert await results.has(adapter_path(digest(INK)))
    assert unload.digests == []
    fake_model.gate.set()
    assert (await ended(client, job_id))["status"] == "completed"
    assert await lora_service.collect_all() == 1
    assert await results.adapters() == []
    assert unload.digests == [digest(INK)]


async def test_a_file_that_came_with_a_request_goes_after_its_job(
    client: httpx.AsyncClient, fake_model: FakeModel, lora_service: LoraService, results: ResultStore
) -> None:
    fake_model.gate.clear()
    job_id = (await generate(client, lora_base64=base64.b64encode(INK).decode())).json()["id"]

    kept = await lora_service.collect_all()
    fake_model.gate.set()
    await ended(client, job_id)
    removed = await lora_service.collect_all()

    assert (kept, removed) == (0, 1)
    assert await results.adapters() == []


async def test_a_refused_request_leaves_no_file_behind_for_long(
    client: httpx.AsyncClient, lora_service: LoraService, results: ResultStore
) -> None:
    await generate(client, lora_base64=base64.b64encode(INK).decode(), width=7)

    removed = await lora_service.collect_all()

    assert removed == 1
    assert await results.adapters() == []


async def test_a_registered_adapter_whose_file_is_lost_is_refused(
    client: httpx.AsyncClient, results: ResultStore
) -> None:
    await register(client, INK)
    await results.remove(adapter_path(digest(INK)))

    answer = await generate(client, loras="ink")

    assert answer.status_code == 404
    assert "register it again" in answer.json()["error"]["message"]


def test_the_url_fetcher_opens_the_allowed_hosts_only(state: ApiState) -> None:
    hosts = [host for host in " a.example.org , *.example.net,".split(",") if host.strip()]

    fetcher = UrlFetcher(hosts)

    assert fetcher.check("https://b.example.net/x") == "https://b.example.net/x"
    assert fetcher.check("https://a.example.org/x") == "https://a.example.org/x"
