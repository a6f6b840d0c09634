"""Results in a bucket: the promises of a directory, and links that anybody may open for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from deployments.protocol.errors import Internal, NotFound
from deployments.protocol.request import GenerationRequest
from serve_app.admission.principals import LOCAL
from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, input_path
from tests.patience import patience
from tests.serving.api.conftest import client_of
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import CARD, MODEL, OWNER, FakeModels, picture
from tests.serving.jobs.conftest import running
from tests.serving.jobs.test_dispatch import ended
from tests.serving.storage.s3 import BUCKET, KEYS, s3_server
from tests.serving.storage.test_results import JOB, OTHER, image

REQUEST = GenerationRequest(model=MODEL, prompt="x")


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def in_a_bucket(s3_url: str, make_settings: MakeSettings) -> Settings:
    place = {"s3_bucket_name": BUCKET, "s3_region": "us-east-1", "s3_endpoint_url": s3_url}
    return make_settings(**place, **KEYS)


@pytest.fixture
def bucket(in_a_bucket: Settings) -> ResultStore:
    return ResultStore(in_a_bucket.results_root, options=in_a_bucket.results_options)


async def test_a_file_comes_back_as_it_went_and_is_checked(bucket: ResultStore) -> None:
    file = await bucket.put(image(1), b"pixels")
    data = await bucket.get(file.path, sha256=file.sha256)
    await bucket.put(image(1), b"others")

    assert data == b"pixels"
    with pytest.raises(Internal, match="damaged"):
        await bucket.get(file.path, sha256=file.sha256)
    with pytest.raises(NotFound):
        await bucket.get(image(9))


async def test_a_copy_outlives_its_source(bucket: ResultStore) -> None:
    await bucket.put(image(1), b"pixels")
    copy = image(1).replace(JOB, OTHER)

    await bucket.copy(image(1), copy)
    await bucket.sweep(JOB)

    assert await bucket.get(copy) == b"pixels"
    with pytest.raises(NotFound):
        await bucket.copy(image(1), copy)
    await bucket.sweep(OTHER)


async def test_a_sweep_keeps_what_was_committed(bucket: ResultStore) -> None:
    for path in (image(1), image(2), input_path(JOB, "image")):
        await bucket.put(path, b"x")

    await bucket.sweep(JOB, keep=[image(2)])

    assert await bucket.get(image(2)) == b"x"
    for gone in (image(1), input_path(JOB, "image")):
        with pytest.raises(NotFound):
            await bucket.get(gone)
    await bucket.sweep(JOB)


async def test_old_jobs_are_recognised_by_their_files(bucket: ResultStore) -> None:
    await bucket.put(image(1), b"x")

    assert await bucket.jobs_older_than(3600.0) == []
    assert await bucket.jobs_older_than(-3600.0) == [JOB]
    await bucket.sweep(JOB)


async def test_a_link_opens_without_a_key_and_not_when_it_was_changed(bucket: ResultStore) -> None:
    await bucket.put(image(1), b"pixels")

    link = await bucket.link(image(1), 600.0)

    assert link is not None
    async with httpx.AsyncClient() as anybody:
        answer = await anybody.get(link)
    assert (answer.content, answer.headers["content-type"]) == (b"pixels", "image/png")
    asked = httpx.URL(link).params
    assert asked["X-Amz-Expires"] == "600"
    assert "X-Amz-Signature" in asked
    assert "testing-secret" not in link
    await bucket.sweep(JOB)


async def test_an_unreachable_bucket_is_an_oserror(make_settings: MakeSettings) -> None:
    place = {"s3_bucket_name": BUCKET, "s3_region": "us-east-1", "s3_endpoint_url": "http://127.0.0.1:9"}
    settings = make_settings(**place, **KEYS)
    away = ResultStore(settings.results_root, options=settings.results_options)

    with pytest.raises(OSError):
        await away.put(image(1), b"x")


async def test_a_whole_job_in_a_bucket(store: JobStore, bucket: ResultStore, in_a_bucket: Settings) -> None:
    job_service = JobService(store, bucket, {MODEL: CARD}, in_a_bucket)
    began = time.time()

    async with running(Dispatcher(store, bucket, FakeModels(), in_a_bucket)):
        job = await ended(store, (await job_service.submit(REQUEST, OWNER)).id)
        _, data = await job_service.artifact(job.id, OWNER, 0)
        await job_service.delete(job.id, OWNER)

    assert data == picture()
    assert job.created_at >= began - 60
    assert await bucket.jobs_older_than(-3600.0) == []
    await job_service.aclose()


async def test_only_the_owner_gets_a_link_to_an_image(
    store: JobStore, bucket: ResultStore, in_a_bucket: Settings
) -> None:
    async def no_models() -> dict[str, str]:
        return {}

    job_service = JobService(store, bucket, {MODEL: CARD}, in_a_bucket)
    app = create_app(
        ApiState(job_service=job_service, cards={MODEL: CARD}, settings=in_a_bucket, model_states=no_models)
    )
    async with running(Dispatcher(store, bucket, FakeModels(), in_a_bucket)):
        theirs = await ended(store, (await job_service.submit(REQUEST, "another owner")).id)
        mine = await ended(store, (await job_service.submit(REQUEST, LOCAL)).id)
    async with client_of(app) as client:
        answer = await client.get(f"/api/results/{mine.id}/0/link", params={"for_s": 60})
        refused = await client.get(f"/api/results/{theirs.id}/0/link")

    assert answer.status_code == 200, answer.text
    async with httpx.AsyncClient() as anybody:
        assert (await anybody.get(answer.json()["url"])).content == picture()
    assert answer.json()["expires_at"] == pytest.approx(time.time() + 60, abs=patience())
    assert refused.status_code == 404
    for job in (mine, theirs):
        await bucket.sweep(job.id)
    await job_service.aclose()


async def test_a_directory_has_no_links(store: JobStore, results: ResultStore, settings: Settings) -> None:
    job_service = JobService(store, results, {MODEL: CARD}, settings)
    async with running(Dispatcher(store, results, FakeModels(), settings)):
        job = await ended(store, (await job_service.submit(REQUEST, OWNER)).id)

    assert await job_service.link(job.id, OWNER, 0, "image", 60.0) is None
