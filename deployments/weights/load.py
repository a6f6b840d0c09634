"""From a card to a diffusers pipeline on the device."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from deployments.protocol.card import Weights
from deployments.protocol.errors import ModelUnavailable

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # relative weights paths stand under the repository


def folder_of(weights: Weights) -> Path | None:
    """The local folder, checked to exist; None for weights of the hub.

    Raises ModelUnavailable naming the folder and what should be there.
    """
    if weights.path is None:
        return None
    folder = Path(weights.path).expanduser()
    folder = folder if folder.is_absolute() else ROOT / folder
    if not (folder / "model_index.json").is_file():
        raise ModelUnavailable(
            f"no weights in {weights.path}: model_index.json is missing; "
            "put a diffusers model folder there or correct weights.path in the card"
        )
    return folder


def load_pipeline(weights: Weights, device: torch.device) -> Any:
    """The pipeline that the weights' own model_index.json names, on `device`; safetensors only.

    Raises ModelUnavailable when a file is missing, a download fails or a licence is not accepted.
    """
    source = folder_of(weights) or weights.repo
    dtype: torch.dtype = getattr(torch, weights.dtype)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if weights.repo is not None:
        options |= {"revision": weights.revision, "variant": weights.variant}
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f"the weights {weights.path or weights.repo} cannot be loaded: {error}"
        ) from error
    vae = getattr(pipeline, "vae", None)
    if vae is not None and "force_upcast" in vae.config:
        # img2img pipelines would cast the shared VAE to float32 and back while others use it; it is
        # there for float16's range, and bfloat16 has float32's
        vae.register_to_config(force_upcast=False)
    return pipeline if device.type == "cpu" else pipeline.to(device)
