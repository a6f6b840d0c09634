"""Whose step runs next, and with whom (pure: no torch, no clock). Promises: docs/scheduling.md."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from deployments.engine.cost_model import CostModel
from deployments.engine.simulate import SimulatedJob, simulate

MAX_BOOST_S = 300.0  # what a class counts as submitted earlier, and the most that any other reason may
UNLEARNED_STEP_S = 0.1  # a picture's step before any was seen
OBSERVE_EVERY = 16  # picks between two looks at the backlog
NO_CALL = (0.0, None, 1.0)  # seconds, key and rows per picture of a step's dearest call
USERS = 1024
SHAPES = 256


@dataclass(slots=True)
class _UserClock:
    """Advances by the device time that the user had, times the users at work then: with a fair share it
    keeps pace with the time; ahead of it, its jobs count as submitted later."""

    clock: float = -math.inf


@dataclass(slots=True, eq=False)
class ScheduledJob:
    """One request as the scheduler sees it; the engine's thread updates steps_done."""

    user: str = ""
    priority: int = 0  # 1 high, 0 normal, -1 low
    deadline: float | None = None  # a time of the same clock as `now`
    submitted_at: float = 0.0
    steps: int = 1  # denoising steps planned
    steps_done: int = 0
    batch_size: int = 1  # pictures
    shape: Hashable = None  # jobs of equal shape probably share forwards
    labels: tuple[str, str] = ("", "")  # model and size that its forwards are counted under

    # the scheduler's own notes
    user_clock: _UserClock | None = field(default=None, init=False, repr=False)
    charged_s: float = field(default=0.0, init=False, repr=False)  # how far it moved the account's clock
    step_work_s: float = field(default=0.0, init=False, repr=False)  # of the step at hand
    costliest: tuple[float, Hashable, float] = field(default=NO_CALL, init=False, repr=False)
    steps_learned: int = field(default=0, init=False, repr=False)
    scored_at: tuple[int, int] = field(default=(-1, -1), init=False, repr=False)  # steps left, look
    base_score: float = field(default=0.0, init=False, repr=False)  # submission less all leads


