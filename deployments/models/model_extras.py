"""What is loaded beside one model's pipeline: its ControlNets, its refiner and its preprocessors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.call import Seam
from deployments.engine.intercept import intercept
from deployments.models.device_memory import Thing
from deployments.models.extras import Extra, Extras
from deployments.models.hardware import free_unused_memory, references_to, wait_for_kernels
from deployments.models.load import load_controlnet, load_pipeline
from deployments.models.model_memory import MemoryBeside, ModelMemory
from deployments.models.offload import OnCpu, OnDemand, offloaded_part
from deployments.models.preprocessors import LazyPreprocessor, lazy_preprocessors
from deployments.models.row_independence import check_rows
from deployments.pipelines.diffusers_model import DiffusersModel, Need
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.protocol.card import ModelCard, Weights
from deployments.protocol.request import ControlType, ResolvedRequest


@dataclass(slots=True)
class InterceptedModules:
    """Modules whose calls park in the engine."""

    seams: list[Seam] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def add(self, modules: Sequence[nn.Module], device: torch.device, *, exact: bool) -> None:
        """Let the calls of these modules park in the engine, whose stream does not wait for this thread's."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self.undo.append(intercept(modules, self.seams, _weights_of))
        if exact:
            self.undo.append(pad_small_linears(modules))

    def restore(self) -> None:
        """Have them be called as they were before."""
        for undo in self.undo:
            undo()
        self.undo.clear()


