"""Webhooks: signed, delivered at least once, and given up in the end."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

import openai
import pytest
from redis.asyncio import Redis

from deployments.protocol.errors import Forbidden
from deployments.protocol.request import ResolvedVideo
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import Job, JobError, NewJob, SubmitOptions
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.outbox import HOLD_S
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.webhook_events import owner_secret
from serve_app.jobs.worker.webhooks import POST_TIMEOUT_S, RETRY_DELAYS_S, WebhookDeliverer
from serve_app.settings import Settings
from tests.patience import patience
from tests.serving.fakes import MODEL, OWNER, keys_without_ttl, resolved

URL = "https://receiver.example/hooks"
SECRET = bytes(32)
CALLER = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:9")


class Receiver:
    """Records what is posted and answers with the next status; an exception is raised instead."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.posted: list[tuple[str, bytes, dict[str, str]]] = []

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float) -> int:
        self.posted.append((url, body, dict(headers)))
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def events(self) -> list[dict[str, object]]:
        return [json.loads(body) for _, body, _ in self.posted]


@pytest.fixture
def keys(settings: Settings) -> Keys:
    return Keys(settings.redis_prefix)


async def waiting(store: JobStore) -> Job:
    return await store.accept(NewJob(new_job_id(), OWNER, resolved(), options=SubmitOptions(webhook=URL)))


async def completed(store: JobStore) -> Job:
    await waiting(store)
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    return await store.leases.complete(claim, [], 1.0)


async def due_now(redis: Redis, keys: Keys) -> None:
    """As if the server's clock had reached the next try."""
    for job_id in await redis.zrange(keys.outbox, 0, -1):
        await redis.zadd(keys.outbox, {job_id: 1})


async def test_openais_sdk_accepts_what_we_sign(store: JobStore) -> None:
    receiver = Receiver()
    job = await completed(store)

    delivered = await WebhookDeliverer(store.outbox, receiver, SECRET).deliver()

    url, body, headers = receiver.posted[0]
    event = CALLER.webhooks.unwrap(body.decode(), headers, secret=owner_secret(SECRET, OWNER))
    assert (delivered, url) == (1, URL)
    assert (event.type, event.data.id) == ("image.completed", job.id)


async def test_openais_sdk_refuses_another(store: JobStore) -> None:
    receiver = Receiver()
    await completed(store)
    await WebhookDeliverer(store.outbox, receiver, SECRET).deliver()
    _, body, headers = receiver.posted[0]

    for secret, text in (
        (owner_secret(SECRET, "another owner"), body),
        (owner_secret(SECRET, OWNER), body + b" "),
    ):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            CALLER.webhooks.unwrap(text.decode(), headers, secret=secret)


async def test_every_ending_is_delivered_once_with_its_state(store: JobStore) -> None:
    await completed(store)
    await waiting(store)
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    await store.leases.fail(claim, JobError("out_of_memory", "too large"))
    await store.cancel((await waiting(store)).id)
    receiver = Receiver()
    deliverer = WebhookDeliverer(store.outbox, receiver, SECRET)

    counts = [await deliverer.deliver(), await deliverer.deliver()]

    assert counts == [3, 0]
    assert {event["type"] for event in receiver.events} == {
        "image.completed",
        "image.failed",
        "image.cancelled",
    }


async def test_the_event_has_the_fields_that_receivers_read(store: JobStore) -> None:
    job = await completed(store)
    receiver = Receiver()

    await WebhookDeliverer(store.outbox, receiver, SECRET).deliver()

    assert receiver.events == [
        {
            "id": f"evt_{job.id}",
            "object": "event",
            "created_at": int(job.completed_at or 0),
            "type": "image.completed",
            "data": {
                "id": job.id,
                "status": "completed",
                "model": MODEL,
                "created_at": job.created_at,
                "completed_at": job.completed_at,
                "artifacts": [],
                "error": None,
            },
        }
    ]
    assert receiver.posted[0][2]["webhook-id"] == f"evt_{job.id}"


async def test_an_owner_keeps_its_secret_after_an_update() -> None:
    assert owner_secret(SECRET, OWNER) == "whsec_24NMlJgdueDu5Q9uLwhMEWAFpwIpdPUIY1RUZbvd1Bw="


