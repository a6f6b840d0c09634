"""What all answers have in common, which callers are refused, and the probes and metrics."""

import asyncio
import json
import logging
import re
from collections import defaultdict
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.redis.transactions import connect
from serve_app.storage.results import ResultStore
from tests.serving.api.calls import submitted
from tests.serving.api.cards import CARDS
from tests.serving.api.conftest import KEY, client_of
from tests.serving.api.fake_model import FakeModel

PUBLIC = {"/health", "/ready"}  # and the log-in, which answers 401 itself


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_every_route_but_the_probes_needs_the_key(client: httpx.AsyncClient, app: FastAPI):
    asked = [
        (method, re.sub(r"{index}", "0", path).format_map(defaultdict(lambda: "0" * 32)))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    ]

    answers = {(method, path): await client.request(method, path) for method, path in asked}

    open_to_all = {path for (_, path), answer in answers.items() if answer.status_code != 401}
    assert len(asked) > 15
    assert open_to_all == PUBLIC
    refused = answers["get", "/api/models/"]
    assert refused.headers["www-authenticate"] == "Bearer"
    assert KEY not in refused.text


@pytest.mark.parametrize("app", ["locked"], indirect=True)
@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
async def test_the_key_opens_in_either_header(client: httpx.AsyncClient, headers: dict[str, str]):
    assert (await client.get("/api/models/", headers=headers)).status_code == 200


async def test_models_list_all_that_a_form_needs(client: httpx.AsyncClient):
    schnell, sketch = (await client.get("/api/models/")).json()["models"]
    by_alias = (await client.get("/api/models/someone/sketch")).json()

    assert schnell["id"] == "tiny-flux-schnell"
    assert schnell["steps"] == {"min": 4, "default": 4, "max": 4}
    assert (schnell["state"], schnell["negative_prompt"]) == ("loading", False)
    assert (sketch["state"], sketch["sizes"]["multiple"]) == ("ready", 16)
    assert sketch["licence"]["name"] == "Apache-2.0"
    assert by_alias == sketch
    assert (await client.get("/api/models/nothing")).status_code == 404


async def test_every_answer_has_a_request_id_and_security_headers(client: httpx.AsyncClient):
    for path in ("/health", "/nothing", "/api/generate/", "/docs"):
        answer = await client.get(path)
        assert len(answer.headers["x-request-id"]) == 16
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("given", "kept"), [("trace-0042.abc", True), ("a b\tc", False), ("x" * 200, False), ("short", False)]
)
async def test_a_decent_request_id_is_kept(client: httpx.AsyncClient, given: str, kept: bool):
    answer = await client.get("/health", headers={"x-request-id": given})

    assert (answer.headers["x-request-id"] == given) is kept


async def test_headers_that_would_switch_off_our_timeouts_do_not_reach_a_route(app: FastAPI):
    seen: list[set[str]] = []

    async def record(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append({name.decode() for name, _ in scope["headers"]})
        await Response()(scope, receive, send)

    app.mount("/seen", record)
    async with client_of(app) as client:
        await client.get(
            "/seen/", headers={"X-Request-Timeout-Seconds": "-1", "x-request-disconnect-disabled": "?1"}
        )

    assert "host" in seen[0]
    assert not {"x-request-timeout-seconds", "x-request-disconnect-disabled"} & seen[0]


async def test_json_is_compressed_and_pictures_are_not(client: httpx.AsyncClient, fake_model: FakeModel):
    job_id = await submitted(client)
    await client.get(f"/api/generate/{job_id}/events")

    models = await client.get("/api/models/")
    picture = await client.get(f"/api/results/{job_id}/0.png")

    assert models.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in picture.headers


async def test_a_bug_is_a_500_that_reveals_nothing_but_its_request_id(
    state: ApiState, caplog: pytest.LogCaptureFixture
):
    async def broken() -> dict[str, str]:
        raise RuntimeError("the secret is 42")

    async with client_of(create_app(replace(state, model_states=broken))) as client:
        answer = await client.get("/api/models/")

    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["kind"] == "internal"
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret" not in answer.text
    assert "the secret is 42" in caplog.text


async def test_another_host_name_is_refused_while_no_key_is_set(app: FastAPI):
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://rebound.example"
    ) as client:
        refused = await client.get("/api/models/")
        probed = await client.get("/health")

    assert refused.status_code == 403
    assert "WEFT_API_KEY" in refused.json()["error"]["message"]
    assert probed.status_code == 200


@pytest.mark.parametrize(
    "headers", [{"host": "["}, {"host": "[::1"}, {"host": ""}, {"origin": "http://["}, {"origin": ""}]
)
async def test_a_broken_host_or_origin_is_refused(client: httpx.AsyncClient, headers: dict[str, str]):
    assert (await client.get("/api/models/", headers=headers)).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "127.1.2.3:99", "[::1]:8000"])
