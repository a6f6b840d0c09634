"""The ids that log lines of one piece of work carry in both layers, and its place in a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass

from deployments.protocol.visible_text import visible

STASHED_JOB_ID = "weft_job_id"  # holds a line's own job id while Ray writes its own into job_id


@dataclass(frozen=True, slots=True)
class LogContext:
    """What a piece of work belongs to; empty strings where it belongs to none."""

    job_id: str = ""
    request_id: str = ""  # of the HTTP request that submitted it
    trace: str = ""  # W3C traceparent of that request's span


EMPTY = LogContext()
_LOGGINGS_OWN = frozenset((*logging.makeLogRecord({}).__dict__, "message", "asctime"))
_current: ContextVar[LogContext] = ContextVar("weft_log_context", default=EMPTY)


def current() -> LogContext:
    """The context of the task or thread that calls this."""
    return _current.get()


def bind(log_context: LogContext) -> Token[LogContext]:
    """Set the context of this task and of tasks it starts from now on. The token is for `unbind`."""
    return _current.set(log_context)


def unbind(token: Token[LogContext]) -> None:
    """Undo one `bind`, in the task that called it."""
    _current.reset(token)


def add_context_filters(handlers: Iterable[logging.Handler]) -> None:
    """Add the ids of the current context to every line that these handlers write.

    Ray's own filters write the id of Ray's job into `job_id` and that of Serve's call into `request_id`: one
    filter of ours runs before them and one after them.
    """
    for handler in handlers:
        if not any(isinstance(known, _WriteContext) for known in handler.filters):
            handler.filters.insert(0, _StashJobId())
            handler.addFilter(_WriteContext())
            handler.addFilter(_EscapeControls())


def join_serve_log(package: str) -> None:
    """Send the log lines of `package` to the handlers that Serve gave this replica.

    Without it Python's root logger would drop every line below WARNING.
    """
    ours, serves = logging.getLogger(package), logging.getLogger("ray.serve")
    add_context_filters(serves.handlers)
    ours.handlers, ours.propagate = serves.handlers, False
    ours.setLevel(serves.level)


class _StashJobId(logging.Filter):
    """Saves the job id that a line was written with before Ray overwrites it."""

    def filter(self, record: logging.LogRecord) -> bool:
        job_id = record.__dict__.pop("job_id", None)
        if job_id is not None:
            record.__dict__[STASHED_JOB_ID] = job_id
        return True


class _WriteContext(logging.Filter):
    """Writes the context's ids into the line in place of Ray's."""

    def filter(self, record: logging.LogRecord) -> bool:
        log_context, fields = current(), record.__dict__
        fields.pop("job_id", None)
        if job_id := fields.pop(STASHED_JOB_ID, "") or log_context.job_id:
            fields["job_id"] = job_id
        if log_context.request_id:
            fields["request_id"] = log_context.request_id
        return True


class _EscapeControls(logging.Filter):
    """Keeps a line one line: text of a caller in it can neither end it nor steer a terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        escaped = visible(message)
        if escaped != message:
            record.msg, record.args = escaped, None
        for name, value in record.__dict__.items():
            if type(value) is str and name not in _LOGGINGS_OWN:
                record.__dict__[name] = visible(value)
        return True
