"""Fair share of the device between users (pure: no torch, no clock)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cachetools import LRUCache

from deployments.engine.policy import MAX_BOOST_S
from deployments.engine.scheduled_job import ScheduledJob, UserClock

MAX_USERS = 1024  # remembered; the least recently seen user is forgotten and starts anew


class FairShare:
    """A clock per user that advances by the device seconds that the user had, times the active users.

    With a fair share it keeps pace with time; the jobs of a user whose clock is ahead count as submitted
    later, by at most MAX_BOOST_S.
    """

    def __init__(self) -> None:
        self._clocks: LRUCache[str, UserClock] = LRUCache(MAX_USERS)
        self._active_users = 1

    def observe(self, users: Iterable[str]) -> None:
        """These users have jobs that run or wait."""
        self._active_users = max(1, len(set(users)))

    def charge(self, jobs: Sequence[ScheduledJob], seconds: float, rows: int, now: float) -> None:
        """Charge a forward of `seconds` to the users of its jobs, by their rows. rows: of all jobs."""
        row_s, latest = seconds * self._active_users / rows, now + MAX_BOOST_S
        for job in jobs:
            clock = job.user_clock or self._clock(job)
            time_s = clock.time_s if clock.time_s > job.submitted_at else job.submitted_at
            moved_s, left_s = row_s * job.batch_size, latest - time_s
            if moved_s > left_s:
                moved_s = left_s if left_s > 0.0 else 0.0
            clock.time_s = time_s + moved_s
            job.request.charged_s += moved_s

    def delay_s(self, job: ScheduledJob, ahead_s: float = 0.0) -> float:
        """By how much the job counts as submitted later: 0 to MAX_BOOST_S. Its own charges do not count.

        ahead_s: by how much its user's clock will have advanced when its turn comes.
        """
        clock = job.user_clock or self._clock(job)
        time_s = clock.time_s if clock.time_s > job.submitted_at else job.submitted_at
        delay_s = time_s + ahead_s - job.charged_s - job.submitted_at
        return 0.0 if delay_s <= 0.0 else delay_s if delay_s < MAX_BOOST_S else MAX_BOOST_S

    def advance_s(self, work_s: float) -> float:
        """By how much this many seconds of the device advance a user's clock."""
        return work_s * self._active_users

    def _clock(self, job: ScheduledJob) -> UserClock:
        clock = self._clocks.get(job.user)
        if clock is None:
            clock = self._clocks[job.user] = UserClock()
        job.user_clock = clock
        return clock
