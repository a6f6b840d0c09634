"""txt2img and img2img as A1111's clients call them: what they send by default, and what they read."""

import asyncio
import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.serving.api.conftest import KEY
from tests.serving.api.editing import png
from tests.serving.api.fake_model import FakeModel
from tests.serving.fakes import eventually

RED = base64.b64encode(png()).decode()
EDGES = base64.b64encode(png((0, 0, 0))).decode()
SILLY_TAVERN = {  # as its extension for images posts it
    "url": "http://127.0.0.1:7860",
    "auth": "",
    "prompt": "a red fox",
    "negative_prompt": "blurry",
    "sampler_name": "DDIM",
    "scheduler": "normal",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": None,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": None, "forge_additional_modules": []},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
OPEN_WEBUI = {"prompt": "a red fox", "batch_size": 1, "width": 512, "height": 512}
LIBRE_CHAT = {
    "prompt": "a red fox",
    "negative_prompt": "",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 1024,
    "height": 1024,
}


def size(image: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(image))).size


async def drawn(client: httpx.AsyncClient, path: str = "txt2img", **fields: Any) -> dict[str, Any]:
    """The answer, with `info` read."""
    answer = await client.post(f"/sdapi/v1/{path}", json={"prompt": "a red fox", **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found | {"info": json.loads(found["info"])}


def codes(answer: dict[str, Any]) -> set[str]:
    return {warning["code"] for warning in answer["info"]["warnings"]}


def on(model: str) -> dict[str, Any]:
    return {"override_settings": {"sd_model_checkpoint": model}}


@pytest.mark.parametrize("body", [SILLY_TAVERN, OPEN_WEBUI, LIBRE_CHAT], ids=["st", "owui", "librechat"])
@pytest.mark.parametrize("model", ["sketch", "tiny-flux-schnell"])
async def test_default_bodies_of_clients_are_drawn_as_the_model_can(
    client: httpx.AsyncClient, fake_model: FakeModel, body: dict[str, Any], model: str
) -> None:
    chosen = await client.post("/sdapi/v1/options", json={"sd_model_checkpoint": model})

    answer = await drawn(client, **body)

    (request,) = fake_model.requests
    assert chosen.status_code == 200
    assert (request.model, request.prompt) == (model, "a red fox")
    assert size(answer["images"][0]) == (request.width, request.height)
    assert (answer["info"]["width"], answer["info"]["height"]) == (request.width, request.height)
    assert answer["info"]["seed"] == request.seed
    if model == "sketch":
        assert abs(request.width - request.height) <= 16, "nearly a square"
        assert request.width < 512
        assert "size_fitted" in codes(answer)
        assert request.num_inference_steps == body.get("steps", 20)
    else:
        assert {"steps_corrected", "guidance_corrected"} <= codes(answer) or body is OPEN_WEBUI
        assert request.num_inference_steps == 4


async def test_seeds_count_up_over_all_images_of_a_call(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    answer = await drawn(client, seed=41, n_iter=2, batch_size=2, **on("sampled"))
    random = await drawn(client, seed=-1, n_iter=3, **on("sampled"))

    assert answer["info"]["all_seeds"] == [41, 42, 43, 44]
    assert len(answer["images"]) == 4
    assert [request.num_images for request in fake_model.requests] == [2, 2, 2, 1]
    first = random["info"]["seed"]
    assert first >= 0
    assert random["info"]["all_seeds"] == [first, first + 1, first + 2]


async def test_samplers_are_those_of_the_model(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    asked = [
        ({"sampler_name": "Euler a", "scheduler": "automatic"}, "euler_a", set()),
        ({"sampler_index": "DPM++ 2M", "scheduler": "Karras"}, "dpmpp_2m_karras", set()),
        ({"sampler_name": "DPM++ 2M Karras"}, "dpmpp_2m_karras", set()),
        ({"sampler_name": "Euler a", "scheduler": "Karras"}, "euler_a", {"schedule_replaced"}),
        ({"sampler_name": "Restart"}, "auto", {"sampler_replaced"}),
    ]

    for fields, used, warned in asked:
        answer = await drawn(client, **fields, **on("sampled"))
        assert (fake_model.requests[-1].scheduler, codes(answer)) == (used, warned), fields


async def test_an_image_is_the_start_and_a_mask_says_what_is_drawn_anew(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    white = base64.b64encode(png(255, mode="L")).decode()
    start = {"init_images": [f"data:image/png;base64,{RED}"], "denoising_strength": 0.6}

    await drawn(client, "img2img", **start, resize_mode=1, **on("sketch"))
    masked = await drawn(
        client, "img2img", **start, mask=white, inpainting_mask_invert=1, inpainting_fill=0, **on("inpainter")
    )

    image, inpainted = fake_model.requests
    assert (image.task.value, image.fit) == ("i2i", "crop")
    assert image.edit is not None
    assert (image.edit.strength, image.edit.image) == (0.6, png())
    assert inpainted.edit is not None
    assert inpainted.edit.mask_image is not None
    assert (inpainted.task.value, inpainted.edit.feather) == ("inpaint", 4)
    assert Image.open(io.BytesIO(inpainted.edit.mask_image)).getextrema() == (0, 0)
    assert codes(masked) == {"inpainting_fill_ignored"}


async def test_what_has_no_effect_is_said(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    answer = await drawn(
        client,
        prompt="a ((red:1.2) fox:1.1) BREAK in snow",
        styles=["noir"],
        tiling=True,
        subseed_strength=0.2,
        alwayson_scripts={"adetailer": {"args": [True]}},
        refiner_checkpoint="other",
        refiner_switch_at=0.8,
        override_settings={"CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": "inpainter"},
        init_images=[RED],
        mask=RED,
        path="img2img",
    )

    assert fake_model.requests[0].prompt == "a red fox BREAK in snow"
    assert codes(answer) == {
        "prompt_weights_ignored",
        "prompt_syntax_ignored",
        "styles_ignored",
        "tiling_ignored",
        "subseed_strength_ignored",
        "script_ignored",
        "refiner_ignored",
        "override_settings_ignored",
    }


async def test_control_units_become_control_images(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    unit = {"image": EDGES, "module": "canny", "model": "control_canny [a1b2]", "weight": 0.5}
    depth = {"input_image": RED, "module": "none", "model": "depth", "guidance_end": 0.5, "control_mode": 1}
    units = [unit, depth, {"enabled": False}]

    answer = await drawn(client, alwayson_scripts={"ControlNet": {"args": units}}, **on("sketch"))

    edges, map_ = fake_model.requests[0].controls
    assert (edges.type, edges.weight, edges.is_map) == ("canny", 0.5, False)
    assert (map_.type, map_.end, map_.is_map) == ("depth", 0.5, True)
    assert codes(answer) == {"control_mode_ignored"}


async def test_hires_fix_draws_the_enlarged_image_anew(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    fields = {"width": 64, "height": 64, "enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "seed": 9}

    answer = await drawn(client, batch_size=2, hr_second_pass_steps=7, **fields, **on("sketch"))
    without = await drawn(client, **fields, **on("tiny-flux-schnell"))

    _, first, second = fake_model.requests[:3]
    assert [size(image) for image in answer["images"]] == [(128, 128), (128, 128)]
    assert answer["info"]["all_seeds"] == [9, 10]
    assert first.edit is not None
    assert (first.num_inference_steps, first.edit.strength, second.seed) == (7, 0.7, 10)
    assert "upscaler_replaced" in codes(answer)
    assert ("hires_skipped" in codes(without)) == (len(fake_model.requests) == 4)


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        ("txt2img", {"prompt": ""}, "prompt"),
        ("txt2img", {"prompt": "x" * 5_000}, "prompt"),
        ("txt2img", {"steps": 0}, "steps"),
        ("txt2img", {"cfg_scale": -1}, "cfg_scale"),
        ("txt2img", {"width": 99_999}, "width"),
        ("txt2img", {"n_iter": 5, "batch_size": 5}, "n_iter"),
        ("txt2img", {"batch_size": 17}, "batch_size"),
        ("txt2img", {"seed": -2}, "seed"),
        ("txt2img", {"seed": 2**64}, "seed"),
        ("txt2img", {"script_name": "X/Y/Z plot"}, "script_name"),
        ("txt2img", {"enable_hr": True, "hr_scale": 9}, "hr_scale"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "none"}}, "sd_model_checkpoint"),
        ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{}]}}}, "alwayson_scripts.controlnet"),
        ("img2img", {}, "init_images"),
        ("img2img", {"init_images": ["!!"]}, "init_images"),
        ("img2img", {"init_images": [EDGES[:80]]}, "init_images"),
        ("img2img", {"init_images": [RED], "denoising_strength": 2}, "denoising_strength"),
        ("img2img", {"init_images": [RED], "denoising_strength": 0.0001}, "denoising_strength"),
        ("img2img", {"init_images": [RED], "mask": "AAAA", "inpainting_mask_invert": 1}, "mask"),
        ("img2img", {"init_images": [RED], "mask_blur": -1}, "mask_blur"),
    ],
)
async def test_errors_name_the_field_that_the_client_sent(
    client: httpx.AsyncClient, fake_model: FakeModel, path: str, fields: dict[str, Any], field: str
) -> None:
    answer = await client.post(
        f"/sdapi/v1/{path}",
        json={"prompt": "a fox", "override_settings": on("sketch")["override_settings"]} | fields,
    )

    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json().keys() == {"error", "detail", "body", "errors"}
    assert field in answer.json()["detail"]
    assert answer.json()["body"].startswith(field)
    assert fake_model.requests == []


