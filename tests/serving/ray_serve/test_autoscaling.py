"""The autoscaling policy: what it promises in docs/scaling.md, on plain numbers and through Ray's wrapper."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.protocol.card import Serving
from deployments.protocol.errors import BadRequest
from deployments.replica import ModelReplica
from serve_app.app import _deployment
from serve_app.ray_serve.autoscaling import (
    DONE_S,
    OPEN_REQUESTS,
    REMAINING_S,
    REQUEST_S,
    AutoscalingParams,
    BacklogPolicy,
    DemandReader,
    Observation,
    ReportedDemand,
    Scaler,
    autoscaling_policy,
)
from serve_app.ray_serve.private_api import (
    DeploymentID,
    ReplicaID,
    TimeStampedValue,
    apply_autoscaling_config,
)

MOST = 50
COLD_START_S = 60.0


class Fluid:
    """A deployment under steady load: work arrives like water, replicas do a second of it per second."""

    def __init__(
        self, *, running: int = 0, params: AutoscalingParams | None = None, cold_start_s: float = COLD_START_S
    ) -> None:
        self.now = 0.0
        self.scaler = Scaler(params or AutoscalingParams())
        self.target = running
        self.ready_at = deque([0.0] * running)  # of each replica
        self.done_s = 0.0
        self.backlog_s = 0.0
        self.cold_start_s = cold_start_s
        self.targets: list[int] = []

    @property
    def running(self) -> int:
        return sum(ready_at <= self.now for ready_at in self.ready_at)

    def run(self, seconds: int, rate: float, minimum: int = 0) -> None:
        for _ in range(seconds):
            did = min(self.backlog_s + rate, float(self.running))
            self.backlog_s += rate - did
            self.done_s += did
            self.now += 1.0
            observed = Observation(self.now, self.running, self.target, self.done_s, self.backlog_s)
            self.target = self.scaler.decide(observed, minimum, MOST)
            self.targets.append(self.target)
            while len(self.ready_at) > self.target:
                self.ready_at.pop()
            while len(self.ready_at) < self.target:
                self.ready_at.append(self.now + self.cold_start_s)


def first(
    backlog_s: float, *, running: int = 0, target: int = 0, params: AutoscalingParams | None = None
) -> int:
    """What a scaler says that sees nothing but this."""
    return Scaler(params or AutoscalingParams()).decide(
        Observation(0.0, running, target, 0.0, backlog_s), 0, MOST
    )


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=2, max_size=2).map(sorted),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_more_backlog_never_means_fewer_replicas(backlogs: list[float], running: int, starting: int) -> None:
    less, more = (first(backlog_s, running=running, target=running + starting) for backlog_s in backlogs)
    assert less <= more


@settings(deadline=None)
@given(st.data(), st.integers(0, 5), st.integers(5, 20))
def test_bounds_hold_whatever_is_seen(data: st.DataObject, minimum: int, maximum: int) -> None:
    scaler, now, done_s, target = Scaler(AutoscalingParams()), 0.0, 0.0, 0
    for _ in range(data.draw(st.integers(1, 30))):
        now += data.draw(st.floats(0.1, 1000))
        done_s += data.draw(st.floats(0, 1e4))
        running = data.draw(st.integers(0, target))
        target = scaler.decide(
            Observation(now, running, target, done_s, data.draw(st.floats(0, 1e7))), minimum, maximum
        )
        assert minimum <= target <= maximum


@settings(deadline=None)
@given(st.floats(1, 5000), st.integers(1, 20))
def test_starting_replicas_count_as_capacity(backlog_s: float, running: int) -> None:
    """Replicas that are starting are not requested again."""
    scaler = Scaler(AutoscalingParams())
    target = scaler.decide(Observation(0.0, running, running, 0.0, backlog_s), 0, 10_000)
    for second in range(1, 30):  # they are still starting, and the others work
        left_s = max(0.0, backlog_s - running * second)
        observed = Observation(float(second), running, target, backlog_s - left_s, left_s)
        assert scaler.decide(observed, 0, 10_000) == target


def test_a_cold_start_is_not_answered_with_many_replicas() -> None:
    """Ray's default grows with the queue while replicas load; here they are known to be coming."""
    fluid = Fluid(running=4, cold_start_s=150.0)
    fluid.run(1200, rate=3.0)
    fluid.run(600, rate=6.0)
    # 8 serve 6.0 at 0.75; what gathered during the cold start takes a few more for a while
    assert max(fluid.targets) <= 14
    fluid.run(1800, rate=6.0)
    assert fluid.target == 8
    assert fluid.backlog_s < 1.0


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.9, 7.4, 20.0])
def test_constant_load_settles_and_never_flaps(rate: float) -> None:
    fluid = Fluid()
    fluid.run(1800, rate)
    settled = fluid.target
    assert rate < settled <= rate / 0.75 + 1
    fluid.targets.clear()
    fluid.run(1800, rate)
    assert set(fluid.targets) == {settled}


