"""The tools at /mcp, called by the client of the package mcp."""

import base64
import json
from typing import Any

import httpx
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.patience import patience
from tests.serving.api.conftest import KEY
from tests.serving.api.editing import png
from tests.serving.api.fake_model import FakeModel

pytestmark = pytest.mark.parametrize("app", ["locked"], indirect=True)
RED = base64.b64encode(png()).decode()


class Assistant:
    """A client with the key."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key
        self.progress: list[float] = []

    async def __call__(self, tool: str, **arguments: Any) -> Any:
        async def seen(progress: float, total: float | None, message: str | None) -> None:
            self.progress.append(progress)

        async with self.http() as http, Client(streamable_http_client(self._url, http_client=http)) as client:
            return await client.call_tool(tool, arguments, progress_callback=seen)

    def http(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(headers={"Authorization": f"Bearer {self._key}"}, timeout=patience())

    async def tools(self) -> list[str]:
        async with self.http() as http, Client(streamable_http_client(self._url, http_client=http)) as client:
            return [tool.name for tool in (await client.list_tools()).tools]


@pytest.fixture
def assistant(address: str) -> Assistant:
    return Assistant(f"http://{address}/mcp", KEY)


def facts(answer: Any) -> Any:
    """The JSON text of a result."""
    return json.loads(next(block.text for block in answer.content if block.type == "text"))


async def test_an_image_is_generated_with_progress(assistant: Assistant, fake_model: FakeModel) -> None:
    answer = await assistant(
        "generate_image", prompt="a fox", model="sketch", width=5000, height=5000, steps=99, seed=7
    )

    (request,) = fake_model.requests
    found = facts(answer)
    image = next(block for block in answer.content if block.type == "image")
    link = next(block for block in answer.content if block.type == "resource_link")
    assert not answer.is_error
    assert base64.b64decode(image.data)[:4] == b"\x89PNG"
    assert str(link.uri) == found["files"][0]
    assert (found["seed"], found["width"], request.num_inference_steps) == (7, request.width, 50)
    assert any("runs 1-50 steps" in warning for warning in found["warnings"])
    assert assistant.progress == sorted(assistant.progress)
    assert len(assistant.progress) > 1
    status = facts(await assistant("job_status", job_id=found["job_id"]))
    assert (status["status"], status["progress"]) == ("completed", 100)


async def test_an_image_is_edited(assistant: Assistant, fake_model: FakeModel) -> None:
    answer = await assistant("edit_image", prompt="make it blue", image=RED, strength=0.5)

    (request,) = fake_model.requests
    assert not answer.is_error, answer.content
    assert request.edit is not None
    assert (request.task.value, request.edit.strength) == ("i2i", 0.5)


async def test_tools_and_models_are_listed(assistant: Assistant) -> None:
    models = facts(await assistant("list_models"))

    assert {model["id"] for model in models} == {"sketch", "tiny-flux-schnell"}
    assert await assistant.tools() == [
        "generate_image",
        "edit_image",
        "generate_video",
        "list_models",
        "job_status",
    ]


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("generate_image", {"prompt": ""}, "prompt is empty"),
        ("generate_image", {"prompt": "x", "colour": 1}, "colour"),
        ("generate_image", {"prompt": "x", "model": "none"}, "no model 'none'"),
        ("generate_image", {"prompt": "x", "num_images": 17}, "num_images"),
        ("edit_image", {"prompt": "x", "image": "AAAA"}, "image"),
        ("generate_video", {"prompt": "x"}, "no model here can do t2v"),
        ("job_status", {"job_id": "0" * 32}, "no such job"),
    ],
)
async def test_errors_are_results_that_name_the_cause(
    assistant: Assistant, fake_model: FakeModel, tool: str, arguments: dict[str, Any], message: str
) -> None:
    answer = await assistant(tool, **arguments)

    assert answer.is_error
    assert message in answer.content[0].text
    assert fake_model.requests == []


async def test_the_key_is_needed(client: httpx.AsyncClient) -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}

    answer = await client.post("/mcp", json=call, headers={"Accept": "application/json, text/event-stream"})

    assert answer.status_code == 401
