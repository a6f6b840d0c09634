"""The arguments of a pipeline's __call__ for a request."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image

from deployments.protocol.request import ResolvedRequest


@cache
def parameters_of(pipeline_class: type) -> frozenset[str]:
    """Names of the parameters of the pipeline's __call__."""
    return frozenset(inspect.signature(pipeline_class.__call__).parameters)


def call_arguments(
    pipeline_class: type,
    request: ResolvedRequest,
    image: Image.Image | torch.Tensor | None,
    mask: Image.Image | None,
    maps: Sequence[Image.Image] = (),
) -> dict[str, Any]:
    """Keyword arguments for the request, only those that this pipeline has parameters for, without those of
    guidance.guidance_arguments.

    image, mask, maps: RGB, L and RGB pictures of the request's size; one map per control picture.
    There is one generator per picture, on the CPU, so that seed + i gives picture i on any device.
    """
    known = parameters_of(pipeline_class)
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "num_images_per_prompt": request.num_images,
        "generator": [_generator(request.seed + i) for i in range(request.num_images)],
        "max_sequence_length": request.max_sequence_length,
        "max_area": request.width * request.height,  # Kontext's own would change width and height
        "image": image,
        "mask_image": mask,
        "strength": request.edit.strength if request.edit else None,
        "output_type": "pil",
    }
    if request.video is not None:
        arguments["num_frames"] = request.video.num_frames
        arguments["frame_rate"] = request.video.fps  # LTX adapts the motion to it
    if maps:
        # text-to-image pipelines of Stable Diffusion take the control picture as image
        arguments["control_image" if "control_image" in known else "image"] = list(maps)
        arguments["controlnet_conditioning_scale"] = [control.weight for control in request.controls]
        arguments["control_guidance_start"] = [control.start for control in request.controls]
        arguments["control_guidance_end"] = [control.end for control in request.controls]
    return {name: value for name, value in arguments.items() if value is not None and name in known}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)
