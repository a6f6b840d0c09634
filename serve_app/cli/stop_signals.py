"""Ctrl+C and SIGTERM: the first one asks for an orderly stop, a second one ends the process at once."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Sets `received` at the first signal, whatever the main thread is doing; calls `again` at a second.

    The system hands a signal's number to a thread of ours: the main thread may be in a long call of a
    library, in which Python runs no signal handler. Enter it in the main thread. After the block both signals
    are ignored.
    """

    def __init__(self, again: Callable[[int], None]) -> None:
        self.received = threading.Event()
        self._again = again
        self._reader, self._writer = socket.socketpair()
        self._thread = threading.Thread(target=self._read, name="stop-signals", daemon=True)

    def __enter__(self) -> Self:
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.install()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:  # the process is about to end, and in its own way
            signal.signal(number, signal.SIG_IGN)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def install(self) -> None:
        """Replace the handlers of both signals; again after a library has set its own."""
        for number in SIGNALS:
            signal.signal(number, _handled_by_the_thread)

    def _read(self) -> None:
        while number := self._reader.recv(1):
            if number[0] not in SIGNALS:
                continue
            if self.received.is_set():
                self._again(number[0])
            self.received.set()


def _handled_by_the_thread(_number: int, _frame: object) -> None:
    """A handler must be there, or the signal would have its ordinary effect."""
