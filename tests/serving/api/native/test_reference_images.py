"""`reference_images` of the native dialect: JSON and forms, stored with the job, part of every key."""

import base64
from collections.abc import AsyncIterator

import httpx
import pytest

from deployments.protocol.request import GenerationRequest
from deployments.validation.resolve import resolve
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.cache_keys import compute_cache_key
from serve_app.jobs.store.store import JobStore
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.api.calls import ended
from tests.serving.api.cards import CARDS
from tests.serving.api.editing import RETOUCH, png
from tests.serving.api.fake_model import FakeModel

RED, BLUE = png(), png((30, 40, 200))
EDIT = {"model": "retouch", "prompt": "make it blue", "seed": 5}


@pytest.fixture
async def state(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[ApiState]:
    """With a model that edits."""

    async def model_states() -> dict[str, str]:
        return {"retouch": "ready"}

    cards = CARDS | {RETOUCH.id: RETOUCH}
    job_service = JobService(store, results, cards, settings)
    yield ApiState(job_service=job_service, cards=cards, settings=settings, model_states=model_states)
    await job_service.aclose()


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeModel, "free_slots", lambda _model: {"retouch": 8})


def as_json(*pictures: bytes) -> list[str]:
    return [base64.b64encode(picture).decode() for picture in pictures]


async def test_json_and_a_form_make_the_same_job(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    body = EDIT | {"reference_images": as_json(RED, BLUE)}
    form = [("reference_images", ("a.png", data, "image/png")) for data in (RED, BLUE)]

    answers = [
        await client.post("/api/generate/image", json=body),
        await client.post("/api/generate/image", data={**EDIT, "seed": "6"}, files=form),
    ]

    for answer in answers:
        assert answer.status_code == 202, answer.text
        job = await ended(client, answer.json()["id"])
        assert (job["status"], job["request"]["task"]) == ("completed", "edit")
        assert job["request"]["references"] == 2
    assert [request.references for request in fake_model.requests] == [(RED, BLUE), (RED, BLUE)]


def test_other_pictures_or_another_order_are_another_result() -> None:
    def key(*pictures: bytes) -> str:
        request = GenerationRequest(model="retouch", prompt="both", seed=5, references=pictures)
        resolved = resolve(request, RETOUCH, fresh_seed=1).request
        return compute_cache_key(b"secret", "ann", 0, resolved, {})

    assert key(RED, BLUE) == key(RED, BLUE)
    assert len({key(RED, BLUE), key(BLUE, RED), key(RED), key(RED, RED)}) == 4


async def test_the_same_idempotency_key_with_other_pictures_is_a_conflict(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "edit-1"}
    answers = [
        await client.post(
            "/api/generate/image", json=EDIT | {"reference_images": as_json(picture)}, headers=headers
        )
        for picture in (RED, RED, BLUE)
    ]

    assert [answer.status_code for answer in answers] == [202, 202, 409]
    assert answers[0].json()["id"] == answers[1].json()["id"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"image": as_json(RED)[0]}, "image", "reference_images and image exclude each other"),
        ({"reference_images": as_json(*[RED] * 4)}, "reference_images", "retouch takes at most 3"),
        ({"reference_images": as_json(RED, b"no picture")}, "reference_images.1", "reference_images.1"),
        ({"model": "sketch"}, "reference_images", "sketch cannot do edit"),
    ],
)
async def test_wrong_reference_images_are_refused_before_any_work(
    client: httpx.AsyncClient, fields: dict[str, object], param: str, words: str
) -> None:
    body = EDIT | {"reference_images": as_json(RED)} | fields

    answer = await client.post("/api/generate/image", json=body)

    error = answer.json()["error"]
    assert answer.status_code in (413, 422), answer.text
    assert (error["param"], words in error["message"]) == (param, True), error


async def test_the_model_list_says_how_many_it_takes(client: httpx.AsyncClient) -> None:
    model = (await client.get("/api/models/retouch")).json()

    assert model["references"]["max"] == 3
    assert model["tasks"] == ["edit"]
