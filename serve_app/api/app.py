"""The HTTP app: middleware, every dialect's routers, and the page."""

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from serve_app.api import (
    admin,
    docs,
    events,
    exception_handlers,
    jobs,
    links,
    loras,
    models,
    native,
    openai,
    ops,
    page,
    results,
    sessions,
    tasks,
    websocket,
)
from serve_app.api.auth import get_caller
from serve_app.api.middleware.body_limit import BodyLimitMiddleware
from serve_app.api.middleware.error_boundary import ErrorBoundaryMiddleware
from serve_app.api.middleware.header_limit import HeaderLimitMiddleware
from serve_app.api.middleware.http_metrics import HttpMetricsMiddleware
from serve_app.api.middleware.local_only import LocalOnlyMiddleware
from serve_app.api.middleware.request_id import RequestIdMiddleware
from serve_app.api.middleware.security_headers import SecurityHeadersMiddleware
from serve_app.api.middleware.serve_headers import ServeHeadersMiddleware
from serve_app.api.middleware.time_limit import TimeLimitMiddleware
from serve_app.api.openapi import ERROR_RESPONSES, WeftApi
from serve_app.api.state import ApiState

GZIP_FROM_BYTES = 1024
FORM_BYTES = 2**20  # of an upload, around its file
ROUTERS: tuple[APIRouter, ...] = (
    *native.ROUTERS,
    jobs.router,
    events.router,
    links.router,
    results.router,
    loras.router,
    models.router,
    *tasks.ROUTERS,
    *openai.ROUTERS,
    ops.router,
    sessions.router,
    admin.router,
)


def create_app(state: ApiState) -> FastAPI:
    """The app over these services. It starts and closes none of them."""
    app = WeftApi(
        title="Weft",
        summary="Serves diffusion models on Ray.",
        redirect_slashes=False,  # a redirect names the Host it was called by, which a proxy may have changed
        docs_url=None,
        redoc_url=None,
        middleware=_middleware(state),
    )
    app.state.weft = state
    exception_handlers.install(app)
    app.include_router(ops.public)
    app.include_router(docs.public)
    app.include_router(sessions.public, responses=ERROR_RESPONSES)
    app.include_router(links.public, responses=ERROR_RESPONSES)
    app.include_router(websocket.router)
    for router in ROUTERS:
        # denied by default: a route of these routers needs a known caller even if it forgets to ask
        app.include_router(router, dependencies=[Depends(get_caller)], responses=ERROR_RESPONSES)
    if state.settings.ui:
        app.include_router(page.router)
        app.mount("/ui", page.PageFiles(), name="ui")
    return app


def _middleware(state: ApiState) -> list[Middleware]:
    """The outermost first."""
    settings = state.settings
    return [
        Middleware(ServeHeadersMiddleware),
        Middleware(RequestIdMiddleware),
        Middleware(HttpMetricsMiddleware, metrics=state.metrics),
        Middleware(SecurityHeadersMiddleware),
        Middleware(ErrorBoundaryMiddleware),
        Middleware(TimeLimitMiddleware, max_call_s=settings.max_call_s),
        Middleware(HeaderLimitMiddleware),
        Middleware(LocalOnlyMiddleware, settings=settings),
        Middleware(GZipMiddleware, minimum_size=GZIP_FROM_BYTES, compresslevel=5),
        Middleware(
            BodyLimitMiddleware,
            max_bytes=settings.max_body_bytes,
            max_depth=settings.max_json_depth,
            max_upload_bytes=settings.max_adapter_bytes + FORM_BYTES,
        ),
    ]
