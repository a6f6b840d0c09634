"""Who may call which route: the one table of it. A route that is not in it refuses every caller."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from starlette.requests import HTTPConnection

from deployments.protocol.errors import Forbidden
from serve_app.admission.principals import Scope

logger = logging.getLogger(__name__)

WEBSOCKET = "WEBSOCKET"  # in place of a method

PUBLIC = (  # answered without a key
    "GET /health",
    "GET /ready",
    "GET /openapi.json",
    "GET /docs",
    "GET /docs/{name}",
    "POST /auth/token",  # takes the key in its body
    "POST /auth/session",
    "GET /api/shared/{task_id}/{index}/{kind}",  # its signature is the credential
    "GET /",
    "GET /ui",
)

ANY_KEY = ("GET /auth/me", "DELETE /auth/session")

_BY_SCOPE: Mapping[Scope, tuple[str, ...]] = {
    Scope.read: (
        "GET /api/generate",
        "GET /api/generate/{task_id}",
        "GET /api/generate/{task_id}/events",
        "GET /api/results/{task_id}/{index}/link",
        "GET /api/results/{task_id}/{name}",
        "GET /api/results/{task_id}/{index}/{still}",
        "GET /api/loras",
        "GET /api/loras/{id}",
        "GET /api/loras/{id}/preview",
        "GET /api/models",
        "GET /api/models/{model:path}",
        "GET /api/usage",
        "GET /task/{task_id}/status",
        "GET /task/{task_id}/result",
        "GET /v1/models",
        "GET /v1/models/{owner}/{name}/versions",
        "GET /v1/models/{owner}/{name}/versions/{version}",
        "GET /v1/predictions",
        "GET /v1/predictions/{task_id}",
        "GET /v1/models/{model:path}",
        "GET /v1/videos",
        "GET /v1/videos/{task_id}",
        "GET /v1/videos/{task_id}/content",
        "GET /v1/videos/characters/{character_id}",
        "GET /sdapi/v1/options",
        "GET /sdapi/v1/sd-models",
        "GET /sdapi/v1/samplers",
        "GET /sdapi/v1/schedulers",
        "GET /sdapi/v1/loras",
        "GET /sdapi/v1/upscalers",
        "GET /sdapi/v1/embeddings",
        "GET /sdapi/v1/prompt-styles",
        "GET /sdapi/v1/sd-vae",
        "GET /sdapi/v1/sd-modules",
        "GET /sdapi/v1/hypernetworks",
        "GET /sdapi/v1/face-restorers",
        "GET /sdapi/v1/latent-upscale-modes",
        "GET /sdapi/v1/scripts",
        "GET /sdapi/v1/script-info",
        "GET /sdapi/v1/cmd-flags",
        "GET /sdapi/v1/memory",
        "GET /sdapi/v1/progress",
        "GET /controlnet/version",
        "GET /controlnet/model_list",
        "GET /controlnet/module_list",
        "GET /controlnet/control_types",
        "POST /sdapi/v1/png-info",
        "POST /sdapi/v1/refresh-checkpoints",
        "POST /sdapi/v1/refresh-loras",
        "POST /sdapi/v1/refresh-vae",
        "POST /auth/ticket",
        "WEBSOCKET /ws/{task_id}",
    ),
    Scope.generate: (
        "POST /api/generate/image",
        "POST /api/generate/video",
        "DELETE /api/generate/{task_id}",
        "DELETE /api/cache",
        "GET /api/webhooks/secret",  # who has it can forge webhooks, so it takes more than reading
        "POST /api/loras",
        "DELETE /api/loras/{id}",
        "DELETE /api/models/{model:path}",
        "POST /generate-image",
        "POST /refine",
        "POST /generate-video",
        "POST /sdapi/v1/txt2img",
        "POST /sdapi/v1/img2img",
        "POST /sdapi/v1/options",
        "POST /sdapi/v1/interrupt",
        "POST /sdapi/v1/skip",
        "POST /sdapi/v1/extra-single-image",
        "POST /sdapi/v1/extra-batch-images",
        "POST /generate",
        "POST /mcp",
        "POST /v1/models/{owner}/{name}/predictions",
        "POST /v1/predictions",
        "POST /v1/predictions/{task_id}/cancel",
        "POST /v1/images/generations",
        "POST /v1/images/edits",
        "POST /v1/videos",
        "DELETE /v1/videos/{task_id}",
        "POST /v1/videos/{task_id}/remix",
        "POST /v1/videos/edits",
        "POST /v1/videos/extensions",
        "POST /v1/videos/characters",
    ),
    Scope.metrics: ("GET /metrics",),
    Scope.admin: (
        "GET /admin/users",
        "POST /admin/users",
        "PATCH /admin/users/{user_id}",
        "POST /admin/users/{user_id}/keys",
        "GET /admin/keys",
        "DELETE /admin/keys/{prefix}",
    ),
}
ROUTE_SCOPES: Mapping[str, Scope | None] = {  # None: any valid key will do
    **{route: scope for scope, routes in _BY_SCOPE.items() for route in routes},
    **dict.fromkeys(ANY_KEY),
}


def needed_scope(connection: HTTPConnection) -> Scope | None:
    """The scope that the called route needs; None: any valid key will do.

    Raises Forbidden for a route that the table does not have.
    """
    route = route_name(connection.scope.get("method", WEBSOCKET), connection.scope["route"].path)
    if route not in ROUTE_SCOPES:
        logger.error("a route without a declared scope was called", extra={"route": route})
        raise Forbidden("this route refuses every caller: serve_app/api/route_scopes.py does not name it")
    return ROUTE_SCOPES[route]


def route_name(method: str, path: str) -> str:
    """A route as the table names it. path: its template."""
    return f"{'GET' if method == 'HEAD' else method} {path.rstrip('/') or '/'}"
