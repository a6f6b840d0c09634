"""Nulls, other names and spellings are taken where they mean the same; else the error says what to use."""

import base64
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from serve_app.api.native.image_body import ImageBody
from serve_app.api.native.video_body import VideoBody
from serve_app.api.schemas.access import KeyBody, LoginBody, UserBody
from serve_app.api.schemas.body import field_names
from serve_app.api.schemas.lora import RegisterLoraBody
from serve_app.api.state import ApiState
from tests.serving.api import forged
from tests.serving.api.fake_video_model import FRAMEWISE, WAN

PNG = base64.b64encode(forged.png()).decode()
IMAGE, VIDEO = "/api/generate/image", "/api/generate/video"


@pytest.fixture
def state(video_state: ApiState) -> ApiState:
    return video_state


async def request_of(client: httpx.AsyncClient, path: str = IMAGE, **fields: Any) -> dict[str, Any]:
    """The accepted request as it will run."""
    model = "sketch" if path == IMAGE else WAN.id
    answer = await client.post(path, json={"model": model, "prompt": "a red fox", **fields})
    assert answer.status_code == 202, answer.text
    request: dict[str, Any] = (await client.get(f"/api/generate/{answer.json()['id']}")).json()["request"]
    return request


async def form_request_of(
    client: httpx.AsyncClient, files: dict[str, Any], path: str = IMAGE, **fields: str
) -> dict[str, Any]:
    model = "sketch" if path == IMAGE else WAN.id
    sent = {"model": model, "prompt": "a red fox", **fields}
    answer = await client.post(path, data=sent, files=files or {"": ("", b"")})
    assert answer.status_code == 202, answer.text
    request: dict[str, Any] = (await client.get(f"/api/generate/{answer.json()['id']}")).json()["request"]
    return request


async def error_of(client: httpx.AsyncClient, path: str = IMAGE, **fields: Any) -> dict[str, Any]:
    answer = await client.post(path, json={"prompt": "a red fox", **fields})
    assert answer.status_code == 422, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def optional_names(schema: type[BaseModel]) -> list[str]:
    required = {name for name, info in schema.model_fields.items() if info.is_required()}
    names = field_names(schema).items()
    return [
        name for field, all_names in names for name in all_names if field not in required | {"lora_files"}
    ]


@pytest.mark.parametrize("path", [IMAGE, "/generate-image"])
@pytest.mark.parametrize("name", optional_names(ImageBody))
async def test_a_null_of_an_image_means_not_given(client: httpx.AsyncClient, path: str, name: str):
    answer = await client.post(path, json={"model": "sketch", "prompt": "a red fox"} | {name: None})

    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize("path", [VIDEO, "/generate-video"])
@pytest.mark.parametrize("name", optional_names(VideoBody))
async def test_a_null_of_a_video_means_not_given(client: httpx.AsyncClient, path: str, name: str):
    answer = await client.post(path, json={"model": WAN.id, "prompt": "a red fox"} | {name: None})

    assert answer.status_code == 202, answer.text


async def test_nulls_inside_of_lists_mean_not_given(client: httpx.AsyncClient):
    control = {"image": PNG, "type": "canny", "weight": None, "start": None, "end": None, "is_map": None}

    request = await request_of(client, controls=[control])

    assert request["controls"] == [{"type": "canny", "weight": 1.0, "start": 0.0, "end": 1.0, "is_map": None}]


async def test_a_null_of_a_lora_is_no_source(client: httpx.AsyncClient):
    lora = {"id": None, "url": None, "base64": None, "hub": None, "weight": None}

    error = await error_of(client, model="sketch", loras=[lora])

    assert "there is none" in error["message"]


@pytest.mark.parametrize("schema", [ImageBody, VideoBody, RegisterLoraBody, UserBody, KeyBody, LoginBody])
def test_the_description_says_that_a_field_may_be_null(schema: type[BaseModel]):
    described = schema.model_json_schema()

    for name, field in described["properties"].items():
        assert ({"type": "null"} in field.get("anyOf", [])) is (name not in described.get("required", []))


