"""Pictures that the engine's thread did not wait for are those of the pipeline, byte for byte."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.pending_pictures import PendingPictures, can_wait
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Control, ResolvedEdit, ResolvedRequest, Task
from tests.inference import tiny
from tests.inference.families import FAMILIES, PICTURE
from tests.inference.tiny_controls import CONTROLS, flux_controlnets, unet_controlnets

MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (0, 0, 32, 64))
TASKS: dict[Task, tuple[dict[str, Any], tuple[Any, ...]]] = {
    Task.t2i: ({}, ()),
    Task.i2i: ({"edit": ResolvedEdit(image=b"", strength=0.7)}, (PICTURE,)),
    Task.inpaint: ({"edit": ResolvedEdit(image=b"", mask_image=b"", strength=1.0)}, (PICTURE, MASK)),
    Task.refine: ({"edit": ResolvedEdit(image=b"", strength=0.7), "refine": True}, (PICTURE,)),
}
BUILDERS: dict[str, Callable[[], Any]] = {"flux": tiny.flux, "sdxl": tiny.sdxl, "sd": tiny.sd}


def make_request(**changes: Any) -> ResolvedRequest:
    facts = {
        "model": "tiny",
        "prompt": "a fox",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 5,
        "max_sequence_length": 32,
        "num_images": 2,
    }
    return ResolvedRequest(**(facts | changes))


def data(pictures: Sequence[Image.Image]) -> list[tuple[str, tuple[int, int], bytes]]:
    return [(picture.mode, picture.size, picture.tobytes()) for picture in pictures]


def assert_same_pictures(model: DiffusersModel, request: ResolvedRequest, *given: Any) -> None:
    def ignore(_step: int, _steps: int) -> None:
        pass

    plain = model.call(request, ignore, *given)
    (pending,) = model.call(request, ignore, *given, output_type="pending")

    assert isinstance(pending, PendingPictures)
    assert data(pending.pictures()) == data(plain)


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest) -> DiffusersModel:
    pipeline = BUILDERS[request.param]()
    nets = flux_controlnets() if request.param == "flux" else unet_controlnets(pipeline.unet)
    return DiffusersModel(
        pipeline,
        tiny.IMAGE_TASKS,
        controls=CONTROLS,
        load_controlnet=lambda weights: nets[weights.path or ""].float(),
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_the_pictures_of_its_pipeline(model: DiffusersModel, task: Task) -> None:
    changes, given = TASKS[task]

    assert_same_pictures(model, make_request(**changes), *given)


@pytest.mark.parametrize("task", [Task.t2i, Task.inpaint])
def test_a_task_with_a_controlnet_gives_the_pictures_of_its_pipeline(
    model: DiffusersModel, task: Task
) -> None:
    changes, given = TASKS[task]
    controls = (Control(image=b"", type="canny"),)

    assert_same_pictures(
        model, make_request(**changes, controls=controls), *given, *[None] * (2 - len(given)), (PICTURE,)
    )


def test_16_bit_pixels_are_rounded_as_the_pipeline_rounds_them() -> None:
    pixels = torch.rand(3, 3, 5, 7).bfloat16()
    processor = VaeImageProcessor(do_normalize=False)

    assert data(PendingPictures(pixels).pictures()) == data(processor.postprocess(pixels))


def test_an_ensemble_gives_the_pictures_of_its_refiner() -> None:
    base = tiny.sdxl()
    parts = {
        name: part
        for name, part in base.components.items()
        if name not in ("image_encoder", "feature_extractor")
    }
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    model = DiffusersModel(base, [Task.t2i], load_refiner=lambda: refiner)

    assert_same_pictures(model, make_request(refiner=0.5, num_inference_steps=4))


def test_a_watermark_is_on_the_pictures() -> None:
    class Stripe:
        def apply_watermark(self, images: Tensor) -> Tensor:
            images[..., :2] = 1.0
            return images

    pipeline = tiny.sdxl()
    pipeline.watermark = Stripe()

    assert_same_pictures(DiffusersModel(pipeline, [Task.t2i]), make_request())


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.output == "images"])
def test_every_family_gives_the_pictures_of_its_pipeline(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    pipeline = family.build().to(dtype=torch.float32)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    arguments = {**family.requests()[0], "generator": None}

    def call(output_type: str) -> Any:
        own = copy.copy(pipeline)
        vars(own)["scheduler"] = copy.deepcopy(pipeline.scheduler)
        own.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        return own(**arguments | {"generator": generator}, output_type=output_type).images

    with torch.inference_mode():
        plain, pixels = call("pil"), call("pt")

    assert can_wait(pipeline)
    assert data(PendingPictures(pixels).pictures()) == data(plain)


def test_a_pipeline_that_converts_in_its_own_way_keeps_doing_it() -> None:
    class Inverting(VaeImageProcessor):
        def postprocess(self, *args: Any, **kwargs: Any) -> Any:
            return super().postprocess(1 - args[0], *args[1:], **kwargs)

    pipeline = tiny.sd()
    pipeline.image_processor = Inverting(vae_scale_factor=2)
    model = DiffusersModel(pipeline, [Task.t2i])

    pictures = model.call(make_request(), lambda _step, _steps: None, output_type="pending")

    assert not can_wait(pipeline)
    assert all(isinstance(picture, Image.Image) for picture in pictures)


def test_a_picture_that_the_safety_checker_rejects_is_refused() -> None:
    pipeline = tiny.sd()
    pipeline.run_safety_checker = lambda image, _device, _dtype: (image, [False, True])

    with pytest.raises(BadRequest, match="safety checker"):
        DiffusersModel(pipeline, [Task.t2i]).call(
            make_request(), lambda _step, _steps: None, output_type="pending"
        )
