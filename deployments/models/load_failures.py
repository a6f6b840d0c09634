"""Models that could not be loaded: not tried again at once, and reported until they are loaded."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deployments.models.weight_cache import hub_token, local_path
from deployments.planning.local_files import gguf_file_here
from deployments.protocol.card import Weights
from deployments.protocol.errors import ModelUnavailable, OutOfMemory, WeftError

FIRST_PAUSE_S, MAX_PAUSE_S = 10.0, 300.0  # until a model that failed is tried again; doubled each time
NETWORK_PAUSE_S = 2.0  # of one that only the network kept from loading
MAX_FILES = 2_000  # of a folder that are looked at for a change

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Why a model is not loaded. Times are unix seconds."""

    kind: str
    message: str
    since: float  # of the first failure in a row
    tries: int
    retry_at: float  # the first request from then on tries again


@dataclass(frozen=True, slots=True)
class _Entry:
    failure: LoadFailure
    error: WeftError
    state: Hashable  # of what an operator may change, see `operator_state`


class LoadFailures:
    """The failures of one replica's models, by name. Used by its event loop and by loading threads."""

    def __init__(self, state_of: Callable[[str], Hashable], clock: Callable[[], float] = time.time) -> None:
        """state_of: what an operator may change for a model; a change lets it be tried again at once."""
        self._state_of = state_of
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def check(self, name: str) -> None:
        """Raises the error of the last try, unless it is time for another one or something has changed."""
        entry = self._entries.get(name)
        if entry is None or self._clock() >= entry.failure.retry_at or self._state_of(name) != entry.state:
            return
        left_s = max(1, round(entry.failure.retry_at - self._clock()))
        raise type(entry.error)(
            f"{entry.error.message} (tries: {entry.failure.tries}; tried again by a request in {left_s} s or "
            "later, or once its files or the token change)",
            param=entry.error.param,
            retry_after_s=float(left_s) if entry.error.retryable else None,
        )

    def record(self, name: str, error: WeftError) -> None:
        """The model could not be loaded for this reason."""
        with self._lock:
            before, now = self._entries.get(name), self._clock()
            tries = 1 if before is None else before.failure.tries + 1
            pause_s = min(FIRST_PAUSE_S * 2 ** min(tries - 1, 10), MAX_PAUSE_S)
            if isinstance(error, ModelUnavailable):
                pause_s = NETWORK_PAUSE_S
            if isinstance(error, OutOfMemory):
                pause_s = 0.0  # others may have freed theirs
            since = now if before is None else before.failure.since
            failure = LoadFailure(error.kind, error.message, since, tries, now + pause_s)
            # a copy: the frames of the error itself keep what was half loaded
            kept = type(error)(error.message, param=error.param)
            self._entries[name] = _Entry(failure, kept, self._state_of(name))
        logger.error("a model cannot be loaded: %s", error.message, extra={"model": name, "tries": tries})

    def clear(self, name: str) -> None:
        """The model is loaded."""
        self._entries.pop(name, None)

    def error_of(self, name: str) -> WeftError | None:
        """The error of the last try; None for a model that is loaded, or was never tried."""
        entry = self._entries.get(name)
        return None if entry is None else entry.error

    def report(self) -> dict[str, LoadFailure]:
        """By name, those that failed at their last try."""
        return {name: entry.failure for name, entry in list(self._entries.items())}


def operator_state(weights: Weights) -> Hashable:
    """What an operator changes to make these weights load: a folder's files, the hub's token."""
    if weights.repo is not None:
        return hub_token()
    if weights.is_remote:
        return None
    local = [gguf_file_here(file) for file in weights.gguf.values() if not file.is_remote]
    files = [entry for path in local if path is not None for entry in _status_of([str(path)])]
    return hub_token() if weights.needs_fetch else None, *_files_of(local_path(weights)), *files


def _files_of(folder: Path) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    for parent, _, names in os.walk(folder):
        found += _status_of(os.path.join(parent, name) for name in sorted(names))
        if len(found) >= MAX_FILES:
            break
    return found[:MAX_FILES]


def _status_of(paths: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of the last change of those that are there."""
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue
        yield path, status.st_size, status.st_mtime_ns
