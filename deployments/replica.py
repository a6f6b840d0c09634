"""ModelReplica: what a Serve replica of picture models does; app.py makes the deployment of it."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments import __version__
from deployments.loras.file_reader import LoraFileReader
from deployments.observability import collectors
from deployments.observability.metrics import Reporter, Sample, join_serve_log
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable, NotFound, WeftError
from deployments.protocol.events import Artifact, Done, Event, Failed, Handover, Preview, Step
from deployments.protocol.log_context import LogContext, bind
from deployments.protocol.request import ControlType, GenerationRequest, ResolvedRequest
from deployments.validation.inputs import control_field
from deployments.validation.resolve import denoising_steps, resolve

if TYPE_CHECKING:  # heavy imports stand in the constructor: building the graph loads no torch
    from PIL.Image import Image

    from deployments.engine.worker import Emit, Finished
    from deployments.loras.lora_set import LoraSet
    from deployments.media.control import Preprocessor
    from deployments.models.model_instance import ModelInstance
    from deployments.pipelines.previews import PreviewPixels
    from deployments.pipelines.resume import Progress

logger = logging.getLogger(__name__)

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MIB, GIB = 2**20, 2**30
PRIORITIES = {"low": -1, "normal": 0, "high": 1}
STOP_GRACE_S = 50.0  # of the 60 s that app.py gives a replica to end


@dataclass(frozen=True, slots=True)
class _PreviewReady:
    """A preview on its way out of the engine's thread."""

    step: int
    pixels: PreviewPixels


