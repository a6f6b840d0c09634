"""Modular pipelines in a folder: their parts, and the pipeline of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModularPipeline
from torch import nn

from deployments.pipelines.modular import ModularAdapter, adapt
from deployments.planning.plan import DENOISERS, Plan
from deployments.protocol.errors import ModelFailed

logger = logging.getLogger(__name__)

MODULAR_INDEX = "modular_model_index.json"


def is_modular(folder: Path) -> bool:
    """Whether the pipeline in this folder is a Modular one."""
    return not (folder / "model_index.json").is_file() and (folder / MODULAR_INDEX).is_file()


def modular_parts(folder: Path) -> dict[str, tuple[str, str, Path]]:
    """By name of the component: library and class, and the folder with its files.

    Components whose files are not in the folder are left out: those of other repositories, such as a model
    that rewrites prompts. Raises FileNotFoundError where the denoiser is one of them.
    """
    index = json.loads((folder / MODULAR_INDEX).read_bytes())
    parts, missing = {}, []
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], dict):
            continue
        place = folder / (entry[2].get("subfolder") or "")
        library, kind = entry[2].get("type_hint") or entry[:2]
        if place != folder and place.is_dir():
            parts[name] = (str(library), str(kind), place)
        else:
            missing.append(name)
    if missing:
        logger.info("these components are not in the folder", extra={"names": missing, "folder": str(folder)})
    if not set(parts) & set(DENOISERS):
        raise FileNotFoundError(f"{folder} has no folder {' or '.join(DENOISERS)}")
    return parts


def _pipeline_class(folder: Path) -> Any:
    name = str(json.loads((folder / MODULAR_INDEX).read_bytes()).get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, ModularPipeline):
        raise ModelFailed(
            f"{folder / MODULAR_INDEX} names {name}, which is no Modular pipeline of diffusers "
            f"{diffusers.__version__}; use a model for this version"
        )
    return kind


def assemble_modular(
    folder: Path, modules: Mapping[str, nn.Module], plan: Plan, device: torch.device
) -> ModularAdapter:
    """The Modular pipeline in this folder with these modules; its other components are read, and placed on
    `device`.

    Code that the folder brings is not run. Raises ModelFailed for a component that cannot be read.
    """
    pipeline = _pipeline_class(folder)(pretrained_model_name_or_path=str(folder))
    pipeline.update_components(**modules)
    others = [name for name in modular_parts(folder) if name not in modules]
    pipeline.load_components(names=others, dtype=getattr(torch, plan.dtype))
    unread = [name for name in others if pipeline.components.get(name) is None]
    if unread:  # diffusers only logs it
        raise ModelFailed(
            f"{', '.join(unread)} of the model in {folder} cannot be read: see the log; fetch the "
            "files again, or install the library that the log names"
        )
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in modules:
            part.to(device)
    adapted = adapt(pipeline)
    adapted.set_progress_bar_config(disable=True)
    return adapted
