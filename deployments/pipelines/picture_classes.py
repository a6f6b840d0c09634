"""The pipeline class of diffusers that does a task with the components of another."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    _get_task_class,
)

from deployments.pipelines.arguments import parameters_of
from deployments.protocol.errors import ModelFailed
from deployments.protocol.request import Task

MAPPINGS = {
    Task.t2i: AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    Task.i2i: AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    Task.inpaint: AUTO_INPAINT_PIPELINES_MAPPING,
    Task.refine: AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
}
# what names of classes say of the task, and the argument without which it cannot be done
_SUFFIXES = {Task.t2i: "", Task.i2i: "Img2Img", Task.inpaint: "Inpaint", Task.refine: "Img2Img"}
_NEEDS = {Task.t2i: "prompt", Task.i2i: "image", Task.inpaint: "mask_image", Task.refine: "image"}


def picture_class(pipeline_class: type, task: Task) -> Any:
    """The class for `task`: of diffusers' tables, else the sibling by name (FooImg2ImgPipeline of a
    FooPipeline), else the class itself where it takes what the task is about.

    Raises ModelFailed when diffusers has none.
    """
    name = pipeline_class.__name__
    try:
        return _get_task_class(MAPPINGS[task], name)
    except ValueError:  # not in the tables, as most of the newer ones
        pass
    plain = name.replace("Img2Img", "").replace("Inpaint", "")
    wanted = plain.replace("Pipeline", f"{_SUFFIXES[task]}Pipeline")
    for found in (getattr(diffusers, wanted, None), pipeline_class):
        if isinstance(found, type) and _NEEDS[task] in parameters_of(found):
            return found
    raise ModelFailed(f"diffusers has no {wanted}; take {task.value} out of the card's tasks")