class ModelReplica:
    """Pictures from one or several cards on one device. Many requests share each forward of a model."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        refiners: Mapping[str, ModelCard] | None = None,
        on_stop: Callable[[Callable[[], None]], object] | None = None,
        *,
        fetch_adapter: LoraFileReader | None = None,
        adapter_folder: str | None = None,
        lora_pool: object = None,
    ) -> None:
        """cards: the first is loaded now, the others when asked for; its `serving` rules the replica.

        refiners: by card id, the card that card.refiner names.
        on_stop: takes a function that it will call when the replica is going to be stopped.
        fetch_adapter: where LoRAs come from that requests only name; without it they bring their file.
        adapter_folder: keeps LoRAs that were fetched; replicas of one machine may share it.
        beside: a deployment that belongs to the same Serve application; never called from here.
        """
        began = time.monotonic()
        os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # a model folder may hold code; never run it
        if cards[0].serving.compile:
            from deployments.models.weight_cache import keep_compiled_code

            keep_compiled_code()
        import torch

        from deployments.engine.engine import Engine
        from deployments.engine.step_scheduler import StepScheduler
        from deployments.engine.worker import Worker
        from deployments.loras.file_cache import LoraFileCache
        from deployments.models.hardware import best_device, memory_bytes
        from deployments.models.model_cache import ModelCache
        from deployments.models.model_instance import ModelInstance

        join_serve_log()
        first, serving = cards[0], cards[0].serving
        self._serving = serving
        self._cards = {card.id: card for card in cards}
        self._refiners = dict(refiners or {})
        torch.set_num_threads(max(1, int(serving.num_cpus)))  # Ray sets 1 for small replicas
        self._device = best_device()
        self._adapter_files = LoraFileCache(
            None if adapter_folder is None else Path(adapter_folder),
            serving.adapter_disk_mib * MIB,
            fetch_adapter,
        )
        self._model_cache: ModelCache[ModelInstance] = ModelCache(
            self._load,
            ModelInstance.unload,
            lambda loaded: loaded.size_bytes,
            limit=serving.models_loaded,
            max_bytes=memory_bytes(self._device),
            expected_bytes=lambda name: int(self._cards[name].vram_gib * GIB),
        )
        self._loads: dict[str, tuple[int, float]] = {}  # how often each model was loaded here, and seconds
        imported = time.monotonic()
        self._model_cache.put(first.id, self._load(first.id, while_serving=False))
        loaded = time.monotonic()
        scheduler = StepScheduler(serving.max_rows)
        engine = Engine(
            scheduler, deterministic=serving.deterministic, auxiliary_lane=True, device=self._device
        )
        self._worker = Worker(engine, scheduler, slots=serving.slots, watchdog_s=serving.watchdog_s)
        if on_stop is not None:
            on_stop(lambda: self.drain(STOP_GRACE_S))
        if serving.warm_up:  # in a thread: Serve calls the constructor inside a running event loop
            with ThreadPoolExecutor(1, thread_name_prefix="warm-up") as thread:
                thread.submit(asyncio.run, self._warm_up(first)).result()
        self.start_phases = {  # seconds
            "imports": imported - began,
            "load": loaded - imported,
            "warm_up": time.monotonic() - loaded,
        }
        phases = {f"{phase}_s": round(seconds, 3) for phase, seconds in self.start_phases.items()}
        logger.info("replica ready", extra=phases)
        self._reporter = Reporter()
        self._reporter.start(self.samples)

    async def generate(
        self,
        request: GenerationRequest,
        user: str = "",
        resume: bytes | None = None,
        *,
        unlimited_wait: bool = False,
        log_context: LogContext | None = None,
    ) -> AsyncGenerator[Event]:
        """Queued, Started, Step and Preview ..., Artifact ..., then Done or Failed, also for bad input.

        user: whose work it is; users share the replica fairly. resume: the state of a Handover.
        patient: wait for a slot however long it takes, where others are refused after card.max_wait_s.
        origin: what log lines tell of it.
        The card's limits hold here as well, because a call by handle skips HTTP. Closing the stream
        cancels the request at its next step and frees its slot.
        """
        if log_context is not None:
            bind(log_context)  # this call has a task, and so a context, of its own
        try:
            card = self._card_of(request)
            resolved = resolve(request, card, fresh_seed=secrets.randbits(32)).request
            async with self._model_cache.using(card.id) as loaded:
                max_wait_s = None if unlimited_wait else self._serving.max_wait_s
                async with (
                    loaded.adapters.using(resolved.loras, self._worker.run_on_thread) as owner,
                    aclosing(self._run(loaded, resolved, user, resume, max_wait_s, owner)) as events,
                ):
                    async for event in events:
                        yield event
        except WeftError as error:
            yield Failed.of(error)

    async def status(self) -> dict[str, object]:
        """What this replica is and how busy it is."""
        return {
            "models": list(self._cards),
            "loaded_bytes": self._model_cache.loaded,
            "active": self._worker.active,
            "slots": self._serving.slots,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every few seconds, for the policy of serve_app/ray_serve/autoscaling.py."""
        done_s, left_s, mean_s = self._worker.work_seconds()
        return {
            "weft_work_done_s": done_s,
            "weft_work_left_s": left_s,
            "weft_requests_open": float(self._worker.active),
            "weft_request_work_s": mean_s,
        }

    async def unload(self, digest: str) -> bool:
        """Forget a deleted adapter on this replica, for `handle.broadcast`; running requests keep it."""
        await asyncio.to_thread(self._adapter_files.remove, digest)
        for loaded in self._model_cache.models:
            loaded.adapters.unload(digest)
        return True

    def samples(self) -> Iterator[Sample]:
        """All numbers of this replica, for its reporter."""
        yield from collectors.worker_samples(self._worker)
        yield from collectors.model_samples(self._model_cache.models)
        yield from collectors.memory_samples(self._device)
        for phase, seconds in self.start_phases.items():  # again and again: Ray forgets gauges
            yield Sample("weft_cold_start_seconds", seconds, {"phase": phase})
        for model, (times, seconds) in list(self._loads.items()):
            yield Sample("weft_model_loads", times, {"model": model})
            yield Sample("weft_model_load_seconds", seconds, {"model": model})

    async def layers(self, model: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the layers that a LoRA may change, by part and path; none before it is loaded."""
        for loaded in self._model_cache.models:
            if loaded.card.id == model:
                return loaded.adapters.layers
        return {}

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        self._worker.check()

    def drain(self, grace_s: float) -> None:
        """Take no more work; hand back at once what would not end within `grace_s`."""
        self._worker.drain(grace_s)

    def __del__(self) -> None:
        if hasattr(self, "_reporter"):  # the constructor may have failed before
            self._reporter.stop()
        if hasattr(self, "_worker"):
            self._worker.stop()

    def _card_of(self, request: GenerationRequest) -> ModelCard:
        for card in self._cards.values():
            if request.model == card.id or request.model in card.aliases:
                return card
        # a handle leads to one model, whatever the request calls it; but a fitted one was made for its card
        if len(self._cards) == 1 and not isinstance(request, ResolvedRequest):
            return next(iter(self._cards.values()))
        raise NotFound(
            f"there is no model {request.model!r} here; there is {', '.join(self._cards)}", param="model"
        )

    def _refiner_of(self, card: ModelCard) -> ModelCard | None:
        return self._refiners.get(card.id)

    def _load(self, name: str, *, while_serving: bool = True) -> ModelInstance:
        from deployments.models.model_instance import ModelInstance

        card, began = self._cards[name], time.monotonic()
        loaded = ModelInstance(
            card,
            self._refiner_of(card),
            self._device,
            while_serving=while_serving,
            adapter_files=self._adapter_files,
        )
        times, seconds = self._loads.get(name, (0, 0.0))
        self._loads[name] = (times + 1, seconds + time.monotonic() - began)
        return loaded

    async def _warm_up(self, card: ModelCard) -> None:
        """One small request of each size: kernels are chosen, rows proven and times learned meanwhile.

        Where blocks are compiled then two at once, as several rows have a graph of their own.
        Raises ModelUnavailable when that cannot be compiled.
        """
        if "t2i" not in card.tasks:
            return
        steps = card.steps.min
        concurrencies = (1, 2) if card.serving.compile else (1,)
        for width, height in card.serving.warm_up_sizes or [(card.sizes.width, card.sizes.height)]:
            wish = GenerationRequest(
                model=card.id,
                prompt="warm-up",
                seed=0,
                num_inference_steps=steps,
                width=width,
                height=height,
            )
            for concurrency in concurrencies:
                failures = await asyncio.gather(*(self._failure(wish) for _ in range(concurrency)))
                for failure in filter(None, failures):
                    about = {"model": card.id, "size": f"{width}x{height}", "error": failure}
                    logger.warning("the warm-up failed", extra=about)
                    if card.serving.compile:
                        raise ModelUnavailable(f"{card.id} cannot run compiled: {failure}")

    async def _failure(self, wish: GenerationRequest) -> str | None:
        """Why it cannot be done; None: it can."""
        async with aclosing(self.generate(wish, unlimited_wait=True)) as events:
            async for event in events:
                if isinstance(event, Failed):
                    return event.message
        return None

    async def _run(
        self,
        loaded: ModelInstance,
        request: ResolvedRequest,
        user: str,
        resume: bytes | None,
        max_wait_s: float | None,
        owner: LoraSet | None = None,
    ) -> AsyncGenerator[Event]:
        """The request's events. owner: of its rows, with the LoRAs that it brought."""
        from deployments.engine.fiber import use_lora_set
        from deployments.engine.step_scheduler import ScheduledJob
        from deployments.engine.worker import Checkpointed, Finished
        from deployments.pipelines.resume import Progress, restore

        image, mask, maps = await asyncio.to_thread(_decoded_inputs, request, loaded.preprocessors)
        await asyncio.to_thread(loaded.model.prepare, request)  # a ControlNet's first request loads it
        progress = (restore(resume, request) if resume else None) or Progress()

        def work(emit: Emit) -> list[Image]:
            def on_step(step: int, steps: int) -> None:
                emit(Step(step, steps))

            use_lora_set(owner)
            attach = partial(_attach, loaded, request, progress, emit, owner)
            return loaded.model.call(request, on_step, image, mask, maps, progress=progress, attach=attach)

        job = ScheduledJob(
            user=user,
            priority=PRIORITIES[request.priority],
            deadline=None if request.deadline_s is None else time.monotonic() + request.deadline_s,
            steps=denoising_steps(request, loaded.card),
            steps_done=progress.step,
            batch_size=request.num_images,
            labels=(loaded.card.id, _size_class(request)),
            shape=(loaded.card.id, request.width, request.height, request.video and request.video.num_frames),
        )
        items = self._worker.submit(work, job, max_wait_s=max_wait_s, snapshot=progress.save)
        async with aclosing(items):
            async for item in items:
                match item:
                    case Finished():
                        async for event in self._deliver(request, item):
                            yield event
                    case _PreviewReady(step=step, pixels=pixels):
                        data = await asyncio.to_thread(_preview, pixels, request.width, request.height)
                        yield Preview(step, MEDIA_TYPES["webp"], data)
                    case Checkpointed(state=None):
                        yield Handover(0, b"")
                    case Checkpointed(state=state):
                        yield Handover(progress.step, state)
                    case _:
                        yield item

    async def _deliver(self, request: ResolvedRequest, finished: Finished) -> AsyncGenerator[Event]:
        """Every picture as a file with its thumbnail, then Done."""
        started = time.monotonic()
        for index, image in enumerate(finished.value):
            for artifact in await asyncio.to_thread(_files, request, index, image, finished.run_s):
                yield artifact
        yield Done(finished.queued_s, finished.run_s + time.monotonic() - started)


def _size_class(request: ResolvedRequest) -> str:
    from deployments.engine.engine_stats import size_class

    frames = None if request.video is None or request.video.framewise else request.video.num_frames
    return size_class(request.width, request.height, frames)


def _attach(
    loaded: ModelInstance,
    request: ResolvedRequest,
    progress: Progress,
    emit: Emit,
    owner: LoraSet | None,
    pipeline: Any,
) -> None:
    """Give a request's pipeline the model's prompt cache, its place in a frame-wise video, and
    previews if they are wanted."""
    from deployments.pipelines.framewise import set_frame
    from deployments.pipelines.previews import watch

    loaded.prompts.attach(pipeline, owner.label if owner is not None and owner.touches_text else None)
    if request.video is not None and request.video.frame is not None:
        set_frame(pipeline, request.video, request.video.frame)
    previewer, steps = loaded.previewer, denoising_steps(request, loaded.card)
    every = -(-steps // (request.output.previews + 1))  # ceil: no preview of the last step
    if not request.output.previews or previewer is None or steps < 2:
        return

    def wanted() -> bool:
        step = progress.step + 1
        return step % every == 0 and step < steps

    watch(
        pipeline,
        request.width,
        request.height,
        wanted,
        lambda latents: emit(_PreviewReady(progress.step + 1, previewer.preview(latents))),
    )


def _preview(pixels: PreviewPixels, width: int, height: int) -> bytes:
    from deployments.media import still

    return still.preview(pixels, width, height)


def _decoded_inputs(
    request: ResolvedRequest, preprocessors: Mapping[ControlType, Preprocessor]
) -> tuple[Image | None, Image | None, list[Image]]:
    """Image, mask and control maps of the request, decoded or made, at its size."""
    from deployments.media import decode
    from deployments.media.control import control_map

    width, height = request.width, request.height
    maps = [
        control_map(control, width, height, control_field(request, index), preprocessors)
        for index, control in enumerate(request.controls)
    ]
    if request.edit is None:
        return None, None, maps
    if request.video is not None and request.video.frame is not None and request.video.moves:
        from deployments.pipelines.framewise import camera_view

        whole = decode.own_size(request.edit.image, "image")
        return camera_view(whole, request.video, request.video.frame, width, height), None, maps
    image = decode.picture(request.edit.image, width, height, "image")
    if request.edit.mask_image is None:
        return image, None, maps
    return image, decode.mask(request.edit.mask_image, width, height, "mask_image"), maps


def _files(request: ResolvedRequest, index: int, image: Image, run_s: float) -> list[Artifact]:
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
