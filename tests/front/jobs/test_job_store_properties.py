"""Whatever callers and workers do, in whatever order, the store keeps its word (reliability invariants)."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import hypothesis
import pytest
import redis as redis_py
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from serve_app.jobs import progress
from serve_app.jobs.job import Job, JobError, JobState, new_job_id
from serve_app.jobs.record import Keys
from serve_app.jobs.store import Claim, JobStore, Stale
from serve_app.jobs.transaction import connect
from serve_app.settings import Settings
from tests.front.fakes import OWNER, fitted

MODELS = ("a", "b")
MAX_ATTEMPTS = 2
BROKEN = JobError("model_unavailable", "lost")
_PREFIXES = (f"weft:machine{number}:" for number in itertools.count())


class StoreMachine(RuleBasedStateMachine):
    """Callers, dispatchers, zombies and a clock that jumps, one step at a time."""

    url: str  # set by the test
    jobs: Any = Bundle("jobs")
    claims: Any = Bundle("claims")  # held for ever: that is what makes zombies

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
        self.known: set[str] = set()
        self.cancelled: set[str] = set()  # acknowledged before the job had ended
        self.newest: dict[str, int] = {}  # attempt of the latest claim
        self.steps: dict[tuple[str, int], int] = {}  # per attempt, as last seen

    def teardown(self) -> None:
        for job_id in self.known:  # everything can still end, and then nothing stays
            self._expire(job_id)
        for _ in range(MAX_ATTEMPTS + 1):
            self._run(self.store.reap())
            while claim := self._run(self.store.claim(dict.fromkeys(MODELS, 9))):
                self._expire(claim.job.id)
        keys = list(self.sync.scan_iter(f"{self.keys.prefix}*", count=1000))
        assert [key for key in keys if self.sync.ttl(key) < 0] == []
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

    @rule(target=jobs, model=st.sampled_from(MODELS))
    def accept(self, model: str) -> Any:
        if self.sync.scard(self.keys.active(OWNER)) >= 6:
            return hypothesis.stateful.multiple()
        job = self._run(self.store.accept(new_job_id(), OWNER, fitted(model=model)))
        self.known.add(job.id)
        return job.id

    @rule(target=claims, models=st.sets(st.sampled_from(MODELS), min_size=1))
    def claim(self, models: set[str]) -> Any:
        claim = self._run(self.store.claim(dict.fromkeys(models, 1)))
        if claim is None:
            waiting = [self.sync.zcard(self.keys.pending_of(model)) for model in models]
            assert not any(waiting)
            return hypothesis.stateful.multiple()
        assert claim.attempt == self.newest.get(claim.job.id, 0) + 1
        self.newest[claim.job.id] = claim.attempt
        return claim

    @rule(claim=claims, step=st.integers(0, 9))
    def heartbeat(self, claim: Claim, step: int) -> None:
        self._fenced(claim, self.store.heartbeat(claim, step=step, steps=9))

    @rule(claim=claims)
    def complete(self, claim: Claim) -> None:
        self._fenced(claim, self.store.complete(claim, [], 1.0))

    @rule(claim=claims)
    def fail(self, claim: Claim) -> None:
        self._fenced(claim, self.store.fail(claim, BROKEN))

    @rule(claim=claims, counted=st.booleans())
    def requeue(self, claim: Claim, counted: bool) -> None:
        self._fenced(claim, self.store.requeue(claim, BROKEN, counted=counted))

    def _fenced(self, claim: Claim, write: Any) -> None:
        """A write of any attempt but the running one changes nothing."""
        before = self._job(claim.job.id)
        mine = before.state is JobState.processing and before.attempt == claim.attempt
        try:
            self._run(write)
        except Stale:
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

    @rule()
    def reap(self) -> None:
        self._run(self.store.reap())

    @invariant()
    def word_is_kept(self) -> None:
        pending = set(self.sync.zrange(self.keys.pending, 0, -1))
        per_model = [self.sync.zrange(self.keys.pending_of(model), 0, -1) for model in MODELS]
        running = set(self.sync.zrange(self.keys.running, 0, -1))
        active = self.sync.smembers(self.keys.active(OWNER))
        jobs = [self._job(job_id) for job_id in self.known]
        queued = {job.id for job in jobs if job.state is JobState.queued}
        processing = {job.id for job in jobs if job.state is JobState.processing}
        assert queued == pending == set(itertools.chain(*per_model))
        assert processing == running
        assert active == queued | processing
        for job in jobs:
            events = [event for _, event in self._run(self.store.events(job.id))]
            endings = [event for event in events if isinstance(event, progress.ENDINGS)]
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


@pytest.fixture
def machine(valkey_url: str) -> type[StoreMachine]:
    StoreMachine.url = valkey_url
    return StoreMachine


def test_the_store_keeps_its_word_under_any_schedule(machine: type[StoreMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            database=None,
        ),
    )
