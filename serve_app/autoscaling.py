"""How many replicas a model gets: `Scaler` decides on plain numbers, `WorkPolicy` is its shell inside Serve.

Serve runs the policy in its controller, pickled by value with this module: nothing here may block, and
nothing beyond the standard library is imported at the top. What it promises: docs/scaling.md.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

NAMESPACE = b"weft"  # of Ray's key-value store, in which dispatchers tell what waits
TOLD_TTL_S = 30.0  # a word of the dispatchers that is older counts no more
READ_EVERY_S = 1.0
READ_TIMEOUT_S = 2.0
OVERDUE_S = 5.0  # a replica that should have started long ago is expected this much later
SAMPLE_EVERY_S = 1.0

# what every replica reports; see ImageModel.record_autoscaling_stats
DONE_S = "weft_work_done_s"  # ever since it started
LEFT_S = "weft_work_left_s"  # of the requests that it has
OPEN = "weft_requests_open"
REQUEST_S = "weft_request_work_s"  # mean of the latest; 0 before the first


@dataclass(frozen=True, slots=True)
class Knobs:
    """Values of `serving.autoscaling` in a card. Work is in seconds that one replica needs for it."""

    utilization: float = 0.75  # of the replicas that the rate of arriving work asks for
    rate_window_s: float = 600.0  # over which that rate is measured
    near_window_s: float = 240.0  # and over which the one that is expected until new replicas run
    drain_s: float = 60.0  # within which new replicas shall clear what the others cannot
    wait_s: float = 20.0  # of work per replica may be left by then: a wait that is no reason for more
    hold_s: float = 180.0  # fewer replicas only when so long no more were wanted
    idle_s: float = 600.0  # none at all only when so long nothing was there to do
    cold_start_s: float = 60.0  # of a replica, until the first has been seen
    request_s: float = 5.0  # work of a request, until the first has been seen

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization is {self.utilization}; it must be above 0 and at most 1")
        for name in ("rate_window_s", "near_window_s", "drain_s", "cold_start_s", "request_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("wait_s", "hold_s", "idle_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True, slots=True)
class Seen:
    """A deployment at one moment. Work is in seconds of one replica."""

    now: float  # seconds
    running: int  # replicas that work
    target: int  # replicas that were asked for; those above `running` are starting
    done_s: float  # work done since the scaler began to look
    backlog_s: float  # work that waits or is under way, wherever it is


class Scaler:
    """Replicas for the rate at which work arrives, and for a backlog that those asked for will not clear.

    The rate needs no counting of arrivals: what arrived is what was done plus what the backlog grew by.
    """

    def __init__(self, knobs: Knobs) -> None:
        self.cold_start_s = knobs.cold_start_s  # learned
        self._knobs = knobs
        self._arrived: deque[tuple[float, float]] = deque()  # time, work that ever arrived until then
        self._wanted: deque[tuple[float, int]] = deque()  # time, replicas; none is followed by a greater one
        self._starting: deque[float] = deque()  # when those were asked for that do not run yet
        self._running: int | None = None
        self._busy_at = -math.inf

    def decide(self, seen: Seen, least: int, most: int) -> int:
        """The replicas to ask for now, between `least` and `most`."""
        if self._running is None:  # whoever decided before (another controller) may have had reasons
            self._busy_at = seen.now
            self._want(seen.now, seen.target)
        self._follow_starts(seen)
        self._note(seen)
        lasting = math.ceil(self.rate(seen.now) / self._knobs.utilization - 1e-6)
        replicas = max(lasting, self._for_backlog(seen, self.rate(seen.now, self._knobs.near_window_s)))
        if seen.backlog_s > 0:
            replicas = max(replicas, 1)
        if seen.backlog_s > 0 or self._fresh(seen):
            self._busy_at = seen.now
        self._want(seen.now, replicas)
        replicas = self._held(seen, replicas)
        if seen.now - self._busy_at < self._knobs.idle_s:
            replicas = max(replicas, min(1, seen.target))  # the last one waits longer than the others
        return max(least, min(most, replicas))

    def rate(self, now: float, window_s: float | None = None) -> float:
        """Work that arrived lately, per second: how many replicas would be busy all the time.

        As if nothing came before the history began: a first request is not a rate yet.
        """
        window_s = self._knobs.rate_window_s if window_s is None else window_s
        if not self._arrived:
            return 0.0
        first = bisect_right(self._arrived, now - window_s, key=lambda sample: sample[0])
        first_at, came = self._arrived[max(0, first - 1)]
        return max(0.0, self._arrived[-1][1] - came) / max(window_s, now - first_at)

    def _note(self, seen: Seen) -> None:
        """What ever arrived until now."""
        if not self._arrived or seen.now - self._arrived[-1][0] >= SAMPLE_EVERY_S:
            self._arrived.append((seen.now, seen.done_s + seen.backlog_s))
        oldest = seen.now - max(self._knobs.rate_window_s, self._knobs.near_window_s)
        while len(self._arrived) > 1 and self._arrived[1][0] <= oldest:
            self._arrived.popleft()

    def _fresh(self, seen: Seen) -> bool:
        """Whether work was done or came since the last look."""
        return len(self._arrived) > 1 and self._arrived[-1][1] > self._arrived[-2][1] + 1e-9

    def _for_backlog(self, seen: Seen, rate: float) -> int:
        """Replicas that clear backlog and arrivals `drain_s` after one asked for now has started.

        Those that are starting count as what they will have done by then.
        """
        drain_s, horizon_s = self._knobs.drain_s, self.cold_start_s + self._knobs.drain_s
        work_s = seen.backlog_s + rate * horizon_s
        starting = [self._starts_in_s(asked_at, seen.now) for asked_at in self._starting]
        asked = seen.running + len(starting)
        coming_s = sum(max(0.0, horizon_s - starts_in_s) for starts_in_s in starting)
        wait_s = self._knobs.wait_s
        short_s = work_s - seen.running * horizon_s - coming_s - asked * wait_s
        if short_s > 0:
            return asked + math.ceil(short_s / (drain_s + wait_s))
        return math.ceil(work_s / (horizon_s + wait_s) - 1e-6)

    def _starts_in_s(self, asked_at: float, now: float) -> float:
        return max(OVERDUE_S, asked_at + self.cold_start_s - now)

    def _follow_starts(self, seen: Seen) -> None:
        """Keep when each starting replica was asked for; learn how long those took that now run."""
        came = 0 if self._running is None else max(0, seen.running - self._running)
        for _ in range(min(came, len(self._starting))):
            took_s = seen.now - self._starting.popleft()
            self.cold_start_s += (took_s - self.cold_start_s) / 4
        self._running = seen.running
        while len(self._starting) > max(0, seen.target - seen.running):
            self._starting.pop()  # Serve stops the latest first
        while len(self._starting) < seen.target - seen.running:
            self._starting.append(seen.now)

    def _want(self, now: float, replicas: int) -> None:
        while self._wanted and self._wanted[-1][1] <= replicas:
            self._wanted.pop()
        self._wanted.append((now, replicas))

    def _held(self, seen: Seen, replicas: int) -> int:
        """Up at once; down to the most that was wanted within `hold_s`."""
        while len(self._wanted) > 1 and self._wanted[0][0] <= seen.now - self._knobs.hold_s:
            self._wanted.popleft()
        return replicas if replicas > seen.target else max(replicas, min(seen.target, self._wanted[0][1]))


@dataclass(frozen=True, slots=True)
class Told:
    """What dispatchers say of one deployment; times are of the machines' clocks."""

    waiting: int  # jobs in the store
    running: int  # jobs that dispatchers have given to Serve
    at: float


