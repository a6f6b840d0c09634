"""From a request to a diffusers call: the class for a task, its arguments, a noise scheduler of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    FluxPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.step_scheduler import StepScheduler
from deployments.pipelines.arguments import call_arguments, parameters_of
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.noise_schedulers import SCHEDULERS, noise_scheduler
from deployments.protocol.card import load_cards
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import ResolvedEdit, ResolvedRequest, Task
from tests.inference import tiny

CARDS = load_cards(Path(__file__).parents[3] / "configs/models")
PICTURE = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (0, 0, 32, 64))
REFINER_PARTS = {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler"}
TASKS = {
    Task.t2i: {},
    Task.i2i: {"edit": ResolvedEdit(image=b"", strength=0.7)},
    Task.inpaint: {"edit": ResolvedEdit(image=b"", mask_image=b"", strength=1.0)},
    Task.refine: {"edit": ResolvedEdit(image=b"", strength=0.7), "refine": True},
}
GIVEN: dict[Task, tuple[Any, ...]] = {
    Task.t2i: (),
    Task.i2i: (PICTURE,),
    Task.inpaint: (PICTURE, MASK),
    Task.refine: (PICTURE,),
}


@pytest.fixture(scope="module")
def flux() -> DiffusersModel:
    return DiffusersModel(tiny.flux(), tiny.IMAGE_TASKS)


@pytest.fixture(scope="module")
def sdxl() -> DiffusersModel:
    return DiffusersModel(tiny.sdxl(), tiny.IMAGE_TASKS)


@pytest.fixture(scope="module")
def sd() -> DiffusersModel:
    return DiffusersModel(tiny.sd(), tiny.IMAGE_TASKS)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> DiffusersModel:
    """The model that a test's parameter names."""
    return request.getfixturevalue(request.param)


every_family = pytest.mark.parametrize("model", ["flux", "sdxl", "sd"], indirect=True)


def make_request(task: Task = Task.t2i, **changes: Any) -> ResolvedRequest:
    facts = {
        "model": "tiny",
        "prompt": "a fox",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 5,
        "max_sequence_length": 32,
    }
    return ResolvedRequest(**(facts | TASKS[task] | changes))


def pixels(image: Image.Image) -> npt.NDArray[np.int16]:
    return np.asarray(image, dtype=np.int16)


def ignore(_step: int, _steps: int) -> None:
    pass


# --- which class ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "prefix"),
    [("flux", "Flux"), ("sdxl", "StableDiffusionXL"), ("sd", "StableDiffusion")],
    indirect=["model"],
)
def test_a_task_picks_the_families_own_pipeline_class(model: DiffusersModel, prefix: str) -> None:
    classes = [type(model.pipeline_for(make_request(task))).__name__ for task in tiny.IMAGE_TASKS]

    image_to_image = f"{prefix}Img2ImgPipeline"
    assert classes == [f"{prefix}Pipeline", image_to_image, f"{prefix}InpaintPipeline", image_to_image]


def test_a_refiner_is_an_image_to_image_pipeline_from_the_start() -> None:
    parts = {name: part for name, part in tiny.sdxl().components.items() if name in REFINER_PARTS}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)

    model = DiffusersModel(refiner, [Task.i2i])

    assert type(model.pipeline_for(make_request(Task.i2i))) is StableDiffusionXLImg2ImgPipeline
    with pytest.raises(BadRequest, match="cannot do t2i"):
        model.pipeline_for(make_request())


@every_family
def test_every_request_has_a_pipeline_of_its_own_over_shared_weights(model: DiffusersModel) -> None:
    first, second, edit = (
        model.pipeline_for(make_request()),
        model.pipeline_for(make_request()),
        model.pipeline_for(make_request(Task.i2i)),
    )

    assert first is not second
    assert first.vae is second.vae is edit.vae
    assert first.text_encoder is edit.text_encoder
    assert set(map(id, model.modules)) >= {id(first.vae), id(first.text_encoder)}


# --- arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [FluxPipeline, StableDiffusionXLPipeline, StableDiffusionPipeline])
def test_a_pipeline_is_called_only_with_parameters_it_has(pipeline: type) -> None:
    arguments = call_arguments(pipeline, make_request(Task.inpaint, negative_prompt="grey"), PICTURE, MASK)

    assert set(arguments) <= parameters_of(pipeline)
    assert not {"image", "mask_image", "strength"} & set(arguments)
    assert None not in arguments.values()


def test_text_length_goes_to_flux_and_not_to_stable_diffusion() -> None:
    assert call_arguments(FluxPipeline, make_request(), None, None)["max_sequence_length"] == 32
    assert "max_sequence_length" not in call_arguments(StableDiffusionPipeline, make_request(), None, None)


