"""Where this floor's log lines go in a replica: into Serve's log file, with Serve's context."""

from __future__ import annotations

import logging


def join_serve_log() -> None:
    """Send what `serve_app` logs to the handlers Serve gave this replica (JSON, replica, request id).

    Without it Python's root logger would drop everything below WARNING.
    """
    ours, serves = logging.getLogger("serve_app"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = serves.handlers, False
    ours.setLevel(serves.level)
