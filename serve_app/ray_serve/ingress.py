"""The Serve deployment class of the HTTP API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.observability.ray_metrics import RayMeter
from deployments.protocol.card import ModelCard
from deployments.protocol.log_context import join_serve_log
from serve_app.api.app import create_app
from serve_app.api.metrics import ApiMetrics
from serve_app.api.state import ApiState
from serve_app.loras.builtin import BuiltInLoras
from serve_app.ray_serve.model_client import ModelClient
from serve_app.ray_serve.model_states import ModelStates
from serve_app.ray_serve.replica_reports import ReplicaReports
from serve_app.ray_serve.served_models import ServedModels
from serve_app.services import Services
from serve_app.settings import Settings


@serve.ingress()
class Ingress:
    """Answers HTTP. It keeps no state: any replica can answer any request."""

    def __init__(
        self,
        settings: Settings,
        cards: Mapping[str, ModelCard] | None,
        _graph: Sequence[DeploymentHandle[Any]],  # bound so that these deployments join the application
    ) -> None:
        """cards: those of its application; None: models are applications of their own."""
        join_serve_log("serve_app")
        self._settings = settings
        self._served = ServedModels.of_replica(cards)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        services, served = Services.open(self._settings), self._served
        client = ModelClient(served)
        states = ModelStates(served, client.load_failures)
        loras = services.lora_service(BuiltInLoras(served.cards.values()), client.unload, client.layer_shapes)
        return create_app(
            ApiState(
                job_service=services.job_service(served.cards),
                cards=served.cards,
                settings=self._settings,
                model_states=states.states,
                model_failures=states.failures,
                model_proofs=ReplicaReports(client.proofs).of,
                model_plans=ReplicaReports(client.plans).of,
                lora_service=loras,
                refresh_cards=served.refresh if served.cards_are_dynamic else None,
                accounts=services.store.redis,
                behind_serve=True,
                metrics=ApiMetrics(RayMeter()),
            )
        )
