"""Threads stay under the scheduling policy that they had, whatever a codec does as it is opened.

SVT-AV1, where it may, gives the thread that opens it and all of its own the real-time policy SCHED_FIFO at
priority 99. They would run before every other thread of the machine, such as those that feed its GPUs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TASKS = Path("/proc/self/task")  # a folder for each thread of this process, on Linux
_lock = threading.Lock()  # what one codec changes must not look to another one as if it had been so before

Policy = tuple[int, int]  # of a thread, and its priority


@contextmanager
def kept_scheduling() -> Iterator[None]:
    """In the block a codec is opened: after it, every thread of this process has the policy that it had
    before, and those that were started in it have the policy of this one.

    No effect where the platform has no policies of threads, or no folder that lists the threads.
    """
    if not hasattr(os, "sched_setscheduler") or not _TASKS.is_dir():
        yield
        return
    with _lock:
        before = _policies()
        own = before.get(threading.get_native_id())
        try:
            yield
        finally:
            for thread, policy in _policies().items():
                wanted = before.get(thread, own)
                if wanted is not None and policy != wanted:
                    _set_policy(thread, wanted)


def _policies() -> dict[int, Policy]:
    """Of all threads of this process, by their native ids."""
    found: dict[int, Policy] = {}
    for task in _TASKS.iterdir():
        thread = int(task.name)
        with suppress(OSError):  # it has ended
            found[thread] = os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority
    return found


def _set_policy(thread: int, policy: Policy) -> None:
    with suppress(OSError):  # it has ended
        os.sched_setscheduler(thread, policy[0], os.sched_param(policy[1]))
