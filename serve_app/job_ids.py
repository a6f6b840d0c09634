"""Job ids: how they are made, and the only place that says what one looks like."""

from __future__ import annotations

import re
import secrets

JOB_ID_PATTERN = "[0-9a-f]{32}"

_JOB_ID = re.compile(JOB_ID_PATTERN)


def new_job_id() -> str:
    """128 random bits as 32 hex digits: not guessable, safe in file names."""
    return secrets.token_hex(16)


def is_job_id(text: str) -> bool:
    """Whether the text has the form of a job id."""
    return _JOB_ID.fullmatch(text) is not None
