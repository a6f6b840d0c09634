"""Settings in the environment of the service that tests/graph shares: only its own tests see them.

The service runs to the end of a session, and its process of the suite runs other tests after the graph's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_before: dict[str, str | None] = {}  # by name, while the service runs


def apply(settings: Mapping[str, str]) -> None:
    """Set these for as long as the service runs."""
    for name, value in settings.items():
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def remove() -> None:
    """Restore what was set before."""
    _set(_before)
    _before.clear()


@contextmanager
def hidden() -> Iterator[None]:
    """The environment as it is without the service."""
    settings = {name: os.environ.get(name) for name in _before}
    _set(_before)
    try:
        yield
    finally:
        _set({name: value for name, value in settings.items() if name in _before})  # the service may be gone


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
