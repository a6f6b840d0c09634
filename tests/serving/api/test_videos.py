"""Videos over HTTP: accepted, followed, downloaded in parts, and everything the openai SDK does with them."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact, Done, Event, Failed, Stage, Started, Step
from deployments.protocol.request import ResolvedRequest
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import patience
from tests.serving.api.cards import CARDS
from tests.serving.fakes import picture

WAN = load_card(Path(__file__).parents[3] / "configs/models/tiny-wan.yaml").model_copy(
    update={"tasks": ["t2v", "i2v"]}
)
FRAMEWISE = load_card(Path(__file__).parents[3] / "configs/models/tiny-sd15.yaml")
VIDEO = bytes(range(256)) * 8
WISH = {"prompt": "a red circle moving left", "seed": 7, "steps": 2}


class FakeVideoModel:
    """A model that films in no time, unless `gate` is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[ResolvedRequest] = []
        self.failure: Failed | None = None

    def free_slots(self) -> Mapping[str, int]:
        return {WAN.id: 8, FRAMEWISE.id: 8}

    async def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncIterator[Event]:
        self.requests.append(request)
        assert request.video is not None
        steps, frames = request.num_inference_steps, request.video.num_frames
        yield Started(steps)
        for step in range(1, steps + 1):
            yield Step(step, steps)
        await self.gate.wait()
        if self.failure is not None:
            yield self.failure
            return
        yield Stage("decode", frames, frames)
        yield Stage("encode", frames, frames)
        yield Artifact(0, "video", f"video/{request.video.format}", VIDEO, 64, 64, request.seed)
        for kind, form in (("thumbnail", "webp"), ("poster", "webp"), ("spritesheet", "jpeg")):
            yield Artifact(0, kind, f"image/{form}", kind.encode(), 32, 32, request.seed)
        yield Done(0.0, 0.5)


@pytest.fixture
async def state(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[ApiState]:
    async def model_states() -> dict[str, str]:
        return {WAN.id: "ready", FRAMEWISE.id: "asleep", "sketch": "ready"}

    cards = CARDS | {WAN.id: WAN, FRAMEWISE.id: FRAMEWISE}
    job_service = JobService(store, results, cards, settings)
    yield ApiState(job_service=job_service, cards=cards, settings=settings, model_states=model_states)
    await job_service.aclose()


@pytest.fixture
async def fake_video_model(
    store: JobStore, results: ResultStore, settings: Settings
) -> AsyncIterator[FakeVideoModel]:
    fake_video_model = FakeVideoModel()
    dispatcher = Dispatcher(store, results, fake_video_model, settings)  # type: ignore[arg-type]
    running = asyncio.create_task(dispatcher.run())
    yield fake_video_model
    fake_video_model.gate.set()
    await dispatcher.drain()
    await running


@pytest.fixture
async def sdk(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://127.0.0.1/v1", http_client=client, max_retries=0
    )


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(patience(2)):
        text = (await client.get(f"/api/generate/{job_id}/events")).text  # ends with the job
    assert text
    job: dict[str, Any] = (await client.get(f"/api/generate/{job_id}")).json()
    return job


async def completed_video(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    answer = await client.post("/api/generate/video", json=WISH | changes)
    assert answer.status_code == 202, answer.text
    return await ended(client, answer.json()["id"])


# --- the native dialect and tasks --------------------------------------------------------------------------


async def test_a_wish_for_a_video_becomes_a_job_with_its_files(
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
        "zoom": None,
        "pan_x": None,
        "pan_y": None,
    }
    (video,) = job["artifacts"]
    assert (video["kind"], video["media_type"]) == ("video", "video/mp4")
    assert video["url"].endswith(f"/api/results/{job['id']}/0.mp4")
    for kind in ("thumbnail", "poster", "spritesheet"):
        assert (await client.get(video[f"{kind}_url"])).content == kind.encode()


async def test_decoding_and_encoding_are_told_in_frames(
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


async def test_the_task_dialect_films_too(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    answer = await client.post("/generate-video", json=WISH)
    task_id = answer.json()["task_id"]
    await ended(client, task_id)

    result = await client.get(f"/task/{task_id}/result")
    file = await client.get(f"/task/{task_id}/result", headers={"Accept": "video/mp4"})

    assert answer.status_code == 202
    assert result.json()["images"][0]["kind"] == "video"
    assert (file.headers["content-type"], file.content) == ("video/mp4", VIDEO)


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
    ("changes", "param", "says"),
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
async def test_what_cannot_be_filmed_is_refused_before_any_work(
    changes: dict[str, Any], param: str, says: str, client: httpx.AsyncClient
) -> None:
    answer = await client.post("/api/generate/video", json=WISH | changes)

    assert answer.status_code in (400, 422), answer.text
    error = answer.json()["error"]
    assert error["param"].endswith(param)
    assert re.search(says, error["message"])


async def test_models_tell_which_videos_they_make(client: httpx.AsyncClient) -> None:
    models = {m["id"]: m["videos"] for m in (await client.get("/api/models/")).json()["models"]}

    assert models["sketch"] is None
    assert models[WAN.id]["every"] == 4
    assert (models[WAN.id]["num_frames"], models[WAN.id]["fps"]) == (17, 8)


# --- OpenAI ------------------------------------------------------------------------------------------------


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
    again = await sdk.videos.extend(prompt=WISH["prompt"], seconds="1", **named(first["id"]))  # type: ignore[arg-type]
    await ended(client, more.id)
    await ended(client, again.id)

    before, to_prompt, to_seed = fake_video_model.requests
    assert to_prompt.video is not None
    assert (to_prompt.seed, to_prompt.prompt, to_prompt.video.end_prompt) == (
        8,
        WISH["prompt"],
        "a blue star",
    )
    assert (to_prompt.video.num_frames, to_prompt.video.format) == (16, "webm")
    assert to_prompt.negative_prompt == "red"
    assert before.video is not None
    assert to_seed.video == before.video.model_copy(update={"num_frames": 8, "end_seed": 9})
    assert to_seed.seed == 8


async def test_what_no_model_here_can_do_with_a_video_is_refused_once_and_in_words(
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

    for says, call in calls:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=says) as refused:
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


async def test_a_failed_video_says_why(sdk: openai.AsyncOpenAI, fake_video_model: FakeVideoModel) -> None:
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