def test_an_edit_passes_picture_and_strength() -> None:
    arguments = call_arguments(StableDiffusionXLImg2ImgPipeline, make_request(Task.i2i), PICTURE, None)

    assert arguments["image"] is PICTURE
    assert arguments["strength"] == 0.7


def test_every_picture_of_a_request_has_its_own_generator() -> None:
    generators = call_arguments(FluxPipeline, make_request(num_images=3), None, None)["generator"]

    assert [generator.initial_seed() for generator in generators] == [5, 6, 7]
    assert {generator.device.type for generator in generators} == {"cpu"}


# --- noise schedulers -------------------------------------------------------------------------------------


@every_family
def test_no_two_requests_share_a_noise_scheduler(model: DiffusersModel) -> None:
    schedulers = [model.pipeline_for(make_request(task)).scheduler for task in (*tiny.IMAGE_TASKS, Task.t2i)]

    assert len(set(map(id, schedulers))) == len(schedulers)
    assert len({type(scheduler) for scheduler in schedulers}) == 1


@every_family
def test_a_run_leaves_the_models_own_noise_scheduler_untouched(model: DiffusersModel) -> None:
    before = model.pipeline_for(make_request()).scheduler.timesteps

    model.call(make_request(), ignore)

    assert torch.equal(model.pipeline_for(make_request()).scheduler.timesteps, before)


def test_a_scheduler_is_chosen_by_name_and_keeps_the_models_noise_levels(sdxl: DiffusersModel) -> None:
    own, chosen = (
        sdxl.pipeline_for(make_request()).scheduler,
        sdxl.pipeline_for(make_request(scheduler="dpmpp_2m_karras")).scheduler,
    )

    assert type(chosen).__name__ == "DPMSolverMultistepScheduler"
    assert chosen.config.use_karras_sigmas is True
    assert torch.equal(chosen.betas, own.betas)


def test_an_unknown_scheduler_is_refused_with_the_names_there_are(sdxl: DiffusersModel) -> None:
    with pytest.raises(BadRequest, match="use auto, euler") as caught:
        sdxl.pipeline_for(make_request(scheduler="magic"))

    assert caught.value.param == "scheduler"


SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
OWN: dict[str, Callable[[], Any]] = {  # what the weights of a card bring
    "flux.1-schnell": lambda: tiny.flux(guidance=False).scheduler,
    "flux.1-dev": lambda: tiny.flux().scheduler,
    "sdxl-base-1.0": lambda: tiny.sdxl().scheduler,
    "sdxl-refiner-1.0": lambda: tiny.sdxl().scheduler,
    "stable-diffusion-v1.5": lambda: PNDMScheduler(**SD_NOISE, skip_prk_steps=True),
    "realistic-vision-v6": lambda: PNDMScheduler(**SD_NOISE, skip_prk_steps=True),
    "dreamshaper-8": lambda: DEISMultistepScheduler(**SD_NOISE, solver_type="logrho"),
}
CHOICES = [(card_id, name) for card_id in OWN for name in CARDS[card_id].schedulers]
TARGET = torch.tensor([0.7, -0.3, 0.1, 0.0]).reshape(1, 4, 1, 1)


def perfect_noise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What a model would predict that has seen only TARGET: the noise in x at the level of timestep t."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    level = float(np.interp(float(t), np.arange(1000), alphas.numpy()))
    return ((x - level**0.5 * TARGET) / (1 - level) ** 0.5).to(x.dtype)


def perfect_flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (x - TARGET) / (t / 1000)


