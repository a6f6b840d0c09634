"""Device seconds of a denoising step by the job's shape, learned while serving (pure: no torch, no clock)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from deployments.engine.cost_model import CostModel
from deployments.engine.scheduled_job import NO_CALL, ScheduledJob

UNLEARNED_STEP_S = 0.1  # of one image, before any step has been seen
MAX_SHAPES = 256  # remembered; the least recently learned is forgotten


@dataclass(slots=True)
class _ShapeCost:
    """What one step of one image costs: all its calls added up."""

    work_s: float  # device seconds, at the best rows per second
    key: Hashable  # of the costliest call
    rows: float  # of the costliest call, per image
    alone_s: float  # for one image alone
    provisional: bool  # learned from a first step, which includes the text encoders


class StepCosts:
    """Remaining work of jobs, by what the steps of jobs of equal shape have cost."""

    def __init__(self, cost_model: CostModel) -> None:
        self._cost_model = cost_model
        # not cachetools' LRUCache: reading, which happens for every job, must not refresh an entry
        self._shapes: OrderedDict[Hashable, _ShapeCost] = OrderedDict()
        self._unlearned_step_s = UNLEARNED_STEP_S

    @property
    def empty(self) -> bool:
        """Whether no shape has been learned."""
        return not self._shapes

    def is_known(self, shape: Hashable) -> bool:
        """Whether a step of this shape has been learned."""
        return shape in self._shapes

    def key_of(self, shape: Hashable) -> Hashable | None:
        """The key of the costliest call of a step of this shape; None while it is not known."""
        known = self._shapes.get(shape)
        return None if known is None else known.key

    def record(self, jobs: Sequence[ScheduledJob], key: Hashable | None, row_s: float, rows: float) -> None:
        """One forward with calls of these jobs. row_s: device seconds per image; rows: rows per image."""
        for job in jobs:
            if job.steps_done > job.steps_learned:
                self._learn_step(job)
            job.step_work_s += row_s * job.batch_size
            if row_s > job.costliest[0]:
                job.costliest = (row_s, key, rows)

    def remaining_s(self, job: ScheduledJob) -> float:
        """Device seconds in full forwards; a shape that is not known costs what was learned last."""
        known = self._shapes.get(job.shape)
        step_s = self._unlearned_step_s if known is None else known.work_s
        return max(0, job.steps - job.steps_done) * job.batch_size * step_s

    def duration_s(self, job: ScheduledJob) -> tuple[float, float]:
        """Seconds until the job ends: at the least, alone on the device, and in full forwards."""
        work_s = self.remaining_s(job)
        known = self._shapes.get(job.shape)
        if known is None:
            return work_s, work_s
        alone_s = max(work_s, known.alone_s * max(0, job.steps - job.steps_done))
        full = self._cost_model.best_batch_size(known.key) / (known.rows * job.batch_size)
        return 0.9 * alone_s, max(alone_s, work_s * max(1.0, full))

    def batch_sizes(self, job: ScheduledJob) -> tuple[int, int]:
        """Rows of the job's costliest call, and the most that a forward of such calls has."""
        known = self._shapes.get(job.shape)
        if known is None:
            return job.batch_size, job.batch_size
        return max(1, round(known.rows * job.batch_size)), self._cost_model.best_batch_size(known.key)

    def step_s(self, shape: Hashable, rows: int) -> float:
        """Seconds of one step whose costliest calls have so many rows together."""
        known = self._shapes.get(shape)
        if known is None:
            return self._unlearned_step_s * rows
        seconds = self._cost_model.seconds(known.key, rows)
        seconds_per_row = self._cost_model.seconds_per_row(known.key)
        if seconds is None or seconds_per_row is None:
            return known.work_s * rows / known.rows
        return seconds * known.work_s / (seconds_per_row * known.rows)

    def _learn_step(self, job: ScheduledJob) -> None:
        """A step of the job has ended: learn what its calls cost."""
        steps = job.steps_done - job.steps_learned
        first, job.steps_learned = job.steps_learned == 0, job.steps_done
        if job.step_work_s == 0.0:  # the job was resumed from a checkpoint
            return
        cost_s = job.step_work_s / (steps * job.batch_size)
        _, key, rows = job.costliest
        job.step_work_s, job.costliest = 0.0, NO_CALL
        known = self._shapes.get(job.shape)
        if known is None:
            known = self._shapes[job.shape] = _ShapeCost(cost_s, key, rows, cost_s, provisional=first)
            if len(self._shapes) > MAX_SHAPES:
                self._shapes.popitem(last=False)
        elif first:  # includes the text encoders
            return
        else:
            known.work_s = cost_s if known.provisional else known.work_s + (cost_s - known.work_s) / 8
            known.key, known.rows, known.provisional = key, rows, False
            self._shapes.move_to_end(job.shape)
        known.alone_s = self.step_s(job.shape, max(1, round(known.rows)))
        self._unlearned_step_s = known.work_s
