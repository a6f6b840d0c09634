"""How long a forward of so many rows takes, learned while serving (pure: no torch, no clock)."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

WITHIN = 0.97  # of the best rows per second: the smallest such number of rows is the knee
KEYS = 256
PROBE_EVERY = 256  # forwards of one key between two looks at a bigger number of rows
CHANGED_AFTER = 3  # surprising times in a row mean that the machine has changed


@dataclass(slots=True)
class _Curve:
    seconds: dict[int, float] = field(default_factory=dict)  # by rows
    once: set[int] = field(default_factory=set)  # numbers of rows seen once only
    counts: tuple[int, ...] = ()  # the only numbers of rows that run; empty: every one
    cap: int | None = None  # more rows ran out of memory
    surprises: int = 0
    forwards: int = 0
    target: int = 1  # rows that the next forward should have at most
    row_seconds: float | None = None  # of one row at the best rows per second seen


class ForwardTimes:
    """Seconds by (key, rows), and the number of rows that pays; the 256 keys used last are kept."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._curves: OrderedDict[Hashable, _Curve] = OrderedDict()

    def allow(self, key: Hashable, row_counts: Sequence[int]) -> None:
        curve = self._curve(key)
        curve.counts = tuple(sorted(row_counts))
        curve.target = self._target(curve)

    def cap(self, key: Hashable, rows: int) -> None:
        """No forward of this key shall have more rows."""
        curve = self._curve(key)
        curve.cap = rows if curve.cap is None else min(rows, curve.cap)
        curve.seconds = {count: seconds for count, seconds in curve.seconds.items() if count <= curve.cap}
        curve.target = self._target(curve)

    def learn(self, key: Hashable, rows: int, seconds: float) -> None:
        """Of the first two times the shorter is believed (the other had to warm up), later ones move it
        by a quarter; three far ones in a row forget all."""
        curve = self._curve(key)
        curve.forwards += 1
        rows = _padded(curve.counts, rows)
        known = curve.seconds.get(rows)
        if known is None:
            curve.seconds[rows] = seconds
            curve.once.add(rows)
        elif rows in curve.once:
            curve.seconds[rows] = min(known, seconds)
            curve.once.remove(rows)
        elif known / 2 <= seconds <= known * 2:
            curve.surprises = 0
            curve.seconds[rows] = known + (seconds - known) / 4
        else:
            curve.surprises += 1
            if curve.surprises >= CHANGED_AFTER:
                curve.surprises = 0
                curve.seconds, curve.once = {}, set()  # from one row on
        curve.row_seconds = min((s / n for n, s in curve.seconds.items()), default=curve.row_seconds)
        curve.target = self._target(curve)

    def rows(self, key: Hashable) -> int:
        """Rows that a forward of this key should have at most: the knee, or a bigger number to try."""
        curve = self._curves.get(key)
        return 1 if curve is None else curve.target

    def row_seconds(self, key: Hashable) -> float | None:
        """Seconds of one row at the best rows per second seen; None before the first forward."""
        curve = self._curves.get(key)
        return None if curve is None else curve.row_seconds

    def seconds(self, key: Hashable, rows: float) -> float | None:
        """Seconds of a forward of so many rows, on straight lines between the known ones."""
        curve = self._curves.get(key)
        if curve is None or not curve.seconds:
            return None
        known = sorted(curve.seconds)
        place = min(max(bisect_left(known, rows), 1), len(known) - 1)
        if len(known) == 1:
            return curve.seconds[known[0]] * max(1.0, rows / known[0])
        low, high = known[place - 1], known[place]
        fast, slow = curve.seconds[low], curve.seconds[high]
        return max(fast / 2, fast + (rows - low) * (slow - fast) / (high - low))

    def _curve(self, key: Hashable) -> _Curve:
        curve = self._curves.get(key)
        if curve is None:
            curve = self._curves[key] = _Curve()
            if len(self._curves) > KEYS:
                self._curves.popitem(last=False)
        else:
            self._curves.move_to_end(key)
        return curve

    def _target(self, curve: _Curve) -> int:
        most = self._max_rows if curve.cap is None else min(curve.cap, self._max_rows)
        return max(1, min(most, self._wanted(curve)))

    def _wanted(self, curve: _Curve) -> int:
        if not curve.seconds:
            return self._next(curve, 0)
        best = max(rows / seconds for rows, seconds in curve.seconds.items())
        knee = min(rows for rows, seconds in curve.seconds.items() if rows / seconds >= WITHIN * best)
        largest = max(curve.seconds)
        if largest in curve.once:
            return largest
        if knee == largest or curve.forwards % PROBE_EVERY < 2:
            return max(knee, self._next(curve, knee))
        return knee

    def _next(self, curve: _Curve, rows: int) -> int:
        """The number of rows to try after this one: the next allowed, or twice as many."""
        if curve.counts:
            return next((count for count in curve.counts if count > rows), curve.counts[-1])
        return max(1, 2 * rows)


def _padded(counts: tuple[int, ...], rows: int) -> int:
    if not counts:
        return rows
    place = bisect_left(counts, rows)
    return counts[place] if place < len(counts) else rows
