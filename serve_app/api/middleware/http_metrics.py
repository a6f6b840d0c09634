"""Counts every HTTP call and its duration, by route."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.errors import error_kind_of
from serve_app.api.metrics import ApiMetrics

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLIENT_GONE = 499  # no answer was sent


class HttpMetricsMiddleware:
    """Labels hold the route's template and never a path that a client chose."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_GONE
        began = time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            self._count(scope, status, time.perf_counter() - began)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")  # mounts and 404s have no route
        method = scope["method"] if scope["method"] in METHODS else "OTHER"  # a client may invent any
        self.metrics.add("weft_http_requests_total", method=method, route=route, status=str(status))
        self.metrics.observe("weft_http_request_seconds", seconds, route=route)
        if (kind := error_kind_of(scope)) is not None:
            self.metrics.add("weft_refusals_total", kind=kind)
