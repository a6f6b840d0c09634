"""From a card to a diffusers pipeline, a ControlNet or a refiner on the device."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DiffusionPipeline, FluxControlNetModel
from torch import nn

from deployments.engine.out_of_memory import load_or_free
from deployments.models.load_errors import explain
from deployments.models.thread_dtype import thread_default_dtype
from deployments.models.weight_cache import local_folder, local_path
from deployments.planning.plan import Plan, everything_on_device
from deployments.protocol.card import Family, Licence, Weights
from deployments.protocol.errors import ModelFailed

logger = logging.getLogger(__name__)

Admit = Callable[[Sequence[nn.Module]], None]

CONTROLNETS: dict[str, Any] = {"sd": ControlNetModel, "sdxl": ControlNetModel, "flux": FluxControlNetModel}


def folder_of(weights: Weights, index: str = "model_index.json") -> Path | None:
    """The local folder, which contains the file `index`; None for weights of the hub.

    Raises ModelFailed naming the folder and the missing file, ModelUnavailable where a download may succeed
    later.
    """
    if weights.path is None:
        return None
    if "://" in weights.path:
        folder = _fetched(weights)
    else:
        folder = local_path(weights)
    if not (folder / index).is_file():
        kind = "diffusers model" if index == "model_index.json" else "model"
        raise ModelFailed(
            f"no weights in {weights.path}: {index} is missing; "
            f"put a {kind} folder there or correct the path in the card"
        )
    return folder


def _fetched(weights: Weights) -> Path:
    try:
        return local_folder(str(weights.path))
    except Exception as error:
        raise explain(error, weights) from error


def load_pipeline(
    weights: Weights,
    device: torch.device,
    *,
    plan: Plan | None = None,
    admit: Admit = lambda _modules: None,
    licence: Licence | None = None,
) -> Any:
    """The pipeline named in the model_index.json of the weights, on `device`. Reads safetensors only.

    plan: dtype, place and form of its parts; None: all on the device, in the dtype of the weights.
    admit: called with the modules before they are moved to the device; what it raises ends the loading.
    licence: of the model, for messages. May be called while other threads are at work.
    Raises ModelFailed when a file is missing or damaged or a licence is not accepted, ModelUnavailable when a
    download may succeed later, OutOfMemory when they do not fit.
    """
    folder = folder_of(weights)
    plan = plan or everything_on_device(weights.dtype)
    return load_or_free(
        f"the model {weights.path or weights.repo}",
        partial(_load_pipeline, weights, plan, folder, device, admit, licence),
        weight_bytes(folder, weights),
        cure="try again when less is running; operators: a larger device, or fewer models on it",
    )


def _load_pipeline(
    weights: Weights,
    plan: Plan,
    folder: Path | None,
    device: torch.device,
    admit: Admit,
    licence: Licence | None,
) -> Any:
    options: dict[str, Any] = {"dtype": getattr(torch, plan.dtype), "use_safetensors": True}
    pipeline = _from_pretrained(DiffusionPipeline, weights, folder, options, licence)
    vae = getattr(pipeline, "vae", None)
    if vae is not None and "force_upcast" in vae.config:
        # img2img pipelines would cast the shared VAE to float32 and back while other requests use it. The
        # option exists for the range of float16; bfloat16 has the range of float32
        vae.register_to_config(force_upcast=False)
    admit([part for part in pipeline.components.values() if isinstance(part, nn.Module)])
    return pipeline if device.type == "cpu" else pipeline.to(device)


def load_controlnet(
    weights: Weights, family: Family, device: torch.device, admit: Admit = lambda _modules: None
) -> nn.Module:
    """A ControlNet for models of `family`, on `device`. May be called while other threads are at work.

    admit: as for load_pipeline.
    Raises what load_pipeline raises, and ModelFailed for a family whose ControlNets are not supported.
    """
    if family not in CONTROLNETS:
        raise ModelFailed(f"ControlNets for {family} are not supported; take controls out of the card")
    options: dict[str, Any] = {"torch_dtype": getattr(torch, weights.dtype), "use_safetensors": True}
    folder = folder_of(weights, "config.json")

    def load() -> nn.Module:
        net: nn.Module = _from_pretrained(CONTROLNETS[family], weights, folder, options)
        admit([net])
        return net.to(device).eval()

    net = load_or_free(
        f"the ControlNet {weights.path or weights.repo}",
        load,
        weight_bytes(folder, weights),
        cure="leave this control picture out, or try again when less is running",
        param="control_type",
    )
    logger.info("ControlNet loaded", extra={"weights": weights.path or weights.repo})
    return net


def weight_bytes(folder: Path | None, weights: Weights) -> int | None:
    """Bytes of the weights in a local folder, in the dtype that they are loaded in; None if not known."""
    if folder is None:
        return None
    dtype: torch.dtype = getattr(torch, weights.dtype)
    try:
        return dtype.itemsize * sum(map(_elements_in, folder.rglob("*.safetensors"))) or None
    except (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError):
        return None  # of a damaged file, which is reported when it is loaded


def _elements_in(file: Path) -> int:
    """Of all tensors: 8 bytes with the size of the header (little endian), then the header as JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _from_pretrained(
    kind: Any, weights: Weights, folder: Path | None, options: dict[str, Any], licence: Licence | None = None
) -> Any:
    """An object of class `kind`, loaded from the folder or from the hub."""
    if weights.repo is not None:
        options = options | {"revision": weights.revision, "variant": weights.variant}
    try:
        with thread_default_dtype():
            return kind.from_pretrained(folder or weights.repo, **options)
    except Exception as error:
        explained = explain(error, weights, licence)
        if explained is error:
            raise
        raise explained from error
