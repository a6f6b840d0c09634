"""/auth: exchange a key for a token or for the page's session cookie, and log out."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from deployments.protocol.errors import Unauthorized
from serve_app.admission.api_keys import public_name
from serve_app.admission.principals import presented_key
from serve_app.admission.rate_limits import CallClass
from serve_app.admission.tickets import TTL_S as TICKET_TTL_S
from serve_app.admission.tokens import TTL_S, Claims
from serve_app.api.auth import SESSION_COOKIE, CurrentCaller, caller_address, count_wrong_key, credentials
from serve_app.api.caller import mount_prefix
from serve_app.api.request_body import documented, read_json
from serve_app.api.schemas.access import CallerOut, LoggedOut, LoginBody, TicketOut, TokenOut
from serve_app.api.state import ApiState, CurrentState

public = APIRouter(tags=["access"])
router = APIRouter(tags=["access"])


@public.post("/auth/token", openapi_extra=documented(LoginBody))
async def issue_token(http_request: Request, state: CurrentState) -> TokenOut:
    """A token for 24 hours, in exchange for an API key (and, if sent, its user's e-mail).

    Send it as `Authorization: Bearer <token>`. It ends early when the key is revoked or the user disabled.
    """
    token, claims = await _log_in(http_request, state, session=False)
    return TokenOut(
        access_token=token,
        expires_in=TTL_S,
        expires_at=claims.expires_at,
        scope=" ".join(sorted(claims.scopes)),
    )


@public.post("/auth/session", openapi_extra=documented(LoginBody))
async def open_session(http_request: Request, state: CurrentState, response: Response) -> CallerOut:
    """The page's log-in: as /auth/token, but the token comes as a cookie that scripts cannot read.

    Calls with the cookie that change something must carry the header `X-Weft-CSRF: 1`. It never has the
    admin scope.
    """
    token, claims = await _log_in(http_request, state, session=True)
    response.set_cookie(
        SESSION_COOKIE,
        token,
        max_age=TTL_S,
        path=mount_prefix(http_request, state) or "/",
        secure=_is_https(http_request, state),
        httponly=True,
        samesite="strict",
    )
    return CallerOut(owner=claims.owner, scopes=sorted(claims.scopes), images_per_day=None)


@router.get("/auth/me")
async def who_am_i(caller: CurrentCaller) -> CallerOut:
    """Owner, role, scopes and quota of the caller."""
    principal = caller.principal
    return CallerOut(
        owner=principal.owner,
        role=principal.role,
        scopes=sorted(principal.scopes),
        images_per_day=principal.images_per_day,
        budget_per_month=principal.budget_per_month,
    )


@router.post("/auth/ticket")
async def issue_ticket(caller: CurrentCaller) -> TicketOut:
    """A ticket that opens one WebSocket, once, within 30 seconds: `/ws/{task_id}?ticket=...`.

    A browser cannot set headers on a WebSocket, and a key must not be part of a URL.
    """
    ticket = await caller.state.authenticator.ticket(caller.principal)
    return TicketOut(ticket=ticket, expires_in=TICKET_TTL_S)


@router.delete("/auth/session")
async def log_out(http_request: Request, response: Response, caller: CurrentCaller) -> LoggedOut:
    """End the token that this call was made with, cookie or bearer."""
    key, _ = credentials(http_request)
    await caller.state.authenticator.log_out(key)
    response.delete_cookie(SESSION_COOKIE, path=mount_prefix(http_request, caller.state) or "/")
    return LoggedOut()


async def _log_in(http_request: Request, state: ApiState, *, session: bool) -> tuple[str, Claims]:
    authenticator = state.authenticator
    key, email = presented_key(http_request.headers), None
    if await http_request.body():
        body = await read_json(http_request, LoginBody)
        key = key if body.api_key is None else body.api_key.get_secret_value().strip().encode()
        email = body.email
    try:
        token, claims = await authenticator.log_in(key, email, session=session)
    except Unauthorized:
        await count_wrong_key(http_request, state, key)
        raise
    if authenticator.limits is not None:
        who = f"{caller_address(http_request)} {public_name(key)}"
        await authenticator.limits.take(CallClass.auth, who)
    return token, claims


def _is_https(http_request: Request, state: ApiState) -> bool:
    return http_request.scope["scheme"] == "https" or state.settings.public_url.startswith("https:")
