"""The native dialect: POST /api/generate/image and /api/generate/video."""

from serve_app.api.native import images, videos

ROUTERS = (images.router, videos.router)
