"""The API's description as a page: Swagger UI, served from this service alone."""

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from deployments.protocol.errors import NotFound

public = APIRouter(include_in_schema=False)

ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}  # of fastapi-offline
START = "SwaggerUIBundle({url: 'openapi.json', dom_id: '#docs', deepLinking: true, validatorUrl: null});\n"
# addresses are relative, so that any path prefix works
PAGE = """\
<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <title>Weft API</title>
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <link rel="icon" href="data:,">
    <link rel="stylesheet" href="docs/swagger-ui.css">
  </head>
  <body>
    <div id="docs"></div>
    <script src="docs/swagger-ui-bundle.js"></script>
    <script src="docs/start.js"></script>
  </body>
</html>
"""


@public.get("/docs")
async def show() -> HTMLResponse:
    """Every route with its schemas, to try out."""
    return HTMLResponse(PAGE)


@public.get("/docs/{name}")
async def asset(name: str) -> Response:
    """The page's scripts and styles."""
    if name == "start.js":
        return Response(START, media_type="text/javascript", headers={"Cache-Control": "no-cache"})
    if name not in ASSETS:
        raise NotFound("there is no such part of the page", param="name")
    data = (files("fastapi_offline") / "static" / name).read_bytes()
    return Response(data, media_type=ASSETS[name], headers={"Cache-Control": "public, max-age=86400"})
