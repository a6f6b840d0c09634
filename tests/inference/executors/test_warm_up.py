"""The requests that a replica runs before it takes any."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.proof_state import ProofState
from deployments.executors.warm_up import PROVE_LIMIT_S, warm_up
from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.events import Done, Event, Failed
from deployments.protocol.request import GenerationRequest

CARD = load_card(Path(__file__).parents[3] / "configs/models/tiny-flux-schnell.yaml")


def card(**serving: Any) -> ModelCard:
    return CARD.model_copy(update={"serving": CARD.serving.model_copy(update=serving)})


class Replica:
    """Records the sizes of its requests and how many of them run at once."""

    def __init__(self, last: Event) -> None:
        self.last = last
        self.sizes: list[tuple[int | None, int | None]] = []
        self.concurrent: list[int] = []
        self._running = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.sizes.append((request.width, request.height))
        self._running += 1
        await asyncio.sleep(0)
        self.concurrent.append(self._running)
        await asyncio.sleep(0)
        self._running -= 1
        yield self.last


class Sizes:
    """Batch sizes that are all tried when they are asked for."""

    def __init__(self, replica: Replica | None = None) -> None:
        self.limits_s: list[float] = []
        self.requests_before: list[int] = []
        self._replica = replica

    async def prove_all(self, limit_s: float) -> None:
        self.limits_s.append(limit_s)
        self.requests_before.append(0 if self._replica is None else len(self._replica.sizes))

    def proofs(self) -> list[ProofState]:
        tried = ((2, 4), (6,), ()) if self.limits_s else ((), (), (2, 4, 6))
        return [ProofState("UNet.forward", "4x64x64 bfloat16", 2, *tried)]


DONE, FAILED = Done(0.0, 1.0), Failed("internal", "no such operator", retryable=False)


async def test_each_size_of_the_card_is_run_once() -> None:
    replica = Replica(DONE)

    await warm_up(card(warm_up_sizes=[(64, 64), (128, 64)]), replica.generate, Sizes())

    assert replica.sizes == [(64, 64), (128, 64)]
    assert replica.concurrent == [1, 1]


async def test_without_sizes_the_default_size_is_run() -> None:
    replica = Replica(DONE)

    await warm_up(card(warm_up_sizes=[]), replica.generate, Sizes())

    assert replica.sizes == [(CARD.sizes.width, CARD.sizes.height)]


async def test_compiled_blocks_also_run_a_batch_of_two() -> None:
    replica = Replica(DONE)

    await warm_up(card(warm_up_sizes=[(64, 64)], compile=True), replica.generate, Sizes())

    assert replica.concurrent == [1, 2, 2]


async def test_blocks_that_cannot_be_compiled_stop_the_replica() -> None:
    with pytest.raises(ModelUnavailable, match="cannot run compiled: no such operator"):
        await warm_up(card(compile=True), Replica(FAILED).generate, Sizes())


async def test_other_failures_are_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await warm_up(card(), Replica(FAILED).generate, Sizes())

    assert [record.message for record in caplog.records] == ["warm-up failed"]


async def test_a_model_without_text_to_image_is_not_warmed_up() -> None:
    replica = Replica(DONE)

    await warm_up(CARD.model_copy(update={"tasks": ["i2i"]}), replica.generate, Sizes())

    assert replica.sizes == []


async def test_batch_sizes_are_proven_after_the_requests_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replica = Replica(DONE)
    sizes = Sizes(replica)

    with caplog.at_level(logging.INFO):
        await warm_up(card(warm_up_sizes=[(64, 64), (128, 64)]), replica.generate, sizes)

    assert (sizes.limits_s, sizes.requests_before) == ([PROVE_LIMIT_S], [2])
    assert [record.message for record in caplog.records] == [
        "UNet.forward, calls of 2 x 4x64x64 bfloat16: batch sizes that change no bit: 2, 4; that do: 6; "
        "not tried: none"
    ]


async def test_where_nothing_is_promised_nothing_is_proven() -> None:
    sizes = Sizes()

    await warm_up(card(exact="off"), Replica(DONE).generate, sizes)

    assert sizes.limits_s == []
