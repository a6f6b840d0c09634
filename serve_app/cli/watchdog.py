"""Ends `weft serve` when it cannot serve any more, or does not stop in time; nothing stays behind."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn

from serve_app.processes import end_descendants
from serve_app.redis.embedded import EmbeddedRedis

POLL_S = 0.5
STOP_LIMIT_S = 100.0  # systemd is to wait a little longer: docs/operations.md
FAULT_LIMIT_S = 5.0  # for a stop that cannot end in order, because what it calls has gone


class ExitStatus(IntEnum):
    """How `weft serve` ends. A second signal ends it with 128 and the signal's number."""

    stopped = 0
    failed = 1  # it did not start; the reason is on stderr
    lost = 3  # a part that it cannot do without has gone for good


class Watchdog:
    """Watches in a thread of its own, from `start` until the process ends or `close`.

    store: stopped in order, after everything else.
    """

    def __init__(self, store: EmbeddedRedis | None = None, stop_limit_s: float = STOP_LIMIT_S) -> None:
        self._store = store
        self._stop_limit_s = stop_limit_s
        self._closed = threading.Event()
        self._stopping = threading.Event()
        self._ending = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, fault: Callable[[], str | None]) -> None:
        """fault: the sentence on what has gone for good, None while all is there; it must not block."""
        self._thread = threading.Thread(target=self._watch, args=(fault,), name="watchdog", daemon=True)
        self._thread.start()

    def stopping(self) -> None:
        """From now on the process is expected to end: in time, or it is ended."""
        self._stopping.set()

    def close(self) -> None:
        """Stop watching. Does not return when `end_now` has been called meanwhile."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        with self._ending:
            pass

    def end_now(self, status: int, sentence: str | None = None) -> NoReturn:
        """Kill every process that this one has started, and exit."""
        with self._ending:  # a second caller waits for the first one's end
            if sentence is not None:
                print(f"weft: {sentence}", file=sys.stderr, flush=True)
            try:
                end_descendants(keep=self._store.pids if self._store else ())
                if self._store is not None:
                    self._store.stop()
                end_descendants()
                sys.stdout.flush()
            finally:
                os._exit(status)  # an ordinary exit would call Ray, which waits for what was killed

    def _watch(self, find_fault: Callable[[], str | None]) -> None:
        stopping_s = broken_s = 0.0
        while not self._closed.wait(POLL_S):
            fault = find_fault()
            if not self._stopping.is_set():
                if fault is not None:
                    self.end_now(ExitStatus.lost, fault)
                continue
            stopping_s += POLL_S
            broken_s = broken_s + POLL_S if fault is not None else 0.0
            if stopping_s > self._stop_limit_s or broken_s > FAULT_LIMIT_S:
                self.end_now(ExitStatus.stopped)
