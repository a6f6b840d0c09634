"""Videos of the native dialect: accepted, followed and downloaded in parts."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from serve_app.api.state import ApiState
from tests.serving.api import forged
from tests.serving.api.calls import ended
from tests.serving.api.fake_video_model import BODY, FRAMEWISE, VIDEO, WAN, FakeVideoModel, completed_video
from tests.serving.fakes import picture


@pytest.fixture
def state(video_state: ApiState) -> ApiState:
    return video_state


async def test_a_request_for_a_video_becomes_a_job_with_its_files(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    job = await completed_video(client, seconds=2)

    assert (job["kind"], job["status"], job["percent"]) == ("video", "completed", 100)
    assert job["request"]["video"] == {
        "num_frames": 17,
        "fps": 8,
        "seconds": 2.125,
        "format": "mp4",
        "quality": 80,
        "framewise": False,
        "codec": None,
        "last_image": False,
        "zoom": None,
        "pan_x": None,
        "pan_y": None,
    }
    (video,) = job["artifacts"]
    assert (video["kind"], video["media_type"]) == ("video", "video/mp4")
    assert video["url"].endswith(f"/api/results/{job['id']}/0.mp4")
    for kind in ("thumbnail", "poster", "spritesheet"):
        assert (await client.get(video[f"{kind}_url"])).content == kind.encode()


async def test_decoding_and_encoding_are_reported_in_frames(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    job = await completed_video(client)

    text = (await client.get(f"/api/generate/{job['id']}/events")).text

    stages = [
        json.loads(line.removeprefix("data: "))
        for block in text.split("\n\n")
        if "event: stage" in block
        for line in block.splitlines()
        if line.startswith("data: ")
    ]
    assert [(stage["stage"], stage["done"], stage["total"]) for stage in stages] == [
        ("decode", 17, 17),
        ("encode", 17, 17),
    ]


@pytest.mark.parametrize(
    ("header", "status", "expected"),
    [
        ("bytes=0-1", 206, VIDEO[:2]),
        ("bytes=2000-", 206, VIDEO[2000:]),
        ("bytes=-5", 206, VIDEO[-5:]),
        ("bytes=4000-", 416, b""),
        ("bytes=0-1,4-5", 200, VIDEO),
        (None, 200, VIDEO),
    ],
)
async def test_a_player_gets_the_part_it_asks_for(
    header: str | None,
    status: int,
    expected: bytes,
    client: httpx.AsyncClient,
    fake_video_model: FakeVideoModel,
) -> None:
    url = (await completed_video(client))["artifacts"][0]["url"]

    answer = await client.get(url, headers={"Range": header} if header else {})

    assert (answer.status_code, answer.content) == (status, expected)
    assert answer.headers["accept-ranges"] == "bytes"
    if status == 206:
        assert answer.headers["content-range"].endswith(f"/{len(VIDEO)}")
        assert answer.headers["content-type"] == "video/mp4"
        assert "content-encoding" not in answer.headers


async def test_a_range_of_an_older_file_is_answered_with_the_whole_one(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    url = (await completed_video(client))["artifacts"][0]["url"]

    answer = await client.get(url, headers={"Range": "bytes=0-1", "If-Range": '"another"'})

    assert (answer.status_code, len(answer.content)) == (200, len(VIDEO))


@pytest.mark.parametrize(
    ("path", "field"), [("/api/generate/video", "image"), ("/v1/videos", "input_reference")]
)
async def test_a_first_frame_of_another_shape_is_fitted_with_a_warning(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel, path: str, field: str
) -> None:
    answer = await client.post(
        path,
        data={"prompt": "it moves", "seconds": "1", "width": "64", "height": "64", "fit": "pad"},
        files={field: ("a.png", forged.png(128, 32), "image/png")},
    )
    await ended(client, answer.json()["id"])

    (warning,) = answer.json()["warnings"]
    assert (warning["code"], warning["param"]) == ("input_fitted", "image")
    assert "was padded to" in warning["message"]
    assert fake_video_model.requests[0].fit == "pad"


async def test_a_form_may_bring_the_first_frame(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    answer = await client.post(
        "/api/generate/video",
        data={"prompt": "it moves", "seconds": "1", "output_format": "webm"},
        files={"image": ("a.png", picture(), "image/png")},
    )
    job = await ended(client, answer.json()["id"])

    assert job["request"]["task"] == "i2v"
    assert job["artifacts"][0]["url"].endswith("0.webm")
    assert fake_video_model.requests[0].edit is not None


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"num_frames": 16}, "num_frames", "nearest: 17"),
        ({"num_frames": 17, "seconds": 2}, "seconds", "both given"),
        ({"seconds": 100}, "seconds", "at most"),
        ({"seconds": "long"}, "seconds", "number of seconds"),
        ({"model": "sketch"}, "model", "cannot do t2v"),
        ({"strength": 0.5}, "strength", "needs a picture"),
        ({"end_seed": 3}, "end_seed", "frame-wise"),
        ({"zoom": 2.0}, "zoom", "frame-wise"),
        ({"output_codec": "av1"}, "codec", "mp4 takes h264"),
        ({"model": FRAMEWISE.id, "zoom": 9.0}, "zoom", "less than or equal to 4"),
        ({"fps": 0}, "fps", "greater than or equal to 1"),
        ({"frames": 3}, "frames", "unknown|Extra|not"),
    ],
    ids=str,
)
async def test_an_impossible_video_is_refused_before_any_work(
    changes: dict[str, Any], param: str, message: str, client: httpx.AsyncClient
) -> None:
    answer = await client.post("/api/generate/video", json=BODY | changes)

    assert answer.status_code in (400, 422), answer.text
    error = answer.json()["error"]
    assert error["param"].endswith(param)
    assert re.search(message, error["message"])


async def test_models_list_which_videos_they_make(client: httpx.AsyncClient) -> None:
    models = {m["id"]: m["videos"] for m in (await client.get("/api/models/")).json()["models"]}

    assert models["sketch"] is None
    assert models[WAN.id]["every"] == 4
    assert (models[WAN.id]["num_frames"], models[WAN.id]["fps"]) == (17, 8)
