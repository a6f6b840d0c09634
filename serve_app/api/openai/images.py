"""POST /v1/images/generations: one call that waits for the images, or streams them."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator
from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from deployments.protocol.errors import WeftError
from serve_app.api import sse
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.errors import openai_body, render
from serve_app.api.openai.image_schemas import (
    CompletedImage,
    ImageData,
    ImagesResponse,
    OpenAIImageBody,
    PartialImage,
)
from serve_app.api.openai.names import in_openai_names
from serve_app.api.openai.partial_images import partial_image
from serve_app.api.request_body import documented, read_json
from serve_app.api.schemas.job import JobOut, WarningOut
from serve_app.api.submit import submit
from serve_app.api.waiting import cancel_unless_named, late, require_completed, wait_for
from serve_app.jobs.events import ENDINGS, Preview
from serve_app.jobs.job import Job

logger = logging.getLogger(__name__)

router = APIRouter(tags=["openai"])
EventName = Literal["image_generation", "image_edit"]


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
    openapi_extra=documented(OpenAIImageBody),
)
async def generate_images(http_request: Request, caller: CurrentCaller) -> ImagesResponse | Response:
    """Generate images and wait for them. A client that disconnects cancels the work.

    With `stream`: events `image_generation.partial_image`, as many as `partial_images` asks for at
    most, then `image_generation.completed` for every image, or an `error`.
    """
    body = await read_json(http_request, OpenAIImageBody)
    with in_openai_names():
        job = await submit(caller, body)
    return await finished_images(caller, job, http_request, body, event="image_generation")


async def finished_images(
    caller: CallerContext, job: Job, http_request: Request, body: OpenAIImageBody, *, event: EventName
) -> ImagesResponse | Response:
    """The answer to an accepted call: the images of the job once it has ended, or a stream of them.

    event: the beginning of the names of the stream's events. Raises the error that the job ended with.
    """
    if body.stream:
        return sse.response(_stream(caller, job, event))
    try:
        (job,) = await wait_for(caller, [job], http_request)
    except TimeoutError:
        return render(late(caller, job), http_request.scope, status=504)
    except ConnectionAbortedError:
        return Response(status_code=499)  # the client is gone: this is for the log and the metrics
    caller.state.metrics.add("weft_jobs_finished_observed_total", state=job.state.value)
    require_completed(job)
    return ImagesResponse(
        created=int(job.created_at),
        data=await _images(caller, job, as_url=body.wants_url),
        output_format=job.request.output.format,
        size=_size(job),
        id=job.id,
        model=job.request.model,
        seed=job.request.seed,
        warnings=WarningOut.all_of(job),
        generation_s=job.generation_s,
    )


async def _images(caller: CallerContext, job: Job, *, as_url: bool) -> list[ImageData]:
    if as_url:
        artifacts = JobOut.of(job, caller.address).artifacts
        return [ImageData(url=artifact.url, seed=artifact.seed) for artifact in artifacts]
    images = []
    for artifact in job.artifacts:
        if artifact.kind == "image":
            _, content = await caller.job_service.artifact(job.id, caller.owner, artifact.index, "image")
            images.append(ImageData(b64_json=base64.b64encode(content).decode(), seed=artifact.seed))
    return images


async def _stream(caller: CallerContext, job: Job, name: EventName) -> AsyncGenerator[bytes]:
    """The job's previews and its images. No other event: the SDK parses every event as an image."""
    ended = False
    shown = last_step = 0  # partial images, and the denoising step of the last
    try:
        async for item in sse.with_keep_alives(caller.job_service.follow(job.id, caller.owner)):
            if item is None:
                yield sse.KEEP_ALIVE
                continue
            _, event = item
            # a job that was begun again may send some of its previews again
            if isinstance(event, Preview) and event.step > last_step and shown < job.request.output.previews:
                yield _event(await _partial_image(job, event, shown, name))
                shown, last_step = shown + 1, event.step
            ended = ended or isinstance(event, ENDINGS)
        job = (await caller.job_service.get(job.id, caller.owner)).job
        caller.state.metrics.add("weft_jobs_finished_observed_total", state=job.state.value)
        require_completed(job)
        for image in await _images(caller, job, as_url=False):
            yield _event(_completed_image(job, image, name))
    except WeftError as error:
        ended = True  # or the store is away, and the job continues
        logger.info("a stream ended with an error", extra={"job_id": job.id, "error": error.kind})
        yield sse.event("error", json.dumps(openai_body(error)))
    finally:
        if not ended:
            await asyncio.shield(cancel_unless_named(caller, [job]))


def _event(image: PartialImage | CompletedImage) -> bytes:
    return sse.event(image.type, image.model_dump_json())


async def _partial_image(job: Job, preview: Preview, index: int, name: EventName) -> PartialImage:
    request = job.request
    data = await asyncio.to_thread(partial_image, preview.data, request.output, request.width, request.height)
    return PartialImage(
        type=f"{name}.partial_image",
        b64_json=base64.b64encode(data).decode(),
        partial_image_index=index,
        created_at=int(job.created_at),
        output_format=request.output.format,
        size=_size(job),
    )


def _completed_image(job: Job, image: ImageData, name: EventName) -> CompletedImage:
    assert image.b64_json is not None, "a stream has no links"
    return CompletedImage(
        type=f"{name}.completed",
        b64_json=image.b64_json,
        created_at=int(job.created_at),
        output_format=job.request.output.format,
        size=_size(job),
        id=job.id,
        model=job.request.model,
        seed=image.seed,
        warnings=WarningOut.all_of(job),
    )


def _size(job: Job) -> str:
    return f"{job.request.width}x{job.request.height}"
