"""What every route needs, by one Depends: who calls, the doors behind us, where our links start."""

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends
from pydantic import ValidationError
from starlette.requests import HTTPConnection

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, Forbidden, NotFound, Unauthorized
from deployments.protocol.request import GenerationRequest, Task
from serve_app.admission.authenticator import Authenticator, StoreClient
from serve_app.admission.input_check import InputCheck
from serve_app.admission.principals import Principal, Scope, presented_key
from serve_app.admission.rate_limits import CallClass
from serve_app.admission.validation import default_model, find_card
from serve_app.api.errors import from_validation, route_path
from serve_app.api.metrics import ApiMetrics
from serve_app.api.schemas.image import ImageBody
from serve_app.api.schemas.lora import LoraFields
from serve_app.api.schemas.openai import OpenAIImageBody
from serve_app.api.schemas.video import ExtendRequest, OpenAIVideoBody, RemixRequest, VideoBody
from serve_app.job_ids import is_job_id
from serve_app.jobs.job import IdempotencyKey, Job
from serve_app.jobs.service import JobService
from serve_app.jobs.store.cache_keys import body_digest
from serve_app.loras.service import LoraService
from serve_app.loras.spec import extract_lora_tags
from serve_app.settings import Settings

SubmitBody = ImageBody | OpenAIImageBody | VideoBody | OpenAIVideoBody | RemixRequest | ExtendRequest
READY = "ready"
SESSION_COOKIE = "weft_session"
CSRF_HEADER = "x-weft-csrf"  # another site's page cannot send it without being asked first, and we say no
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
SAFE = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class ApiState:
    """All that create_app needs; the rest it makes itself."""

    job_service: JobService
    cards: Mapping[str, ModelCard]  # the models served here, by id
    settings: Settings
    model_states: Callable[[], Awaitable[Mapping[str, str]]]  # by id: ready, loading, idle or error
    pictures: InputCheck = field(default_factory=InputCheck)
    metrics: ApiMetrics = field(default_factory=ApiMetrics)
    adapters: LoraService | None = None  # None: requests name no LoRAs
    look: Callable[[], Awaitable[None]] | None = None  # brings cards up to date; None: they never change
    accounts: StoreClient | None = None  # where users are kept; None: the one key is all there is

    @cached_property
    def gate(self) -> Authenticator:
        """Who may come in."""
        return Authenticator(self.settings, self.accounts)

    async def ready_models(self) -> list[str]:
        """Ids of the models that would begin at once."""
        states = await self.model_states()
        return [card for card in self.cards if states.get(card) == READY]


@dataclass(frozen=True)
class CallerContext:
    """One call to the API."""

    state: ApiState
    principal: Principal
    prefix: str  # of links for whoever called us: "" or "/below"
    address: str  # of links for anybody: https://host/below
    idempotency_key: str | None = None  # as it was sent: the same call again shall have no other effect

    @property
    def job_service(self) -> JobService:
        return self.state.job_service

    @property
    def owner(self) -> str:
        return self.principal.owner

    @property
    def adapters(self) -> LoraService:
        """Raises NotFound where none are kept."""
        if self.state.adapters is None:
            raise NotFound("this service keeps no adapters", param="loras")
        return self.state.adapters

    async def submit(self, body: SubmitBody) -> Job:
        """The durable job of this wish: every dialect's one way in."""
        began = time.perf_counter()
        model = await self._default_model(body) if body.model is None else body.model
        request = _to_request(body, model)
        await self.state.pictures.verify(request)
        async with self._with_loras(body, request) as whole:
            job = await self.job_service.submit(
                whole,
                self.owner,
                idempotency_key=self._idempotency_key(body),
                webhook=body.webhook_url if isinstance(body, ImageBody | VideoBody) else None,
                images_per_day=self.principal.images_per_day,
            )
        self._count(job, time.perf_counter() - began)
        return job

    def _count(self, job: Job, seconds: float) -> None:
        metrics, model = self.state.metrics, job.request.model
        metrics.add("weft_jobs_submitted", model=model, task=job.request.task.value)
        metrics.observe("weft_job_submit_seconds", seconds)
        if job.cached_from is not None or job.leader is not None:
            metrics.add("weft_jobs_same", model=model, how="joined" if job.cached_from is None else "copied")

    @asynccontextmanager
    async def _with_loras(
        self, body: SubmitBody, request: GenerationRequest
    ) -> AsyncIterator[GenerationRequest]:
        """The request with its LoRAs found, whichever way it asks for them; they stay while this is open."""
        prompt, tagged = extract_lora_tags(request.prompt)
        specs = (*(body.lora_specs() if isinstance(body, LoraFields) else ()), *tagged)
        if not specs and not request.loras:
            yield request
            return
        card = find_card(request.model, self.state.cards)
        async with self.adapters.resolve(specs, self.owner, card, again=request.loras) as loras:
            yield request.model_copy(update={"prompt": prompt, "loras": loras})

    def _idempotency_key(self, body: SubmitBody) -> IdempotencyKey | None:
        """What the caller's Idempotency-Key stands for. Raises BadRequest for one that is none."""
        if self.idempotency_key is None:
            return None
        if not IDEMPOTENCY_KEY.fullmatch(self.idempotency_key):
            raise BadRequest(
                "an Idempotency-Key is 1 to 255 visible ASCII characters, such as a UUID",
                param="Idempotency-Key",
            )
        return IdempotencyKey(self.idempotency_key, body_digest(body, kind=type(body).__name__))

    async def _default_model(self, body: SubmitBody) -> str:
        ready = await self.state.ready_models()
        if isinstance(body, OpenAIImageBody):
            return default_model(Task.t2i, self.state.cards, ready)
        if not isinstance(body, ImageBody):
            return default_model(body.task, self.state.cards, ready)
        return default_model(
            body.task, self.state.cards, ready, controls=body.control_types, refiner=bool(body.refiner)
        )


