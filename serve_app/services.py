"""The stores and services of one replica, opened from the settings. Independent of Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable
from serve_app.jobs.service import JobService
from serve_app.jobs.store.lora_references import referenced_loras
from serve_app.jobs.store.store import JobStore
from serve_app.loras.builtin import BuiltInLoras
from serve_app.loras.compatibility import CompatibilityCheck, LayerLookup
from serve_app.loras.hub import HOSTS
from serve_app.loras.intake import LoraIntake
from serve_app.loras.registry import LoraRegistry
from serve_app.loras.service import LoraService, Unload
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from serve_app.storage.url_fetcher import UrlFetcher


async def _no_layer_shapes(_model: str) -> None:
    """The default lookup, for a process without access to the models: no shapes are known."""


@dataclass(frozen=True)
class Services:
    """The job store and the result store. Open one per event loop."""

    settings: Settings
    store: JobStore
    results: ResultStore

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Connections are made at first use. Raises ModelUnavailable without a redis_url."""
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

    def lora_service(
        self, builtins: BuiltInLoras, unload: Unload, layer_lookup: LayerLookup = _no_layer_shapes
    ) -> LoraService:
        """unload: unloads a digest from every replica.  layer_lookup: shapes of the layers of a model."""
        settings, redis = self.settings, self.store.redis
        registry = LoraRegistry(redis, settings.redis_prefix, settings.max_adapters_per_owner)
        return LoraService(
            registry,
            self.results,
            builtins,
            LoraIntake(
                registry,
                self.results,
                settings,
                fetcher=UrlFetcher(settings.fetch_hosts),
                hub=UrlFetcher(HOSTS if settings.hub_loras else ()),
            ),
            CompatibilityCheck(self.results, layer_lookup),
            in_use=partial(referenced_loras, redis, settings.redis_prefix),
            unload=unload,
        )

    def job_service(self, cards: Mapping[str, ModelCard]) -> JobService:
        return JobService(self.store, self.results, cards, self.settings)
