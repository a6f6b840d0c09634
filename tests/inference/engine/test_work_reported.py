"""What a replica reports to the autoscaling policy: work done, work left, and the mean of a request."""

from __future__ import annotations

import asyncio
import threading

import pytest

from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.engine.work import Finished
from deployments.engine.worker import Worker
from tests.inference.engine.test_worker import everything, steps, worker
from tests.patience import patience

__all__ = ["worker"]


def test_what_is_done_is_no_longer_left() -> None:
    """Four steps of one row, a second each: done and left add up to the whole all the time."""
    scheduler = StepScheduler(1)
    job = ScheduledJob(steps=4, shape="512")
    for _ in range(2):  # of the first, only the shape's second step is believed
        before = ScheduledJob(steps=2, shape="512")
        for step in range(1, 3):
            before.steps_done = step
            scheduler.record_forward("key", 1, 1.0, [before])
    begun_s = scheduler.work_done_s

    for step in range(1, 5):
        job.steps_done = step
        scheduler.record_forward("key", 1, 1.0, [job])
        assert scheduler.work_done_s - begun_s == pytest.approx(step)
        assert scheduler.work_left_s([job]) == pytest.approx(4 - step)


def test_an_unlearned_shape_counts_as_the_latest() -> None:
    scheduler = StepScheduler(1)
    assert scheduler.work_left_s([ScheduledJob(steps=10, batch_size=2, shape="new")]) > 0


async def test_a_worker_counts_what_is_open_and_remembers_what_was(worker: Worker) -> None:
    assert worker.work_seconds() == (0.0, 0.0, 0.0)
    go_on = threading.Event()
    waiting = worker.submit(steps(3, pause_after=1, until=go_on), ScheduledJob(steps=3, shape="a"))
    try:
        await anext(waiting)
        _, left_s, mean_s = worker.work_seconds()
    finally:
        go_on.set()
    assert left_s > 0
    assert mean_s == 0.0

    async with asyncio.timeout(patience(2)):
        assert isinstance((await everything(waiting))[-1], Finished)
    done_s, left_s, mean_s = worker.work_seconds()
    assert done_s > 0
    assert left_s == 0.0
    assert mean_s > 0
