"""One model on the device with all that its requests need; loaded and unloaded as a whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.intercept import intercept
from deployments.lora_format.shape_check import PARTS
from deployments.loras.batched_lora import BatchedLora
from deployments.loras.cache import LoraCache, LoraCacheLimits
from deployments.loras.file_cache import LoraFileCache
from deployments.loras.file_reader import LoraFileReader
from deployments.models.compile import compile_blocks
from deployments.models.load import load_controlnet, load_pipeline
from deployments.models.preprocessors import lazy_preprocessors
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.previews import Previewer
from deployments.pipelines.prompt_cache import PromptCache
from deployments.protocol.card import ModelCard, Serving
from deployments.protocol.request import ControlType, Task

logger = logging.getLogger(__name__)

MIB = 2**20


def _pipeline_tasks(card: ModelCard) -> list[Task]:
    """Those that a pipeline does; frame-wise videos are made of pictures."""
    framewise = {Task.t2v, Task.i2v} if card.videos is not None and card.videos.framewise else set()
    return [Task(task) for task in card.tasks if task not in framewise]


def _room(serving: Serving) -> LoraCacheLimits:
    return LoraCacheLimits(
        serving.adapters_on_device, serving.adapters_in_memory, serving.adapter_memory_mib * MIB
    )


class ModelInstance:
    """The card's model, its prompt cache, previewer and control map finders."""

    def __init__(
        self,
        card: ModelCard,
        refiner: ModelCard | None,
        device: torch.device,
        *,
        while_serving: bool,
        lora_files: LoraFileReader | None = None,
    ) -> None:
        """Loads at once. refiner: the card that card.refiner names; loaded when a request asks for it.

        while_serving: other threads are at work, see load_pipeline.
        lora_files: of LoRAs that requests only name; without it they must send the file along.
        Raises ModelUnavailable when the weights cannot be had.
        """
        started = time.monotonic()
        pipeline = load_pipeline(card.weights, device, while_serving=while_serving)
        if card.serving.compile:
            compile_blocks(pipeline)
        self.card = card
        self.pipelines = DiffusersModel(
            pipeline,
            _pipeline_tasks(card),
            controls=card.controls,
            load_controlnet=partial(load_controlnet, family=card.family, device=device),
            load_refiner=None
            if refiner is None
            else partial(load_pipeline, refiner.weights, device, while_serving=True),
        )
        self.previewer = Previewer.fitted_to(pipeline)
        self.prompts = PromptCache(card.serving.prompt_cache_mib * MIB)
        self.preprocessors: Mapping[ControlType, Callable[..., Any]] = lazy_preprocessors(
            card.controls, device
        )
        parts = {name: part for name, part in pipeline.components.items() if name in PARTS}
        self.batched_lora = BatchedLora(
            {name: part for name, part in parts.items() if isinstance(part, nn.Module)},
            deterministic=card.serving.deterministic,
        )
        self.loras = LoraCache(
            pipeline, self.batched_lora, device, lora_files or LoraFileCache(None, 0), _room(card.serving)
        )
        self._restores: list[Callable[[], None]] = [self.loras.close, self.batched_lora.unhook]
        self._intercept(self.pipelines.modules)
        self.pipelines.on_new_modules = self._intercept
        logger.info("model loaded", extra={"model": card.id, "seconds": time.monotonic() - started})

    @property
    def size_bytes(self) -> int:
        """Of all weights on the device."""
        parameters = {id(p): p for module in self.pipelines.modules for p in module.parameters()}
        return sum(p.numel() * p.element_size() for p in parameters.values())

    def unload(self) -> None:
        """Let the memory go. Nobody may use the model any more."""
        for restore in self._restores:
            restore()
        self._restores.clear()
        self.prompts.clear()
        self.pipelines.modules.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _intercept(self, modules: list[nn.Module]) -> None:
        self._restores.append(intercept(modules))
        if self.card.serving.deterministic:
            self._restores.append(pad_small_linears(modules))
