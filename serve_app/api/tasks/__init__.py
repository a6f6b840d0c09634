"""The task dialect: /generate-image, /generate-video, /refine and /task/{id}."""

from serve_app.api.tasks import images, jobs, videos

ROUTERS = (images.router, videos.router, jobs.router)