def told_key(app_name: str, deployment: str) -> bytes:
    return f"demand:{app_name}#{deployment}".encode()


def tell(app_name: str, deployment: str, waiting: int, running: int) -> None:
    """Leave word for the policy. Blocks for one call to Ray's head."""
    from ray.experimental.internal_kv import _internal_kv_put

    word = json.dumps({"waiting": waiting, "running": running, "at": time.time()})
    _internal_kv_put(told_key(app_name, deployment), word.encode(), namespace=NAMESPACE)


def read(app_name: str, deployment: str) -> Told | None:
    """The latest word of the dispatchers, None without any. Blocks for one call to Ray's head."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    gcs = internal_kv_get_gcs_client()  # type: ignore[no-untyped-call]
    word = gcs.internal_kv_get(told_key(app_name, deployment), NAMESPACE, timeout=READ_TIMEOUT_S)
    return None if word is None else Told(**json.loads(word))


class Listener:
    """The dispatchers' word of one deployment, asked for in a thread and given without waiting."""

    def __init__(self, ask: Callable[[str, str], Told | None] = read) -> None:
        self._ask = ask
        self._told: Told | None = None
        self._asked_at = -math.inf
        self._asking: asyncio.Future[Told | None] | None = None

    def __call__(self, app_name: str, deployment: str, now: float) -> Told | None:
        if self._asking is not None and self._asking.done():
            if not self._asking.cancelled() and self._asking.exception() is None:
                self._told = self._asking.result()
            self._asking = None
        if self._asking is None and now - self._asked_at >= READ_EVERY_S:
            self._asked_at = now
            self._asking = asyncio.get_running_loop().run_in_executor(None, self._ask, app_name, deployment)
        return self._told if self._told is not None and now - self._told.at < TOLD_TTL_S else None


