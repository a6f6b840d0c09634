"""Query parameters: one that a route does not have is refused, never ignored."""

from collections.abc import Iterator

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.requests import HTTPConnection

from deployments.protocol.errors import BadRequest
from serve_app.api.errors import route_path


async def check_parameters(connection: HTTPConnection) -> None:
    """Raises BadRequest for a parameter that the called route does not have, and for one that is there twice.

    A misspelt filter would give all jobs, and a field of a body sent as a parameter another image.
    """
    route = connection.scope.get("route")
    assert isinstance(route, APIRoute | APIWebSocketRoute), "it is a dependency of routes"
    names = list(_names_in(route.dependant))
    seen: set[str] = set()
    for name, _ in connection.query_params.multi_items():
        shown = name[:100]
        if name not in names:
            call = f"{connection.scope.get('method', 'GET')} {route_path(connection.scope)[:200]}"
            known = f"it takes {', '.join(names)}" if names else "it takes none"
            raise BadRequest(f"{shown!r} is no query parameter of {call}; {known}", param=shown)
        if name in seen:
            raise BadRequest(f"{shown} is there twice; send it once", param=shown)
        seen.add(name)


def _names_in(dependant: Dependant) -> Iterator[str]:
    """Those of the route's function, then those of what it depends on."""
    yield from (field.alias for field in dependant.query_params)
    for dependency in dependant.dependencies:
        yield from _names_in(dependency)
