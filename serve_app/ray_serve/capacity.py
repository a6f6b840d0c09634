"""How many more jobs a dispatcher may send to each model, and the demand that it reports."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping

import ray.exceptions

from deployments.protocol.card import ModelCard
from deployments.protocol.events import Event
from deployments.protocol.request import ResolvedRequest
from serve_app.jobs.store.start_estimate import Demand
from serve_app.ray_serve import autoscaling
from serve_app.ray_serve.model_client import ModelClient
from serve_app.ray_serve.served_models import ServedModels

WAKE_TIMEOUT_S = (
    10.0  # that the autoscaling policy has to start the first replica of a model with waiting jobs
)
REPORT_EVERY_S = 10.0  # a demand that has not changed

logger = logging.getLogger(__name__)


class CapacityTracker:
    """The models as one dispatcher uses them: free slots, running a job, reporting the demand."""

    def __init__(self, served: ServedModels, models: ModelClient, dispatchers: int) -> None:
        """dispatchers: how many replicas share the models, until Serve has reported their number."""
        self._served = served
        self._models = models
        self._dispatchers = dispatchers
        self._running: Counter[str] = Counter()
        self._asleep_since: dict[str, float] = {}  # models with waiting jobs and no running replica
        # by application and deployment: the last report and its time
        self._reported: dict[tuple[str, str], tuple[Demand, float]] = {}

    def free_slots(self) -> Mapping[str, int]:
        """By model, how many more jobs this dispatcher may send it.

        The limit is one replica more than are running: Ray's own policy could see the surplus at Serve.
        It is 0 while our policy decides how many replicas a sleeping model starts: a single request at Serve
        would make Serve start exactly one.
        """
        free: dict[str, int] = {}
        if self._served.cards_are_dynamic or self._served.peer_count is None:
            self._served.poll()
        dispatchers = self._served.peer_count or self._dispatchers
        for model, card in self._served.cards.items():
            limit = self._served.max_replicas(model)
            replicas = min(self._served.pool(model).running + 1, limit)
            if self._is_waking(model, limit):
                free[model] = 0
                continue
            share = math.ceil(card.serving.slots * replicas / dispatchers)
            free[model] = max(0, share - self._running[model])
            if replicas < limit and free[model] < share / 2:
                self._served.poll()  # the number of replicas matters only when few slots are left
        return free

    def _is_waking(self, model: str, limit: int) -> bool:
        """Whether the policy still decides how many replicas of a sleeping model start."""
        pool = self._served.pool(model)
        if limit < 2 or pool.running:
            return False
        since = self._asleep_since.get(model)
        if since is None:  # the policy does not know yet that jobs wait
            return True
        self._served.poll()
        # a policy that does not read our reports must not let jobs wait for ever
        return time.monotonic() - since < WAKE_TIMEOUT_S or pool.state == "loading"

    async def report_demand(self, demand: Mapping[str, Demand]) -> None:
        """Report the demand, by model, to the autoscaling policies, one for each deployment."""
        now = time.monotonic()
        for deployment, total in self._total_by_deployment(demand, now).items():
            before, reported_at = self._reported.get(deployment, (None, -math.inf))
            if total == before and (now - reported_at < REPORT_EVERY_S or total == Demand()):
                continue
            try:
                await asyncio.to_thread(autoscaling.publish_demand, *deployment, total.waiting, total.running)
            except ray.exceptions.RayError as error:
                logger.warning("the demand was not reported to the autoscaler", extra={"error": repr(error)})
                return
            self._reported[deployment] = total, now

    def _total_by_deployment(
        self, demand: Mapping[str, Demand], now: float
    ) -> Mapping[tuple[str, str], Demand]:
        totals: dict[tuple[str, str], Demand] = {}
        for model, of_model in demand.items():
            if (route := self._served.routes.get(model)) is not None:
                deployment = route.application, route.deployment
                totals[deployment] = totals.get(deployment, Demand()) + of_model
            if of_model.waiting and not self._served.pool(model).running:
                self._asleep_since.setdefault(model, now)
            else:
                self._asleep_since.pop(model, None)
        return totals

    async def generate(
        self, model: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[Event]:
        """ModelClient.generate, counted as running from the first event until the stream ends."""
        self._running[model] += 1
        try:
            events = self._models.generate(model, request, user=user, resume=resume)
            try:
                async for event in events:
                    yield event
            finally:
                await events.aclose()
        finally:
            self._running[model] -= 1


class JobTimeLimits(Mapping[str, float]):
    """By served model, the seconds that a job may take; follows the cards as models come and go."""

    def __init__(self, cards: Mapping[str, ModelCard]) -> None:
        self._cards = cards

    def __getitem__(self, model: str) -> float:
        return self._cards[model].serving.job_timeout_s

    def __iter__(self) -> Iterator[str]:
        return iter(self._cards)

    def __len__(self) -> int:
        return len(self._cards)