@dataclass(slots=True)
class ParkedCall:
    """One parked call as the scheduler sees it."""

    key: Hashable | None  # None shares a forward with nobody
    batch_size: int
    order: int  # smaller is earlier
    job: ScheduledJob | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a queued job may expect; times are None while nothing has been learned."""

    ahead: int  # queued jobs that start before it
    starts_in_s: float | None
    finishes_in_s: float | None


@dataclass(slots=True)
class _ShapeCost:
    """What one step of one picture costs."""

    work_s: float  # of the device, in forwards of the rows that pay
    key: Hashable  # of the calls that cost most
    batch_size: float  # of one such call, per picture
    alone_s: float  # for one picture alone
    provisional: bool  # learned from a first step, which has the text encoders in it


class StepScheduler:
    """The oldest first, where a short job counts as older; a forward has the number of rows that pays.

    `max_rows` caps a forward; a key that ran out of memory has its own, smaller cap from then on.
    """

    def __init__(self, max_batch_size: int) -> None:
        if max_batch_size < 1:
            raise ValueError("max_rows must be at least 1")
        self.max_batch_size = max_batch_size
        self.work_done_s = 0.0  # of all forwards so far, as `work_left_s` counts
        self._cost_model = CostModel(max_batch_size)
        self._shape_costs: OrderedDict[Hashable, _ShapeCost] = OrderedDict()
        self._unlearned_step_s = UNLEARNED_STEP_S
        self._users: OrderedDict[str, _UserClock] = OrderedDict()
        self._queued_s = 0.0  # work that waited for slots when last looked at, and whose
        self._queued_users: frozenset[str] = frozenset()
        self._scale_s = 0.0  # on which a job counts as short: the backlog, up to a minute
        self._users_active = 1
        self._picks = 0
        self._observations = 0

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        """Indices of the calls for the next forward, empty only if nothing waits.

        The leader is first; but if all fit into one forward, they stay in the order given.
        look: these are all calls that wait, so the backlog may be learned from them.
        """
        if not waiting:
            return []
        if observe:
            if self._picks % OBSERVE_EVERY == 0:
                self._observe([call.job for call in waiting if call.job is not None])
            self._picks += 1
        if self._fit(waiting):
            return list(range(len(waiting)))
        scores = self._scores(waiting, now)
        boost_s = scores.index(min(scores))
        key = waiting[boost_s].key
        picked = [boost_s]
        room = 0 if key is None else self._cost_model.batch_size(key) - waiting[boost_s].batch_size
        if room > 0:
            others = [i for i, call in enumerate(waiting) if call.key is key or call.key == key]
            others.remove(boost_s)
            if sum([waiting[i].batch_size for i in others]) > room:
                others.sort(key=scores.__getitem__)
            for i in others:
                if waiting[i].batch_size <= room:
                    picked.append(i)
                    room -= waiting[i].batch_size
        return picked

    def record_forward(
        self,
        key: Hashable | None,
        batch_size: int,
        seconds: float,
        jobs: Sequence[ScheduledJob] = (),
        now: float = 0.0,
    ) -> None:
        """One forward of `rows` rows for `jobs` took so long: learn it, and charge each its share.

        On a device that works ahead this may be told a forward later.
        """
        work_s = seconds
        if key is not None and seconds > 0:
            self._cost_model.record(key, batch_size, seconds)
            work_s = batch_size * (self._cost_model.seconds_per_row(key) or seconds / batch_size)
        self.work_done_s += work_s
        if not jobs:
            return
        pictures = sum([job.batch_size for job in jobs])
        charge_s, latest = seconds * self._users_active / pictures, now + MAX_BOOST_S
        work_s /= pictures
        for job in jobs:
            user = job.user_clock or self._user_clock(job)
            clock = user.clock if user.clock > job.submitted_at else job.submitted_at
            moved = min(charge_s * job.batch_size, max(0.0, latest - clock))
            user.clock = clock + moved
            job.charged_s += moved
            if job.steps_done > job.steps_learned:
                self._learn_step(job)
            job.step_work_s += work_s * job.batch_size
            if work_s > job.costliest[0]:
                job.costliest = (work_s, key, batch_size / pictures)

    def record_out_of_memory(self, key: Hashable | None, batch_size: int) -> None:
        """Remember that `rows` rows of `key` do not fit the device."""
        if key is not None:
            self._cost_model.cap(key, max(1, batch_size // 2))

    def set_buckets(self, key: Hashable | None, buckets: Sequence[int]) -> None:
        """Forwards of this key are padded to the next of these counts."""
        if key is not None:
            self._cost_model.set_buckets(key, buckets)

    def remaining_s(self, job: ScheduledJob) -> float | None:
        """Seconds of the device that the job's steps still need; None while its shape is unlearned."""
        return self._work_s(job) if job.shape in self._shape_costs else None

    def work_left_s(self, jobs: Sequence[ScheduledJob]) -> float:
        """Seconds of a device whose forwards are full; an unlearned shape counts as what was learned last."""
        return sum([self._work_s(job) for job in jobs])

    def next_job(self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob], now: float) -> int:
        """Index of the queued job that gets a free slot; what runs counts as had by its user."""
        self._observe_queue(queued, active)
        ahead = self._work_by_user(active)
        scores = [self._score(job, now, ahead.get(job.user, 0.0)) for job in queued]
        return scores.index(min(scores))

    def forecast(
        self,
        queued: Sequence[ScheduledJob],
        active: Sequence[ScheduledJob],
        now: float,
        *,
        slots: int | None = None,
    ) -> list[Forecast]:
        """For each queued job, if nobody else comes. slots: None for as many as are active."""
        self._observe_queue(queued, active)
        order = self._order(queued, active, now)
        if not self._shape_costs:
            places = {i: ahead for ahead, (i, _) in enumerate(order)}
            return [Forecast(places[i], None, None) for i in range(len(queued))]
        simulated = [self._simulated_job(queued[i], score) for i, score in order]
        running = [self._simulated_job(job, self._score(job, now)) for job in active]
        simulate(running, simulated, slots or max(1, len(active)), self._step_s)
        forecasts = {
            i: Forecast(ahead, simulated_job.starts_s, simulated_job.ends_s)
            for ahead, ((i, _), simulated_job) in enumerate(zip(order, simulated, strict=True))
        }
        return [forecasts[i] for i in range(len(queued))]

    def _fit(self, waiting: Sequence[ParkedCall]) -> bool:
        """Whether one forward takes all that waits."""
        key = waiting[0].key
        if key is None:
            return len(waiting) == 1
        room = self._cost_model.batch_size(key)
        if len(waiting) > room:
            return False
        for call in waiting:
            room -= call.batch_size
            if room < 0 or not (call.key is key or call.key == key):
                return False
        return True

    def _scores(self, waiting: Sequence[ParkedCall], now: float) -> list[float]:
        """One number per call: smaller runs earlier, as seconds of submission."""
        scores = []
        observations = self._observations
        for call in waiting:
            job = call.job
            if job is None:
                scores.append(0.0)
            elif job.deadline is None and job.scored_at == (job.steps - job.steps_done, observations):
                late = job.user_clock.clock - job.charged_s - job.submitted_at  # type: ignore[union-attr]
                scores.append(
                    job.base_score + (0.0 if late <= 0.0 else late if late < MAX_BOOST_S else MAX_BOOST_S)
                )
            else:
                scores.append(self._score(job, now))
        return scores

    def _score(self, job: ScheduledJob, now: float, ahead_s: float = 0.0) -> float:
        """ahead_s: so much further the user's clock will be when this job has its turn."""
        work_s = self._work_s(job)
        boost_s = MAX_BOOST_S * job.priority + self._size_boost(work_s)
        if job.deadline is not None and self._is_urgent(job, job.deadline - now, work_s):
            boost_s += MAX_BOOST_S
        job.base_score = job.submitted_at - boost_s
        job.scored_at = (job.steps - job.steps_done, self._observations)
        user_clock = job.user_clock or self._user_clock(job)
        late = max(user_clock.clock, job.submitted_at) + ahead_s - job.charged_s - job.submitted_at
        return job.base_score + min(max(late, 0.0), MAX_BOOST_S)

    def _size_boost(self, work_s: float) -> float:
        """Seconds that a job counts as submitted earlier: none for a long one.

        This form keeps the 95th percentile near that of first come, first served while it lowers the
        mean. Source: Yu and Scully, Strongly Tail-Optimal Scheduling in the Light-Tailed M/G/1 (2024).
        """
        if work_s <= 0.0:
            return MAX_BOOST_S
        if self._scale_s <= 0.0:
            return 0.0
        length = -math.expm1(-work_s / self._scale_s)  # 0 to 1
        return min(MAX_BOOST_S, -self._scale_s * math.log(length)) if length > 0.0 else MAX_BOOST_S

    def _is_urgent(self, job: ScheduledJob, left_s: float, work_s: float) -> bool:
        """Whether a deadline in `left_s` seconds is near, and can be kept."""
        known = self._shape_costs.get(job.shape)
        if known is None:
            return work_s <= left_s <= 2 * work_s + 1.0
        alone_s = max(work_s, known.alone_s * max(0, job.steps - job.steps_done))
        crowded_s = work_s * max(
            1.0, self._cost_model.batch_size(known.key) / (known.batch_size * job.batch_size)
        )
        return 0.9 * alone_s <= left_s <= 2 * max(alone_s, crowded_s) + 1.0

    def _observe(self, active: Sequence[ScheduledJob]) -> None:
        """How much work waits, and how many users are at work."""
        self._observations += 1
        backlog_s = self._queued_s + sum([self._work_s(job) for job in active])
        self._scale_s = min(MAX_BOOST_S / 5, backlog_s)
        self._users_active = max(1, len(self._queued_users.union([job.user for job in active])))

    def _observe_queue(self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob]) -> None:
        self._queued_s = sum([self._work_s(job) for job in queued])
        self._queued_users = frozenset([job.user for job in queued])
        self._observe(active)

    def _work_s(self, job: ScheduledJob) -> float:
        known = self._shape_costs.get(job.shape)
        step_s = self._unlearned_step_s if known is None else known.work_s
        return max(0, job.steps - job.steps_done) * job.batch_size * step_s

    def _work_by_user(self, jobs: Sequence[ScheduledJob]) -> dict[str, float]:
        """How far the clocks of their users will move until these jobs have ended."""
        work: dict[str, float] = {}
        for job in jobs:
            work[job.user] = work.get(job.user, 0.0) + self._work_s(job) * self._users_active
        return work

    def _order(
        self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob], now: float
    ) -> list[tuple[int, float]]:
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

    def _simulated_job(self, job: ScheduledJob, score: float) -> SimulatedJob:
        known = self._shape_costs.get(job.shape)
        batch_size = job.batch_size if known is None else max(1, round(known.batch_size * job.batch_size))
        max_batch_size = batch_size if known is None else self._cost_model.batch_size(known.key)
        return SimulatedJob(
            score,
            max(0, job.steps - job.steps_done),
            batch_size,
            max_batch_size,
            self._work_s(job),
            job.shape,
        )

    def _step_s(self, shape: Hashable, batch_size: int) -> float:
        """Seconds of one step of so many rows of the calls that cost most."""
        known = self._shape_costs.get(shape)
        if known is None:
            return self._unlearned_step_s * batch_size
        seconds, seconds_per_row = (
            self._cost_model.seconds(known.key, batch_size),
            self._cost_model.seconds_per_row(known.key),
        )
        if seconds is None or seconds_per_row is None:
            return known.work_s * batch_size / known.batch_size
        return seconds * known.work_s / (seconds_per_row * known.batch_size)

    def _user_clock(self, job: ScheduledJob) -> _UserClock:
        user = self._users.get(job.user)
        if user is None:
            user = self._users[job.user] = _UserClock()
            if len(self._users) > USERS:
                self._users.popitem(last=False)
        else:
            self._users.move_to_end(job.user)
        job.user_clock = user
        return user

    def _learn_step(self, job: ScheduledJob) -> None:
        """A step is over: what its calls cost."""
        steps = job.steps_done - job.steps_learned
        first, job.steps_learned = job.steps_learned == 0, job.steps_done
        if job.step_work_s == 0.0:  # it was resumed in the middle
            return
        cost_s = job.step_work_s / (steps * job.batch_size)
        _, key, batch_size = job.costliest
        job.step_work_s, job.costliest = 0.0, NO_CALL
        known = self._shape_costs.get(job.shape)
        if known is None:
            known = self._shape_costs[job.shape] = _ShapeCost(
                cost_s, key, batch_size, cost_s, provisional=first
            )
            if len(self._shape_costs) > SHAPES:
                self._shape_costs.popitem(last=False)
        elif first:  # with the text encoders
            return
        else:
            known.work_s = cost_s if known.provisional else known.work_s + (cost_s - known.work_s) / 8
            known.key, known.batch_size, known.provisional = key, batch_size, False
            self._shape_costs.move_to_end(job.shape)
        known.alone_s = self._step_s(job.shape, max(1, round(known.batch_size)))
        self._unlearned_step_s = known.work_s
