"""How diffusers' pipelines that edit by instruction take their reference pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, _get_task_class
from PIL import Image

from deployments.pipelines.arguments import parameters_of
from deployments.protocol.errors import ModelFailed

# these read a list as a batch of pictures, one for each prompt; all others as the references of one prompt
ONE_PICTURE = frozenset({"FluxKontextPipeline", "QwenImageEditPipeline", "LongCatImageEditPipeline"})


def edit_class(pipeline_class: type, most: int) -> type:
    """The pipeline of diffusers that edits with the components of this one.

    most: reference pictures of a request. Raises ModelFailed where there is none, or it takes fewer.
    """
    found = pipeline_class
    if not _takes_references(found):
        try:
            found = _get_task_class(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, pipeline_class.__name__)
        except ValueError:
            found = pipeline_class
    name = found.__name__
    if not _takes_references(found):
        raise ModelFailed(f"{name} takes no reference pictures; take edit out of the card's tasks")
    if most > 1 and name.replace("Modular", "") in ONE_PICTURE:
        raise ModelFailed(f"{name} takes one reference picture; write max: 1 in the card's references")
    return found


def reference_arguments(
    pipeline_class: type, pictures: Sequence[Image.Image], *, scaled: bool
) -> dict[str, Any]:
    """Arguments for the pipeline's call. scaled: the pictures have the size that the model was trained on."""
    arguments: dict[str, Any] = {"image": pictures[0] if len(pictures) == 1 else list(pictures)}
    if scaled and "_auto_resize" in parameters_of(pipeline_class):  # Kontext's, to about a megapixel
        arguments["_auto_resize"] = False
    return arguments


def _takes_references(pipeline_class: type) -> bool:
    """Whether its call takes pictures, and not as what the result begins with."""
    known = parameters_of(pipeline_class)
    return "image" in known and not {"strength", "mask_image"} & known
