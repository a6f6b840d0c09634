"""What all nodes of a running Ray cluster say of themselves, and what Serve runs there."""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.job_ids import new_job_id
from serve_app.ray_serve.node_probe import NodeFacts, probe_node, read_marks, remove_mark
from serve_app.ray_serve.private_api import query_serve_details

ANSWER_TIMEOUT_S = 180.0  # of all nodes together; torch is imported on those with GPUs
HTTP_TIMEOUT_S = 5.0
HEAD = "node:__internal_head__"  # a resource that Ray gives to the head
T = TypeVar("T")

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # nodes are not behind a proxy


@dataclass(frozen=True, slots=True)
class ProbedNode:
    """A living node with its answers."""

    id: str
    address: str
    is_head: bool
    resources: Mapping[str, float]  # all that it has
    facts: NodeFacts | None  # None: it runs no tasks
    failure: str = ""  # why it runs none
    unread: tuple[str, ...] = ()  # nodes whose file in the storage it cannot read
    metrics: str = ""  # why its metrics cannot be read

    @property
    def name(self) -> str:
        return f"{self.address} ({'head' if self.is_head else self.id[:8]})"


@dataclass(frozen=True, slots=True)
class DeploymentDemand:
    """What one replica of a running deployment claims of a node."""

    application: str
    deployment: str
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """All that was found."""

    nodes: Sequence[ProbedNode]
    demands: Sequence[DeploymentDemand]  # of all that Serve runs
    serves: bool  # whether Serve runs
    dashboard_status: int | None  # HTTP status of a call without a token; None: no answer
    unremoved: str = ""  # why a file that a node stored was not removed


@contextmanager
def connected(address: str) -> Iterator[str]:
    """The place of the dashboard, such as 10.0.0.7:8265, with this process as a driver of the cluster.

    address: of the cluster; auto: that of this machine. Raises RuntimeError when there is none.
    """
    try:
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"no Ray cluster can be reached at {address} ({reason}); run this on a node of the cluster, with "
            "the token of its ~/.ray/auth_token, or give --address"
        ) from None
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


def probe_cluster(dashboard: str) -> ClusterFacts:
    """What every living node answers. Needs `connected`, which returns the place of the dashboard."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    # ids of no job: what is left behind is swept with the files of lost jobs
    marks = {node["NodeID"]: new_job_id() for node in nodes}
    cluster = ray.get_runtime_context().gcs_address
    answers = _on_each(
        nodes,
        lambda node: (
            probe_node,
            {
                "gpus": node["Resources"].get("GPU", 0) > 0,
                "head_of": cluster if HEAD in node["Resources"] else None,
                "mark": marks[node["NodeID"]],
            },
        ),
    )
    stored = [
        node
        for node in nodes
        if isinstance(facts := answers[node["NodeID"]], NodeFacts) and not (facts.storage or facts.settings)
    ]
    read = _on_each(stored, lambda _: (read_marks, {"marks": [marks[one["NodeID"]] for one in stored]}))
    removed = _on_each(stored, lambda node: (remove_mark, {"mark": marks[node["NodeID"]]}))
    names = {marks[node["NodeID"]]: node["NodeManagerAddress"] for node in nodes}
    details = query_serve_details()
    return ClusterFacts(
        nodes=[_probed(node, answers[node["NodeID"]], read.get(node["NodeID"]), names) for node in nodes],
        demands=[] if details is None else list(_demands(details.applications)),
        serves=details is not None,
        dashboard_status=_status_without_token(f"http://{dashboard}/api/version") if dashboard else None,
        unremoved=next((str(one) for one in removed.values() if isinstance(one, Exception)), ""),
    )


def _on_each(
    nodes: Sequence[Mapping[str, Any]],
    call: Callable[[Mapping[str, Any]], tuple[Callable[..., Any], dict[str, Any]]],
) -> dict[str, Any]:
    """By node id, what a function returned there, or the error that it came to."""
    pending: dict[Any, str] = {}
    for node in nodes:
        function, arguments = call(node)
        task = ray.remote(function).options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        pending[task.remote(**arguments)] = node["NodeID"]
    if not pending:
        return {}
    done, late = ray.wait([*pending], num_returns=len(pending), timeout=ANSWER_TIMEOUT_S)
    found: dict[str, Any] = {
        pending[one]: TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:.0f} s") for one in late
    }
    for one in late:
        ray.cancel(one, force=True)
    for one in done:
        try:
            found[pending[one]] = ray.get(one)
        except Exception as error:  # whatever the function or Ray raised there
            found[pending[one]] = error
    return found


def _probed(node: Mapping[str, Any], answer: Any, unread: Any, names: Mapping[str, str]) -> ProbedNode:
    facts = answer if isinstance(answer, NodeFacts) else None
    return ProbedNode(
        id=node["NodeID"],
        address=node["NodeManagerAddress"],
        is_head=HEAD in node["Resources"],
        resources=node["Resources"],
        facts=facts,
        failure="" if facts is not None else _last_line(answer),
        unread=tuple(names[mark] for mark in unread) if isinstance(unread, list) else (),
        metrics=_metrics_failure(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"),
    )


def _last_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _demands(applications: Mapping[str, Any]) -> Iterator[DeploymentDemand]:
    for name, application in applications.items():
        for deployment, details in application.deployments.items():
            options = details.deployment_config.ray_actor_options
            asked = {} if options is None else options.model_dump(exclude_unset=True)
            resources = {"CPU": asked.get("num_cpus", 1.0), "GPU": asked.get("num_gpus", 0.0)}
            resources |= asked.get("resources") or {}
            if kind := asked.get("accelerator_type"):
                resources[f"accelerator_type:{kind}"] = 0.001  # as Ray counts it
            needed = {resource: amount for resource, amount in resources.items() if amount}
            yield DeploymentDemand(name, deployment, needed)


def _metrics_failure(url: str) -> str:
    try:
        with _opener.open(url, timeout=HTTP_TIMEOUT_S) as answer:
            text = answer.read(2**20)
    except OSError as error:
        return f"{url} does not answer ({error})"
    return "" if b"ray_" in text else f"{url} has no metrics of Ray"


def _status_without_token(url: str) -> int | None:
    try:
        with _opener.open(url, timeout=HTTP_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
