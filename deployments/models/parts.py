"""The parts of a pipeline one at a time: each is read, quantised and placed before the next one is read.

So the memory of the host holds one part at most, and of a part that goes straight to a GPU one file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, get_class_obj_and_candidates
from torch import nn

from deployments.models.gguf_weights import GgufWeights, find_gguf
from deployments.models.missing_libraries import refuse_missing_library
from deployments.models.modular import assemble_modular, is_modular, modular_parts
from deployments.models.offload import offload
from deployments.models.quantise import WEIGHT_BITS, quantise, quantising_bytes
from deployments.models.unmapped import unmapped
from deployments.models.weight_cache import gguf_path
from deployments.models.weight_files import WeightFiles, find_weights
from deployments.planning.gguf_needs import header_of
from deployments.planning.part_plan import CONVOLUTIONAL
from deployments.planning.plan import PartPlan, Plan
from deployments.protocol.card import Weights
from deployments.protocol.errors import ModelFailed
from deployments.protocol.gguf_file import GgufFile

LIBRARIES = ("diffusers", "transformers")  # whose modules are read here


@dataclass(frozen=True, slots=True)
class PartFiles:
    """A module that is not read yet."""

    kind: Any  # its class
    folder: Path
    files: WeightFiles | GgufWeights
    plan: PartPlan
    channels_last: bool = False  # memory format of its convolutions

    @property
    def stored_form(self) -> str | None:
        """The library that has quantised the files; None where they are plain."""
        config = json.loads((self.folder / "config.json").read_bytes())
        stored = config.get("quantization_config")
        return None if stored is None else str(stored.get("quant_method", "a library"))

    @property
    def size_bytes(self) -> int:
        """Of its tensors, in the dtype that they are loaded in; about right where they are quantised here."""
        if isinstance(self.files, GgufWeights):
            return self.files.bytes_as(getattr(torch, self.plan.dtype), self._in_float32)
        kind = self.plan.quantisation
        bits = None if kind is None else WEIGHT_BITS[kind]
        return self.files.bytes_as(getattr(torch, self.plan.dtype), self._in_float32, bits)

    @property
    def whole_bytes(self) -> int:
        """Of its tensors, in its dtype, whatever their form will be."""
        return self.files.bytes_as(getattr(torch, self.plan.dtype), self._in_float32)

    @property
    def loading_bytes(self) -> int:
        """What is on the device beyond `device_bytes` while it is loaded: its largest layer as it is
        quantised there."""
        kind = self.plan.quantisation
        if kind is None or self.plan.placement != "device" or isinstance(self.files, GgufWeights):
            return 0
        return quantising_bytes(kind, getattr(torch, self.plan.dtype), self.files.largest_linear)

    @property
    def held_bytes(self) -> int:
        """What is on the device all the time, as far as is known: of weights that move it is by the plan."""
        return 0 if self.plan.placement == "on_demand" else self.device_bytes

    @property
    def device_bytes(self) -> int:
        """The most of it that is on the device at a time; of weights that move, by the plan, 0 if it does not
        know."""
        if self.plan.placement == "cpu":
            return 0
        if self.plan.placement in ("streamed", "sequential"):
            return self.plan.device_bytes
        as_read = self.plan.placement == "device" and self.plan.quantisation is None
        return self.size_bytes if as_read else self.plan.device_bytes or self.size_bytes

    @property
    def _in_float32(self) -> Collection[str]:
        """Layers that the library keeps in float32 in a module of fewer bits."""
        if self.plan.dtype == "float32":
            return ()
        always = (
            "_keep_in_fp32_modules" if issubclass(self.kind, ModelMixin) else "_keep_in_fp32_modules_strict"
        )
        kept = list(getattr(self.kind, always, None) or ())
        if self.plan.dtype == "float16":
            kept += getattr(self.kind, "_keep_in_fp32_modules", None) or ()
        return kept

    def load(self, device: torch.device) -> nn.Module:
        """The module, where its plan puts it.

        Raises what diffusers and transformers raise for damaged files.
        """
        module = self._read(device)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.plan.placement == "device":
            quantise(module, self.plan, device)
            return module.to(device)
        quantise(module, self.plan)
        offload(module, self.plan, device)
        return module

    def _read(self, device: torch.device) -> nn.Module:
        """The module in its final dtype: on a GPU, if it stays there as it is read, else on the CPU, where
        its weights are those of the mapped file as long as their dtype is."""
        straight = device.type == "cuda" and self.plan.placement == "device" and not self.plan.quantisation
        dtype: torch.dtype = getattr(torch, self.plan.dtype)
        if isinstance(self.files, GgufWeights):
            here = device if self.plan.placement == "device" else torch.device("cpu")
            return self.files.read(dtype, self._in_float32, here)
        name = "torch_dtype" if issubclass(self.kind, ModelMixin) else "dtype"
        copied = straight or not self.files.are_in(dtype)
        with unmapped() if copied and len(self.files.paths) > 1 else nullcontext():
            module: nn.Module = self.kind.from_pretrained(
                self.folder,
                variant=self.files.variant,
                use_safetensors=True,
                device_map={"": device} if straight else None,
                **{name: dtype},
            )
        return module


def find_part(kind: Any, folder: Path, weights: Weights) -> PartFiles:
    """The module of this class alone in a folder, in the dtype of its weights.

    Raises FileNotFoundError for missing files, ModelFailed for a class that needs a library that is not
    installed.
    """
    refuse_missing_library(kind)
    return PartFiles(kind, folder, find_weights(folder, weights.variant), PartPlan("", weights.dtype))


def find_parts(
    folder: Path, plan: Plan, variant: str | None, gguf: Mapping[str, GgufFile] | None = None
) -> dict[str, PartFiles]:
    """By name, the modules of diffusers and transformers that the pipeline in this folder consists of.

    Empty for a pipeline that diffusers does not have. Others of its modules are left to DiffusionPipeline.
    variant: of the files, where a part has them. gguf: by name, files that have the weights instead; they are
    fetched where they are not here, and compared with the parts.
    Raises FileNotFoundError for missing files, also where no part has the variant, AttributeError and
    ValueError for a class that the library does not have, ModelFailed for a GGUF file that is not the part's
    and for a class that needs a library that is not installed.
    """
    parts = {}
    for name, (library, class_name, place) in _places(folder).items():
        kind = _class_of(folder, name, library, class_name) if library in LIBRARIES else object
        if issubclass(kind, nn.Module):
            refuse_missing_library(kind)
            files = _files_of(name, kind, place, variant, gguf or {})
            last = plan.channels_last and name in CONVOLUTIONAL
            parts[name] = PartFiles(kind, place, files, plan.part(name), last)
    for name in (gguf or {}).keys() - parts.keys():
        raise ModelFailed(
            f"weights.gguf names {name}, which the model does not have; it has {', '.join(sorted(parts))}"
        )
    if variant is not None and all(part.files.variant is None for part in parts.values()):
        raise FileNotFoundError(f"no weights in {folder} are of the variant {variant!r}")
    return parts


def _places(folder: Path) -> dict[str, tuple[str, str, Path]]:
    """By name of the component: library, class and the folder with its files."""
    if is_modular(folder):
        return modular_parts(folder)
    index = json.loads((folder / "model_index.json").read_bytes())
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if pipeline is not None:
        refuse_missing_library(pipeline)
    wanted = () if pipeline is None else inspect.signature(pipeline.__init__).parameters
    return {
        name: (str(entry[0]), entry[1], folder / name if (folder / name).is_dir() else folder)
        for name, entry in index.items()
        if name in wanted and isinstance(entry, list)
    }


def _files_of(
    name: str, kind: Any, folder: Path, variant: str | None, gguf: Mapping[str, GgufFile]
) -> WeightFiles | GgufWeights:
    """What the module of this name is read from."""
    if name not in gguf:
        return find_weights(folder, variant)
    return find_gguf(kind, folder, header_of(gguf_path(gguf[name])))


def _class_of(folder: Path, name: str, library: str, class_name: str) -> Any:
    """The class of a component, by its entry in model_index.json."""
    kind, _ = get_class_obj_and_candidates(
        library, class_name, ALL_IMPORTABLE_CLASSES, diffusers.pipelines, False, name, str(folder)
    )
    return kind


def assemble(folder: Path, modules: Mapping[str, nn.Module], plan: Plan, device: torch.device) -> Any:
    """The pipeline in this folder with these modules; what else it consists of is read as DiffusionPipeline
    does, and placed on `device`."""
    if is_modular(folder):
        return assemble_modular(folder, modules, plan, device)
    with _folder_without(folder, _optional(folder, modules)) as rest:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            rest, dtype=getattr(torch, plan.dtype), use_safetensors=True, **modules
        )
    pipeline.register_to_config(_name_or_path=str(folder))
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module) and name not in modules:
            module.to(device)
    return pipeline


def _optional(folder: Path, modules: Iterable[str]) -> list[str]:
    """The modules without which the pipeline can be made, such as the two transformers of Wan's."""
    names = list(modules)
    if not names:
        return []
    index = json.loads((folder / "model_index.json").read_bytes())
    wanted = inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters
    return [name for name in names if wanted[name].default is not inspect.Parameter.empty]


@contextmanager
def _folder_without(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """The folder of a pipeline as if it did not have these modules.

    DiffusionPipeline reads optional modules also where it is given them, and uses those that it read.
    """
    if not names:
        yield folder
        return
    index = json.loads((folder / "model_index.json").read_bytes())
    with TemporaryDirectory() as made:
        rest = Path(made)
        for entry in folder.iterdir():
            if entry.name != "model_index.json":
                (rest / entry.name).symlink_to(entry.resolve())
        (rest / "model_index.json").write_text(json.dumps(index | {name: [None, None] for name in names}))
        yield rest
