"""What an executor is given: one resolved request and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.engine.device_time import DeviceTime
from deployments.engine.worker import Worker
from deployments.executors.decode_thread import DecodeThread
from deployments.executors.video_encoding import Encoder
from deployments.loras.lora_set import LoraSet
from deployments.models.model_instance import ModelInstance
from deployments.pipelines.framewise import VideoFrame
from deployments.protocol.adjustment import Adjustment
from deployments.protocol.events import CheckpointPolicy
from deployments.protocol.request import ResolvedRequest


@dataclass(frozen=True, slots=True)
class Run:
    """One resolved request on one loaded model. An executor may derive others, such as one per frame."""

    request: ResolvedRequest
    model: ModelInstance
    worker: Worker
    decode_thread: DecodeThread
    encoder: Encoder | None = None  # needed for videos
    user: str = ""  # users share the worker fairly
    resume: bytes | None = None  # the state of a Handover or a Checkpoint from another replica
    checkpoints: CheckpointPolicy | None = None  # None: the state of the running request is not kept
    max_wait_s: float | None = None  # for a slot; None waits without limit
    refiner: ModelInstance | None = None  # that the request uses, where it is a model of the group
    lora_set: LoraSet | None = None  # None without LoRAs that change anything
    frame: VideoFrame | None = None  # set when the picture is one frame of a frame-wise video
    # see warn; a video shares it, and its device time, with its frames
    warnings: list[Adjustment] = field(default_factory=list)
    device_time: DeviceTime = field(default_factory=DeviceTime)

    def warn(self, code: str, param: str, message: str, *, of_result: bool = True) -> None:
        """Have the end of the request report this, once for all of its pictures.

        of_result: see Adjustment.
        """
        warning = Adjustment(code, param, message, of_result=of_result)
        if warning not in self.warnings:
            self.warnings.append(warning)
