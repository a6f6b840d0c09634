"""Each middleware alone, around a small ASGI app: what it adds, refuses and passes on."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol import log_context
from deployments.protocol.errors import Overloaded
from serve_app.api.metrics import ApiMetrics
from serve_app.api.middleware import body_limit
from serve_app.api.middleware.body_limit import BodyLimitMiddleware
from serve_app.api.middleware.error_boundary import ErrorBoundaryMiddleware
from serve_app.api.middleware.header_limit import HeaderLimitMiddleware
from serve_app.api.middleware.http_metrics import HttpMetricsMiddleware
from serve_app.api.middleware.request_id import RequestIdMiddleware
from serve_app.api.middleware.security_headers import SecurityHeadersMiddleware
from serve_app.api.middleware.serve_headers import ServeHeadersMiddleware
from serve_app.api.middleware.time_limit import TimeLimitMiddleware

ALL: list[Callable[[ASGIApp], ASGIApp]] = [
    ServeHeadersMiddleware,
    RequestIdMiddleware,
    lambda app: HttpMetricsMiddleware(app, ApiMetrics()),
    SecurityHeadersMiddleware,
    ErrorBoundaryMiddleware,
    lambda app: TimeLimitMiddleware(app, 1.0),
    HeaderLimitMiddleware,
    lambda app: BodyLimitMiddleware(app, 10, 20),
]


def scope(kind: str = "http", **changes: Any) -> Scope:
    base = {
        "type": kind,
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": [],
        "state": {"request_id": "test-request"},
    }
    return base | changes


async def answered(app: ASGIApp, call: Scope, *received: Message) -> list[Message]:
    """What the app sends when it receives these messages, and then a disconnect."""
    sent: list[Message] = []
    messages = iter(received)

    async def receive() -> Message:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Message) -> None:
        sent.append(message)

    await app(call, receive, send)
    return sent


async def hello(call: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("hello")(call, receive, send)


def header(sent: list[Message], name: str) -> str | None:
    return dict(sent[0]["headers"]).get(name.encode(), b"").decode() or None


@pytest.mark.parametrize("middleware", ALL)
async def test_a_lifespan_passes_through_unchanged(middleware: Callable[[ASGIApp], ASGIApp]) -> None:
    lifespan = {"type": "lifespan", "asgi": {"version": "3.0"}}
    seen: list[Scope] = []

    async def app(call: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(call)

    await answered(middleware(app), lifespan)

    assert seen == [lifespan]


async def test_the_request_id_is_in_the_answer_the_state_and_the_log_context() -> None:
    seen: list[str | None] = []

    async def app(call: Scope, receive: Receive, send: Send) -> None:
        seen.extend([call["state"]["request_id"], log_context.current().request_id])
        await hello(call, receive, send)

    sent = await answered(RequestIdMiddleware(app), scope(headers=[(b"x-request-id", b"caller-0001")]))

    assert [*seen, header(sent, "x-request-id")] == ["caller-0001"] * 3
    assert log_context.current().request_id != "caller-0001"


async def test_behind_serve_the_request_id_is_left_to_its_proxy() -> None:
    async def app(_call: Scope, receive: Receive, send: Send) -> None:
        await Response()(_call, receive, send)

    call = scope(headers=[(b"x-request-id", b"caller-0001")])
    sent = await answered(RequestIdMiddleware(app, sent_by_proxy=True), call)

    assert b"x-request-id" not in dict(sent[0]["headers"])


async def test_an_unexpected_error_is_answered_with_its_request_id(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_call: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError("a secret")

    sent = await answered(ErrorBoundaryMiddleware(app), scope())

    assert sent[0]["status"] == 500
    error = json.loads(sent[1]["body"])["error"]
    assert "test-request" in error["message"]
    assert "secret" not in error["message"]
    assert caplog.records[0].levelno == logging.ERROR
    assert caplog.records[0].exc_info is not None


async def test_an_error_of_the_error_tree_keeps_its_status() -> None:
    async def app(_call: Scope, _receive: Receive, _send: Send) -> None:
        raise Overloaded("full", retry_after_s=3)

    sent = await answered(ErrorBoundaryMiddleware(app), scope())

    assert (sent[0]["status"], header(sent, "retry-after")) == (503, "3")


async def test_an_error_after_the_answer_began_breaks_the_connection() -> None:
    async def app(_call: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await answered(ErrorBoundaryMiddleware(app), scope())


async def test_an_unexpected_error_closes_a_websocket_with_1011() -> None:
    async def app(_call: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError

    sent = await answered(ErrorBoundaryMiddleware(app), scope("websocket"))

    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1011)]


async def test_a_call_without_an_answer_in_time_is_a_504() -> None:
    async def app(_call: Scope, _receive: Receive, _send: Send) -> None:
        await asyncio.Event().wait()

    sent = await answered(TimeLimitMiddleware(app, 0.01), scope())

    assert sent[0]["status"] == 504


async def test_a_timeout_of_the_app_itself_is_no_504() -> None:
    async def app(_call: Scope, _receive: Receive, _send: Send) -> None:
        raise TimeoutError("of the store")

    with pytest.raises(TimeoutError, match="of the store"):
        await answered(TimeLimitMiddleware(app, 60.0), scope())


async def test_an_answer_that_has_begun_may_take_longer_than_the_limit() -> None:
    async def app(_call: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.05)
        await send({"type": "http.response.body", "body": b"late"})

    sent = await answered(TimeLimitMiddleware(app, 0.01), scope())

    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


async def test_a_client_that_leaves_within_its_body_gets_no_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(call: Scope, receive: Receive, _send: Send) -> None:
        await Request(call, receive).body()
        pytest.fail("half a body is none")

    first = {"type": "http.request", "body": b"half", "more_body": True}
    stack = ErrorBoundaryMiddleware(BodyLimitMiddleware(app, 10, 20))
    sent = await answered(stack, scope(method="POST"), first)

    assert sent == []
    assert caplog.records == []


async def test_no_byte_of_a_body_is_read_before_the_route_asks_for_it() -> None:
    async def receive() -> Message:
        pytest.fail("a stranger's body costs no memory")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    call = scope(method="POST", headers=[(b"content-length", b"9")])
    await BodyLimitMiddleware(hello, 10, 20)(call, receive, send)

    assert sent[0]["status"] == 200


async def test_a_body_that_stalls_is_given_up_and_a_long_answer_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body_limit, "STALL_S", 0.01)
    messages = iter([{"type": "http.request", "body": b"ab", "more_body": False}])

    async def receive() -> Message:
        message = next(messages, None)
        if message is None:
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}
        return message

    async def reads_once(_call: Scope, receive: Receive, _send: Send) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    async def send(_message: Message) -> None:
        """Not called."""

    await BodyLimitMiddleware(reads_once, 10, 20)(scope(method="POST"), receive, send)
    with pytest.raises(HTTPException, match="no byte of the body came") as stalled:
        await BodyLimitMiddleware(reads_once, 10, 20)(scope(method="POST"), receive, send)

    assert stalled.value.status_code == 408


@pytest.mark.parametrize(
    ("path", "content_type", "limit"),
    [
        ("/api/generate/image", b"application/json", 100_000),
        ("/api/loras", b"multipart/form-data; boundary=x", 200_000),
        ("/api/loras", b"application/json", 100_000),
        ("/auth/token", b"application/json", 2**16),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_of_its_path_is_refused_by_its_head_or_as_it_comes(
    path: str, content_type: bytes, limit: int, declared: bool
) -> None:
    read: list[int] = []

    async def app(call: Scope, receive: Receive, send: Send) -> None:
        read.append(len(await Request(call, receive).body()))
        await hello(call, receive, send)

    async def status(size: int) -> int:
        headers = [(b"content-type", content_type)]
        headers += [(b"content-length", str(size).encode())] if declared else []
        body = {"type": "http.request", "body": bytes(size)}
        stack = ErrorBoundaryMiddleware(BodyLimitMiddleware(app, 100_000, 200_000))
        sent = await answered(stack, scope(method="POST", path=path, headers=headers), body)
        return int(sent[0]["status"])

    assert [await status(limit), await status(limit + 1)] == [200, 413]
    assert read == [limit]


async def test_a_call_that_is_never_answered_counts_as_499() -> None:
    metrics = ApiMetrics()

    async def app(_call: Scope, _receive: Receive, _send: Send) -> None:
        """Sends nothing."""

    await answered(HttpMetricsMiddleware(app, metrics), scope(method="BREW"))

    labels = {"method": "OTHER", "route": "unmatched", "status": "499"}
    assert metrics.registry.get_sample_value("weft_http_requests_total", labels) == 1.0


async def test_headers_by_which_serve_could_be_controlled_are_removed() -> None:
    seen: list[Any] = []

    async def app(call: Scope, receive: Receive, send: Send) -> None:
        seen.extend(call["headers"])
        await hello(call, receive, send)

    given = [
        (b"x-request-timeout-seconds", b"9"),
        (b"accept", b"*/*"),
        (b"x-request-disconnect-disabled", b"1"),
    ]
    await answered(ServeHeadersMiddleware(app), scope(headers=given))

    assert seen == [(b"accept", b"*/*")]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/ui/", "script-src 'self'"), ("/docs", "'unsafe-inline'"), ("/api/models/", "sandbox")],
)
async def test_each_kind_of_path_has_its_content_policy(path: str, allowed: str) -> None:
    sent = await answered(SecurityHeadersMiddleware(hello), scope(path=path))

    assert allowed in (header(sent, "content-security-policy") or "")
    assert header(sent, "x-content-type-options") == "nosniff"
