"""ImageModel: what a Serve replica of a picture model does; app.py makes the deployment of it."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments import __version__
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import WeftError
from deployments.protocol.events import Artifact, Done, Event, Failed, Step
from deployments.protocol.limits import denoising_steps, fit
from deployments.protocol.request import FittedRequest, GenerationRequest, Task
from deployments.telemetry import join_serve_log

if TYPE_CHECKING:  # heavy imports stand in the constructor: building the graph loads no torch
    from PIL.Image import Image

    from deployments.engine.worker import Emit, Finished

logger = logging.getLogger(__name__)

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class ImageModel:
    """Pictures from one card on one device. Many requests share each forward of the model."""

    def __init__(self, card: ModelCard) -> None:
        os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # a model folder may hold code; never run it
        import torch

        from deployments.engine.engine import Engine
        from deployments.engine.intercept import intercept
        from deployments.engine.step_scheduler import StepScheduler
        from deployments.engine.worker import Worker
        from deployments.pipelines.model import Model
        from deployments.weights.hardware import best_device
        from deployments.weights.load import load_pipeline

        join_serve_log()
        started = time.monotonic()
        torch.set_num_threads(max(1, int(card.serving.num_cpus)))  # Ray sets 1 for small replicas
        self._card = card
        self._model = Model(
            load_pipeline(card.weights, best_device()),
            [Task(task) for task in card.tasks if task in set(Task)],
        )
        intercept(self._model.modules)
        self._worker = Worker(Engine(StepScheduler(card.serving.max_rows)), slots=card.serving.slots)
        logger.info("model loaded", extra={"model": card.id, "seconds": time.monotonic() - started})

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """Queued, Started, Step ..., Artifact ..., then Done or Failed. Bad input is a Failed too.

        The card's limits hold here as well, because a call by handle skips HTTP. Closing the stream
        cancels the request at its next step and frees its slot.
        """
        try:
            fitted = fit(request, self._card, fresh_seed=secrets.randbits(32)).request
            async with aclosing(self._run(fitted)) as events:
                async for event in events:
                    yield event
        except WeftError as error:
            yield Failed.of(error)

    async def status(self) -> dict[str, object]:
        """What this replica is and how busy it is."""
        return {"model": self._card.id, "active": self._worker.active, "slots": self._card.serving.slots}

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        self._worker.check()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # the constructor may have failed before
            self._worker.stop()

    async def _run(self, request: FittedRequest) -> AsyncGenerator[Event]:
        from deployments.engine.worker import Finished

        image = mask = None
        if request.edit is not None:
            image, mask = await asyncio.to_thread(_given_pictures, request)

        def work(emit: Emit) -> list[Image]:
            return self._model.call(request, lambda step, steps: emit(Step(step, steps)), image, mask)

        async with aclosing(self._worker.submit(work, steps=denoising_steps(request, self._card))) as items:
            async for item in items:
                if isinstance(item, Finished):
                    async for event in self._deliver(request, item):
                        yield event
                else:
                    yield item

    async def _deliver(self, request: FittedRequest, finished: Finished) -> AsyncGenerator[Event]:
        """Every picture as a file with its thumbnail, then Done."""
        started = time.monotonic()
        for index, image in enumerate(finished.value):
            for artifact in await asyncio.to_thread(_files, request, index, image, finished.run_s):
                yield artifact
        yield Done(finished.queued_s, finished.run_s + time.monotonic() - started)


def _given_pictures(request: FittedRequest) -> tuple[Image | None, Image | None]:
    """Image and mask of the request, decoded, at its size."""
    from deployments.media import decode

    if request.edit is None:
        return None, None
    image = decode.picture(request.edit.image, request.width, request.height, "image")
    if request.edit.mask_image is None:
        return image, None
    return image, decode.mask(request.edit.mask_image, request.width, request.height, "mask_image")


def _files(request: FittedRequest, index: int, image: Image, run_s: float) -> list[Artifact]:
    """The picture's file and its thumbnail."""
    from deployments.media import still

    seed = request.seed + index
    facts = still.metadata(request, seed, __version__, run_s)
    text = still.a1111_parameters(request, seed, __version__)
    small, width, height = still.thumbnail(image)
    return [
        Artifact(
            index,
            "image",
            MEDIA_TYPES[request.output.format],
            still.encode(image, request.output, text, facts),
            image.width,
            image.height,
            seed,
            facts,
        ),
        Artifact(index, "thumbnail", MEDIA_TYPES["webp"], small, width, height, seed),
    ]