def _to_request(body: SubmitBody, model: str) -> GenerationRequest:
    try:
        return body.to_request(model)
    except ValidationError as error:  # past the bounds no model may cross
        raise from_validation(error, type(body)) from None


def api_state(connection: HTTPConnection) -> ApiState:
    """What create_app was given."""
    state: ApiState = connection.app.state.weft
    return state


CurrentState = Annotated[ApiState, Depends(api_state)]


async def resolve_caller(
    connection: HTTPConnection, state: ApiState, key: bytes | None = None, *, ticket: str | None = None
) -> CallerContext:
    """The visit of whoever holds this key or ticket, or the key in the headers or the cookie.

    Raises Unauthorized; RateLimited after too many wrong keys from one address or too many calls; Forbidden
    for a cookie that a page of another site may have sent, and for what the key may not do.
    """
    presented, by_cookie = (key, False) if key or ticket else credentials(connection)
    if by_cookie and not state.settings.auth_disabled:
        _check_sender(connection, state)
    try:
        gate = state.gate
        principal = await (gate.redeem(ticket) if ticket else gate.identify(presented))
    except Unauthorized:
        if (presented or ticket) is not None and state.gate.limits is not None:
            await state.gate.limits.take(CallClass.auth, caller_address(connection))
        raise
    scope = needed_scope(connection)
    if scope is not None:
        principal.require(scope)
    if state.gate.limits is not None:
        call_class = CallClass.submit if _asks_for_pictures(connection) else CallClass.read
        await state.gate.limits.take(call_class, principal.owner)
    idempotency_key = connection.headers.get("idempotency-key")
    prefix = mount_prefix(connection, state)
    return CallerContext(state, principal, prefix, _address(connection, state), idempotency_key)


async def get_caller(connection: HTTPConnection, state: CurrentState) -> AsyncGenerator[CallerContext]:
    """The visit of a known caller, who holds one of the service's slots while we work for them."""
    caller = await resolve_caller(connection, state)
    async with AsyncExitStack() as held:
        if state.gate.limits is not None and _asks_for_pictures(connection):
            await held.enter_async_context(state.gate.limits.slot())
        if state.look is not None:
            await state.look()
        yield caller


CurrentCaller = Annotated[CallerContext, Depends(get_caller)]


def credentials(connection: HTTPConnection) -> tuple[bytes | None, bool]:
    """The key or token that was sent, and whether the browser added it by itself (a cookie)."""
    presented = presented_key(connection.headers)
    if presented is not None:
        return presented, False
    cookie = connection.cookies.get(SESSION_COOKIE)
    return (None, False) if not cookie else (cookie.encode("latin-1", "replace"), True)


def needed_scope(connection: HTTPConnection) -> Scope | None:
    """What the caller's key must be good for; None: being known is enough."""
    path = route_path(connection.scope)
    if path.startswith("/admin/"):
        return Scope.admin
    if path.startswith("/auth/"):
        return None
    if path == "/metrics":
        return Scope.metrics
    return Scope.read if connection.scope.get("method", "GET") in SAFE else Scope.generate


def caller_address(connection: HTTPConnection) -> str:
    """Of the peer itself: X-Forwarded-For is what the peer says."""
    return "nobody" if connection.client is None else connection.client.host


def _asks_for_pictures(connection: HTTPConnection) -> bool:
    return connection.scope.get("method") == "POST" and needed_scope(connection) is Scope.generate


def _check_sender(connection: HTTPConnection, state: ApiState) -> None:
    """Raises Forbidden unless our own page sent this: browsers add cookies to anybody's calls."""
    unsafe = connection.scope.get("method", "GET") not in SAFE
    if unsafe and CSRF_HEADER not in connection.headers:
        raise Forbidden(f"a call by cookie that changes something needs the header {CSRF_HEADER}: 1")
    origin = connection.headers.get("origin")
    socket = connection.scope["type"] == "websocket"
    ours = {connection.headers.get("host", ""), urlsplit(state.settings.public_url).netloc} - {""}
    if (origin is None and socket) or (origin is not None and urlsplit(origin).netloc not in ours):
        raise Forbidden("another web site sent this call; open this service's own page")


def mount_prefix(connection: HTTPConnection, state: ApiState) -> str:
    """The path we are reached under: "" or "/below"."""
    path = urlsplit(state.settings.public_url).path or connection.scope.get("root_path", "")
    return str(path).rstrip("/")


def _address(connection: HTTPConnection, state: ApiState) -> str:
    return (state.settings.public_url or str(connection.base_url)).rstrip("/")


def job_id(task_id: str) -> str:
    """The id, if it can be one. Raises NotFound, as for any job the caller does not have."""
    if is_job_id(task_id):
        return task_id
    raise NotFound("there is no such job; an id is the 32 hex digits that came with the job", param="id")


JobId = Annotated[str, Depends(job_id)]
