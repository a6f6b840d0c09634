"""Every call as its caller sent it, where a proxy of the operator reports who that is."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.admission.forwarded import TrustedProxies

FORWARDED_HOST = (
    "forwarded_host"  # key in the scope's state: the host that callers use, as a proxy reports it
)


class TrustedProxiesMiddleware:
    """Sets the client's address and the scheme of every call that comes through a trusted proxy.

    The Host header stays: a page of another site may reach a service on loopback by a name of its own, and
    could write any other header.
    """

    def __init__(self, app: ASGIApp, proxies: TrustedProxies) -> None:
        self.app = app
        self.proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope.get("client") is not None:
            scope = self._as_sent(scope)
        await self.app(scope, receive, send)

    def _as_sent(self, scope: Scope) -> Scope:
        peer, port = scope["client"]
        origin = self.proxies.origin(peer, Headers(scope=scope).getlist)
        scheme = scope["scheme"] if origin.scheme is None else _for_type(origin.scheme, scope["type"])
        client = (peer, port) if origin.address == peer else (origin.address, 0)
        state = scope.get("state", {}) | {FORWARDED_HOST: origin.host}
        return {**scope, "client": client, "scheme": scheme, "state": state}


def _for_type(scheme: str, kind: str) -> str:
    secure = scheme in ("https", "wss")
    plain = "ws" if kind == "websocket" else "http"
    return f"{plain}s" if secure else plain
