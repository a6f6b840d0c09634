"""Waiting for jobs within one call: what every synchronous dialect does after it has submitted them."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from starlette.requests import Request

from deployments.protocol.errors import Cancelled, Overloaded, WeftError
from serve_app.api.caller import CallerContext
from serve_app.jobs.job import Job, JobState

CLIENT_GONE = 499  # the status of an answer that no one reads: for the log and the metrics


async def wait_for(caller: CallerContext, jobs: Sequence[Job], http_request: Request) -> list[Job]:
    """The jobs once all have ended. Cancels them when the client disconnects.

    Raises TimeoutError after settings.sync_wait_s (the jobs continue), ConnectionAbortedError.
    """
    timeout_s, service = caller.state.settings.sync_wait_s, caller.job_service

    async def all_ended() -> list[Job]:
        return await asyncio.gather(*(service.wait(job.id, caller.owner, timeout_s) for job in jobs))

    waiting = asyncio.create_task(all_ended())
    disconnecting = asyncio.create_task(_disconnected(http_request))
    try:
        await asyncio.wait({waiting, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            ended = waiting.result()
            if not all(job.state.ended for job in ended):
                raise TimeoutError
            return ended
        await cancel_unless_named(caller, jobs)
        raise ConnectionAbortedError
    except asyncio.CancelledError:  # how Serve reports that the client disconnected
        await asyncio.shield(cancel_unless_named(caller, jobs))
        raise
    finally:
        for task in (waiting, disconnecting):
            task.cancel()
        await asyncio.gather(waiting, disconnecting, return_exceptions=True)


async def cancel_unless_named(caller: CallerContext, jobs: Sequence[Job]) -> None:
    """Cancel jobs whose client disconnected, unless an Idempotency-Key lets the client ask for them again."""
    if caller.idempotency_key is not None:
        return
    for job in jobs:
        with suppress(WeftError):  # it may have ended, or the store is down: there is no one to answer
            await caller.job_service.cancel(job.id, caller.owner)


def late(caller: CallerContext, job: Job) -> Overloaded:
    """The error of a call whose job was not done in time."""
    return Overloaded(
        f"job {job.id} was not done within {caller.state.settings.sync_wait_s:g} s; it continues, "
        f"and GET /api/generate/{job.id} reports its state"
    )


def require_completed(job: Job) -> None:
    """Raises the error that the job ended with, Cancelled for one that was cancelled."""
    if job.state is JobState.completed:
        return
    if job.error is not None:
        raise job.error.to_error()
    raise Cancelled(f"job {job.id} was cancelled")


async def _disconnected(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass
