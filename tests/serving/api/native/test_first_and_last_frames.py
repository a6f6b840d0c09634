"""The first and the last frame of a video, from a body to the model."""

from __future__ import annotations

import base64

import httpx
import pytest

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest, Video
from serve_app.admission.input_check import InputCheck
from serve_app.api.state import ApiState
from serve_app.jobs import inputs
from tests.serving.api import forged
from tests.serving.api.calls import ended
from tests.serving.api.fake_video_model import BODY, FakeVideoModel, completed_video
from tests.serving.fakes import picture


@pytest.fixture
def state(video_state: ApiState) -> ApiState:
    return video_state


async def test_both_frames_of_a_form_reach_the_model_and_are_not_kept(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    first, last = picture("red"), picture("blue")

    answer = await client.post(
        "/api/generate/video",
        data={"prompt": "a circle", "seed": "7"},
        files={"first_frame": ("a.png", first, "image/png"), "last_frame": ("b.png", last, "image/png")},
    )

    assert answer.status_code == 202, answer.text
    job = await ended(client, answer.json()["id"])
    assert (job["request"]["task"], job["request"]["video"]["last_image"]) == ("i2v", True)
    (request,) = fake_video_model.requests
    assert request.edit is not None
    assert request.video is not None
    assert (request.edit.image, request.video.last_image) == (first, last)
    detached, taken = inputs.detach(request)
    assert detached.video is not None
    assert (detached.task, detached.video.last_image) == (request.task, b"")
    assert inputs.names(detached) == tuple(sorted(taken, reverse=True)) == ("last_image", "image")
    assert inputs.attach(detached, taken) == request


async def test_a_last_frame_of_another_shape_has_a_warning(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    images = {
        "image": base64.b64encode(picture()).decode(),
        "last_image": base64.b64encode(forged.png(128, 32)).decode(),
    }

    job = await completed_video(client, **images)

    assert [(one["code"], one["param"]) for one in job["warnings"]] == [("input_fitted", "last_image")]


@pytest.mark.parametrize(
    ("model", "param", "says"),
    [("tiny-wan", "image", "send image too"), ("tiny-sd15", "last_image", "end_prompt and end_seed")],
)
async def test_a_last_frame_that_cannot_be_used_is_refused_with_the_cure(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel, model: str, param: str, says: str
) -> None:
    body = BODY | {"model": model, "last_image": base64.b64encode(picture()).decode()}

    answer = await client.post("/api/generate/video", json=body)

    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == param
    assert says in answer.json()["error"]["message"]
    assert fake_video_model.requests == []


async def test_a_damaged_last_frame_is_refused_by_its_name() -> None:
    request = GenerationRequest(
        model="tiny-wan", prompt="a circle", video=Video(last_image=forged.png()[:100])
    )

    with pytest.raises(BadRequest, match="last_image is damaged"):
        await InputCheck().verify(request, "ann")


async def test_a_video_that_ends_with_a_picture_has_no_remix(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    images = {name: base64.b64encode(picture()).decode() for name in ("image", "last_image")}
    job = await completed_video(client, **images)

    answer = await client.post(f"/v1/videos/{job['id']}/remix", json={"prompt": "a blue circle"})

    assert answer.status_code == 400, answer.text
    assert "no longer stored" in answer.json()["error"]["message"]
