"""Text to image, image to image, inpainting, ControlNets and refining: pictures as files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from PIL.Image import Image

from deployments import __version__
from deployments.engine.work import Finished
from deployments.executors.denoise import denoise, reported_unproven
from deployments.executors.run import Run
from deployments.media import still
from deployments.protocol.events import Artifact, Done, Event


async def generate_images(run: Run) -> AsyncGenerator[Event]:
    """The request's events: every picture's file is followed by its thumbnail, and all of them by Done."""
    async with aclosing(denoise(run)) as items:
        async for item in items:
            if not isinstance(item, Finished):
                yield item
                continue
            started = time.monotonic()
            for index, image in enumerate(item.value):
                for artifact in await asyncio.to_thread(_artifacts, run, index, image, item):
                    yield artifact
            generation_s = item.run_s + time.monotonic() - started
            yield Done(
                item.queued_s,
                generation_s,
                reported_unproven(run.request, item.unproven),
                tuple(run.warnings),
            )


def _artifacts(run: Run, index: int, image: Image, finished: Finished) -> list[Artifact]:
    """The picture's file and its thumbnail."""
    request, planned = run.request, run.model.changes_of(run.request)
    seed = request.seed + index
    metadata = still.metadata(request, seed, __version__, finished.run_s, finished.unproven, planned)
    parameters = still.a1111_parameters(request, seed, __version__)
    file = still.encode(image, request.output, parameters, metadata)
    small, width, height = still.thumbnail(image)
    media_type = f"image/{request.output.format}"
    return [
        Artifact(index, "image", media_type, file, image.width, image.height, seed, metadata),
        Artifact(index, "thumbnail", "image/webp", small, width, height, seed),
    ]
