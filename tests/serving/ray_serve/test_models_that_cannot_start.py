"""A model that is not loaded, or whose replicas do not start, shows the reason; its jobs do not wait."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from deployments.protocol.errors import ModelFailed
from deployments.protocol.events import Event, Started
from serve_app.api.state import ModelFailure
from serve_app.ray_serve import model_client
from serve_app.ray_serve.model_client import ModelClient
from serve_app.ray_serve.model_states import ModelStates
from serve_app.ray_serve.routing import ReplicaPool, RunningApplication, SingleApplicationRoutes
from serve_app.ray_serve.served_models import ServedModels
from tests.serving.fakes import CARD, MODEL, resolved

TRACEBACK = """The deployment failed to start 3 times in a row. Error:
Traceback (most recent call last):
  File "replica.py", line 1
deployments.protocol.errors.ModelFailed: no weights in models/x: put them there
"""
NO_NODE = (
    "Deployment 'x' in application 'weft' has 1 replicas that have taken more than 30s to be scheduled. "
    'Resources required for each replica: {"GPU": 1.0}, total resources available: {"CPU": 4.0}.'
)
FAILURE = {"kind": "model_failed", "message": "no licence", "since": 1.0, "tries": 2, "retry_at": 3.0}


def served_with(**pools: ReplicaPool) -> ServedModels:
    cards = {name: CARD.model_copy(update={"id": name}) for name in (MODEL, *pools)}
    served = ServedModels(SingleApplicationRoutes(cards, "weft"), "weft", "Dispatcher")
    served.take_in({"weft": RunningApplication(deployments=pools)})
    served._refreshed_at = math.inf  # no controller is asked
    return served


async def test_states_join_what_serve_and_the_replicas_report() -> None:
    served = served_with(
        whole=ReplicaPool("HEALTHY", running=1),
        broken=ReplicaPool("HEALTHY", running=1),
        dead=ReplicaPool("DEPLOY_FAILED", message=TRACEBACK),
        asleep=ReplicaPool("HEALTHY"),
    )
    asked: list[str] = []

    async def ask(model: str) -> Mapping[str, Mapping[str, Any]] | None:
        asked.append(model)
        return {"broken": FAILURE} if model == "broken" else {}

    states = ModelStates(served, ask)
    found, failures = await states.states(), await states.failures()

    assert {name: found[name] for name in ("whole", "broken", "dead", "asleep")} == {
        "whole": "ready",
        "broken": "failed",
        "dead": "error",
        "asleep": "idle",
    }
    assert failures.keys() == {"broken", "dead"}
    assert failures["broken"] == ModelFailure("model_failed", "no licence", 1.0, 2, 3.0)
    assert failures["dead"].message.endswith("no weights in models/x: put them there")
    assert sorted(asked) == ["broken", "whole"], "once each, and only of those that run"


async def no_reports(_model: str) -> None:
    """No replica runs."""


class Stream:
    """A request at Serve: it waits for a replica until `begin`, and then ends after one event."""

    def __init__(self) -> None:
        self.begin = asyncio.Event()
        self.cancelled = False
        self._events = iter([Started(4)])

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        await self.begin.wait()
        try:
            return next(self._events)
        except StopIteration:
            raise StopAsyncIteration from None

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    made = Stream()

    class Handle:
        def remote(self, *_: object, **__: object) -> Stream:
            return made

    monkeypatch.setattr(ModelClient, "_handle_for", lambda *_: Handle())
    for name in ("WATCH_EVERY_S", "GIVEN_UP_S", "FAILING_S", "NO_NODE_S"):
        monkeypatch.setattr(model_client, name, 0.0)
    return made


async def events_of(served: ServedModels) -> list[Event]:
    return [event async for event in ModelClient(served).generate(MODEL, resolved())]


@pytest.mark.parametrize("status", ["DEPLOY_FAILED", "UNHEALTHY"])
async def test_a_job_does_not_wait_for_a_replica_that_does_not_start(stream: Stream, status: str) -> None:
    served = served_with(**{MODEL: ReplicaPool(status, message=TRACEBACK)})

    with pytest.raises(ModelFailed, match="put them there"):
        await events_of(served)

    assert stream.cancelled


async def test_a_job_does_not_wait_for_a_node_that_never_comes(stream: Stream) -> None:
    served = served_with(**{MODEL: ReplicaPool("UPDATING", message=NO_NODE)})

    with pytest.raises(ModelFailed, match="Resources required for each replica"):
        await events_of(served)
    shown = await ModelStates(served, no_reports).failures()

    assert "Resources required" in shown[MODEL].message


async def test_a_node_gets_time_to_come(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_client, "NO_NODE_S", 1e9)
    served = served_with(**{MODEL: ReplicaPool("UPDATING", message=NO_NODE)})
    waiting = asyncio.create_task(events_of(served))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()

    stream.begin.set()

    assert await waiting == [Started(4)]


async def test_a_job_waits_for_a_replica_that_is_still_starting(stream: Stream) -> None:
    served = served_with(**{MODEL: ReplicaPool("UPDATING")})
    waiting = asyncio.create_task(events_of(served))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()

    stream.begin.set()

    assert await waiting == [Started(4)]


async def test_an_unhealthy_deployment_gets_time_to_recover(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_client, "FAILING_S", 1e9)
    served = served_with(**{MODEL: ReplicaPool("UNHEALTHY")})
    waiting = asyncio.create_task(events_of(served))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()

    stream.begin.set()

    assert await waiting == [Started(4)]
