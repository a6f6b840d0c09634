"""A loaded model, which gives every request a pipeline object of its own over shared weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

from diffusers.pipelines.auto_pipeline import _get_task_class
from PIL import Image
from torch import nn

from deployments.pipelines import ensemble, latent_decoder, pending_pictures
from deployments.pipelines.arguments import call_arguments
from deployments.pipelines.controlnet import controlnets
from deployments.pipelines.given_frames import check_last_image, frame_arguments, i2v_class, keep_size
from deployments.pipelines.guidance import guidance_arguments, is_guided, own_guiders
from deployments.pipelines.noise_schedulers import noise_scheduler
from deployments.pipelines.pending_pictures import PendingPictures
from deployments.pipelines.picture_classes import MAPPINGS, picture_class
from deployments.pipelines.position_ids import PositionIds
from deployments.pipelines.reference_pictures import edit_class, reference_arguments
from deployments.pipelines.replay import StateMismatch
from deployments.pipelines.resume import Progress
from deployments.pipelines.step_callback import call_with_steps, step_callback
from deployments.protocol.card import ControlNet, LastImage, References, Weights
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import ControlType, ResolvedRequest, Task

OnStep = Callable[[int, int], None]  # (finished steps, all steps)
# what a request needs beside the pipeline: a ControlNet, by its weights, or the refiner
Need = Weights | Literal["refiner"]


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
        last_image: LastImage | None = None,
        is_given_refiner: bool = False,
        tiled_vae: nn.Module | None = None,
        tiles: Callable[[int], bool] = lambda _pixels: False,
    ) -> None:
        """controls: of the card, for load_controlnet. load_refiner returns an image-to-image pipeline.
        references: of the card, for the task edit. last_image: of the card's videos, for the task i2v.
        is_given_refiner: the refiner is another model, which `call` is given.
        tiled_vae: the VAE as it decodes in tiles; used for requests of so many pixels that `tiles` says so.
        """
        self._pipeline = pipeline
        self._references = references or References()
        self._templates = {
            task: _template(pipeline, task, self._references.max, last_image) for task in tasks
        }
        self._controls = dict(controls or {})
        self._load_controlnet = load_controlnet
        self._load_refiner = load_refiner
        self._is_given_refiner = is_given_refiner
        # by such a model, what it has as this one does
        self._equal_parts: WeakKeyDictionary[DiffusersModel, dict[str, nn.Module]] = WeakKeyDictionary()
        self._loading = threading.Lock()
        self._control_templates: dict[Task, Any] = {}
        self._beside: dict[Need, Any] = {}  # ControlNets, and a template of the refiner
        self._modules_beside: dict[Need, list[nn.Module]] = {}  # without those that they share
        self.tiled_vae = tiled_vae
        self._tiles = tiles
        self._position_ids = PositionIds()
        # called with the modules of a ControlNet or of the refiner before they are used
        self.on_new_modules: Callable[[Need, list[nn.Module]], object] = lambda _need, _modules: None

    @property
    def modules(self) -> list[nn.Module]:
        """All modules, those that are loaded beside the pipeline last."""
        return [*_modules(self._pipeline), *(m for own in list(self._modules_beside.values()) for m in own)]

    def needs(self, request: ResolvedRequest) -> list[Need]:
        """What the request needs beside the pipeline. Raises BadRequest for what is not in the card."""
        needs: list[Need] = []
        for control in request.controls:
            entry = self._controls.get(control.type)
            if entry is None or self._load_controlnet is None:
                raise BadRequest(
                    f"this model takes no control picture of type {control.type}", param="control_type"
                )
            if entry.weights not in needs:
                needs.append(entry.weights)
        if request.refiner is not None and not self._is_given_refiner:
            if self._load_refiner is None:
                raise BadRequest(f"{request.model} has no refiner; leave refiner out", param="refiner")
            needs.append("refiner")
        return needs

    def prepare(self, request: ResolvedRequest) -> None:
        """Load the ControlNets and the refiner that the request needs; returns at once when they are loaded.

        Call it in a thread of its own: `call` does it too, but then all requests wait for it.
        Raises ModelUnavailable when they cannot be loaded, BadRequest for those that are not in the card.
        """
        for need in self.needs(request):
            if need not in self._beside:
                self.load(need)

    def load(self, need: Need) -> None:
        """Load a ControlNet or the refiner; after a failure it is not there. Raises what the functions for
        loading raise."""
        with self._loading:
            if need in self._beside:
                return
            if need == "refiner":
                assert self._load_refiner is not None, "it was asked for by `needs`"
                refiner = self._load_refiner()
                ensemble.check_same_latents(refiner, self._pipeline)
                ensemble.share_equal_parts(refiner, self._pipeline)
                found = _template(refiner, Task.i2i)
                known = set(map(id, self.modules))
                modules = [module for module in _modules(refiner) if id(module) not in known]
            else:
                assert self._load_controlnet is not None, "it was asked for by `needs`"
                found = self._load_controlnet(need)
                modules = [found]
            self.on_new_modules(need, modules)
            self._modules_beside[need] = modules
            self._beside[need] = found  # last, because `prepare` reads it without the lock

    def drop(self, need: Need) -> list[nn.Module]:
        """Keep nothing of a ControlNet or the refiner, which no request uses; returns its modules."""
        self._beside.pop(need, None)
        return self._modules_beside.pop(need, [])

    def call(
        self,
        request: ResolvedRequest,
        on_step: OnStep,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        maps: Sequence[Image.Image] = (),
        *,
        references: Sequence[Image.Image] = (),
        last_image: Image.Image | None = None,
        output_type: str = "pil",
        progress: Progress | None = None,
        attach: Callable[[Any], None] = lambda _pipeline: None,
        refiner: DiffusersModel | None = None,
    ) -> list[Any]:
        """Call the request's own, unmodified pipeline. Returns num_images pictures in the order of their
        seeds; for a video, one LatentDecoder, whose frames are not decoded yet; with output_type "pending",
        one PendingPictures where the pipeline allows it.

        image, mask, maps: RGB, L and RGB, of the request's size; one map per control picture.
        references: RGB, of any size.
        last_image: the last frame of a video, RGB, of the request's size.
        on_step: called after every step.
        output_type: "latent" returns tensors without decoding; "pending" does not wait for the device.
        progress: updated after every step; if it has a saved state, the call continues from that, and raises
        StateMismatch when it cannot.
        attach: called with the request's pipeline object before that is called.
        refiner: where it is another model; `match_refiner` was called with it.
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
        arguments |= guidance_arguments(pipeline, request)
        if references:
            scaled = self._references.pixels is not None
            arguments |= reference_arguments(type(pipeline), references, scaled=scaled)
        makes_video = request.task in (Task.t2v, Task.i2v)
        last = pipeline if request.refiner is None else self._refining(refiner)  # makes the pictures
        pending = output_type == "pending" and pending_pictures.can_wait(last)
        if output_type == "pending":
            output_type = "pt" if pending else "pil"
        arguments["output_type"] = latent_decoder.output_type(pipeline) if makes_video else output_type
        if makes_video and request.video is not None:
            arguments["num_frames"] = latent_decoder.requested_frames(pipeline, request.video.num_frames)
            keep_size(pipeline, request.width, request.height)
            arguments |= frame_arguments(type(pipeline), image, last_image, request.video.num_frames)
        progress = progress or Progress()
        if request.refiner is not None:
            refining = self._own_copy(last, request)
            attach(refining)
            result = ensemble.run(pipeline, refining, request, arguments, on_step, progress)
        else:
            callback = step_callback(pipeline, arguments.get("generator", []), on_step, progress)
            result = call_with_steps(pipeline, arguments, callback)
        if progress.saved is not None:
            raise StateMismatch("the request has fewer steps")
        if makes_video:
            decoder = latent_decoder.latent_decoder(pipeline, result.frames)
            if request.video is not None and request.video.sound:
                decoder.sound = latent_decoder.sound_of(pipeline, result)
            return [decoder]
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
            return self._own_copy(template, request)
        pipeline = self._own_copy(self._control_template(request), request)
        nets = [self._beside[self._controls[control.type].weights] for control in request.controls]
        modes = [self._controls[control.type].mode for control in request.controls]
        vars(pipeline)["controlnet"] = controlnets(nets, modes)
        return pipeline

    def is_guided(self, request: ResolvedRequest) -> bool:
        """Whether guidance_scale has an effect on this request."""
        template = self._templates.get(request.task)
        return template is None or is_guided(template)

    def tiles(self, request: ResolvedRequest) -> bool:
        """Whether this request is decoded in tiles because of its size."""
        return self.tiled_vae is not None and self._tiles(request.pixels_at_once)

    def _own_copy(self, template: Any, request: ResolvedRequest) -> Any:
        """A copy of the pipeline with a noise scheduler of its own, and the VAE as this size is decoded."""
        pipeline = _own_copy(template, request.scheduler)
        vars(pipeline).update(own_guiders(template, request))
        if self.tiles(request):
            vars(pipeline)["vae"] = self.tiled_vae
        return pipeline

    def match_refiner(self, refiner: DiffusersModel) -> None:
        """Find out which of its parts are equal to this model's, so that both share forwards. It compares all
        values of them, once for each loaded model. Raises ModelFailed for a refiner of other latents."""
        if refiner not in self._equal_parts:
            ensemble.check_same_latents(refiner.base, self._pipeline)
            self._equal_parts[refiner] = ensemble.equal_parts(refiner.base, self._pipeline)

    def _refining(self, given: DiffusersModel | None) -> Any:
        """A template of the refiner. Nothing here keeps that of another model, which may be unloaded."""
        if given is None:
            return self._beside["refiner"]
        template = copy.copy(_template(given.base, Task.i2i))
        vars(template).update(self._equal_parts[given])
        return template

    @property
    def base(self) -> Any:
        """The pipeline that was loaded."""
        return self._pipeline

    def _control_template(self, request: ResolvedRequest) -> Any:
        """The pipeline for the task with ControlNets; every request's copy gets its own nets."""
        task = request.task
        if task not in self._control_templates:
            name = type(self._pipeline).__name__.replace("Pipeline", "ControlNetPipeline")
            pipeline_class = _get_task_class(MAPPINGS[task], name)
            net = self._beside[self._controls[request.controls[0].type].weights]
            template = _built(pipeline_class, self._pipeline, {"controlnet": net})
            vars(template)["controlnet"] = None  # it would keep a net that is unloaded
            self._control_templates[task] = template
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


def _template(
    pipeline: Any, task: Task, most_references: int = 1, last_image: LastImage | None = None
) -> Any:
    """The pipeline of diffusers for `task`, over the same components."""
    pipeline_class: Any
    if task is Task.edit:
        pipeline_class = edit_class(type(pipeline), most_references)
    elif task is Task.i2v:
        pipeline_class = i2v_class(latent_decoder.video_class(type(pipeline), task), last_image)
    elif task is Task.t2v:
        pipeline_class = latent_decoder.video_class(type(pipeline), task)
    else:
        pipeline_class = picture_class(type(pipeline), task)
    template = pipeline if pipeline_class is type(pipeline) else _built(pipeline_class, pipeline, {})
    if task is Task.i2v:
        check_last_image(template, last_image)
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
