"""ModelReplica: the Serve class of a model. serve_app/app.py makes deployments of it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.encoder_client import RemoteEncoder
from deployments.executors.video_encoding import Encoder
from deployments.executors.warm_up import warm_up
from deployments.loras.file_reader import LoraFileReader
from deployments.models.device_memory import use_expandable_segments
from deployments.models.weight_cache import keep_compiled_code, use_installation
from deployments.observability.metrics import Reporter, Sample
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable, NotFound, WeftError
from deployments.protocol.events import CheckpointPolicy, Done, Event, Failed, Handover
from deployments.protocol.installation import AS_THE_NODE_SAYS, Installation
from deployments.protocol.log_context import LogContext, bind, join_serve_log
from deployments.protocol.request import GenerationRequest, ResolvedRequest
from deployments.provenance.signed_events import sign_event
from deployments.provenance.signing import ManifestSigner
from deployments.spot_notices import DrainNode, start_watching
from deployments.validation.resolve import resolve

logger = logging.getLogger(__name__)

STOP_GRACE_S = 50.0  # of the 60 s that app.py gives a replica to end
HANDOVER_S = 5.0  # before the end of a node, in which states and last events reach their callers
LOST_PAUSE_S = 1.0  # before a lost replica hands a request back: its dispatcher may send it here again
LOST_GRACE_S = 3.0  # in which a lost replica sends its last events and counters
MAX_PROOFS = 64  # in the answer about a model
LORA_IDS_PER_REPLICA = 64  # in Serve's routing table; about what a LoraCache holds in memory


def _end_process() -> None:
    """Without waiting for threads, which may hang in the driver of the device."""
    logging.shutdown()
    os._exit(1)


class ModelReplica:
    """One or several models on one device. Many requests share each forward of a model."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        refiners: Mapping[str, ModelCard] | None = None,
        on_stop: Callable[[Callable[[], None]], object] | None = None,
        *,
        encoder: Encoder | DeploymentHandle[Any] | None = None,
        lora_files: LoraFileReader | None = None,
        lora_folder: str | None = None,
        lora_pool: object = None,  # noqa: ARG002  naming it binds the deployment
        installation: Installation = AS_THE_NODE_SAYS,
        others_serve: Callable[[], bool] = lambda: False,
        drain_node: DrainNode | None = None,
        end_process: Callable[[], object] = _end_process,
    ) -> None:
        """cards: the first is loaded now, the others when asked for; its `serving` section applies to all.

        refiners: by card id, the card that card.refiner names.
        on_stop: takes a function that it calls when the replica is going to be stopped.
        encoder: the VideoEncoder deployment, or a local one; needed for videos.
        lora_files: reads LoRA files by digest; without it, requests must bring their files.
        lora_folder: keeps fetched LoRA files; replicas on one machine may share it.
        lora_pool: a deployment bound to the same Serve application by being named here; never called.
        installation: the settings of the service that replicas need.
        others_serve: whether other replicas of this deployment take requests.
        drain_node: has others replace what runs on this node; called when the cloud takes it back.
        end_process: called when the engine or its device has failed for good.

        Raises the reason when the first model cannot be loaded and others serve it, so that Serve sends them
        the requests, and keeps the earlier version of an update. A replica without others stays: requests for
        the model fail with the reason, it is tried again, and the other models are served.
        Raises ModelUnavailable where Ray gave it several GPUs, or the installation's device is not there.
        """
        began = time.monotonic()
        os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # a model folder may hold code; never run it
        join_serve_log("deployments")
        use_installation(installation)
        first = cards[0]
        if first.serving.compile:
            keep_compiled_code()  # read by torch when it is imported
        if first.serving.num_gpus:
            use_expandable_segments(installation.hip_alloc_conf)  # read by torch when it is imported
        self._node_ends_at = math.inf  # Unix seconds
        if installation.metadata_url and drain_node is not None:
            start_watching(installation.metadata_url, partial(self._leave_node, drain_node))
        # here and not above: building the graph must not import torch
        from deployments.runtime import Runtime

        self._signer = None if installation.signing is None else ManifestSigner(installation.signing)
        self._cards = {card.id: card for card in cards}
        self._serving = first.serving
        self._end_process = end_process
        self._ending = False
        imported = time.monotonic()
        self._runtime = Runtime(
            cards,
            refiners or {},
            gpu_share=_assigned_gpus(first.serving.num_gpus),
            lora_files=lora_files,
            lora_folder=None if lora_folder is None else Path(lora_folder),
            encoder=RemoteEncoder(encoder) if isinstance(encoder, DeploymentHandle) else encoder,
            device_name=_device_name(installation.device, first.serving.num_gpus),
            reserves_gpu=not installation.logical_gpus and _resources().get("GPU", 0) > 0,
        )
        if self._runtime.load_failures and others_serve():
            self._runtime.check_loaded(first.id)
        loaded = time.monotonic()
        if on_stop is not None:
            on_stop(lambda: self.drain(STOP_GRACE_S))
        if first.serving.warm_up and not self._runtime.load_failures:
            self._warm_up(first)
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
        checkpoints: CheckpointPolicy | None = None,
    ) -> AsyncGenerator[Event]:
        """Queued, Started, Step and Preview ..., Artifact ..., then Done or Failed, also for bad input.

        user: whose request it is; users share the replica fairly. resume: the state of a Handover or a
        Checkpoint. checkpoints: have Checkpoints among the events, of pipelines that can be continued.
        unlimited_wait: wait for a slot without limit; otherwise a request that would wait longer than
        card.serving.max_wait_s is refused.
        log_context: ids for the log lines of this request.
        The card's limits are checked here as well, because a call by handle skips HTTP. Closing the stream
        cancels the request at its next step and frees its slot.
        """
        if log_context is not None:
            bind(log_context)  # this call has a task, and so a context, of its own
        if self._runtime.worker.lost:
            await asyncio.sleep(LOST_PAUSE_S)
            yield Handover(0, b"")
            yield Failed.of(ModelUnavailable("this replica is being replaced; try again"))
            return
        await self._announce_lora_of(request)
        try:
            card = self._card_of(request)
            resolved, adjustments = resolve(request, card, fresh_seed=secrets.randbits(32))
            max_wait_s = None if unlimited_wait else self._serving.max_wait_s
            async with self._runtime.stream(card, resolved, user, resume, max_wait_s, checkpoints) as events:
                async for event in events:
                    if self._signer is not None:
                        event = await sign_event(self._signer, event, resolved, user)
                    if isinstance(event, Done):  # a request that was resolved before has no adjustments here
                        event = replace(event, warnings=(*adjustments, *event.warnings))
                    yield event
        except WeftError as error:
            yield Failed.of(error)

    async def status(self) -> dict[str, object]:
        """What this replica serves and how busy it is."""
        return {
            "models": list(self._cards),
            "loaded_bytes": self._runtime.models.loaded,
            "memory_bytes": self._runtime.memory_bytes,
            "active": self._runtime.worker.active,
            "slots": self._serving.slots,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every few seconds, for the policy of serve_app/ray_serve/autoscaling.py."""
        worker = self._runtime.worker
        done_s, left_s, mean_s = worker.work_seconds()
        return {
            "weft_work_done_s": done_s,
            "weft_work_left_s": left_s,
            "weft_requests_open": float(worker.active),
            "weft_request_work_s": mean_s,
        }

    async def unload(self, digest: str) -> bool:
        """Forget a deleted LoRA on this replica, for `handle.broadcast`; running requests keep it."""
        await self._runtime.forget_lora(digest)
        return True

    async def layers(self, model: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the layers that a LoRA may change, by component and path; empty before it is loaded."""
        return self._runtime.layer_shapes(model)

    async def proofs(self) -> list[dict[str, object]]:
        """What is known of batch sizes, by module and shape; of many shapes, the last MAX_PROOFS."""
        return [asdict(state) for state in self._runtime.worker.proofs()[-MAX_PROOFS:]]

    async def plans(self) -> dict[str, dict[str, object]]:
        """By model, how it runs on this replica's device, or would if it were loaded: planning/report.py."""
        return self._runtime.plan_reports()

    async def load_failures(self) -> dict[str, dict[str, object]]:
        """By model, why it is not loaded though that was tried: the fields of LoadFailure."""
        return {model: asdict(failure) for model, failure in self._runtime.load_failures.items()}

    def samples(self) -> Iterator[Sample]:
        """Current values of all metrics of this replica, for its reporter."""
        yield from self._runtime.samples()
        for phase, seconds in self.start_phases.items():  # again and again: Ray forgets gauges
            yield Sample("weft_cold_start_seconds", seconds, {"phase": phase})

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced.

        Serve waits for three failures in a row, and sends requests here meanwhile. A replica that can compute
        nothing more therefore ends its process: Serve and its routers see that at once, and the GPU is free.
        """
        try:
            self._runtime.check()
        except ModelUnavailable:
            if self._runtime.worker.lost and not self._ending:
                self._ending = True
                threading.Timer(LOST_GRACE_S, self._end_process).start()
            raise

    def drain(self, grace_s: float) -> None:
        """Take no more requests; give back at once those that would not end within `grace_s`, or before the
        cloud takes the node back."""
        left_s = self._node_ends_at - time.time() - HANDOVER_S
        self._runtime.worker.drain(max(0.0, min(grace_s, left_s)))

    def _leave_node(self, drain_node: DrainNode, reason: str, deadline: float) -> None:
        self._node_ends_at = deadline
        drain_node(reason, deadline)

    def __del__(self) -> None:
        if hasattr(self, "_reporter"):  # the constructor may have failed before
            self._reporter.stop()
        if hasattr(self, "_runtime"):
            self._runtime.worker.stop()

    def _warm_up(self, card: ModelCard) -> None:
        """Run the warm-up requests, in a thread: Serve calls the constructor inside a running event loop."""
        generate = partial(self.generate, unlimited_wait=True)
        with ThreadPoolExecutor(1, thread_name_prefix="warm-up") as thread:
            thread.submit(asyncio.run, warm_up(card, generate, self._runtime.worker)).result()
            thread.submit(asyncio.run, self._runtime.use_profile(card)).result()

    def _card_of(self, request: GenerationRequest) -> ModelCard:
        for card in self._cards.values():
            if request.model == card.id or request.model in card.aliases:
                return card
        # a handle leads to one model, whatever the request calls it; but a resolved one is for its card only
        if len(self._cards) == 1 and not isinstance(request, ResolvedRequest):
            return next(iter(self._cards.values()))
        raise NotFound(
            f"there is no model {request.model!r} here; there is {', '.join(self._cards)}", param="model"
        )

    async def _announce_lora_of(self, request: GenerationRequest) -> None:
        """Let Serve's routers know the LoRA by which they routed this request here."""
        routed_by = serve.get_multiplexed_model_id() if request.loras else ""
        if any(lora.id == routed_by for lora in request.loras):
            await self._announce_lora(routed_by)

    @serve.multiplexed(max_num_models_per_replica=LORA_IDS_PER_REPLICA)  # type: ignore[untyped-decorator]
    async def _announce_lora(self, digest: str) -> str:
        """Record at Serve's routers that this replica has the LoRA or is about to have it.

        Multiplexing is only used as routing affinity: nothing is loaded here, because Serve lets one id at
        a time in, and a slow download would delay all others. Serve's own LRU evicts LoRAs in use and knows
        no two of them in one request; LoraCache decides what is kept, and losing an id frees nothing.
        """
        return digest


def _assigned_gpus(num_gpus: float) -> float:
    """GPUs that Ray gave to this process, a part of one or one; num_gpus where Ray gave it no resources.

    A Serve config may override the card's number. Raises ModelUnavailable for several.
    """
    gpus = _resources().get("GPU", num_gpus)
    if gpus > 1:
        raise ModelUnavailable(
            f"the deployment's ray_actor_options ask for {gpus:g} GPUs, all but one of which would be idle: "
            "no model is split over several; write num_gpus: 1, and max_replicas for more GPUs"
        )
    return gpus


def _resources() -> Mapping[str, float]:
    """What Ray has given to this process; nothing where it only calls Ray, or runs without it."""
    if not ray.is_initialized() or (context := ray.get_runtime_context()).get_actor_id() is None:
        return {}
    assigned: Mapping[str, float] = context.get_assigned_resources()  # type: ignore[no-untyped-call]
    return assigned


def _device_name(wanted: str | None, num_gpus: float) -> str | None:
    """The device that the installation wants; None where it is a GPU and the card asks for none."""
    return None if wanted is not None and wanted.startswith("cuda") and not num_gpus else wanted
