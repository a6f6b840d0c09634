"""The OpenAI dialect: pictures in one call, and the list of models; the openai SDK works unchanged."""

import asyncio
import base64
from contextlib import suppress

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from deployments.protocol.errors import KINDS, Cancelled, Internal, Overloaded, WeftError
from serve_app.admission.rules import find_card
from serve_app.api.bodies import documented, read_json
from serve_app.api.depends import Here, Visit
from serve_app.api.errors import render
from serve_app.api.schemas.job import JobOut
from serve_app.api.schemas.openai import (
    GenerationsBody,
    ImageData,
    ImagesResponse,
    ModelEntries,
    ModelEntry,
)
from serve_app.jobs.job import Job, JobState

router = APIRouter(tags=["openai"])


@router.post(
    "/v1/images/generations", response_model=ImagesResponse, openapi_extra=documented(GenerationsBody)
)
async def generate_images(http_request: Request, visit: Here) -> ImagesResponse | Response:
    """Paint and wait for the pictures. A client that hangs up cancels the work."""
    body = await read_json(http_request, GenerationsBody)
    job = await visit.submit(body)
    try:
        job = await _finished(visit, job, http_request)
    except TimeoutError:
        late = Overloaded(
            f"job {job.id} was not done within {visit.state.settings.sync_wait_s:g} s; it goes on, "
            f"and GET /api/generate/{job.id} tells of it"
        )
        return render(late, http_request.scope, status=504)
    except ConnectionAbortedError:
        return Response(status_code=499)  # nobody reads it
    visit.state.metrics.finished.labels(job.state.value).inc()
    _require_completed(job)
    return ImagesResponse(
        created=int(job.created_at),
        data=await _data(visit, job, as_url=body.response_format == "url"),
        output_format=job.request.output.format,
        size=f"{job.request.width}x{job.request.height}",
        id=job.id,
        model=job.request.model,
        seed=job.request.seed,
        warnings=JobOut.of(job, visit.prefix).warnings,
        generation_s=job.generation_s,
    )


@router.get("/v1/models")
async def list_models(visit: Here) -> ModelEntries:
    """The models served here."""
    return ModelEntries(data=[_entry(model_id) for model_id in visit.state.cards])


@router.get("/v1/models/{model:path}")
async def read_model(model: str, visit: Here) -> ModelEntry:
    """One model, by id or alias."""
    return _entry(find_card(model, visit.state.cards).id)


async def _finished(visit: Visit, job: Job, http_request: Request) -> Job:
    """The job once it ended. Whoever hangs up has it cancelled.

    Raises TimeoutError after settings.sync_wait_s (the job goes on), ConnectionAbortedError.
    """
    timeout_s = visit.state.settings.sync_wait_s
    waiting = asyncio.create_task(visit.desk.wait(job.id, visit.owner, timeout_s))
    leaving = asyncio.create_task(_client_gone(http_request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            ended = waiting.result()
            if not ended.state.ended:
                raise TimeoutError
            return ended
        await _cancel(visit, job)
        raise ConnectionAbortedError
    except asyncio.CancelledError:  # Serve's way to say that the client left
        await asyncio.shield(_cancel(visit, job))
        raise
    finally:
        for task in (waiting, leaving):
            task.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)


async def _client_gone(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(visit: Visit, job: Job) -> None:
    with suppress(WeftError):  # it may have ended meanwhile, or the store is down: nobody is left to tell
        await visit.desk.cancel(job.id, visit.owner)


def _require_completed(job: Job) -> None:
    if job.state is JobState.completed:
        return
    if job.error is not None:
        raise KINDS.get(job.error.kind, Internal)(job.error.message, param=job.error.param)
    raise Cancelled(f"job {job.id} was cancelled")


async def _data(visit: Visit, job: Job, *, as_url: bool) -> list[ImageData]:
    if as_url:
        pictures = JobOut.of(job, visit.address).artifacts
        return [ImageData(url=picture.url, seed=picture.seed) for picture in pictures]
    data = []
    for artifact in job.artifacts:
        if artifact.kind == "image":
            _, content = await visit.desk.artifact(job.id, visit.owner, artifact.index, "image")
            data.append(ImageData(b64_json=base64.b64encode(content).decode(), seed=artifact.seed))
    return data


def _entry(model_id: str) -> ModelEntry:
    return ModelEntry(id=model_id, owned_by="weft")
