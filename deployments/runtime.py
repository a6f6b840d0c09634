"""What a replica computes with: a device, the engine's thread and loaded models. Imports torch."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

import torch

from deployments.engine.call import Seam
from deployments.engine.cost_model import RowLimit
from deployments.engine.device_errors import is_device_broken
from deployments.engine.engine import Engine
from deployments.engine.out_of_memory import is_out_of_memory, shortage
from deployments.engine.step_scheduler import StepScheduler
from deployments.engine.worker import Worker
from deployments.executors.decode_thread import DecodeThread
from deployments.executors.denoise import job_shape
from deployments.executors.dispatch import execute
from deployments.executors.run import Run
from deployments.executors.video_encoding import Encoder
from deployments.loras.file_cache import LoraFileCache
from deployments.loras.file_reader import LoraFileReader
from deployments.models.activations import MAX_ROWS
from deployments.models.determinism import set_determinism_flags
from deployments.models.hardware import PeakMeter
from deployments.models.load_failures import LoadFailure
from deployments.models.model_instance import ModelInstance
from deployments.models.model_loader import ModelLoader
from deployments.observability import collectors
from deployments.observability.metrics import Sample
from deployments.planning.profile import read_profile
from deployments.planning.report import report
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable, NotFinite, OutOfMemory, WeftError
from deployments.protocol.events import CheckpointPolicy, Event
from deployments.protocol.request import Lora, ResolvedRequest

MIB = 2**20

# torch gives up the interpreter's lock in every operator. The engine's thread waits up to this long to get it
# back from a thread that reads a LoRA, decodes a picture or writes a log; Python's default is 5 ms
SWITCH_INTERVAL_S = 0.0005

logger = logging.getLogger(__name__)


class Runtime:
    """The models, threads and files of one replica, and the requests that run on them. For one event loop."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        refiners: Mapping[str, ModelCard],
        *,
        gpu_share: float,
        lora_files: LoraFileReader | None,
        lora_folder: Path | None,
        encoder: Encoder | None,
        device_name: str | None = None,
        reserves_gpu: bool = False,
        schedule: Callable[[int, RowLimit], StepScheduler] = StepScheduler,
    ) -> None:
        """Load the first card's model and start the engine's thread. See ModelReplica for the parameters.

        gpu_share: the part of a GPU that belongs to this process, as `num_gpus`.
        device_name: torch's; None: the best that there is. reserves_gpu: Ray has given this process a GPU.
        Raises ModelUnavailable when the device is not there.
        schedule: the scheduler of the engine, of at most so many rows.
        A model that cannot be loaded is in `load_failures`, and tried again for a later request.
        """
        serving = cards[0].serving
        torch.set_num_threads(max(1, int(serving.num_cpus)))  # Ray sets 1 for small replicas
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if serving.exact != "off":
            set_determinism_flags()
        self._lora_files = LoraFileCache(lora_folder, serving.adapter_disk_mib * MIB, lora_files)
        self._loader = ModelLoader(
            cards,
            refiners,
            self._lora_files,
            gpu_share=gpu_share,
            device=device_name,
            reserves_gpu=reserves_gpu,
        )
        self.models = self._loader.open_cache()
        memory, device = self._loader.memory, self._loader.device
        scheduler = self._scheduler = schedule(serving.max_rows or MAX_ROWS, memory.rows_that_fit)
        engine = Engine(
            scheduler,
            exact=serving.exact,
            auxiliary_lane=True,
            device=device,
            meter=PeakMeter(device, memory) if device.type == "cuda" else None,
        )
        self.worker = Worker(engine, scheduler, slots=serving.slots, watchdog_s=serving.watchdog_s)
        self.encoder = encoder
        self.models.before_unload = self._forget_model
        self._loader.extras.before_unload = self._forget
        self._engine = engine
        self.decode_thread = DecodeThread(serving.watchdog_s, self.worker.run_on_thread, device)
        self._loader.admission.progress = self._progress

    @asynccontextmanager
    async def stream(
        self,
        card: ModelCard,
        request: ResolvedRequest,
        user: str,
        resume: bytes | None,
        max_wait_s: float | None,
        checkpoints: CheckpointPolicy | None = None,
    ) -> AsyncGenerator[AsyncGenerator[Event]]:
        """The events of the request, whose model and LoRAs are loaded and kept as long as the block runs.

        Leaving the block early cancels the request.
        Raises ModelFailed when the model cannot be loaded, ModelUnavailable when that may pass or the device
        fails, OutOfMemory where it does not fit or memory runs out outside of the engine; for LoRAs, see
        LoraCache.using.
        """
        self._loader.admission.enter_loop()
        try:
            refiner = None if request.refiner is None else self._loader.shared_refiner(card.id)
            names = (card.id,) if refiner is None else (card.id, refiner)
            async with (
                self.models.using_all(names) as (model, *others),
                model.loras.using(request.loras, self.worker.run_on_thread) as lora_set,
            ):
                run = Run(
                    request,
                    model,
                    self.worker,
                    self.decode_thread,
                    self.encoder,
                    user=user,
                    resume=resume,
                    max_wait_s=max_wait_s,
                    checkpoints=checkpoints,
                    refiner=others[0] if others else None,
                    lora_set=lora_set,
                )
                for lora in model.loras.without_effect(request.loras):
                    run.warn("lora_without_effect", "loras", _without_effect(lora))
                async with aclosing(execute(run)) as events:
                    yield events
        except NotFinite:  # of a VAE, after the request's last step
            await self.worker.run_on_thread(partial(self.worker.stats.record_failure, "not_finite"))
            raise
        except Exception as error:
            failure = self._device_error(error)
            if failure is None:
                raise
            raise failure from error

    async def use_profile(self, card: ModelCard) -> None:
        """Have the scheduler know what `weft bench` measured for this model on this device, if it did. One
        request of the default size must have run."""
        model = next((model for model in self.models.models if model.card.id == card.id), None)
        profile = None if model is None else read_profile(card.weights, model.profile_key)
        if profile is None:
            return
        shape = job_shape(card.id, profile.width, profile.height)
        used = await self.worker.run_on_thread(partial(self._scheduler.seed, shape, profile.step_s))
        if used:
            rows = profile.best_rows
            logger.info("seconds by batch size are known", extra={"model": card.id, "best_rows": rows})
        else:
            logger.warning("the profile is not used: steps take other times", extra={"model": card.id})

    def _progress(self) -> int:
        """Grows as running requests come nearer to their ends."""
        return self.worker.stats.progress + self.decode_thread.frames

    def _device_error(self, error: Exception) -> WeftError | None:
        """What a failure of the device outside of the engine is for the caller; None for any other error.

        A broken device ends the engine, and with it this replica.
        """
        if is_device_broken(error):
            self.worker.report_broken_device(error)
            return ModelUnavailable("the device failed; the replica is being replaced, try again")
        if isinstance(error, WeftError) or not is_out_of_memory(error):
            return None
        logger.warning("a request ran out of memory outside of the engine", exc_info=error)
        return OutOfMemory(f"memory ran out{shortage(error)}; ask for fewer pictures or a smaller size")

    async def _forget_model(self, model: ModelInstance) -> None:
        """Have nothing refer to a model that is going to be unloaded, or count for it."""
        await self._loader.extras.forget(model.card.id)
        await self._forget(model.seams)

    async def _forget(self, seams: Sequence[Seam]) -> None:
        """Have nothing refer to modules that are going to be unloaded, or count for them."""
        keys: set[Hashable] = {seam.name for seam in seams}
        keys.update(key for seam in seams for key in list(seam.batch_keys.values()))
        await self.worker.run_on_thread(partial(self._engine.forget, seams))
        self._loader.memory.forget_forwards(keys)

    def samples(self) -> Iterator[Sample]:
        """Current values of the metrics of the engine, the models, the decoder and the memory."""
        yield from collectors.worker_samples(self.worker)
        yield from collectors.model_samples(self.models.models)
        yield from collectors.memory_samples(self._loader.device)
        yield from collectors.account_samples(self._loader.memory)
        for model, evicted in list(self._loader.extras.evicted.items()):
            yield Sample("weft_extras_evicted_total", evicted, {"model": model})
        for model, (times, seconds) in list(self._loader.loads.items()):
            yield Sample("weft_model_loads_total", times, {"model": model})
            yield Sample("weft_model_load_seconds_total", seconds, {"model": model})
        if self.encoder is not None:
            yield Sample("weft_video_frames_decoded_total", self.decode_thread.frames)
            yield Sample("weft_video_decode_seconds_total", self.decode_thread.seconds)

    @property
    def memory_bytes(self) -> dict[str, int | None]:
        """Of the device: by part, and what they may have together; None: no limit."""
        memory = self._loader.memory
        parts: dict[str, int | None] = dict(memory.held.items())
        return parts | {
            "working": memory.working_bytes,
            "activations": memory.activation_bytes,
            "limit": memory.limit_bytes,
        }

    def plan_reports(self) -> dict[str, dict[str, object]]:
        """By model id, how it runs on this device, or would run if it were loaded now: planning/report.py."""
        machine = self._loader.machine
        loaded = {model.card.id: model.plan for model in self.models.models}
        plans = {name: loaded.get(name) or self._loader.plan(name) for name in self._loader.names}
        return {name: report(plan, machine.name, loaded=name in loaded) for name, plan in plans.items()}

    @property
    def load_failures(self) -> dict[str, LoadFailure]:
        """By model id, why it is not loaded though that was tried."""
        return self._loader.failures.report()

    def check_loaded(self, model_id: str) -> None:
        """Raises the reason why this model is not loaded though that was tried."""
        if (error := self._loader.failures.error_of(model_id)) is not None:
            raise error

    def layer_shapes(self, model_id: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the layers that a LoRA may change, by component and path; empty before it is loaded."""
        for model in self.models.models:
            if model.card.id == model_id:
                return model.loras.layers
        return {}

    async def forget_lora(self, digest: str) -> None:
        """Drop a LoRA from disk, memory and device; running requests keep it to their end."""
        await asyncio.to_thread(self._lora_files.remove, digest)
        for model in self.models.models:
            model.loras.unload(digest)

    def check(self) -> None:
        """Raises ModelUnavailable when a thread is dead or hangs."""
        self.worker.check()
        self.decode_thread.check()


def _without_effect(lora: Lora) -> str:
    name = lora.name or lora.id[:12]
    return f"the LoRA {name} holds only zeros and changes nothing; use a later checkpoint of its training"