async def test_whole_numbers_may_have_a_decimal_point(client: httpx.AsyncClient):
    numbers = {"width": 64.0, "height": 96.0, "steps": 5.0, "seed": 7.0, "num_images": 2.0, "previews": 1.0}

    request = await request_of(client, **numbers, output_quality=90.0)
    form = await form_request_of(
        client, {}, width="64", height="96.0", steps="5.0", seed="7.0", num_images="2"
    )
    video = await request_of(client, VIDEO, num_frames=17.0, fps=24.0, end_seed=None)

    for accepted in (request, form):
        assert (accepted["width"], accepted["height"]) == (64, 96)
        assert (accepted["num_inference_steps"], accepted["seed"], accepted["num_images"]) == (5, 7, 2)
    assert (video["video"]["num_frames"], video["video"]["fps"]) == (17, 24)


@pytest.mark.parametrize("written", [-1, -1.0, "-1", "random", "Random", "", None])
async def test_every_spelling_of_a_random_seed_is_taken(client: httpx.AsyncClient, written: object):
    seeds = {(await request_of(client, seed=written))["seed"] for _ in range(3)}

    assert len(seeds) == 3


@pytest.mark.parametrize("written", ["-1", "-1.0", "random", ""])
async def test_every_spelling_of_a_random_seed_is_taken_in_a_form(client: httpx.AsyncClient, written: str):
    seeds = {(await form_request_of(client, {}, seed=written))["seed"] for _ in range(3)}

    assert len(seeds) == 3


async def test_a_seed_as_text_keeps_all_its_digits(client: httpx.AsyncClient):
    assert (await request_of(client, seed="9007199254740993"))["seed"] == 9007199254740993


async def test_the_end_of_a_video_may_have_a_random_seed(client: httpx.AsyncClient):
    model = FRAMEWISE.id

    ends = [
        await request_of(client, VIDEO, model=model, seed=1, end_seed=written) for written in (-1, "random")
    ]
    body = VideoBody.model_validate({"prompt": "a", "seed": 1, "end_seed": -1})
    drawn = {body.to_request(model).video.end_seed for _ in range(3)}  # type: ignore[union-attr]

    assert [request["seed"] for request in ends] == [1, 1]
    assert len(drawn) == 3
    assert body.digest() == VideoBody.model_validate({"prompt": "a", "seed": 1, "end_seed": -1}).digest()


@pytest.mark.parametrize(
    ("written", "fps"),
    [(29.97, 29.97), (23.976, 23.976), (24.0, 24), (24, 24), ("30000/1001", 30000 / 1001), ("24/1", 24)],
)
async def test_frames_a_second_may_be_a_fraction(client: httpx.AsyncClient, written: object, fps: float):
    video = (await request_of(client, VIDEO, num_frames=17, fps=written))["video"]

    assert (video["fps"], video["seconds"]) == (fps, round(17 / fps, 3))


@pytest.mark.parametrize("wrong", ["24 fps", "1/0", True, [24], 0.5, 61])
async def test_a_wrong_frame_rate_is_refused_in_one_sentence(client: httpx.AsyncClient, wrong: object):
    error = await error_of(client, VIDEO, model=WAN.id, fps=wrong)

    assert error["message"].count("fps") == 1
    assert error["param"].endswith("fps")


@pytest.mark.parametrize(
    ("sent", "field", "value"),
    [
        ({"steps": 5}, "num_inference_steps", 5),
        ({"cfg_scale": 3}, "guidance_scale", 3.0),
        ({"sampler": "automatic"}, "scheduler", "auto"),
        ({"n": 2}, "num_images", 2),
        ({"batch_size": 2}, "num_images", 2),
        ({"num_outputs": 2}, "num_images", 2),
        ({"num_images_per_prompt": 2}, "num_images", 2),
        ({"init_image": PNG}, "task", "i2i"),
        ({"image": PNG, "denoising_strength": 0.5}, "strength", 0.5),
        ({"image": PNG, "prompt_strength": 0.5}, "strength", 0.5),
    ],
)
async def test_other_names_of_the_same_meaning_are_taken(
    client: httpx.AsyncClient, sent: dict[str, Any], field: str, value: object
):
    assert (await request_of(client, **sent))[field] == value


@pytest.mark.parametrize(
    ("written", "name"),
    [("Euler a", "euler_a"), ("DPM++ 2M Karras", "dpmpp_2m_karras"), ("DDIM", "ddim"), ("unipc", "unipc")],
)
@pytest.mark.parametrize("field", ["scheduler", "sampler", "sampler_name"])
def test_a_sampler_may_have_the_name_that_other_tools_give_it(field: str, written: str, name: str):
    assert ImageBody.model_validate({"prompt": "a", field: written}).to_request("sketch").scheduler == name


def test_a_mask_may_have_its_short_name():
    body = ImageBody.model_validate({"prompt": "a", "init_image": PNG, "mask": PNG})

    assert body.to_request("sketch").task == "inpaint"


