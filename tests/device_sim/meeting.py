"""Has the two lanes of the engine take their most memory at the same time, as they may on a GPU.

A forward of the auxiliary lane stops where an earlier one of its kind had the most memory, until the denoiser
has run beside it. Otherwise it is the threads' luck how much of the device a run takes.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

from tests.device_sim.memory import Scope
from tests.patience import patience

LANE = "auxiliary"  # name of the lane's thread
NEARLY = 0.99  # of the most


class Meeting:
    """Of forwards of the auxiliary lane, one of each module, with the denoiser."""

    def __init__(self, lock: threading.RLock) -> None:
        """lock: the device's, which its memory is changed under."""
        self.wanted = False
        self.stops: list[str] = []  # modules whose forwards stopped for the denoiser
        self.met: list[str] = []  # those beside which it ran
        self._most: dict[Hashable, int] = {}  # bytes of an earlier forward, by module and rows
        self._changed = threading.Condition(lock)
        self._local = threading.local()

    def begins(self, module: str, rows: int, memory: Scope) -> int:
        """A forward begins on this thread. Returns how many have stopped so far."""
        if self.wanted and threading.current_thread().name.startswith(LANE):
            self._local.running = module, rows, memory
        return len(self.stops)

    def ends(self, module: str, rows: int, peak: int) -> None:
        """The forward of this thread ends; peak: its bytes."""
        if getattr(self._local, "running", None) is not None:
            self._most[module, rows] = peak
            self._local.running = None

    def denoised(self, stops: int) -> None:
        """A forward of the denoiser ends. stops: what `begins` returned when it began."""
        with self._changed:
            self.met = self.stops[: max(stops, len(self.met))]
            self._changed.notify_all()

    def after_allocation(self) -> None:
        """Stop here, without the lock, if the forward of this thread has the most memory now."""
        running = getattr(self._local, "running", None)
        if running is None:
            return
        module, rows, memory = running
        most = self._most.get((module, rows))
        if most is None or module in self.stops or memory.live < NEARLY * most:
            return
        with self._changed:
            self.stops.append(module)
            self._changed.wait_for(lambda: module in self.met, timeout=patience(3.0))