def sampled(
    scheduler: Any, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], **schedule: Any
) -> Any:
    """Where `scheduler` ends up with a perfect model."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(20, **schedule)
    x = torch.randn(TARGET.shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(scaled, t), t, x).prev_sample
    return x


@pytest.mark.parametrize(("card_id", "name"), [choice for choice in CHOICES if "flux" not in choice[0]])
def test_every_scheduler_on_a_card_leads_a_perfect_model_to_its_picture(card_id: str, name: str) -> None:
    scheduler = noise_scheduler(name, OWN[card_id]())

    answer = sampled(scheduler, perfect_noise)

    assert torch.allclose(answer, TARGET, atol=0.1)  # some end one noise level before zero: 0.03


@pytest.mark.parametrize(("card_id", "name"), [choice for choice in CHOICES if "flux" in choice[0]])
def test_every_scheduler_on_a_flux_card_leads_a_perfect_flow_to_its_picture(card_id: str, name: str) -> None:
    scheduler = noise_scheduler(name, OWN[card_id]())

    answer = sampled(scheduler, perfect_flow, mu=1.0)

    assert torch.allclose(answer, TARGET, atol=0.01)


FAMILY = {"flux": "flux.1-dev", "sdxl": "sdxl-base-1.0", "sd": "stable-diffusion-v1.5"}
RUNS = [(family, name) for family, card_id in FAMILY.items() for name in CARDS[card_id].schedulers]


@pytest.mark.parametrize(("model", "name"), RUNS, indirect=["model"])
def test_every_scheduler_of_a_family_runs_three_steps(model: DiffusersModel, name: str) -> None:
    (image,) = model.call(make_request(scheduler=name), ignore)

    assert image.size == (64, 64)
    assert pixels(image).std() > 0


def test_every_scheduler_name_is_on_some_card_or_waits_for_a_model_that_takes_it() -> None:
    listed = {name for card in CARDS.values() for name in card.schedulers}

    distilled = {"lcm", "flow_lcm"}
    for_other_pipelines = {"flow_heun", "flow_dpmpp_2m"}  # FLUX's hand them noise levels, which they refuse
    assert set(SCHEDULERS) - listed <= distilled | for_other_pipelines


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name.startswith("flow_")])
def test_every_scheduler_for_flow_leads_a_perfect_flow_to_its_picture(name: str) -> None:
    scheduler = noise_scheduler(name, tiny.flux(guidance=False).scheduler)

    answer = sampled(scheduler, perfect_flow)

    assert torch.allclose(answer, TARGET, atol=0.01)


@pytest.mark.parametrize(
    ("family", "name", "says"),
    [
        (
            "flux.1-dev",
            "ddim",
            "for models that predict noise, and this one predicts flow; use auto or .*flow_euler",
        ),
        (
            "sdxl-base-1.0",
            "flow_euler",
            "for models that predict flow, and this one predicts noise; .*euler_a",
        ),
    ],
)
def test_a_scheduler_for_another_kind_of_model_is_refused_with_those_that_fit(
    family: str, name: str, says: str
) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        noise_scheduler(name, OWN[family]())

    assert caught.value.param == "scheduler"


def test_a_flow_scheduler_keeps_the_models_shift() -> None:
    own = tiny.flux().scheduler

    assert noise_scheduler("flow_unipc", own).config.flow_shift == own.config.shift == 3.0


# --- running ----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("task", tiny.IMAGE_TASKS)
def test_every_task_returns_the_requested_size_and_number(model: DiffusersModel, task: Task) -> None:
    images = model.call(make_request(task, num_images=2), ignore, *GIVEN[task])

    assert [image.size for image in images] == [(64, 64), (64, 64)]
    assert not np.array_equal(pixels(images[0]), pixels(images[1]))


@every_family
def test_every_step_is_reported_once_and_in_order(model: DiffusersModel) -> None:
    steps_seen: list[tuple[int, int]] = []

    model.call(make_request(scheduler="auto"), lambda step, steps: steps_seen.append((step, steps)))

    assert steps_seen == [(1, 3), (2, 3), (3, 3)]


@every_family
@pytest.mark.parametrize("task", [Task.i2i, Task.inpaint])
def test_strength_zero_returns_the_picture_for_every_seed(model: DiffusersModel, task: Task) -> None:
    edit = ResolvedEdit(image=b"", mask_image=b"" if task is Task.inpaint else None, strength=0.0)

    images = model.call(make_request(num_images=2, edit=edit), ignore, *GIVEN[task])

    assert [np.array_equal(pixels(image), pixels(PICTURE)) for image in images] == [True, True]
    assert all(image is not PICTURE for image in images)


@pytest.fixture
def run_together(model: DiffusersModel) -> Iterator[Callable[[list[Task]], list[Image.Image]]]:
    """Runs one request per task at once, their forwards shared."""
    restore = intercept(model.modules)

    def run(tasks: list[Task]) -> list[Image.Image]:
        engine = Engine(StepScheduler(max_batch_size=8))
        fibers = [
            Fiber(lambda task=task: model.call(make_request(task), ignore, *GIVEN[task])[0]) for task in tasks
        ]
        for fiber in fibers:
            engine.start(fiber)
        while not engine.idle:
            engine.step()
        return [fiber.result for fiber in fibers]

    yield run
    restore()


@every_family
def test_text_image_and_inpainting_requests_in_one_batch_equal_each_alone(
    model: DiffusersModel, run_together: Callable[[list[Task]], list[Image.Image]]
) -> None:
    with torch.inference_mode():
        alone = [model.call(make_request(task), ignore, *GIVEN[task])[0] for task in tiny.IMAGE_TASKS]

        together = run_together(tiny.IMAGE_TASKS)

    for image, expected in zip(together, alone, strict=True):
        assert np.abs(pixels(image) - pixels(expected)).max() <= 1
