"""Small requests before a replica takes any: kernels are chosen and step times learned meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.events import Event, Failed
from deployments.protocol.request import GenerationRequest

logger = logging.getLogger(__name__)

Generate = Callable[[GenerationRequest], AsyncGenerator[Event]]


async def warm_up(card: ModelCard, generate: Generate) -> None:
    """One request of each warm-up size of the card; where blocks are compiled, then two at once, because a
    batch of several has a graph of its own. Nothing for a card without text to image.

    Raises ModelUnavailable when the blocks cannot be compiled; other failures are only logged.
    """
    if "t2i" not in card.tasks:
        return
    for width, height in card.serving.warm_up_sizes or [(card.sizes.width, card.sizes.height)]:
        request = GenerationRequest(
            model=card.id,
            prompt="warm-up",
            seed=0,
            num_inference_steps=card.steps.min,
            width=width,
            height=height,
        )
        for concurrency in (1, 2) if card.serving.compile else (1,):
            failures = await asyncio.gather(*(_failure(generate, request) for _ in range(concurrency)))
            for failure in filter(None, failures):
                size = f"{width}x{height}"
                logger.warning("warm-up failed", extra={"model": card.id, "size": size, "error": failure})
                if card.serving.compile:
                    raise ModelUnavailable(f"{card.id} cannot run compiled: {failure}")


async def _failure(generate: Generate, request: GenerationRequest) -> str | None:
    """Why the request failed; None when it did not."""
    async with aclosing(generate(request)) as events:
        async for event in events:
            if isinstance(event, Failed):
                return event.message
    return None
