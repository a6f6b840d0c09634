"""Several calls of one request as fibers of their own, such as one pipeline call for each of its pictures."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from deployments.engine.fiber import Fiber, current_fiber

Result = TypeVar("Result")


def run_branches(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of all calls in their order, each run as a branch of the current fiber, which waits.

    Branches have their fiber's LoRAs and exactness, and a ScheduledJob each: their calls may share forwards
    with each other as with those of other requests. The first failure is raised at once, and the other
    branches are cancelled; so are all of them with their fiber.
    """
    fiber = current_fiber()
    assert fiber is not None, "branches belong to a fiber"
    unfinished = len(calls)

    def run(call: Callable[[], Result]) -> Result:
        nonlocal unfinished
        branch = current_fiber()
        assert branch is not None
        try:
            result = call()
        except BaseException:
            fiber.wake_after(branch)
            raise
        unfinished -= 1
        if not unfinished:
            fiber.wake_after(branch)
        return result

    branches = [_branch(fiber, partial(run, call)) for call in calls]
    fiber.start_branches(branches)
    fiber.unproven = fiber.unproven.union(*(branch.unproven for branch in branches))
    failures = [branch.failure for branch in branches if branch.failure is not None]
    if failures:
        raise failures[0]
    results = [branch.result for branch in branches]
    branches.clear()  # they and their fiber refer to each other
    return results


class SharedResults:
    """What several branches of a fiber need alike: the first that asks computes it, and the others wait."""

    def __init__(self) -> None:
        self._results: dict[Hashable, Any] = {}
        self._waiting: dict[Hashable, list[Fiber]] = {}  # by what is being computed

    def get(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """The result of this key. If computing it fails, the next branch tries. Runs inside a branch."""
        fiber = current_fiber()
        assert fiber is not None, "branches share results"
        while key not in self._results:
            if key in self._waiting:
                self._waiting[key].append(fiber)
                fiber.wait()
                continue
            self._waiting[key] = []
            try:
                self._results[key] = compute()
            finally:
                for waiting in self._waiting.pop(key):
                    waiting.wake_after(fiber)
        result: Result = self._results[key]
        return result


def _branch(fiber: Fiber, call: Callable[[], Any]) -> Fiber:
    job = replace(fiber.job, batch_size=1, whole=fiber.job)
    branch = Fiber(call, job)
    assert fiber.parent is not None
    branch.parent = fiber.parent  # the engine
    branch.gr_context = copy_context()
    branch.lora_set, branch.exact = fiber.lora_set, fiber.exact
    return branch
