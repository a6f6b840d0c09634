"""The dialect of AUTOMATIC1111's web UI: /sdapi/v1 and /controlnet, as Open WebUI and others call it."""

from serve_app.api.a1111 import extras, images, lists, options, progress

ROUTERS = (images.router, options.router, lists.router, progress.router, extras.router)
