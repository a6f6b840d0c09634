"""What the caller should know of a result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A value of the request that was replaced, an input that was changed, or a promise that could not be
    kept. Reported as a warning."""

    code: str
    param: str
    message: str
    of_result: bool = False  # found while the request ran, so a copy of its files has it too
