"""/v1/videos, called by the openai SDK."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import openai
import pytest

from deployments.protocol.events import Failed
from serve_app.api.state import ApiState
from tests.patience import patience
from tests.serving.api.calls import ended
from tests.serving.api.fake_video_model import BODY, FRAMEWISE, VIDEO, WAN, FakeVideoModel, completed_video
from tests.serving.fakes import picture


@pytest.fixture
def state(video_state: ApiState) -> ApiState:
    return video_state


@pytest.fixture
async def sdk(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://127.0.0.1/v1", http_client=client, max_retries=0
    )


async def test_the_sdk_creates_polls_and_downloads(
    sdk: openai.AsyncOpenAI, fake_video_model: FakeVideoModel
) -> None:
    video = await sdk.videos.create_and_poll(prompt="a red circle", seconds="4", size="64x64", model=WAN.id)

    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "4.125", "64x64")
    assert video.completed_at is not None
    content = await sdk.videos.download_content(video.id)
    assert content.content == VIDEO
    for variant in ("thumbnail", "spritesheet"):
        stills = await sdk.videos.download_content(video.id, variant=variant)  # type: ignore[arg-type]
        assert stills.content == variant.encode()


async def test_the_sdk_sends_a_first_frame(sdk: openai.AsyncOpenAI, fake_video_model: FakeVideoModel) -> None:
    video = await sdk.videos.create_and_poll(
        prompt="it moves", input_reference=("first.png", picture(), "image/png"), size="64x64"
    )

    assert video.status == "completed"
    assert fake_video_model.requests[0].task == "i2v"


@pytest.mark.parametrize("reference", ["plain", "object"])
async def test_json_bodies_are_taken_as_well(
    reference: str, client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    given: Any = url if reference == "plain" else {"image_url": url}

    answer = await client.post("/v1/videos", json={"prompt": "x", "seconds": "2", "input_reference": given})

    assert answer.status_code == 200, answer.text
    assert (answer.json()["object"], answer.json()["seconds"]) == ("video", "2.125")


async def test_a_form_may_bring_the_reference_as_the_sdk_flattens_it(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    fields = {"prompt": (None, "x"), "input_reference[image_url]": (None, url)}

    answer = await client.post("/v1/videos", files=fields)
    await ended(client, answer.json()["id"])

    assert fake_video_model.requests[0].task == "i2v"


async def test_the_list_is_paged_by_the_last_id(
    sdk: openai.AsyncOpenAI, client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    made = [(await completed_video(client, seed=seed))["id"] for seed in range(5)]
    await client.post("/api/generate/image", json={"prompt": "no video", "model": "sketch"})

    newest = [video.id async for video in sdk.videos.list(limit=2)]
    oldest = [video.id async for video in sdk.videos.list(limit=2, order="asc")]
    page = (await client.get("/v1/videos", params={"limit": 2, "after": made[3]})).json()

    assert newest == made[::-1]
    assert oldest == made
    assert ([v["id"] for v in page["data"]], page["has_more"]) == ([made[2], made[1]], True)
    assert (page["first_id"], page["last_id"]) == (made[2], made[1])


async def test_a_remix_keeps_all_but_the_prompt(
    sdk: openai.AsyncOpenAI, client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    first = await completed_video(client, seconds=3)

    remix = await sdk.videos.remix(first["id"], prompt="a blue star")
    await ended(client, remix.id)

    assert remix.remixed_from_video_id == first["id"]
    assert remix.prompt == "a blue star"
    before, after = fake_video_model.requests
    assert after == before.model_copy(update={"prompt": "a blue star"})


def named(video_id: str) -> dict[str, Any]:
    """How the SDK names a video that is made already: passed as `video`, it would take the id for a file."""
    return {"video": openai.omit, "extra_body": {"video": {"id": video_id}}}


async def test_an_edit_of_a_video_made_here_is_a_remix(
    sdk: openai.AsyncOpenAI, client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    first = await completed_video(client, seconds=3)

    edited = await sdk.videos.edit(prompt="a blue star", **named(first["id"]))
    await ended(client, edited.id)
    by_json = await client.post("/v1/videos/edits", json={"prompt": "a fox", "video": {"id": first["id"]}})

    assert edited.remixed_from_video_id == first["id"]
    assert fake_video_model.requests[1] == fake_video_model.requests[0].model_copy(
        update={"prompt": "a blue star"}
    )
    assert by_json.json()["prompt"] == "a fox"


async def test_an_extension_begins_where_a_frame_wise_video_ends(
    sdk: openai.AsyncOpenAI, client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    body = {
        "model": FRAMEWISE.id,
        "seed": 5,
        "end_seed": 8,
        "negative_prompt": "red",
        "output_format": "webm",
    }
    first = await completed_video(client, **body)

    more = await sdk.videos.extend(prompt="a blue star", seconds="2", **named(first["id"]))  # type: ignore[arg-type]
    again = await sdk.videos.extend(prompt=BODY["prompt"], seconds="1", **named(first["id"]))  # type: ignore[arg-type]
    await ended(client, more.id)
    await ended(client, again.id)

    before, to_prompt, to_seed = fake_video_model.requests
    assert to_prompt.video is not None
    assert (to_prompt.seed, to_prompt.prompt, to_prompt.video.end_prompt) == (
        8,
        BODY["prompt"],
        "a blue star",
    )
    assert (to_prompt.video.num_frames, to_prompt.video.format) == (16, "webm")
    assert to_prompt.negative_prompt == "red"
    assert before.video is not None
    assert to_seed.video == before.video.model_copy(update={"num_frames": 8, "end_seed": 9})
    assert to_seed.seed == 8


async def test_what_no_model_can_do_with_a_video_is_refused_once_with_the_reason(
    sdk: openai.AsyncOpenAI, client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    wan = (await completed_video(client))["id"]
    moving = (await completed_video(client, model=FRAMEWISE.id, zoom=2.0))["id"]
    patient = sdk.with_options(max_retries=3)
    file, seconds = ("a.mp4", VIDEO, "video/mp4"), "4"
    calls: list[tuple[str, Any]] = [
        ("no model here takes a video file", lambda: patient.videos.edit(prompt="x", video=file)),
        ("no model here takes", lambda: patient.videos.extend(prompt="x", seconds=seconds, video=file)),  # type: ignore[arg-type]
        ("only frame-wise", lambda: patient.videos.extend(prompt="x", seconds=seconds, **named(wan))),  # type: ignore[arg-type]
        ("only frame-wise", lambda: patient.videos.extend(prompt="x", seconds=seconds, **named(moving))),  # type: ignore[arg-type]
        ("train a LoRA", lambda: patient.videos.create_character(name="Ann", video=file)),
        ("no character", lambda: patient.videos.get_character("char_1")),
        ("no such job", lambda: patient.videos.edit(prompt="x", **named("video_1"))),
        ("video is missing", lambda: patient.videos.edit(prompt="x", video=openai.omit)),  # type: ignore[arg-type]
    ]

    for message, call in calls:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=message) as refused:
            await call()
        assert refused.value.response.headers["x-should-retry"] == "false"
    assert len(fake_video_model.requests) == 2


async def test_a_deleted_video_is_gone(
    sdk: openai.AsyncOpenAI, client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    job = await completed_video(client)

    deleted = await sdk.videos.delete(job["id"])

    assert (deleted.deleted, deleted.id) == (True, job["id"])
    with pytest.raises(openai.NotFoundError):
        await sdk.videos.retrieve(job["id"])


async def test_a_running_video_is_cancelled_and_deleted(
    sdk: openai.AsyncOpenAI, fake_video_model: FakeVideoModel
) -> None:
    fake_video_model.gate.clear()
    video = await sdk.videos.create(prompt="a red circle")
    async with asyncio.timeout(patience(2)):
        while not fake_video_model.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    assert (await sdk.videos.retrieve(video.id)).status in ("queued", "in_progress")
    assert (await sdk.videos.delete(video.id)).deleted


async def test_content_is_refused_until_it_is_there(
    sdk: openai.AsyncOpenAI, fake_video_model: FakeVideoModel
) -> None:
    fake_video_model.gate.clear()
    video = await sdk.videos.create(prompt="a red circle")

    with pytest.raises(openai.ConflictError):
        await sdk.videos.download_content(video.id)


async def test_a_failed_video_carries_its_error(
    sdk: openai.AsyncOpenAI, fake_video_model: FakeVideoModel
) -> None:
    fake_video_model.failure = Failed("out_of_memory", "ask for fewer frames", retryable=False)

    video = await sdk.videos.create_and_poll(prompt="a red circle")

    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, video.error.message) == ("out_of_memory", "ask for fewer frames")


async def test_a_picture_is_no_video(client: httpx.AsyncClient) -> None:
    job = await client.post("/api/generate/image", json={"prompt": "a cat", "model": "sketch"})

    answer = await client.get(f"/v1/videos/{job.json()['id']}")

    assert answer.status_code == 404
    assert "makes pictures" in answer.json()["error"]["message"]