async def test_an_interrupted_call_is_answered_with_what_it_has(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    nothing = (await client.get("/sdapi/v1/progress")).json()
    fake_model.gate.clear()
    call = asyncio.create_task(
        client.post("/sdapi/v1/txt2img", json={"prompt": "a fox", "force_task_id": "mine", **on("sketch")})
    )
    await fake_model.began.wait()

    async def shows_a_preview() -> bool:
        shown = (await client.get("/sdapi/v1/progress", params={"request_id": "mine"})).json()
        return shown["current_image"] is not None and shown["state"]["job_count"] == 1

    await eventually(shows_a_preview)
    others = (await client.get("/sdapi/v1/progress?request_id=theirs&skip_current_image=true")).json()
    await client.post("/sdapi/v1/interrupt")
    fake_model.gate.set()
    answer = await call

    assert (nothing["progress"], nothing["state"]["job_count"]) == (0.0, 0)
    assert others["progress"] == 0.0
    assert answer.status_code == 409
    assert (await client.get("/sdapi/v1/progress")).json()["progress"] == 0.0


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_the_key_is_the_password_of_basic_auth(
    client: httpx.AsyncClient, fake_model: FakeModel
) -> None:
    body = {"prompt": "a fox", **on("sketch")}

    right = await client.post("/sdapi/v1/txt2img", json=body, auth=("weft", KEY))
    wrong = await client.post("/sdapi/v1/txt2img", json=body, auth=("weft", "no key"))

    assert right.status_code == 200
    assert wrong.status_code == 401
    assert wrong.json()["error"] == "unauthorized"
    assert len(fake_model.requests) == 1
