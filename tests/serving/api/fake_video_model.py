"""A fake model that generates videos, and the call that waits for one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact, Done, Event, Failed, Stage, Started, Step
from deployments.protocol.request import ResolvedRequest
from tests.serving.api.calls import ended

TINY_WAN = load_card(Path(__file__).parents[3] / "configs/models/tiny-wan.yaml")
assert TINY_WAN.videos is not None
WAN = TINY_WAN.model_copy(
    update={
        "tasks": ["t2v", "i2v"],
        "videos": TINY_WAN.videos.model_copy(update={"last_image": "optional"}),
    }
)
FRAMEWISE = load_card(Path(__file__).parents[3] / "configs/models/tiny-sd15.yaml")
VIDEO = bytes(range(256)) * 8
BODY = {"prompt": "a red circle moving left", "seed": 7, "steps": 2}


class FakeVideoModel:
    """Generates videos at once, unless `gate` is closed."""

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


async def completed_video(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    answer = await client.post("/api/generate/video", json=BODY | changes)
    assert answer.status_code == 202, answer.text
    return await ended(client, answer.json()["id"])
