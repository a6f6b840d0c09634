"""The OpenAI dialect: /v1/images, /v1/videos and /v1/models, as the openai SDK calls them."""

from serve_app.api.openai import edits, images, models, videos

ROUTERS = (images.router, edits.router, models.router, videos.router)
