"""Ingress: the Serve shell of the HTTP face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from deployments.protocol.card import ModelCard
from serve_app.adapters.builtin import BuiltIns
from serve_app.handles import LoraReplicas, ModelHandles
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
        loras: Mapping[str, DeploymentHandle[Any]],
        _adapters: DeploymentHandle[Any],  # bound so that these are part of the graph
        _dispatcher: DeploymentHandle[Any],
    ) -> None:
        join_serve_log()
        self._settings = settings
        self._cards = cards
        self._models = ModelHandles(handles, serve.get_replica_context().app_name)
        names = {handle.deployment_name for handle in loras.values()}
        self._loras = LoraReplicas(sorted(names), serve.get_replica_context().app_name)

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
                adapters=services.adapters(BuiltIns(self._cards.values()), self._loras.unload),
                accounts=services.store.redis,
            )
        )
