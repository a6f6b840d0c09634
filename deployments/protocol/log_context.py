"""Whose work is at hand: ids that a request's log lines carry on both floors, and its place in a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass

STASHED_JOB_ID = "weft_job_id"  # where a line's own job id waits while Ray writes its own over it


@dataclass(frozen=True, slots=True)
class LogContext:
    """What a piece of work belongs to; an empty string where there is none."""

    job_id: str = ""
    request_id: str = ""  # of the HTTP request that asked for it
    trace: str = ""  # W3C traceparent of that request's span


EMPTY = LogContext()
_current: ContextVar[LogContext] = ContextVar("weft_log_context", default=EMPTY)


def current() -> LogContext:
    """Of the code that runs here, in this task or thread."""
    return _current.get()


def bind(log_context: LogContext) -> Token[LogContext]:
    """Attribute what this task does from now on, and tasks it starts. Give the token to `restore`."""
    return _current.set(log_context)


def unbind(token: Token[LogContext]) -> None:
    """Undo one `attribute`, in the task that called it."""
    _current.reset(token)


def add_context_filters(handlers: Iterable[logging.Handler]) -> None:
    """Have every line that these handlers write name its job and request, as far as they are known.

    Ray's own filters write the id of Ray's job over `job_id` and that of Serve's call over `request_id`:
    ours come before and after them.
    """
    for handler in handlers:
        if not any(isinstance(known, _WriteContext) for known in handler.filters):
            handler.filters.insert(0, _StashJobId())
            handler.addFilter(_WriteContext())


class _StashJobId(logging.Filter):
    """Puts away the job id that a line was written with."""

    def filter(self, record: logging.LogRecord) -> bool:
        job_id = record.__dict__.pop("job_id", None)
        if job_id is not None:
            record.__dict__[STASHED_JOB_ID] = job_id
        return True


class _WriteContext(logging.Filter):
    """Writes our ids into the line; Ray's job id leaves it."""

    def filter(self, record: logging.LogRecord) -> bool:
        log_context, fields = current(), record.__dict__
        fields.pop("job_id", None)
        if job_id := fields.pop(STASHED_JOB_ID, "") or log_context.job_id:
            fields["job_id"] = job_id
        if log_context.request_id:
            fields["request_id"] = log_context.request_id
        return True
