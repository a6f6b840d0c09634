"""The caller of a route: who it is, and the URLs under which it reached the service."""

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends
from starlette.requests import HTTPConnection

from deployments.protocol.errors import NotFound
from serve_app.admission.principals import Principal, Scope
from serve_app.api.middleware.trusted_proxies import FORWARDED_HOST
from serve_app.api.state import ApiState
from serve_app.job_ids import is_job_id
from serve_app.jobs.service import JobService
from serve_app.loras.service import LoraService


@dataclass(frozen=True)
class CallerContext:
    """One authenticated call."""

    state: ApiState
    principal: Principal
    prefix: str  # path prefix of links for this caller: "" or "/below"
    address: str  # base of links that work anywhere: https://host/below
    idempotency_key: str | None = None  # as it was sent
    body_slot: AsyncExitStack = field(default_factory=AsyncExitStack)  # closed once the body is stored

    @property
    def job_service(self) -> JobService:
        return self.state.job_service

    @property
    def owner(self) -> str:
        return self.principal.owner

    @property
    def is_admin(self) -> bool:
        """Whether this key may manage what belongs to all users; an admin's other keys may not."""
        return Scope.admin in self.principal.scopes

    @property
    def lora_service(self) -> LoraService:
        """Raises NotFound when this service stores no LoRAs."""
        if self.state.lora_service is None:
            raise NotFound("this service keeps no adapters", param="loras")
        return self.state.lora_service


def mount_prefix(connection: HTTPConnection, state: ApiState) -> str:
    """The path prefix under which the service is reached: "" or "/below"."""
    path = urlsplit(state.settings.public_url).path or connection.scope.get("root_path", "")
    return str(path).rstrip("/")


def base_address(connection: HTTPConnection, state: ApiState) -> str:
    """The URL under which the service is reached, without a slash at its end."""
    if state.settings.public_url:
        return state.settings.public_url.rstrip("/")
    host = forwarded_host(connection)
    if host:  # put together by hand: the Host header, which it replaces, need not be readable
        scope = connection.scope
        return f"{scope['scheme']}://{host}{scope.get('root_path', '')}".rstrip("/")
    return str(connection.base_url).rstrip("/")


def forwarded_host(connection: HTTPConnection) -> str:
    """The host and port by which the caller reached a trusted proxy; empty where none reports it."""
    return connection.scope.get("state", {}).get(FORWARDED_HOST) or ""


def parse_job_id(task_id: str) -> str:
    """The id. Raises NotFound for text that is no job id, as for any job that the caller does not have."""
    if is_job_id(task_id):
        return task_id
    raise NotFound("there is no such job; an id is the 32 hex digits that came with the job", param="id")


JobId = Annotated[str, Depends(parse_job_id)]
