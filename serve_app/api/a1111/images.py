"""POST /sdapi/v1/txt2img and img2img: calls that wait for their images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import WeftError
from serve_app.admission.model_aliases import resolve_model
from serve_app.api.a1111 import hires
from serve_app.api.a1111.answers import images_out
from serve_app.api.a1111.memory import options, remember_jobs
from serve_app.api.a1111.names import NAMES
from serve_app.api.a1111.requests import CHECKPOINT, A1111Inputs, prepare, read_inputs
from serve_app.api.a1111.schemas import GenerationBody, ImagesOut, ImageToImageBody, TextToImageBody
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.errors import render
from serve_app.api.foreign import renamed_error
from serve_app.api.prepared import PreparedRequest
from serve_app.api.request_body import documented, read_json
from serve_app.api.submit import choose_model, submit
from serve_app.api.waiting import CLIENT_GONE, cancel_unless_named, late, require_completed, wait_for
from serve_app.jobs.job import Job, JobState

router = APIRouter(tags=["a1111"])
HASH = re.compile(r" \[[0-9a-f]{1,64}\]$")  # after a model's name in A1111's titles


@router.post("/sdapi/v1/txt2img", response_model=ImagesOut, openapi_extra=documented(TextToImageBody))
async def text_to_image(http_request: Request, caller: CurrentCaller) -> ImagesOut | Response:
    """Generate images and wait for them. A client that disconnects cancels the work."""
    body = await read_json(http_request, TextToImageBody)
    return await _answer(http_request, caller, body, "a1111 txt2img")


@router.post("/sdapi/v1/img2img", response_model=ImagesOut, openapi_extra=documented(ImageToImageBody))
async def image_to_image(http_request: Request, caller: CurrentCaller) -> ImagesOut | Response:
    """Start from an image, or with a mask inpaint it, and wait for the result."""
    body = await read_json(http_request, ImageToImageBody)
    return await _answer(http_request, caller, body, "a1111 img2img")


async def _answer(
    http_request: Request, caller: CallerContext, body: GenerationBody, kind: str
) -> ImagesOut | Response:
    jobs: list[Job] = []
    try:
        inputs = await read_inputs(body)
        card = await _card(caller, body, inputs)
        jobs = await _submitted(caller, body, prepare(body, inputs, card, kind))
        ended = await wait_for(caller, jobs, http_request)
        _require_any(caller, ended)
        if not (isinstance(body, TextToImageBody) and body.enable_hr):
            return await images_out(caller, body, ended)
        again = await hires.second_pass(caller, body, card, ended)
        if not again:
            return await images_out(caller, body, ended, hires.cannot(body, card))
        jobs = await _submitted(caller, body, again)
        larger = await wait_for(caller, jobs, http_request)
        _require_any(caller, larger)
        return await images_out(caller, body, larger, ended[0].warnings)
    except TimeoutError:
        return render(late(caller, jobs[0]), http_request.scope, status=504)
    except ConnectionAbortedError:
        return Response(status_code=CLIENT_GONE)
    except WeftError as error:
        raise renamed_error(error, NAMES) from None


async def _card(caller: CallerContext, body: GenerationBody, inputs: A1111Inputs) -> ModelCard:
    """Of the model that the call names, or the caller's options, or of the first that can do it."""
    asked = body.override_settings.get(CHECKPOINT) or (await options(caller))[CHECKPOINT]
    state = caller.state
    if not isinstance(asked, str) or not asked:
        asked = await choose_model(
            caller, (inputs.task,), controls={control.type for control in inputs.controls}
        )
    card, _ = resolve_model(HASH.sub("", asked), state.cards, state.settings.model_aliases)
    return card


async def _submitted(
    caller: CallerContext, body: GenerationBody, prepared: Sequence[PreparedRequest]
) -> list[Job]:
    """The jobs of one call: all of them, or none."""
    jobs: list[Job] = []
    key = caller.idempotency_key
    try:
        for index, one in enumerate(prepared):
            named = caller if key is None or not index else replace(caller, idempotency_key=f"{key}.{index}")
            jobs.append(await submit(named, one))
    except WeftError:
        await cancel_unless_named(caller, jobs)
        raise
    await remember_jobs(caller, jobs, body.force_task_id)
    return jobs


def _require_any(caller: CallerContext, jobs: Sequence[Job]) -> None:
    """Raises the error of the first job that failed, and Cancelled where none has completed: an interrupted
    call is answered with what it has."""
    for job in jobs:
        caller.state.metrics.add("weft_jobs_finished_observed_total", state=job.state.value)
    for job in jobs:
        if job.state is JobState.failed:
            require_completed(job)
    if not any(job.state is JobState.completed for job in jobs):
        require_completed(jobs[0])
