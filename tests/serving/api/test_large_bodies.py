"""Large bodies: read once their caller is known, and decoded in parts beside the event loop."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import random
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve_app.admission.fair_slots import FairSlots
from serve_app.api import request_body
from serve_app.api.app import create_app
from serve_app.api.native.image_body import ImageBody
from serve_app.api.schemas import files
from serve_app.api.state import ApiState
from tests.patience import patience
from tests.serving.api.conftest import KEY, client_of
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.test_access import calls

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("app", ["locked"], indirect=True)
async def test_no_route_reads_the_body_of_a_caller_without_a_key(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    read: list[str] = []

    async def body(path: str) -> AsyncIterator[bytes]:
        read.append(path)
        yield b"{}"

    for method, path in calls(app):
        if method in ("post", "patch", "put") and path not in ("/auth/token", "/auth/session"):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                answer = await client.request(method, path, content=body(path), headers=JSON | headers)
                assert answer.status_code in (401, 429), path

    assert read == []


@pytest.mark.parametrize("app", ["locked"], indirect=True)
@pytest.mark.parametrize("path", ["/auth/token", "/auth/session"])
async def test_a_log_in_takes_no_large_body(client: httpx.AsyncClient, path: str) -> None:
    large = {"api_key": KEY, "email": "x" * 100_000}

    answer = await client.post(path, json=large)

    assert answer.status_code == 413


async def test_a_large_body_is_parsed_in_another_thread(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    parsed = request_body._parsed

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return parsed(*args)

    monkeypatch.setattr(request_body, "_parsed", noted)
    for size in (300, 300_000):
        image = base64.b64encode(bytes(size)).decode()
        answer = await client.post(
            "/api/generate/image", json={"prompt": "x", "model": "sketch", "image": image}
        )
        assert answer.status_code == 422

    assert threads == [True, False]


def with_picture() -> dict[str, object]:
    """A body of over a MiB that is accepted."""
    buffer = io.BytesIO()
    noise = Image.frombytes("RGB", (640, 640), random.Random(7).randbytes(640 * 640 * 3))
    noise.save(buffer, "PNG", compress_level=0)
    image = base64.b64encode(buffer.getvalue()).decode()
    return {"prompt": "x", "model": "sketch", "image": image, "strength": 0.5}


@pytest.mark.parametrize("how", ["json", "form", "chunked"])
async def test_few_large_bodies_are_in_memory_at_once_and_small_ones_always(
    state: ApiState, how: str
) -> None:
    slots = FairSlots(1, 1, 0.01, "large calls")
    body = json.dumps(with_picture()).encode()

    async def parts() -> AsyncIterator[bytes]:
        yield body

    calls: dict[str, dict[str, Any]] = {
        "json": {"content": body, "headers": JSON},
        "chunked": {"content": parts(), "headers": JSON},
        "form": {"data": {"prompt": "x", "model": "sketch"}, "files": {"image": body}},
    }
    async with client_of(create_app(replace(state, large_bodies=slots))) as client, slots.hold("local"):
        large = await client.post("/api/generate/image", **calls[how])
        small = await client.post("/api/generate/image", json={"prompt": "x", "model": "sketch"})

    assert (large.status_code, small.status_code) == (503, 202)
    assert "large calls of yours are in progress" in large.json()["error"]["message"]


async def test_a_call_that_waits_for_its_job_holds_no_place_of_large_bodies(
    state: ApiState, fake_model: FakeModel
) -> None:
    fake_model.gate.clear()
    slots = FairSlots(1, 1, patience(), "large calls")
    async with client_of(create_app(replace(state, large_bodies=slots))) as client:
        large = {"prompt": "x", "model": "sketch", "style": "x" * 2**20}
        waiting = asyncio.create_task(client.post("/v1/images/generations", json=large))
        accepted = [
            (await client.post("/api/generate/image", json=with_picture() | {"seed": seed})).status_code
            for seed in range(2)
        ]
        still_waiting = not waiting.done()
        fake_model.gate.set()
        done = await waiting

    assert accepted == [202, 202]
    assert still_waiting
    assert done.status_code == 200, done.text


@given(
    data=st.binary(max_size=300),
    size=st.integers(1, 16).map(lambda n: 4 * n),
    blanks=st.lists(st.tuples(st.integers(0, 400), st.sampled_from(" \n\r\t")), max_size=20),
)
def test_base64_in_parts_is_base64(data: bytes, size: int, blanks: list[tuple[int, str]]) -> None:
    text = base64.b64encode(data).decode()
    for at, blank in blanks:
        text = text[:at] + blank + text[at:]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "PART_CHARS", size)

        assert files._decode(text) == data


@given(text=st.text(st.sampled_from("Aa0+/=-* é"), max_size=24), size=st.sampled_from([4, 8, 12]))
def test_what_is_no_base64_is_refused_in_parts_as_in_whole(text: str, size: int) -> None:
    def decoded(decode: Any) -> bytes | None:
        try:
            return bytes(decode(text))
        except (binascii.Error, ValueError):
            return None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "PART_CHARS", size)
        in_parts = decoded(files._decode)

    whole = "".join(text.split())
    expected = decoded(lambda _text: base64.b64decode(whole, validate=True))
    assert in_parts == (None if len(whole) % 4 else expected)  # the library takes a needless "=" as well


def test_a_picture_of_many_parts_comes_whole() -> None:
    data = bytes(range(256)) * 5000
    body = {"prompt": "x", "image": "data:image/png;base64," + base64.encodebytes(data).decode()}

    assert ImageBody.model_validate_json(json.dumps(body)).image == data
