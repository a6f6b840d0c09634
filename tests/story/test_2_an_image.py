"""Chapter 2: a model replica turns a request into events; the last ones carry the image."""

from __future__ import annotations

import asyncio
import io

from PIL import Image

from deployments.protocol.events import Artifact, Event
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica


async def events_of(model: ModelReplica, request: GenerationRequest) -> list[Event]:
    return [event async for event in model.generate(request)]


async def test_a_request_becomes_events(model: ModelReplica) -> None:
    request = GenerationRequest(
        model="tiny-flux-schnell", prompt="a red circle on a white background", seed=1
    )

    events = await events_of(model, request)

    names = [type(event).__name__ for event in events]
    assert names == ["Queued", "Started", "Step", "Step", "Step", "Step", "Artifact", "Artifact", "Done"]


async def test_the_image_shows_what_the_prompt_says(model: ModelReplica) -> None:
    request = GenerationRequest(
        model="tiny-flux-schnell", prompt="a red circle in the center on white", seed=1
    )

    events = await events_of(model, request)

    image = Image.open(io.BytesIO(next(e for e in events if isinstance(e, Artifact)).data)).convert("RGB")
    red, green, blue = image.getpixel((64, 64))  # type: ignore[misc]
    assert red > 180
    assert green < 100
    assert blue < 100


async def test_concurrent_requests_share_forwards(model: ModelReplica) -> None:
    engine = model._runtime.worker._engine
    rows, forwards = engine.rows, engine.forwards
    requests = [GenerationRequest(model="tiny-flux-schnell", prompt="a blue star", seed=i) for i in range(6)]

    await asyncio.gather(*(events_of(model, request) for request in requests))

    assert engine.rows - rows > 1.1 * (engine.forwards - forwards)
