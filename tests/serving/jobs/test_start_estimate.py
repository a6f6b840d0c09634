"""Estimates of when a waiting job starts (no server)."""

from __future__ import annotations

from typing import Any, cast

import pytest

from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.start_estimate import (
    CAPACITY_TTL_S,
    NO_CAPACITY,
    Capacity,
    Demand,
    Throughput,
    encode_report,
    total_capacity,
)
from serve_app.jobs.store.throughput import DURATIONS_KEPT, DURATIONS_TTL_S, ThroughputStats
from tests.serving.jobs.memory_pipe import MemoryPipe

NOW_S = 1_700_000_000


@pytest.mark.parametrize(
    ("position", "capacity", "recent_s", "expected"),
    [
        (1, Capacity(2, 1), (), 0.0),  # there is a free slot
        (2, Capacity(4, 2), (4.0,), 0.0),  # two free slots, second in the queue
        (1, Capacity(2, 0), (), None),  # no job of this model has ended yet
        (3, NO_CAPACITY, (4.0,), None),  # no dispatcher has reported capacity
        (1, Capacity(1, 0), (5.0,), 5.0),
        (3, Capacity(2, 0), (4.0, 8.0), 9.0),
        (3, Capacity(2, 1), (4.0, 8.0), 6.0),
    ],
)
def test_an_estimate_follows_recent_durations_and_capacity(
    position: int, capacity: Capacity, recent_s: tuple[float, ...], expected: float | None
) -> None:
    assert Throughput(capacity, recent_s).starts_in_s(position) == expected


def test_capacities_and_demands_add_up() -> None:
    assert Capacity(8, 3) + Capacity(4, 4) == Capacity(12, 7)
    assert Capacity(8, 3).running == 5
    assert Demand(2, 3) + Demand(5, 7) == Demand(7, 10)
    assert Demand() == Demand(0, 0)


def test_the_total_is_the_sum_of_recent_reports() -> None:
    reports = [
        encode_report(Capacity(8, 3), NOW_S),
        encode_report(Capacity(4, 1), NOW_S - CAPACITY_TTL_S),
        encode_report(Capacity(100, 100), NOW_S - CAPACITY_TTL_S - 1),  # of a dispatcher that is gone
    ]

    assert total_capacity(reports, NOW_S) == Capacity(12, 4)
    assert total_capacity([], NOW_S) == NO_CAPACITY == Capacity(0, 0)


def test_the_latest_durations_are_kept() -> None:
    pipe, keys = MemoryPipe(), Keys("t:")
    stats = ThroughputStats(cast(Any, None), keys)

    for number in range(DURATIONS_KEPT + 3):
        stats.record_duration(cast(Any, pipe), "m", number + 0.12345)

    kept = [entry["value"] for entry in pipe.streams[keys.durations("m")]]
    assert len(kept) == DURATIONS_KEPT
    assert kept[0] == f"{DURATIONS_KEPT + 2}.123"
    assert pipe.ttl_s[keys.durations("m")] == DURATIONS_TTL_S
