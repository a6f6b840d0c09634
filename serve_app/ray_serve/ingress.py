"""Ingress: the Serve shell of the HTTP face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve

from deployments.protocol.card import ModelCard
from serve_app.loras.builtin import BuiltInLoras
from serve_app.observability.metrics import RayMeter, join_serve_log
from serve_app.ray_serve.model_client import ModelClient
from serve_app.services import Services
from serve_app.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle


@serve.ingress()
class Ingress:
    """Answers HTTP. Keeps nothing: any replica may answer for any other."""

    def __init__(
        self,
        settings: Settings,
        cards: Mapping[str, ModelCard] | None,
        _graph: Sequence[DeploymentHandle[Any]],  # bound so that these are part of the application
    ) -> None:
        """cards: what its application serves; None: models are applications of their own."""
        join_serve_log()
        self._settings = settings
        self._models = ModelClient.of_replica(cards)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, once the constructor is done."""
        from serve_app.api.app import create_app
        from serve_app.api.metrics import ApiMetrics
        from serve_app.api.state import ApiState

        services, models = Services.open(self._settings), self._models
        return create_app(
            ApiState(
                job_service=services.job_service(models.cards),
                cards=models.cards,
                settings=self._settings,
                model_states=models.states,
                lora_service=services.lora_service(
                    BuiltInLoras(models.cards.values()), models.unload, models.layer_shapes
                ),
                refresh_cards=models.refresh if models.cards_are_dynamic else None,
                accounts=services.store.redis,
                metrics=ApiMetrics(RayMeter()),
            )
        )
