"""The state of a running job is kept from time to time: whatever dies, the next attempt starts there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest

from deployments.protocol import events
from deployments.protocol.errors import ModelUnavailable, NodeLost
from deployments.protocol.request import ResolvedRequest
from serve_app.jobs.job import JobState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker import attempt as attempt_module
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.fakes import OWNER, FakeModels, eventually, picture
from tests.serving.jobs.conftest import running
from tests.serving.jobs.test_dispatch import ended, submitted

STEPS = 4


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "RETRY_FIRST_S", 0.001)


class KeptModels(FakeModels):
    """Models that send a state after every step. `dies` says after which step the calls end, one each."""

    def __init__(self, dies: Sequence[tuple[int, Exception | None]]) -> None:
        """An exception of None: the call hangs."""
        super().__init__()
        self.dies = list(dies)

    async def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[events.Event]:
        self.resumed.append(resume)
        last, error = self.dies.pop(0) if self.dies else (STEPS, None)
        yield events.Started(STEPS)
        for step in range(1 + int(resume or 0), last + 1):
            yield events.Step(step, STEPS)
            yield events.Checkpoint(step, str(step).encode())
        if error is not None:
            raise error
        if last < STEPS:
            await asyncio.Event().wait()
        yield events.Artifact(0, "image", "image/png", picture(), 64, 64, request.seed)
        yield events.Done(0.0, 0.5)


def states_in(tmp_path: Path, job_id: str) -> list[bytes]:
    folder = tmp_path / "results" / "inputs" / job_id
    files = sorted(folder.glob("[!.]*")) if folder.exists() else []  # not those that are being written
    return [file.read_bytes() for file in files]


async def test_a_job_goes_on_from_its_last_state_when_its_node_is_lost(
    store: JobStore,
    settings: Settings,
    results: ResultStore,
    tmp_path: Path,
) -> None:
    lost = NodeLost("the node was lost")
    models = KeptModels([(2, lost), (2, lost), (3, lost)])

    async with running(Dispatcher(store, results, models, settings)):
        job = await ended(store, await submitted(store))

    assert models.resumed == [None, b"2", b"2", b"3"]
    assert (job.state, job.failures, job.warnings) == (JobState.completed, 0, ())
    assert states_in(tmp_path, job.id) == []


async def test_a_state_is_used_after_one_failure_that_counts_and_not_after_a_second(
    store: JobStore,
    settings: Settings,
    results: ResultStore,
) -> None:
    crash = ModelUnavailable("the replica was lost")
    models = KeptModels([(2, crash), (2, crash)])

    async with running(Dispatcher(store, results, models, settings)):
        job = await ended(store, await submitted(store))

    assert models.resumed == [None, b"2", None], "the state may have been the cause"
    assert (job.state, job.failures) == (JobState.completed, 2)
    assert [warning.code for warning in job.warnings] == ["restarted"]
    assert "2 of 4 steps are computed again" in job.warnings[0].message


async def test_a_state_outlives_the_dispatcher_that_stored_it(
    store: JobStore, settings: Settings, results: ResultStore, tmp_path: Path
) -> None:
    models = KeptModels([(3, None)])
    dispatcher = Dispatcher(store, results, models, settings)
    task = asyncio.create_task(dispatcher.run())
    job_id = await submitted(store)

    async def is_kept() -> bool:
        job = await store.get(job_id)
        return job.resume_point is not None and job.resume_point.step == 3

    await eventually(is_kept)
    task.cancel()  # as if its process were killed: nothing is returned to the queue
    await asyncio.wait({task})
    point = (await store.get(job_id)).resume_point
    assert point is not None
    assert await results.get(point.path, sha256=point.sha256) == b"3"
    assert len(states_in(tmp_path, job_id)) <= 2, "earlier states are removed"


async def test_a_job_that_is_cancelled_leaves_no_state(
    store: JobStore, settings: Settings, results: ResultStore, service: JobService, tmp_path: Path
) -> None:
    models = KeptModels([(2, None)])
    async with running(Dispatcher(store, results, models, settings)):
        job_id = await submitted(store)
        await eventually(lambda: states_in(tmp_path, job_id)[-1:] == [b"2"])
        await service.cancel(job_id, OWNER)
        job = await ended(store, job_id)
        await eventually(lambda: not states_in(tmp_path, job_id))

    assert job.state is JobState.cancelled


async def test_a_replica_without_a_state_leaves_the_earlier_one(
    store: JobStore,
    settings: Settings,
    results: ResultStore,
) -> None:
    models = KeptModels([(2, NodeLost("lost"))])

    class StoppedBeforeItsFirstStep(KeptModels):
        async def generate(self, *args: object, **options: object) -> AsyncGenerator[events.Event]:
            if len(self.resumed) == 1:
                self.resumed.append(options["resume"])  # type: ignore[arg-type]
                yield events.Handover(0, b"")
                yield events.Failed("model_unavailable", "the replica is stopped", retryable=True)
                return
            async for event in super().generate(*args, **options):  # type: ignore[arg-type]
                yield event

    models = StoppedBeforeItsFirstStep(models.dies)
    async with running(Dispatcher(store, results, models, settings)):
        job = await ended(store, await submitted(store))

    assert models.resumed == [None, b"2", b"2"]
    assert job.state is JobState.completed


@pytest.mark.parametrize(("step", "warned"), [(0, False), (3, True)])
async def test_a_job_says_that_steps_are_computed_again(
    store: JobStore, settings: Settings, results: ResultStore, step: int, warned: bool
) -> None:
    models = FakeModels()
    models.troubles = [events.Handover(step, b"")]

    async with running(Dispatcher(store, results, models, settings)):
        job = await ended(store, await submitted(store))

    assert job.state is JobState.completed
    assert [warning.code for warning in job.warnings] == ["restarted"] * warned
