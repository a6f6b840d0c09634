"""Lets an unmodified pipeline call pass its first steps at once and go on from a saved state."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.fiber import record_first_outputs, skip_calls
from deployments.pipelines.noise_schedulers import SCHEDULERS
from deployments.pipelines.resume import Progress, RunningCall, SavedCall
from deployments.pipelines.scheduler_state import Tables, decode, watch_tables

# Pipelines that carry nothing from step to step but latents, noise scheduler and generators, and for which
# tests/inference/pipelines/test_resumed_*.py show that they continue to the same bits
RESUMABLE = frozenset(
    """
    AuraFlowPipeline ChromaImg2ImgPipeline ChromaInpaintPipeline ChromaPipeline Flux2KleinPipeline
    FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline FluxControlNetPipeline FluxImg2ImgPipeline
    FluxInpaintPipeline FluxKontextPipeline FluxPipeline HunyuanVideoImageToVideoPipeline
    HunyuanVideoPipeline LTXImageToVideoPipeline LTXPipeline OvisImagePipeline QwenImageEditPlusPipeline
    QwenImageImg2ImgPipeline QwenImageInpaintPipeline QwenImagePipeline StableDiffusion3Img2ImgPipeline
    StableDiffusion3Pipeline StableDiffusionControlNetImg2ImgPipeline
    StableDiffusionControlNetInpaintPipeline StableDiffusionControlNetPipeline
    StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline StableDiffusionPipeline
    StableDiffusionXLControlNetImg2ImgPipeline StableDiffusionXLControlNetInpaintPipeline
    StableDiffusionXLControlNetPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
    StableDiffusionXLPipeline WanImageToVideoPipeline WanPipeline ZImageImg2ImgPipeline
    ZImageInpaintPipeline ZImagePipeline
    """.split()
)
# not FlowMatchLCMScheduler: pipelines give it no generator, so its noise is of no seed
RESUMABLE_SCHEDULERS = frozenset(name for name, _ in SCHEDULERS.values()) - {"FlowMatchLCMScheduler"}
DENOISERS = ("transformer", "transformer_2", "unet", "controlnet")  # components that the loop calls


class StateMismatch(Exception):
    """The pipeline call is not one that the state can be of."""


def can_resume(pipeline: Any) -> bool:
    """Whether a call of this pipeline object can be continued from its state."""
    return type(pipeline).__name__ in RESUMABLE and type(pipeline.scheduler).__name__ in RESUMABLE_SCHEDULERS


def record(pipeline: Any, generators: Sequence[torch.Generator], progress: Progress) -> RunningCall | None:
    """What the state of the pipeline's next call will be read from; None if it cannot be continued.

    generators: of the call. Call it inside the request's fiber, before the pipeline.
    """
    if not can_resume(pipeline):
        return None
    before = progress.saved or progress.call  # of an earlier replica, or of an earlier pipeline object
    call = RunningCall(pipeline, generators, {} if before is None else dict(before.outputs))

    def keep_tables(tables: Tables) -> None:
        call.tables = tables

    def keep_form(seam: str, output: Any) -> None:
        if (form := form_of(output)) is not None:
            call.outputs[seam] = form

    watch_tables(pipeline.scheduler, keep_tables)
    record_first_outputs(denoiser_seams(pipeline) - call.outputs.keys(), keep_form)
    return call


def denoiser_seams(pipeline: Any) -> frozenset[str]:
    """Names of the seams of the modules that the pipeline's loop calls."""
    modules = [part for name, part in vars(pipeline).items() if name in DENOISERS and part is not None]
    nets = [net for module in modules for net in getattr(module, "nets", [module])]  # of several ControlNets
    return frozenset(f"{type(net).__name__}.forward" for net in nets if isinstance(net, nn.Module))


class Replay:
    """The first steps of a pipeline call, which compute nothing, up to that of the state."""

    def __init__(self, call: RunningCall, saved: SavedCall) -> None:
        """Call it inside the request's fiber, before the pipeline."""
        self._call = call
        self._saved = saved
        scheduler = call.pipeline.scheduler
        self._step = vars(scheduler).get("step")
        vars(scheduler)["step"] = _skipped_step(scheduler.step)
        skip_calls({seam: partial(blank_for, form) for seam, form in saved.outputs.items()})

    def check(self, steps: int) -> None:
        """Raises StateMismatch if the state cannot be of a call of so many steps."""
        if steps != self._saved.steps:
            raise StateMismatch(f"it is of {self._saved.steps} steps, and this request has {steps}")

    def end(self) -> None:
        """Have all further steps computed."""
        scheduler = vars(self._call.pipeline.scheduler)
        if self._step is None:
            del scheduler["step"]
        else:
            scheduler["step"] = self._step
        skip_calls(None)

    def restore(self, device: torch.device) -> Tensor:
        """The latents of the state; noise scheduler and generators are set to it. Raises StateMismatch.

        device: of the latents. Not the pipeline's, whose first modules may live on the host.
        """
        saved, call = self._saved, self._call
        names = type(call.pipeline).__name__, type(call.pipeline.scheduler).__name__
        if names != (saved.pipeline, saved.scheduler) or saved.generators != len(call.generators):
            raise StateMismatch(
                f"it is of {saved.pipeline} with {saved.scheduler}, not {' with '.join(names)}"
            )
        if device.type != saved.device:
            raise StateMismatch(f"it is of a {saved.device}, and this is a {device.type}")

        def load(name: str, on_host: bool) -> Tensor:
            return saved.tensors[name] if on_host else saved.tensors[name].to(device)

        values = {name: decode(value, load) for name, value in saved.scheduler_values.items()}
        vars(call.pipeline.scheduler).update(values)
        for index, generator in enumerate(call.generators):
            generator.set_state(saved.tensors[f"generator.{index}"])
        return load("latents", False)


def _skipped_step(step: Any) -> Any:
    """A noise scheduler's `step` that returns the sample it is given."""

    def skipped(_output: Any, _timestep: Any, sample: Tensor, *_args: Any, **options: Any) -> Any:
        if options.get("return_dict", True):
            return types.SimpleNamespace(prev_sample=sample, pred_original_sample=sample)
        return sample, sample

    skipped.__wrapped__ = step  # type: ignore[attr-defined]  # pipelines inspect its signature
    return skipped


def form_of(output: Any) -> Any:
    """The form of nested tensors for JSON, None if it has others than lists, tuples and tensors."""
    if isinstance(output, Tensor):
        return {"dtype": str(output.dtype).removeprefix("torch."), "shape": list(output.shape)}
    if isinstance(output, list | tuple):
        items = [form_of(item) for item in output]
        if any(item is None for item in items):
            return None
        return items if isinstance(output, list) else {"tuple": items}
    return None


def blank_for(form: Any, arguments: Iterable[Any]) -> Any:
    """Zeros of this form, on the device of the arguments."""
    devices = (value.device for value in arguments if isinstance(value, Tensor))
    return blank(form, next(devices, torch.device("cpu")))


def blank(form: Any, device: torch.device) -> Any:
    """Zeros of this form."""
    if isinstance(form, list):
        return [blank(item, device) for item in form]
    if "tuple" in form:
        return tuple(blank(item, device) for item in form["tuple"])
    return torch.zeros(form["shape"], dtype=getattr(torch, form["dtype"]), device=device)