def test_fewer_only_after_the_hold() -> None:
    params = AutoscalingParams(hold_s=200.0, rate_window_s=60.0, near_window_s=60.0)
    fluid = Fluid(running=8, params=params)
    fluid.run(1000, rate=5.9)
    assert fluid.target == 8
    fluid.targets.clear()
    fluid.run(600, rate=2.0)
    assert fluid.target == 3
    fewer = next(second for second, target in enumerate(fluid.targets, 1) if target < 8)
    assert 200 <= fewer <= 200 + 60
    assert fluid.targets == sorted(fluid.targets, reverse=True)


def test_none_only_when_idle_for_long_and_back_with_the_first_request() -> None:
    params = AutoscalingParams(hold_s=60.0, idle_s=300.0, rate_window_s=60.0, near_window_s=60.0)
    fluid = Fluid(running=2, params=params)
    fluid.run(300, rate=1.0)
    fluid.targets.clear()
    fluid.run(600, rate=0.0)
    asleep = fluid.targets.index(0) + 1
    assert 300 <= asleep <= 302
    assert fluid.targets[asleep - 2] == 1
    fluid.run(1, rate=0.5)
    assert fluid.target == 1


def test_a_burst_on_a_sleeping_model_wakes_as_many_as_it_needs() -> None:
    assert first(1.0) == 1
    assert first(3600.0) > 10


def test_at_least_and_at_most_rule() -> None:
    assert Scaler(AutoscalingParams()).decide(Observation(0.0, 0, 0, 0.0, 0.0), 2, 5) == 2
    assert Scaler(AutoscalingParams()).decide(Observation(0.0, 2, 2, 0.0, 1e6), 2, 5) == 5


def test_cold_starts_are_learned() -> None:
    fluid = Fluid(cold_start_s=150.0, params=AutoscalingParams(cold_start_s=10.0))
    for rate in (1.0, 4.0, 8.0, 12.0, 16.0):
        fluid.run(900, rate)
    assert 100 < fluid.scaler.cold_start_s <= 151


def test_a_controller_that_begins_anew_takes_nothing_away_at_once() -> None:
    """Serve makes a new policy when a config is deployed again: it has seen nothing yet."""
    params = AutoscalingParams(hold_s=120.0, idle_s=300.0)
    fluid = Fluid(running=9, params=params)
    fluid.run(119, rate=0.0)
    assert fluid.target == 9


@pytest.mark.parametrize(
    "wrong", [{"utilization": 0.0}, {"utilization": 1.5}, {"drain_s": 0.0}, {"hold_s": -1.0}, {"rho": 0.7}]
)
def test_wrong_parameters_stop_the_start_with_their_name(wrong: dict[str, float]) -> None:
    with pytest.raises(BadRequest, match=f"of 'flux'.*{next(iter(wrong))}"):
        _deployment("flux", Serving(autoscaling=wrong))


DEPLOYMENT = DeploymentID(name="flux", app_name="weft")


def context(
    now: float,
    reports: list[tuple[float, float, float]] | None = None,
    *,
    target: int | None = None,
    queued: float = 0.0,
    running: int | None = None,
) -> AutoscalingContext:
    """reports: of each running replica, work done, work left and open requests."""
    ids = [ReplicaID(f"r{number}", DEPLOYMENT) for number in range(len(reports or []))]
    metrics: dict[str, dict[ReplicaID, Any]] = {
        name: {} for name in (DONE_S, REMAINING_S, OPEN_REQUESTS, REQUEST_S)
    }
    for replica, report in zip(ids, reports or [], strict=True):
        for name, value in zip((DONE_S, REMAINING_S, OPEN_REQUESTS, REQUEST_S), (*report, 4.0), strict=True):
            metrics[name][replica] = [TimeStampedValue(now - 1, -1.0), TimeStampedValue(now, value)]
    count = len(ids) if running is None else running
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="flux",
        app_name="weft",
        current_num_replicas=count,
        target_num_replicas=count if target is None else target,
        running_replicas=ids,
        total_num_requests=0.0,
        total_queued_requests=queued,
        aggregated_metrics=None,
        raw_metrics=metrics,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=MOST,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=AutoscalingConfig(
            min_replicas=0, max_replicas=MOST, upscale_delay_s=0.0, downscale_delay_s=0.0
        ),
    )


def policy(demand: ReportedDemand | None = None, **params: float) -> BacklogPolicy:
    made = BacklogPolicy(**params)
    made.read_demand = lambda *_: demand
    return made


