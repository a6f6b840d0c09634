"""/v1/images/edits as the openai SDK calls it: by reference, inpainted, or from the image."""

import base64
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import openai
import pytest

from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import patience
from tests.serving.api.cards import CARDS
from tests.serving.api.conftest import KEY
from tests.serving.api.editing import INPAINTER, RETOUCH, png
from tests.serving.api.fake_model import FakeModel

RED, BLUE = png(), png((30, 40, 200))
MASK = png((0, 0, 0, 0), mode="RGBA")


@pytest.fixture
async def state(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[ApiState]:
    """With models that edit and inpaint."""

    async def model_states() -> dict[str, str]:
        return {"sketch": "ready", "retouch": "ready", "inpainter": "ready"}

    cards = CARDS | {card.id: card for card in (RETOUCH, INPAINTER)}
    job_service = JobService(store, results, cards, settings)
    yield ApiState(job_service=job_service, cards=cards, settings=settings, model_states=model_states)
    await job_service.aclose()


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake model serves the models of this file, too."""
    free = {"sketch": 8, "retouch": 8, "inpainter": 8}
    monkeypatch.setattr(FakeModel, "free_slots", lambda _model: free)


@pytest.fixture
async def sdk(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key=KEY, timeout=patience()) as client:
        yield client


def warnings(answer: Any) -> list[str]:
    return [warning["code"] for warning in answer.model_extra["warnings"]]


async def test_an_image_is_edited_by_reference(sdk: openai.AsyncOpenAI, fake_model: FakeModel) -> None:
    answer = await sdk.images.edit(image=("a.png", RED), prompt="make it blue", model="retouch")

    (request,) = fake_model.requests
    assert (request.task.value, request.references, request.edit) == ("edit", (RED,), None)
    assert answer.data is not None
    assert base64.b64decode(answer.data[0].b64_json or "")[:4] == b"\x89PNG"
    assert (answer.size, warnings(answer)) == ("128x128", [])


@pytest.mark.parametrize("fidelity", ["high", "low"])
@pytest.mark.parametrize(("model", "others"), [("retouch", []), ("sketch", ["edit_by_strength"])])
async def test_input_fidelity_has_no_effect_and_the_answer_says_so(
    sdk: openai.AsyncOpenAI,
    fake_model: FakeModel,
    fidelity: Literal["high", "low"],
    model: str,
    others: list[str],
) -> None:
    answer = await sdk.images.edit(
        image=("a.png", RED), prompt="make it blue", model=model, input_fidelity=fidelity
    )

    assert len(fake_model.requests) == 1
    assert warnings(answer) == ["input_fidelity_ignored", *others]


async def test_several_images_keep_their_order(sdk: openai.AsyncOpenAI, fake_model: FakeModel) -> None:
    files = [("a.png", RED), ("b.png", BLUE), ("c.png", RED)]

    await sdk.images.edit(image=files, prompt="both together", extra_body={"seed": 3})

    (request,) = fake_model.requests
    assert (request.model, request.references) == ("retouch", (RED, BLUE, RED))
    assert request.seed == 3


async def test_a_mask_inpaints_where_it_is_transparent(
    sdk: openai.AsyncOpenAI, fake_model: FakeModel
) -> None:
    await sdk.images.edit(image=("a.png", RED), mask=("m.png", MASK), prompt="a fox")

    (request,) = fake_model.requests
    assert (request.model, request.task.value, request.references) == ("inpainter", "inpaint", ())
    assert request.edit is not None
    assert (request.edit.image, request.edit.mask_image) == (RED, MASK)
    assert request.edit.mask_channel == "alpha"


async def test_a_model_without_reference_images_starts_from_the_image_and_says_so(
    sdk: openai.AsyncOpenAI, fake_model: FakeModel
) -> None:
    answer = await sdk.images.edit(image=("a.png", RED), prompt="make it blue", model="sketch")

    (request,) = fake_model.requests
    assert request.task.value == "i2i"
    assert request.edit is not None
    assert request.edit.strength == 0.8
    assert warnings(answer) == ["edit_by_strength"]
    assert answer.model_extra is not None
    assert "strength 0.8" in answer.model_extra["warnings"][0]["message"]


async def test_a_stream_has_the_events_of_an_edit(sdk: openai.AsyncOpenAI, fake_model: FakeModel) -> None:
    stream = await sdk.images.edit(
        image=("a.png", RED), prompt="make it blue", model="retouch", stream=True, partial_images=2
    )

    kinds = [event.type async for event in stream]
    assert kinds == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


@pytest.mark.parametrize(
    ("files", "fields", "param", "words"),
    [
        ([RED] * 4, {"model": "retouch"}, "image", "there are 4 reference pictures; retouch takes at most 3"),
        ([RED] * 2, {"model": "sketch"}, "image", "there are 2 images; sketch takes one image"),
        ([png(size=(300, 300))], {"model": "retouch"}, "image", "image is 300x300"),
        ([b"no picture"], {"model": "retouch"}, "image", "image"),
        ([RED], {"model": "retouch", "strength": "0.5"}, "strength", "have no strength"),
        ([RED], {"model": "retouch", "n": "9"}, "n", "n is 9; retouch makes at most 4"),
        ([RED], {"model": "none"}, "model", "there is no model 'none'"),
        ([RED] * 11, {"model": "retouch"}, "image", "more than 10"),
        ([], {"model": "retouch"}, "image", "image is missing"),
    ],
)
async def test_errors_have_the_names_and_the_form_of_openai(
    client: httpx.AsyncClient, files: list[bytes], fields: dict[str, str], param: str, words: str
) -> None:
    parts = [("image[]", (f"{index}.png", data, "image/png")) for index, data in enumerate(files)]
    form: Any = parts or [("other", ("", b""))]

    answer = await client.post("/v1/images/edits", data={"prompt": "make it blue", **fields}, files=form)

    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500, answer.text
    assert (error["param"] or "").split(".")[0] == param
    assert words in error["message"]
    assert "reference_images" not in error["message"]


async def test_json_carries_images_as_base64(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    images = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (RED, BLUE)]

    answer = await client.post(
        "/v1/images/edits", json={"prompt": "both", "model": "retouch", "image": images}
    )
    single = await client.post(
        "/v1/images/edits", json={"prompt": "both", "model": "retouch", "image": images[0]}
    )

    assert (answer.status_code, single.status_code) == (200, 200), answer.text
    assert [request.references for request in fake_model.requests] == [(RED, BLUE), (RED,)]
