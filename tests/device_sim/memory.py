"""Memory of the simulated device: what lives, how much at most, its limit, and races for it.

Storages are counted as torch's caching allocator hands them out, in blocks of 512 bytes; what the allocator
keeps beyond them (fragments of its segments) and workspaces of libraries are not modelled.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tests.device_sim import sources
from tests.device_sim.clock import SimStream, current_stream, host

BLOCK = 512  # bytes; the smallest allocation


@dataclass(slots=True, eq=False)
class Scope:
    """A part of the run whose own memory is measured: storages that its thread makes while it is open."""

    live: int = 0
    peak: int = 0


@dataclass(slots=True, eq=False)
class _Storage:
    size: int
    stream: SimStream  # on which it was allocated: its block is reused there without waiting
    source: str
    scopes: tuple[Scope, ...]
    tensors: set[weakref.ref[Tensor]] = field(default_factory=set)
    write: tuple[int, int] | None = None  # stream and kernel of the last one
    reads: dict[int, int] = field(default_factory=dict)  # last kernel by stream, since that write
    uses: dict[int, int] = field(default_factory=dict)  # last kernel by stream
    recorded: set[int] = field(default_factory=set)  # streams named to record_stream


class DeviceMemory:
    """All storages on the device. `lock` is the device's: every method runs under it."""

    def __init__(self, lock: threading.RLock, total: int) -> None:
        """total: bytes of the device."""
        self._lock = lock
        self._storages: dict[int, _Storage] = {}
        self._scopes = threading.local()
        self.total = total
        self.limit = total  # an allocation above it raises torch.OutOfMemoryError
        self.live = 0
        self.before = 0  # when this part of the run began
        self.peak = 0  # of this part
        self.peak_since_reset = 0  # torch.cuda.max_memory_allocated
        self.refused = 0  # allocations above the limit
        self.after_allocation: Callable[[], None] = lambda: None
        self.live_by_source: Counter[str] = Counter()
        self.hazards: Counter[str] = Counter()
        self._before_by_source: Counter[str] = Counter()

    def begin_part(self) -> None:
        """Measure from here on; storages and races so far belong to the part before."""
        self.before = self.peak = self.live
        self.refused = 0
        self.hazards.clear()
        self._before_by_source = self.live_by_source.copy()

    def grown(self) -> dict[str, int]:
        """Bytes by the line that allocated them, more than when this part began; the largest first."""
        grown = self.live_by_source.copy()
        grown.subtract(self._before_by_source)
        return dict(grown.most_common(12))

    def open_scope(self) -> Scope:
        """Measure what this thread allocates until close_scope."""
        scope = Scope()
        self._scopes.open = (*getattr(self._scopes, "open", ()), scope)
        return scope

    def close_scope(self, scope: Scope) -> None:
        self._scopes.open = tuple(other for other in self._scopes.open if other is not scope)

    def hold(self, tensor: Tensor) -> None:
        """Count the tensor's storage until all its tensors are gone.

        Raises torch.OutOfMemoryError when it exceeds the limit; the tensor is then not counted.
        """
        self._storage_of(tensor)

    def record_stream(self, tensor: Tensor, stream: SimStream) -> None:
        """torch.Tensor.record_stream: the block is not reused before this stream is done with it."""
        self._storage_of(tensor).recorded.add(stream.number)

    def read(self, tensor: Tensor) -> None:
        """The kernel launched last on the current stream reads it."""
        storage = self._storage_of(tensor)
        stream = current_stream()
        self._check_writer(storage, stream)
        storage.reads[stream.number] = storage.uses[stream.number] = stream.kernels

    def write(self, tensor: Tensor) -> None:
        """The kernel launched last on the current stream writes it."""
        storage = self._storage_of(tensor)
        stream = current_stream()
        self._check_writer(storage, stream)
        for number, kernel in storage.reads.items():
            if number != stream.number and not stream.clock.covers(number, kernel):
                self._hazard(f"stream {stream.number} writes what stream {number} still reads", storage)
        storage.write = (stream.number, stream.kernels)
        storage.reads.clear()
        storage.uses[stream.number] = stream.kernels

    def _storage_of(self, tensor: Tensor) -> _Storage:
        known: _Storage | None = getattr(tensor, "_sim_storage", None)
        if known is not None:
            return known
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = self._allocate(untyped.nbytes())
        storage.tensors.add(weakref.ref(tensor, partial(self._on_freed, key, storage)))
        tensor._sim_storage = storage  # type: ignore[attr-defined]
        return storage

    def _allocate(self, nbytes: int) -> _Storage:
        size = -(-nbytes // BLOCK) * BLOCK
        if self.live + size > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity "
                f"of {self.limit / 2**30:.2f} GiB, of it {(self.limit - self.live) / 2**20:.0f} MiB free."
            )
        scopes = getattr(self._scopes, "open", ())
        source = str(sources.innermost())
        self.live += size
        self.live_by_source[source] += size
        self.peak = max(self.peak, self.live)
        self.peak_since_reset = max(self.peak_since_reset, self.live)
        for scope in scopes:
            scope.live += size
            scope.peak = max(scope.peak, scope.live)
        self.after_allocation()
        return _Storage(size, current_stream(), source, scopes)

    def _on_freed(self, key: int, storage: _Storage, reference: weakref.ref[Tensor]) -> None:
        """One tensor of a storage is gone; with the last one, its block is free for its stream."""
        with self._lock:
            storage.tensors.discard(reference)
            if storage.tensors:
                return
            del self._storages[key]
            self.live -= storage.size
            self.live_by_source[storage.source] -= storage.size
            for scope in storage.scopes:
                scope.live -= storage.size
            self._check_free(storage)

    def _check_free(self, storage: _Storage) -> None:
        owner = storage.stream
        for number, kernel in storage.uses.items():
            safe = number == owner.number or number in storage.recorded
            if not safe and not host.covers(number, kernel) and not owner.clock.covers(number, kernel):
                self._hazard(f"freed on stream {owner.number} while stream {number} may use it", storage)

    def _check_writer(self, storage: _Storage, stream: SimStream) -> None:
        if storage.write is None:
            return
        number, kernel = storage.write
        if number != stream.number and not stream.clock.covers(number, kernel):
            self._hazard(f"stream {stream.number} uses what stream {number} still writes", storage)

    def _hazard(self, what: str, storage: _Storage) -> None:
        self.hazards[f"{what}; allocated in {storage.source}, at {sources.innermost()}"] += 1
