"""Chapter 3: a job is a request with an owner and an id, in a durable store until its record expires."""

from __future__ import annotations

import pytest

from deployments.protocol.errors import NotFound
from deployments.protocol.request import GenerationRequest
from serve_app.jobs.job import JobState
from serve_app.jobs.service import JobService
from tests.patience import patience

REQUEST = GenerationRequest(model="tiny-flux-schnell", prompt="a green heart", seed=3, num_images=2)


async def test_submit_returns_at_once_and_the_job_completes_in_the_background(
    job_service: JobService,
) -> None:
    job = await job_service.submit(REQUEST, "ada")

    assert job.state is JobState.queued
    ended = await job_service.wait(job.id, "ada", timeout_s=patience())
    assert ended.state is JobState.completed
    assert ended.percent == 100


async def test_the_images_are_files_named_after_the_job(job_service: JobService) -> None:
    job = await job_service.submit(REQUEST, "ada")
    await job_service.wait(job.id, "ada", timeout_s=patience())

    first, data = await job_service.artifact(job.id, "ada", 0)

    assert job.id in first.path
    assert data.startswith(b"\x89PNG")
    assert (await job_service.artifact(job.id, "ada", 1))[0].seed == first.seed + 1


async def test_events_can_be_followed_and_replayed_from_any_id(job_service: JobService) -> None:
    job = await job_service.submit(REQUEST, "ada")
    seen = [(event_id, type(event).__name__) async for event_id, event in job_service.follow(job.id, "ada")]

    again = [name async for name in _names(job_service, job.id, after=seen[2][0])]

    assert seen[0][1] == "JobQueued"
    assert seen[-1][1] == "JobCompleted"
    assert again == [name for _, name in seen[3:]]


async def _names(job_service: JobService, job_id: str, after: str):  # type: ignore[no-untyped-def]
    async for _, event in job_service.follow(job_id, "ada", after):
        yield type(event).__name__


async def test_a_job_of_another_owner_answers_like_an_unknown_one(job_service: JobService) -> None:
    job = await job_service.submit(REQUEST, "ada")

    with pytest.raises(NotFound) as foreign:
        await job_service.get(job.id, "bob")
    with pytest.raises(NotFound) as unknown:
        await job_service.get("0" * 32, "bob")

    assert foreign.value.message == unknown.value.message
    await job_service.wait(job.id, "ada", timeout_s=patience())
