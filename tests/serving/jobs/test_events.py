"""The job's events: percent in one place, and the stored form."""

from __future__ import annotations

import pytest

from serve_app.jobs import events
from serve_app.jobs.job import Job, JobError, JobState, percent_done
from tests.serving.fakes import OWNER, resolved

EVENTS = [
    events.JobQueued(3, 2, 4),
    events.JobStarted(2, 2, 4),
    events.Step(1, 4),
    events.Stage("decode", 3, 9),
    events.Preview(1, "image/webp", b"\x00\xffpreview"),
    events.JobCompleted(1.5),
    events.Failed("out_of_memory", "too big", retryable=False, param="width", retry_after_s=2.0),
    events.JobCancelled(),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_being_stored(event: events.Event) -> None:
    fields = events.encode(event)

    assert set(fields) == {"event", "data"}
    assert events.decode(fields) == event


def test_stored_names_are_the_names_on_the_wire() -> None:
    assert [events.encode(event)["event"] for event in EVENTS] == [
        "queued", "started", "step", "stage", "preview", "completed", "failed", "cancelled",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("event", "percent"),
    [
        (events.JobQueued(1), 0),
        (events.JobQueued(1, 1, 3), 33),
        (events.JobStarted(2, 2, 4), 50),
        (events.Step(0, 4), 0),
        (events.Step(1, 3), 33),
        (events.Step(2, 3), 66),
        (events.Step(4, 4), 99),
        (events.Stage("decode", 0, 9), 99),
        (events.Stage("encode", 9, 9), 99),
        (events.JobCompleted(1.0), 100),
        (events.Preview(1, "image/webp", b""), None),
        (events.Failed("internal", "why", retryable=False), None),
        (events.JobCancelled(), None),
    ],
)
def test_percent_of_an_event(event: events.Event, percent: int | None) -> None:
    assert events.percent(event) == percent


def ended(state: JobState, error: JobError | None = None) -> Job:
    return Job("a" * 32, OWNER, state, resolved(), 0.0, error=error)


def test_the_ending_of_a_job_follows_from_its_record() -> None:
    error = JobError("out_of_memory", "too big", "width", 2.0)
    failed = events.Failed("out_of_memory", "too big", retryable=False, param="width", retry_after_s=2.0)

    assert events.ending_event(ended(JobState.completed)) == events.JobCompleted(0.0)
    assert events.ending_event(ended(JobState.failed, error)) == failed
    assert events.ending_event(ended(JobState.cancelled)) == events.JobCancelled()
    for job in (ended(JobState.queued), ended(JobState.processing)):
        with pytest.raises(AssertionError, match=f"job {job.id} has not ended"):
            events.ending_event(job)


@pytest.mark.parametrize(
    ("step", "steps", "percent"),
    [
        (0, 0, 0),
        (3, 0, 0),
        (0, 4, 0),
        (4, 4, 99),
        (5, 4, 99),
        (-1, 4, 0),
        (99, 100, 99),
        (1, 1, 99),
        (2, -1, 0),
    ],
)
def test_percent_stays_within_its_bounds(step: int, steps: int, percent: int) -> None:
    assert percent_done(step, steps) == percent
