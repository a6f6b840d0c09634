"""The package webuiapi, unchanged, and the calls with which A1111's clients look around."""

import asyncio
import base64
import io
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
import pytest
import webuiapi
from PIL import Image

from deployments.media.still import encode
from deployments.protocol.request import OutputOptions
from serve_app.api.a1111.png_text import png_texts
from tests.serving.api.conftest import KEY
from tests.serving.api.editing import png
from tests.serving.api.fake_model import FakeModel

T = TypeVar("T")
WIDE = base64.b64encode(png((1, 2, 3), (4000, 200))).decode()
SETTINGS = "a red fox\nNegative prompt: blurry\nSteps: 4, Sampler: auto, Size: 64x64, Version: weft 1"


async def called(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """In a thread: webuiapi blocks."""
    return await asyncio.to_thread(function, *args, **kwargs)


@pytest.fixture
async def api(address: str) -> webuiapi.WebUIApi:
    host, port = address.split(":")
    return await called(webuiapi.WebUIApi, host=host, port=int(port), username="weft", password=KEY)


async def test_webuiapi_draws(api: webuiapi.WebUIApi, fake_model: FakeModel) -> None:
    drawn = await called(api.txt2img, prompt="a red fox", seed=7)
    again = await called(api.img2img, images=[drawn.image], prompt="blue", denoising_strength=0.5, seed=8)
    unit = webuiapi.ControlNetUnit(image=drawn.image, module="canny", model="canny")
    guided = await called(api.txt2img, prompt="a cat", controlnet_units=[unit])

    first, second, third = fake_model.requests
    assert drawn.image.size == (first.width, first.height)
    assert (drawn.info["seed"], drawn.info["all_seeds"]) == (7, [7])
    assert "warnings" in drawn.info
    assert again.info["denoising_strength"] == 0.5
    assert second.task.value == "i2i"
    assert [control.type for control in third.controls] == ["canny"]
    assert guided.image.size == (third.width, third.height)


async def test_webuiapi_looks_around(api: webuiapi.WebUIApi, fake_model: FakeModel) -> None:
    await called(api.util_set_model, "sampled")

    assert await called(api.util_get_current_model) == "sampled"
    assert "sketch" in await called(api.util_get_model_names)
    assert [one["name"] for one in await called(api.get_samplers)] == [
        "Automatic",
        "Euler a",
        "DPM++ 2M",
        "DPM++ 2M Karras",
    ]
    assert (await called(api.get_upscalers))[0]["name"] == "None"
    assert await called(api.controlnet_model_list) == ["canny", "depth"]
    assert await called(api.controlnet_module_list) == ["none", "canny"]
    assert (await called(api.get_progress))["progress"] == 0.0
    assert await called(api.get_scripts) == {"txt2img": ["controlnet"], "img2img": ["controlnet"]}
    assert (await called(api.get_memory))["ram"]["total"] > 0
    assert [one["label"] for one in await called(api.get_schedulers)] == ["Automatic", "Karras"]
    await called(api.interrupt)
    await called(api.skip)
    await called(api.txt2img, prompt="a fox", cfg_scale=3)
    assert fake_model.requests[0].model == "sampled"


async def test_webuiapi_enlarges_images_and_reads_their_settings(api: webuiapi.WebUIApi) -> None:
    small = Image.open(io.BytesIO(png(size=(32, 16))))
    file = io.BytesIO(encode(small, OutputOptions(), SETTINGS, {"seed": 7}))

    twice = await called(api.extra_single_image, small, upscaling_resize=2, upscaler_1="Lanczos")
    all_of = await called(
        api.extra_batch_images,
        [small, small],
        resize_mode=1,
        upscaling_resize_w=20,
        upscaling_resize_h=20,
        upscaler_1="R-ESRGAN 4x+",
    )
    settings = await called(api.png_info, Image.open(file))
    by_text = png_texts(file.getvalue())

    assert twice.image.size == (64, 32)
    assert [image.size for image in all_of.images] == [(20, 20), (20, 20)]
    assert "Lanczos enlarged" in all_of.info
    assert by_text["parameters"] == SETTINGS
    assert settings.info is not None


async def test_options_are_the_callers_and_a_posted_dict_is_read_back(client: httpx.AsyncClient) -> None:
    before = (await client.get("/sdapi/v1/options")).json()
    whole = before | {"sd_model_checkpoint": "sketch [0123abcd]", "unknown": [1], "sd_vae": None}

    set_to = await client.post("/sdapi/v1/options", json=whole)
    unknown = await client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "no such model"})
    after = (await client.get("/sdapi/v1/options")).json()

    assert before["sd_model_checkpoint"] == "sketch"
    assert set_to.status_code == 200
    assert (unknown.status_code, unknown.json()["body"]) == (404, "sd_model_checkpoint")
    assert (after["sd_model_checkpoint"], after["sd_vae"]) == ("sketch", "Automatic")
    assert "unknown" not in after


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        ("png-info", {"image": base64.b64encode(b"GIF89a").decode()}, "PNG"),
        ("png-info", {}, "image"),
        ("extra-single-image", {"image": "AAAA"}, "image"),
        ("extra-single-image", {"image": WIDE, "upscaling_resize": 8}, "megapixels"),
        ("extra-batch-images", {"imageList": []}, "imageList"),
        ("extra-batch-images", {"imageList": [{"data": "AAAA", "name": "a"}]}, "imageList"),
    ],
)
async def test_images_that_cannot_be_used_are_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], detail: str
) -> None:
    answer = await client.post(f"/sdapi/v1/{path}", json=body)

    assert 400 <= answer.status_code < 500
    assert detail in answer.json()["detail"]


async def test_settings_are_read_from_a_file(client: httpx.AsyncClient) -> None:
    file = encode(Image.open(io.BytesIO(png())), OutputOptions(), SETTINGS, {"seed": 7})

    answer = (await client.post("/sdapi/v1/png-info", json={"image": base64.b64encode(file).decode()})).json()

    assert answer["info"] == SETTINGS
    assert answer["parameters"] == {
        "Prompt": "a red fox",
        "Negative prompt": "blurry",
        "Steps": "4",
        "Sampler": "auto",
        "Size": "64x64",
        "Version": "weft 1",
    }
    assert "weft" in answer["items"]


async def test_clients_find_every_list_they_ask_for(client: httpx.AsyncClient) -> None:
    asked = (
        "sd-models samplers schedulers loras upscalers sd-vae sd-modules hypernetworks face-restorers "
        "latent-upscale-modes prompt-styles script-info"
    ).split()

    lists = {name: (await client.get(f"/sdapi/v1/{name}")).json() for name in asked}

    assert all(isinstance(found, list) for found in lists.values())
    assert {"title", "model_name", "hash", "sha256", "filename"} <= lists["sd-models"][0].keys()
    assert (await client.get("/sdapi/v1/embeddings")).json() == {"loaded": {}, "skipped": {}}
    assert (await client.get("/sdapi/v1/cmd-flags")).json()["api"] is True
    assert (await client.post("/sdapi/v1/refresh-checkpoints")).json() == {}
    assert (await client.get("/controlnet/control_types")).json()["control_types"].keys() == {
        "Canny",
        "Depth",
    }
