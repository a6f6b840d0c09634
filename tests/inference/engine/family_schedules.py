"""Schedules of the families with guidance: calls of one row and of two, two calls a step (Wan), videos, LoRAs
of different ranks, and previews."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.fiber import use_lora_set
from deployments.engine.scheduled_job import ScheduledJob
from deployments.loras.lora_set import LoraSet
from deployments.pipelines.previews import Previewer, watch
from deployments.protocol.request import Exactness
from tests.inference.engine.exactness import Answer, Schedules
from tests.inference.families import FAMILIES, PROMPTS, Family
from tests.inference.lora_files import file_of, random_lora
from tests.inference.loras.test_batched_lora import LoraEngine

GUIDED = ("Stable Diffusion 1.5", "SDXL", "Wan", "LTX-Video")
RANKS = ((), (), (4,), (16,), (4, 16))  # of the LoRAs of one request
REQUESTS = 12


@dataclass(frozen=True, eq=False)
class FamilyRequest:
    """A call of a family's pipeline."""

    arguments: Mapping[str, Any]
    seed: int
    lora_set: LoraSet | None
    previews: bool


@dataclass(kw_only=True)
class FamilySchedules(Schedules[FamilyRequest]):
    """Requests to one family."""

    pipeline: Any
    family: Family
    previewer: Previewer | None
    previews_shown: int = 0

    @property
    def modules(self) -> list[nn.Module]:
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def job(self, request: FamilyRequest) -> ScheduledJob:
        size = request.arguments.get("width"), request.arguments.get("height")
        return ScheduledJob(steps=request.arguments["num_inference_steps"], shape=size)

    def work(self, request: FamilyRequest) -> Callable[[], Answer]:
        def call() -> Answer:
            use_lora_set(request.lora_set)
            pipeline = copy.copy(self.pipeline)
            vars(pipeline)["scheduler"] = copy.deepcopy(self.pipeline.scheduler)
            pipeline.set_progress_bar_config(disable=True)
            if request.previews and self.previewer is not None:
                width, height = request.arguments["width"], request.arguments["height"]
                watch(pipeline, width, height, lambda: True, self._show)
            generator = torch.Generator().manual_seed(request.seed)
            result = pipeline(**request.arguments, generator=generator, output_type="latent")
            return Answer(getattr(result, self.family.output), ())

        return call

    def _show(self, latents: Tensor) -> None:
        assert self.previewer is not None
        assert self.previewer.preview(latents).any()
        self.previews_shown += 1


def family_schedules(
    name: str, exact: Exactness, quantise: Callable[[nn.Module], None] = lambda _denoiser: None
) -> FamilySchedules:
    """REQUESTS requests to the family, with and without guidance, LoRAs and previews, in one or two sizes.

    quantise: called with the denoiser before it is used.
    """
    torch.manual_seed(0)
    family, rng = FAMILIES[name], random.Random(name)
    pipeline = family.build()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    denoiser = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    files = {rank: file_of(random_lora(pipeline, [denoiser], rank=rank, seed=rank)) for rank in (4, 16)}
    quantise(getattr(pipeline, denoiser))
    loras = LoraEngine(pipeline, deterministic=exact != "off")
    requests = []
    for seed in range(REQUESTS):
        sizes = [family.size, family.size, family.other_size or family.size]
        arguments = {
            **family.common,
            **rng.choice(sizes),
            "prompt": rng.choice(PROMPTS),
            "num_inference_steps": rng.choice([1, 2, 3, 4, 6, 9]),
        }
        if family.guidance is not None:
            arguments[family.guidance] = rng.choice(family.guidances)
        if family.output == "images":
            arguments["num_images_per_prompt"] = rng.choice([1, 1, 1, 2])
        lora_set = loras.lora_set([(files[rank], rng.choice([-0.7, 1.0])) for rank in rng.choice(RANKS)])
        requests.append(FamilyRequest(arguments, seed, lora_set, rng.random() < 0.3))
    previewer = Previewer.fitted_to(pipeline)
    return FamilySchedules(requests, exact, pipeline=pipeline, family=family, previewer=previewer)