class ModelExtras:
    """Loads them for requests, counts them in the account of the memory, and frees them for others."""

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        machine: Machine,
        refiner: ModelCard | None,
        device: torch.device,
        memory: ModelMemory,
        extras: Extras,
    ) -> None:
        """plan: of the model. refiner: the card that card.refiner names. extras: of all models."""
        self._card = card
        self._plan = plan
        self._machine = machine
        self._refiner = refiner
        self._device = device
        self._memory = memory
        self._all = extras
        self._own: dict[Need, Extra] = {}
        self._held: Collection[Thing] = ()  # by the request for which something is loaded
        self._intercepted: dict[Need, InterceptedModules] = {}
        self._pipelines: DiffusersModel | None = None
        in_float16, counted = plan.dtype == "float16", memory.beside("the preprocessor")
        preprocessors = lazy_preprocessors(card.controls, device, counted, in_float16=in_float16)
        self.preprocessors: Mapping[ControlType, LazyPreprocessor] = preprocessors
        self._preprocessors = {kind: self._as_extra(one) for kind, one in preprocessors.items()}

    def use(self, pipelines: DiffusersModel) -> None:
        """The model that they are beside, whose functions for loading are those of this object."""
        self._pipelines = pipelines
        pipelines.on_new_modules = self._take_new

    @property
    def seams(self) -> list[Seam]:
        """Of their modules. May be read from any thread."""
        return [seam for one in list(self._intercepted.values()) for seam in one.seams]

    def using_what_it_needs(
        self, request: ResolvedRequest, held: Sequence[Thing] = ()
    ) -> AbstractAsyncContextManager[None]:
        """Have the ControlNets and the refiner of the request loaded, and kept while the block runs.

        held: what else it has of the device until it ends.
        Raises ModelUnavailable when they cannot be loaded, OutOfMemory and Overloaded where they do not fit,
        BadRequest for those that are not in the card.
        """
        return self._all.using([self._extra_for(need) for need in self._model.needs(request)], held)

    def using_preprocessors(self, request: ResolvedRequest) -> AbstractAsyncContextManager[None]:
        """Have the preprocessors of the request's control pictures loaded, and kept while the block runs."""
        kinds = {control.type for control in request.controls if not control.is_map}
        return self._all.using([extra for kind, extra in self._preprocessors.items() if kind in kinds])

    def close(self) -> None:
        """Restore their modules. The model must not be used any more."""
        for intercepted in self._intercepted.values():
            intercepted.restore()

    def load_controlnet(self, weights: Weights) -> nn.Module:
        """In the dtype of the model, whose latents it reads."""
        admit = self._memory.beside("the ControlNet").admit(weights, self._held)
        in_its_dtype = weights.model_copy(update={"dtype": self._plan.dtype})
        return load_controlnet(in_its_dtype, self._device, admit)

    def load_refiner(self) -> Any:
        """The refiner's pipeline."""
        refiner = self._refiner
        assert refiner is not None, "the model has one"
        plan = plan_of(refiner, self._machine)
        if plan.refusal is not None:
            raise plan.refusal.error()
        admit = self._memory.beside("the refiner").admit(refiner.weights, self._held)
        return load_pipeline(refiner.weights, self._device, plan=plan, admit=admit, licence=refiner.licence)

    @property
    def _model(self) -> DiffusersModel:
        assert self._pipelines is not None, "`use` was called"
        return self._pipelines

    def _extra_for(self, need: Need) -> Extra:
        if need not in self._own:
            memory, weights = self._memory_for(need)
            self._own[need] = Extra(
                f"{memory.what} {weights.path or weights.repo}",
                (memory.thing(weights),),
                partial(self.load, need),
                partial(self._unload, need),
            )
        return self._own[need]

    def _as_extra(self, preprocessor: LazyPreprocessor) -> Extra:
        weights, in_unload_thread = preprocessor.weights[0], self._memory.admission.in_unload_thread
        what = f"the preprocessor {weights.path or weights.repo}"
        unload = partial(in_unload_thread, preprocessor.unload)
        return Extra(what, preprocessor.things, preprocessor.load, unload)

    def _memory_for(self, need: Need) -> tuple[MemoryBeside, Weights]:
        """Where a ControlNet or the refiner is counted, and as which weights."""
        if need == "refiner":
            assert self._refiner is not None, "the model has one"
            return self._memory.beside("the refiner"), self._refiner.weights
        return self._memory.beside("the ControlNet"), need

    def load(self, need: Need, held: Collection[Thing] = ()) -> None:
        """Load a ControlNet or the refiner; after a failure nothing of it is there, and nothing is claimed.

        held: what its request has of the device already. For a thread other than the event loop's.
        """
        self._held = held
        try:
            self._model.load(need)
        except BaseException:
            self._remove(need)
            raise

    async def _unload(self, need: Need) -> None:
        await self._all.before_unload(self._intercepted[need].seams)
        await self._memory.admission.in_unload_thread(partial(self._remove, need))

    def _remove(self, need: Need) -> None:
        """Free a ControlNet or the refiner, whatever of it is there."""
        if (intercepted := self._intercepted.pop(need, None)) is not None:
            intercepted.restore()
            intercepted = None  # it refers to the modules
        wait_for_kernels(self._device)
        modules = self._model.drop(need)
        close_offloaded(modules)
        left = references_to(modules)
        del modules
        free_unused_memory(left)
        memory, weights = self._memory_for(need)
        memory.release(weights)

    def _take_new(self, need: Need, modules: list[nn.Module]) -> None:
        """Use modules of a ControlNet or of the refiner, which may share others with this model."""
        memory, weights = self._memory_for(need)
        memory.keep(weights, modules)
        check_rows(modules, self._card.serving.exact)
        intercepted = self._intercepted[need] = InterceptedModules()
        intercepted.add(modules, self._device, exact=self._card.serving.exact != "off")


def close_offloaded(modules: Sequence[nn.Module]) -> None:
    """Free what offloaded modules have on the device; they must not be used any more."""
    for module in modules:
        if (part := offloaded_part(module)) is not None:
            part.close()


def _weights_of(module: nn.Module) -> OnCpu | OnDemand | None:
    """The weights of a module that are on the device for its calls only, or not at all."""
    part = offloaded_part(module)
    return part if isinstance(part, OnCpu | OnDemand) else None
