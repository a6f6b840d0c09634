"""Seconds of a forward by batch size, learned while serving (pure: no torch, no clock)."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

KNEE_FRACTION = 0.97  # of the best rows per second: the smallest batch size with as many is the knee
MAX_KEYS = 256  # the keys used last are kept
PROBE_EVERY = 256  # forwards of one key between two trials of a larger batch size
RELEARN_AFTER = 3  # outliers in a row mean that the machine has changed
CAP_FORWARDS = 256  # of a key, until its cap after running out of memory ends; doubles with every repetition
MAX_CAP_FORWARDS = 2**16

RowLimit = Callable[[Hashable], int | None]


@dataclass(slots=True)
class _CostCurve:
    """What is known of the forwards of one key."""

    seconds: dict[int, float] = field(default_factory=dict)  # by batch size
    seen_once: set[int] = field(default_factory=set)  # batch sizes
    cap: int | None = None  # larger batch sizes ran out of memory
    cap_ends: int = 0  # at this number of forwards
    cap_forwards: int = CAP_FORWARDS  # for which the next cap holds
    outliers: int = 0  # in a row
    forwards: int = 0
    target: int = 0  # batch size that the next forward should have; 0: nothing is known
    explores: bool = False  # the next forward should be larger than `target`
    seconds_per_row: float | None = None  # at the best rows per second seen


class CostModel:
    """Seconds by key and batch size, and the batch size that pays."""

    def __init__(self, max_batch_size: int, row_limit: RowLimit = lambda _key: None) -> None:
        """row_limit: rows of a key that fit the device's memory; None where that is not known."""
        self._max_batch_size = max_batch_size
        self._row_limit = row_limit
        # not cachetools' LRUCache, whose lookups take 1 us each: there are several per step
        self._curves: OrderedDict[Hashable, _CostCurve] = OrderedDict()

    def cap(self, key: Hashable, batch_size: int) -> None:
        """No forward of this key should be larger for the next CAP_FORWARDS forwards, and for twice as many
        each time that this happens again: what else took the memory may be gone by then."""
        curve = self._curve(key)
        curve.cap = batch_size if curve.cap is None else min(batch_size, curve.cap)
        curve.cap_ends = curve.forwards + curve.cap_forwards
        curve.cap_forwards = min(2 * curve.cap_forwards, MAX_CAP_FORWARDS)
        curve.seconds = {size: seconds for size, seconds in curve.seconds.items() if size <= curve.cap}
        _set_target(curve)

    def record(self, key: Hashable, batch_size: int, seconds: float) -> None:
        """Learn one forward.

        Of the first two times of a batch size the shorter counts (the other included a warm-up), later ones
        move it by a quarter; after three in a row that differ by more than twice, the key is learned anew.
        """
        curve = self._curve(key)
        curve.forwards += 1
        if curve.cap is not None and curve.forwards >= curve.cap_ends:
            curve.cap = None
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
        _set_target(curve)

    def seed(self, key: Hashable, seconds: Mapping[int, float]) -> bool:
        """Know what forwards of this key take by batch size, as measured before; what was learned stays, but
        for sizes seen once, which include a warm-up.

        False, and nothing is known more, where nothing was learned yet, or where what was differs by more
        than twice: then it was measured on another machine.
        """
        curve = self._curves.get(key)
        both = [] if curve is None else sorted(curve.seconds.keys() & seconds.keys())
        if curve is None or not both:
            return False
        learned = {n: s for n, s in curve.seconds.items() if n not in curve.seen_once}
        ratio = curve.seconds[both[0]] / seconds[both[0]]
        if both[0] not in learned:
            ratio = min(ratio, 1.0)
        if not 1 / 2 <= ratio <= 2:
            return False
        most = self._most(key, curve)
        curve.seconds = {n: s * ratio for n, s in seconds.items() if n <= most} | learned
        curve.seen_once.clear()
        curve.seconds_per_row = min(s / n for n, s in curve.seconds.items())
        _set_target(curve)
        return True

    def best_batch_size(self, key: Hashable) -> int:
        """Rows that a forward of this key should have: the knee of its curve; 1 before the first forward."""
        curve = self._curves.get(key)
        return 1 if curve is None else max(1, min(curve.target, self._most(key, curve)))

    def largest_trial(self, key: Hashable) -> int:
        """Rows that a forward may have to try a larger batch size than the best one known; 0: none is to be
        tried, because the best one is smaller than the largest known, or that has been seen only once."""
        curve = self._curves.get(key)
        return self._most(key, curve) if curve is not None and curve.explores else 0

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

    def _most(self, key: Hashable, curve: _CostCurve) -> int:
        """Rows that a forward of this key may have."""
        most = self._max_batch_size if curve.cap is None else min(curve.cap, self._max_batch_size)
        limit = self._row_limit(key)
        return most if limit is None else max(1, min(most, limit))


def _set_target(curve: _CostCurve) -> None:
    """The knee; larger sizes are tried if the largest known is the knee, and otherwise once in a while."""
    if not curve.seconds:
        curve.target, curve.explores = 0, False
        return
    largest = max(curve.seconds)
    if largest in curve.seen_once:  # not certain yet
        curve.target, curve.explores = largest, False
        return
    best = max([size / seconds for size, seconds in curve.seconds.items()])
    curve.target = min([s for s, seconds in curve.seconds.items() if s / seconds >= KNEE_FRACTION * best])
    curve.explores = curve.target == largest or curve.forwards % PROBE_EVERY < 2
