"""Start-time fair queueing: queue scores that give every owner the same share of a model (pure).

Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM 1996. An owner's jobs of one priority are a flow.
A job's start tag is the larger of the queue's virtual time and the finish tag of the job before it in its
flow; its finish tag is the start tag plus its cost. The virtual time is the start tag of the job claimed
last. So one job of an owner who has none waiting overtakes the 200 waiting jobs of another owner.
The score of a job, its start tag with a head start by priority, is decided once, when it is accepted: the
queue is a sorted set, and the rank of a job in it is its exact position at any time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deployments.protocol.request import Priority

COST: dict[Priority, float] = {"high": 0.25, "normal": 1.0, "low": 4.0}  # virtual time of one job
HEAD_START: dict[Priority, float] = {"high": -8.0, "normal": 0.0, "low": 8.0}  # added to the start tag
RESOLUTION = 0.25  # start tags are multiples of it; smaller differences of scores are the order of arrival
ARRIVALS = 2**20  # distinct arrival numbers, after which they start again at 0
# a score is exact in a double: 30 bits of virtual time, 2 of quarters, 20 of arrivals, 1 spare


@dataclass(frozen=True, slots=True)
class QueueTag:
    """The score of a new job in its model's queue, and the finish tag its flow has from then on."""

    score: float
    finish_tag: float


def flow_of(owner: str, priority: str) -> str:
    """The name of a flow: the field of a model's fair-queue hash that holds its finish tag."""
    return f"{priority}:{owner}"


def assign_tag(virtual_time: float, finish_tag: float, arrival: int, priority: Priority) -> QueueTag:
    """The tag of a job that arrives now.

    virtual_time: of its queue.  finish_tag: of its flow so far.  arrival: how many jobs came before it.
    """
    start_tag = max(virtual_time, finish_tag)
    order = (arrival % ARRIVALS) / ARRIVALS * (RESOLUTION / 2)
    return QueueTag(start_tag + HEAD_START[priority] + order, start_tag + COST[priority])


def start_tag_of(score: float, priority: Priority) -> float:
    """The start tag of the job with this score: the virtual time once it is claimed."""
    return math.floor((score - HEAD_START[priority]) / RESOLUTION) * RESOLUTION
