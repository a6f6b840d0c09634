"""The order of the middleware."""

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from serve_app.admission.forwarded import TrustedProxies
from serve_app.api.middleware.body_limit import BodyLimitMiddleware
from serve_app.api.middleware.error_boundary import ErrorBoundaryMiddleware
from serve_app.api.middleware.head import HeadMiddleware
from serve_app.api.middleware.header_limit import HeaderLimitMiddleware
from serve_app.api.middleware.http_metrics import HttpMetricsMiddleware
from serve_app.api.middleware.local_only import LocalOnlyMiddleware
from serve_app.api.middleware.request_id import RequestIdMiddleware
from serve_app.api.middleware.security_headers import SecurityHeadersMiddleware
from serve_app.api.middleware.serve_headers import ServeHeadersMiddleware
from serve_app.api.middleware.time_limit import TimeLimitMiddleware
from serve_app.api.middleware.trusted_proxies import TrustedProxiesMiddleware
from serve_app.api.state import ApiState

GZIP_FROM_BYTES = 1024
FORM_BYTES = 2**20  # of an upload, around its file
EXPOSED_HEADERS = ("X-Request-ID", "Retry-After", "retry-after-ms", "Location", "ETag", "Content-Disposition")
PREFLIGHT_S = 600  # that a browser remembers its answer


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Lets pages of these web sites call with a key; never with a cookie."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
            max_age=PREFLIGHT_S,
        )
    ]


def middleware_stack(state: ApiState) -> list[Middleware]:
    """The outermost first."""
    settings = state.settings
    return [
        Middleware(ServeHeadersMiddleware),
        Middleware(TrustedProxiesMiddleware, proxies=TrustedProxies(settings.trusted_proxies)),
        Middleware(RequestIdMiddleware, sent_by_proxy=state.behind_serve),
        Middleware(HttpMetricsMiddleware, metrics=state.metrics),
        Middleware(SecurityHeadersMiddleware),
        *_cors(settings.cors_origins),  # a preflight has no key
        Middleware(ErrorBoundaryMiddleware),
        Middleware(TimeLimitMiddleware, max_call_s=settings.max_call_s),
        Middleware(HeaderLimitMiddleware),
        Middleware(LocalOnlyMiddleware, settings=settings),
        Middleware(HeadMiddleware),
        Middleware(GZipMiddleware, minimum_size=GZIP_FROM_BYTES, compresslevel=5),
        Middleware(
            BodyLimitMiddleware,
            max_bytes=settings.max_body_bytes,
            max_upload_bytes=settings.max_adapter_bytes + FORM_BYTES,
        ),
    ]
