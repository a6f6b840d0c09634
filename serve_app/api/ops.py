"""Probes and metrics: is the process alive, can it serve, what did it count."""

import json

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from deployments.protocol.errors import WeftError
from serve_app.api.auth import CurrentCaller
from serve_app.api.state import CurrentState

public = APIRouter(tags=["operations"])
router = APIRouter(tags=["operations"])


class HealthOut(BaseModel):
    status: str = "ok"


class ReadinessOut(BaseModel):
    """Whether a request sent now would be processed."""

    ready: bool
    store: str  # "ok", or what is wrong with it
    models: dict[str, str]  # state by id


@public.get("/health")
async def health() -> HealthOut:
    """This process answers. It says nothing about the store or the models: see /ready."""
    return HealthOut()


@public.get("/ready", response_model=ReadinessOut, responses={503: {"model": ReadinessOut}})
async def ready(state: CurrentState) -> Response:
    """200 when the store answers and at least one model is ready, or idle (the first job starts it); else
    503 and why.
    """
    try:
        await state.job_service.health()
        store = "ok"
    except WeftError as error:
        store = error.message
    models = dict(await state.model_states())
    served = not {"ready", "idle"}.isdisjoint(models.values())
    answer = ReadinessOut(ready=store == "ok" and served, store=store, models=models)
    return Response(
        json.dumps(answer.model_dump()),
        200 if answer.ready else 503,
        headers={} if answer.ready else {"Retry-After": "2"},
        media_type="application/json",
    )


@router.get("/metrics", response_class=Response)
async def metrics(caller: CurrentCaller) -> Response:
    """The metrics of the replica that answers, in Prometheus' text format."""
    return Response(caller.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
