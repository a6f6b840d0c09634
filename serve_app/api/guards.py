"""The outer shell around every route: limits on what comes in, headers on what goes out."""

import asyncio
import logging
import re
import secrets
import time
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from deployments.protocol import log_context
from deployments.protocol.errors import BadRequest, Forbidden, Internal, Overloaded, TooLarge, WeftError
from deployments.protocol.log_context import LogContext
from serve_app.api.errors import error_kind_of, render, route_path
from serve_app.api.metrics import ApiMetrics
from serve_app.settings import Settings

logger = logging.getLogger(__name__)

# Serve believes both: a client could switch off its timeout and its detection of gone clients.
SERVE_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
LOOPBACK_IPV4 = re.compile(r"127(?:\.[0-9]{1,3}){3}")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UPLOADS = "/api/loras"  # a form with a file goes there
MAX_HEAD_BYTES = 32 * 2**10  # address and headers together; the server itself has no limit
MAX_JSON_PARTS = 10_000  # brackets and commas; 32 MiB of "[],[]," would become a gigabyte of lists
# One whole string (or the rest of the body, if it never ends) is one match: linear, whatever comes.
JSON_PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; font-src 'self'; connect-src 'self'; manifest-src 'self'; worker-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = (  # Swagger UI writes style attributes
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"


class ResponseEnvelopeMiddleware:
    """Outermost: a request id, security headers and a count on every answer; a time limit until an answer
    begins, which no header of a client changes; the last catch for bugs."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics, max_call_s: float) -> None:
        self.app = app
        self.metrics = metrics
        self.max_call_s = max_call_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        kept = [(name, value) for name, value in scope["headers"] if name not in SERVE_HEADERS]
        scope = {**scope, "headers": kept, "state": {**scope.get("state", {})}}
        limit = asyncio.timeout(self.max_call_s if scope["type"] == "http" else None)
        answer = _Answer(send, request_id, _policy(route_path(scope)), limit)
        began = time.perf_counter()
        mark = log_context.bind(LogContext(request_id=request_id))
        try:
            async with limit:
                await self.app(scope, receive, answer.send)
        except Exception as error:
            late = isinstance(error, TimeoutError) and limit.expired()
            logger.error("request failed", exc_info=not late, extra={"late": late})
            if answer.status is not None:
                raise  # half an answer is out: the server breaks the connection, which the client can see
            answer.limit = None
            if late:
                told = Overloaded(f"no answer within {self.max_call_s:g} s; ask for a job and look after it")
                await render(told, scope, status=504)(scope, receive, answer.send)
            else:
                await _deliver(_as_ours(error, request_id), scope, receive, answer.send)
        finally:
            log_context.unbind(mark)
            if scope["type"] == "http":
                self._count(scope, answer.status, time.perf_counter() - began)

    def _count(self, scope: Scope, status: int | None, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")  # mounts and 404s have no route
        method = scope["method"] if scope["method"] in METHODS else "OTHER"  # a client may make up any
        self.metrics.add("weft_http_requests", method=method, route=route, status=str(status or 499))
        self.metrics.observe("weft_http_request_seconds", seconds, route=route)
        if (kind := error_kind_of(scope)) is not None:
            self.metrics.add("weft_refusals", kind=kind)


class _Answer:
    """Adds the headers every answer has, and remembers its status."""

    def __init__(self, send: Send, request_id: str, policy: str, limit: asyncio.Timeout) -> None:
        self._send = send
        self._request_id = request_id
        self._policy = policy
        self.limit: asyncio.Timeout | None = limit  # over once an answer begins: a stream may go on
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            if self.limit is not None:
                self.limit.reschedule(None)
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._request_id
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
            headers["Content-Security-Policy"] = self._policy
            headers.setdefault("Cache-Control", "no-store")
        elif message["type"] in ("websocket.accept", "websocket.close"):
            self.status = 101
        await self._send(message)


class HeaderLimitMiddleware:
    """Refuses addresses and headers that are longer than anybody needs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            size = len(scope["path"]) + len(scope.get("query_string", b""))
            size += sum(len(name) + len(value) for name, value in scope["headers"])
            if size > MAX_HEAD_BYTES:
                fault = TooLarge(f"address and headers are {size} bytes; at most {MAX_HEAD_BYTES} are taken")
                await _deliver(fault, scope, receive, send, status=431)
                return
        await self.app(scope, receive, send)


class LocalOnlyMiddleware:
    """While no key is set: only callers on this machine, and no web site through their browser.

    Without it any page could post to a loopback address, or rebind its own name to it and read all.
    WEFT_PUBLIC_URL says that something in front of us decides who may come.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.public = _split(settings.public_url)
        self.guarded = settings.auth_disabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._fault(scope) if scope["type"] in ("http", "websocket") else None
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await _deliver(Forbidden(fault), scope, receive, send)

    def _fault(self, scope: Scope) -> str | None:
        if not self.guarded or route_path(scope) in ("/health", "/ready"):
            return None
        headers = Headers(scope=scope)
        client = scope.get("client")
        if client is not None and not (_is_loopback(client[0]) or self.public.hostname):
            return (
                f"this service has no key and answers only its own machine, not {client[0]}; set WEFT_API_KEY"
            )
        address = headers.get("host", "")
        host = _split(f"//{address}").hostname or ""
        if not (_is_loopback(host) or host == self.public.hostname):
            return (
                f"this service has no key and answers only on loopback, not as {host[:100]!r}; "
                "set WEFT_API_KEY, or WEFT_PUBLIC_URL to the address it is reached by"
            )
        followed_link = headers.get("sec-fetch-mode") == "navigate" and scope.get("method") == "GET"
        foreign = headers.get("sec-fetch-site") == "cross-site" and not followed_link
        origin = headers.get("origin")
        ours = {address, self.public.netloc} - {""}
        if foreign or (origin is not None and _split(origin).netloc not in ours):
            return "another web site sent this call; open this service's own page, or set WEFT_API_KEY"
        return None


class BodyLimitMiddleware:
    """Reads a body up to the limit, counting what arrives, and looks how deep its JSON goes.

    The upload of an adapter has a limit of its own, and is not read before its caller is known.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_depth: int, max_upload_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_depth = max_depth
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        content_type = Headers(scope=scope).get("content-type", "")
        if route_path(scope) == UPLOADS and content_type.lower().startswith("multipart/"):
            await self.app(scope, _counted(receive, self.max_upload_bytes), send)
            return
        try:
            body = await self._read(scope, receive)
            if "json" in content_type.lower():
                check_json_shape(body, self.max_depth)
        except TooLarge as error:
            await render(error, scope)(scope, receive, send)
        except BadRequest as error:
            await render(error, scope, status=400)(scope, receive, send)
        except ClientGone:
            return
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > self.max_bytes):
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is over {self.max_bytes} bytes; send fewer or smaller pictures")


