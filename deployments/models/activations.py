"""What forwards take beyond what was there before them, as measured, by batch size (pure: no torch)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import Literal

MARGIN = 1.1  # over bytes that were not measured but reckoned from other batch sizes
MAX_ROWS = 64  # of one forward, whatever fits
MAX_KEYS = 256  # those recorded last are kept
SAMPLES = 3  # forwards of one key and batch size that are measured

Lane = Literal["steps", "auxiliary"]


@dataclass(slots=True)
class _Peaks:
    """Of the forwards of one key."""

    lane: Lane
    bytes: dict[int, int] = field(default_factory=dict)  # by batch size, of forwards that ran alone
    shared: dict[int, int] = field(default_factory=dict)  # with what the other lane took meanwhile
    samples: dict[int, int] = field(default_factory=dict)  # how many were measured alone, by batch size

    @property
    def of_one_call(self) -> int:
        """Of a call of two rows, as with classifier-free guidance, or of one."""
        if not self.bytes:
            return 0
        smallest = min(self.bytes)
        known = self.bytes[smallest]
        return known if smallest <= 2 else int(MARGIN * known * 2 / smallest)

    @property
    def most(self) -> int:
        """Of the forward that took most."""
        return max(self.bytes.values(), default=0)

    def expected(self, rows: int) -> float:
        """Of so many rows: as measured, or reckoned from the smallest and the largest batch measured."""
        measured = self.bytes or self.shared
        known = measured.get(rows)
        if known is not None:
            return known
        smallest, largest = min(measured), max(measured)
        low, high = measured[smallest], measured[largest]
        if smallest == largest:  # the part that does not grow with the rows is not known
            return MARGIN * high * max(1.0, rows / largest)
        slope = max(0.0, (high - low) / (largest - smallest))
        return MARGIN * max(low if rows > smallest else 0.0, high + slope * (rows - largest))


class Activations:
    """Bytes of forwards on two lanes, which may compute at the same time. Not locked."""

    def __init__(self) -> None:
        # not cachetools' LRUCache: an entry is refreshed by records only
        self._peaks: OrderedDict[Hashable, _Peaks] = OrderedDict()

    def wants(self, key: Hashable, rows: int) -> bool:
        """Whether a forward should be measured: the first few of each batch size."""
        peaks = self._peaks.get(key)
        return peaks is None or peaks.samples.get(rows, 0) < SAMPLES

    def record(self, lane: Lane, key: Hashable, rows: int, peak_bytes: int, *, alone: bool = True) -> None:
        """A forward took so many bytes beyond those that were allocated before it. Of several the least
        counts: the others include what uploads allocated meanwhile.

        alone: no other forward ran meanwhile. Otherwise it counts only until one was measured alone.
        """
        peaks = self._peaks.get(key)
        if peaks is None:
            peaks = self._peaks[key] = _Peaks(lane)
            if len(self._peaks) > MAX_KEYS:
                self._peaks.popitem(last=False)
        self._peaks.move_to_end(key)
        measured = peaks.bytes if alone else peaks.shared
        measured[rows] = min(peak_bytes, measured.get(rows, peak_bytes))
        peaks.samples[rows] = peaks.samples.get(rows, 0) + alone

    def forget(self, keys: Collection[Hashable]) -> None:
        """Nothing of these keys counts any more: their model is unloaded."""
        for key in keys:
            self._peaks.pop(key, None)

    def rows_that_fit(self, key: Hashable, free_bytes: int) -> int | None:
        """Rows that a forward of this key may have: at least 1, at most MAX_ROWS and twice the largest batch
        measured, beyond which nothing is reckoned. None where nothing was measured.

        free_bytes: without what the other lane may take, see `other_lane`.
        """
        peaks = self._peaks.get(key)
        if peaks is None:
            return None
        most = min(MAX_ROWS, 2 * max([*peaks.bytes, *peaks.shared]))
        return next((rows for rows in range(most, 1, -1) if peaks.expected(rows) <= free_bytes), 1)

    def other_lane(self, key: Hashable) -> int:
        """Bytes to leave for the other lane of this key: to the auxiliary lane those of one call, to the
        steps all that they have taken."""
        peaks = self._peaks.get(key)
        on_steps = peaks is None or peaks.lane == "steps"
        return self.of_one_call("auxiliary") if on_steps else self.largest("steps")

    def of_one_call(self, lane: Lane) -> int:
        """The most that one call of a key takes on this lane."""
        return max((peaks.of_one_call for peaks in self._peaks.values() if peaks.lane == lane), default=0)

    def largest(self, lane: Lane) -> int:
        """The most that any forward of this lane has taken."""
        return max((peaks.most for peaks in self._peaks.values() if peaks.lane == lane), default=0)
