"""Options of masks, of growing images and of their fit, from the body to the request and its answer."""

import base64
from typing import Any

import httpx
import pytest

from deployments.protocol.request import Edit, Grow
from tests.serving.api import forged
from tests.serving.api.calls import ended, submitted
from tests.serving.api.fake_model import FakeModel

PICTURE = base64.b64encode(forged.png()).decode()  # as large as its mask
MODEL = {"model": "tiny-flux-schnell", "prompt": "a red fox"}


def edit_of(fake_model: FakeModel) -> Edit:
    edit = fake_model.requests[-1].edit
    assert edit is not None
    return edit


async def test_json_and_form_take_all_options(client: httpx.AsyncClient, fake_model: FakeModel):
    options: dict[str, Any] = {
        "mask_channel": "alpha",
        "feather": 3,
        "only_masked": True,
        "only_masked_padding": 5,
        "grow_left": 4,
        "fit": "pad",
    }
    files = {"image": ("fox.png", forged.png()), "mask_image": ("mask.png", forged.png())}

    form = await client.post(
        "/api/generate/image", data=MODEL | {key: str(value) for key, value in options.items()}, files=files
    )
    await ended(client, form.json()["id"])
    by_form = fake_model.requests[-1]
    job = await ended(client, await submitted(client, **MODEL, image=PICTURE, mask_image=PICTURE, **options))
    by_json = fake_model.requests[-1]

    for request in (by_form, by_json):
        assert request.fit == "pad"
        edit = request.edit
        assert edit is not None
        assert (edit.mask_channel, edit.feather, edit.only_masked, edit.only_masked_padding) == (
            "alpha",
            3,
            True,
            5,
        )
        assert edit.grow == Grow(left=4)
        assert edit.strength == 1.0, "where it grows there is nothing to keep"
    assert job["request"]["mask"] == {
        "mask_channel": "alpha",
        "paste_back": True,
        "feather": 3,
        "only_masked": True,
        "only_masked_padding": 5,
        "grow_left": 4,
        "grow_right": 0,
        "grow_top": 0,
        "grow_bottom": 0,
        "result_width": job["request"]["mask"]["result_height"] + 4,
        "result_height": job["request"]["mask"]["result_height"],
    }


async def test_the_names_of_a1111_are_taken_too(client: httpx.AsyncClient, fake_model: FakeModel):
    await ended(
        client,
        await submitted(
            client,
            **MODEL,
            image=PICTURE,
            mask_image=PICTURE,
            mask_blur=2,
            inpaint_full_res=True,
            inpaint_full_res_padding=7,
        ),
    )

    edit = edit_of(fake_model)
    assert (edit.feather, edit.only_masked, edit.only_masked_padding) == (2, True, 7)


@pytest.mark.parametrize("options", [{"grow_top": 8}, {"mask_channel": "alpha"}], ids=str)
async def test_growing_and_own_transparency_are_inpainting(
    client: httpx.AsyncClient, fake_model: FakeModel, options: dict[str, Any]
):
    job = await ended(client, await submitted(client, **MODEL, image=PICTURE, **options))

    assert job["request"]["task"] == "inpaint"
    assert edit_of(fake_model).mask_image is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"image": PICTURE, "feather": 4}, "feather"),
        ({"image": PICTURE, "paste_back": False}, "paste_back"),
        ({"image": PICTURE, "only_masked": True}, "only_masked"),
        ({"image": PICTURE, "mask_image": PICTURE, "only_masked": True, "paste_back": False}, "only_masked"),
        ({"grow_left": 8}, "grow_left"),
        ({"mask_channel": "alpha"}, "mask_channel"),
        ({"image": PICTURE, "mask_image": PICTURE, "feather": 257}, "feather"),
        ({"image": PICTURE, "grow_left": -1}, "grow_left"),
        ({"image": PICTURE, "grow_left": 8000, "grow_top": 8000}, "grow"),
        ({"image": PICTURE, "fit": "fill"}, "fit"),
        ({"image": PICTURE, "mask_channel": "red"}, "mask_channel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_meant_is_refused_by_name(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
):
    answer = await client.post("/api/generate/image", json=MODEL | body)

    assert answer.status_code in (413, 422)
    assert answer.json()["error"]["param"] == param


async def test_a_fitted_picture_is_a_warning_of_the_first_answer_and_of_the_task(client: httpx.AsyncClient):
    body = MODEL | {"image": PICTURE, "width": 192, "height": 64}

    native = (await client.post("/api/generate/image", json=body)).json()
    task = (await client.post("/generate-image", json=body)).json()

    for answer in (native, task):
        ((code, param),) = [
            (w["code"], w["param"]) for w in answer["warnings"] if w["code"] != "steps_corrected"
        ]
        assert (code, param) == ("input_fitted", "image")
