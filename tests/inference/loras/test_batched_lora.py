"""Different LoRAs in one batch: each request equals diffusers' own answer with its adapters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxControlNetPipeline, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.lora_rows import run_with_lora_rows
from deployments.lora_format.layer_names import PARTS
from deployments.loras import low_rank_products
from deployments.loras.batched_lora import BatchedLora
from deployments.loras.lora_set import LoraSet, combine
from deployments.loras.rescale import rescales
from deployments.loras.source import layer_shapes, read_lora
from tests.inference import tiny
from tests.inference.engine.together import Together
from tests.inference.lora_files import file_of, random_lora, with_diffusers
from tests.inference.lora_trainers import FORMATS, make_file
from tests.inference.tiny_controls import flux_controlnet, unet_controlnet

ROOT = Path(__file__).parents[3]
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


class LoraEngine:
    """A model whose requests bring their own adapters, through the engine."""

    def __init__(self, pipeline: Any, *, deterministic: bool = False) -> None:
        self.pipeline = pipeline
        parts = {
            name: getattr(pipeline, name)
            for name in PARTS
            if isinstance(getattr(pipeline, name, None), nn.Module)
        }
        self.batched_lora = BatchedLora(parts, deterministic=deterministic)
        self._modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        self._deterministic = deterministic
        if deterministic:  # as a replica does, before there are LoRAs
            pad_small_linears(self._modules)
        self.forwards = 0
        self.rows = 0

    def lora_set(self, loras: Loras) -> LoraSet | None:
        adapters = [(read_lora(file, self.pipeline), weight) for file, weight in loras]
        for adapter, _ in adapters:
            self.batched_lora.hook(adapter.factors)
        rescaled = [rescales(one.magnitudes, one.factors, self.batched_lora.parts) for one, _ in adapters]
        return (
            combine([(one.factors, weight) for one, weight in adapters], (), rescaled) if adapters else None
        )

    def together(
        self, works: Sequence[tuple[Callable[[], Tensor], LoraSet | None]], rows: int = 8
    ) -> list[Tensor]:
        restores = [intercept(self._modules)]
        scheduler = Together(rows)
        inner = Engine(scheduler, exact="strict" if self._deterministic else "off")
        fibers = []
        try:
            if self._deterministic:
                _prove(inner, works[0][0])
            before = inner.forwards, inner.rows
            for work, lora_set in works:
                fiber = Fiber(work)
                fiber.lora_set = lora_set
                fibers.append(fiber)
            for fiber in fibers:
                inner.start(fiber)
            while not inner.idle:
                while self._deterministic and len(works) > 1 and inner.run_trial(before_traffic=True):
                    pass  # batch sizes are tried apart from requests
                inner.step()
        finally:
            for restore in reversed(restores):
                restore()
        self.forwards, self.rows = inner.forwards - before[0], inner.rows - before[1]
        for fiber in fibers:
            if fiber.failure is not None:
                raise fiber.failure
        return [fiber.result for fiber in fibers]


def _prove(engine: Engine, work: Callable[[], Tensor]) -> None:
    """Prove batch sizes with the shapes of this work, as a replica's warm-up does."""
    engine.start(Fiber(work))
    while not engine.idle:
        engine.step()
    while engine.run_trial():
        pass


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


