"""Pinned memory of the host: which tensors are in it, and copies that may still be using them.

A copy from or to pinned memory with non_blocking=True runs later, on a stream. Until the host has waited for
it, it may neither write what the copy reads nor read what the copy writes. Memory that is freed meanwhile is
safe: torch's allocator of pinned memory waits for the copies before it hands a block out again.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.device_sim import sources
from tests.device_sim.clock import current_stream, host

UNSTAGED_BYTES = 64 * 2**10  # a larger copy from pageable memory waits for the stream before it


@dataclass(slots=True)
class _Pinned:
    reference: StorageWeakRef  # keeps the key from being used again
    reads: dict[int, int] = field(default_factory=dict)  # by stream: the last copy from it
    writes: dict[int, int] = field(default_factory=dict)  # by stream: the last copy to it


class HostMemory:
    """Pinned storages. `lock` is the device's."""

    def __init__(self, lock: threading.RLock, hazards: Counter[str]) -> None:
        """hazards: where races for host memory are counted."""
        self._lock = lock
        self._pinned: dict[int, _Pinned] = {}
        self._hazards = hazards

    def pin(self, tensor: Tensor) -> Tensor:
        """Count this tensor's storage as pinned."""
        with self._lock:
            for key in [key for key, known in self._pinned.items() if known.reference.expired()]:
                del self._pinned[key]
            storage = tensor.untyped_storage()
            self._pinned.setdefault(storage._cdata, _Pinned(StorageWeakRef(storage)))
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return self._known(tensor) is not None

    def copied_from(self, tensor: Tensor) -> None:
        """The kernel launched last on the current stream copies from it."""
        known = self._known(tensor)
        if known is not None:
            stream = current_stream()
            known.reads[stream.number] = stream.kernels

    def copied_to(self, tensor: Tensor) -> None:
        """The kernel launched last on the current stream copies to it."""
        known = self._known(tensor)
        if known is not None:
            stream = current_stream()
            known.writes[stream.number] = stream.kernels

    def check_use(self, tensor: Tensor, *, writes: bool) -> None:
        """The host reads or writes this tensor now."""
        known = self._known(tensor)
        if known is None:
            return
        if not _finished(known.writes):
            self._hazards[f"the host uses what a copy still writes, at {sources.innermost()}"] += 1
        elif writes and not _finished(known.reads):
            self._hazards[f"the host writes what a copy still reads, at {sources.innermost()}"] += 1

    def _known(self, tensor: Tensor) -> _Pinned | None:
        return self._pinned.get(tensor.untyped_storage()._cdata) if self._pinned else None


def _finished(copies: dict[int, int]) -> bool:
    """Whether the host knows that all these copies have finished."""
    return all(host.covers(stream, kernel) for stream, kernel in copies.items())
