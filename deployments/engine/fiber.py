"""A pipeline call that can stand still: it parks at every heavy module and is resumed with the output."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent, greenlet

from deployments.engine.step_scheduler import ScheduledJob

if TYPE_CHECKING:
    from deployments.engine.call import ModuleCall, Seam
    from deployments.engine.call_signature import CallSignature


class FiberCancelled(BaseException):
    """Thrown into a parked fiber to end it. A BaseException, so that no pipeline swallows it."""


class Fiber(greenlet):
    """One request's pipeline call. Only the engine's thread may touch it.

    Between `begin`, `resume` and `throw` it is parked: `call` holds what it waits for. When it is
    over, `over` is true and exactly one of `result` and `failure` says how it went.
    """

    def __init__(self, work: Callable[[], Any], job: ScheduledJob | None = None) -> None:
        """job: what the step scheduler shall know of the request; updated as it goes."""
        super().__init__()
        self._pipeline_call = work
        self.job = ScheduledJob() if job is None else job
        self.call: ModuleCall | None = None
        self.lora_set: Hashable | None = None  # of the rows of its calls; see lora_rows.py
        self.digests: dict[int, tuple[object, bytes]] = {}  # shared tensors hashed once; see call.py
        self.signatures: dict[
            Seam, tuple[CallSignature, ...]
        ] = {}  # of its last two calls of each seam; see call.py
        self.done = False
        self.result: Any = None
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._pipeline_call()
        except BaseException as error:  # one fiber's end, however ugly, must not reach the others
            self.failure = error
        finally:
            self.done = True
            self.call = None
            self.digests.clear()
            self.signatures.clear()

    def begin(self) -> None:
        """Run to the first parking place or to the end."""
        self.switch()

    def resume(self, output: Any) -> None:
        """Hand `output` to the parked call; run to the next parking place or to the end."""
        self.call = None
        self.switch(output)

    def fail(self, error: BaseException) -> None:
        """Raise `error` inside the parked call; run to the next parking place or to the end."""
        self.call = None
        self.throw(error)

    def park(self, call: ModuleCall) -> Any:
        """Give the thread back to the engine until `call` has its output. Runs inside the fiber."""
        self.call = call
        assert self.parent is not None
        return self.parent.switch()


def use_lora_set(lora_set: Hashable | None) -> None:
    """Have the rows of all further calls of this fiber belong to `owner`."""
    fiber = current_fiber()
    if fiber is not None:
        fiber.lora_set = lora_set


def current_fiber() -> Fiber | None:
    """The fiber this code runs in, or None outside of any."""
    current = getcurrent()
    return current if isinstance(current, Fiber) else None
