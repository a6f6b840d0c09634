"""Names of models that clients cannot change stand for models of the service, and the answer says so."""

import base64
import io
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from PIL import Image

from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.settings import Settings
from tests.serving.api.conftest import client_of
from tests.serving.api.fake_model import FakeModel

ALIASES = {"dall-e-3": "sketch", "GPT-image-1": "tiny-flux-schnell", "gone": "removed-model"}


def png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
async def aliased(state: ApiState, fake_model: FakeModel) -> AsyncIterator[httpx.AsyncClient]:
    settings = state.settings.model_copy(update={"model_aliases": ALIASES})
    async with client_of(create_app(replace(state, settings=settings))) as client:
        yield client


@pytest.fixture
async def open_to_any(state: ApiState, fake_model: FakeModel) -> AsyncIterator[httpx.AsyncClient]:
    settings = state.settings.model_copy(update={"model_aliases": {**ALIASES, "*": "sketch"}})
    async with client_of(create_app(replace(state, settings=settings))) as client:
        yield client


CALLS = {
    "/v1/images/generations": {"prompt": "a star"},
    "/v1/images/edits": {"prompt": "a star", "image": png(), "mask": png()},
    "/api/generate/image": {"prompt": "a star"},
    "/generate-image": {"prompt": "a star"},
}


@pytest.mark.parametrize("path", [path for path in CALLS if "edits" not in path])
async def test_an_alias_is_served_with_a_warning(aliased: httpx.AsyncClient, path: str) -> None:
    answer = await aliased.post(path, json={**CALLS[path], "model": "Dall-E-3"})

    assert answer.status_code < 300, answer.text
    job = await aliased.get(f"/api/generate/{answer.json().get('id') or answer.json()['task_id']}")
    assert job.json()["request"]["model"] == "sketch"
    (warning,) = [found for found in job.json()["warnings"] if found["code"] == "model_aliased"]
    assert warning["param"] == "model"
    assert "'Dall-E-3' stands for sketch here (WEFT_MODEL_ALIASES)" in warning["message"]


@pytest.mark.parametrize("path", CALLS)
async def test_an_unknown_name_is_refused_with_the_setting(aliased: httpx.AsyncClient, path: str) -> None:
    answer = await aliased.post(path, json={**CALLS[path], "model": "gpt-image-2"})

    assert answer.status_code == 404
    assert "WEFT_MODEL_ALIASES" in answer.text
    assert "there is no model 'gpt-image-2' here" in answer.text


async def test_an_alias_of_a_model_that_is_not_served_says_which(aliased: httpx.AsyncClient) -> None:
    answer = await aliased.post("/v1/images/generations", json={"prompt": "a star", "model": "gone"})

    assert answer.status_code == 404
    assert "'gone' stands for 'removed-model' by WEFT_MODEL_ALIASES" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", CALLS)
async def test_an_empty_name_is_no_alias(open_to_any: httpx.AsyncClient, path: str) -> None:
    answer = await open_to_any.post(path, json={**CALLS[path], "model": ""})

    assert answer.status_code in (400, 422)
    assert "at least 1 character" in answer.text


async def test_a_star_stands_for_every_other_name(open_to_any: httpx.AsyncClient) -> None:
    for name, model in (("anything", "sketch"), ("gpt-image-1", "tiny-flux-schnell"), ("sketch", "sketch")):
        answer = await open_to_any.post("/v1/images/generations", json={"prompt": "a star", "model": name})
        assert answer.json()["model"] == model
        codes = [warning["code"] for warning in answer.json()["warnings"]]
        assert ("model_aliased" in codes) == (name != model)


async def test_a_model_is_read_by_its_alias(aliased: httpx.AsyncClient) -> None:
    assert (await aliased.get("/v1/models/dall-e-3")).json()["id"] == "sketch"
    assert (await aliased.get("/v1/models/dall-e-4")).status_code == 404


@pytest.mark.parametrize(
    ("text", "aliases"),
    [
        ("dall-e-3=sketch, *=tiny", {"dall-e-3": "sketch", "*": "tiny"}),
        ("a=b;c=d", {"a": "b", "c": "d"}),
        ("", {}),
    ],
)
def test_aliases_are_read_from_the_environment(
    text: str, aliases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_MODEL_ALIASES", text)

    assert Settings.load().model_aliases == aliases


@pytest.mark.parametrize("text", ["dall-e-3", "=sketch", "dall-e-3=", "a=b, c"])
def test_malformed_aliases_are_refused_with_the_form(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_MODEL_ALIASES", text)

    with pytest.raises(Exception, match=r"WEFT_MODEL_ALIASES .* must be pairs NAME=MODEL"):
        Settings.load()
