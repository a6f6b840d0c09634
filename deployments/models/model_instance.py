"""One model on the device with everything that its requests need; loaded and unloaded as a whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

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
from deployments.protocol.card import ModelCard
from deployments.protocol.request import Task

logger = logging.getLogger(__name__)

MIB = 2**20


class ModelInstance:
    """A card's model on the device, with its caches, previewer and preprocessors."""

    def __init__(
        self,
        card: ModelCard,
        refiner: ModelCard | None,
        device: torch.device,
        *,
        while_serving: bool,
        lora_files: LoraFileReader | None = None,
    ) -> None:
        """Load the model. refiner: the card that card.refiner names; loaded when a request needs it.

        while_serving: whether other threads are working, see load_pipeline.
        lora_files: reads the files of LoRAs that a request only names; without it, requests bring the files.
        Raises ModelUnavailable when the weights cannot be loaded.
        """
        started = time.monotonic()
        serving = card.serving
        pipeline = load_pipeline(card.weights, device, while_serving=while_serving)
        if serving.compile:
            compile_blocks(pipeline)
        self.card = card
        self._device = device
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
        self.prompts = PromptCache(serving.prompt_cache_mib * MIB)
        self.preprocessors = lazy_preprocessors(card.controls, device)
        components = {name: c for name, c in pipeline.components.items() if name in PARTS}
        self.batched_lora = BatchedLora(
            {name: c for name, c in components.items() if isinstance(c, nn.Module)},
            deterministic=serving.deterministic,
        )
        lora_limits = LoraCacheLimits(
            serving.adapters_on_device, serving.adapters_in_memory, serving.adapter_memory_mib * MIB
        )
        self.loras = LoraCache(
            pipeline, self.batched_lora, device, lora_files or LoraFileCache(None, 0), lora_limits
        )
        self._undo: list[Callable[[], None]] = [self.loras.close, self.batched_lora.unhook]
        self._intercept(self.pipelines.modules)
        self.pipelines.on_new_modules = self._intercept
        logger.info("model loaded", extra={"model": card.id, "seconds": time.monotonic() - started})

    @property
    def size_bytes(self) -> int:
        """Size of all weights on the device; weights that modules share count once."""
        parameters = {id(p): p for module in self.pipelines.modules for p in module.parameters()}
        return sum(parameter.nbytes for parameter in parameters.values())

    def unload(self) -> None:
        """Free the memory. The model must not be used any more."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.prompts.clear()
        self.pipelines.modules.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _intercept(self, modules: list[nn.Module]) -> None:
        """Let the calls of these modules park in the engine, whose stream does not wait for this thread's."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._undo.append(intercept(modules))
        if self.card.serving.deterministic:
            self._undo.append(pad_small_linears(modules))


def _pipeline_tasks(card: ModelCard) -> list[Task]:
    """The card's tasks for which a pipeline is needed; frame-wise videos consist of pictures."""
    framewise = {Task.t2v, Task.i2v} if card.videos is not None and card.videos.framewise else set()
    return [Task(task) for task in card.tasks if task not in framewise]
