"""Progress: server-sent events with replay, and the WebSocket."""

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from deployments.protocol.events import Failed
from serve_app.api import sse
from serve_app.api.state import ApiState
from serve_app.jobs import follow
from serve_app.jobs.job import Job, JobError, ResumePoint
from serve_app.jobs.store.store import JobStore
from serve_app.redis.transactions import StoreUnreachable
from serve_app.settings import Settings
from tests.patience import patience
from tests.serving.api.calls import submitted
from tests.serving.api.conftest import KEY
from tests.serving.api.fake_model import FakeModel, preview_file


def events_of(text: str) -> list[dict[str, Any]]:
    """id, event and data of every event in an answer."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block and not block.startswith(":")]
    events = [dict(line.split(": ", 1) for line in block) for block in blocks]
    return [{**event, "data": json.loads(event["data"])} for event in events]


async def messages_of(socket: ClientConnection) -> list[dict[str, Any]]:
    """Every message until the server closes."""
    return [json.loads(message) async for message in socket]


async def test_a_job_is_reported_from_its_queue_position_to_its_images(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    job_id = await submitted(client, steps=4, previews=2)

    answer = await client.get(f"/api/generate/{job_id}/events")

    events = events_of(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert events[0]["event"] == "queued"
    assert {"started", "step", "preview"} <= {event["event"] for event in events}
    assert events[-1]["event"] == "completed"
    assert events[-1]["data"]["job"]["artifacts"][0]["url"] == f"/api/results/{job_id}/0.png"
    percents = [event["data"]["percent"] for event in events if event["event"] == "step"]
    assert percents == sorted(percents)
    previews = [event["data"] for event in events if event["event"] == "preview"]
    assert [(preview["step"], preview["media_type"]) for preview in previews] == [
        (1, "image/webp"),
        (2, "image/webp"),
    ]
    assert [base64.b64decode(preview["data"]) for preview in previews] == [preview_file(1), preview_file(2)]


async def test_what_a_stopped_replica_has_done_still_counts_while_the_job_waits(
    client: httpx.AsyncClient, store: JobStore
):
    job_id = await submitted(client, steps=4)
    claim = await store.leases.claim({"sketch": 1})
    assert claim is not None
    stopped = JobError("model_unavailable", "the replica is stopped")
    resume_point = ResumePoint(f"inputs/{job_id}/handover-1", "", 2, 4)
    await store.leases.requeue(claim, stopped, counted=False, resume_point=resume_point)
    claim = await store.leases.claim({"sketch": 1})
    assert claim is not None
    await store.leases.complete(claim, (), 0.5)

    events = events_of((await client.get(f"/api/generate/{job_id}/events")).text)

    assert [(event["event"], event["data"]["percent"]) for event in events] == [
        ("queued", 0),
        ("started", 0),
        ("queued", 50),
        ("started", 50),
        ("completed", 100),
    ]


async def test_only_what_came_after_the_last_event_id_is_replayed(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    job_id = await submitted(client)
    all_events = events_of((await client.get(f"/api/generate/{job_id}/events")).text)

    header = {"last-event-id": all_events[2]["id"]}
    by_header = await client.get(f"/api/generate/{job_id}/events", headers=header)
    by_query = await client.get(f"/api/generate/{job_id}/events?after={all_events[2]['id']}")

    assert events_of(by_header.text) == all_events[3:]
    assert events_of(by_query.text) == all_events[3:]


async def test_a_client_that_reconnects_misses_no_preview_and_gets_none_twice(
    client: httpx.AsyncClient, address: str, fake_model: FakeModel
):
    fake_model.gate.clear()
    body = {"steps": 4, "previews": 3}
    async with httpx.AsyncClient(base_url=f"http://{address}") as live:
        job_id = await submitted(live, **body)
        async with live.stream("GET", f"/api/generate/{job_id}/events") as answer:
            lines = answer.aiter_lines()
            await anext(line async for line in lines if line == "event: preview")
            last_id = await anext(line async for line in lines if line.startswith("id: "))
    fake_model.gate.set()

    header = {"last-event-id": last_id.removeprefix("id: ")}
    rest = events_of((await client.get(f"/api/generate/{job_id}/events", headers=header)).text)
    async with connect(f"ws://{address}/ws/{job_id}?after={header['last-event-id']}") as socket:
        messages = await messages_of(socket)

    assert [event["data"]["step"] for event in rest if event["event"] == "preview"] == [2, 3]
    assert [message["step"] for message in messages if message["type"] == "preview"] == [2, 3]


async def test_the_end_is_sent_again_to_a_later_follower(client: httpx.AsyncClient, fake_model: FakeModel):
    job_id = await submitted(client)
    last = events_of((await client.get(f"/api/generate/{job_id}/events")).text)[-1]

    again = await client.get(f"/api/generate/{job_id}/events", headers={"last-event-id": last["id"]})

    assert [event["event"] for event in events_of(again.text)] == ["completed"]


async def test_a_failed_job_carries_its_error(client: httpx.AsyncClient, fake_model: FakeModel):
    fake_model.failure = Failed("out_of_memory", "one picture does not fit; try 64 x 64", retryable=False)
    job_id = await submitted(client)

    last = events_of((await client.get(f"/api/generate/{job_id}/events")).text)[-1]

    assert last["event"] == "failed"
    assert last["data"]["error"]["kind"] == "out_of_memory"
    assert (await client.get(f"/task/{job_id}/result")).status_code == 422


async def test_events_arrive_as_they_happen_and_silence_is_filled_with_comments(
    address: str, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    fake_model.gate.clear()
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job_id = await submitted(client, previews=1)
        headers = {"accept-encoding": "gzip"}
        async with client.stream("GET", f"/api/generate/{job_id}/events", headers=headers) as answer:
            lines = answer.aiter_lines()
            received = [line async for line in _until(lines, "event: preview")]
            received += [line async for line in _until(lines, ": still here")]
            fake_model.gate.set()
            rest = [line async for line in _until(lines, "event: completed")]

    assert "content-encoding" not in answer.headers
    assert "event: completed" not in received
    assert "event: completed" in rest


async def _until(lines: Any, last: str) -> Any:
    async for line in lines:
        yield line
        if line == last:
            return


async def test_the_socket_sends_progress_then_complete(address: str, fake_model: FakeModel):
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job_id = await submitted(client, steps=4)
    async with connect(f"ws://{address}/ws/{job_id}") as socket:
        messages = await messages_of(socket)

    steps = [
        m["step"] for m in messages if m["type"] == "progress" and m["status"] == "processing" and m["step"]
    ]
    assert steps == sorted(steps)
    assert messages[-1]["type"] == "complete"
    assert messages[-1]["percent"] == 100
    assert messages[-1]["job"]["artifacts"]
    assert all("event_id" in message for message in messages)


async def test_the_socket_reports_a_failure_and_resumes_after_an_event(address: str, fake_model: FakeModel):
    fake_model.failure = Failed("internal", "the brush broke", retryable=False)
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job_id = await submitted(client)
    async with connect(f"ws://{address}/ws/{job_id}") as socket:
        messages = await messages_of(socket)
    async with connect(f"ws://{address}/ws/{job_id}?after={messages[-2]['event_id']}") as socket:
        rest = await messages_of(socket)

    assert messages[-1]["type"] == "failed"
    assert messages[-1]["error"]["message"] == "the brush broke"
    assert rest == messages[-1:]


async def test_a_socket_whose_client_leaves_is_let_go(address: str, fake_model: FakeModel):
    fake_model.gate.clear()
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job_id = await submitted(client)
    async with connect(f"ws://{address}/ws/{job_id}") as socket:
        await socket.recv()

        senders = [task for task in asyncio.all_tasks() if "_send_until_ended" in repr(task.get_coro())]
    assert len(senders) == 1
    await asyncio.wait(senders, timeout=patience())
    assert senders[0].done()


async def test_a_long_message_of_a_client_ends_its_socket(address: str, fake_model: FakeModel):
    fake_model.gate.clear()
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job_id = await submitted(client)
    async with connect(f"ws://{address}/ws/{job_id}") as socket:
        await socket.send("x" * 5_000)
        await socket.wait_closed()

    assert socket.close_code == 1009


@pytest.mark.parametrize("wrong", ["0" * 32, "nonsense"])
async def test_a_socket_for_an_unknown_job_is_refused_with_a_404_and_our_error_body(address: str, wrong: str):
    with pytest.raises(InvalidStatus) as refusal:
        await connect(f"ws://{address}/ws/{wrong}")

    assert refusal.value.response.status_code == 404
    assert json.loads(refusal.value.response.body)["error"]["kind"] == "not_found"


async def test_a_socket_of_another_web_site_is_refused(address: str):
    with pytest.raises(InvalidStatus) as refusal:
        await connect(f"ws://{address}/ws/{'0' * 32}", origin="https://evil.example")

    assert refusal.value.response.status_code == 403


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_a_browsers_key_travels_as_a_subprotocol(address: str, fake_model: FakeModel, app: FastAPI):
    state: ApiState = app.state.weft
    assert state.settings.api_key == SecretStr(KEY)
    async with httpx.AsyncClient(base_url=f"http://{address}", headers={"x-api-key": KEY}) as client:
        job_id = await submitted(client)
    key = base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")

    async with connect(f"ws://{address}/ws/{job_id}", subprotocols=["weft", f"weft.key.{key}"]) as socket:
        messages = await messages_of(socket)
    with pytest.raises(InvalidStatus) as refusal:
        await connect(f"ws://{address}/ws/{job_id}", subprotocols=["weft", "weft.key.wrong"])

    assert socket.subprotocol == "weft"
    assert messages[-1]["type"] == "complete"
    assert refusal.value.response.status_code == 401


class LosableStore(JobStore):
    """A store that can be made unreachable."""

    lost = False

    async def get(self, job_id: str) -> Job:
        if self.lost:
            raise StoreUnreachable("the job store is not reachable; try again")
        return await super().get(job_id)


@pytest.fixture
def store(redis: Redis, settings: Settings) -> LosableStore:
    return LosableStore(redis, settings)


async def test_a_store_that_stays_away_ends_a_stream_quietly_for_the_client_to_come_again(
    address: str, store: LosableStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(follow, "OUTAGE_LIMIT_S", 0.0)
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job_id = await submitted(client)
        async with client.stream("GET", f"/api/generate/{job_id}/events") as answer:
            lines = answer.aiter_lines()
            assert "event: queued" in [line async for line in _until(lines, "")]

            store.lost = True

            assert [line async for line in lines] == []


async def test_pauses_do_not_lose_items_and_close_their_source():
    closed = asyncio.Event()

    async def slow() -> Any:
        try:
            yield 1
            await asyncio.sleep(0.1)
            yield 2
        finally:
            closed.set()

    items = [item async for item in sse.with_keep_alives(slow(), 0.02)]

    assert [item for item in items if item is not None] == [1, 2]
    assert None in items
    assert closed.is_set()