async def test_the_event_names_a_video_and_omits_the_prompt(store: JobStore) -> None:
    video = resolved("a secret prompt").model_copy(update={"video": ResolvedVideo(num_frames=9, fps=8)})
    await store.accept(NewJob(new_job_id(), OWNER, video, options=SubmitOptions(webhook=URL)))
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    await store.leases.complete(claim, [], 1.0)
    receiver = Receiver()

    await WebhookDeliverer(store.outbox, receiver, SECRET).deliver()

    assert receiver.events[0]["type"] == "video.completed"
    assert b"secret prompt" not in receiver.posted[0][1]


async def test_a_rejected_delivery_is_retried_later_with_the_same_id(
    store: JobStore, redis: Redis, keys: Keys
) -> None:
    receiver = Receiver(503, Forbidden("not allowed"), 200)
    deliverer = WebhookDeliverer(store.outbox, receiver, SECRET)
    await completed(store)

    for _ in range(3):
        await deliverer.deliver()
        assert await deliverer.deliver() == 0
        await due_now(redis, keys)

    assert len({headers["webhook-id"] for _, _, headers in receiver.posted}) == 1
    assert len(receiver.posted) == 3
    assert await redis.zcard(keys.outbox) == 0


async def test_each_retry_comes_later_than_the_one_before(store: JobStore, redis: Redis, keys: Keys) -> None:
    deliverer = WebhookDeliverer(store.outbox, Receiver(*[300] * len(RETRY_DELAYS_S)), SECRET)
    await completed(store)
    delays_s = []

    for _ in RETRY_DELAYS_S:
        await deliverer.deliver()
        [(_, due_us)] = await redis.zrange(keys.outbox, 0, -1, withscores=True)
        seconds, microseconds = await redis.time()
        delays_s.append(due_us / 1e6 - seconds - microseconds / 1e6)
        await due_now(redis, keys)

    assert delays_s == [pytest.approx(delay_s, rel=0.0, abs=patience(0.1)) for delay_s in RETRY_DELAYS_S]


@pytest.mark.parametrize(("answers", "tries"), [([500] * 20, len(RETRY_DELAYS_S) + 1), ([410], 1)])
async def test_a_receiver_that_never_accepts_is_given_up(
    store: JobStore, redis: Redis, keys: Keys, answers: list[int], tries: int
) -> None:
    receiver = Receiver(*answers)
    deliverer = WebhookDeliverer(store.outbox, receiver, SECRET)
    await completed(store)

    while await redis.zcard(keys.outbox):
        await deliverer.deliver()
        await due_now(redis, keys)

    assert len(receiver.posted) == tries


async def test_an_entry_of_a_dead_deliverer_is_delivered_by_another(
    store: JobStore, redis: Redis, keys: Keys
) -> None:
    receiver = Receiver()
    await completed(store)
    claimed = await store.outbox.claim_due()

    early = await WebhookDeliverer(store.outbox, receiver, SECRET).deliver()
    await due_now(redis, keys)
    late = await WebhookDeliverer(store.outbox, receiver, SECRET).deliver()

    assert (len(claimed), early, late) == (1, 0, 1)
    assert HOLD_S > 2 * POST_TIMEOUT_S


async def test_no_webhook_is_delivered_for_a_deleted_job(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    receiver = Receiver()
    await store.delete((await completed(store)).id)

    assert await WebhookDeliverer(store.outbox, receiver, SECRET).deliver() == 0
    assert await keys_without_ttl(redis, settings.redis_prefix) == []


async def test_a_job_deleted_during_its_delivery_is_not_retried(
    store: JobStore, redis: Redis, keys: Keys
) -> None:
    job = await completed(store)
    [entry] = await store.outbox.claim_due()
    await store.delete(job.id)

    await store.outbox.retry_later(entry, 5.0)

    assert await redis.zcard(keys.outbox) == 0


async def test_each_owner_has_a_secret_in_the_form_of_the_standard() -> None:
    mine, theirs = owner_secret(SECRET, OWNER), owner_secret(SECRET, "another owner")

    assert mine != theirs
    assert mine.startswith("whsec_")
    assert len(base64.b64decode(mine.removeprefix("whsec_"))) == 32
