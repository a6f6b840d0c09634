"""A job by itself, its record, and the form of job ids (no server)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import fields, replace
from datetime import UTC, datetime

import pytest

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import Internal, OutOfMemory
from deployments.protocol.request import ResolvedVideo
from serve_app.admission.quota import Charge
from serve_app.job_ids import is_job_id, new_job_id
from serve_app.jobs.job import (
    COPY_QUEUE,
    IdempotencyKey,
    Job,
    JobError,
    JobState,
    NewJob,
    ResumePoint,
    StoredArtifact,
    SubmitOptions,
)
from serve_app.jobs.store import record
from serve_app.jobs.store.key_names import Keys, key_digest
from serve_app.jobs.webhook_events import event_body, owner_secret, signature_headers
from tests.serving.fakes import MODEL, OWNER, resolved

NOW_US = 1_700_000_000_123_456
JOB = Job("a" * 32, OWNER, JobState.queued, resolved(), 1_700_000_000.0)
ARTIFACT = StoredArtifact(0, "image", "outputs/a/1.png", "image/png", 9, "0" * 64, 64, 32, 7)


@pytest.mark.parametrize(
    "text", ["", "a" * 31, "a" * 33, "A" * 32, "g" * 32, "../" + "a" * 29, "a" * 32 + "\n"]
)
def test_what_is_no_job_id(text: str) -> None:
    assert not is_job_id(text)


def test_new_ids_are_job_ids_and_differ() -> None:
    ids = {new_job_id() for _ in range(100)}

    assert len(ids) == 100
    assert all(map(is_job_id, ids))


@pytest.mark.parametrize("state", JobState)
def test_which_states_are_final(state: JobState) -> None:
    assert state.ended == (state.value in ("completed", "failed", "cancelled"))


def test_a_job_waits_for_its_model_or_among_the_copies() -> None:
    copy = replace(JOB, cached_from="b" * 32)

    assert (JOB.queue, copy.queue) == (MODEL, COPY_QUEUE)
    assert not copy.cached
    assert replace(copy, state=JobState.completed).cached
    assert not replace(JOB, state=JobState.completed).cached


@pytest.mark.parametrize(
    ("state", "step", "percent"),
    [
        ("processing", 0, 0),
        ("processing", 2, 50),
        ("processing", 4, 99),
        ("completed", 2, 100),
        ("failed", 2, 50),
    ],
)
def test_percent_of_a_job(state: str, step: int, percent: int) -> None:
    assert replace(JOB, state=JobState(state), step=step, steps=4).percent == percent


def test_an_error_is_raised_as_the_kind_it_was() -> None:
    error = JobError("out_of_memory", "too big", "width", 2.0).to_error()

    assert type(error) is OutOfMemory
    assert (error.message, error.param, error.retry_after_s) == ("too big", "width", 2.0)
    assert type(JobError("of a later version", "why").to_error()) is Internal


def test_a_new_record_reads_back_as_the_job() -> None:
    options = SubmitOptions(
        IdempotencyKey("k", "d"), "ck", "https://receiver.example", request_id="r1", trace="t1"
    )
    adjustment = Adjustment("steps_corrected", "30 -> 4", "num_inference_steps")
    new = NewJob("a" * 32, OWNER, resolved(), (adjustment,), options)

    job = record.job_from(
        new.id, record.new_fields(new, NOW_US, queue_score=0.1, leader="b", cached_from="c")
    )

    assert (job.id, job.owner, job.state, job.request) == (new.id, OWNER, JobState.queued, new.request)
    assert (job.created_at, job.queue_score) == (NOW_US / 1e6, 0.1)
    assert (job.warnings, job.cache_key, job.webhook) == ((adjustment,), "ck", "https://receiver.example")
    assert (job.leader, job.cached_from, job.request_id, job.trace) == ("b", "c", "r1", "t1")
    assert (job.attempt, job.failures, job.percent) == (0, 0, 0)


def test_the_record_of_a_video_from_before_0_1_0_is_read() -> None:
    request = resolved().model_copy(update={"video": ResolvedVideo(num_frames=5, fps=8)})
    fields_of = record.new_fields(NewJob("a" * 32, OWNER, request), NOW_US)
    older = json.loads(fields_of["request"])
    older["video"]["frame"] = None

    job = record.job_from("a" * 32, fields_of | {"request": json.dumps(older, separators=(",", ":"))})

    assert job.request == request


def test_a_record_without_options_has_no_empty_fields() -> None:
    fields_of = record.new_fields(NewJob("a" * 32, OWNER, resolved()), NOW_US)

    assert set(fields_of) == {
        "state", "owner", "model", "request", "warnings", "created_us", "attempt", "failures", "queue_score",
    }  # fmt: skip


def test_every_later_field_of_a_record_is_read() -> None:
    resume_point, error = ResumePoint("p", "0" * 64, 2, 4), JobError("internal", "why")
    later = {
        "state": "failed",
        "attempt": "3",
        "failures": "2",
        "cancel": "1",
        "step": "2",
        "steps": "4",
        "started_us": "2000000",
        "ended_us": "3000000",
        "generation_s": "1.5",
        "resume_point": record.RESUME_POINT.dump_json(resume_point).decode(),
        "artifacts": record.ARTIFACTS.dump_json((ARTIFACT,)).decode(),
        "error": record.ERROR.dump_json(error).decode(),
        "files_expired": "1",
        "charge": str(Charge("2026-11-30", 3)),
    }

    job = record.job_from("a" * 32, record.new_fields(NewJob("a" * 32, OWNER, resolved()), NOW_US) | later)

    assert (job.state, job.attempt, job.failures, job.cancel_requested) == (JobState.failed, 3, 2, True)
    assert (job.step, job.steps, job.resume_point) == (2, 4, resume_point)
    assert (job.started_at, job.completed_at, job.generation_s) == (2.0, 3.0, 1.5)
    assert (job.artifacts, job.error, job.files_expired) == ((ARTIFACT,), error, True)
    assert job.charge == Charge("2026-11-30", 3)
    assert (job.leader, job.cached_from, job.webhook, job.cache_key) == (None, None, None, None)


def test_keys_are_distinct_and_under_the_prefix() -> None:
    keys = Keys("weft:")
    names = [name for name in dir(keys) if not name.startswith("_") and name != "prefix"]
    values = [getattr(keys, name) for name in names]
    made = [
        value if isinstance(value, str) else value(*["x"] * (value.__func__.__code__.co_argcount - 1))
        for value in values
    ]

    assert len(set(made)) == len(made) == len(names)
    assert all(key.startswith("weft:") for key in made)
    assert [field.name for field in fields(keys)] == ["prefix"]


def test_a_digest_is_safe_in_a_key() -> None:
    assert key_digest("any\r\n text") != key_digest("other")
    assert is_job_id(key_digest("x")), "32 hex digits"


def test_a_signature_is_the_standards() -> None:
    secret = owner_secret(b"s" * 32, OWNER)
    at = datetime(2026, 11, 30, 12, 0, 0, 999_000, tzinfo=UTC)
    headers = signature_headers(secret, "evt_1", at, b'{"a":1}')

    key = base64.b64decode(secret.removeprefix("whsec_"))
    timestamp = str(int(at.timestamp()))
    signed = hmac.new(key, f'evt_1.{timestamp}.{{"a":1}}'.encode(), hashlib.sha256).digest()
    assert headers == {
        "webhook-id": "evt_1",
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        "content-type": "application/json",
    }


def test_a_body_carries_the_facts_and_no_prompt() -> None:
    failed = replace(
        JOB, state=JobState.failed, completed_at=1_700_000_009.5, error=JobError("internal", "why")
    )
    done = replace(JOB, state=JobState.completed, completed_at=1_700_000_009.5, artifacts=(ARTIFACT,))

    body, ended = json.loads(event_body(failed, "evt_1")), json.loads(event_body(done, "evt_2"))

    assert (body["id"], body["object"], body["type"]) == ("evt_1", "event", "image.failed")
    assert body["created_at"] == 1_700_000_009
    assert body["data"]["error"] == {"kind": "internal", "message": "why"}
    assert (ended["type"], ended["data"]["error"]) == ("image.completed", None)
    assert ended["data"]["artifacts"] == [
        {"index": 0, "kind": "image", "media_type": "image/png", "sha256": "0" * 64}
    ]
    assert JOB.request.prompt not in event_body(done, "evt_2").decode()
