"""Whose turn it is: queue places that give every owner the same share (pure).

Start-time fair queueing. The queue of a model is a sorted set; a job's score is its turn, decided once, when
it is accepted, so that its rank is its exact place at any time. Each owner's jobs of one priority are a flow.
A flow's jobs take turns one after another, and a flow that was silent begins at the turn that runs now: who
has 200 jobs waiting is overtaken by whoever comes with one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deployments.protocol.request import Priority

COST: dict[Priority, float] = {"high": 0.25, "normal": 1.0, "low": 4.0}  # turns that one job uses up
HEAD_START: dict[Priority, float] = {
    "high": -8.0,
    "normal": 0.0,
    "low": 8.0,
}  # places in line, for the first ones
GRAIN = 0.25  # turns are multiples of it; what is below is the order of arrival
ARRIVALS = 2**20  # arrivals told apart before their numbers begin anew
# a score is exact in a double: 30 bits of turns, 2 of quarters, 20 of arrivals, 1 to spare


@dataclass(frozen=True, slots=True)
class QueueTag:
    """A place in a model's queue."""

    score: float
    finish_tag: float  # turns of its flow that are taken now


def assign_tag(now: float, finish_tag: float, arrival: int, priority: Priority) -> QueueTag:
    """The place of a job that comes now.

    now: the turn that runs.  used_up: by its flow so far.  arrival: how many jobs came before.
    """
    start = max(now, finish_tag)
    order = (arrival % ARRIVALS) / ARRIVALS * (GRAIN / 2)
    return QueueTag(start + HEAD_START[priority] + order, start + COST[priority])


def virtual_time_at(score: float, priority: Priority) -> float:
    """The turn that runs when the job with this score is claimed."""
    return math.floor((score - HEAD_START[priority]) / GRAIN) * GRAIN
