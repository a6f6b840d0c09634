"""One model on the device with everything that its requests need; loaded and unloaded as a whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.call import Seam
from deployments.engine.intercept import intercept
from deployments.lora_format.layer_names import PARTS
from deployments.loras.batched_lora import BatchedLora
from deployments.loras.cache import LoraCache, LoraCacheLimits
from deployments.loras.file_cache import LoraFileCache
from deployments.loras.file_reader import LoraFileReader
from deployments.models.compile import compile_blocks, repeated_blocks
from deployments.models.load import load_controlnet, load_pipeline
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_memory import Admit, LoraMemory, ModelMemory
from deployments.models.offload import OnDemand, offloaded_part
from deployments.models.plain_weights import plain_weight
from deployments.models.preprocessors import lazy_preprocessors
from deployments.models.quantise import saved_bytes
from deployments.models.row_independence import check_rows
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.previews import Previewer
from deployments.pipelines.prompt_cache import PromptCache
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.planning.profile import profile_key
from deployments.protocol.card import ModelCard, Weights
from deployments.protocol.request import Task

logger = logging.getLogger(__name__)

MIB = 2**20


class ModelInstance:
    """A card's model on the device, with its caches, previewer and preprocessors."""

    def __init__(
        self,
        card: ModelCard,
        machine: Machine,
        refiner: ModelCard | None,
        device: torch.device,
        *,
        admission: MemoryAdmission,
        lora_files: LoraFileReader | None = None,
        beside: Sequence[ModelCard] = (),
    ) -> None:
        """Load the model as planned for this machine.

        refiner: the card that card.refiner names; loaded when a request needs it.
        admission: asked before anything is moved to the device.
        lora_files: reads the files of LoRAs that a request only names; without it, requests bring the files.
        beside: cards that may be loaded beside it.
        Raises ModelFailed or ModelUnavailable when the weights cannot be loaded, OutOfMemory when they do not
        fit.
        """
        started = time.monotonic()
        serving = card.serving
        self.card = card
        self.plan = plan_of(card, machine, beside)
        if self.plan.refusal is not None:
            raise self.plan.refusal.error()
        self.profile_key = profile_key(card, self.plan, machine)
        self._machine = machine
        self._memory = ModelMemory(admission, card, self.plan.working_bytes)
        self._device = device
        pipeline = load_pipeline(
            card.weights,
            device,
            plan=self.plan,
            compiled=serving.compile,
            admit=self._memory.admit_pipeline,
            licence=card.licence,
        )
        self._memory.expect_uses(_modules(pipeline), _saved_bytes(pipeline, self.plan))
        check_rows(_modules(pipeline), serving.exact)
        there = tuple(part for part in self.plan.parts if part.name in pipeline.components)
        self.plan = replace(self.plan, parts=there)
        self.quantised = {part.name: part.quantisation for part in there if part.quantisation is not None}
        blocks = repeated_blocks(pipeline) if serving.compile else []
        self.pipelines = DiffusersModel(
            pipeline,
            _pipeline_tasks(card),
            controls=card.controls,
            load_controlnet=self._load_controlnet,
            load_refiner=None if refiner is None else partial(self._load_refiner, refiner),
            references=card.references,
        )
        self.previewer = Previewer.fitted_to(pipeline)
        self.prompts = PromptCache(serving.prompt_cache_mib * MIB)
        self.preprocessors = lazy_preprocessors(
            card.controls,
            device,
            partial(self._memory.admit, what="the preprocessor"),
            in_float16=self.plan.dtype == "float16",
        )
        components = {name: c for name, c in pipeline.components.items() if name in PARTS}
        self.batched_lora = BatchedLora(
            {name: c for name, c in components.items() if isinstance(c, nn.Module)},
            deterministic=serving.exact != "off",
        )
        lora_limits = LoraCacheLimits(
            serving.adapters_on_device, serving.adapters_in_memory, serving.adapter_memory_mib * MIB
        )
        self.loras = LoraCache(
            pipeline,
            self.batched_lora,
            device,
            lora_files or LoraFileCache(None, 0),
            lora_limits,
            LoraMemory(admission, card.id),
            plain_weight,
        )
        self._seams: list[Seam] = []
        self._undo: list[Callable[[], None]] = [
            self.loras.close,
            self.batched_lora.unhook,
            admission.memory.watch("prompts", lambda: self.prompts.bytes),
            admission.memory.watch("stacks", self._stacked_bytes),
            admission.add_evictor(lambda _model: self.loras.make_way(), first=True),
        ]
        self._intercept(self.pipelines.modules)
        if serving.lora != "none":
            self.batched_lora.make_graph_layers(blocks)
        compile_blocks(blocks)
        self.pipelines.on_new_modules = self._take_new
        extra = {"model": card.id, "seconds": time.monotonic() - started, "bytes": self.size_bytes}
        logger.info("model loaded", extra=extra)

    @property
    def size_bytes(self) -> int:
        """Size of all weights on the device; weights that modules share count once."""
        return self._memory.size_bytes

    @property
    def seams(self) -> list[Seam]:
        """Of its modules."""
        return list(self._seams)

    def unload(self) -> None:
        """Free the memory. The model must not be used any more."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        for module in self.pipelines.modules:
            if (part := offloaded_part(module)) is not None:
                part.close()
        self.prompts.clear()
        self.pipelines.modules.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._memory.close()

    def _load_controlnet(self, weights: Weights) -> nn.Module:
        """In the dtype of the model, whose latents it reads."""
        device = self._device
        weights = weights.model_copy(update={"dtype": self.plan.dtype})
        return self._memory.load(
            weights, "the ControlNet", lambda admit: load_controlnet(weights, device, admit)
        )

    def _load_refiner(self, refiner: ModelCard) -> Any:
        """The refiner's pipeline."""
        weights = refiner.weights
        plan = plan_of(refiner, self._machine)
        if plan.refusal is not None:
            raise plan.refusal.error()

        def load(admit: Admit) -> Any:
            return load_pipeline(weights, self._device, plan=plan, admit=admit, licence=refiner.licence)

        return self._memory.load(weights, "the refiner", load)

    def _stacked_bytes(self) -> int:
        """Copies of LoRAs and of prompt embeddings for the last batches, beyond the one copy of each LoRA
        that was claimed with it."""
        beyond = self.batched_lora.stacked_bytes - self.loras.usage.device_bytes
        return max(0, beyond) + sum(seam.stacked_bytes for seam in self._seams)

    def _take_new(self, modules: list[nn.Module]) -> None:
        """Use modules of a ControlNet or of the refiner, which may share others with this model."""
        self._memory.keep(modules)
        check_rows(modules, self.card.serving.exact)
        self._intercept(modules)

    def _intercept(self, modules: list[nn.Module]) -> None:
        """Let the calls of these modules park in the engine, whose stream does not wait for this thread's."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._undo.append(intercept(modules, self._seams, _weights_of))
        if self.card.serving.exact != "off":
            self._undo.append(pad_small_linears(modules))


def _modules(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _weights_of(module: nn.Module) -> OnDemand | None:
    """The weights of a module that are on the device for its calls only."""
    part = offloaded_part(module)
    return part if isinstance(part, OnDemand) else None


def _saved_bytes(pipeline: Any, plan: Plan) -> int:
    """By how much its quantised parts are smaller than they would be in the model's dtype."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return sum(saved_bytes(part, plan.part(name)) for name, part in parts.items())


def _pipeline_tasks(card: ModelCard) -> list[Task]:
    """The card's tasks for which a pipeline is needed; frame-wise videos consist of pictures."""
    framewise = {Task.t2v, Task.i2v} if card.videos is not None and card.videos.framewise else set()
    return [Task(task) for task in card.tasks if task not in framewise]
