"""How long a forward of so many rows takes, learned while serving (pure: no torch, no clock)."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

KNEE_FRACTION = 0.97  # of the best rows per second: the smallest such number of rows is the knee
KEYS = 256
PROBE_EVERY = 256  # forwards of one key between two looks at a bigger number of rows
RELEARN_AFTER = 3  # surprising times in a row mean that the machine has changed


@dataclass(slots=True)
class _CostCurve:
    seconds: dict[int, float] = field(default_factory=dict)  # by rows
    seen_once: set[int] = field(default_factory=set)  # numbers of rows seen once only
    buckets: tuple[int, ...] = ()  # the only numbers of rows that run; empty: every one
    cap: int | None = None  # more rows ran out of memory
    outliers: int = 0
    forwards: int = 0
    target: int = 1  # rows that the next forward should have at most
    seconds_per_row: float | None = None  # of one row at the best rows per second seen


class CostModel:
    """Seconds by (key, rows), and the number of rows that pays; the 256 keys used last are kept."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_rows = max_batch_size
        self._curves: OrderedDict[Hashable, _CostCurve] = OrderedDict()

    def set_buckets(self, key: Hashable, buckets: Sequence[int]) -> None:
        curve = self._curve(key)
        curve.buckets = tuple(sorted(buckets))
        curve.target = self._target(curve)

    def cap(self, key: Hashable, batch_size: int) -> None:
        """No forward of this key shall have more rows."""
        curve = self._curve(key)
        curve.cap = batch_size if curve.cap is None else min(batch_size, curve.cap)
        curve.seconds = {count: seconds for count, seconds in curve.seconds.items() if count <= curve.cap}
        curve.target = self._target(curve)

    def record(self, key: Hashable, batch_size: int, seconds: float) -> None:
        """Of the first two times the shorter is believed (the other had to warm up), later ones move it
        by a quarter; three far ones in a row forget all."""
        curve = self._curve(key)
        curve.forwards += 1
        batch_size = _padded(curve.buckets, batch_size)
        known = curve.seconds.get(batch_size)
        if known is None:
            curve.seconds[batch_size] = seconds
            curve.seen_once.add(batch_size)
        elif batch_size in curve.seen_once:
            curve.seconds[batch_size] = min(known, seconds)
            curve.seen_once.remove(batch_size)
        elif known / 2 <= seconds <= known * 2:
            curve.outliers = 0
            curve.seconds[batch_size] = known + (seconds - known) / 4
        else:
            curve.outliers += 1
            if curve.outliers >= RELEARN_AFTER:
                curve.outliers = 0
                curve.seconds, curve.seen_once = {}, set()  # from one row on
        curve.seconds_per_row = min((s / n for n, s in curve.seconds.items()), default=curve.seconds_per_row)
        curve.target = self._target(curve)

    def batch_size(self, key: Hashable) -> int:
        """Rows that a forward of this key should have at most: the knee, or a bigger number to try."""
        curve = self._curves.get(key)
        return 1 if curve is None else curve.target

    def seconds_per_row(self, key: Hashable) -> float | None:
        """Seconds of one row at the best rows per second seen; None before the first forward."""
        curve = self._curves.get(key)
        return None if curve is None else curve.seconds_per_row

    def seconds(self, key: Hashable, batch_size: float) -> float | None:
        """Seconds of a forward of so many rows, on straight lines between the known ones."""
        curve = self._curves.get(key)
        if curve is None or not curve.seconds:
            return None
        known = sorted(curve.seconds)
        index = min(max(bisect_left(known, batch_size), 1), len(known) - 1)
        if len(known) == 1:
            return curve.seconds[known[0]] * max(1.0, batch_size / known[0])
        low, high = known[index - 1], known[index]
        fast, slow = curve.seconds[low], curve.seconds[high]
        return max(fast / 2, fast + (batch_size - low) * (slow - fast) / (high - low))

    def _curve(self, key: Hashable) -> _CostCurve:
        curve = self._curves.get(key)
        if curve is None:
            curve = self._curves[key] = _CostCurve()
            if len(self._curves) > KEYS:
                self._curves.popitem(last=False)
        else:
            self._curves.move_to_end(key)
        return curve

    def _target(self, curve: _CostCurve) -> int:
        most = self._max_rows if curve.cap is None else min(curve.cap, self._max_rows)
        return max(1, min(most, self._best_or_next(curve)))

    def _best_or_next(self, curve: _CostCurve) -> int:
        if not curve.seconds:
            return self._next(curve, 0)
        best = max(batch_size / seconds for batch_size, seconds in curve.seconds.items())
        knee = min(
            batch_size
            for batch_size, seconds in curve.seconds.items()
            if batch_size / seconds >= KNEE_FRACTION * best
        )
        largest = max(curve.seconds)
        if largest in curve.seen_once:
            return largest
        if knee == largest or curve.forwards % PROBE_EVERY < 2:
            return max(knee, self._next(curve, knee))
        return knee

    def _next(self, curve: _CostCurve, batch_size: int) -> int:
        """The number of rows to try after this one: the next allowed, or twice as many."""
        if curve.buckets:
            return next((count for count in curve.buckets if count > batch_size), curve.buckets[-1])
        return max(1, 2 * batch_size)


def _padded(buckets: tuple[int, ...], batch_size: int) -> int:
    if not buckets:
        return batch_size
    index = bisect_left(buckets, batch_size)
    return buckets[index] if index < len(buckets) else batch_size
