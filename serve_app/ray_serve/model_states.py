"""The states of the models: as Serve reports their replicas, and as these report what they could not load."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from serve_app.api.state import FAILED, ModelFailure
from serve_app.ray_serve.replica_reports import ReplicaReports
from serve_app.ray_serve.routing import last_lines
from serve_app.ray_serve.served_models import ServedModels

MAX_AGE_S = 2.0  # of a replica's report

Ask = Callable[[str], Awaitable[Mapping[str, Mapping[str, Any]] | None]]


class ModelStates:
    """States and failures of all served models. Used from one event loop."""

    def __init__(self, served: ServedModels, ask: Ask) -> None:
        """ask: the failed loads of a replica of a model, by model."""
        self._served = served
        self._reports = ReplicaReports(ask, MAX_AGE_S)

    async def states(self) -> dict[str, str]:
        """By model: ready, loading, idle (scaled to zero), failed (not loaded), error (no replica starts)."""
        states = await self._served.states()
        failed = await self._of_replicas(states)
        return {model: FAILED if model in failed else state for model, state in states.items()}

    async def failures(self) -> dict[str, ModelFailure]:
        """By model, why it cannot serve, or why its start takes long; without those that can."""
        states = await self._served.states()
        of_serve = {
            model: ModelFailure("model_unavailable", last_lines(self._served.pool(model).message))
            for model, state in states.items()
            if state == "error" or self._served.pool(model).lacks_resources
        }
        return of_serve | await self._of_replicas(states)

    async def _of_replicas(self, states: Mapping[str, str]) -> dict[str, ModelFailure]:
        running = [model for model, state in states.items() if state == "ready"]
        reports = await self._reports.of(running)
        return {
            model: ModelFailure(**report[model])
            for model, report in reports.items()
            if report is not None and model in report
        }
