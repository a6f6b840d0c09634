"""Models on a GPU without bfloat16 compute in float16: with the VAE in float32, in batches as alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from deployments.models.device_memory import DeviceMemory
from deployments.models.load import load_pipeline
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_instance import ModelInstance
from deployments.models.vae import prepare_vae
from deployments.pipelines.diffusers_model import DiffusersModel, _built
from deployments.pipelines.finite import check_finite_pixels
from deployments.pipelines.previews import Previewer
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.errors import NotFinite
from deployments.protocol.request import ResolvedEdit, ResolvedRequest, Task
from tests.inference.engine.exactness import Bench
from tests.inference.families import FAMILIES, PICTURE

CARDS = Path(__file__).parents[3] / "configs/models"
T4 = Machine("Tesla T4", "cuda", capability=(7, 5))
HALF, SINGLE = {torch.float16}, {torch.float32}


def in_bfloat16(name: str) -> ModelCard:
    card = load_card(CARDS / f"{name}.yaml")
    return card.model_copy(update={"weights": card.weights.model_copy(update={"dtype": "bfloat16"})})


def loaded(name: str) -> tuple[Any, Plan]:
    card = in_bfloat16(name)
    plan = plan_of(card, T4)
    return load_pipeline(card.weights, torch.device("cpu"), plan=plan), plan


@pytest.fixture(scope="module", params=["tiny-flux-dev", "tiny-sd15", "tiny-sdxl-base"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    return loaded(request.param)[0]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_request(task: Task, seed: int, **changes: Any) -> ResolvedRequest:
    edit = None
    if task is not Task.t2i:
        mask = b"mask" if task is Task.inpaint else None
        edit = ResolvedEdit(image=b"", mask_image=mask, strength=0.7)
    facts = {
        "model": "tiny",
        "prompt": "a red circle",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": seed,
        "max_sequence_length": 32,
        "edit": edit,
    }
    return ResolvedRequest(**(facts | changes))


def test_only_the_vae_is_in_float32(pipeline: Any) -> None:
    dtypes = {
        name: {parameter.dtype for parameter in part.parameters()}
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }

    assert dtypes.pop("vae") == SINGLE
    large = dtypes.pop("text_encoder_2", HALF)  # T5's layers `wo` overflow
    assert large in (HALF, HALF | SINGLE)
    assert set(map(frozenset, dtypes.values())) == {frozenset(HALF)}


def test_layers_of_t5_that_overflow_stay_in_float32() -> None:
    encoder = loaded("tiny-flux-dev")[0].text_encoder_2

    single = {name.split(".")[-2] for name, weight in encoder.named_parameters() if weight.dtype in SINGLE}

    assert single == {"wo"}
    assert encoder.dtype is torch.float16


def test_every_task_in_a_batch_has_the_bits_that_it_has_alone(pipeline: Any) -> None:
    tasks = (Task.t2i, Task.i2i, Task.inpaint)[: 3 if hasattr(pipeline, "transformer") else 2]
    bench = Bench(
        [make_request(tasks[index % len(tasks)], index) for index in range(5)],
        exact="strict",
        model=DiffusersModel(pipeline, tasks),
        decode=True,
    )

    fibers = bench.together(bench.requests)

    for request, fiber in zip(bench.requests, fibers, strict=True):
        assert fiber.failure is None
        assert fiber.result.latents.isfinite().all()
        assert fiber.result.same_bits(bench.expected(request))
    assert {weight.dtype for weight in pipeline.vae.parameters()} == SINGLE, "no pipeline casts it"


def test_the_vae_gives_latents_of_the_pipeline_and_takes_them(pipeline: Any) -> None:
    vae, picture = pipeline.vae, torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64).half()

    latents = vae.encode(picture).latent_dist.mode()

    assert latents.dtype is torch.float16
    assert vae.decode(latents).sample.dtype is torch.float32
    exact = vae.float().decode(latents.float()).sample
    assert torch.equal(vae.decode(latents).sample, exact)
    assert Previewer.fitted_to(pipeline) is not None


def test_a_pipeline_cannot_cast_the_vae_that_others_use(pipeline: Any) -> None:
    assert pipeline.vae.to(torch.float16).dtype is torch.float32


def test_a_control_model_is_in_the_dtype_of_its_model() -> None:
    card = in_bfloat16("tiny-sd15")
    instance = ModelInstance(
        card, T4, None, torch.device("cpu"), admission=MemoryAdmission(DeviceMemory(lambda: None))
    )

    net = instance.extras.load_controlnet(card.controls["canny"].weights)

    assert {parameter.dtype for parameter in net.parameters()} == HALF
    instance.unload()


def test_pixels_that_are_no_numbers_are_an_error_that_names_the_cure() -> None:
    with pytest.raises(NotFinite, match=r"float16, whose largest number is 65504.*dtype float32"):
        check_finite_pixels(torch.tensor([float("nan")], dtype=torch.float16))
    with pytest.raises(NotFinite, match="another seed"):
        check_finite_pixels(torch.tensor([float("inf")]))


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_decodes_with_its_vae_in_float32(name: str) -> None:
    family = FAMILIES[name]
    pipeline = family.build()
    for part_name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.eval().to(torch.float32 if part_name == "vae" else torch.float16)
    prepare_vae(pipeline.vae, torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    calls = [(pipeline, family.requests()[0])]
    if family.image_class is not None:
        from_picture = _built(getattr(diffusers, family.image_class), pipeline, {})
        picture = PICTURE.resize((family.size["width"], family.size["height"]))
        calls.append((from_picture, {**calls[0][1], "image": picture, "num_inference_steps": 4}))

    for own, arguments in calls:
        generator = torch.Generator().manual_seed(0)
        decoded = getattr(own(**arguments, generator=generator, output_type="pt"), family.output)
        assert torch.isfinite(torch.as_tensor(decoded)).all()
        assert pipeline.vae.dtype is torch.float32
