"""Calls back when Serve begins to stop a replica; Serve itself does so only after the last request."""

from __future__ import annotations

import logging
from collections.abc import Callable

from serve_app.ray_serve.private_api import run_before_shutdown

logger = logging.getLogger(__name__)


def on_stop(callback: Callable[[], None]) -> bool:
    """Have `callback` called once, on the replica's event loop, when its graceful shutdown begins.

    Returns False outside of a replica and when Serve's internals have changed: then requests that are still
    running at the end of the grace period are aborted and run again on another replica.
    """
    called = False

    async def call_once() -> None:
        nonlocal called
        if called:  # a restarted controller asks again
            return
        called = True
        try:
            callback()
        except Exception:
            logger.exception("the callback before the shutdown of a replica failed")

    installed = run_before_shutdown(call_once)
    if not installed:
        logger.warning("no shutdown hook in this replica: long requests may start again elsewhere")
    return installed
