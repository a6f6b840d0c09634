"""What a run on the simulated device has done: kernels, forwards and synchronisations, by source."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from deployments.engine.fiber import current_fiber
from tests.device_sim import sources
from tests.device_sim.costs import Cost, CostBySource
from tests.device_sim.meeting import Meeting
from tests.device_sim.memory import DeviceMemory, Scope

# functions of the engine that run forwards to prove a batch size, not for a request
PROOFS = frozenset({"run_trial", "is_joint_exact", "is_batch_invariant"})


@dataclass(slots=True)
class Forward:
    """One execution of a module, for requests or for a proof."""

    module: str  # class and method, as the engine's seams are named
    rows: int
    thread: str
    is_proof: bool
    cost: CostBySource = field(default_factory=CostBySource)
    memory: Scope = field(default_factory=Scope)
    failed: str = ""  # the error's class


@dataclass(slots=True)
class Sync:
    """One line at which the host waits for the device."""

    kind: str
    source: sources.Source  # the innermost line
    ours: sources.Source  # the innermost line of deployments/ that led to it
    thread: str
    count: int = 0
    steps: set[tuple[int, int]] = field(default_factory=set)  # in fibers: those between first and last step
    forwards: set[int] = field(default_factory=set)  # outside of fibers: after how many forwards


def is_denoiser(module: str) -> bool:
    """Whether a forward of this name is a denoising step."""
    return "Transformer" in module or "UNet" in module


class Measurements:
    """All of a run. The device calls its methods under its lock."""

    def __init__(self, memory: DeviceMemory, lock: threading.RLock) -> None:
        self._memory = memory
        self._local = threading.local()
        self.meeting = Meeting(lock)
        memory.after_allocation = self.meeting.after_allocation
        self.begin_part()

    def begin_part(self) -> None:
        """Measure from here on."""
        self.total = CostBySource()
        self.forwards: list[Forward] = []
        self.syncs: dict[tuple[str, sources.Source, sources.Source, str], Sync] = {}
        self.mixing: Counter[str] = Counter()

    @contextlib.contextmanager
    def forward(self, module: str, rows: int) -> Iterator[Forward]:
        """Count what this thread does inside the block to one forward."""
        running = Forward(module, rows, _thread_name(), sources.is_running(PROOFS))
        running.memory = self._memory.open_scope()
        outer = self._running
        self._local.forwards = (*outer, running)
        self.forwards.append(running)
        stops = self.meeting.begins(module, rows, running.memory)
        try:
            yield running
        except Exception as error:
            running.failed = type(error).__name__
            raise
        finally:
            self._local.forwards = outer
            self._memory.close_scope(running.memory)
            self.meeting.ends(module, rows, running.memory.peak)
            if is_denoiser(module):
                self.meeting.denoised(stops)

    def launched(self, cost: Cost) -> None:
        """A kernel has been launched."""
        package = sources.package_of(sources.innermost())
        self.total.add(package, cost)
        for running in self._running:
            running.cost.add(package, cost)

    def waited(self, kind: str) -> None:
        """The host has waited for the current stream."""
        source, ours, thread = sources.innermost(), sources.innermost_of_ours(), _thread_name()
        key = (kind, source, ours, thread)
        sync = self.syncs.setdefault(key, Sync(*key))
        sync.count += 1
        fiber = current_fiber()
        if fiber is None:
            sync.forwards.add(len(self.forwards))
        elif 0 < fiber.job.steps_done < fiber.job.steps - 1:
            sync.steps.add((id(fiber), fiber.job.steps_done))

    @property
    def _running(self) -> tuple[Forward, ...]:
        return getattr(self._local, "forwards", ())


def _thread_name() -> str:
    """The thread's role, without the number of a pool's thread."""
    return threading.current_thread().name.split("_")[0]
