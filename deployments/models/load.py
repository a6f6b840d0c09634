"""From a card to a diffusers pipeline, a ControlNet or a refiner on the device."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from deployments.engine.out_of_memory import load_or_free
from deployments.models.attention import check_attention, set_attention
from deployments.models.compile import check_compiles
from deployments.models.load_errors import explain
from deployments.models.model_memory import Admit, LoadBytes, held_bytes, weights_bytes
from deployments.models.modular import is_modular
from deployments.models.parts import PartFiles, assemble, find_part, find_parts
from deployments.models.quantise import check_quantisation
from deployments.models.thread_dtype import thread_default_dtype
from deployments.models.vae import check_pieces, prepare_vae, set_pieces
from deployments.models.weight_cache import hub_folder, local_folder, local_path
from deployments.planning.plan import DENOISERS, Plan, everything_on_device
from deployments.protocol.card import Licence, Weights
from deployments.protocol.errors import ModelFailed

logger = logging.getLogger(__name__)


def folder_of(weights: Weights, index: str = "model_index.json") -> Path | None:
    """The local folder, which has the file `index` or that of a Modular pipeline; None for a hub's weights.

    Raises ModelFailed naming the folder and the missing file, ModelUnavailable where a download may succeed
    later.
    """
    if weights.path is None:
        return None
    if "://" in weights.path:
        folder = _fetched(weights)
    else:
        folder = local_path(weights)
    if not (folder / index).is_file() and not (index == "model_index.json" and is_modular(folder)):
        kind = "diffusers model" if index == "model_index.json" else "model"
        raise ModelFailed(
            f"no weights in {weights.path}: {index} is missing; "
            f"put a {kind} folder there or correct the path in the card"
        )
    return folder


def _fetched(weights: Weights) -> Path:
    try:
        return local_folder(str(weights.path), without=tuple(weights.gguf))
    except Exception as error:
        raise explain(error, weights) from error


def load_pipeline(
    weights: Weights,
    device: torch.device,
    *,
    plan: Plan | None = None,
    compiled: bool = False,
    admit: Admit = lambda _size: None,
    licence: Licence | None = None,
) -> Any:
    """The pipeline that the index file of the weights names, on `device`. Reads safetensors only.

    plan: dtype, place and form of its parts; None: all on the device, in the dtype of the weights.
    compiled: its denoiser is going to be compiled.
    admit: called with the bytes on the device before any weight is read, and again with those that were
    placed; what it raises ends the loading.
    licence: of the model, for messages. May be called while other threads are at work.
    Raises ModelFailed when a file is missing or damaged or a licence is not accepted, ModelUnavailable when a
    download may succeed later, OutOfMemory when they do not fit.
    """
    plan = plan or everything_on_device(weights.dtype)
    folder, parts, size = _files_of(weights, plan, device, licence, compiled=compiled)
    return load_or_free(
        f"the model {weights.path or weights.repo}",
        partial(_load_pipeline, weights, plan, folder, parts, device, admit, licence, size),
        size.held,
        cure="try again when less is running; operators: a larger device, or fewer models on it",
    )


def pipeline_bytes(
    weights: Weights,
    device: torch.device,
    *,
    plan: Plan,
    compiled: bool = False,
    licence: Licence | None = None,
) -> LoadBytes:
    """What load_pipeline will ask `admit` for, by the headers of the files. Raises what it raises."""
    _, _, size = _files_of(weights, plan, device, licence, compiled=compiled)
    return size


def _files_of(
    weights: Weights, plan: Plan, device: torch.device, licence: Licence | None, *, compiled: bool
) -> tuple[Path, dict[str, PartFiles], LoadBytes]:
    """The folder of the pipeline, its parts and their bytes, before anything is read."""
    folder = folder_of(weights)
    if plan.attention is not None:
        check_attention(plan.attention, device, getattr(torch, plan.dtype))
    with _explained(weights, licence):
        folder = folder or hub_folder(weights, pipeline=True)
        parts = find_parts(folder, plan, weights.variant, weights.gguf)
        check_quantisation(plan, parts, device)
        if compiled:
            check_compiles(parts)
        _check_vae(parts, plan)
        return folder, parts, _most_bytes(parts)


def _load_pipeline(
    weights: Weights,
    plan: Plan,
    folder: Path,
    parts: Mapping[str, PartFiles],
    device: torch.device,
    admit: Admit,
    licence: Licence | None,
    size: LoadBytes,
) -> Any:
    admit(size)
    with _explained(weights, licence):
        modules = {name: part.load(device) for name, part in parts.items()}
        pipeline = assemble(folder, modules, plan, device)
    vae = getattr(pipeline, "vae", None)
    if isinstance(vae, nn.Module):
        prepare_vae(vae, getattr(torch, plan.dtype))
        set_pieces(vae, tiling=plan.vae_tiling, slicing=plan.vae_slicing)
    if plan.attention is not None:
        denoisers = [pipeline.components.get(name) for name in DENOISERS]
        set_attention(plan.attention, [one for one in denoisers if one is not None])
    modules_there = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    admit(LoadBytes(held_bytes(modules_there)))
    return pipeline


def _check_vae(parts: Mapping[str, PartFiles], plan: Plan) -> None:
    """Raises ModelFailed for a VAE that cannot decode in pieces as planned."""
    if (part := parts.get("vae")) is not None and (plan.vae_tiling or plan.vae_slicing):
        with torch.device("meta"):
            empty = part.kind.from_config(part.kind.load_config(part.folder))
        check_pieces(empty, tiling=plan.vae_tiling, slicing=plan.vae_slicing)


def _most_bytes(parts: Mapping[str, PartFiles]) -> LoadBytes:
    """On the device at a time, as far as is known before they are read: one part at a time is loaded, and
    copied there for a use."""
    each = parts.values()
    held = sum(part.held_bytes for part in each)
    return LoadBytes(
        held + max((part.device_bytes - part.held_bytes for part in each), default=0),
        max((part.loading_bytes for part in each), default=0),
        sum(part.whole_bytes for part in each),
    )


def load_controlnet(weights: Weights, device: torch.device, admit: Admit = lambda _size: None) -> nn.Module:
    """The ControlNet of the class that its config.json names, on `device`. May be called while other threads
    are at work.

    admit: as for load_pipeline.
    Raises what load_pipeline raises, and ModelFailed for what is no ControlNet of diffusers.
    """
    kind = _controlnet_class(weights)
    net: nn.Module = load_or_free(
        f"the ControlNet {weights.path or weights.repo}",
        lambda: load_module(kind, weights, device, admit),
        module_bytes(weights),
        cure="leave this control picture out, or try again when less is running",
        param="control_type",
    )
    logger.info("ControlNet loaded", extra={"weights": weights.path or weights.repo})
    return net


def _controlnet_class(weights: Weights) -> Any:
    folder = folder_of(weights, "config.json")
    with _explained(weights):
        folder = folder or hub_folder(weights, pipeline=False)
        name = str(json.loads((folder / "config.json").read_bytes()).get("_class_name"))
    kind = getattr(diffusers, name, None) if "ControlNet" in name else None
    if kind is None:
        raise ModelFailed(
            f"{weights.path or weights.repo} is a {name}, which is no ControlNet of diffusers; "
            "correct controls in the card"
        )
    return kind


def load_module(kind: Any, weights: Weights, device: torch.device, admit: Admit) -> Any:
    """The module of this class, in the dtype of its weights, on `device`.

    admit: as for load_pipeline. Raises what load_pipeline raises for files.
    """
    folder = folder_of(weights, "config.json")
    with _explained(weights):
        part = find_part(kind, folder or hub_folder(weights, pipeline=False), weights)
        size_bytes = part.size_bytes
    admit(LoadBytes(size_bytes))
    with _explained(weights):
        module = part.load(device)
    admit(LoadBytes(weights_bytes([module])))
    return module.eval()


def load_processor(kind: Any, weights: Weights, **options: Any) -> Any:
    """The object of this class that prepares inputs for the module of these weights.

    Raises what load_pipeline raises for files.
    """
    folder = folder_of(weights, "config.json")
    with _explained(weights):
        return kind.from_pretrained(folder or hub_folder(weights, pipeline=False), **options)


def module_bytes(weights: Weights) -> int | None:
    """Bytes of a module of which a local folder has the weights, in the dtype that they are loaded in; None
    if they are not known, also where the files are damaged."""
    try:
        folder = folder_of(weights, "config.json")
        return None if folder is None else find_part(nn.Module, folder, weights).size_bytes
    except Exception:  # reported when it is loaded
        return None


@contextmanager
def _explained(weights: Weights, licence: Licence | None = None) -> Iterator[None]:
    """In the block libraries read weights: in a default dtype of this thread alone, and with errors that name
    the cause and the cure."""
    try:
        with thread_default_dtype():
            yield
    except Exception as error:
        explained = explain(error, weights, licence)
        if explained is error:
            raise
        raise explained from error