class ClientGone(Exception):
    """Nobody is left to answer."""


def check_json_shape(body: bytes, max_depth: int) -> None:
    """Raises BadRequest when brackets nest deeper than max_depth, or when there are far too many values."""
    depth = 0
    for count, match in enumerate(JSON_PART.finditer(body)):
        part = match[0]
        if part in (b"[", b"{"):
            depth += 1
            if depth > max_depth:
                raise BadRequest(f"the JSON nests deeper than {max_depth} levels; a request needs three")
        elif part in (b"]", b"}"):
            depth -= 1
        if count > MAX_JSON_PARTS:
            raise BadRequest(f"the JSON has more than {MAX_JSON_PARTS} parts; a request needs a few dozen")


def _counted(receive: Receive, max_bytes: int) -> Receive:
    """A receive that raises TooLarge, in the route that reads the body, when more comes than that."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise TooLarge(f"the upload is over {max_bytes} bytes")
        return message

    return counted


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the whole body once, then whatever the server says next (a disconnect)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _deliver(
    error: WeftError, scope: Scope, receive: Receive, send: Send, *, status: int | None = None
) -> None:
    if scope["type"] == "http":
        await render(error, scope, status=status)(scope, receive, send)
    else:
        await WebSocketClose(1011 if isinstance(error, Internal) else 4403, error.message[:100])(
            scope, receive, send
        )


def _as_ours(error: Exception, request_id: str) -> WeftError:
    if isinstance(error, WeftError):
        return error
    return Internal(f"something broke here, and it is logged as {request_id}; try again, then report it")


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is a decent one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _policy(path: str) -> str:
    if path == "/ui" or path.startswith("/ui/"):
        return PAGE_POLICY
    return DOCS_POLICY if path == "/docs" or path.startswith("/docs/") else DATA_POLICY


def _split(url: str) -> SplitResult:
    """The address in its parts; all of them empty where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or LOOPBACK_IPV4.fullmatch(host) is not None
