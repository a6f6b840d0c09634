"""What the step scheduler knows of requests and of their parked calls."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from deployments.engine.device_time import DeviceTime

NO_CALL = (0.0, None, 1.0)


@dataclass(slots=True)
class UserClock:
    """The fair-share clock of one user; see fair_share.py, which changes it."""

    time_s: float = -math.inf


@dataclass(slots=True, eq=False)
class ScheduledJob:
    """One request as the scheduler sees it. The engine's thread updates `steps` and `steps_done`."""

    user: str = ""
    priority: int = 0  # 1 high, 0 normal, -1 low
    deadline: float | None = None  # on the clock of `now`
    submitted_at: float = 0.0  # on the clock of `now`
    steps: int = 1  # denoising steps planned
    steps_done: int = 0
    batch_size: int = 1  # images or videos
    shape: Hashable = None  # the calls of jobs of equal shape probably share forwards
    labels: tuple[str, str] = ("", "")  # model and size class, for the metrics of its forwards
    whole: ScheduledJob | None = None  # the request that this is a branch of, which is scored as a whole
    device_time: DeviceTime = field(default_factory=DeviceTime, repr=False)  # of `request`

    # written by FairShare
    user_clock: UserClock | None = field(default=None, init=False, repr=False)
    charged_s: float = field(default=0.0, init=False, repr=False)  # by how much it advanced its user's clock
    # written by StepCosts
    step_work_s: float = field(default=0.0, init=False, repr=False)  # device seconds of the current step
    # of the costliest call of the current step: seconds per image, key, rows per image
    costliest: tuple[float, Hashable, float] = field(default=NO_CALL, init=False, repr=False)
    steps_learned: int = field(default=0, init=False, repr=False)
    # written by StepScheduler
    scored_at: tuple[int, int] = field(default=(-1, -1), init=False, repr=False)  # steps left, observations
    base_score: float = field(default=0.0, init=False, repr=False)  # valid for `scored_at`

    @property
    def request(self) -> ScheduledJob:
        """The request that this is or belongs to."""
        return self.whole or self


@dataclass(slots=True)
class ParkedCall:
    """One parked call as the scheduler sees it."""

    key: Hashable | None  # calls with equal keys may share a forward; None: with no other call
    batch_size: int
    order: int  # smaller parked earlier
    job: ScheduledJob | None = None
    # batch sizes that it may share, ascending; None: any; empty: it runs alone. Equal ones are one object
    sizes: tuple[int, ...] | None = None
