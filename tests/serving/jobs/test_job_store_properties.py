"""The store's invariants hold whatever callers and workers do, in any order."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import redis as redis_py
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from deployments.protocol.errors import Conflict
from deployments.protocol.request import Priority, ResolvedRequest
from serve_app.jobs import events as job_events
from serve_app.jobs.job import COPY_QUEUE, IdempotencyKey, Job, JobError, JobState, NewJob, SubmitOptions
from serve_app.jobs.store import cache_keys
from serve_app.jobs.store import leases as leases_module
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.leases import Claim, StaleClaim
from serve_app.jobs.store.record import job_from
from serve_app.jobs.store.store import JobStore
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from tests.serving.fakes import resolved

EXAMPLES = int(os.environ.get("CHAOS_EXAMPLES", "100"))  # `make chaos`: 2,000
STEPS = 30
OWNERS = ("ada", "bob")
MODELS = ("a", "b")
QUEUES = (*MODELS, COPY_QUEUE)
MAX_ATTEMPTS = 2
BROKEN = JobError("model_unavailable", "lost")
_PREFIXES = (f"weft:machine{number}:" for number in itertools.count())


class StoreMachine(RuleBasedStateMachine):
    """Callers, dispatchers, zombies and a clock that jumps, one step at a time."""

    url: str  # set by the test
    jobs: Any = Bundle("jobs")
    claims: Any = Bundle("claims")  # never dropped: old ones act as stale workers

    def __init__(self) -> None:
        super().__init__()
        settings = Settings(
            _env_file=None,
            redis_prefix=next(_PREFIXES),
            lease_s=3600.0,
            max_attempts=MAX_ATTEMPTS,
            max_active_per_owner=6,
        )
        self.keys = Keys(settings.redis_prefix)
        self.runner = asyncio.Runner()
        self.redis = connect(self.url)
        self.store = JobStore(self.redis, settings)
        self.sync = redis_py.Redis.from_url(self.url, decode_responses=True)
        self.ids = itertools.count()  # not random: equal scores are ordered by id
        self.known: set[str] = set()
        self.cancelled: set[str] = set()  # acknowledged before the job had ended
        self.newest: dict[str, int] = {}  # attempt of the latest claim
        self.steps: dict[tuple[str, int], int] = {}  # per attempt, as last seen
        self.firsts: dict[tuple[str, str], tuple[str, str]] = {}  # (owner, key) -> (job, digest)
        self.requests: dict[str, ResolvedRequest] = {}

    def teardown(self) -> None:
        for job_id in self.known:  # everything can still end, and then nothing stays
            self._expire(job_id)
        for _ in range(MAX_ATTEMPTS + 1):
            self._run(self.store.leases.reap())
            while claim := self._run(self.store.leases.claim(dict.fromkeys(QUEUES, 9))):
                self._expire(claim.job.id)
        keys = list(self.sync.scan_iter(f"{self.keys.prefix}*", count=10_000))
        with self.sync.pipeline(transaction=False) as pipe:
            for job_id in sorted(self.known):
                pipe.hget(self.keys.job(job_id), "state")
            for key in keys:
                pipe.ttl(key)
            found = pipe.execute()
        assert all(JobState(state).ended for state in found[: len(self.known)])
        lives = found[len(self.known) :]
        assert [key for key, ttl in zip(keys, lives, strict=True) if ttl < 0] == []
        self._run(self.redis.aclose())
        self.runner.close()
        self.sync.close()

    def _run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def _job(self, job_id: str) -> Job:
        job: Job = self._run(self.store.get(job_id))
        return job

    def _expire(self, job_id: str) -> None:
        """As if the server's clock had jumped past this lease."""
        if self.sync.hexists(self.keys.job(job_id), "lease_us"):
            self.sync.hset(self.keys.job(job_id), "lease_us", "1")
            self.sync.zadd(self.keys.running, {job_id: 1})

    @rule(
        target=jobs,
        owner=st.sampled_from(OWNERS),
        model=st.sampled_from(MODELS),
        prompt=st.sampled_from(["x", "y"]),
        seeded=st.booleans(),
        priority=st.sampled_from(["low", "normal", "high"]),
        key=st.sampled_from([None, None, "k1", "k2"]),
    )
    def accept(
        self, owner: str, model: str, prompt: str, seeded: bool, priority: Priority, key: str | None
    ) -> Any:
        """A call with or without an Idempotency-Key, for a result that may have been requested before."""
        if self.sync.scard(self.keys.active(owner)) >= 6:
            return hypothesis.stateful.multiple()
        request = resolved(prompt, model=model).model_copy(update={"priority": priority})
        cache_key = cache_keys.compute_cache_key(bytes(32), owner, 0, request, {}) if seeded else None
        idempotency_key = None if key is None else IdempotencyKey(key, cache_keys.body_digest(request))
        try:
            job = self._run(
                self.store.accept(
                    NewJob(
                        f"{next(self.ids):032x}",
                        owner,
                        request,
                        (),
                        SubmitOptions(idempotency_key=idempotency_key, cache_key=cache_key),
                    )
                )
            )
        except Conflict:
            assert idempotency_key is not None
            assert self.firsts[owner, idempotency_key.key][1] != idempotency_key.digest
            return hypothesis.stateful.multiple()
        assert job.owner == owner
        if idempotency_key is not None and job.id in self.known:
            assert self.firsts[owner, idempotency_key.key] == (job.id, idempotency_key.digest)
            return hypothesis.stateful.multiple()
        if idempotency_key is not None:
            assert (owner, idempotency_key.key) not in self.firsts
            self.firsts[owner, idempotency_key.key] = (job.id, idempotency_key.digest)
        self.known.add(job.id)
        self.requests[job.id] = request
        return job.id

    @rule(target=claims, models=st.sets(st.sampled_from(QUEUES), min_size=1))
    def claim(self, models: set[str]) -> Any:
        claim = self._run(self.store.leases.claim(dict.fromkeys(models, 1)))
        if claim is None:
            waiting = [self.sync.zcard(self.keys.pending_of(model)) for model in models]
            assert not any(waiting)
            return hypothesis.stateful.multiple()
        assert claim.attempt == self.newest.get(claim.job.id, 0) + 1
        self.newest[claim.job.id] = claim.attempt
        return claim

    @rule(claim=claims, step=st.integers(0, 9))
    def heartbeat(self, claim: Claim, step: int) -> None:
        self._fenced(claim, self.store.leases.heartbeat(claim, step=step, steps=9))

    @rule(claim=claims)
    def complete(self, claim: Claim) -> None:
        self._fenced(claim, self.store.leases.complete(claim, [], 1.0))

    @rule(claim=claims, fails_followers=st.booleans())
    def fail(self, claim: Claim, fails_followers: bool) -> None:
        self._fenced(claim, self.store.leases.fail(claim, BROKEN, fails_followers=fails_followers))

    @rule(claim=claims, counted=st.booleans(), fails_followers=st.booleans())
    def requeue(self, claim: Claim, counted: bool, fails_followers: bool) -> None:
        self._fenced(
            claim, self.store.leases.requeue(claim, BROKEN, counted=counted, fails_followers=fails_followers)
        )

    def _fenced(self, claim: Claim, write: Any) -> None:
        """A write of any attempt but the running one changes nothing."""
        before = self._job(claim.job.id)
        mine = before.state is JobState.processing and before.attempt == claim.attempt
        try:
            self._run(write)
        except StaleClaim:
            assert not mine
        if not mine:
            assert self._job(claim.job.id) == before

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        before = self._job(job_id)
        self._run(self.store.cancel(job_id))
        if not before.state.ended:
            self.cancelled.add(job_id)

    @rule(job_id=jobs)
    def lease_runs_out(self, job_id: str) -> None:
        self._expire(job_id)

    @rule(job_id=jobs)
    def files_expire(self, job_id: str) -> None:
        if self._job(job_id).state.ended:
            self._run(self.store.file_expiry.expire(job_id))

    @rule()
    def reap(self) -> None:
        self._run(self.store.leases.reap())

    @invariant()
    def invariants_hold(self) -> None:
        known = sorted(self.known)
        with self.sync.pipeline(transaction=True) as pipe:  # one consistent read, one round trip
            for key in (self.keys.pending, self.keys.running, *map(self.keys.pending_of, QUEUES)):
                pipe.zrange(key, 0, -1)
            for owner in OWNERS:
                pipe.smembers(self.keys.active(owner))
            for job_id in known:
                pipe.hgetall(self.keys.job(job_id))
                pipe.xrange(self.keys.events(job_id))
                pipe.zrange(self.keys.followers(job_id), 0, -1)
            found = pipe.execute()
        indexes, each = found[: 2 + len(QUEUES) + len(OWNERS)], found[2 + len(QUEUES) + len(OWNERS) :]
        pending, running = set(indexes[0]), set(indexes[1])
        per_model, active = indexes[2 : 2 + len(QUEUES)], set().union(*indexes[2 + len(QUEUES) :])
        jobs = [job_from(job_id, fields) for job_id, fields in zip(known, each[::3], strict=True)]
        published = {
            job.id: [job_events.decode(fields) for _, fields in entries]
            for job, entries in zip(jobs, each[1::3], strict=True)
        }
        followers = dict(zip(known, each[2::3], strict=True))
        queued = {job.id for job in jobs if job.state is JobState.queued and job.leader is None}
        following = {job.id for job in jobs if job.state is JobState.queued and job.leader is not None}
        processing = {job.id for job in jobs if job.state is JobState.processing}
        assert queued == pending == set(itertools.chain(*per_model))
        assert processing == running
        assert active == queued | processing | following
        self._groups_are_consistent({job.id: job for job in jobs}, followers)
        for job in jobs:
            events = published[job.id]
            endings = [event for event in events if isinstance(event, job_events.ENDINGS)]
            assert len(endings) == job.state.ended  # once, and never again
            assert not endings or events[-1] is endings[0]
            assert job.failures <= MAX_ATTEMPTS
            assert job.failures < MAX_ATTEMPTS or job.state.ended
            if job.id in self.cancelled:
                assert job.state not in (JobState.queued, JobState.completed, JobState.failed)
            attempt = (job.id, job.attempt)
            if job.state is JobState.processing:
                assert job.step >= self.steps.get(attempt, 0)
                self.steps[attempt] = job.step

    def _groups_are_consistent(self, jobs: dict[str, Job], followers: dict[str, list[str]]) -> None:
        """A job that waits for files waits for an identical unfinished job of the same owner."""
        for job in jobs.values():
            other = jobs[job.leader or job.cached_from or job.id]
            assert other.owner == job.owner, "files never cross owners"
            wanted, got = self.requests[job.id], self.requests[other.id]
            assert (wanted.prompt, wanted.model) == (got.prompt, got.model)
            if job.leader is not None and job.state is JobState.queued:
                assert not other.state.ended, "its leader has ended without resolving it"
                assert job.id in followers[other.id]
            if job.cached_from is not None and not job.state.ended:
                assert other.state is JobState.completed


@pytest.fixture
def machine(valkey_url: str) -> type[StoreMachine]:
    StoreMachine.url = valkey_url
    return StoreMachine


def test_the_invariants_hold_under_any_schedule(machine: type[StoreMachine]) -> None:
    run_state_machine_as_test(machine, settings=schedules(EXAMPLES))


def schedules(examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        database=None,
        print_blob=True,  # so that a failing schedule can be run again
    )


def without_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "_check_fence", lambda job, claim: None)


def without_owner_in_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cache_keys.compute_cache_key
    monkeypatch.setattr(
        cache_keys, "compute_cache_key", lambda secret, owner, *rest: whole(secret, "all owners", *rest)
    )


# what a schedule leaves open when it fails is closed by the collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("mutate", [without_fence, without_owner_in_the_cache_key])
def test_the_machine_finds_deliberate_faults(
    machine: type[StoreMachine], mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    quickly = hypothesis.settings(schedules(400), phases=[hypothesis.Phase.generate])

    # SystemError: CPython 3.11 may fail in ast.parse while hypothesis reads the source of what it found
    with pytest.raises((AssertionError, ExceptionGroup, SystemError)):
        run_state_machine_as_test(machine, settings=quickly)
    gc.collect()
