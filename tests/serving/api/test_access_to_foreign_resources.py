"""LoRAs and videos of other owners are answered like unknown ones."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from serve_app.admission.authenticator import AccountStore
from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.storage.results import ResultStore
from tests.serving.api.calls import ended
from tests.serving.api.cards import CARDS
from tests.serving.api.fake_video_model import BODY, WAN, FakeVideoModel
from tests.serving.api.lora_files import lora_file
from tests.serving.api.test_access import SUBMIT, UNKNOWN, accounts, bearer, calls, key_of  # noqa: F401


@pytest.fixture
def app(state: ApiState, store: JobStore, results: ResultStore) -> FastAPI:
    """Behind a key, with a model of videos."""
    cards = CARDS | {WAN.id: WAN}
    settings = state.settings.model_copy(update={"api_key": SecretStr("correct horse battery")})
    job_service = JobService(store, results, cards, settings)
    return create_app(replace(state, job_service=job_service, cards=cards, settings=settings))


async def assert_like_unknown(
    client: httpx.AsyncClient, key: dict[str, str], theirs: str, by_id: list[tuple[str, str]]
):
    """Every call with the id of another owner's resource is answered as for an unknown id."""
    unknown_id = "f" * len(theirs)
    for method, path in by_id:
        body = {"prompt": "x"} if method.lower() in ("post", "patch") else None
        answer = await client.request(method, path, headers=key, json=body)
        unknown = await client.request(method, path.replace(theirs, unknown_id), headers=key, json=body)
        assert answer.status_code == unknown.status_code == 404, f"{method} {path}: {answer.text}"
        assert answer.text.replace(theirs, unknown_id) == unknown.text, f"{method} {path}"


async def test_a_video_of_another_owner_is_not_shown_played_remixed_or_deleted(
    app: FastAPI,
    client: httpx.AsyncClient,
    accounts: AccountStore,  # noqa: F811
    fake_video_model: FakeVideoModel,
):
    ann, bob = bearer(await key_of(accounts, "ann")), bearer(await key_of(accounts, "bob"))
    accepted = await client.post("/api/generate/video", json=BODY, headers=ann)
    job_id = accepted.json()["id"]
    client.headers.update(ann)
    job = await ended(client, job_id)
    client.headers.pop("authorization")
    by_id = [
        (method, path)
        for method, path in calls(app, job_id)
        if job_id in path and not path.startswith("/api/shared/")
    ]

    await assert_like_unknown(client, bob, job_id, by_id)

    assert job["status"] == "completed"
    assert len([path for _, path in by_id if path.startswith("/v1/videos/")]) >= 4
    assert (await client.get("/v1/videos", headers=bob)).json()["data"] == []
    assert (await client.get(f"/v1/videos/{job_id}/content", headers=ann)).status_code == 200


async def test_a_lora_of_another_owner_is_not_shown_used_or_deleted(
    app: FastAPI,
    client: httpx.AsyncClient,
    accounts: AccountStore,  # noqa: F811
):
    ann, bob = bearer(await key_of(accounts, "ann")), bearer(await key_of(accounts, "bob"))
    upload = {"file": ("a.safetensors", lora_file(3))}
    answer = await client.post("/api/loras", files=upload, data={"name": "hers"}, headers=ann)
    lora_id = answer.json()["id"]
    by_id = [
        (method, path.replace(UNKNOWN, lora_id))
        for method, path in calls(app)
        if path.startswith("/api/loras/") and UNKNOWN in path
    ]

    await assert_like_unknown(client, bob, lora_id, by_id)
    used = [
        await client.post("/api/generate/image", json=SUBMIT | {"loras": [{"id": name}]}, headers=bob)
        for name in (lora_id, "hers")
    ]

    assert answer.status_code == 201, answer.text
    assert len(by_id) >= 3
    assert [again.status_code for again in used] == [404, 404], [again.text for again in used]
    listed = (await client.get("/api/loras", headers=bob)).json()["loras"]
    assert lora_id not in {adapter["id"] for adapter in listed}
    assert (await client.get(f"/api/loras/{lora_id}", headers=ann)).status_code == 200
