"""Which executor a request needs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from deployments.executors.framewise_video import generate_framewise_video
from deployments.executors.image import generate_images
from deployments.executors.run import Run
from deployments.executors.video import generate_video
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.events import Done, Event, Failed, Step


def executor_of(run: Run) -> Callable[[Run], AsyncGenerator[Event]]:
    """The executor of the request. Raises ModelUnavailable for a video where no encoder is deployed."""
    video = run.request.video
    if video is None:
        return generate_images
    if run.encoder is None:
        raise ModelUnavailable(f"this replica of {run.model.card.id} has no video encoder")
    return generate_framewise_video if video.framewise else generate_video


async def execute(run: Run) -> AsyncGenerator[Event]:
    """The request's events, the last one Done or Failed, with the device seconds it took.

    Raises ModelUnavailable for a video where no encoder is deployed, BadRequest for inputs that cannot be
    used.
    """
    async with aclosing(executor_of(run)(run)) as events:
        async for event in events:
            match event:
                case Step():
                    yield replace(event, device_s=run.device_time.so_far_s)
                case Done() | Failed():
                    yield replace(event, device_s=run.device_time.total_s())
                case _:
                    yield event
