"""Without a key, only callers on this machine are answered."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.protocol.errors import Forbidden
from serve_app.admission.loopback import is_loopback
from serve_app.api.errors import route_path
from serve_app.api.middleware.send_error import send_error
from serve_app.api.url_parts import url_parts
from serve_app.settings import Settings

PROBES = ("/health", "/ready")


class LocalOnlyMiddleware:
    """While no key is set: callers on this machine only, and no other web site through their browser but
    those that WEFT_CORS_ORIGINS names.

    Without it any page could post to a loopback address, or rebind its own name to it and read all.
    With WEFT_PUBLIC_URL a proxy in front of the service decides who may reach it.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.public = url_parts(settings.public_url)
        self.allowed_sites = settings.cors_origins
        self.enabled = settings.auth_disabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._fault(scope) if scope["type"] in ("http", "websocket") else None
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await send_error(Forbidden(fault), scope, receive, send)

    def _fault(self, scope: Scope) -> str | None:
        """Why the call is refused; None: it is not."""
        if not self.enabled or route_path(scope) in PROBES:
            return None
        headers = Headers(scope=scope)
        return self._foreign_host(scope, headers.get("host", "")) or self._foreign_site(scope, headers)

    def _foreign_host(self, scope: Scope, host_header: str) -> str | None:
        client = scope.get("client")
        if client is not None and not (is_loopback(client[0]) or self.public.hostname):
            return (
                f"this service has no key and answers only its own machine, not {client[0]}; set WEFT_API_KEY"
            )
        host = url_parts(f"//{host_header}").hostname or ""
        if not (is_loopback(host) or host == self.public.hostname):
            return (
                f"this service has no key and answers only on loopback, not as {host[:100]!r}; "
                "set WEFT_API_KEY, or WEFT_PUBLIC_URL to the address it is reached by"
            )
        return None

    def _foreign_site(self, scope: Scope, headers: Headers) -> str | None:
        followed_link = headers.get("sec-fetch-mode") == "navigate" and scope.get("method") == "GET"
        cross_site = headers.get("sec-fetch-site") == "cross-site" and not followed_link
        origin = headers.get("origin")
        if origin is not None and origin in self.allowed_sites:
            return None
        own_hosts = {headers.get("host", ""), self.public.netloc} - {""}
        if cross_site or (origin is not None and url_parts(origin).netloc not in own_hosts):
            return "another web site sent this call; open this service's own page, or set WEFT_API_KEY"
        return None
