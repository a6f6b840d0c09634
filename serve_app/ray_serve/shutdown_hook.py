"""When Serve begins to stop this replica. Serve itself tells user code only when nothing runs any more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def on_stop(callback: Callable[[], None]) -> bool:
    """Have `callback` called once, on the replica's event loop, when its graceful shutdown begins.

    It leans on Serve's insides (2.60: the actor's `_replica_impl`). False where they look different, as
    outside of a replica: then work is cut off at the end of the grace period, and runs again elsewhere.
    """
    from ray._private.worker import global_worker

    for actor in global_worker.actors.values():
        replica = getattr(actor, "_replica_impl", None)
        stop: Any = getattr(replica, "perform_graceful_shutdown", None)
        if stop is None:
            continue
        _call_first(replica, stop, callback)
        return True
    logger.warning("Serve does not tell when this replica is stopped; long requests may start anew elsewhere")
    return False


def _call_first(replica: Any, stop: Callable[[], Any], callback: Callable[[], None]) -> None:
    called = False

    async def call_and_stop() -> None:
        nonlocal called
        if not called:  # a restarted controller asks again
            called = True
            try:
                callback()
            except Exception:
                logger.exception("a replica's own preparation for its end failed")
        await stop()

    replica.perform_graceful_shutdown = call_and_stop
