"""Every change of a job's state: hash, indexes, events and wake-ups change together (no server)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from deployments.protocol.adjustment import Adjustment
from serve_app.admission.quota import Charge
from serve_app.jobs import events
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
from serve_app.jobs.store.endings import EVENTS_TTL_S, CoalescedGroup
from serve_app.jobs.store.fair_queue import QueueTag
from serve_app.jobs.store.indexes import NEW_WORK
from serve_app.jobs.store.key_names import Keys, key_digest
from serve_app.jobs.store.record import IDEMPOTENCY_RECORD, job_from
from serve_app.jobs.store.transitions import Placement, Transitions
from serve_app.settings import Settings
from tests.serving.fakes import MODEL, OWNER, resolved
from tests.serving.jobs.memory_pipe import MemoryPipe

KEYS = Keys("t:")
SETTINGS = Settings(
    _env_file=None, redis_prefix="t:", lease_s=30.0, max_attempts=3, record_ttl_s=7_000, result_ttl_s=900
)
NOW_US = 1_700_000_000_000_000
LEASE_US = 30_000_000
TAG = QueueTag(5.5, 6.0)
LOST = JobError("model_unavailable", "lost")
RESUME = ResumePoint("outputs/x/1_resume", "0" * 64, 2, 4)
REACHED = replace(RESUME, attempt=1)  # by the attempt that runs


@pytest.fixture
def pipe() -> MemoryPipe:
    return MemoryPipe()


@pytest.fixture
def transitions() -> Transitions:
    return Transitions(KEYS, SETTINGS)


def placement(**changes: Any) -> Placement:
    return replace(Placement(TAG, 3.0, 2), **changes)


def new(job_id: str = "a", **options: Any) -> NewJob:
    return NewJob(job_id, OWNER, resolved(), (), SubmitOptions(**options))


def accepted(pipe: MemoryPipe, transitions: Transitions, job_id: str = "a", **options: Any) -> Job:
    return transitions.accept(cast(Any, pipe), new(job_id, **options), NOW_US, placement())


def following(pipe: MemoryPipe, transitions: Transitions, job_id: str, leader: str) -> Job:
    request = new(job_id, cache_key="ck")
    return transitions.accept(cast(Any, pipe), request, NOW_US + 1, placement(leader=leader))


def running(pipe: MemoryPipe, transitions: Transitions, job_id: str = "a", **options: Any) -> Job:
    job = accepted(pipe, transitions, job_id, **options)
    return transitions.claim(cast(Any, pipe), job, NOW_US, 5.0)


def stored(pipe: MemoryPipe, job_id: str = "a") -> Job:
    return job_from(job_id, pipe.hashes[KEYS.job(job_id)])


def published(pipe: MemoryPipe, job_id: str = "a") -> list[events.Event]:
    return [events.decode(fields) for fields in pipe.streams[KEYS.events(job_id)]]


def test_an_accepted_job_is_in_every_index(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = accepted(pipe, transitions)

    assert stored(pipe) == job
    assert (job.state, job.owner, job.created_at) == (JobState.queued, OWNER, NOW_US / 1e6)
    assert pipe.zsets[KEYS.pending] == {"a": NOW_US}
    assert pipe.zsets[KEYS.pending_of(MODEL)] == {"a": TAG.score}
    assert pipe.sets[KEYS.active(OWNER)] == {"a"}
    assert pipe.zsets[KEYS.owner(OWNER)] == {"a": NOW_US}
    assert pipe.ttl_s[KEYS.owner(OWNER)] == 2 * SETTINGS.record_ttl_s
    assert published(pipe) == [events.JobQueued(2)]
    assert pipe.published == [(KEYS.work_channel, NEW_WORK), (KEYS.events_channel, "a")]
    assert KEYS.job("a") not in pipe.ttl_s, "it lives until it has ended"


def test_old_entries_of_an_owners_list_are_dropped(pipe: MemoryPipe, transitions: Transitions) -> None:
    kept_us = 2 * SETTINGS.record_ttl_s * 1_000_000
    pipe.zsets[KEYS.owner(OWNER)] = {"old": NOW_US - kept_us, "recent": NOW_US - kept_us + 1}

    accepted(pipe, transitions)

    assert set(pipe.zsets[KEYS.owner(OWNER)]) == {"recent", "a"}


@pytest.mark.parametrize(("is_empty", "virtual_time"), [(False, "7.0"), (True, "3.0")])
def test_accepting_advances_the_flow_and_an_empty_queue_forgets_the_others(
    pipe: MemoryPipe, transitions: Transitions, is_empty: bool, virtual_time: str
) -> None:
    pipe.hashes[KEYS.fair_queue(MODEL)] = {"v": "7.0", "normal:other": "9.0"}

    transitions.accept(cast(Any, pipe), new(), NOW_US, placement(queue_is_empty=is_empty))

    flows = {f"normal:{OWNER}": "6.0"} | ({} if is_empty else {"normal:other": "9.0"})
    assert pipe.hashes[KEYS.fair_queue(MODEL)] == {"v": virtual_time, **flows}
    assert pipe.strings[KEYS.arrivals] == "1"
    assert pipe.ttl_s[KEYS.fair_queue(MODEL)] == pipe.ttl_s[KEYS.arrivals] == SETTINGS.record_ttl_s


def test_an_idempotency_key_is_recorded_with_the_digest_of_the_body(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    accepted(pipe, transitions, idempotency_key=IdempotencyKey("k1", "body"))

    key = KEYS.idempotency_key(OWNER, key_digest("k1"))
    first = IDEMPOTENCY_RECORD.validate_json(pipe.strings[key])
    assert (first.job, first.digest) == ("a", "body")
    assert pipe.ttl_s[key] == SETTINGS.idempotency_ttl_s


def test_a_charge_is_counted_and_kept_in_the_record(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = transitions.accept(cast(Any, pipe), new(), NOW_US, placement(), Charge("2026-11-30", 3))

    assert job.charge == Charge("2026-11-30", 3)
    assert pipe.hashes[KEYS.quota(OWNER)] == {"2026-11-30": "3"}
    assert KEYS.quota(OWNER) in pipe.ttl_s


def test_only_a_job_that_runs_itself_answers_its_cache_key(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    accepted(pipe, transitions, "a", cache_key="ck")
    following(pipe, transitions, "b", "a")
    transitions.accept(cast(Any, pipe), new("c", cache_key="ck"), NOW_US, placement(cached_from="z"))

    assert pipe.strings[KEYS.cache_key("ck")] == "a"
    assert pipe.strings[KEYS.arrivals] == "1", "no flow is charged for a job that does not run"


def test_a_follower_waits_in_no_queue(pipe: MemoryPipe, transitions: Transitions) -> None:
    accepted(pipe, transitions, "a", cache_key="ck")

    job = following(pipe, transitions, "b", "a")

    assert (job.leader, stored(pipe, "b")) == ("a", job)
    assert pipe.zsets[KEYS.followers("a")] == {"b": NOW_US + 1}
    assert "b" not in pipe.zsets[KEYS.pending]
    assert pipe.sets[KEYS.active(OWNER)] == {"a", "b"}


def test_a_copy_waits_in_the_queue_of_copies(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = transitions.accept(cast(Any, pipe), new(), NOW_US, placement(cached_from="z"))

    assert job.cached_from == "z"
    assert pipe.zsets[KEYS.pending_of(COPY_QUEUE)] == {"a": TAG.score}
    assert not pipe.zsets[KEYS.pending_of(MODEL)]


def test_a_claim_takes_the_job_out_of_the_queues_under_a_lease(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    job = running(pipe, transitions)

    assert (job.state, job.attempt, job.started_at) == (JobState.processing, 1, NOW_US / 1e6)
    assert stored(pipe) == job
    assert (pipe.zsets[KEYS.pending], pipe.zsets[KEYS.pending_of(MODEL)]) == ({}, {})
    assert pipe.zsets[KEYS.running] == {"a": NOW_US + LEASE_US}
    assert pipe.hashes[KEYS.job("a")]["lease_us"] == str(NOW_US + LEASE_US)
    assert pipe.hashes[KEYS.fair_queue(MODEL)]["v"] == "5.0"
    assert pipe.ttl_s[KEYS.fair_queue(MODEL)] == SETTINGS.record_ttl_s
    assert published(pipe)[-1] == events.JobStarted(1, 0, 0)


def test_a_claim_renews_the_life_of_the_queues_tags(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = accepted(pipe, transitions)
    pipe.ttl_s.clear()

    transitions.claim(cast(Any, pipe), job, NOW_US, 5.0)

    assert pipe.ttl_s == {KEYS.fair_queue(MODEL): SETTINGS.record_ttl_s}


def test_a_claimed_copy_leaves_the_virtual_time_of_its_model(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    job = transitions.accept(cast(Any, pipe), new(), NOW_US, placement(cached_from="z"))

    transitions.claim(cast(Any, pipe), job, NOW_US, 5.0)

    assert not pipe.exists(KEYS.fair_queue(MODEL))
    assert not pipe.zsets[KEYS.pending_of(COPY_QUEUE)]


def test_a_claim_continues_from_the_resume_point(pipe: MemoryPipe, transitions: Transitions) -> None:
    waiting = replace(accepted(pipe, transitions), resume_point=RESUME, attempt=1)

    job = transitions.claim(cast(Any, pipe), waiting, NOW_US, 5.0)

    assert (job.attempt, job.step, job.steps) == (2, 2, 4)
    assert (stored(pipe).step, stored(pipe).steps) == (2, 4)
    assert published(pipe)[-1] == events.JobStarted(2, 2, 4)


def renew(pipe: MemoryPipe, transitions: Transitions, job: Job, step: int, steps: int, *sent: Any) -> None:
    transitions.renew(cast(Any, pipe), job, NOW_US + 7, step=step, steps=steps, pending_events=sent)


def test_a_heartbeat_renews_the_lease_and_publishes(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = running(pipe, transitions)
    before = len(pipe.published)

    renew(pipe, transitions, job, 2, 4, events.Step(1, 4), events.Step(2, 4))

    assert pipe.zsets[KEYS.running] == {"a": NOW_US + 7 + LEASE_US}
    assert pipe.hashes[KEYS.job("a")]["lease_us"] == str(NOW_US + 7 + LEASE_US)
    assert published(pipe)[-2:] == [events.Step(1, 4), events.Step(2, 4)]
    assert pipe.published[before:] == [(KEYS.events_channel, "a")], "one wake-up for all of them"
    assert (stored(pipe).step, stored(pipe).steps) == (2, 4)


def test_a_silent_heartbeat_wakes_no_follower(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = running(pipe, transitions)
    before = list(pipe.published)

    renew(pipe, transitions, job, 0, 0)

    assert pipe.published == before


@pytest.mark.parametrize(
    ("step", "steps", "expected"), [(1, 4, (3, 4)), (3, 5, (3, 5)), (4, 4, (4, 4)), (1, 9, (3, 9))]
)
def test_progress_never_goes_back(
    pipe: MemoryPipe, transitions: Transitions, step: int, steps: int, expected: tuple[int, int]
) -> None:
    job = running(pipe, transitions)
    renew(pipe, transitions, job, 3, 4)

    renew(pipe, transitions, stored(pipe), step, steps)

    assert (stored(pipe).step, stored(pipe).steps) == expected


def test_the_stream_keeps_the_latest_events(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = running(pipe, transitions)

    for step in range(SETTINGS.events_kept + 5):
        renew(pipe, transitions, job, step, 999, events.Step(step, 999))

    assert len(published(pipe)) == SETTINGS.events_kept
    assert published(pipe)[-1] == events.Step(SETTINGS.events_kept + 4, 999)


def test_a_running_job_is_marked_and_its_worker_woken(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = transitions.request_cancel(cast(Any, pipe), running(pipe, transitions))

    assert job.cancel_requested
    assert stored(pipe).cancel_requested
    assert stored(pipe).state is JobState.processing
    assert pipe.published[-1] == (KEYS.work_channel, "a")


def release(pipe: MemoryPipe, transitions: Transitions, job: Job, **how: Any) -> Job:
    return transitions.release(cast(Any, pipe), job, LOST, NOW_US, **{"counted": True, **how})


def test_a_released_job_waits_at_its_old_score(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = release(pipe, transitions, running(pipe, transitions))

    assert (job.state, job.failures, job.error) == (JobState.queued, 1, None)
    assert stored(pipe) == job
    assert pipe.zsets[KEYS.pending] == {"a": NOW_US}
    assert pipe.zsets[KEYS.pending_of(MODEL)] == {"a": TAG.score}
    assert pipe.zsets[KEYS.running] == {}
    assert "lease_us" not in pipe.hashes[KEYS.job("a")]
    assert pipe.sets[KEYS.active(OWNER)] == {"a"}
    assert published(pipe)[-1] == events.JobQueued(1, 0, 0)
    assert (KEYS.work_channel, NEW_WORK) in pipe.published[-2:]


@pytest.mark.parametrize(
    ("counted", "given", "before", "expected"),
    [
        (False, RESUME, None, RESUME),
        (False, None, RESUME, RESUME),
        (True, None, RESUME, None),
        (True, RESUME, None, RESUME),
        (True, None, REACHED, REACHED),
        (False, None, None, None),
    ],
)
def test_which_resume_point_the_next_attempt_gets(
    pipe: MemoryPipe,
    transitions: Transitions,
    counted: bool,
    given: ResumePoint | None,
    before: ResumePoint | None,
    expected: ResumePoint | None,
) -> None:
    job = replace(running(pipe, transitions), resume_point=before)
    pipe.hashes[KEYS.job("a")]["resume_point"] = "{}"

    left = release(pipe, transitions, job, counted=counted, resume_point=given)

    assert (left.resume_point, left.failures) == (expected, int(counted))
    assert stored(pipe).resume_point == expected
    step, steps = (0, 0) if expected is None else (2, 4)
    assert (stored(pipe).step, stored(pipe).steps) == (step, steps)
    assert published(pipe)[-1] == events.JobQueued(1, step, steps)


@pytest.mark.parametrize(
    ("step", "kept", "warned"), [(0, None, []), (3, REACHED, []), (3, None, ["old", "restarted"])]
)
def test_a_released_job_says_which_steps_are_computed_again(
    pipe: MemoryPipe, transitions: Transitions, step: int, kept: ResumePoint | None, warned: list[str]
) -> None:
    before = (Adjustment("old", "", ""), Adjustment("restarted", "", "")) if warned else ()
    job = replace(running(pipe, transitions), step=step, steps=4, resume_point=kept, warnings=before)

    left = release(pipe, transitions, job)

    assert [warning.code for warning in left.warnings] == warned
    assert stored(pipe).warnings == left.warnings
    if warned:
        assert left.warnings[-1].message.startswith("3 of 4 steps are computed again: ")


def test_a_heartbeat_records_the_resume_point_and_the_next_leaves_it(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    job = running(pipe, transitions)

    transitions.renew(cast(Any, pipe), job, NOW_US, step=2, steps=4, pending_events=(), resume_point=REACHED)
    renew(pipe, transitions, job, 3, 4)

    assert stored(pipe).resume_point == REACHED


def test_the_last_counted_failure_ends_the_job(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = replace(running(pipe, transitions), failures=SETTINGS.max_attempts - 1)

    left = release(pipe, transitions, job)

    assert (left.state, left.failures, left.error) == (JobState.failed, SETTINGS.max_attempts, LOST)
    assert (stored(pipe).state, stored(pipe).error) == (JobState.failed, LOST)
    assert published(pipe)[-1] == events.Failed("model_unavailable", "lost", retryable=True)


def test_progress_of_a_released_job_is_that_of_its_resume_point(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    left = release(pipe, transitions, running(pipe, transitions), resume_point=RESUME)

    assert (left.step, left.steps) == (RESUME.step, RESUME.steps)


def test_an_uncounted_failure_never_ends_the_job(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = replace(running(pipe, transitions), failures=SETTINGS.max_attempts - 1)

    assert release(pipe, transitions, job, counted=False).state is JobState.queued


def test_a_released_job_that_was_to_be_cancelled_is(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = replace(running(pipe, transitions), cancel_requested=True)

    assert release(pipe, transitions, job).state is JobState.cancelled
    assert published(pipe)[-1] == events.JobCancelled()


def test_a_released_copy_waits_for_its_model(pipe: MemoryPipe, transitions: Transitions) -> None:
    copy = transitions.accept(cast(Any, pipe), new(), NOW_US, placement(cached_from="z"))
    job = transitions.claim(cast(Any, pipe), copy, NOW_US, 5.0)

    release(pipe, transitions, job, counted=False)

    assert stored(pipe).cached_from is None
    assert pipe.zsets[KEYS.pending_of(MODEL)] == {"a": TAG.score}
    assert not pipe.zsets[KEYS.pending_of(COPY_QUEUE)]


def artifact(kind: str) -> StoredArtifact:
    return StoredArtifact(0, kind, f"outputs/a/1_0_{kind}.png", "image/png", 9, "0" * 64, 64, 64, 7)


def test_a_completed_job_keeps_its_files_and_gets_a_time_to_live(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    job = replace(running(pipe, transitions), artifacts=(artifact("image"),), generation_s=1.5)

    left = transitions.endings.end(cast(Any, pipe), job, JobState.completed, NOW_US + 9)

    assert (left.state, left.completed_at, left.percent) == (JobState.completed, (NOW_US + 9) / 1e6, 100)
    assert stored(pipe) == left
    assert pipe.zsets[KEYS.running] == {}
    assert pipe.sets[KEYS.active(OWNER)] == set()
    assert published(pipe)[-1] == events.JobCompleted(1.5)
    assert pipe.ttl_s[KEYS.job("a")] == SETTINGS.record_ttl_s
    assert pipe.ttl_s[KEYS.events("a")] == EVENTS_TTL_S
    assert pipe.zsets[KEYS.expiring] == {"a": NOW_US + 9 + SETTINGS.result_ttl_s * 1_000_000}
    assert pipe.ttl_s[KEYS.expiring] == 2 * SETTINGS.record_ttl_s
    assert not pipe.exists(KEYS.outbox)


def test_a_webhook_enters_the_outbox_with_the_ending(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = running(pipe, transitions, webhook="https://receiver.example")

    transitions.endings.end(cast(Any, pipe), job, JobState.cancelled, NOW_US + 9)

    assert pipe.zsets[KEYS.outbox] == {"a": NOW_US + 9}
    assert pipe.ttl_s[KEYS.outbox] == SETTINGS.record_ttl_s


@pytest.mark.parametrize(
    ("artifacts", "used"),
    [((), "0"), ((artifact("image"), artifact("thumbnail")), "1"), ((artifact("image"),) * 3, "3")],
)
def test_what_was_not_delivered_is_given_back(
    pipe: MemoryPipe, transitions: Transitions, artifacts: tuple[StoredArtifact, ...], used: str
) -> None:
    charge = Charge("2026-11-30", 3)
    job = transitions.accept(cast(Any, pipe), new(), NOW_US, placement(), charge)
    job = replace(transitions.claim(cast(Any, pipe), job, NOW_US, 5.0), artifacts=artifacts, generation_s=1.0)

    transitions.endings.end(cast(Any, pipe), job, JobState.completed, NOW_US)

    assert pipe.hashes[KEYS.quota(OWNER)] == {"2026-11-30": used}


def test_a_cancelled_follower_leaves_its_leader(pipe: MemoryPipe, transitions: Transitions) -> None:
    accepted(pipe, transitions, "a", cache_key="ck")
    follower = following(pipe, transitions, "b", "a")

    transitions.endings.end(cast(Any, pipe), follower, JobState.cancelled, NOW_US)

    assert pipe.zsets[KEYS.followers("a")] == {}
    assert pipe.strings[KEYS.cache_key("ck")] == "a"


def coalesced(pipe: MemoryPipe, transitions: Transitions) -> tuple[Job, CoalescedGroup]:
    """A running leader and its two followers."""
    leader = running(pipe, transitions, "a", cache_key="ck")
    followers = tuple(following(pipe, transitions, job_id, "a") for job_id in ("b", "c"))
    return leader, CoalescedGroup(is_leader=True, followers=followers)


def test_followers_of_a_completed_leader_copy_its_files(pipe: MemoryPipe, transitions: Transitions) -> None:
    leader, group = coalesced(pipe, transitions)

    transitions.endings.end(
        cast(Any, pipe), replace(leader, generation_s=1.0), JobState.completed, NOW_US, group
    )

    for job_id in ("b", "c"):
        job = stored(pipe, job_id)
        assert (job.state, job.leader, job.cached_from) == (JobState.queued, None, "a")
    assert set(pipe.zsets[KEYS.pending_of(COPY_QUEUE)]) == {"b", "c"}
    assert not pipe.exists(KEYS.followers("a"))
    assert pipe.strings[KEYS.cache_key("ck")] == "a"
    assert pipe.ttl_s[KEYS.cache_key("ck")] == SETTINGS.result_ttl_s


def test_followers_of_a_failed_leader_fail_for_the_same_cause(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    leader, group = coalesced(pipe, transitions)

    transitions.endings.end(cast(Any, pipe), replace(leader, error=LOST), JobState.failed, NOW_US, group)

    for job_id in ("b", "c"):
        assert (stored(pipe, job_id).state, stored(pipe, job_id).error) == (JobState.failed, LOST)
        assert KEYS.job(job_id) in pipe.ttl_s
    assert not pipe.exists(KEYS.cache_key("ck"))
    assert not pipe.exists(KEYS.followers("a"))
    assert pipe.sets[KEYS.active(OWNER)] == set()


@pytest.mark.parametrize("state", [JobState.cancelled, JobState.failed])
def test_the_oldest_follower_becomes_the_new_leader_and_takes_over_the_cache_key(
    pipe: MemoryPipe, transitions: Transitions, state: JobState
) -> None:
    leader, group = coalesced(pipe, transitions)

    leader = replace(leader, error=LOST)
    transitions.endings.end(cast(Any, pipe), leader, state, NOW_US, group, fails_followers=False)

    assert (stored(pipe, "b").leader, stored(pipe, "b").cached_from) == (None, None)
    assert pipe.zsets[KEYS.pending_of(MODEL)] == {"b": TAG.score}
    assert stored(pipe, "c").leader == "b"
    assert pipe.zsets[KEYS.followers("b")] == {"c": NOW_US + 1}
    assert not pipe.exists(KEYS.followers("a"))
    assert pipe.strings[KEYS.cache_key("ck")] == "b", "the next identical request must join the new leader"
    assert KEYS.cache_key("ck") not in pipe.ttl_s


@pytest.mark.parametrize("fails_followers", [True, False])
def test_the_last_failure_of_a_leader_resolves_its_followers(
    pipe: MemoryPipe, transitions: Transitions, fails_followers: bool
) -> None:
    leader, group = coalesced(pipe, transitions)
    leader = replace(leader, failures=SETTINGS.max_attempts - 1)

    release(pipe, transitions, leader, group=group, fails_followers=fails_followers)

    expected = JobState.failed if fails_followers else JobState.queued
    assert stored(pipe, "b").state is expected
    assert not pipe.exists(KEYS.followers("a"))


def test_followers_fail_with_their_leader_unless_said_otherwise(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    leader, group = coalesced(pipe, transitions)
    leader = replace(leader, failures=SETTINGS.max_attempts - 1)

    release(pipe, transitions, leader, group=group)

    assert stored(pipe, "b").state is stored(pipe, "c").state is JobState.failed
    assert stored(pipe, "b").leader == "a", "the record keeps what it waited for"
    assert not pipe.zsets[KEYS.followers("a")]


def test_a_leader_that_was_to_be_cancelled_is_replaced_when_it_is_released(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    leader, group = coalesced(pipe, transitions)

    release(pipe, transitions, replace(leader, cancel_requested=True), group=group)

    assert pipe.strings[KEYS.cache_key("ck")] == "b"
    assert stored(pipe, "c").leader == "b"


def test_a_cancelled_job_leaves_the_queue(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = accepted(pipe, transitions)
    old_us = NOW_US - 2 * SETTINGS.record_ttl_s * 1_000_000
    pipe.zsets[KEYS.owner(OWNER)]["old"] = old_us

    transitions.endings.end(cast(Any, pipe), job, JobState.cancelled, NOW_US)

    assert (pipe.zsets[KEYS.pending], pipe.zsets[KEYS.pending_of(MODEL)]) == ({}, {})
    assert "old" not in pipe.zsets[KEYS.owner(OWNER)]
    assert stored(pipe).error is None


def test_only_a_failed_job_has_an_error(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = replace(running(pipe, transitions), error=LOST)

    transitions.endings.end(cast(Any, pipe), job, JobState.cancelled, NOW_US)

    assert stored(pipe).error is None


def test_a_job_without_a_cache_key_touches_none(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = replace(running(pipe, transitions), generation_s=1.0)
    pipe.strings[KEYS.cache_key("ck")] = "another"

    transitions.endings.end(cast(Any, pipe), job, JobState.completed, NOW_US)

    assert KEYS.cache_key("ck") not in pipe.ttl_s


def test_a_job_that_does_not_answer_its_cache_key_leaves_it_alone(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    leader, group = coalesced(pipe, transitions)
    pipe.strings[KEYS.cache_key("ck")] = "another"
    group = replace(group, is_leader=False)

    for state in (JobState.cancelled, JobState.failed):
        ended = transitions.endings.end(cast(Any, pipe), replace(leader, error=LOST), state, NOW_US, group)
        transitions.endings.expire_files(cast(Any, pipe), ended, group)
        transitions.endings.delete(cast(Any, pipe), ended, group)

    assert pipe.strings[KEYS.cache_key("ck")] == "another"


def test_a_cancelled_leader_without_followers_gives_its_cache_key_up(
    pipe: MemoryPipe, transitions: Transitions
) -> None:
    leader = running(pipe, transitions, "a", cache_key="ck")

    transitions.endings.end(
        cast(Any, pipe), leader, JobState.cancelled, NOW_US, CoalescedGroup(is_leader=True)
    )

    assert not pipe.exists(KEYS.cache_key("ck"))


def completed(pipe: MemoryPipe, transitions: Transitions) -> Job:
    job = running(pipe, transitions, "a", cache_key="ck", webhook="https://receiver.example")
    job = replace(job, artifacts=(artifact("image"),), generation_s=1.0)
    return transitions.endings.end(
        cast(Any, pipe), job, JobState.completed, NOW_US, CoalescedGroup(is_leader=True)
    )


def test_nothing_of_a_deleted_job_remains(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = completed(pipe, transitions)

    transitions.endings.delete(cast(Any, pipe), job, CoalescedGroup(is_leader=True))

    gone = (KEYS.job("a"), KEYS.events("a"), KEYS.cache_key("ck"), KEYS.expiring, KEYS.outbox)
    assert [key for key in (*gone, KEYS.owner(OWNER)) if pipe.exists(key)] == []


def test_a_job_without_files_is_copied_no_more(pipe: MemoryPipe, transitions: Transitions) -> None:
    job = completed(pipe, transitions)

    transitions.endings.expire_files(cast(Any, pipe), job, CoalescedGroup(is_leader=True))

    assert (stored(pipe).files_expired, stored(pipe).artifacts) == (True, ())
    assert not pipe.exists(KEYS.cache_key("ck"))
    assert stored(pipe).state is JobState.completed


def test_a_stray_queue_entry_is_dropped(pipe: MemoryPipe, transitions: Transitions) -> None:
    accepted(pipe, transitions)

    transitions.drop_from_queue(cast(Any, pipe), "a", MODEL)

    assert (pipe.zsets[KEYS.pending], pipe.zsets[KEYS.pending_of(MODEL)]) == ({}, {})
