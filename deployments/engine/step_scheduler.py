"""The step scheduler: whose step runs next, and with whom (pure: no torch, no clock).

Promises: docs/scheduling.md. The order is policy.py's; costs and shares are learned by CostModel, StepCosts
and FairShare.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from deployments.engine.batch_filling import Batch
from deployments.engine.cost_model import CostModel, RowLimit
from deployments.engine.fair_share import FairShare
from deployments.engine.policy import MAX_BOOST_S, base_score, is_urgent, size_boost_s
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.simulate import SimulatedJob, simulate
from deployments.engine.step_costs import StepCosts

OBSERVE_EVERY = 16  # picks between two observations of the backlog
MAX_BACKLOG_S = MAX_BOOST_S / 5  # the largest scale on which a job counts as short


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a queued job may expect; times are None while nothing has been learned."""

    ahead: int  # queued jobs that start before it
    starts_in_s: float | None
    finishes_in_s: float | None


class StepScheduler:
    """Picks the calls of the next forward and the next job for a free slot.

    `max_batch_size` caps every forward; a key that ran out of memory has a smaller cap from then on.
    """

    def __init__(self, max_batch_size: int, row_limit: RowLimit = lambda _key: None) -> None:
        """row_limit: rows of a key that fit the device's memory; None where that is not known.

        Raises ValueError if max_batch_size is below 1.
        """
        if max_batch_size < 1:
            raise ValueError("max_batch_size must be at least 1")
        self.max_batch_size = max_batch_size
        self.row_limit = row_limit
        self.work_done_s = 0.0  # of all forwards so far, in the unit of `work_left_s`
        self._cost_model = CostModel(max_batch_size, row_limit)
        self._step_costs = StepCosts(self._cost_model)
        self._fair_share = FairShare()
        self._queued_s = 0.0  # work that waited for slots at the last observation of the queue
        self._queued_users: frozenset[str] = frozenset()  # whose it was
        self._backlog_s = 0.0  # on this scale a job counts as short
        # key, and rows of a forward that would be tried if its batch size were allowed; set by `pick`
        self.wanted: tuple[Hashable, int] | None = None
        self._picks = 0
        self._observations = 0

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        """Indices of the calls for the next forward; empty only if nothing waits.

        The call of the smallest score is first; if all fit into one forward, they keep their order.
        observe: these are all calls that wait, so the backlog may be learned from them.
        """
        if not waiting:
            return []
        if observe:
            if self._picks % OBSERVE_EVERY == 0:
                self._observe([call.job for call in waiting if call.job is not None])
            self._picks += 1
        if self._fit_together(waiting):
            return list(range(len(waiting)))
        scores = self._scores(waiting, now)
        lead = scores.index(min(scores))
        key = waiting[lead].key
        if key is None or waiting[lead].sizes == ():
            return [lead]
        others = [i for i, call in enumerate(waiting) if call.key is key or call.key == key]
        others.remove(lead)
        if not others:
            return [lead]
        if sum([waiting[i].batch_size for i in (lead, *others)]) > self._cost_model.best_batch_size(key):
            others.sort(key=scores.__getitem__)
        return self._fill(waiting, lead, others)

    def record_forward(
        self,
        key: Hashable | None,
        batch_size: int,
        seconds: float,
        jobs: Sequence[ScheduledJob] = (),
        now: float = 0.0,
    ) -> None:
        """One forward of `batch_size` rows for `jobs` took `seconds`: learn it, and charge each its share.

        On a device that works ahead this may be called a forward later.
        """
        work_s = seconds
        if key is not None and seconds > 0:
            self._cost_model.record(key, batch_size, seconds)
            work_s = batch_size * (self._cost_model.seconds_per_row(key) or seconds / batch_size)
        self.work_done_s += work_s
        if jobs:
            images = sum([job.batch_size for job in jobs])
            self._fair_share.charge(jobs, seconds, images, now)
            self._step_costs.record(jobs, key, work_s / images, batch_size / images)

    def seed(self, shape: Hashable, seconds: Mapping[int, float]) -> bool:
        """Know the seconds of a denoiser's forwards by batch size, as measured before, for jobs of a shape of
        which one has run. False where they are not used: see CostModel.seed."""
        key = self._step_costs.key_of(shape)
        return key is not None and self._cost_model.seed(key, seconds)

    def record_out_of_memory(self, key: Hashable | None, batch_size: int) -> None:
        """A forward of `batch_size` rows of `key` does not fit the device: halve the cap."""
        if key is not None:
            self._cost_model.cap(key, max(1, batch_size // 2))

    def remaining_s(self, job: ScheduledJob) -> float | None:
        """Device seconds that the job's steps still need; None while its shape is not known."""
        return self._step_costs.remaining_s(job) if self._step_costs.is_known(job.shape) else None

    def work_left_s(self, jobs: Sequence[ScheduledJob]) -> float:
        """Device seconds in full forwards; a shape that is not known costs what was learned last."""
        return sum([self._step_costs.remaining_s(job) for job in jobs])

    def next_job(self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob], now: float) -> int:
        """Index of the queued job for a free slot; the work of running jobs is charged in advance."""
        self._observe_queue(queued, active)
        ahead_s = self._advance_by_user(active)
        scores = [self._score(job, now, ahead_s.get(job.user, 0.0)) for job in queued]
        return scores.index(min(scores))

    def forecast(
        self,
        queued: Sequence[ScheduledJob],
        active: Sequence[ScheduledJob],
        now: float,
        *,
        slots: int | None = None,
    ) -> list[Forecast]:
        """For each queued job, if no other is submitted. slots: None for as many as are active."""
        self._observe_queue(queued, active)
        order = self._order(queued, active, now)
        if self._step_costs.empty:
            ranks = {i: ahead for ahead, (i, _) in enumerate(order)}
            return [Forecast(ranks[i], None, None) for i in range(len(queued))]
        simulated = [self._simulated(queued[i], score) for i, score in order]
        running = [self._simulated(job, self._score(job, now)) for job in active]
        simulate(running, simulated, slots or max(1, len(active)), self._step_costs.step_s)
        forecasts = {
            i: Forecast(ahead, job.starts_s, job.ends_s)
            for ahead, ((i, _), job) in enumerate(zip(order, simulated, strict=True))
        }
        return [forecasts[i] for i in range(len(queued))]

    def _fit_together(self, waiting: Sequence[ParkedCall]) -> bool:
        """Whether one forward of a size that is known to pay takes all calls."""
        first = waiting[0]
        if len(waiting) == 1:
            return True
        key, sizes = first.key, first.sizes
        if key is None:
            return False
        free = self._cost_model.best_batch_size(key)
        if sizes is not None:
            free = min(free, sizes[-1]) if sizes else 0
        if len(waiting) > free:
            return False
        for call in waiting:
            free -= call.batch_size
            if free < 0 or call.sizes is not sizes or not (call.key is key or call.key == key):
                return False
        return True

    def _fill(self, waiting: Sequence[ParkedCall], lead: int, others: Sequence[int]) -> list[int]:
        """The lead's call and those of the others, in their order, that make the forward that pays.

        While larger batch sizes are to be tried, it is the smallest larger one that these calls can fill.
        """
        key = waiting[lead].key
        best, largest = self._cost_model.best_batch_size(key), self._cost_model.largest_trial(key)
        if largest > best:
            rows = sum([waiting[i].batch_size for i in (lead, *others)])
            self.wanted = (key, min(rows, largest))
            for limit in _larger_sizes(waiting[lead].sizes, best, largest):
                batch = Batch(waiting[lead])
                added = batch.add(waiting, others, limit)
                if added and batch.padded_rows > best:
                    return [lead, *added]
        return [lead, *Batch(waiting[lead]).add(waiting, others, best)]

    def _scores(self, waiting: Sequence[ParkedCall], now: float) -> list[float]:
        """Per call; base scores are kept until a step ends or the backlog is observed again."""
        scores = []
        for call in waiting:
            job = None if call.job is None else call.job.request
            if job is None:
                scores.append(0.0)
            elif job.deadline is None and job.scored_at == (job.steps - job.steps_done, self._observations):
                scores.append(job.base_score + self._fair_share.delay_s(job))
            else:
                scores.append(self._score(job, now))
        return scores

    def _score(self, job: ScheduledJob, now: float, ahead_s: float = 0.0) -> float:
        """ahead_s: by how much the user's clock will have advanced when this job's turn comes."""
        urgent = job.deadline is not None and is_urgent(job.deadline - now, *self._step_costs.duration_s(job))
        boost_s = size_boost_s(self._step_costs.remaining_s(job), self._backlog_s)
        job.base_score = base_score(job.submitted_at, job.priority, boost_s, urgent=urgent)
        job.scored_at = (job.steps - job.steps_done, self._observations)
        return job.base_score + self._fair_share.delay_s(job, ahead_s)

    def _observe(self, active: Sequence[ScheduledJob]) -> None:
        """Learn how much work waits, and whose."""
        self._observations += 1
        self._backlog_s = min(MAX_BACKLOG_S, self._queued_s + self.work_left_s(active))
        self._fair_share.observe(self._queued_users.union([job.user for job in active]))

    def _observe_queue(self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob]) -> None:
        self._queued_s = self.work_left_s(queued)
        self._queued_users = frozenset([job.user for job in queued])
        self._observe(active)

    def _advance_by_user(self, jobs: Sequence[ScheduledJob]) -> dict[str, float]:
        """By how much the clocks of their users will have advanced when these jobs have ended."""
        advance_s: dict[str, float] = {}
        for job in jobs:
            self._add_advance(advance_s, job)
        return advance_s

    def _add_advance(self, advance_s: dict[str, float], job: ScheduledJob) -> None:
        job_s = self._fair_share.advance_s(self._step_costs.remaining_s(job))
        advance_s[job.user] = advance_s.get(job.user, 0.0) + job_s

    def _order(
        self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob], now: float
    ) -> list[tuple[int, float]]:
        """Indices in the order in which the jobs will start, with their scores at that time."""
        ahead_s = self._advance_by_user(active)
        heap = [(self._score(job, now, ahead_s.get(job.user, 0.0)), i) for i, job in enumerate(queued)]
        heapq.heapify(heap)
        order = []
        while heap:
            _, i = heap[0]
            job = queued[i]
            score = self._score(job, now, ahead_s.get(job.user, 0.0))
            if len(heap) > 1 and (score, i) > min(heap[1:3]):
                heapq.heapreplace(heap, (score, i))  # another job of its user has been ordered meanwhile
                continue
            heapq.heappop(heap)
            order.append((i, score))
            self._add_advance(ahead_s, job)
        return order

    def _simulated(self, job: ScheduledJob, score: float) -> SimulatedJob:
        rows, max_batch_size = self._step_costs.batch_sizes(job)
        steps = max(0, job.steps - job.steps_done)
        return SimulatedJob(score, steps, rows, max_batch_size, self._step_costs.remaining_s(job), job.shape)


def _larger_sizes(sizes: tuple[int, ...] | None, best: int, largest: int) -> Sequence[int]:
    """The batch sizes to try after the best one known, ascending; where any may run, twice as many rows."""
    if sizes is None:
        return sorted({min(2 * best, largest), largest})
    return [size for size in sizes if best < size <= largest]
