"""Modules that are built instead of read, and pipelines of them, for the loading code in place of files.

`deployments` puts them where their plan says: its own code reads, quantises and places them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from deployments.models import load, model_loader, weight_files
from deployments.models.parts import PartFiles
from deployments.models.weight_files import WeightFiles
from deployments.planning.plan import PartPlan, Plan
from deployments.protocol.card import Weights
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.forwards import measure
from tests.device_sim.models import CONTROLNETS, PIPELINES


@dataclass(frozen=True, slots=True)
class _Recipe:
    """In place of the files of a module: what it is built from."""

    kind: Any
    config: Any
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors that the files would hold


class Repository:
    """Answers the loading code's calls of from_pretrained, and what it asks for before them."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._recipes: dict[Path, _Recipe] = {}  # by folder
        self._parts: dict[Path, PartFiles] = {}  # by folder
        self._pipelines: dict[Path, Any] = {}  # by folder; their modules are on "meta"

    def install(self) -> None:
        """Have the loading code find what is here instead of files with weights."""
        files: Any = weight_files
        files._tensors = self._tensors
        loading: Any = load
        loading.hub_folder = lambda weights, **_: Path(weights.repo)
        loading.find_parts, loading.find_part = self.find_parts, self.find_part
        loading.assemble = self.assemble
        loading._controlnet_class = lambda weights: CONTROLNETS[str(weights.repo)][0]
        part_files: Any = PartFiles
        part_files.stored_form = None  # plain
        loader: Any = model_loader
        loader.fetch = lambda *_args, **_options: None
        for kind in (diffusers.ModelMixin, transformers.PreTrainedModel):
            without_weights: Any = kind
            without_weights.from_pretrained = classmethod(self.from_pretrained)
        without_weights.init_weights = lambda _self: None

    def find_parts(
        self, folder: Path, plan: Plan, _variant: str | None, _gguf: object = None
    ) -> dict[str, PartFiles]:
        """parts.find_parts."""
        recipes: dict[int, _Recipe] = {}

        def build(kind: Any, config: Any) -> nn.Module:
            with torch.device("meta"):
                module = _built(kind, config)
            recipes[id(module)] = _Recipe(kind, config, _shapes(module))
            return module

        pipeline = self._pipelines[folder] = PIPELINES[str(folder)](build)
        return {
            name: self._add(folder / name, recipes[id(part)], plan.part(name))
            for name, part in pipeline.components.items()
            if isinstance(part, nn.Module)
        }

    def find_part(self, _kind: Any, folder: Path, weights: Weights) -> PartFiles:
        """parts.find_part."""
        kind, config = CONTROLNETS[str(folder)]
        with torch.device("meta"):
            recipe = _Recipe(kind, config, _shapes(_built(kind, config)))
        return self._add(folder, recipe, PartPlan("", weights.dtype))

    def assemble(self, folder: Path, modules: Mapping[str, nn.Module], *_: Any) -> Any:
        """parts.assemble."""
        pipeline = self._pipelines.pop(folder)
        pipeline.register_modules(**modules)
        return pipeline

    def from_pretrained(
        self,
        kind: Any,
        folder: Path,
        *,
        device_map: Any = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> nn.Module:
        """What diffusers and transformers give for the part in this folder: on the device, or on the host
        without values."""
        recipe, wanted = self._recipes[folder], torch_dtype or dtype
        assert recipe.kind is kind
        assert wanted is not None
        device = torch.device("cpu") if device_map is None else device_map[""]
        before = torch.get_default_dtype()
        torch.set_default_dtype(wanted)
        try:
            with torch.device(device), self._device.blanks.making():
                module = _built(kind, recipe.config)
        finally:
            torch.set_default_dtype(before)
        _cast(module, self._parts[folder]._in_float32)
        for weight in [*module.parameters(), *module.buffers()]:
            if weight.is_floating_point():
                weight.requires_grad_(False)
            if device.type == "cuda":
                self._device.memory.hold(weight)
        measure([module], self._device.measurements)
        return module.eval()

    def _add(self, folder: Path, recipe: _Recipe, plan: PartPlan) -> PartFiles:
        self._recipes[folder] = recipe
        part = self._parts[folder] = PartFiles(recipe.kind, folder, WeightFiles((folder,), None), plan)
        return part

    def _tensors(self, folder: Path) -> Iterator[tuple[str, str, Sequence[int]]]:
        """weight_files._tensors."""
        return ((name, "BF16", shape) for name, shape in self._recipes[folder].shapes.items())


def _built(kind: Any, config: Any) -> Any:
    if not isinstance(config, transformers.PreTrainedConfig):
        return kind.from_config(config)
    module = kind(config)
    module.tie_weights()  # such as the embeddings of T5, which init_weights would do
    return module


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of its weights; of those that layers share, one."""
    return {name: tuple(weight.shape) for name, weight in module.named_parameters()}


def _cast(module: nn.Module, in_float32: Collection[str]) -> None:
    """Layers of these names to float32, as both libraries keep them."""
    for path, layer in module.named_modules() if in_float32 else ():
        for name, weight in list(layer.named_parameters(recurse=False)):
            if not set(in_float32).isdisjoint([*path.split("."), name]):
                setattr(layer, name, nn.Parameter(weight.to(torch.float32), requires_grad=False))
