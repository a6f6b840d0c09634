"""What a request hears of forwards that it shared in batch sizes without a proof."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from deployments import runtime
from deployments.engine.bit_trials import BitTrials
from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact, Done, Event
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica
from tests.inference.engine.merging import LargerIsFaster
from tests.inference.video_files import ROOT

CARD = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
SERVING = CARD.serving.model_copy(update={"warm_up": False})
TRANSFORMER = "FluxTransformer2DModel.forward"
MERGED = {"exact": False, "merged_unproven": [TRANSFORMER]}


@pytest.fixture
def unprovable() -> Iterator[ModelReplica]:
    """A replica on which no batch size gives the bits of a call alone, as on a device with other kernels for
    every batch size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BitTrials, "_agrees", lambda *_: False)
        patch.setattr(runtime, "StepScheduler", lambda *_: LargerIsFaster())
        model = ModelReplica([CARD.model_copy(update={"serving": SERVING})])
        yield model
        model.__del__()


async def together(model: ModelReplica, exact: Any, seeds: int = 6) -> list[list[Event]]:
    """The events of some requests at once, after one for whose shapes all trials are made; its embeddings are
    cached, so that the others are in their steps at the same time."""

    async def events(seed: int) -> list[Event]:
        asked = GenerationRequest(
            model=CARD.id, prompt="a red circle", seed=seed, width=64, height=64, exact=exact
        )
        return [event async for event in model.generate(asked)]

    await events(99)
    await model._runtime.worker.prove_all(60.0)
    return list(await asyncio.gather(*map(events, range(seeds))))


def stated(events: list[Event]) -> dict[str, object]:
    """What the picture's own file says of its exactness."""
    (picture,) = (event for event in events if isinstance(event, Artifact) and event.kind == "image")
    text = Image.open(io.BytesIO(picture.data)).text["weft"]  # type: ignore[attr-defined]
    facts = json.loads(text)
    assert facts["exact"] == picture.metadata["exact"]
    return {name: facts[name] for name in ("exact", "merged_unproven") if name in facts}


async def test_a_request_that_preferred_exactness_hears_what_it_shared(unprovable: ModelReplica) -> None:
    answers = await together(unprovable, "prefer")

    merged = [events for events in answers if stated(events) == MERGED]
    assert len(merged) > 1, "it takes two to share"
    for events in answers:
        assert isinstance(events[-1], Done)
        assert events[-1].merged_unproven == ((TRANSFORMER,) if events in merged else ())
        assert stated(events) in (MERGED, {"exact": True})


async def test_a_strict_request_shares_nothing_that_is_not_proven(unprovable: ModelReplica) -> None:
    answers = await together(unprovable, "strict")

    for events in answers:
        assert stated(events) == {"exact": True}
        assert isinstance(events[-1], Done)
        assert events[-1].merged_unproven == ()


async def test_a_request_without_a_promise_is_not_warned_but_its_file_says_it(
    unprovable: ModelReplica,
) -> None:
    answers = await together(unprovable, "off")

    assert [stated(events) for events in answers].count(MERGED) > 1
    for events in answers:
        assert isinstance(events[-1], Done)
        assert events[-1].merged_unproven == ()


async def test_in_proven_sizes_or_alone_every_file_is_exact() -> None:
    model = ModelReplica([CARD.model_copy(update={"serving": SERVING})])
    try:
        answers = await together(model, "prefer")
        reports = await model.proofs()
    finally:
        model.__del__()

    assert [stated(events) for events in answers] == [{"exact": True}] * 6
    proven = [report for report in reports if report["module"] == TRANSFORMER]
    assert proven
    assert all(report["proven"] for report in proven)
