"""When a waiting job will probably start: from durations of recent jobs and reported capacity (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CAPACITY_TTL_S = 15  # a dispatcher that has not reported for this long has no capacity


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many jobs of one model may run at once, and how many more may start now."""

    slots: int
    free: int

    def __add__(self, other: Capacity) -> Capacity:
        return Capacity(self.slots + other.slots, self.free + other.free)

    @property
    def running(self) -> int:
        return self.slots - self.free


NO_CAPACITY = Capacity(0, 0)


@dataclass(frozen=True, slots=True)
class Demand:
    """Jobs of one model, or of several that share their replicas."""

    waiting: int = 0
    running: int = 0  # claimed by dispatchers and sent to the model

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.waiting + other.waiting, self.running + other.running)


@dataclass(frozen=True, slots=True)
class Throughput:
    """How fast one model's queue moves."""

    capacity: Capacity  # of all dispatchers together
    recent_s: tuple[float, ...]  # what the latest jobs took, each in its slot

    def starts_in_s(self, position: int) -> float | None:
        """Seconds until the job at this queue position (1: next) starts; None when it cannot be estimated."""
        if position <= self.capacity.free:
            return 0.0
        if self.capacity.slots < 1 or not self.recent_s:
            return None
        mean_s = sum(self.recent_s) / len(self.recent_s)
        return (position - self.capacity.free) * mean_s / self.capacity.slots


def dispatcher_name(cluster: str, own: str) -> str:
    """The name under which a dispatcher reports. cluster: empty where none is known."""
    return f"{cluster}:{own}" if cluster else own


def cluster_of(dispatcher: str) -> str:
    """The cluster of a dispatcher of this name; empty where none is known."""
    return dispatcher.rpartition(":")[0]


def encode_report(capacity: Capacity, now_s: int) -> str:
    """One dispatcher's report as it is stored. now_s: seconds of the server's clock."""
    return f"{capacity.slots} {capacity.free} {now_s}"


def total_capacity(reports: Iterable[str], now_s: int) -> Capacity:
    """The sum of the stored reports that are at most CAPACITY_TTL_S old."""
    total = NO_CAPACITY
    for report in reports:
        capacity, reported_at_s = _decode(report)
        if now_s - reported_at_s <= CAPACITY_TTL_S:
            total += capacity
    return total


def reporting_clusters(reports: Mapping[str, str], now_s: int) -> set[str]:
    """The clusters with a stored report that is at most CAPACITY_TTL_S old. reports: by dispatcher."""
    fresh = {name for name, report in reports.items() if now_s - _decode(report)[1] <= CAPACITY_TTL_S}
    return {cluster_of(name) for name in fresh} - {""}


def _decode(report: str) -> tuple[Capacity, int]:
    slots, free, reported_at_s = (int(word) for word in report.split())
    return Capacity(slots, free), reported_at_s
