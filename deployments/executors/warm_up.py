"""Small requests before a replica takes any: kernels are chosen, step times learned, batch sizes proven."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from PIL import Image

from deployments.engine.proof_state import ProofState
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.events import Event, Failed
from deployments.protocol.request import GenerationRequest, Task

PROVE_LIMIT_S = 10.0  # a start waits no longer; what is left is tried while no request waits

logger = logging.getLogger(__name__)

Generate = Callable[[GenerationRequest], AsyncGenerator[Event]]


class Prover(Protocol):
    """What the warm-up needs of the engine."""

    async def prove_all(self, limit_s: float) -> None:
        """Try the batch sizes of all shapes seen so far, for at most so long."""

    def proofs(self) -> Sequence[ProofState]:
        """What is known of them."""


async def warm_up(card: ModelCard, generate: Generate, prover: Prover) -> None:
    """One request of each warm-up size of the card; where blocks are compiled, then two at once, because a
    batch of several has a graph of its own. Then the batch sizes of their shapes are proven, so that the
    first users' requests share forwards exactly. A card without text to image is warmed up by an edit of a
    blank picture; nothing for one that has neither task.

    Raises ModelUnavailable when the blocks cannot be compiled; other failures are only logged.
    """
    if not {Task.t2i, Task.edit} & set(card.tasks):
        return
    for width, height in card.serving.warm_up_sizes or [(card.sizes.width, card.sizes.height)]:
        request = GenerationRequest(
            model=card.id,
            prompt="warm-up",
            seed=0,
            num_inference_steps=card.steps.min,
            width=width,
            height=height,
            references=() if Task.t2i in card.tasks else (_blank(width, height),),
        )
        for concurrency in (1, 2) if card.serving.compile else (1,):
            failures = await asyncio.gather(*(_failure(generate, request) for _ in range(concurrency)))
            for failure in filter(None, failures):
                size = f"{width}x{height}"
                logger.warning("warm-up failed", extra={"model": card.id, "size": size, "error": failure})
                if card.serving.compile:
                    raise ModelUnavailable(f"{card.id} cannot run compiled: {failure}")
    if card.serving.exact != "off":
        await prover.prove_all(PROVE_LIMIT_S)
        for state in prover.proofs():
            logger.info("%s", _in_words(state), extra={"model": card.id})


def _blank(width: int, height: int) -> bytes:
    """A grey picture as a PNG file."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


async def _failure(generate: Generate, request: GenerationRequest) -> str | None:
    """Why the request failed; None when it did not."""
    async with aclosing(generate(request)) as events:
        async for event in events:
            if isinstance(event, Failed):
                return event.message
    return None


def _in_words(state: ProofState) -> str:
    """What is known of the batch sizes of one module and shape, as a sentence."""

    def sizes(listed: Sequence[int]) -> str:
        return ", ".join(map(str, listed)) or "none"

    return (
        f"{state.module}, calls of {state.call_rows} x {state.shape}: batch sizes that change no bit: "
        f"{sizes(state.proven)}; that do: {sizes(state.refused)}; not tried: {sizes(state.pending)}"
    )
