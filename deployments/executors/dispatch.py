"""Which executor a request needs."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from deployments.executors.framewise_video import generate_framewise_video
from deployments.executors.image import generate_images
from deployments.executors.run import Run
from deployments.executors.video import generate_video
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.events import Event


def execute(run: Run) -> AsyncGenerator[Event]:
    """The request's events, the last one Done or Failed.

    Raises ModelUnavailable for a video where no encoder is deployed. The events raise BadRequest for inputs
    that cannot be used.
    """
    video = run.request.video
    if video is None:
        return generate_images(run)
    if run.encoder is None:
        raise ModelUnavailable(f"this replica of {run.model.card.id} has no video encoder")
    return generate_framewise_video(run) if video.framewise else generate_video(run)
