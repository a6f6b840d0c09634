"""What the replicas of each model report, kept for some seconds: proven batch sizes, failed loads."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_AGE_S = 10.0
PATIENCE_S = 1.0  # that a caller waits for replicas; then the previous answers count

ProofReport = Mapping[str, object]  # the fields of deployments/engine/proof_state.py's ProofState
Report = TypeVar("Report")


@dataclass(frozen=True, slots=True)
class _Answer(Generic[Report]):
    report: Report | None
    asked_at: float  # time.monotonic()


class ReplicaReports(Generic[Report]):
    """The answers of one replica of each model. Used from one event loop."""

    def __init__(self, ask: Callable[[str], Awaitable[Report | None]], max_age_s: float = MAX_AGE_S) -> None:
        """ask: the report of a replica of a model; None while it has none."""
        self._ask = ask
        self._max_age_s = max_age_s
        self._answers: dict[str, _Answer[Report]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def of(self, models: Iterable[str]) -> dict[str, Report | None]:
        """By model, at most max_age_s old unless its replica is slow; None: no replica has answered yet."""
        wanted = list(models)
        asking = {task for task in map(self._refresh, wanted) if task is not None}
        if asking:
            await asyncio.wait(asking, timeout=PATIENCE_S)
        answers = {model: self._answers.get(model) for model in wanted}
        return {model: None if answer is None else answer.report for model, answer in answers.items()}

    def _refresh(self, model: str) -> asyncio.Task[None] | None:
        """The task that asks the model's replica; None while the last answer is young."""
        known, asking = self._answers.get(model), self._asking.get(model)
        if asking is not None and not asking.done():
            return asking
        if known is not None and time.monotonic() - known.asked_at <= self._max_age_s:
            return None
        # with the context of a Serve request the task could be cancelled with that request
        task = asyncio.get_running_loop().create_task(self._query(model), context=contextvars.Context())
        self._asking[model] = task
        return task

    async def _query(self, model: str) -> None:
        asked_at = time.monotonic()
        self._answers[model] = _Answer(await self._ask(model), asked_at)