class WorkPolicy:
    """A Scaler fed with what Serve's controller knows; Serve calls it several times a second.

    A backlog is what the replicas report in seconds of work, and the requests that have not reached one,
    at the mean of the latest: those in the store by the dispatchers' word, others as handles tell.
    """

    def __init__(self, **knobs: float) -> None:
        """knobs: see Knobs. Raises TypeError for one that does not exist, ValueError for a bad value."""
        self.listen: Callable[[str, str, float], Told | None] = Listener()
        self._knobs = Knobs(**knobs)
        self._scaler = Scaler(self._knobs)
        self._request_s = self._knobs.request_s
        self._done: dict[str, float] | None = None  # by replica, as last reported
        self._done_s = 0.0

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        seen = self._seen(ctx)
        least, most = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
        return self._scaler.decide(seen, least, most), {}

    def _seen(self, ctx: AutoscalingContext) -> Seen:
        now = time.time() if ctx.current_time is None else ctx.current_time
        metrics = ctx.raw_metrics or {}
        done, left, held, means = (_latest(metrics, name) for name in (DONE_S, LEFT_S, OPEN, REQUEST_S))
        if self._done is not None:
            self._done_s += sum(max(0.0, did - self._done.get(replica, 0.0)) for replica, did in done.items())
        self._done = done
        if known := [mean_s for mean_s in means.values() if mean_s > 0]:
            self._request_s = sum(known) / len(known)
        told = self.listen(ctx.app_name or "", ctx.deployment_name, now)
        waiting, given = (0, 0) if told is None else (told.waiting, told.running)
        # given to Serve and not in any replica's report: still at a handle, or on the way
        on_the_way = max(0.0, given - sum(held.values()), ctx.total_queued_requests or 0.0)
        backlog_s = sum(left.values()) + (waiting + on_the_way) * self._request_s
        return Seen(now, ctx.current_num_replicas, ctx.target_num_replicas, self._done_s, backlog_s)


def autoscaling_policy(knobs: Mapping[str, float]) -> dict[str, Any]:
    """What `autoscaling_config.policy` shall be. Raises ValueError naming a knob that is wrong."""
    names = [field.name for field in fields(Knobs)]
    if unknown := sorted(set(knobs) - set(names)):
        raise ValueError(f"there is no knob {unknown[0]!r}; there is {', '.join(names)}")
    Knobs(**knobs)
    return {"policy_function": f"{__name__}:{WorkPolicy.__name__}", "policy_kwargs": dict(knobs)}


def _latest(metrics: Mapping[str, Any], name: str) -> dict[str, float]:
    """The last value that each replica reported under this name."""
    series = metrics.get(name, {})
    return {str(replica): points[-1].value for replica, points in series.items() if points}
