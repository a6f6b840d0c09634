"""Who calls, what they may do, and how often: the dependency of every route behind a key."""

import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from deployments.protocol.errors import Forbidden, Unauthorized
from serve_app.admission.api_keys import public_name
from serve_app.admission.forwarded import limit_name
from serve_app.admission.principals import Scope, presented_key
from serve_app.admission.rate_limits import CallClass
from serve_app.api.caller import CallerContext, base_address, forwarded_host, mount_prefix
from serve_app.api.middleware.body_limit import is_large
from serve_app.api.route_scopes import needed_scope
from serve_app.api.state import ApiState, CurrentState
from serve_app.api.url_parts import url_parts

logger = logging.getLogger(__name__)

SESSION_COOKIE = "weft_session"
CSRF_HEADER = "x-weft-csrf"  # a page of another site can send it only after a preflight, which is refused
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


async def authenticate(
    connection: HTTPConnection, state: ApiState, key: bytes | None = None, *, ticket: str | None = None
) -> CallerContext:
    """The caller that holds this key or ticket, or the key in the headers or the cookie.

    Raises Unauthorized; RateLimited after too many wrong keys from one address or too many calls; Forbidden
    for a cookie that a page of another site may have sent, and for what the key may not do.
    """
    presented, by_cookie = (key, False) if key or ticket else credentials(connection)
    if by_cookie and not state.settings.auth_disabled:
        _check_sender(connection, state)
    authenticator = state.authenticator
    try:
        principal = await (authenticator.redeem(ticket) if ticket else authenticator.identify(presented))
    except Unauthorized:
        if (presented or ticket) is not None:
            await count_wrong_key(connection, state, presented)
        raise
    scope = needed_scope(connection)
    if scope is not None:
        principal.require(scope)
    if authenticator.limits is not None:
        call_class = CallClass.submit if _submits(connection) else CallClass.read
        await authenticator.limits.take(call_class, principal.owner)
    return CallerContext(
        state,
        principal,
        prefix=mount_prefix(connection, state),
        address=base_address(connection, state),
        idempotency_key=connection.headers.get("idempotency-key"),
    )


async def get_caller(connection: HTTPConnection, state: CurrentState) -> AsyncGenerator[CallerContext]:
    """The authenticated caller; a submitting call holds one of the service's slots until it is answered."""
    caller = await authenticate(connection, state)
    async with AsyncExitStack() as stack:
        if state.authenticator.limits is not None and _submits(connection):
            await stack.enter_async_context(state.authenticator.limits.slot())
        if is_large(connection):
            await caller.body_slot.enter_async_context(state.large_bodies.hold(caller.owner))
            stack.push_async_callback(caller.body_slot.aclose)
        if state.refresh_cards is not None:
            await state.refresh_cards()
        yield caller


CurrentCaller = Annotated[CallerContext, Depends(get_caller)]


def credentials(connection: HTTPConnection) -> tuple[bytes | None, bool]:
    """The key or token that was sent, and whether the browser added it by itself (a cookie)."""
    presented = presented_key(connection.headers)
    if presented is not None:
        return presented, False
    cookie = connection.cookies.get(SESSION_COOKIE)
    return (None, False) if not cookie else (cookie.encode("latin-1", "replace"), True)


async def count_wrong_key(connection: HTTPConnection, state: ApiState, presented: bytes | None) -> None:
    """Raises RateLimited in place of Unauthorized after too many wrong keys.

    Right keys are never refused for the wrong ones of others, who may share their address: behind a proxy
    that is not trusted, all callers do.
    """
    limits, address = state.authenticator.limits, caller_address(connection)
    logger.info("a wrong key was sent", extra={"client": address, "key": public_name(presented)})
    if limits is not None:
        await limits.take(CallClass.guess, address)
        await limits.take(CallClass.auth, f"{address} wrong {public_name(presented)}")


def caller_address(connection: HTTPConnection) -> str:
    """The name under which calls from the caller's address are counted.

    The address is the peer's, or the one that a trusted proxy reports (TrustedProxiesMiddleware).
    """
    return "unknown" if connection.client is None else limit_name(connection.client.host)


def _submits(connection: HTTPConnection) -> bool:
    return connection.scope.get("method") == "POST" and needed_scope(connection) is Scope.generate


def _check_sender(connection: HTTPConnection, state: ApiState) -> None:
    """Raises Forbidden unless the service's own page sent this: browsers add cookies to any site's calls."""
    unsafe = connection.scope.get("method", "GET") not in SAFE_METHODS
    if unsafe and CSRF_HEADER not in connection.headers:
        raise Forbidden(f"a call by cookie that changes something needs the header {CSRF_HEADER}: 1")
    origin = connection.headers.get("origin")
    is_socket = connection.scope["type"] == "websocket"
    public = url_parts(state.settings.public_url).netloc
    own_hosts = {connection.headers.get("host", ""), forwarded_host(connection), public} - {""}
    if (origin is None and is_socket) or (origin is not None and url_parts(origin).netloc not in own_hosts):
        raise Forbidden("another web site sent this call; open this service's own page")
