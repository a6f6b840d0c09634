"""All errors of Weft as one tree. A message says what was wrong and what would be right.

WeftError
|-- BadRequest         the request cannot be served as it is written
|-- TooLarge           a body or a file is over its limit
|-- Unauthorized       no key, or an unknown one
|-- Forbidden          a known caller who may not do this
|-- NotFound           no such job, model or file for this caller
|-- Conflict           the thing is in another state than the call needs
|-- QuotaExceeded      the caller has used up its quota
|-- RateLimited        too many calls in too short a time
|-- Overloaded         the service is full; try again later
|-- ModelUnavailable   the model is not loaded, its replica died, or its store is down
|   `-- NodeLost       the machine of its replica is gone: no fault of the request
|-- ModelFailed        the model cannot be loaded until its operator changes something
|-- OutOfMemory        a single request does not fit the device
|-- Cancelled          the job was cancelled
`-- Internal           a bug of Weft
    `-- NotFinite      the model computed NaN or infinity; has a metric of its own
"""

from __future__ import annotations

from typing import ClassVar


class WeftError(Exception):
    """The root: a message for the caller, the request field at fault, and when to try again."""

    kind: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the request field at fault
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)


class BadRequest(WeftError):
    kind = "bad_request"


class TooLarge(WeftError):
    kind = "too_large"


class Unauthorized(WeftError):
    kind = "unauthorized"


class Forbidden(WeftError):
    kind = "forbidden"


class NotFound(WeftError):
    kind = "not_found"


class Conflict(WeftError):
    kind = "conflict"


class QuotaExceeded(WeftError):
    kind = "quota_exceeded"


class RateLimited(WeftError):
    kind = "rate_limited"
    retryable = True


class Overloaded(WeftError):
    kind = "overloaded"
    retryable = True


class ModelUnavailable(WeftError):
    kind = "model_unavailable"
    retryable = True


class NodeLost(ModelUnavailable):
    """The node of a replica has ended or cannot be reached. Such an attempt does not count."""


class ModelFailed(WeftError):
    kind = "model_failed"


class OutOfMemory(WeftError):
    kind = "out_of_memory"


class Cancelled(WeftError):
    kind = "cancelled"


class Internal(WeftError):
    kind = "internal"


class NotFinite(Internal):
    """The model computed NaN or infinity. Callers see an internal error; it has a metric of its own."""


KINDS: dict[str, type[WeftError]] = {
    error.kind: error
    for error in (
        BadRequest,
        TooLarge,
        Unauthorized,
        Forbidden,
        NotFound,
        Conflict,
        QuotaExceeded,
        RateLimited,
        Overloaded,
        ModelUnavailable,
        ModelFailed,
        OutOfMemory,
        Cancelled,
        Internal,
    )
}


def _rebuild(cls: type[WeftError], message: str, param: str | None, retry_after_s: float | None) -> WeftError:
    """Pickles the keyword arguments too, which Exception's own __reduce__ loses between processes."""
    return cls(message, param=param, retry_after_s=retry_after_s)
