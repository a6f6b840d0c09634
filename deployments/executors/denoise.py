"""Denoising on the engine's thread: what all executors begin with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Hashable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from PIL.Image import Image

from deployments.engine.engine_stats import size_class
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.work import Checkpointed, Finished
from deployments.executors.inputs import decode_inputs
from deployments.executors.pipeline_calls import PipelineCalls, StateReady
from deployments.executors.previews import PreviewReady, encode_preview
from deployments.executors.run import Run
from deployments.media.inpainting import PasteBack
from deployments.models.device_memory import PIPELINE, Thing
from deployments.pipelines.pending_pictures import PendingPictures
from deployments.pipelines.truncation import TokenizedText, cut_texts
from deployments.protocol.events import Checkpoint, Event, Handover
from deployments.protocol.request import ResolvedRequest

PRIORITIES = {"low": -1, "normal": 0, "high": 1}
RESTARTED = (
    "restarted",
    "",
    "the steps of an earlier replica were computed again: its state of this request does not fit here, where "
    "the model or the versions of its libraries are others",
)


async def denoise(run: Run) -> AsyncGenerator[Event | Finished]:
    """Queued, Started, Step and Preview ..., then Finished with the pipeline's result, or Failed.

    Finished.value: PIL pictures, or one LatentDecoder for a video. A Handover comes before the Failed of a
    replica that is being stopped.
    Raises BadRequest for pictures that cannot be used, ModelUnavailable when a ControlNet or the refiner
    cannot be loaded.
    """
    request, model = run.request, run.model
    async with model.extras.using_preprocessors(request):
        inputs = await asyncio.to_thread(
            decode_inputs, request, model.extras.preprocessors, run.frame, model.card.references
        )
    for warning in inputs.warnings:
        run.warn(*warning)
    _warn_of_guidance(run)
    if run.refiner is not None:
        await asyncio.to_thread(model.pipelines.match_refiner, run.refiner.pipelines)
    calls = PipelineCalls(run, inputs)
    job = _scheduled_job(run, calls)
    async with (
        model.extras.using_what_it_needs(request, _held_by(run)),  # loads what a first request needs
        aclosing(
            run.worker.submit(calls.work, job, max_wait_s=run.max_wait_s, snapshot=calls.capture)
        ) as items,
    ):
        async for item in items:
            match item:
                case Finished():
                    _warn_of_cut_texts(run, calls.tokenized)
                    if calls.restarted:
                        run.warn(*RESTARTED, of_result=False)
                    yield await _complete(item, calls.unproven, inputs.paste_back)
                case PreviewReady():
                    yield await asyncio.to_thread(encode_preview, item, request, inputs.paste_back)
                case StateReady(step=step, state=state):
                    yield Checkpoint(step, await asyncio.to_thread(state.to_bytes))
                case Checkpointed(state=None):
                    yield Handover(0, b"")
                case Checkpointed(state=state):
                    step = calls.steps_done
                    yield Handover(step, await asyncio.to_thread(state.to_bytes))
                case _:
                    yield item


def _held_by(run: Run) -> list[Thing]:
    """What it has of the device's memory already, and keeps."""
    refiner = [] if run.refiner is None else [(run.refiner.card.id, PIPELINE)]
    return [*run.model.loras_of(run.request), *refiner]


def _warn_of_guidance(run: Run) -> None:
    """Where the request asks for another guidance scale than the card, and the weights have none."""
    request, default = run.request, run.model.card.guidance.default
    if request.guidance_scale == default or run.model.pipelines.is_guided(request):
        return
    run.warn(
        "guidance_ignored",
        "guidance_scale",
        f"guidance_scale {request.guidance_scale:g} has no effect: {request.model} is distilled to work "
        "without guidance, or its pipeline takes none; leave it out",
    )


def _warn_of_cut_texts(run: Run, tokenized: list[TokenizedText]) -> None:
    request = run.request
    fields = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    if request.video is not None and request.video.end_prompt is not None:
        fields["end_prompt"] = request.video.end_prompt
    for field, message in cut_texts(tokenized, fields).items():
        run.warn("prompt_truncated", field, message)


async def _complete(finished: Finished, unproven: frozenset[str], paste_back: PasteBack | None) -> Finished:
    """The same with what the request shared on an earlier replica, and with its finished pictures: the device
    may still need some time for them, and some are put back into the given picture."""
    finished = replace(finished, unproven=finished.unproven | unproven)
    if paste_back is None and not isinstance(finished.value[0], PendingPictures):
        return finished
    started = time.monotonic()
    pictures = await asyncio.to_thread(_pictures, finished.value, paste_back)
    return replace(finished, value=pictures, run_s=finished.run_s + time.monotonic() - started)


def _pictures(value: list[Any], paste_back: PasteBack | None) -> list[Image]:
    """The pictures of what the pipeline calls returned. Blocks; call it in a thread."""
    pictures: list[Image] = []
    for item in value:
        pictures += item.pictures() if isinstance(item, PendingPictures) else [item]
    return pictures if paste_back is None else paste_back.pictures(pictures)


def reported_unproven(request: ResolvedRequest, unproven: Collection[str]) -> tuple[str, ...]:
    """Done.merged_unproven of a request whose forwards of these modules were shared in unproven sizes.

    Only a request that prefers exactness hears of it: with `off` it did not ask.
    """
    return tuple(sorted(unproven)) if request.exact == "prefer" else ()


def job_shape(model_id: str, width: int, height: int, num_frames: int | None = None) -> Hashable:
    """Jobs of one shape have steps that cost the same."""
    return model_id, width, height, num_frames


def _scheduled_job(run: Run, calls: PipelineCalls) -> ScheduledJob:
    """The request as the step scheduler sees it."""
    request, model_id = run.request, run.model.card.id
    num_frames = None if request.video is None else request.video.num_frames
    return ScheduledJob(
        user=run.user,
        priority=PRIORITIES[request.priority],
        deadline=None if request.deadline_s is None else time.monotonic() + request.deadline_s,
        steps=calls.steps,
        steps_done=calls.steps_done,
        batch_size=request.num_images,
        labels=(model_id, size_class(request.width, request.height, num_frames)),
        shape=job_shape(model_id, request.width, request.height, num_frames),
        device_time=run.device_time,
    )