def wan() -> Any:
    """The shipped video model; its transformer and text encoder are made in a second."""
    pipeline = DiffusionPipeline.from_pretrained(ROOT / "models/tiny-wan", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wan_loras() -> list[Loras]:
    pipeline = wan()
    one = file_of(random_lora(pipeline, ["transformer"], rank=4, seed=1, only=attention))
    two = file_of(random_lora(pipeline, ["transformer"], rank=8, seed=2, size=0.5))
    return [[(one, 1.0)], [], [(two, 0.6)], [(two, -0.5), (one, 0.5)]]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], list[Loras]], dict[str, Any]]] = {
    "flux": (tiny.flux, flux_loras, {**SIZE, "max_sequence_length": 48}),
    "sdxl": (tiny.sdxl, sdxl_loras, {**SIZE, "guidance_scale": 5.0}),
    "sd": (tiny.sd, sd_loras, {**SIZE, "guidance_scale": 5.0}),
    "wan": (wan, wan_loras, {**SIZE, "num_frames": 5, "guidance_scale": 5.0}),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_request_equals_diffusers_with_its_adapters_alone(name: str, tmp_path: Path) -> None:
    make, make_loras, arguments = MODELS[name]
    loras, steps = make_loras(), (1, 2, 3, 2)
    engine = LoraEngine(make())
    works = [
        (call_of(engine.pipeline, seed, num_inference_steps=steps[seed], **arguments), engine.lora_set(own))
        for seed, own in enumerate(loras)
    ]

    answers = engine.together(works)

    assert engine.rows > 1.5 * engine.forwards, "the requests must really share forwards"
    for seed, own in enumerate(loras):
        with torch.inference_mode(False), torch.no_grad():
            alone = with_diffusers(make(), own, tmp_path)
            wanted = call_of(alone, seed, num_inference_steps=steps[seed], **arguments)()
        assert distance(answers[seed], wanted) <= TOLERANCE, f"request {seed}"


TRAINED = {  # files with layers that diffusers' own loader drops or refuses
    "flux": "flux: kohya sd-scripts with T5",
    "sdxl": "sdxl: kohya sd-scripts and LyCORIS, convolutions too",
    "wan": "wan: musubi-tuner",
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_trainers_file_equals_the_weights_with_its_changes_added(name: str) -> None:
    make, _, arguments = MODELS[name]
    engine, changed, strength = LoraEngine(make()), make(), 0.01
    one = next(one for one in FORMATS if one.id == TRAINED[name])
    file = make_file(one, layer_shapes(engine.pipeline))
    lora_set = engine.lora_set([(file_of(file.tensors), strength)])
    for (part, path), delta in file.deltas.items():
        weight = getattr(changed, part).get_submodule(path).weight
        weight.data += (strength * delta).float().view(weight.shape)
    works = [
        (call_of(engine.pipeline, seed, num_inference_steps=2, **arguments), own)
        for seed, own in enumerate((lora_set, None, lora_set))
    ]

    answers = engine.together(works)

    for seed, pipeline in enumerate((changed, make(), changed)):
        wanted = call_of(pipeline, seed, num_inference_steps=2, **arguments)()
        assert distance(answers[seed], wanted) <= TOLERANCE, f"request {seed}"
    assert distance(answers[0], call_of(make(), 0, num_inference_steps=2, **arguments)()) > 0.01


def noise_picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def controlled_sd() -> Any:
    plain = tiny.sd()
    net = unet_controlnet(plain.unet, 3).float()
    return StableDiffusionControlNetPipeline(
        **plain.components, controlnet=net, requires_safety_checker=False
    )


def controlled_flux() -> Any:
    return FluxControlNetPipeline(**tiny.flux().components, controlnet=flux_controlnet(1).float())


@pytest.mark.parametrize(
    ("make", "make_loras", "arguments"),
    [
        (controlled_sd, sd_loras, {**SIZE, "guidance_scale": 5.0, "image": noise_picture()}),
        (
            controlled_flux,
            flux_loras,
            {**SIZE, "max_sequence_length": 48, "control_image": noise_picture()},
        ),
    ],
    ids=["sd", "flux"],
)
def test_requests_with_a_controlnet_and_adapters_equal_diffusers_alone(
    make: Callable[[], Any], make_loras: Callable[[], list[Loras]], arguments: dict[str, Any], tmp_path: Path
) -> None:
    loras, steps = make_loras(), (2, 1, 2, 2)
    engine = LoraEngine(make())
    works = [
        (call_of(engine.pipeline, seed, num_inference_steps=steps[seed], **arguments), engine.lora_set(own))
        for seed, own in enumerate(loras)
    ]

    answers = engine.together(works)

    assert engine.rows > 1.5 * engine.forwards, "the requests must really share forwards"
    for seed, own in enumerate(loras):
        with torch.inference_mode(False), torch.no_grad():
            alone = with_diffusers(make(), own, tmp_path)
            wanted = call_of(alone, seed, num_inference_steps=steps[seed], **arguments)()
        assert distance(answers[seed], wanted) <= TOLERANCE, f"request {seed}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_with_deterministic_rows_neighbours_and_their_adapters_change_no_bit(
    name: str, dtype: torch.dtype
) -> None:
    make, make_loras, arguments = MODELS[name]
    pipeline, steps = make().to(dtype=dtype), (1, 2, 2, 3, 1, 2)
    untouched = LoraEngine(make().to(dtype=dtype), deterministic=True)
    engine = LoraEngine(pipeline, deterministic=True)
    every = [*make_loras(), make_loras()[0], []]
    lora_sets = [engine.lora_set(own) for own in every]

    def work(seed: int, of: Any) -> Callable[[], Tensor]:
        return call_of(of, seed, num_inference_steps=steps[seed], **arguments)

    alone = [
        engine.together([(work(seed, pipeline), lora_set)])[0] for seed, lora_set in enumerate(lora_sets)
    ]
    plain = [untouched.together([(work(seed, untouched.pipeline), None)])[0] for seed in (2, 5)]

    for chosen in ((0, 1, 2, 3, 4, 5), (5, 3, 2, 1)):
        answers = engine.together([(work(seed, pipeline), lora_sets[seed]) for seed in chosen], rows=8)

        assert engine.rows > engine.forwards
        for seed, answer in zip(chosen, answers, strict=True):
            assert torch.equal(answer, alone[seed]), f"request {seed} among {chosen}"
    for seed, answer in zip((2, 5), plain, strict=True):
        assert torch.equal(answer, alone[seed]), "a replica that never saw a LoRA gives other bits"


def test_what_a_row_gets_does_not_depend_on_the_kernel_for_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every trial of a batched product is taken as failed, so that rows run one by one."""
    engine, loras = LoraEngine(tiny.flux(), deterministic=True), flux_loras()
    lora_sets = [engine.lora_set(own) for own in loras]
    works = [
        (call_of(engine.pipeline, seed, num_inference_steps=2, max_sequence_length=48, **SIZE), lora_set)
        for seed, lora_set in enumerate(lora_sets)
    ]
    expected = engine.together(works)
    engine.batched_lora.unhook()
    trials: list[bool] = []
    monkeypatch.setattr(low_rank_products, "is_batch_invariant", lambda *_: bool(trials.append(False)))
    fresh = LoraEngine(engine.pipeline, deterministic=True)
    for lora_set in lora_sets:
        fresh.batched_lora.hook(lora_set.layers if lora_set is not None else ())

    answers = fresh.together(works)

    assert trials, "linear layers were tried"
    assert all(map(torch.equal, answers, expected))


def test_a_thousand_swaps_leave_the_weights_and_the_bits_as_they_were() -> None:
    pipeline = tiny.flux()
    transformer = pipeline.transformer
    engine = LoraEngine(pipeline, deterministic=True)
    lora_sets = [
        engine.lora_set([(file_of(random_lora(pipeline, ["transformer"], seed=seed, only=attention)), 1.0)])
        for seed in range(8)
    ]
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    layer = transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(1, 16, layer.in_features, generator=torch.Generator().manual_seed(0))
    plain, answers = (
        layer(x),
        [run_with_lora_rows([lora_set], [1], lambda: layer(x)) for lora_set in lora_sets],
    )

    for swap in range(1000):
        answer = run_with_lora_rows([lora_sets[swap % 8]], [1], lambda: layer(x))
        assert torch.equal(answer, answers[swap % 8])

    assert not any(torch.equal(one, plain) for one in answers)
    assert torch.equal(layer(x), plain)
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_adding_factors_into_the_weights_would_change_bits() -> None:
    """Why there is no merged mode: a request would have other bits beside others than alone."""
    pipeline = tiny.flux()
    engine = LoraEngine(pipeline, deterministic=True)
    lora_set = engine.lora_set([(file_of(random_lora(pipeline, ["transformer"], only=attention)), 1.0)])
    assert lora_set is not None
    key = ("transformer", "transformer_blocks.0.attn.to_q")
    layer, (pair,) = pipeline.transformer.get_submodule(key[1]), lora_set.layers[key].parts
    x = torch.randn(1, 64, layer.in_features, generator=torch.Generator().manual_seed(0))

    beside = run_with_lora_rows([lora_set], [1], lambda: layer(x))
    merged = functional.linear(x, layer.weight + pair.scale * pair.b @ pair.a, layer.bias)

    assert torch.allclose(beside, merged, rtol=1e-4, atol=1e-5)
    assert not torch.equal(beside, merged)


def test_memory_of_stacks_is_bounded_and_freed() -> None:
    engine, loras = LoraEngine(tiny.flux()), flux_loras()
    lora_sets = [engine.lora_set(own) for own in loras]

    def run(lora_set: LoraSet | None) -> Tensor:
        return engine.together(
            [(call_of(engine.pipeline, 1, num_inference_steps=1, max_sequence_length=48, **SIZE), lora_set)]
        )[0]

    for lora_set in lora_sets * 2:
        run(lora_set)

    kept = engine.batched_lora.stacked_bytes
    assert 0 < kept <= 4 * max(size_of(lora_set) for lora_set in lora_sets if lora_set is not None)
    for lora_set in lora_sets:
        if lora_set is not None:
            engine.batched_lora.forget(lora_set)
    assert engine.batched_lora.stacked_bytes == 0


def size_of(lora_set: LoraSet) -> int:
    """With ranks padded, as a slot has them."""
    return sum(
        total.rank * (part.a[0].numel() + part.b.shape[0]) * part.a.element_size()
        for total in lora_set.layers.values()
        for part in total.parts[:1]
    )
