"""Replicate's dialect: predictions, as the package `replicate` calls them."""

from serve_app.api.replicate import predictions, versions

ROUTERS = (predictions.router, versions.router)
