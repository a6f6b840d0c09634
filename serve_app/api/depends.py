"""What every route needs, by one Depends: who calls, the doors behind us, where our links start."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends
from pydantic import ValidationError
from starlette.requests import HTTPConnection

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import NotFound
from deployments.protocol.request import GenerationRequest, Task
from serve_app.admission.pictures import PictureCheck
from serve_app.admission.principal import Principal, identify, presented_key
from serve_app.admission.rules import default_model
from serve_app.api.errors import from_validation
from serve_app.api.metrics import ApiMetrics
from serve_app.api.schemas.image import ImageBody
from serve_app.api.schemas.openai import GenerationsBody
from serve_app.jobs.desk import JobDesk
from serve_app.jobs.job import Job
from serve_app.settings import Settings

JOB_ID_DIGITS = 32
READY = "ready"


@dataclass(frozen=True)
class ApiState:
    """All that create_app needs; the rest it makes itself."""

    desk: JobDesk
    cards: Mapping[str, ModelCard]  # the models served here, by id
    settings: Settings
    model_states: Callable[[], Awaitable[Mapping[str, str]]]  # by id: ready, loading, idle or error
    pictures: PictureCheck = field(default_factory=PictureCheck)
    metrics: ApiMetrics = field(default_factory=ApiMetrics)

    async def ready_models(self) -> list[str]:
        """Ids of the models that would begin at once."""
        states = await self.model_states()
        return [card for card in self.cards if states.get(card) == READY]


@dataclass(frozen=True)
class Visit:
    """One call to the API."""

    state: ApiState
    principal: Principal
    prefix: str  # of links for whoever called us: "" or "/below"
    address: str  # of links for anybody: https://host/below

    @property
    def desk(self) -> JobDesk:
        return self.state.desk

    @property
    def owner(self) -> str:
        return self.principal.owner

    async def submit(self, body: ImageBody | GenerationsBody) -> Job:
        """The durable job of this wish: every dialect's one way in."""
        began = time.perf_counter()
        model = await self._default_model(body) if body.model is None else body.model
        request = _to_request(body, model)
        await self.state.pictures.verify(request)
        job = await self.desk.submit(request, self.owner)
        self.state.metrics.submitted.labels(job.request.model, job.request.task.value).inc()
        self.state.metrics.submit_seconds.observe(time.perf_counter() - began)
        return job

    async def _default_model(self, body: ImageBody | GenerationsBody) -> str:
        ready = await self.state.ready_models()
        if not isinstance(body, ImageBody):
            return default_model(Task.t2i, self.state.cards, ready)
        return default_model(
            body.task, self.state.cards, ready, controls=body.control_types, refiner=bool(body.refiner)
        )


def _to_request(body: ImageBody | GenerationsBody, model: str) -> GenerationRequest:
    try:
        return body.to_request(model)
    except ValidationError as error:  # past the bounds no model may cross
        raise from_validation(error, type(body)) from None


def api_state(connection: HTTPConnection) -> ApiState:
    """What create_app was given."""
    state: ApiState = connection.app.state.weft
    return state


def visit_of(connection: HTTPConnection, state: ApiState, key: bytes | None = None) -> Visit:
    """The visit of whoever holds this key, or the one in the headers. Raises Unauthorized."""
    principal = identify(key or presented_key(connection.headers), state.settings)
    return Visit(state, principal, _prefix(connection, state), _address(connection, state))


def enter(connection: HTTPConnection, state: Annotated[ApiState, Depends(api_state)]) -> Visit:
    """The visit of a known caller. Raises Unauthorized."""
    return visit_of(connection, state)


Here = Annotated[Visit, Depends(enter)]


def _prefix(connection: HTTPConnection, state: ApiState) -> str:
    path = urlsplit(state.settings.public_url).path or connection.scope.get("root_path", "")
    return str(path).rstrip("/")


def _address(connection: HTTPConnection, state: ApiState) -> str:
    return (state.settings.public_url or str(connection.base_url)).rstrip("/")


def job_id(task_id: str) -> str:
    """The id, if it can be one. Raises NotFound, as for any job the caller does not have."""
    if len(task_id) == JOB_ID_DIGITS and set(task_id) <= set("0123456789abcdef"):
        return task_id
    raise NotFound("there is no such job; an id is the 32 hex digits that came with the job", param="id")


JobId = Annotated[str, Depends(job_id)]