async def test_every_name_of_loopback_is_served(client: httpx.AsyncClient, host: str):
    assert (await client.get("/api/models/", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},
    ],
)
async def test_a_call_from_another_web_site_is_refused_while_no_key_is_set(
    client: httpx.AsyncClient, headers: dict[str, str]
):
    answer = await client.post("/api/generate/image", json={"prompt": "a"}, headers=headers)

    assert answer.status_code == 403


async def test_our_own_page_and_a_followed_link_are_let_in(client: httpx.AsyncClient):
    page = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}

    assert (await client.post("/api/generate/image", json={"prompt": "a"}, headers=page)).status_code == 202
    assert (await client.get("/docs", headers=link)).status_code == 200


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_with_a_key_any_host_name_is_served(app: FastAPI):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://weft.example") as client:
        assert (await client.get("/api/models/", headers={"x-api-key": KEY})).status_code == 200


async def test_the_probes_report_alive_and_ready(client: httpx.AsyncClient):
    alive = await client.get("/health")
    ready = await client.get("/ready")

    assert alive.json() == {"status": "ok"}
    assert ready.json() == {
        "ready": True,
        "store": "ok",
        "models": {"sketch": "ready", "tiny-flux-schnell": "loading"},
    }


async def test_it_is_not_ready_while_every_model_loads(state: ApiState):
    async def loading() -> dict[str, str]:
        return {"sketch": "loading"}

    async with client_of(create_app(replace(state, model_states=loading))) as client:
        answer = await client.get("/ready")

    assert (answer.status_code, answer.json()["ready"]) == (503, False)


async def test_it_is_ready_while_its_models_are_scaled_to_zero_or_none_would_ever_wake(state: ApiState):
    async def idle() -> dict[str, str]:
        return {"sketch": "idle"}

    async with client_of(create_app(replace(state, model_states=idle))) as client:
        answer = await client.get("/ready")

    assert (answer.status_code, answer.json()["ready"]) == (200, True)


async def test_without_space_for_images_it_is_not_ready_and_refuses_jobs(state: ApiState, store: JobStore):
    full = ResultStore(state.settings.results_root, min_free_bytes=2**60)
    job_service = JobService(store, full, CARDS, state.settings)
    async with client_of(create_app(replace(state, job_service=job_service))) as client:
        ready = await client.get("/ready")
        refused = await client.post("/api/generate/image", json={"prompt": "a"})
        kept = await client.get("/api/generate/")
    await job_service.aclose()

    assert ready.status_code == 503
    assert "too little disk space" in ready.text
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
    assert kept.json()["jobs"] == []


async def test_without_its_store_it_lives_is_not_ready_and_asks_to_come_back(state: ApiState):
    redis = connect("redis://127.0.0.1:1")
    lost = JobService(
        JobStore(redis, state.settings), ResultStore(state.settings.results_root, 0), CARDS, state.settings
    )
    async with client_of(create_app(replace(state, job_service=lost))) as client:
        alive = await client.get("/health")
        ready = await client.get("/ready")
        refused = await client.post("/api/generate/image", json={"prompt": "a"})
    await redis.aclose()

    assert alive.status_code == 200
    assert ready.status_code == 503
    assert "not reachable" in ready.json()["store"]
    assert refused.status_code == 503
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("2", "2000")


