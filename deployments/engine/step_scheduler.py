"""Whose step runs next, and with whom (pure: no torch, no clock). Promises: docs/scheduling.md."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from deployments.engine.forecast import Task, foresee
from deployments.engine.forward_times import ForwardTimes

LEAD_S = 300.0  # what a class counts as submitted earlier, and the most that any other reason may
UNLEARNED_STEP_S = 0.1  # a picture's step before any was seen
LOOK_EVERY = 16  # picks between two looks at the backlog
NO_CALL = (0.0, None, 1.0)  # seconds, key and rows per picture of a step's dearest call
USERS = 1024
SHAPES = 256


@dataclass(slots=True)
class _User:
    """Advances by the device time that the user had, times the users at work then: with a fair share it
    keeps pace with the time; ahead of it, its jobs count as submitted later."""

    clock: float = -math.inf


@dataclass(slots=True, eq=False)
class Job:
    """One request as the scheduler sees it; the engine's thread updates steps_done."""

    user: str = ""
    priority: int = 0  # 1 high, 0 normal, -1 low
    deadline: float | None = None  # a time of the same clock as `now`
    submitted_at: float = 0.0
    steps: int = 1  # denoising steps planned
    steps_done: int = 0
    rows: int = 1  # pictures
    shape: Hashable = None  # jobs of equal shape probably share forwards
    labels: tuple[str, str] = ("", "")  # model and size that its forwards are counted under

    # the scheduler's own notes
    account: _User | None = field(default=None, init=False, repr=False)
    charged_s: float = field(default=0.0, init=False, repr=False)  # how far it moved the account's clock
    step_work_s: float = field(default=0.0, init=False, repr=False)  # of the step at hand
    dearest: tuple[float, Hashable, float] = field(default=NO_CALL, init=False, repr=False)
    steps_learned: int = field(default=0, init=False, repr=False)
    scored: tuple[int, int] = field(default=(-1, -1), init=False, repr=False)  # steps left, look
    standing: float = field(default=0.0, init=False, repr=False)  # submission less all leads


