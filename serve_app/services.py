"""The stores of one replica, opened from the settings; knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable
from serve_app.adapters.builtin import BuiltIns
from serve_app.adapters.desk import AdapterDesk, Unload
from serve_app.adapters.fitting import Fitting, TellLayers
from serve_app.adapters.hub import HOSTS
from serve_app.adapters.registry import Registry
from serve_app.jobs.desk import JobDesk
from serve_app.jobs.in_use import adapters_in_use
from serve_app.jobs.store import JobStore
from serve_app.settings import Settings
from serve_app.storage.fetch import Fetcher
from serve_app.storage.results import ResultStore
from serve_app.transaction import connect


async def _unknown_layers(_model: str) -> None:
    """Nobody here can tell."""


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
        results = ResultStore(
            settings.results_root, settings.min_free_bytes, options=settings.results_options
        )
        return cls(settings, JobStore(redis, settings), results)

    def adapters(
        self, builtins: BuiltIns, unload: Unload, tell_layers: TellLayers = _unknown_layers
    ) -> AdapterDesk:
        """unload: tells every replica to forget a digest. tell_layers: what a model's layers are."""
        settings, redis = self.settings, self.store.redis
        return AdapterDesk(
            Registry(redis, settings.redis_prefix, settings.max_adapters_per_owner),
            self.results,
            builtins,
            settings,
            in_use=partial(adapters_in_use, redis, settings.redis_prefix),
            unload=unload,
            fitting=Fitting(self.results, tell_layers),
            fetcher=Fetcher(host for host in settings.fetch_hosts.split(",") if host.strip()),
            hub=Fetcher(HOSTS if settings.hub_loras else ()),
        )

    def desk(self, cards: Mapping[str, ModelCard]) -> JobDesk:
        return JobDesk(self.store, self.results, cards, self.settings)
