"""Commands from asyncio to the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deployments.engine.device_errors import is_device_broken
from deployments.engine.work import WorkItem


@dataclass(frozen=True, slots=True)
class Submit:
    submission: WorkItem


@dataclass(frozen=True, slots=True)
class Cancel:
    submission: WorkItem


@dataclass(frozen=True, slots=True)
class RunFunction:
    """A function for the worker's thread, such as intercepting the modules of another model."""

    function: Callable[[], Any]
    done: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


@dataclass(frozen=True, slots=True)
class Drain:
    grace_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True)
class Break:
    """The device failed outside of the engine, such as while a video was decoded."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Wake:
    """The auxiliary lane's forward is done."""


Command = Submit | Cancel | RunFunction | Drain | Stop | Break | Wake


def run_function(command: RunFunction) -> None:
    """Give the function's result or error to its caller. Raises it too where the device is broken."""
    result, failure = None, None
    try:
        result = command.function()
    except Exception as error:  # the caller's, not the worker's
        failure = error
    settle(command, result, failure)
    if failure is not None and is_device_broken(failure):
        raise failure


def settle(command: RunFunction, result: Any, failure: BaseException | None) -> None:
    def set_outcome() -> None:
        if command.done.done():
            return
        if failure is None:
            command.done.set_result(result)
        else:
            command.done.set_exception(failure)

    with suppress(RuntimeError):  # the caller's loop may be closed by now
        command.loop.call_soon_threadsafe(set_outcome)