async def test_the_gauges_count_by_route_and_never_hold_a_prompt(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    job_id = await submitted(client, prompt="canary in a prompt")
    await client.get(f"/api/generate/{job_id}/events")
    await client.get("/nowhere/at/all")
    await client.request("MADEUP", "/nowhere/at/all")

    text = (await client.get("/metrics")).text

    assert 'weft_http_requests_total{method="POST",route="/api/generate/image",status="202"} 1.0' in text
    assert 'route="/api/generate/{task_id}/events"' in text
    assert 'weft_http_requests_total{method="GET",route="unmatched",status="404"} 1.0' in text
    assert 'weft_jobs_submitted_total{model="sketch",task="t2i"} 1.0' in text
    assert "canary" not in text
    assert "MADEUP" not in text
    assert job_id not in text


async def test_the_description_names_every_dialect_and_their_fields(client: httpx.AsyncClient):
    description = (await client.get("/openapi.json")).json()

    paths = description["paths"]
    assert {
        "/api/generate/image",
        "/generate-image",
        "/v1/images/generations",
        "/api/models/",
    } <= paths.keys()
    body = paths["/api/generate/image"]["post"]["requestBody"]["content"]
    assert "num_inference_steps" in body["application/json"]["schema"]["properties"]
    assert body["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
    assert "swagger" in (await client.get("/docs")).text


async def test_every_reference_in_the_description_leads_somewhere(client: httpx.AsyncClient):
    text = (await client.get("/openapi.json")).text
    schemas = json.loads(text)["components"]["schemas"]

    references = set(re.findall(r'"\$ref":\s*"([^"]+)"', text))
    assert references
    assert references <= {f"#/components/schemas/{name}" for name in schemas}


@pytest.mark.parametrize("app", ["page"], indirect=True)
async def test_the_page_is_served_with_its_policy_and_asked_for_anew_each_time(client: httpx.AsyncClient):
    root = await client.get("/")
    page = await client.get("/ui/")
    again = await client.get("/ui/", headers={"if-none-match": page.headers["etag"]})
    missing = await client.get("/ui/no-such-file.js")

    assert (root.status_code, root.headers["location"]) == (307, "/ui/")
    assert "<html" in page.text
    assert page.headers["cache-control"] == "no-cache"
    assert (
        "script-src 'self'; style-src 'self'; img-src 'self' blob: data:"
        in page.headers["content-security-policy"]
    )
    assert again.status_code == 304
    assert missing.status_code == 404
    assert json.loads(missing.text)["error"]["kind"] == "not_found"


async def test_without_the_page_the_root_is_a_404(client: httpx.AsyncClient):
    assert (await client.get("/")).status_code == 404
    assert (await client.get("/ui/")).status_code == 404


@pytest.mark.parametrize("app", ["page"], indirect=True)
async def test_below_a_prefix_every_link_carries_it(app: FastAPI, fake_model: FakeModel):
    transport = httpx.ASGITransport(app, root_path="/below")
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1/below") as client:
        root = await client.get("/")
        answer = await client.post("/api/generate/image", json={"prompt": "a"})
        await client.get(f"/api/generate/{answer.json()['id']}/events")
        job = (await client.get(f"/api/generate/{answer.json()['id']}")).json()
        missing = await client.get("/v1/nothing")
        page = await client.get("/ui/")

    assert root.headers["location"] == "/below/ui/"
    assert answer.headers["location"].startswith("/below/api/generate/")
    assert job["artifacts"][0]["url"].startswith("/below/api/results/")
    assert missing.json()["error"]["type"] == "invalid_request_error"
    assert "script-src" in page.headers["content-security-policy"]


async def test_the_description_is_a_page_that_asks_no_other_host(client: httpx.AsyncClient):
    page = await client.get("/docs")
    parts = re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text)

    answers = [await client.get(f"/{part}") for part in parts]

    assert len(parts) == 3
    assert [answer.status_code for answer in answers] == [200] * 3
    assert "//" not in re.sub(r"<!doctype html>", "", page.text)
    assert "unsafe" not in page.headers["content-security-policy"].split("script-src")[1].split(";")[0]
    assert "http" not in page.headers["content-security-policy"]
    assert b"SwaggerUIBundle" in answers[1].content
    assert (await client.get("/docs/..%2fcore.py")).status_code == 404


async def test_no_header_of_a_client_moves_the_time_limit(state: ApiState):
    forever = asyncio.Event()

    async def stuck() -> dict[str, str]:
        await forever.wait()
        return {}

    hasty = state.settings.model_copy(update={"max_call_s": 0.2})
    async with client_of(create_app(replace(state, settings=hasty, model_states=stuck))) as client:
        answer = await client.get(
            "/ready",
            headers={"X-Request-Timeout-Seconds": "-1", "X-Request-Disconnect-Disabled": "?1"},
        )

    assert answer.status_code == 504
    assert "0.2 s" in answer.json()["error"]["message"]


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_no_log_line_holds_a_prompt_or_a_key(
    client: httpx.AsyncClient, app: FastAPI, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    canary = 'canary\r\n{"level": "fatal"} \x1b[31m'
    headers = {"Authorization": f"Bearer {KEY}"}

    body = {"prompt": canary, "negative_prompt": canary, "model": "sketch"}
    accepted = await client.post("/api/generate/image", json=body, headers=headers)
    await client.post("/api/generate/image", json=body | {"steps": "x"}, headers=headers)
    await client.post("/v1/images/generations", json=body | {"model": "none"}, headers=headers)
    await client.post("/auth/token", json={"api_key": KEY})
    await client.post("/auth/token", json={"api_key": "wrong-canary"})
    await client.get(f"/api/generate/{accepted.json()['id']}", headers={"X-API-Key": "wrong-canary"})

    logged = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    metrics = (await client.get("/metrics", headers=headers)).text
    assert accepted.status_code == 202
    assert "job accepted" in logged
    for secret in ("canary", KEY):
        assert secret not in logged
        assert secret not in metrics
