"""Different LoRAs in one batch: each request equals diffusers' own answer with its adapters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.adapters.mixed import Mix, Mixer, mix
from deployments.adapters.source import PARTS, read
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.row_counts import pad_small_linears
from tests.workshop import tiny
from tests.workshop.loras import file_of, random_lora, with_diffusers
from tests.workshop.together import Together

Loras = Sequence[tuple[bytes, float]]
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters are meant
TOLERANCE = 1e-5  # of the largest latent, in float32
SIZE = {"width": 64, "height": 64}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def call_of(pipeline: Any, seed: int, **arguments: Any) -> Callable[[], Tensor]:
    """The pipeline's latents for a seed, as a request's own call would ask for them."""

    def call() -> Tensor:
        own = type(pipeline)(
            **pipeline.components | {"scheduler": copy_of(pipeline.scheduler)}, **extra(pipeline)
        )
        own.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        given = {"prompt": f"picture {seed}", "generator": generator, "output_type": "latent", **arguments}
        answer = own(**given)
        return answer.frames if hasattr(answer, "frames") else answer.images

    return call


def copy_of(scheduler: Any) -> Any:
    return type(scheduler).from_config(scheduler.config)


def extra(pipeline: Any) -> dict[str, Any]:
    return {"requires_safety_checker": False} if hasattr(pipeline, "safety_checker") else {}


class Loom:
    """A model whose requests bring their own adapters, through the engine."""

    def __init__(self, pipeline: Any, *, deterministic: bool = False) -> None:
        self.pipeline = pipeline
        parts = {
            name: getattr(pipeline, name)
            for name in PARTS
            if isinstance(getattr(pipeline, name, None), nn.Module)
        }
        self.mixer = Mixer(parts, deterministic=deterministic)
        self._modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        self._deterministic = deterministic
        self.forwards = 0
        self.rows = 0

    def owner(self, loras: Loras) -> Mix | None:
        adapters = [(read(file, self.pipeline).factors, weight) for file, weight in loras]
        for factors, _ in adapters:
            self.mixer.hook(factors)
        return mix(adapters) if adapters else None

    def together(
        self, works: Sequence[tuple[Callable[[], Tensor], Mix | None]], rows: int = 16
    ) -> list[Tensor]:
        restores = [intercept(self._modules)]
        if self._deterministic:
            restores.append(pad_small_linears(self._modules))
        scheduler = Together(rows)
        engine = Engine(scheduler, deterministic=self._deterministic)
        fibers = []
        try:
            for work, owner in works:
                fiber = Fiber(work)
                fiber.owner = owner
                fibers.append(fiber)
            for fiber in fibers:
                engine.start(fiber)
            while not engine.idle:
                engine.step()
        finally:
            for restore in reversed(restores):
                restore()
        self.forwards, self.rows = engine.forwards, engine.rows
        for fiber in fibers:
            if fiber.failure is not None:
                raise fiber.failure
        return [fiber.result for fiber in fibers]


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def flux_loras() -> list[Loras]:
    pipeline = tiny.flux()
    one = file_of(random_lora(pipeline, ["transformer"], rank=4, seed=1))
    two = file_of(random_lora(pipeline, ["transformer", "text_encoder"], rank=16, seed=2, only=attention))
    return [[(one, 1.0)], [(two, -0.7)], [], [(one, 0.4), (two, 1.5)]]


def attention(path: str, _layer: nn.Module) -> bool:
    return "attn" in path


def sdxl_loras() -> list[Loras]:
    pipeline = tiny.sdxl()
    convolutions = file_of(random_lora(pipeline, ["unet"], rank=4, seed=1, size=0.3))
    both = file_of(
        random_lora(pipeline, ["unet", "text_encoder", "text_encoder_2"], rank=8, seed=2, only=attention)
    )
    return [[(convolutions, 0.8)], [(both, 1.0)], [], [(both, -1.0), (convolutions, 0.5)]]


def sd_loras() -> list[Loras]:
    pipeline = tiny.sd()
    encoder = file_of(
        random_lora(
            pipeline, ["text_encoder"], rank=2, seed=3, only=lambda path, _: "proj" in path or "fc" in path
        )
    )
    both = file_of(
        random_lora(
            pipeline,
            ["unet", "text_encoder"],
            rank=5,
            seed=4,
            size=0.3,
            only=lambda path, _: "proj_in" in path or "attn" in path or "conv" in path,
        )
    )
    return [[(encoder, 1.0)], [], [(both, 0.9)], [(both, 0.3), (encoder, 0.3)]]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], list[Loras]], dict[str, Any]]] = {
    "flux": (tiny.flux, flux_loras, {**SIZE, "max_sequence_length": 48}),
    "sdxl": (tiny.sdxl, sdxl_loras, {**SIZE, "guidance_scale": 5.0}),
    "sd": (tiny.sd, sd_loras, {**SIZE, "guidance_scale": 5.0}),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_request_equals_diffusers_with_its_adapters_alone(name: str, tmp_path: Path) -> None:
    make, make_loras, arguments = MODELS[name]
    loras, steps = make_loras(), (2, 3, 4, 3)
    loom = Loom(make())
    works = [
        (call_of(loom.pipeline, seed, num_inference_steps=steps[seed], **arguments), loom.owner(own))
        for seed, own in enumerate(loras)
    ]

    answers = loom.together(works)

    assert loom.rows > 1.5 * loom.forwards, "the requests must really share forwards"
    for seed, own in enumerate(loras):
        with torch.inference_mode(False), torch.no_grad():
            alone = with_diffusers(make(), own, tmp_path)
            wanted = call_of(alone, seed, num_inference_steps=steps[seed], **arguments)()
        assert distance(answers[seed], wanted) <= TOLERANCE, f"request {seed}"
