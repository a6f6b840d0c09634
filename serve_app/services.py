"""The stores of one replica, opened from the settings; knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable
from serve_app.jobs.desk import JobDesk
from serve_app.jobs.store import JobStore
from serve_app.jobs.transaction import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore


@dataclass(frozen=True)
class Services:
    """What the books are kept in. Open one per event loop."""

    settings: Settings
    store: JobStore
    results: ResultStore

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Connects when first used. Raises ModelUnavailable without a redis_url."""
        if settings.redis_url is None:
            raise ModelUnavailable(
                "no job store: set REDIS_URL for every Ray process (redis://... or rediss://...), "
                "or start with `weft serve`, which brings its own"
            )
        redis = connect(settings.redis_url.get_secret_value())
        results = ResultStore(settings.results_root, settings.min_free_bytes)
        return cls(settings, JobStore(redis, settings), results)

    def desk(self, cards: Mapping[str, ModelCard]) -> JobDesk:
        return JobDesk(self.store, self.results, cards, self.settings)
