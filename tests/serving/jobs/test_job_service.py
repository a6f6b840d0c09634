"""What an owner may do with jobs, and what others may not."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from deployments.protocol.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    Internal,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthorized,
    WeftError,
)
from deployments.protocol.request import Control, Edit, GenerationRequest, ResolvedEdit
from serve_app.job_ids import new_job_id
from serve_app.jobs import events, inputs
from serve_app.jobs.job import Job, JobState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.owner_index import JobFilter
from serve_app.jobs.store.start_estimate import Capacity
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.webhook_events import owner_secret
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.redis.transactions import StoreUnreachable
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import patience
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import CARD, MODEL, OWNER, FakeModels, picture, resolved

REQUEST = GenerationRequest(model=MODEL, prompt="a cat")


async def test_a_request_becomes_a_job_with_every_parameter_resolved(service: JobService) -> None:
    job = await service.submit(REQUEST, OWNER)

    view = await service.get(job.id, OWNER)
    assert (view.job, view.position) == (job, 1)
    assert (job.request.width, job.request.num_inference_steps) == (64, 4)


async def test_every_request_without_a_seed_gets_a_random_one(service: JobService) -> None:
    jobs = [await service.submit(REQUEST, OWNER) for _ in range(3)]

    assert len({job.request.seed for job in jobs}) == 3


async def test_an_alias_names_the_same_model(service: JobService) -> None:
    job = await service.submit(GenerationRequest(model=CARD.aliases[0], prompt="x"), OWNER)

    assert job.request.model == MODEL


async def test_adjustments_are_stored_with_the_job_and_logged(
    service: JobService, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        job = await service.submit(REQUEST.model_copy(update={"num_inference_steps": 30}), OWNER)

    assert job.request.num_inference_steps == 4
    assert [warning.code for warning in job.warnings] == ["steps_corrected"]
    assert "FLUX requires exactly 4 steps. Overriding 30 -> 4" in caplog.messages


async def test_an_unknown_model_and_a_bad_request_are_rejected(service: JobService) -> None:
    with pytest.raises(NotFound, match=MODEL):
        await service.submit(GenerationRequest(model="unknown", prompt="x"), OWNER)
    with pytest.raises(BadRequest):
        await service.submit(GenerationRequest(model=MODEL, prompt=" "), OWNER)


async def test_input_images_are_kept_out_of_the_record(service: JobService, tmp_path: Path) -> None:
    edit = Edit(image=picture(), mask_image=picture("white"))

    job = await service.submit(GenerationRequest(model=MODEL, prompt="x", edit=edit), OWNER)

    assert job.request.edit is not None
    assert job.request.edit.image == b""
    stored = tmp_path / "results" / "inputs" / job.id
    assert {file.name for file in stored.iterdir()} == {"image", "mask_image"}


async def test_control_images_are_detached_and_attached_in_order() -> None:
    controls = tuple(
        Control(image=picture(colour), type="canny", weight=weight)
        for colour, weight in (("red", 0.5), ("blue", 1.5))
    )
    edit = ResolvedEdit(image=picture(), strength=0.5)
    request = resolved(edit=edit).model_copy(update={"controls": controls})

    detached, taken = inputs.detach(request)

    assert [control.image for control in detached.controls] == [b"", b""]
    assert inputs.names(detached) == tuple(taken) == ("control_0", "control_1", "image")
    assert inputs.attach(detached, taken) == request
    assert len(detached.model_dump_json()) < 1_000


async def test_a_rejected_job_leaves_no_input_images(
    store: JobStore, results: ResultStore, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(max_active_per_owner=1)
    service = JobService(JobStore(store.redis, settings), results, {MODEL: CARD}, settings)
    await service.submit(REQUEST, OWNER)

    with pytest.raises(RateLimited):
        await service.submit(REQUEST.model_copy(update={"edit": Edit(image=picture())}), OWNER)

    assert list((tmp_path / "results" / "inputs").iterdir()) == []


async def test_a_nearly_full_disk_rejects_jobs(store: JobStore, settings: Settings, tmp_path: Path) -> None:
    full = ResultStore(str(tmp_path), min_free_bytes=2**60)
    service = JobService(store, full, {MODEL: CARD}, settings)

    with pytest.raises(Overloaded, match="too little disk space"):
        await service.submit(REQUEST, OWNER)
    with pytest.raises(Overloaded, match="too little disk space"):
        await service.health()


@pytest.mark.parametrize("which", ["foreign", "unknown", "malformed"])
@pytest.mark.parametrize("way", ["get", "cancel", "delete", "wait", "follow", "artifact", "link", "sign"])
async def test_a_job_of_another_owner_is_not_found(service: JobService, which: str, way: str) -> None:
    foreign = (await service.submit(REQUEST, "another owner")).id
    job_id = {"foreign": foreign, "unknown": new_job_id(), "malformed": "../x"}[which]
    ways: dict[str, Callable[[], Awaitable[object]]] = {
        "get": lambda: service.get(job_id, OWNER),
        "cancel": lambda: service.cancel(job_id, OWNER),
        "delete": lambda: service.delete(job_id, OWNER),
        "wait": lambda: service.wait(job_id, OWNER, 1.0),
        "follow": lambda: anext(service.follow(job_id, OWNER)),
        "artifact": lambda: service.artifact(job_id, OWNER, 0),
        "link": lambda: service.link(job_id, OWNER, 0, "image", 60.0),
        "sign": lambda: service.sign(job_id, OWNER, 0, "image", round(time.time()) + 60),
    }

    with pytest.raises(NotFound) as refusal:
        await ways[way]()

    assert refusal.value.message == "no such job; it may have been deleted or forgotten, or it is not yours"


async def test_a_list_holds_only_your_jobs(service: JobService) -> None:
    mine = await service.submit(REQUEST, OWNER)
    await service.submit(REQUEST, "another owner")

    page = await service.list(OWNER, limit=10)

    assert page.jobs == (mine,)


async def test_a_list_is_filtered_and_read_page_by_page(service: JobService) -> None:
    jobs = [await service.submit(REQUEST, OWNER) for _ in range(3)]
    await service.cancel(jobs[1].id, OWNER)

    first = await service.list(OWNER, limit=2)
    second = await service.list(OWNER, limit=2, cursor=first.next_cursor)
    waiting = await service.list(OWNER, where=JobFilter(state=JobState.queued))

    assert [job.id for job in (*first.jobs, *second.jobs)] == [job.id for job in reversed(jobs)]
    assert [job.id for job in waiting.jobs] == [jobs[2].id, jobs[0].id]
    assert (await service.list(OWNER, where=JobFilter(model="another model"))).jobs == ()


async def test_a_waiting_job_is_shown_with_its_position_and_when_it_starts(
    service: JobService, store: JobStore
) -> None:
    jobs = [await service.submit(REQUEST, OWNER) for _ in range(2)]
    await store.throughput.report("a dispatcher", {MODEL: Capacity(1, 1)})
    async with store.redis.pipeline() as pipe:
        store.throughput.record_duration(pipe, MODEL, 8.0)
        await pipe.execute()

    first, second = [await service.get(job.id, OWNER) for job in jobs]
    await service.cancel(jobs[0].id, OWNER)
    ended = await service.get(jobs[0].id, OWNER)

    assert (first.position, first.starts_in_s) == (1, 0.0)
    assert (second.position, second.starts_in_s) == (2, 8.0)
    assert (ended.job.state, ended.position, ended.starts_in_s) == (JobState.cancelled, None, None)


async def test_a_waiting_job_is_cancelled_with_its_input_images(service: JobService, tmp_path: Path) -> None:
    job = await service.submit(REQUEST.model_copy(update={"edit": Edit(image=picture())}), OWNER)

    assert (await service.cancel(job.id, OWNER)).state is JobState.cancelled

    assert not (tmp_path / "results" / "inputs" / job.id).exists()


async def test_an_active_job_is_not_deleted(service: JobService) -> None:
    job = await service.submit(REQUEST, OWNER)

    with pytest.raises(Conflict, match="cancel it first"):
        await service.delete(job.id, OWNER)


async def test_deleting_a_job_removes_its_files(
    service: JobService, dispatcher: Dispatcher, tmp_path: Path
) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())
    assert (tmp_path / "results" / job.artifacts[0].path).exists()

    await service.delete(job.id, OWNER)

    assert not (tmp_path / "results" / job.artifacts[0].path).exists()
    with pytest.raises(NotFound):
        await service.get(job.id, OWNER)


async def test_a_finished_image_is_read_and_others_are_not_found(
    service: JobService, dispatcher: Dispatcher
) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())

    artifact, data = await service.artifact(job.id, OWNER, 0)

    assert data == picture()
    assert artifact.size_bytes == len(data)
    with pytest.raises(NotFound):
        await service.artifact(job.id, OWNER, 1)
    with pytest.raises(NotFound):
        await service.artifact(job.id, OWNER, 0, "thumbnail")


async def test_an_image_read_too_early_is_a_conflict(service: JobService) -> None:
    job = await service.submit(REQUEST, OWNER)

    with pytest.raises(Conflict, match="the job is queued"):
        await service.artifact(job.id, OWNER, 0)


async def test_a_damaged_image_is_not_sent(
    service: JobService, dispatcher: Dispatcher, tmp_path: Path
) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())
    (tmp_path / "results" / job.artifacts[0].path).write_bytes(picture("blue"))

    with pytest.raises(Internal, match="damaged"):
        await service.artifact(job.id, OWNER, 0)


async def test_an_image_read_after_its_retention_time_is_not_found(
    service: JobService, store: JobStore, dispatcher: Dispatcher
) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())
    await store.file_expiry.expire(job.id)

    with pytest.raises(NotFound, match="retention time"):
        await service.artifact(job.id, OWNER, 0)


async def test_a_part_of_a_finished_image_is_read(service: JobService, dispatcher: Dispatcher) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())

    assert await service.artifact_part(job.artifacts[0], 1, 3) == picture()[1:4]


async def test_results_on_a_local_disk_have_no_url_of_their_own(
    service: JobService, dispatcher: Dispatcher
) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())

    assert await service.link(job.id, OWNER, 0, "image", 60.0) is None
    with pytest.raises(NotFound, match="no image number 1"):
        await service.link(job.id, OWNER, 1, "image", 60.0)


async def test_a_signed_link_opens_one_file_until_it_expires(
    service: JobService, dispatcher: Dispatcher
) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())
    later, earlier = round(time.time()) + 3_600, round(time.time()) - 1
    signature = await service.sign(job.id, OWNER, 0, "image", later)
    expired = await service.sign(job.id, OWNER, 0, "image", earlier)

    shared = await service.shared(job.id, 0, "image", later, signature)

    assert shared == job
    for index, kind, expires_at, given in [
        (1, "image", later, signature),
        (0, "thumbnail", later, signature),
        (0, "image", later + 1, signature),
        (0, "image", earlier, expired),
        (0, "image", later, expired),
    ]:
        with pytest.raises(Unauthorized, match="not valid, or has expired"):
            await service.shared(job.id, index, kind, expires_at, given)


async def test_a_file_that_does_not_exist_is_not_signed(service: JobService, dispatcher: Dispatcher) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())

    with pytest.raises(NotFound, match="no thumbnail number 0"):
        await service.sign(job.id, OWNER, 0, "thumbnail", round(time.time()) + 60)


async def test_each_owner_reads_the_secret_of_its_own_webhooks(service: JobService, store: JobStore) -> None:
    mine, theirs = await service.webhook_secret(OWNER), await service.webhook_secret("another owner")

    assert mine == owner_secret(await store.cache.secret(), OWNER)
    assert mine != theirs


async def test_webhooks_are_off_while_no_host_is_allowed(service: JobService) -> None:
    with pytest.raises(Forbidden, match="webhooks are off here") as refusal:
        await service.submit(REQUEST, OWNER, webhook="https://receiver.example/hooks")

    assert refusal.value.param == "webhook_url"


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://other.example/hooks", Forbidden),
        ("http://receiver.example/hooks", BadRequest),
    ],
)
async def test_a_webhook_is_checked_before_the_job_is_accepted(
    store: JobStore, results: ResultStore, make_settings: MakeSettings, url: str, error: type[WeftError]
) -> None:
    settings = make_settings(webhook_hosts=["receiver.example"])
    service = JobService(JobStore(store.redis, settings), results, {MODEL: CARD}, settings)

    with pytest.raises(error) as refusal:
        await service.submit(REQUEST, OWNER, webhook=url)
    job = await service.submit(REQUEST, OWNER, webhook="https://RECEIVER.example/hooks")

    assert refusal.value.param == "webhook_url"
    assert len(refusal.value.message) > 20
    assert job.webhook == "https://receiver.example/hooks"
    assert (await service.list(OWNER)).jobs == (job,)


async def test_following_at_the_service_gives_all_events(
    service: JobService, dispatcher: Dispatcher, models: FakeModels
) -> None:
    job = await service.submit(REQUEST, OWNER)

    story = [event async for _, event in service.follow(job.id, OWNER)]

    assert isinstance(story[0], events.JobQueued)
    assert isinstance(story[-1], events.JobCompleted)
    assert [event.step for event in story if isinstance(event, events.Step)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("way", ["wait", "follow"])
async def test_waiting_for_a_job_outlasts_a_store_that_is_away_for_a_moment(
    way: str, service: JobService, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await service.submit(REQUEST, OWNER)
    await service.cancel(job.id, OWNER)
    get, outages = store.get, [StoreUnreachable("gone")] * 2
    monkeypatch.setattr("serve_app.jobs.follow.OUTAGE_POLL_S", 0.01)

    async def get_after_the_outage(job_id: str) -> Job:
        if outages:
            raise outages.pop()
        return await get(job_id)

    monkeypatch.setattr(store, "get", get_after_the_outage)
    ways: dict[str, Callable[[], Awaitable[object]]] = {
        "wait": lambda: service.wait(job.id, OWNER, patience()),
        "follow": lambda: anext(service.follow(job.id, OWNER)),
    }

    await ways[way]()

    assert outages == []


async def test_an_outage_that_does_not_end_ends_the_wait(
    service: JobService, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await service.submit(REQUEST, OWNER)
    monkeypatch.setattr("serve_app.jobs.follow.OUTAGE_POLL_S", 0.01)
    monkeypatch.setattr("serve_app.jobs.follow.OUTAGE_LIMIT_S", 0.05)

    async def get_never(job_id: str) -> Job:
        raise StoreUnreachable("gone")

    monkeypatch.setattr(store, "get", get_never)

    with pytest.raises(StoreUnreachable):
        await service.wait(job.id, OWNER, patience())


async def test_following_continues_after_an_event(service: JobService, dispatcher: Dispatcher) -> None:
    job = await service.wait((await service.submit(REQUEST, OWNER)).id, OWNER, patience())
    story = [entry async for entry in service.follow(job.id, OWNER)]

    rest = [entry async for entry in service.follow(job.id, OWNER, after=story[1][0])]

    assert rest == story[2:]


async def test_a_healthy_service_raises_nothing(service: JobService) -> None:
    await service.health()
