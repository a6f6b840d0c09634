"""The Model Context Protocol at /mcp, for assistants: tools that generate, edit and look around."""

from serve_app.api.mcp import route

ROUTERS = (route.router,)
