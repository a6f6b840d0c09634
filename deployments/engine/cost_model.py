"""Seconds of a forward by batch size, learned while serving (pure: no torch, no clock)."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

KNEE_FRACTION = 0.97  # of the best rows per second: the smallest batch size with as many is the knee
MAX_KEYS = 256  # the keys used last are kept
PROBE_EVERY = 256  # forwards of one key between two trials of a larger batch size
RELEARN_AFTER = 3  # outliers in a row mean that the machine has changed


@dataclass(slots=True)
class _CostCurve:
    """What is known of the forwards of one key."""

    seconds: dict[int, float] = field(default_factory=dict)  # by batch size
    seen_once: set[int] = field(default_factory=set)  # batch sizes
    buckets: tuple[int, ...] = ()  # the only batch sizes that run, ascending; empty: all
    cap: int | None = None  # larger batch sizes ran out of memory
    outliers: int = 0  # in a row
    forwards: int = 0
    target: int = 1  # batch size that the next forward should have at most
    seconds_per_row: float | None = None  # at the best rows per second seen


class CostModel:
    """Seconds by key and batch size, and the batch size that pays."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        # not cachetools' LRUCache, whose lookups take 1 us each: there are several per step
        self._curves: OrderedDict[Hashable, _CostCurve] = OrderedDict()

    def set_buckets(self, key: Hashable, buckets: Sequence[int]) -> None:
        """Forwards of this key are padded to the next of these batch sizes."""
        curve = self._curve(key)
        curve.buckets = tuple(sorted(buckets))
        curve.target = self._target(curve)

    def cap(self, key: Hashable, batch_size: int) -> None:
        """No forward of this key should be larger."""
        curve = self._curve(key)
        curve.cap = batch_size if curve.cap is None else min(batch_size, curve.cap)
        curve.seconds = {size: seconds for size, seconds in curve.seconds.items() if size <= curve.cap}
        curve.target = self._target(curve)

    def record(self, key: Hashable, batch_size: int, seconds: float) -> None:
        """Learn one forward.

        Of the first two times of a batch size the shorter counts (the other included a warm-up), later ones
        move it by a quarter; after three in a row that differ by more than twice, the key is learned anew.
        """
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
                curve.seconds, curve.seen_once = {}, set()
        curve.seconds_per_row = min((s / n for n, s in curve.seconds.items()), default=curve.seconds_per_row)
        curve.target = self._target(curve)

    def best_batch_size(self, key: Hashable) -> int:
        """Rows that a forward of this key should have at most: the knee, or a larger batch size to try."""
        curve = self._curves.get(key)
        return 1 if curve is None else curve.target

    def seconds_per_row(self, key: Hashable) -> float | None:
        """Seconds at the best rows per second seen; None before the first forward."""
        curve = self._curves.get(key)
        return None if curve is None else curve.seconds_per_row

    def seconds(self, key: Hashable, batch_size: float) -> float | None:
        """Seconds of a forward, interpolated between the batch sizes seen; None before the first forward."""
        curve = self._curves.get(key)
        if curve is None or not curve.seconds:
            return None
        sizes = sorted(curve.seconds)
        if len(sizes) == 1:
            return curve.seconds[sizes[0]] * max(1.0, batch_size / sizes[0])
        index = min(max(bisect_left(sizes, batch_size), 1), len(sizes) - 1)
        low, high = sizes[index - 1], sizes[index]
        fast, slow = curve.seconds[low], curve.seconds[high]
        return max(fast / 2, fast + (batch_size - low) * (slow - fast) / (high - low))

    def _curve(self, key: Hashable) -> _CostCurve:
        curve = self._curves.get(key)
        if curve is None:
            curve = self._curves[key] = _CostCurve()
            if len(self._curves) > MAX_KEYS:
                self._curves.popitem(last=False)
        else:
            self._curves.move_to_end(key)
        return curve

    def _target(self, curve: _CostCurve) -> int:
        most = self._max_batch_size if curve.cap is None else min(curve.cap, self._max_batch_size)
        return max(1, min(most, self._knee_or_next(curve)))

    def _knee_or_next(self, curve: _CostCurve) -> int:
        """The knee; or a larger batch size, if the largest known is the knee, not certain or long ago."""
        if not curve.seconds:
            return self._next(curve, 0)
        best = max(size / seconds for size, seconds in curve.seconds.items())
        knee = min(size for size, seconds in curve.seconds.items() if size / seconds >= KNEE_FRACTION * best)
        largest = max(curve.seconds)
        if largest in curve.seen_once:
            return largest
        if knee == largest or curve.forwards % PROBE_EVERY < 2:
            return max(knee, self._next(curve, knee))
        return knee

    def _next(self, curve: _CostCurve, batch_size: int) -> int:
        """The batch size to try after this one: the next bucket, or twice as many rows."""
        if curve.buckets:
            return next((size for size in curve.buckets if size > batch_size), curve.buckets[-1])
        return max(1, 2 * batch_size)


def _padded(buckets: tuple[int, ...], batch_size: int) -> int:
    if not buckets:
        return batch_size
    index = bisect_left(buckets, batch_size)
    return buckets[index] if index < len(buckets) else batch_size