async def test_other_names_of_a_video_are_taken(client: httpx.AsyncClient):
    request = await request_of(client, VIDEO, duration=2, frame_rate=8, init_image=PNG, cfg_scale=3)

    assert (request["task"], request["guidance_scale"]) == ("i2v", 3)
    assert (request["video"]["num_frames"], request["video"]["fps"]) == (17, 8)


async def test_files_of_a_form_may_have_the_other_names(client: httpx.AsyncClient):
    files = {"init_image": ("a.png", forged.png())}

    request = await form_request_of(client, files, cfg_scale="3", sampler="Automatic")
    masked = await client.post(
        IMAGE, data={"prompt": "a", "model": "sketch"}, files=files | {"mask": ("b.png", forged.png())}
    )

    assert (request["task"], request["guidance_scale"], request["scheduler"]) == ("i2i", 3, "auto")
    assert "cannot do inpaint" in masked.json()["error"]["message"]


async def test_two_names_of_one_field_are_refused(client: httpx.AsyncClient):
    error = await error_of(client, steps=4, num_inference_steps=5)
    form = await client.post(
        IMAGE, data={"prompt": "a", "mask": PNG}, files={"mask_image": ("b.png", forged.png())}
    )

    assert error["message"] == ("num_inference_steps and steps are two names of one field; send one of them")
    assert "mask_image and mask are two names" in form.json()["error"]["message"]


async def test_a_file_field_in_which_nothing_was_chosen_is_not_given(client: httpx.AsyncClient):
    boundary = "----x"
    empty = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename=""\r\n'
        "Content-Type: application/octet-stream\r\n\r\n\r\n"
        for name in ("image", "mask_image", "mask", "control_image", "lora_file")
    )
    text = f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red fox\r\n'
    answer = await client.post(
        IMAGE,
        content=f"{empty}{text}--{boundary}--\r\n".encode(),
        headers={"content-type": f"multipart/form-data; boundary={boundary}"},
    )

    assert answer.status_code == 202, answer.text


async def test_a_chosen_file_without_a_byte_is_refused(client: httpx.AsyncClient):
    answer = await client.post(IMAGE, data={"prompt": "a"}, files={"image": ("photo.png", b"")})

    assert answer.status_code == 422
    assert "image is empty" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "name", "hint"),
    [
        (IMAGE, "cfg", "use guidance_scale"),
        (IMAGE, "CFG", "use guidance_scale"),
        (IMAGE, "guidance", "use guidance_scale"),
        (IMAGE, "num_steps", "use num_inference_steps"),
        (IMAGE, "ddim_steps", "use num_inference_steps"),
        (IMAGE, "n_iter", "use num_images"),
        (IMAGE, "size", "use width and height"),
        (IMAGE, "aspect_ratio", "use width and height"),
        (IMAGE, "init_images", "use image"),
        (IMAGE, "image_strength", "the other way: 1 replaces the image"),
        (IMAGE, "denoise", "use strength"),
        (IMAGE, "format", "use output_format"),
        (IMAGE, "quality", "use output_quality"),
        (IMAGE, "webhook", "use webhook_url"),
        (IMAGE, "lora_scale", "use lora_weight"),
        (IMAGE, "num_frames", "POST /api/generate/video"),
        (IMAGE, "preview", "did you mean previews?"),
        (VIDEO, "frames", "use num_frames"),
        (VIDEO, "framerate", "use fps"),
        (VIDEO, "cfg", "use guidance_scale"),
        (VIDEO, "num_images", "POST /api/generate/image"),
        ("/admin/users", "quota", "use images_per_day"),
        ("/api/loras", "trigger", "use trigger_words"),
    ],
)
async def test_the_hint_at_an_unknown_field_is_by_its_meaning(
    client: httpx.AsyncClient, path: str, name: str, hint: str
):
    answer = await client.post(path, json={"prompt": "a", name: 1})

    named = [part for part in answer.json()["error"]["message"].split("; ") if name in part or hint in part]
    assert hint in "; ".join(named)


async def test_the_hint_at_a_field_inside_of_a_list_is_for_that_list(client: httpx.AsyncClient):
    lora = await error_of(client, loras=[{"id": "night", "strength": 0.5}])
    control = await error_of(client, controls=[{"image": PNG, "type": "canny", "scale": 1}])

    assert "use weight" in lora["message"]
    assert "weight" in control["message"]