@dataclass(slots=True)
class Waiting:
    """One parked call as the scheduler sees it."""

    key: Hashable | None  # None shares a forward with nobody
    rows: int
    order: int  # smaller is earlier
    job: Job | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a queued job may expect; times are None while nothing has been learned."""

    ahead: int  # queued jobs that start before it
    starts_in_s: float | None
    finishes_in_s: float | None


@dataclass(slots=True)
class _Shape:
    """What one step of one picture costs."""

    work_s: float  # of the device, in forwards of the rows that pay
    key: Hashable  # of the calls that cost most
    rows: float  # of one such call, per picture
    alone_s: float  # for one picture alone
    provisional: bool  # learned from a first step, which has the text encoders in it


class StepScheduler:
    """The oldest first, where a short job counts as older; a forward has the number of rows that pays.

    `max_rows` caps a forward; a key that ran out of memory has its own, smaller cap from then on.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError("max_rows must be at least 1")
        self.max_rows = max_rows
        self.work_done_s = 0.0  # of all forwards so far, as `work_left_s` counts
        self._times = ForwardTimes(max_rows)
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._unlearned_step_s = UNLEARNED_STEP_S
        self._users: OrderedDict[str, _User] = OrderedDict()
        self._queued_s = 0.0  # work that waited for slots when last looked at, and whose
        self._queued_users: frozenset[str] = frozenset()
        self._scale_s = 0.0  # on which a job counts as short: the backlog, up to a minute
        self._users_active = 1
        self._picks = 0
        self._looks = 0

    def pick(self, waiting: Sequence[Waiting], now: float = 0.0, *, look: bool = True) -> list[int]:
        """Indices of the calls for the next forward, empty only if nothing waits.

        The leader is first; but if all fit into one forward, they stay in the order given.
        look: these are all calls that wait, so the backlog may be learned from them.
        """
        if not waiting:
            return []
        if look:
            if self._picks % LOOK_EVERY == 0:
                self._look([call.job for call in waiting if call.job is not None])
            self._picks += 1
        if self._fit(waiting):
            return list(range(len(waiting)))
        scores = self._scores(waiting, now)
        lead = scores.index(min(scores))
        key = waiting[lead].key
        picked = [lead]
        room = 0 if key is None else self._times.rows(key) - waiting[lead].rows
        if room > 0:
            others = [i for i, call in enumerate(waiting) if call.key is key or call.key == key]
            others.remove(lead)
            if sum([waiting[i].rows for i in others]) > room:
                others.sort(key=scores.__getitem__)
            for i in others:
                if waiting[i].rows <= room:
                    picked.append(i)
                    room -= waiting[i].rows
        return picked

    def ran(
        self, key: Hashable | None, rows: int, seconds: float, jobs: Sequence[Job] = (), now: float = 0.0
    ) -> None:
        """One forward of `rows` rows for `jobs` took so long: learn it, and charge each its share.

        On a device that works ahead this may be told a forward later.
        """
        work_s = seconds
        if key is not None and seconds > 0:
            self._times.learn(key, rows, seconds)
            work_s = rows * (self._times.row_seconds(key) or seconds / rows)
        self.work_done_s += work_s
        if not jobs:
            return
        pictures = sum([job.rows for job in jobs])
        charge_s, latest = seconds * self._users_active / pictures, now + LEAD_S
        work_s /= pictures
        for job in jobs:
            user = job.account or self._account(job)
            clock = user.clock if user.clock > job.submitted_at else job.submitted_at
            moved = min(charge_s * job.rows, max(0.0, latest - clock))
            user.clock = clock + moved
            job.charged_s += moved
            if job.steps_done > job.steps_learned:
                self._learn_step(job)
            job.step_work_s += work_s * job.rows
            if work_s > job.dearest[0]:
                job.dearest = (work_s, key, rows / pictures)

    def ran_out_of_memory(self, key: Hashable | None, rows: int) -> None:
        """Remember that `rows` rows of `key` do not fit the device."""
        if key is not None:
            self._times.cap(key, max(1, rows // 2))

    def allow(self, key: Hashable | None, row_counts: Sequence[int]) -> None:
        """Forwards of this key are padded to the next of these counts."""
        if key is not None:
            self._times.allow(key, row_counts)

    def remaining_s(self, job: Job) -> float | None:
        """Seconds of the device that the job's steps still need; None while its shape is unlearned."""
        return self._work_s(job) if job.shape in self._shapes else None

    def work_left_s(self, jobs: Sequence[Job]) -> float:
        """Seconds of a device whose forwards are full; an unlearned shape counts as what was learned last."""
        return sum([self._work_s(job) for job in jobs])

    def next_job(self, queued: Sequence[Job], active: Sequence[Job], now: float) -> int:
        """Index of the queued job that gets a free slot; what runs counts as had by its user."""
        self._look_at_queue(queued, active)
        ahead = self._work_by_user(active)
        scores = [self._score(job, now, ahead.get(job.user, 0.0)) for job in queued]
        return scores.index(min(scores))

    def forecast(
        self, queued: Sequence[Job], active: Sequence[Job], now: float, *, slots: int | None = None
    ) -> list[Forecast]:
        """For each queued job, if nobody else comes. slots: None for as many as are active."""
        self._look_at_queue(queued, active)
        order = self._order(queued, active, now)
        if not self._shapes:
            places = {i: ahead for ahead, (i, _) in enumerate(order)}
            return [Forecast(places[i], None, None) for i in range(len(queued))]
        tasks = [self._task(queued[i], score) for i, score in order]
        running = [self._task(job, self._score(job, now)) for job in active]
        foresee(running, tasks, slots or max(1, len(active)), self._step_s)
        forecasts = {
            i: Forecast(ahead, task.starts_s, task.ends_s)
            for ahead, ((i, _), task) in enumerate(zip(order, tasks, strict=True))
        }
        return [forecasts[i] for i in range(len(queued))]

    def _fit(self, waiting: Sequence[Waiting]) -> bool:
        """Whether one forward takes all that waits."""
        key = waiting[0].key
        if key is None:
            return len(waiting) == 1
        room = self._times.rows(key)
        if len(waiting) > room:
            return False
        for call in waiting:
            room -= call.rows
            if room < 0 or not (call.key is key or call.key == key):
                return False
        return True

    def _scores(self, waiting: Sequence[Waiting], now: float) -> list[float]:
        """One number per call: smaller runs earlier, as seconds of submission."""
        scores = []
        looks = self._looks
        for call in waiting:
            job = call.job
            if job is None:
                scores.append(0.0)
            elif job.deadline is None and job.scored == (job.steps - job.steps_done, looks):
                late = job.account.clock - job.charged_s - job.submitted_at  # type: ignore[union-attr]
                scores.append(job.standing + (0.0 if late <= 0.0 else late if late < LEAD_S else LEAD_S))
            else:
                scores.append(self._score(job, now))
        return scores

    def _score(self, job: Job, now: float, ahead_s: float = 0.0) -> float:
        """ahead_s: so much further the user's clock will be when this job has its turn."""
        work_s = self._work_s(job)
        lead = LEAD_S * job.priority + self._brevity(work_s)
        if job.deadline is not None and self._presses(job, job.deadline - now, work_s):
            lead += LEAD_S
        job.standing = job.submitted_at - lead
        job.scored = (job.steps - job.steps_done, self._looks)
        account = job.account or self._account(job)
        late = max(account.clock, job.submitted_at) + ahead_s - job.charged_s - job.submitted_at
        return job.standing + min(max(late, 0.0), LEAD_S)

    def _brevity(self, work_s: float) -> float:
        """Seconds that a job counts as submitted earlier: none for a long one.

        This form keeps the 95th percentile near that of first come, first served while it lowers the
        mean. Source: Yu and Scully, Strongly Tail-Optimal Scheduling in the Light-Tailed M/G/1 (2024).
        """
        if work_s <= 0.0:
            return LEAD_S
        if self._scale_s <= 0.0:
            return 0.0
        length = -math.expm1(-work_s / self._scale_s)  # 0 to 1
        return min(LEAD_S, -self._scale_s * math.log(length)) if length > 0.0 else LEAD_S

    def _presses(self, job: Job, left_s: float, work_s: float) -> bool:
        """Whether a deadline in `left_s` seconds is near, and can be kept."""
        known = self._shapes.get(job.shape)
        if known is None:
            return work_s <= left_s <= 2 * work_s + 1.0
        alone_s = max(work_s, known.alone_s * max(0, job.steps - job.steps_done))
        crowded_s = work_s * max(1.0, self._times.rows(known.key) / (known.rows * job.rows))
        return 0.9 * alone_s <= left_s <= 2 * max(alone_s, crowded_s) + 1.0

    def _look(self, active: Sequence[Job]) -> None:
        """How much work waits, and how many users are at work."""
        self._looks += 1
        backlog_s = self._queued_s + sum([self._work_s(job) for job in active])
        self._scale_s = min(LEAD_S / 5, backlog_s)
        self._users_active = max(1, len(self._queued_users.union([job.user for job in active])))

    def _look_at_queue(self, queued: Sequence[Job], active: Sequence[Job]) -> None:
        self._queued_s = sum([self._work_s(job) for job in queued])
        self._queued_users = frozenset([job.user for job in queued])
        self._look(active)

    def _work_s(self, job: Job) -> float:
        known = self._shapes.get(job.shape)
        step_s = self._unlearned_step_s if known is None else known.work_s
        return max(0, job.steps - job.steps_done) * job.rows * step_s

    def _work_by_user(self, jobs: Sequence[Job]) -> dict[str, float]:
        """How far the clocks of their users will move until these jobs have ended."""
        work: dict[str, float] = {}
        for job in jobs:
            work[job.user] = work.get(job.user, 0.0) + self._work_s(job) * self._users_active
        return work

    def _order(self, queued: Sequence[Job], active: Sequence[Job], now: float) -> list[tuple[int, float]]:
        """Indices in the order in which they will start, with their scores by then."""
        ahead = self._work_by_user(active)
        heap = [(self._score(job, now, ahead.get(job.user, 0.0)), i) for i, job in enumerate(queued)]
        heapq.heapify(heap)
        order = []
        while heap:
            _, i = heap[0]
            job = queued[i]
            score = self._score(job, now, ahead.get(job.user, 0.0))
            if len(heap) > 1 and (score, i) > min(heap[1:3]):
                heapq.heapreplace(heap, (score, i))  # its user had more meanwhile
                continue
            heapq.heappop(heap)
            order.append((i, score))
            ahead[job.user] = ahead.get(job.user, 0.0) + self._work_s(job) * self._users_active
        return order

    def _task(self, job: Job, score: float) -> Task:
        known = self._shapes.get(job.shape)
        rows = job.rows if known is None else max(1, round(known.rows * job.rows))
        most_rows = rows if known is None else self._times.rows(known.key)
        return Task(score, max(0, job.steps - job.steps_done), rows, most_rows, self._work_s(job), job.shape)

    def _step_s(self, shape: Hashable, rows: int) -> float:
        """Seconds of one step of so many rows of the calls that cost most."""
        known = self._shapes.get(shape)
        if known is None:
            return self._unlearned_step_s * rows
        seconds, row_seconds = self._times.seconds(known.key, rows), self._times.row_seconds(known.key)
        if seconds is None or row_seconds is None:
            return known.work_s * rows / known.rows
        return seconds * known.work_s / (row_seconds * known.rows)

    def _account(self, job: Job) -> _User:
        user = self._users.get(job.user)
        if user is None:
            user = self._users[job.user] = _User()
            if len(self._users) > USERS:
                self._users.popitem(last=False)
        else:
            self._users.move_to_end(job.user)
        job.account = user
        return user

    def _learn_step(self, job: Job) -> None:
        """A step is over: what its calls cost."""
        steps = job.steps_done - job.steps_learned
        first, job.steps_learned = job.steps_learned == 0, job.steps_done
        if job.step_work_s == 0.0:  # it was resumed in the middle
            return
        cost_s = job.step_work_s / (steps * job.rows)
        _, key, rows = job.dearest
        job.step_work_s, job.dearest = 0.0, NO_CALL
        known = self._shapes.get(job.shape)
        if known is None:
            known = self._shapes[job.shape] = _Shape(cost_s, key, rows, cost_s, provisional=first)
            if len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
        elif first:  # with the text encoders
            return
        else:
            known.work_s = cost_s if known.provisional else known.work_s + (cost_s - known.work_s) / 8
            known.key, known.rows, known.provisional = key, rows, False
            self._shapes.move_to_end(job.shape)
        known.alone_s = self._step_s(job.shape, max(1, round(known.rows)))
        self._unlearned_step_s = known.work_s
