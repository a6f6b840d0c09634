"""HEAD wherever GET is, and no query parameter that is ignored."""

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from tests.patience import patience
from tests.serving.api.calls import ended, submitted
from tests.serving.api.conftest import client_of
from tests.serving.api.fake_model import FakeModel

VARYING = {"date", "x-request-id", "last-modified"}


def heads(answer: httpx.Response) -> tuple[int, dict[str, str]]:
    return answer.status_code, {name: v for name, v in answer.headers.items() if name not in VARYING}


def get_paths(app: FastAPI, job_id: str) -> list[str]:
    """Every path with a GET that ends by itself, with this job's id, and those outside of the description."""
    values: defaultdict[str, str] = defaultdict(lambda: job_id)
    values |= {"index": "0", "still": "thumbnail", "name": "0.png", "kind": "image", "model": "sketch"}
    described = [path for path, methods in app.openapi()["paths"].items() if "get" in methods]
    filled = [re.sub(r"{(\w+)}", lambda match: values[match[1]], path) for path in described]
    return [*filled, "/docs", "/openapi.json", "/", "/ui/", "/api/models", "/nothing/here"]


@pytest.mark.parametrize("app", ["page"], indirect=True)
async def test_head_has_the_status_and_the_headers_of_get_and_no_body(
    client: httpx.AsyncClient, app: FastAPI, fake_model: FakeModel
):
    job_id = await submitted(client, seed=7)
    await ended(client, job_id)
    same = [path for path in get_paths(app, job_id) if path != "/metrics" and not path.endswith("/link")]

    for path in same:
        got, head = await client.get(path), await client.head(path)

        assert heads(head) == heads(got), path
        assert head.content == b""
    assert len(same) > 20


async def test_head_of_a_file_gives_its_length(client: httpx.AsyncClient, fake_model: FakeModel):
    job_id = await submitted(client)
    job = await ended(client, job_id)

    whole = await client.head(f"/api/results/{job_id}/0.png")
    part = await client.head(f"/api/results/{job_id}/0.png", headers={"range": "bytes=0-99"})
    still = await client.head(f"/api/results/{job_id}/0/thumbnail", headers={"range": "bytes=0-9"})
    none = await client.head(f"/api/results/{job_id}/1.png")

    assert int(whole.headers["content-length"]) == job["artifacts"][0]["size_bytes"]
    assert whole.headers["content-type"] == "image/png"
    assert (part.status_code, part.headers["content-length"]) == (206, "100")
    assert (still.status_code, still.headers["content-length"]) == (206, "10")
    assert none.status_code == 404


async def test_head_of_a_stream_ends_though_its_job_goes_on(client: httpx.AsyncClient, fake_model: FakeModel):
    fake_model.gate.clear()
    job_id = await submitted(client)

    head = await client.head(f"/api/generate/{job_id}/events")

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")
    assert (await client.get(f"/api/generate/{job_id}")).json()["status"] in ("queued", "processing")


async def test_head_over_a_socket_has_no_body(address: str, fake_model: FakeModel):
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        head = await client.head("/api/models/")
        next_one = await client.get("/health")

    assert int(head.headers["content-length"]) > 0
    assert (head.content, next_one.json()) == (b"", {"status": "ok"})


async def test_head_changes_nothing_that_only_another_method_may_change(client: httpx.AsyncClient):
    refused = await client.head("/api/generate/image")

    assert refused.status_code == 404


async def test_head_is_counted_under_its_route(client: httpx.AsyncClient):
    await client.head("/api/models/")

    counted = (await client.get("/metrics")).text
    assert 'weft_http_requests_total{method="HEAD",route="/api/models/",status="200"} 1.0' in counted


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_head_needs_the_key_that_get_needs(client: httpx.AsyncClient):
    refused = await client.head("/api/models/")

    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")


async def test_the_right_methods_of_a_path_name_head(client: httpx.AsyncClient):
    refused = await client.put(f"/api/generate/{'0' * 32}")

    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}
    assert "use DELETE, GET, HEAD" in refused.json()["error"]["message"]


