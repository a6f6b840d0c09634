"""Ingress: the Serve shell of the HTTP face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from deployments.protocol.card import ModelCard
from serve_app.handles import ModelHandles
from serve_app.services import Services
from serve_app.settings import Settings
from serve_app.telemetry import join_serve_log

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle


@serve.ingress()
class Ingress:
    """Answers HTTP. Keeps nothing: any replica may answer for any other."""

    def __init__(
        self,
        settings: Settings,
        cards: Mapping[str, ModelCard],
        handles: Mapping[str, DeploymentHandle[Any]],
        _dispatcher: DeploymentHandle[Any],  # bound so that it is part of the graph; works by itself
    ) -> None:
        join_serve_log()
        self._settings = settings
        self._cards = cards
        self._models = ModelHandles(handles, serve.get_replica_context().app_name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, once the constructor is done."""
        from serve_app.api.depends import ApiState
        from serve_app.api.http import create_app

        services = Services.open(self._settings)
        return create_app(
            ApiState(
                desk=services.desk(self._cards),
                cards=self._cards,
                settings=self._settings,
                model_states=self._models.states,
                accounts=services.store.redis,
            )
        )
