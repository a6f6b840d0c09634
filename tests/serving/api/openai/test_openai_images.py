"""The openai SDK as a client, through a real server."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from deployments.protocol.errors import BadRequest
from deployments.protocol.events import Failed
from serve_app.api import sse
from serve_app.api.openai.image_schemas import OpenAIImageBody
from serve_app.api.state import ApiState
from tests.patience import patience
from tests.serving.api.conftest import KEY
from tests.serving.api.fake_model import FakeModel


@pytest.fixture
async def sdk(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key=KEY, timeout=patience()) as client:
        yield client


def calls(app: FastAPI, status: str) -> float:
    """How often POST /v1/images/generations was answered with this status."""
    state: ApiState = app.state.weft
    labels = {"method": "POST", "route": "/v1/images/generations", "status": status}
    return state.metrics.registry.get_sample_value("weft_http_requests_total", labels) or 0.0


def picture(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


async def test_a_picture_comes_back_as_base64(sdk: openai.AsyncOpenAI, fake_model: FakeModel):
    answer = await sdk.images.generate(prompt="a red fox", model="sketch", size="128x64")

    assert answer.data is not None
    assert picture(answer.data[0].b64_json).size == (128, 64)
    assert answer.output_format == "png"
    assert (answer.size, answer.created > 1_700_000_000) == ("128x64", True)


async def test_the_fields_of_vllm_omni_and_sglang_travel_as_extra_body(
    sdk: openai.AsyncOpenAI, fake_model: FakeModel
):
    answer = await sdk.images.generate(
        prompt="a red fox",
        model="sketch",
        n=2,
        output_format="jpeg",
        output_compression=80,
        extra_body={
            "seed": 7,
            "num_inference_steps": 3,
            "guidance_scale": 2,
            "negative_prompt": "snow",
            "width": 64,
            "height": 96,
        },
    )

    assert answer.data is not None
    assert [picture(entry.b64_json).format for entry in answer.data] == ["JPEG", "JPEG"]
    assert [entry.model_extra for entry in answer.data] == [{"seed": 7}, {"seed": 8}]
    assert answer.model_extra is not None
    assert (answer.model_extra["seed"], answer.model_extra["warnings"]) == (7, [])
    request = fake_model.requests[0]
    assert (request.num_inference_steps, request.guidance_scale, request.negative_prompt) == (3, 2.0, "snow")
    assert (request.width, request.height, request.output.quality) == (64, 96, 80)


async def test_an_adjustment_is_returned_beside_the_images(sdk: openai.AsyncOpenAI, fake_model: FakeModel):
    answer = await sdk.images.generate(
        prompt="a red fox", model="tiny-flux-schnell", extra_body={"num_inference_steps": 30}
    )

    assert answer.model_extra is not None
    assert answer.model_extra["warnings"][0]["code"] == "steps_corrected"


async def test_a_url_can_be_fetched(sdk: openai.AsyncOpenAI, address: str, fake_model: FakeModel):
    answer = await sdk.images.generate(prompt="a red fox", model="sketch", response_format="url")

    assert answer.data is not None
    url = answer.data[0].url
    assert url is not None
    assert url.startswith(f"http://{address}/api/results/")
    async with httpx.AsyncClient() as client:
        assert (await client.get(url)).headers["content-type"] == "image/png"


async def test_fields_without_meaning_here_are_ignored(sdk: openai.AsyncOpenAI, fake_model: FakeModel):
    answer = await sdk.images.generate(
        prompt="a red fox",
        size="auto",
        quality="high",
        style="vivid",
        moderation="low",
        user="someone",
        background="auto",
        stream=False,
    )

    assert answer.data is not None
    assert len(answer.data) == 1


async def test_the_models_are_listed_and_read_by_id_and_alias(sdk: openai.AsyncOpenAI):
    listed = [model.id async for model in sdk.models.list()]
    one = await sdk.models.retrieve("someone/sketch")

    assert listed == ["tiny-flux-schnell", "sketch"]
    assert (one.id, one.object) == ("sketch", "model")


@pytest.mark.parametrize(
    ("fields", "error", "message", "status"),
    [
        ({"model": "dall-e-3"}, openai.NotFoundError, "there is sketch, tiny-flux-schnell", "404"),
        ({"size": "huge"}, openai.BadRequestError, "such as '256x256'", "400"),
        ({"size": "128x128", "extra_body": {"width": 64}}, openai.BadRequestError, "send one of them", "400"),
        ({"n": 11}, openai.BadRequestError, "less than or equal to 10", "400"),
        ({"n": 5}, openai.BadRequestError, "n is 5; sketch makes at most 4", "400"),
        ({"output_format": "gif"}, openai.BadRequestError, "'png', 'jpeg' or 'webp'", "400"),
        ({"background": "transparent"}, openai.BadRequestError, "'auto' or 'opaque'", "400"),
        ({"partial_images": 2}, openai.BadRequestError, "needs stream: true", "400"),
        ({"partial_images": 4, "stream": True}, openai.BadRequestError, "less than or equal to 3", "400"),
        ({"partial_images": -1, "stream": True}, openai.BadRequestError, "greater than or equal", "400"),
        ({"stream": True, "response_format": "url"}, openai.BadRequestError, "b64_json only", "400"),
        ({"stream": True, "model": "dall-e-3"}, openai.NotFoundError, "there is sketch", "404"),
        ({"extra_body": {"stream": "yes"}}, openai.BadRequestError, "valid boolean", "400"),
        ({"extra_body": {"mask_image": "x"}}, openai.BadRequestError, "/v1/images/edits", "400"),
        ({"extra_body": {"aspect_ratio": "wide"}}, openai.BadRequestError, "such as '16:9'", "400"),
        ({"prompt": " "}, openai.BadRequestError, "prompt is empty", "400"),
    ],
)
async def test_a_wrong_request_raises_the_sdks_error_once_with_the_reason(
    sdk: openai.AsyncOpenAI,
    app: FastAPI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    message: str,
    status: str,
):
    with pytest.raises(error) as refusal:
        await sdk.images.generate(**{"prompt": "a red fox", "model": "sketch", **fields})

    assert message in refusal.value.message
    assert refusal.value.request_id
    assert calls(app, status) == 1


async def test_an_unknown_model_has_openais_code_for_it(sdk: openai.AsyncOpenAI):
    with pytest.raises(openai.NotFoundError) as refusal:
        await sdk.images.generate(prompt="a red fox", model="dall-e-3")

    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    assert refusal.value.type == "invalid_request_error"


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_a_wrong_key_is_an_authentication_error(address: str):
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="sk-wrong") as sdk:
        with pytest.raises(openai.AuthenticationError, match="not known here"):
            await sdk.models.list()


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_the_right_key_opens(sdk: openai.AsyncOpenAI, fake_model: FakeModel):
    answer = await sdk.images.generate(prompt="a red fox", model="sketch")

    assert answer.data


@pytest.mark.parametrize(
    ("kind", "status"), [("out_of_memory", 400), ("internal", 500), ("model_unavailable", 503)]
)
async def test_a_failed_job_raises_its_reason(
    sdk: openai.AsyncOpenAI, fake_model: FakeModel, kind: str, status: int
):
    fake_model.failure = Failed(kind, "the brush broke", retryable=False)

    with pytest.raises(openai.APIStatusError, match="the brush broke") as refusal:
        await sdk.with_options(max_retries=0).images.generate(prompt="a red fox", model="sketch")

    assert refusal.value.status_code == status


async def test_a_bug_is_not_repeated_by_the_sdk(sdk: openai.AsyncOpenAI, app: FastAPI, fake_model: FakeModel):
    fake_model.failure = Failed("internal", "the brush broke", retryable=False)

    with pytest.raises(openai.InternalServerError):
        await sdk.images.generate(prompt="a red fox", model="sketch")

    assert calls(app, "500") == 1


@pytest.mark.parametrize("app", ["hasty"], indirect=True)
async def test_a_wait_too_long_names_the_job_which_continues(
    sdk: openai.AsyncOpenAI, app: FastAPI, address: str, fake_model: FakeModel
):
    fake_model.gate.clear()

    with pytest.raises(openai.InternalServerError, match="it continues") as late:
        await sdk.images.generate(prompt="a red fox", model="sketch")

    assert (late.value.status_code, calls(app, "504")) == (504, 1)
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job = (await client.get("/api/generate/")).json()["jobs"][0]
        assert job["id"] in late.value.message
        assert job["cancel_requested"] is False


async def test_a_client_that_hangs_up_cancels_its_job(address: str, fake_model: FakeModel):
    fake_model.gate.clear()
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        call = asyncio.create_task(
            client.post("/v1/images/generations", json={"prompt": "a red fox", "model": "sketch"})
        )
        job_id = await job_begun(client, fake_model)

        call.cancel()

        answer = await client.get(f"/api/generate/{job_id}/events")
    assert "event: cancelled" in answer.text


async def test_a_job_cancelled_by_another_call_is_a_conflict_that_is_not_repeated(
    sdk: openai.AsyncOpenAI, app: FastAPI, address: str, fake_model: FakeModel
):
    fake_model.gate.clear()
    call = asyncio.create_task(sdk.images.generate(prompt="a red fox", model="sketch"))
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        await client.delete(f"/api/generate/{await job_begun(client, fake_model)}")

    with pytest.raises(openai.ConflictError, match="was cancelled"):
        await call
    assert calls(app, "409") == 1


async def test_a_stream_brings_partial_images_and_then_the_picture(
    sdk: openai.AsyncOpenAI, fake_model: FakeModel
):
    stream = await sdk.images.generate(
        prompt="a red fox", model="sketch", size="128x64", stream=True, partial_images=2
    )

    first, second, last = [event async for event in stream]

    assert isinstance(first, ImageGenPartialImageEvent)
    assert isinstance(second, ImageGenPartialImageEvent)
    assert isinstance(last, ImageGenCompletedEvent)
    assert (first.partial_image_index, second.partial_image_index) == (0, 1)
    for step, partial in enumerate((first, second), 1):
        shown = picture(partial.b64_json)
        assert (shown.format, shown.size, shown.getpixel((64, 32))) == ("PNG", (128, 64), (step, 80, 120))
        assert (partial.output_format, partial.size) == ("png", "128x64")
    assert (picture(last.b64_json).format, picture(last.b64_json).size) == ("PNG", (128, 64))
    assert (last.output_format, last.size, last.usage.total_tokens) == ("png", "128x64", 0)
    assert fake_model.requests[0].output.previews == 2


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("n", [1, 3])
async def test_partial_images_have_the_format_of_the_images_and_are_as_many_for_several(
    n: int, output_format: Any, sdk: openai.AsyncOpenAI, fake_model: FakeModel
):
    stream = await sdk.images.generate(
        prompt="a red fox",
        model="sketch",
        size="64x128",
        n=n,
        stream=True,
        partial_images=2,
        output_format=output_format,
        output_compression=90,
    )

    events = [event async for event in stream]

    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        *["image_generation.completed"] * n,
    ]
    assert [e.partial_image_index for e in events if isinstance(e, ImageGenPartialImageEvent)] == [0, 1]
    for event in events:
        shown = picture(event.b64_json)
        assert (shown.format, shown.size) == (output_format.upper(), (64, 128))
        assert (event.output_format, event.size) == (output_format, "64x128")


async def test_a_job_that_is_begun_again_sends_no_partial_image_twice(
    sdk: openai.AsyncOpenAI, fake_model: FakeModel
):
    fake_model.lost_after = 1
    stream = await sdk.images.generate(prompt="a red fox", model="sketch", stream=True, partial_images=2)

    first, second, last = [event async for event in stream]

    assert isinstance(first, ImageGenPartialImageEvent)
    assert isinstance(second, ImageGenPartialImageEvent)
    assert isinstance(last, ImageGenCompletedEvent)
    seen = [picture(event.b64_json).getpixel((0, 0)) for event in (first, second)]
    assert seen == [(1, 80, 120), (2, 80, 120)]


async def test_a_stream_without_partial_images_is_one_event_per_picture(
    sdk: openai.AsyncOpenAI, fake_model: FakeModel
):
    stream = await sdk.images.generate(
        prompt="a red fox", model="sketch", n=2, stream=True, extra_body={"seed": 7}
    )

    events = [event async for event in stream]

    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert [event.to_dict()["seed"] for event in events] == [7, 8]


async def test_a_partial_image_comes_before_the_picture_is_done_and_comments_fill_the_silence(
    address: str, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.02)
    fake_model.gate.clear()
    body = {"prompt": "a red fox", "model": "sketch", "stream": True, "partial_images": 1}
    async with (
        httpx.AsyncClient(base_url=f"http://{address}") as client,
        client.stream("POST", "/v1/images/generations", json=body) as answer,
    ):
        lines = answer.aiter_lines()
        first = await anext(line async for line in lines if line.startswith("event: "))
        silence = await anext(line async for line in lines if line.startswith(":"))
        fake_model.gate.set()
        rest = [line async for line in lines if line.startswith("event: ")]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (first, silence) == ("event: image_generation.partial_image", ": still here")
    assert rest == ["event: image_generation.completed"]


async def test_a_failed_stream_raises_its_reason(
    sdk: openai.AsyncOpenAI, app: FastAPI, fake_model: FakeModel
):
    fake_model.failure = Failed("out_of_memory", "the brush broke", retryable=False)
    stream = await sdk.images.generate(prompt="a red fox", model="sketch", stream=True, partial_images=1)

    with pytest.raises(openai.APIError, match="the brush broke") as refusal:
        [event async for event in stream]

    assert (refusal.value.code, refusal.value.type) == ("out_of_memory", "invalid_request_error")
    assert calls(app, "200") == 1


async def test_a_stream_whose_job_is_cancelled_by_another_call_ends_with_that_error(
    sdk: openai.AsyncOpenAI, address: str, fake_model: FakeModel
):
    fake_model.gate.clear()
    stream = await sdk.images.generate(prompt="a red fox", model="sketch", stream=True)
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        await client.delete(f"/api/generate/{await job_begun(client, fake_model)}")

    with pytest.raises(openai.APIError, match="was cancelled"):
        [event async for event in stream]


async def test_a_client_that_leaves_its_stream_cancels_its_job(
    sdk: openai.AsyncOpenAI, address: str, fake_model: FakeModel
):
    fake_model.gate.clear()
    stream = await sdk.images.generate(prompt="a red fox", model="sketch", stream=True)
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        job_id = await job_begun(client, fake_model)

        await stream.close()

        answer = await client.get(f"/api/generate/{job_id}/events")
    assert "event: cancelled" in answer.text


async def test_a_temporary_failure_gives_the_sdk_retry_after(sdk: openai.AsyncOpenAI, fake_model: FakeModel):
    fake_model.failure = Failed("overloaded", "all brushes are out", retryable=False, retry_after_s=7.2)

    with pytest.raises(openai.InternalServerError, match="all brushes are out") as refusal:
        await sdk.with_options(max_retries=0).images.generate(prompt="a red fox", model="sketch")

    headers = refusal.value.response.headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("8", "7200")


async def job_begun(client: httpx.AsyncClient, fake_model: FakeModel) -> str:
    """The id of the only job, once the model works on it."""
    await fake_model.began.wait()
    return str((await client.get("/api/generate/")).json()["jobs"][0]["id"])


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (None, None)),
        ({"size": "auto"}, (None, None)),
        ({"size": "256x128"}, (256, 128)),
        ({"width": 64}, (64, None)),
        ({"size": "256x128", "width": 256, "height": 128}, (256, 128)),
        ({"size": "auto", "height": 96}, (None, 96)),
    ],
)
def test_size_is_one_field_or_two(fields: dict[str, Any], size: tuple[int | None, int | None]):
    request = OpenAIImageBody.model_validate({"prompt": "a", **fields}).to_request("sketch")

    assert (request.width, request.height) == size


@pytest.mark.parametrize(
    "size", ["256", "256X256", "256x", "-1x5", "999999x1", "256x256x256", "", "\u0662x\u0665"]
)
def test_another_size_is_refused(size: str):
    with pytest.raises(BadRequest, match="such as '256x256'"):
        OpenAIImageBody.model_validate({"prompt": "a", "size": size}).to_request("sketch")
