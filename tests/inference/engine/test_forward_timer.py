"""Forwards on a GPU are measured by events, and the CPU waits to be at most one forward ahead of it."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.forward_timer import ForwardTimer, TimedForward
from deployments.engine.scheduled_job import ScheduledJob

SECONDS = 0.25  # that a forward takes on the device


class Event:
    """A CUDA event on a device whose forwards end when someone waits for them."""

    made = 0
    reached = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1
        self.number = Event.made

    def record(self) -> None:
        """In the order of their making."""

    def synchronize(self) -> None:
        Event.reached = max(Event.reached, self.number)

    def elapsed_time(self, end: Event) -> float:
        assert Event.reached >= end.number, "the device has not come so far"
        return (end.number - self.number) * 1000 * SECONDS


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.made = Event.reached = 0
    return []


def timer_for(reported: list[tuple[str, int, float]]) -> ForwardTimer:
    def report(forward: TimedForward, seconds: float, _now: float) -> None:
        reported.append((forward.module, forward.batch_size, seconds))

    return ForwardTimer(report, torch.device("cuda"), lambda: 0.0)


def run_forward(timer: ForwardTimer, batch_size: int) -> None:
    timer.start()
    timer.stop(TimedForward("net", "key", batch_size, [ScheduledJob()], [1]))


def test_a_wait_leaves_one_forward_queued_and_reports_those_before_it(
    reported: list[tuple[str, int, float]],
) -> None:
    timer = timer_for(reported)
    for batch_size in (1, 2):
        run_forward(timer, batch_size)

    timer.wait()

    assert reported == [("net", 1, SECONDS)]
    assert Event.reached == 2, "the end of the first forward"


def test_after_a_wait_the_next_forward_is_queued_at_once(reported: list[tuple[str, int, float]]) -> None:
    timer = timer_for(reported)
    for batch_size in (1, 2):
        run_forward(timer, batch_size)
    timer.wait()

    run_forward(timer, 3)

    assert Event.reached == 2
    timer.wait()
    assert reported == [("net", 1, SECONDS), ("net", 2, SECONDS)]


def test_a_first_forward_is_not_waited_for(reported: list[tuple[str, int, float]]) -> None:
    timer = timer_for(reported)
    run_forward(timer, 1)

    timer.wait()

    assert reported == []
