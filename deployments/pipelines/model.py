"""A loaded model: for every request a pipeline object of its own over shared weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    _get_task_class,
)
from PIL import Image
from torch import nn

from deployments.pipelines.arguments import call_arguments
from deployments.pipelines.schedulers import noise_scheduler
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import FittedRequest, Task

_MAPPINGS = {
    Task.t2i: AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    Task.i2i: AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    Task.inpaint: AUTO_INPAINT_PIPELINES_MAPPING,
}

OnStep = Callable[[int, int], None]  # (finished steps, all steps)


class Model:
    """Shared components of one model, and a template pipeline per task."""

    def __init__(self, pipeline: Any, tasks: Iterable[Task]) -> None:
        self._templates = {task: _template(pipeline, task) for task in tasks}
        self._own_scheduler = pipeline.scheduler
        self.modules: list[nn.Module] = [
            part for part in pipeline.components.values() if isinstance(part, nn.Module)
        ]

    def call(
        self,
        request: FittedRequest,
        on_step: OnStep,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
    ) -> list[Image.Image]:
        """Run the request's own, unmodified pipeline call; num_images pictures in order of seed.

        image, mask: RGB and L, of the request's size. Strength 0 gives the picture back untouched,
        which diffusers refuses to do ("number of steps is < 1").
        """
        if image is not None and request.edit is not None and request.edit.strength == 0:
            return [image.copy() for _ in range(request.num_images)]
        pipeline = self.pipeline_for(request)

        def at_step_end(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, pipe.num_timesteps)
            return tensors

        arguments = call_arguments(type(pipeline), request, image, mask)
        result = pipeline(**arguments, callback_on_step_end=at_step_end)
        if any(result.get("nsfw_content_detected") or ()):
            raise BadRequest(
                "the model's own safety checker blacked the picture out; change the prompt or the seed",
                param="prompt",
            )
        return list(result.images)

    def pipeline_for(self, request: FittedRequest) -> Any:
        """A shallow copy: weights shared, run-time state and noise scheduler its own.

        Set past DiffusionPipeline.__setattr__, which would rewrite the shared config.
        """
        template = self._templates.get(request.task)
        if template is None:
            raise BadRequest(f"this model cannot do {request.task.value}", param="model")
        pipeline = copy.copy(template)
        vars(pipeline)["scheduler"] = noise_scheduler(request.scheduler, self._own_scheduler)
        return pipeline


def _template(pipeline: Any, task: Task) -> Any:
    """The pipeline of diffusers that does `task`, over the very same components.

    Built by its constructor: from_pipe would cast the shared modules to float32 (diffusers 0.42).
    """
    pipeline_class = _get_task_class(_MAPPINGS[task], type(pipeline).__name__)
    template = pipeline
    if pipeline_class is not type(pipeline):
        modules, options = pipeline_class._get_signature_keys(pipeline_class)
        parts = {name: part for name, part in pipeline.components.items() if name in modules}
        config = {name: pipeline.config[name] for name in options if name in pipeline.config}
        template = pipeline_class(**parts, **{k: v for k, v in config.items() if k not in parts})
    template.set_progress_bar_config(disable=True)
    return template
