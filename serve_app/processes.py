"""Processes below this one: orphans adopted, all of them listed, and ended."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Collection

import psutil

SET_CHILD_SUBREAPER = 36  # of prctl(2)
ROUNDS = 5  # a process that is ended may have started another meanwhile
ROUND_S = 3.0


def adopt_orphans() -> None:
    """Have processes whose parent dies become children of this one, so that it can still end them.

    Linux only: elsewhere they become children of the first process, and this has no effect.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(keep: Collection[int] = ()) -> list[psutil.Process]:
    """The processes that this one and its children have started, but those of `keep`; zombies are none."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.pid not in keep and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_descendants(keep: Collection[int] = ()) -> None:
    """Kill (-9) every descendant but those of `keep`, and wait until they are gone."""
    for _ in range(ROUNDS):
        alive = descendants(keep)
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=ROUND_S)
