"""The OpenAI dialect: pictures in one call, and the list of models; the openai SDK works unchanged."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deployments.protocol.errors import Cancelled, Overloaded, WeftError
from serve_app.admission.validation import find_card
from serve_app.api.errors import openai_body, render
from serve_app.api.events import KEEP_ALIVE_S, with_keep_alives
from serve_app.api.request_body import documented, read_json
from serve_app.api.schemas.job import JobOut
from serve_app.api.schemas.openai import (
    CompletedImage,
    ImageData,
    ImagesResponse,
    ModelEntries,
    ModelEntry,
    OpenAIImageBody,
    PartialImage,
)
from serve_app.api.state import CallerContext, CurrentCaller
from serve_app.jobs import events
from serve_app.jobs.job import Job, JobState

logger = logging.getLogger(__name__)

router = APIRouter(tags=["openai"])


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
    openapi_extra=documented(OpenAIImageBody),
)
async def generate_images(http_request: Request, caller: CurrentCaller) -> ImagesResponse | Response:
    """Paint and wait for the pictures. A client that hangs up cancels the work.

    With `stream`: events `image_generation.partial_image`, as many as `partial_images` asks for at
    most, then `image_generation.completed` for every picture, or an `error`.
    """
    body = await read_json(http_request, OpenAIImageBody)
    job = await caller.submit(body)
    if body.stream:
        return StreamingResponse(
            _server_sent(caller, job),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    try:
        job = await _finished(caller, job, http_request)
    except TimeoutError:
        late = Overloaded(
            f"job {job.id} was not done within {caller.state.settings.sync_wait_s:g} s; it goes on, "
            f"and GET /api/generate/{job.id} tells of it"
        )
        return render(late, http_request.scope, status=504)
    except ConnectionAbortedError:
        return Response(status_code=499)  # nobody reads it
    caller.state.metrics.add("weft_jobs_finished_observed", state=job.state.value)
    _require_completed(job)
    return ImagesResponse(
        created=int(job.created_at),
        data=await _data(caller, job, as_url=body.response_format == "url"),
        output_format=job.request.output.format,
        size=f"{job.request.width}x{job.request.height}",
        id=job.id,
        model=job.request.model,
        seed=job.request.seed,
        warnings=JobOut.of(job, caller.prefix).warnings,
        generation_s=job.generation_s,
    )


@router.get("/v1/models")
async def list_models(caller: CurrentCaller) -> ModelEntries:
    """The models served here."""
    return ModelEntries(data=[_entry(model_id) for model_id in caller.state.cards])


@router.get("/v1/models/{model:path}")
async def read_model(model: str, caller: CurrentCaller) -> ModelEntry:
    """One model, by id or alias."""
    return _entry(find_card(model, caller.state.cards).id)


async def _finished(caller: CallerContext, job: Job, http_request: Request) -> Job:
    """The job once it ended. Whoever hangs up has it cancelled.

    Raises TimeoutError after settings.sync_wait_s (the job goes on), ConnectionAbortedError.
    """
    timeout_s = caller.state.settings.sync_wait_s
    waiting = asyncio.create_task(caller.job_service.wait(job.id, caller.owner, timeout_s))
    leaving = asyncio.create_task(_client_gone(http_request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            ended = waiting.result()
            if not ended.state.ended:
                raise TimeoutError
            return ended
        await _cancel(caller, job)
        raise ConnectionAbortedError
    except asyncio.CancelledError:  # Serve's way to say that the client left
        await asyncio.shield(_cancel(caller, job))
        raise
    finally:
        for task in (waiting, leaving):
            task.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)


async def _client_gone(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(caller: CallerContext, job: Job) -> None:
    """What becomes of a job whose caller hung up. Who sent an Idempotency-Key will come again for it."""
    if caller.idempotency_key is not None:
        return
    with suppress(WeftError):  # it may have ended meanwhile, or the store is down: nobody is left to tell
        await caller.job_service.cancel(job.id, caller.owner)


def _require_completed(job: Job) -> None:
    if job.state is JobState.completed:
        return
    if job.error is not None:
        raise job.error.to_error()
    raise Cancelled(f"job {job.id} was cancelled")


async def _data(caller: CallerContext, job: Job, *, as_url: bool) -> list[ImageData]:
    if as_url:
        pictures = JobOut.of(job, caller.address).artifacts
        return [ImageData(url=picture.url, seed=picture.seed) for picture in pictures]
    data = []
    for artifact in job.artifacts:
        if artifact.kind == "image":
            _, content = await caller.job_service.artifact(job.id, caller.owner, artifact.index, "image")
            data.append(ImageData(b64_json=base64.b64encode(content).decode(), seed=artifact.seed))
    return data


async def _server_sent(caller: CallerContext, job: Job) -> AsyncGenerator[str]:
    """The job's previews and its end. Nothing else: the SDK takes every event for a picture."""
    ended = False
    shown = 0
    try:
        async for item in with_keep_alives(caller.job_service.follow(job.id, caller.owner), KEEP_ALIVE_S):
            match item:
                case None:
                    yield ": still here\n\n"
                case (_, events.Preview() as look) if shown < job.request.output.previews:
                    yield _event(_partial(job, look, shown))
                    shown += 1
                case (_, events.JobCompleted() | events.Failed() | events.JobCancelled()):
                    ended = True
        job = (await caller.job_service.get(job.id, caller.owner)).job
        caller.state.metrics.add("weft_jobs_finished_observed", state=job.state.value)
        _require_completed(job)
        for picture in await _data(caller, job, as_url=False):
            yield _event(_completed(job, picture))
    except WeftError as error:
        ended = True  # or the store is away: the job goes on
        logger.info("a stream ended with an error", extra={"job_id": job.id, "error": error.kind})
        yield f"event: error\ndata: {json.dumps(openai_body(error))}\n\n"
    finally:
        if not ended:
            await asyncio.shield(_cancel(caller, job))


def _event(event: PartialImage | CompletedImage) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"


def _partial(job: Job, look: events.Preview, index: int) -> PartialImage:
    return PartialImage(
        b64_json=base64.b64encode(look.data).decode(),
        partial_image_index=index,
        created_at=int(job.created_at),
        output_format=look.media_type.removeprefix("image/"),
        size=f"{job.request.width}x{job.request.height}",
    )


def _completed(job: Job, picture: ImageData) -> CompletedImage:
    assert picture.b64_json is not None, "a stream has no links"
    return CompletedImage(
        b64_json=picture.b64_json,
        created_at=int(job.created_at),
        output_format=job.request.output.format,
        size=f"{job.request.width}x{job.request.height}",
        id=job.id,
        model=job.request.model,
        seed=picture.seed,
    )


def _entry(model_id: str) -> ModelEntry:
    return ModelEntry(id=model_id, owned_by="weft")
