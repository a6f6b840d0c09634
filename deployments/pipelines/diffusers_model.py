"""A loaded model, which gives every request a pipeline object of its own over shared weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffusers.pipelines.auto_pipeline import _get_task_class
from PIL import Image
from torch import nn

from deployments.pipelines import ensemble, latent_decoder, pending_pictures
from deployments.pipelines.arguments import call_arguments
from deployments.pipelines.controlnet import controlnets
from deployments.pipelines.noise_schedulers import noise_scheduler
from deployments.pipelines.pending_pictures import PendingPictures
from deployments.pipelines.picture_classes import MAPPINGS, picture_class
from deployments.pipelines.position_ids import PositionIds
from deployments.pipelines.reference_pictures import edit_class, reference_arguments
from deployments.pipelines.replay import StateMismatch
from deployments.pipelines.resume import Progress
from deployments.pipelines.step_callback import call_with_steps, step_callback
from deployments.protocol.card import ControlNet, References, Weights
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import ControlType, ResolvedRequest, Task

OnStep = Callable[[int, int], None]  # (finished steps, all steps)


class DiffusersModel:
    """Shared components of one model, and a template pipeline per task.

    ControlNets and the refiner are loaded when a request first needs them.
    """

    def __init__(
        self,
        pipeline: Any,
        tasks: Iterable[Task],
        *,
        controls: Mapping[ControlType, ControlNet] | None = None,
        load_controlnet: Callable[[Weights], nn.Module] | None = None,
        load_refiner: Callable[[], Any] | None = None,
        references: References | None = None,
    ) -> None:
        """controls: of the card, for load_controlnet. load_refiner returns an image-to-image pipeline.
        references: of the card, for the task edit."""
        self._pipeline = pipeline
        self._references = references or References()
        self._templates = {task: _template(pipeline, task, self._references.max) for task in tasks}
        self._controls = dict(controls or {})
        self._load_controlnet = load_controlnet
        self._load_refiner = load_refiner
        self._loading = threading.Lock()
        self._nets: dict[Weights, nn.Module] = {}
        self._control_templates: dict[Task, Any] = {}
        self._refiner: Any = None
        self._position_ids = PositionIds()
        self.modules: list[nn.Module] = _modules(pipeline)
        self.on_new_modules: Callable[[list[nn.Module]], object] = lambda _modules: None

    def prepare(self, request: ResolvedRequest) -> None:
        """Load the ControlNets and the refiner that the request needs; returns at once when they are loaded.

        Call it in a thread of its own: `call` does it too, but then all requests wait for it.
        Raises ModelUnavailable when they cannot be loaded, BadRequest for those that are not in the card.
        """
        if self._is_ready(request):
            return
        with self._loading:
            for control in request.controls:
                self._load_net(control.type)
            if request.refiner is not None and self._refiner is None:
                self._load_refiner_of(request)

    def call(
        self,
        request: ResolvedRequest,
        on_step: OnStep,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        maps: Sequence[Image.Image] = (),
        *,
        references: Sequence[Image.Image] = (),
        output_type: str = "pil",
        progress: Progress | None = None,
        attach: Callable[[Any], None] = lambda _pipeline: None,
    ) -> list[Any]:
        """Call the request's own, unmodified pipeline. Returns num_images pictures in the order of their
        seeds; for a video, one LatentDecoder, whose frames are not decoded yet; with output_type "pending",
        one PendingPictures where the pipeline allows it.

        image, mask, maps: RGB, L and RGB, of the request's size; one map per control picture.
        references: RGB, of any size.
        on_step: called after every step.
        output_type: "latent" returns tensors without decoding; "pending" does not wait for the device.
        progress: updated after every step; if it has a saved state, the call continues from that, and raises
        StateMismatch when it cannot.
        attach: called with the request's pipeline object before that is called.
        With strength 0 the picture is returned unchanged, for which diffusers would raise ("number of steps
        is < 1"). Raises NotFinite when the latents are not finite at the end, BadRequest when the safety
        checker of the model rejects the picture.
        """
        if image is not None and request.edit is not None and request.edit.strength == 0:
            return [image.copy() for _ in range(request.num_images)]
        pipeline = self.pipeline_for(request)
        attach(pipeline)
        self._position_ids.attach(pipeline)
        arguments = call_arguments(type(pipeline), request, image, mask, maps)
        if references:
            scaled = self._references.pixels is not None
            arguments |= reference_arguments(type(pipeline), references, scaled=scaled)
        makes_video = request.task in (Task.t2v, Task.i2v)
        last = pipeline if request.refiner is None else self._refiner  # makes the pictures
        pending = output_type == "pending" and pending_pictures.can_wait(last)
        if output_type == "pending":
            output_type = "pt" if pending else "pil"
        arguments["output_type"] = latent_decoder.output_type(pipeline) if makes_video else output_type
        if makes_video and request.video is not None:
            arguments["num_frames"] = latent_decoder.requested_frames(pipeline, request.video.num_frames)
        progress = progress or Progress()
        if request.refiner is not None:
            refiner = _own_copy(self._refiner, request.scheduler)
            attach(refiner)
            result = ensemble.run(pipeline, refiner, request, arguments, on_step, progress)
        else:
            callback = step_callback(pipeline, arguments.get("generator", []), on_step, progress)
            result = call_with_steps(pipeline, arguments, callback)
        if progress.saved is not None:
            raise StateMismatch("the request has fewer steps")
        if makes_video:
            return [latent_decoder.latent_decoder(pipeline, result.frames)]
        if any(result.get("nsfw_content_detected") or ()):
            raise BadRequest(
                "the safety checker of the model rejected the picture; change the prompt or the seed",
                param="prompt",
            )
        return [PendingPictures(result.images)] if pending else list(result.images)

    def pipeline_for(self, request: ResolvedRequest) -> Any:
        """A shallow copy: weights are shared; state, noise scheduler and ControlNets are of its own."""
        self.prepare(request)
        template = self._templates.get(request.task)
        if template is None:
            raise BadRequest(f"this model cannot do {request.task.value}", param="model")
        if not request.controls:
            return _own_copy(template, request.scheduler)
        pipeline = _own_copy(self._control_template(request.task), request.scheduler)
        nets = [self._nets[self._controls[control.type].weights] for control in request.controls]
        modes = [self._controls[control.type].mode for control in request.controls]
        vars(pipeline)["controlnet"] = controlnets(nets, modes)
        return pipeline

    def _is_ready(self, request: ResolvedRequest) -> bool:
        if request.refiner is not None and self._refiner is None:
            return False
        known = (self._controls.get(control.type) for control in request.controls)
        return all(entry is not None and entry.weights in self._nets for entry in known)

    def _load_net(self, kind: ControlType) -> None:
        entry = self._controls.get(kind)
        if entry is None or self._load_controlnet is None:
            raise BadRequest(f"this model takes no control picture of type {kind}", param="control_type")
        if entry.weights not in self._nets:
            net = self._load_controlnet(entry.weights)
            self._register([net])
            self._nets[entry.weights] = net  # last, because _is_ready reads it without the lock

    def _load_refiner_of(self, request: ResolvedRequest) -> None:
        if self._load_refiner is None:
            raise BadRequest(f"{request.model} has no refiner; leave refiner out", param="refiner")
        refiner = self._load_refiner()
        ensemble.share_equal_parts(refiner, self._pipeline)
        template = _template(refiner, Task.i2i)
        known = {id(module) for module in self.modules}
        self._register([module for module in _modules(refiner) if id(module) not in known])
        self._refiner = template

    def _register(self, modules: list[nn.Module]) -> None:
        self.modules.extend(modules)
        self.on_new_modules(modules)

    def _control_template(self, task: Task) -> Any:
        """The pipeline for the task with ControlNets; every request's copy gets its own nets."""
        if task not in self._control_templates:
            name = type(self._pipeline).__name__.replace("Pipeline", "ControlNetPipeline")
            pipeline_class = _get_task_class(MAPPINGS[task], name)
            net = next(iter(self._nets.values()))
            self._control_templates[task] = _built(pipeline_class, self._pipeline, {"controlnet": net})
        return self._control_templates[task]


def _modules(pipeline: Any) -> list[nn.Module]:
    return [module for module in pipeline.components.values() if isinstance(module, nn.Module)]


def _own_copy(template: Any, scheduler: str) -> Any:
    """A copy with a noise scheduler of its own.

    Set in vars(): DiffusionPipeline.__setattr__ would change the shared config.
    """
    pipeline = copy.copy(template)
    vars(pipeline)["scheduler"] = noise_scheduler(scheduler, template.scheduler, template.device)
    return pipeline


def _template(pipeline: Any, task: Task, most_references: int = 1) -> Any:
    """The pipeline of diffusers for `task`, over the same components."""
    pipeline_class: Any
    if task is Task.edit:
        pipeline_class = edit_class(type(pipeline), most_references)
    elif task in (Task.t2v, Task.i2v):
        pipeline_class = latent_decoder.video_class(type(pipeline), task)
    else:
        pipeline_class = picture_class(type(pipeline), task)
    template = pipeline if pipeline_class is type(pipeline) else _built(pipeline_class, pipeline, {})
    template.set_progress_bar_config(disable=True)
    return template


def _built(pipeline_class: Any, source: Any, additions: dict[str, nn.Module]) -> Any:
    """A pipeline of this class over the components of `source`.

    Built with its constructor: from_pipe would cast the shared modules to float32 (diffusers 0.42).
    """
    modules, options = pipeline_class._get_signature_keys(pipeline_class)  # noqa: SLF001  no public name
    parts = {name: part for name, part in source.components.items() if name in modules} | additions
    config = {name: source.config[name] for name in options if name in source.config}
    built = pipeline_class(**parts, **{k: v for k, v in config.items() if k not in parts})
    built.set_progress_bar_config(disable=True)
    return built
