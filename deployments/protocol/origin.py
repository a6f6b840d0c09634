"""Whose work is at hand: ids that a request's log lines carry on both floors, and its place in a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass

KEPT = "weft_job_id"  # where a line's own job id waits while Ray writes its own over it


@dataclass(frozen=True, slots=True)
class Origin:
    """What a piece of work belongs to; an empty string where there is none."""

    job_id: str = ""
    request_id: str = ""  # of the HTTP request that asked for it
    trace: str = ""  # W3C traceparent of that request's span


NOBODY = Origin()
_current: ContextVar[Origin] = ContextVar("weft_origin", default=NOBODY)


def current() -> Origin:
    """Of the code that runs here, in this task or thread."""
    return _current.get()


def attribute(origin: Origin) -> Token[Origin]:
    """Attribute what this task does from now on, and tasks it starts. Give the token to `restore`."""
    return _current.set(origin)


def restore(token: Token[Origin]) -> None:
    """Undo one `attribute`, in the task that called it."""
    _current.reset(token)


def mark_lines(handlers: Iterable[logging.Handler]) -> None:
    """Have every line that these handlers write name its job and request, as far as they are known.

    Ray's own filters write the id of Ray's job over `job_id` and that of Serve's call over `request_id`:
    ours come before and after them.
    """
    for handler in handlers:
        if not any(isinstance(known, _Mark) for known in handler.filters):
            handler.filters.insert(0, _Keep())
            handler.addFilter(_Mark())


class _Keep(logging.Filter):
    """Puts away the job id that a line was written with."""

    def filter(self, record: logging.LogRecord) -> bool:
        job_id = record.__dict__.pop("job_id", None)
        if job_id is not None:
            record.__dict__[KEPT] = job_id
        return True


class _Mark(logging.Filter):
    """Writes our ids into the line; Ray's job id leaves it."""

    def filter(self, record: logging.LogRecord) -> bool:
        origin, fields = current(), record.__dict__
        fields.pop("job_id", None)
        if job_id := fields.pop(KEPT, "") or origin.job_id:
            fields["job_id"] = job_id
        if origin.request_id:
            fields["request_id"] = origin.request_id
        return True