async def test_every_route_refuses_a_query_parameter_that_it_does_not_have(app: FastAPI):
    free = {"/health", "/ready"}  # a probe may add anything to its address

    async with client_of(app) as client:
        for path, methods in app.openapi()["paths"].items():
            for method in methods:
                url = re.sub(r"{(index|expires)}", "0", path).format_map(defaultdict(lambda: "0" * 32))
                answer = await client.request(method, url, params={"colour": "red"})
                if path in free:
                    assert answer.status_code in (200, 503), path
                else:
                    assert (answer.status_code, "'colour' is no query" in answer.text) in (
                        (422, True),
                        (400, True),
                    ), (method, path, answer.text)


async def test_a_field_of_the_body_sent_as_a_parameter_is_not_ignored(client: httpx.AsyncClient):
    answer = await client.post("/api/generate/image?steps=4", json={"prompt": "a red fox"})

    assert answer.json()["error"]["message"] == (
        "'steps' is no query parameter of POST /api/generate/image; it takes none"
    )


async def test_a_parameter_that_is_there_twice_is_refused(client: httpx.AsyncClient):
    answer = await client.get("/api/generate/?limit=1&limit=2")

    assert answer.json()["error"]["message"] == "limit is there twice; send it once"


async def test_jobs_are_found_by_prompt_kind_and_alias(client: httpx.AsyncClient):
    fox = await submitted(client)
    owl = await submitted(client, prompt="An OWL at night")

    async def found(**params: Any) -> list[str]:
        return [job["id"] for job in (await client.get("/api/generate/", params=params)).json()["jobs"]]

    assert await found(q="owl") == [owl]
    assert await found(q="RED") == [fox]
    assert await found(q="100%") == []
    assert await found(kind="image", model="someone/sketch") == [owl, fox]
    assert await found(kind="video") == []
    assert (await client.get("/api/generate/?kind=audio")).status_code == 422


async def test_a_cancelled_job_that_completed_meanwhile_is_called_completed(
    client: httpx.AsyncClient, state: ApiState, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
):
    fake_model.gate.clear()
    job_id = await submitted(client)
    await fake_model.began.wait()
    cancel = state.job_service.cancel

    async def late_cancel(job_id: str, owner: str) -> Any:
        fake_model.gate.set()
        await state.job_service.wait(job_id, owner, patience())
        return await cancel(job_id, owner)

    monkeypatch.setattr(state.job_service, "cancel", late_cancel)
    answer = await client.delete(f"/api/generate/{job_id}")

    assert answer.json() == {"id": job_id, "status": "completed"}
    assert (await client.get(f"/api/generate/{job_id}")).json()["status"] == "completed"
    assert (await client.get(f"/api/results/{job_id}/0.png")).status_code == 200


async def test_a_running_job_is_being_cancelled(client: httpx.AsyncClient, fake_model: FakeModel):
    fake_model.gate.clear()
    job_id = await submitted(client)
    await fake_model.began.wait()

    answer = await client.delete(f"/api/generate/{job_id}")

    assert answer.json() == {"id": job_id, "status": "cancelling"}
    assert (await ended(client, job_id))["status"] == "cancelled"


@pytest.mark.parametrize(
    ("path", "fields", "missing"),
    [
        ("/refine", {"image": "AA=="}, "refine"),
        ("/api/generate/image", {"image": "AA==", "mask": "AA=="}, "inpaint"),
        ("/api/generate/image", {"control_image": "AA==", "control_type": "canny"}, "canny"),
        ("/api/generate/image", {"refiner": True}, "a refiner"),
        ("/api/generate/video", {}, "t2v"),
        ("/generate-video", {"image": "AA=="}, "i2v"),
        ("/v1/videos", {}, "t2v"),
    ],
)
async def test_what_no_model_can_do_is_refused_for_good(
    state: ApiState, path: str, fields: dict[str, Any], missing: str
):
    flux = {
        "tiny-flux-schnell": state.cards["tiny-flux-schnell"].model_copy(update={"tasks": ["t2i", "i2i"]})
    }

    async with client_of(create_app(replace(state, cards=flux))) as client:
        answer = await client.post(path, json={"prompt": "a red fox", **fields})

    error = answer.json()["error"]
    assert answer.status_code == (400 if path.startswith("/v1/") else 422)
    assert missing in error["message"]
    assert "they can do t2i, i2i" in error["message"]
    assert "retry-after" not in answer.headers
    assert error.get("retryable", False) is False
