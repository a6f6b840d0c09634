"""The device seconds of one request: its share, by rows, of the forwards that it took part in."""

from __future__ import annotations

import threading
from collections.abc import Callable

Measure = Callable[[], float]  # waits until the device has done a forward, and returns its seconds


class DeviceTime:
    """The account of one request. Its engine writes it, and the thread that decodes its video; any reads it.

    The shares of one forward add up to its seconds: a row of padding is paid by all its requests.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known_s = 0.0
        self._queued: dict[Measure, float] = {}  # forwards queued on the device, and the share of each

    @property
    def so_far_s(self) -> float:
        """Of the forwards whose seconds are known; on a GPU those of the last one or two are not."""
        return self._known_s

    def total_s(self) -> float:
        """Of all forwards up to now. To be called when their results are there: it waits for the device."""
        with self._lock:
            known_s, queued = self._known_s, list(self._queued.items())
        return known_s + sum([measure() * share for measure, share in queued])

    def add(self, seconds: float) -> None:
        """Count seconds that are known."""
        with self._lock:
            self._known_s += seconds

    def queue(self, measure: Measure, share: float) -> None:
        """Count a share of a forward that the device has not done yet."""
        with self._lock:
            self._queued[measure] = share

    def settle(self, measure: Measure, seconds: float) -> None:
        """A queued forward took so many seconds."""
        with self._lock:
            self._known_s += seconds * self._queued.pop(measure)
