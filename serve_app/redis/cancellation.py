"""Cancellation of tasks that call the store."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Raises CancelledError in a task that was cancelled and goes on.

    The client swallows a cancellation that comes while it connects; a loop without end would never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
