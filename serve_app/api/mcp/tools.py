"""What the tools do: they submit jobs under the caller's key, and follow them."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import mcp_types as types
from pydantic import ValidationError

from deployments.protocol.errors import WeftError
from deployments.protocol.request import GenerationRequest, Task
from serve_app.admission.model_aliases import resolve_model
from serve_app.api.caller import CallerContext, parse_job_id
from serve_app.api.foreign import renamed_error, renamed_notice
from serve_app.api.mcp.arguments import (
    EditArguments,
    ImageArguments,
    JobArguments,
    ListArguments,
    PromptArguments,
    ToolArguments,
    VideoArguments,
)
from serve_app.api.prepared import PreparedRequest
from serve_app.api.schemas.job import JobOut
from serve_app.api.submit import choose_model, submit
from serve_app.api.validation_messages import bad_request
from serve_app.api.waiting import require_completed
from serve_app.jobs.events import ENDINGS, percent
from serve_app.jobs.job import Job
from serve_app.jobs.store.cache_keys import body_digest

Report = Callable[[float], Awaitable[None]]  # percent of the call
NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "mask_image": "mask",
    "reference_images": "image",
    "edit": "image",
}
ARGUMENTS: dict[str, tuple[type[ToolArguments], str]] = {
    "generate_image": (
        ImageArguments,
        "Generate images from a text, and return them. Size, steps and guidance are fitted to the model.",
    ),
    "edit_image": (
        EditArguments,
        "Change an image as the prompt says: all of it, or with a mask only the white part.",
    ),
    "generate_video": (
        VideoArguments,
        "Generate a video from a text, or from an image as its first frame; returns a link to the file.",
    ),
    "list_models": (ListArguments, "The models of this service, with their tasks, sizes and steps."),
    "job_status": (JobArguments, "The state, progress and files of a job that another tool has begun."),
}


def tools() -> list[types.Tool]:
    """The tools with their arguments as JSON schemas."""
    return [
        types.Tool(name=name, description=text, input_schema=arguments.model_json_schema())
        for name, (arguments, text) in ARGUMENTS.items()
    ]


async def call(
    caller: CallerContext, name: str, given: dict[str, Any], report: Report
) -> types.CallToolResult:
    """What a tool returns; an error is a result too, which the assistant reads."""
    try:
        if name not in ARGUMENTS:
            return _error(f"there is no tool {name[:100]!r}; there is {', '.join(ARGUMENTS)}")
        schema = ARGUMENTS[name][0]
        try:
            arguments = schema.model_validate(given)
        except ValidationError as error:
            raise bad_request(error, schema) from None
        if isinstance(arguments, JobArguments):
            job_id = parse_job_id(arguments.job_id)
            job = (await caller.job_service.get(job_id, caller.owner)).job
            return _text(_job(caller, job))
        if not isinstance(arguments, PromptArguments):
            return _text(await _models(caller))
        return await _generated(caller, arguments, name, report)
    except WeftError as error:
        return _error(renamed_error(error, NAMES).message)


async def _generated(
    caller: CallerContext, arguments: PromptArguments, name: str, report: Report
) -> types.CallToolResult:
    job = await submit(caller, await _prepared(caller, arguments, name))
    async for _, event in caller.job_service.follow(job.id, caller.owner):
        done = percent(event)
        if done is not None and not isinstance(event, ENDINGS):
            await report(done)
    job = (await caller.job_service.get(job.id, caller.owner)).job
    caller.state.metrics.add("weft_jobs_finished_observed_total", state=job.state.value)
    require_completed(job)
    return types.CallToolResult(content=await _content(caller, job))


async def _prepared(caller: CallerContext, arguments: PromptArguments, name: str) -> PreparedRequest:
    """The request on the model that is asked for, or on the first that can do it. Raises BadRequest."""
    state = caller.state
    model = arguments.model or await choose_model(caller, arguments.tasks())
    card, aliased = resolve_model(model, state.cards, state.settings.model_aliases)
    try:
        request = _request(arguments, card.id, by_reference=Task.edit in card.tasks)
    except ValidationError as error:
        raise bad_request(error, GenerationRequest) from None
    return PreparedRequest(request, body_digest(arguments, kind=f"mcp {name}"), aliased)


def _request(arguments: PromptArguments, model: str, *, by_reference: bool) -> GenerationRequest:
    if isinstance(arguments, EditArguments) and by_reference and arguments.mask is None:
        return arguments.by_reference(model)
    return arguments.request(model)


async def _content(caller: CallerContext, job: Job) -> list[types.ContentBlock]:
    """The images themselves, links to all files, and what is known of the job."""
    found: list[types.ContentBlock] = []
    for artifact in job.artifacts:
        if artifact.kind == "image":
            _, data = await caller.job_service.artifact(job.id, caller.owner, artifact.index, "image")
            image = base64.b64encode(data).decode()
            found.append(types.ImageContent(data=image, mime_type=artifact.media_type))
    for link in JobOut.of(job, caller.address).artifacts:
        name = f"{link.kind} {link.index}"
        found.append(types.ResourceLink(name=name, uri=link.url, mime_type=link.media_type))
    found.append(types.TextContent(text=json.dumps(_job(caller, job))))
    return found


def _job(caller: CallerContext, job: Job) -> dict[str, Any]:
    warnings = [renamed_notice(warning, NAMES).message for warning in job.warnings]
    return {
        "job_id": job.id,
        "status": job.state.value,
        "progress": job.percent,
        "model": job.request.model,
        "width": job.request.width,
        "height": job.request.height,
        "seed": job.request.seed,
        "warnings": warnings,
        "error": None if job.error is None else job.error.message,
        "files": [link.url for link in JobOut.of(job, caller.address).artifacts],
    }


async def _models(caller: CallerContext) -> list[dict[str, Any]]:
    states = await caller.state.model_states()
    return [
        {
            "id": card.id,
            "name": card.name,
            "tasks": card.tasks,
            "state": states.get(card.id, "absent"),
            "width": card.sizes.width,
            "height": card.sizes.height,
            "steps": card.steps.default,
            "description": card.description,
        }
        for card in caller.state.cards.values()
    ]


def _text(value: object) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(text=json.dumps(value))])


def _error(message: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(text=message)], is_error=True)
