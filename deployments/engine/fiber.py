"""A fiber: a pipeline call that parks at every intercepted module and is resumed with its output."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextvars import copy_context
from typing import Any

from greenlet import getcurrent, greenlet

from deployments.engine.call import ModuleCall
from deployments.engine.call_signature import KeyCache
from deployments.engine.scheduled_job import ScheduledJob
from deployments.protocol.request import Exactness

SkippedCall = Callable[[Iterable[Any]], Any]  # the output for these arguments


class FiberCancelled(BaseException):
    """Thrown into a parked fiber to end it. A BaseException, so that no pipeline catches it by accident."""


class Fiber(greenlet):
    """One request's pipeline call. Only the engine's thread may use it.

    Between `begin`, `resume` and `fail` it is parked: `call` is what it waits for. When it has ended, `done`
    is true and exactly one of `result` and `failure` has been set.
    """

    def __init__(self, pipeline_call: Callable[[], Any], job: ScheduledJob | None = None) -> None:
        """job: what the step scheduler knows of the request."""
        super().__init__()
        self._pipeline_call = pipeline_call
        self.job = ScheduledJob() if job is None else job
        self.call: ModuleCall | None = None
        self.keys = KeyCache()  # of its calls
        self.lora_set: Hashable | None = None  # of the rows of its calls; see lora_rows.py
        self.exact: Exactness | None = None  # of its calls; None: the engine's
        self.unproven: frozenset[str] = frozenset()  # seams whose calls shared a batch size without a proof
        self.branches: list[Fiber] = []  # see branches.py
        self.waits = False  # for one of them, or for a result of another branch; not for a call
        self.done = False
        self.result: Any = None
        self.failure: BaseException | None = None
        self.skipped: Mapping[str, SkippedCall] | None = None  # see skip_calls
        self.first_outputs: dict[str, Callable[[str, Any], object]] = {}  # see record_first_outputs
        self._woken: list[Fiber] = []  # they go on when this one has parked or ended

    def run(self) -> None:
        """The greenlet's body. The call has a context of its own, so that what it sets there ends with it."""
        try:
            self.result = copy_context().run(self._pipeline_call)
        except BaseException as error:  # not raised: it would reach the engine and with it all other fibers
            self.failure = error
        finally:
            self.done = True
            self.call = None

    def begin(self) -> None:
        """Run, or go on after `wait`, to the next parked call or to the end."""
        self.switch()

    def resume(self, output: Any) -> None:
        """Return `output` from the parked call; run to the next parked call or to the end."""
        self.call = None
        self.switch(output)

    def fail(self, error: BaseException) -> None:
        """Raise `error` from the parked call; run to the next parked call or to the end."""
        self.call = None
        self.throw(error)

    def end(self, error: BaseException) -> None:
        """Raise `error` from the parked call, and from every call that the pipeline makes in its clean-up."""
        while not self.done:
            self.fail(error)
        self.release_frames()

    def release_frames(self) -> None:
        """Free what the frames of its failure keep, such as all tensors of its pipeline call.

        They also keep the fiber, so that only the garbage collector would free them, at some later time.
        """
        errors, seen = [self.failure], set[int]()
        while errors:
            error = errors.pop()
            if error is not None and id(error) not in seen:
                seen.add(id(error))
                error.__traceback__ = None
                errors += [error.__cause__, error.__context__]

    def park(self, call: ModuleCall) -> Any:
        """Switch to the engine; returns the call's output. Runs inside the fiber."""
        self.call = call
        assert self.parent is not None
        output = self.parent.switch()
        if self.first_outputs and (record := self.first_outputs.pop(call.seam.name, None)) is not None:
            record(call.seam.name, output)
        return output

    def wait(self) -> None:
        """Switch to the engine until another fiber lets this one go on. Runs inside the fiber."""
        self.waits = True
        assert self.parent is not None
        try:
            self.parent.switch()
        finally:
            self.waits = False

    def wake_after(self, other: Fiber) -> None:
        """Go on as soon as `other`, which runs, has parked or ended."""
        other._woken.append(self)

    def start_branches(self, branches: list[Fiber]) -> None:
        """Have the engine begin these fibers, and wait. Runs inside the fiber."""
        self.branches = branches
        self._woken += branches
        self.wait()

    def take_woken(self) -> list[Fiber]:
        """The fibers to be begun or resumed now, after this one has parked or ended."""
        woken, self._woken = self._woken, []
        return [fiber for fiber in woken if not fiber.done]


def use_lora_set(lora_set: Hashable | None) -> None:
    """Apply `lora_set` to all further calls of the current fiber; no effect outside of fibers."""
    fiber = current_fiber()
    if fiber is not None:
        fiber.lora_set = lora_set


def use_exactness(policy: Exactness | None) -> None:
    """Apply `policy` to all further calls of the current fiber, None: the engine's; no effect outside of
    fibers."""
    fiber = current_fiber()
    if fiber is not None:
        fiber.exact = policy


def skip_calls(outputs: Mapping[str, SkippedCall] | None) -> None:
    """Have further calls of these seams of the current fiber return at once what these functions return for
    their arguments; None: no call any more. No effect outside of fibers.

    outputs: by name of the seam.
    """
    fiber = current_fiber()
    if fiber is not None:
        fiber.skipped = outputs


def record_first_outputs(seams: Iterable[str], record: Callable[[str, Any], object]) -> None:
    """Have `record` called with name and output of the current fiber's next call of each of these seams; no
    effect outside of fibers."""
    fiber = current_fiber()
    if fiber is not None:
        fiber.first_outputs = dict.fromkeys(seams, record)


def note_step(step: int, steps: int) -> None:
    """Have the step scheduler count `step` of `steps` denoising steps of the current fiber as done; no effect
    outside of fibers."""
    fiber = current_fiber()
    if fiber is not None:
        fiber.job.steps_done, fiber.job.steps = step, steps


def current_unproven() -> frozenset[str]:
    """Modules whose forwards the current fiber has shared in unproven batch sizes; none outside of fibers."""
    fiber = current_fiber()
    return frozenset() if fiber is None else fiber.unproven


def current_fiber() -> Fiber | None:
    """The fiber that this code runs in, None outside of fibers."""
    current = getcurrent()
    return current if isinstance(current, Fiber) else None