def test_jobs_in_the_store_count_as_the_mean_request() -> None:
    waiting = policy(ReportedDemand(waiting=500, running=0, at=0.0))._observe(context(1.0, [(0.0, 0.0, 0.0)]))
    assert waiting.backlog_s == 500 * 4.0
    silent = policy()._observe(context(1.0, [(0.0, 0.0, 0.0)]))
    assert silent.backlog_s == 0.0


def test_a_request_on_its_way_is_counted_once() -> None:
    """8 were given to Serve; two replicas report 5 of them, 3 are at a handle."""
    observed = policy(ReportedDemand(waiting=10, running=8, at=0.0))._observe(
        context(1.0, [(0.0, 6.0, 2.0), (0.0, 9.0, 3.0)], queued=3.0)
    )
    assert observed.backlog_s == 6.0 + 9.0 + (10 + 3) * 4.0


def test_calls_by_handle_count_without_any_dispatcher() -> None:
    assert policy()._observe(context(1.0, [(0.0, 2.0, 1.0)], queued=7.0)).backlog_s == 2.0 + 7 * 4.0


def test_work_done_grows_across_replicas_that_come_and_go() -> None:
    made = policy()
    assert made._observe(context(1.0, [(100.0, 0, 0)])).done_s == 0.0  # before we looked
    assert made._observe(context(2.0, [(110.0, 0, 0), (3.0, 0, 0)])).done_s == 13.0
    assert made._observe(context(3.0, [])).done_s == 13.0
    assert made._observe(context(4.0, [(5.0, 0, 0)])).done_s == 18.0  # another one under the number


def test_ray_runs_it_pickled_by_value_and_as_the_app_configures_it() -> None:
    """What Serve does with a deployment's config: by name, to bytes, to an instance in its controller."""
    deployed = _deployment("flux", Serving(max_replicas=MOST, autoscaling={"idle_s": 5.0}))(ModelReplica)
    config = deployed._deployment_config.autoscaling_config
    assert isinstance(config, AutoscalingConfig)
    assert config.policy.policy_kwargs == {"idle_s": 5.0}
    sent = AutoscalingPolicy.from_serialized_policy_def(
        config.policy.model_dump(), config.policy.get_serialized_policy_def()
    )
    made = sent.get_policy()(**sent.policy_kwargs)
    assert made._params.idle_s == 5.0
    made.read_demand = lambda *_: ReportedDemand(waiting=1000, running=0, at=0.0)
    replicas, _ = apply_autoscaling_config(made)(context(1.0, target=0))
    assert 1 < replicas <= MOST


def test_serves_controller_needs_no_module_of_ours_to_run_it(tmp_path: Path) -> None:
    made = AutoscalingPolicy(**autoscaling_policy({}))
    policy_file = tmp_path / "policy"
    policy_file.write_bytes(made.get_serialized_policy_def())
    code = (
        "import sys; sys.modules |= {'serve_app': None, 'deployments': None}\n"
        "from ray import cloudpickle\n"
        f"policy = cloudpickle.loads(open({str(policy_file)!r}, 'rb').read())()\n"
        "reads = policy.read_demand._read.__globals__['get_value']\n"
        "print(policy._scaler.cold_start_s, reads.__name__)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout.split() == ["60.0", "get_value"], done.stderr


def test_names_match_what_replicas_report() -> None:
    names = set(ModelReplica.record_autoscaling_stats.__code__.co_consts[-1])
    assert names == {DONE_S, REMAINING_S, OPEN_REQUESTS, REQUEST_S}


async def test_the_listener_never_waits_and_forgets_old_words() -> None:
    answer = threading.Event()
    asked: list[tuple[str, str]] = []

    def slow(app_name: str, deployment: str) -> ReportedDemand | None:
        asked.append((app_name, deployment))
        answer.wait()
        return ReportedDemand(3, 4, 101.0)

    read_demand = DemandReader(slow)
    try:
        assert read_demand("weft", "flux", 100.0) is None
        asking = read_demand._reading
        assert read_demand("weft", "flux", 102.0) is None
        assert read_demand._reading is asking is not None  # not twice
    finally:
        answer.set()
    await asking
    assert read_demand("weft", "flux", 103.0) == ReportedDemand(3, 4, 101.0)
    assert read_demand._reading is not None
    await read_demand._reading
    assert read_demand("weft", "flux", 140.0) is None
    assert read_demand._reading is not None
    await read_demand._reading
    assert set(asked) == {("weft", "flux")}


def test_the_policy_is_one_that_ray_takes() -> None:
    assert AutoscalingPolicy(**autoscaling_policy({})).get_policy().__name__ == "BacklogPolicy"
