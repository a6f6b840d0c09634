"""The account of one device's memory: what holds it, what else fits, and how many rows a forward may have.

Pure: no torch, no clock; what the device says is passed in (hardware.py). docs/memory.md explains the parts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Literal, get_args

from deployments.models.activations import Activations, Lane

GIB = 2**30

# torch reads the first of these that is set
ALLOC_CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
REFRESH_EVERY = 64  # calls of rows_that_fit between two looks at what caches hold

Part = Literal["weights", "loras", "stacks", "prompts", "requests"]
Thing = tuple[str, Hashable]  # of which model, and what: its pipeline, a ControlNet, a LoRA's slot
PIPELINE = "pipeline"  # the thing that is a model's own weights


@dataclass(frozen=True, slots=True)
class Needed:
    """Bytes of the device that something needs."""

    held: int  # once it is there
    loading: int = 0  # beyond those while it is loaded, such as a layer in its old form that is quantised
    picture: int | None = None  # to be kept free for one picture of its model; None: as it is


def use_expandable_segments(hip_alloc_conf: str = "") -> None:
    """Have torch's allocator grow its segments, so that freed memory of one size serves another.

    Call this before torch is imported. A value that the operator has set stays.
    hip_alloc_conf: the one that was set for AMD GPUs.
    """
    if hip_alloc_conf:
        os.environ["PYTORCH_HIP_ALLOC_CONF"] = hip_alloc_conf
    if not any(name in os.environ for name in ALLOC_CONF):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def gib(size_bytes: float) -> str:
    """The size for a message, such as "3.10 GiB"."""
    return f"{size_bytes / GIB:.2f} GiB"


class DeviceMemory:
    """Bytes of one device by part. Any thread may call; nothing here waits.

    A part is what was claimed under it, by model and thing, and what `watch` reads of caches that grow by
    themselves. Besides, space is kept for the forwards of one request.
    """

    def __init__(self, read_limit: Callable[[], int | None]) -> None:
        """read_limit: what may be allocated in all, read again before each claim because other processes on
        the device come and go; None: there is no limit, and bytes are only counted."""
        self._read_limit = read_limit
        self._limit = read_limit()
        self._claims: dict[Part, dict[Thing, int]] = {part: {} for part in get_args(Part)}
        self._watched: dict[object, tuple[Part, Callable[[], int]]] = {}
        self._expected: dict[str, int] = {}  # space for one picture, by model
        self._loading: dict[Thing, int] = {}  # beyond what is claimed, of things that are being loaded
        self._activations = Activations()
        self._requests = 0  # of running requests and workspaces: what a forward found and no other part holds
        self._rows: dict[Hashable, int | None] = {}  # that fit, by key, while nothing has changed
        self._asked = 0  # calls of rows_that_fit
        self._lock = threading.RLock()

    # ---- what is there ----

    @property
    def limit_bytes(self) -> int | None:
        """Bytes that all parts and the forwards may have together; None: no limit."""
        return self._limit

    @property
    def held(self) -> dict[Part, int]:
        """Bytes by part."""
        with self._lock:
            parts = {part: sum(claims.values()) for part, claims in self._claims.items()}
            for part, read in self._watched.values():
                parts[part] += read()
            parts["requests"] += self._requests
            return parts

    @property
    def working_bytes(self) -> int:
        """Space kept for the forwards of one request: as measured, at least what the cards of the loaded
        models state.

        A model that is being loaded makes no pictures: what its loading takes is beside those of others only.
        """
        with self._lock:
            measured = self._activations.of_one_call("steps") + self._activations.of_one_call("auxiliary")
            loading = {model for model, what in self._loading if what == PIPELINE}
            running = [size for model, size in self._expected.items() if model not in loading]
            beside_loading = max(measured, *running, 0) + sum(self._loading.values())
            return max(beside_loading, *self._expected.values(), 0)

    @property
    def activation_bytes(self) -> int:
        """The most that forwards of both lanes have taken together."""
        with self._lock:
            return self._activations.largest("steps") + self._activations.largest("auxiliary")

    def most_bytes(
        self, thing: Thing, needed: Needed = Needed(0), beside: Collection[Thing] = ()
    ) -> int | None:
        """What a thing could hold beside its model's own weights, a picture and `beside`, all else freed."""
        model, what = thing
        with self._lock:
            if self._limit is None:
                return None
            kept = {(model, PIPELINE), *beside} - {thing}
            others = sum(claims.get(one, 0) for one in kept for claims in self._claims.values())
            space = self._expected.get(model, 0) if needed.picture is None else needed.picture
            space = max(space, needed.loading) if what == PIPELINE else space + needed.loading
            return max(0, self._limit - others - space)

    # ---- forwards ----

    def wants_measurement(self, key: Hashable, rows: int) -> bool:
        """Whether a forward of so many rows should be measured."""
        with self._lock:
            return self._activations.wants(key, rows)

    def record_forward(
        self, lane: Lane, key: Hashable, rows: int, *, before: int, peak: int, alone: bool = True
    ) -> None:
        """A forward ran. before, peak: bytes allocated before it and at most during it.

        What was allocated before and no part holds belongs to running requests. alone: see Activations.
        """
        with self._lock:
            self._rows.clear()
            self._activations.record(lane, key, rows, peak - before, alone=alone)
            if alone:
                self._requests = 0
                self._requests = max(0, before - sum(self.held.values()))

    def forget_forwards(self, keys: Collection[Hashable]) -> None:
        """What forwards of these keys took counts no more: their model is unloaded."""
        with self._lock:
            self._rows.clear()
            self._activations.forget(keys)

    def rows_that_fit(self, key: Hashable) -> int | None:
        """Rows that a forward of this key may have beside all that is held and the other lane; None where
        there is no limit or nothing was measured."""
        if self._limit is None:
            return None
        with self._lock:
            self._asked += 1
            if self._asked % REFRESH_EVERY == 0:
                self._rows.clear()
            if key not in self._rows:
                free = self._limit - sum(self.held.values()) - self._activations.other_lane(key)
                self._rows[key] = self._activations.rows_that_fit(key, free)
            return self._rows[key]

    def weights_of(self, model: str) -> int:
        """Bytes of this model's weights."""
        with self._lock:
            return sum(size for thing, size in self._claims["weights"].items() if thing[0] == model)

    # ---- who holds what ----

    def claim(
        self, part: Part, thing: Thing, size_bytes: int, *, loading: int = 0, picture: int | None = None
    ) -> bool:
        """Let a thing hold so many bytes if they fit; otherwise nothing changes. Less than now always fits.

        loading, picture: see Needed. What was claimed for loading before is released.
        """
        with self._lock:
            self._limit = self._read_limit()
            before, claims, model = self._total(), dict(self._claims[part]), thing[0]
            was_loading, was_expected = dict(self._loading), dict(self._expected)
            self.record(part, thing, size_bytes)
            if loading:
                self._loading[thing] = loading
            if picture is not None:
                self.expect_working(model, picture)
            total = self._total()
            if self._limit is None or total <= max(self._limit, before):
                return True
            self._claims[part], self._loading, self._expected = claims, was_loading, was_expected
            return False

    def record(self, part: Part, thing: Thing, size_bytes: int) -> None:
        """A thing that is loaded holds so many bytes, whether they fit or not. 0: it is forgotten."""
        with self._lock:
            self._rows.clear()
            self._loading.pop(thing, None)
            if size_bytes:
                self._claims[part][thing] = size_bytes
            else:
                self._claims[part].pop(thing, None)

    def release(self, part: Part, thing: Thing) -> None:
        """A thing holds nothing any more."""
        self.record(part, thing, 0)

    def release_model(self, model: str) -> None:
        """The model is unloaded, or could not be loaded: its weights and its pictures need nothing more."""
        with self._lock:
            self._rows.clear()
            weights = self._claims["weights"]
            self._claims["weights"] = {thing: size for thing, size in weights.items() if thing[0] != model}
            self._loading = {thing: size for thing, size in self._loading.items() if thing[0] != model}
            self._expected.pop(model, None)

    def watch(self, part: Part, read: Callable[[], int]) -> Callable[[], None]:
        """Count what `read` returns under this part, until the returned function is called."""
        key = object()
        with self._lock:
            self._watched[key] = part, read

        def end() -> None:
            with self._lock:
                self._watched.pop(key, None)

        return end

    def expect_working(self, model: str, size_bytes: int) -> None:
        """Keep space for one picture of this model, which is loaded; 0: for none any more."""
        with self._lock:
            self._expected[model] = size_bytes
            if size_bytes <= 0:
                del self._expected[model]

    def _total(self) -> int:
        """All that is held, and the space for forwards."""
        return sum(self.held.values()) + self.working_bytes
