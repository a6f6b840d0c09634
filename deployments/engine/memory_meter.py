"""What the engine needs to have the memory of its forwards measured."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, Protocol


class MemoryMeter(Protocol):
    """Measures the device's memory that forwards take. Called on the threads of the lanes."""

    def start(self, key: Hashable, rows: int) -> Any:
        """A forward begins; what is returned is passed to `stop`."""

    def stop(self, started: Any, lane: Literal["steps", "auxiliary"], key: Hashable, rows: int) -> None:
        """The forward has been computed or queued, with so many rows; 0: it failed."""
