"""One model on the device with everything that its requests need; loaded and unloaded as a whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deployments.engine.call import Seam
from deployments.lora_format.layer_names import PARTS
from deployments.loras.batched_lora import BatchedLora
from deployments.loras.cache import LoraCache, LoraCacheLimits
from deployments.loras.file_cache import LoraFileCache
from deployments.loras.file_reader import LoraFileReader
from deployments.models.compile import compile_blocks, repeated_blocks
from deployments.models.device_memory import Thing
from deployments.models.extras import Extras
from deployments.models.load import load_pipeline
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_extras import InterceptedModules, ModelExtras, close_offloaded
from deployments.models.model_memory import LoraMemory, ModelMemory
from deployments.models.offload import OnCpu, offloaded_part
from deployments.models.plain_weights import plain_weight
from deployments.models.quantise import saved_bytes
from deployments.models.row_independence import check_rows
from deployments.models.vae import tiled_beside
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.previews import Previewer
from deployments.pipelines.prompt_cache import PromptCache
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.planning.profile import profile_key
from deployments.protocol.card import ModelCard
from deployments.protocol.request import ResolvedRequest, Task

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
        extras: Extras | None = None,
        lora_files: LoraFileReader | None = None,
        beside: Sequence[ModelCard] = (),
        is_given_refiner: bool = False,
    ) -> None:
        """Load the model as planned for this machine.

        refiner: the card that card.refiner names; loaded when a request needs it.
        admission: asked before anything is moved to the device. extras: of the replica; None: of its own.
        lora_files: reads the files of LoRAs that a request only names; without it, requests bring the files.
        beside: cards that may be loaded beside it.
        is_given_refiner: its refiner is another model of the replica, and not loaded here.
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
        self._memory = ModelMemory(admission, card, self.plan.working_bytes)
        self._device = device
        self._undo: list[Callable[[], None]] = []
        extras = extras or Extras(admission)
        self.extras = ModelExtras(card, self.plan, machine, refiner, device, self._memory, extras)
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
        self._quantised = {part.name: part.form for part in there if part.form is not None}
        self.pipelines = DiffusersModel(
            pipeline,
            _pipeline_tasks(card),
            controls=card.controls,
            load_controlnet=self.extras.load_controlnet,
            load_refiner=None if refiner is None else self.extras.load_refiner,
            is_given_refiner=is_given_refiner,
            references=card.references,
            last_image=None if card.videos is None else card.videos.last_image,
            tiled_vae=tiled_beside(pipeline, self.plan),
            tiles=self.plan.tiles,
        )
        self.extras.use(self.pipelines)
        self.previewer = Previewer.fitted_to(pipeline)
        self.prompts = PromptCache(serving.prompt_cache_mib * MIB)
        self._intercepted = InterceptedModules()
        try:
            self._open(pipeline, admission, lora_files)
        except BaseException:  # the account would keep its caches, and they it
            self.unload()
            raise
        extra = {"model": card.id, "seconds": time.monotonic() - started, "bytes": self.size_bytes}
        logger.info("model loaded", extra=extra)

    def _open(self, pipeline: Any, admission: MemoryAdmission, lora_files: LoraFileReader | None) -> None:
        """Have the model's caches counted, and its modules called through the engine."""
        serving, memory = self.card.serving, admission.memory
        components = {name: c for name, c in pipeline.components.items() if name in PARTS}
        self.batched_lora = BatchedLora(
            {name: c for name, c in components.items() if isinstance(c, nn.Module)},
            deterministic=serving.exact != "off",
        )
        self._undo.append(self.batched_lora.unhook)
        self.loras = LoraCache(
            pipeline,
            self.batched_lora,
            self._device,
            lora_files or LoraFileCache(None, 0),
            LoraCacheLimits(
                serving.adapters_on_device, serving.adapters_in_memory, serving.adapter_memory_mib * MIB
            ),
            LoraMemory(admission, self.card.id),
            plain_weight,
            unchanged=_parts_on_cpu(pipeline),
        )
        self._undo.insert(0, self.loras.close)
        self._undo.append(memory.watch("prompts", lambda: self.prompts.bytes))
        self._undo.append(memory.watch("stacks", self._stacked_bytes))
        self._undo.append(admission.add_evictor(lambda _model: self.loras.make_way(), "loras"))
        self._intercepted.add(self.pipelines.modules, self._device, exact=serving.exact != "off")
        if self.pipelines.tiled_vae is not None:
            self._intercepted.add([self.pipelines.tiled_vae], self._device, exact=False)
        blocks = repeated_blocks(pipeline) if serving.compile else []
        if serving.lora != "none":
            self.batched_lora.make_graph_layers(blocks)
        compile_blocks(blocks)

    @property
    def size_bytes(self) -> int:
        """Size of all weights on the device; weights that modules share count once."""
        return self._memory.size_bytes

    def changes_of(self, request: ResolvedRequest) -> dict[str, object]:
        """What the plan changes in the pictures of this request, for their metadata."""
        changes: dict[str, object] = {"quantised": self._quantised} if self._quantised else {}
        tiles = self.plan.vae_tiling or self.pipelines.tiles(request)
        return changes | {"vae_tiling": True} if tiles else changes

    def loras_of(self, request: ResolvedRequest) -> list[Thing]:
        """Under which the account of the memory has the LoRAs of a request that runs."""
        return [(self.card.id, slot) for slot in self.loras.slots_of(request.loras)]

    @property
    def seams(self) -> list[Seam]:
        """Of its modules, and of those that are loaded beside them."""
        return [*self._intercepted.seams, *self.extras.seams]

    def unload(self) -> None:
        """Restore its modules and drop what it keeps. The model must not be used any more; its memory is free
        when nothing refers to it."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._intercepted.restore()
        self.extras.close()
        close_offloaded(self.pipelines.modules)
        self.prompts.clear()

    def _stacked_bytes(self) -> int:
        """Copies of LoRAs and of prompt embeddings for the last batches, beyond the one copy of each LoRA
        that was claimed with it."""
        beyond = self.batched_lora.stacked_bytes - self.loras.usage.device_bytes
        return max(0, beyond) + sum(seam.stacked_bytes for seam in self.seams)


def _modules(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _parts_on_cpu(pipeline: Any) -> frozenset[str]:
    """Names of the components that compute on the CPU beside a device."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return frozenset(name for name, part in parts.items() if isinstance(offloaded_part(part), OnCpu))


def _saved_bytes(pipeline: Any, plan: Plan) -> int:
    """By how much its quantised parts are smaller than they would be in the model's dtype."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return sum(saved_bytes(part, plan.part(name)) for name, part in parts.items())


def _pipeline_tasks(card: ModelCard) -> list[Task]:
    """The card's tasks for which a pipeline is needed; frame-wise videos consist of pictures."""
    framewise = {Task.t2v, Task.i2v} if card.videos is not None and card.videos.framewise else set()
    return [Task(task) for task in card.tasks if task not in framewise]
