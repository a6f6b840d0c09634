"""Every name of Ray and Ray Serve that Ray does not document; no other module of ours uses one.

tests/serving/ray_serve/test_private_api.py compares them with the installed Ray. When it fails for a new
version of Ray, this module has to change.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private import ray_constants, worker
from ray._private.worker import global_worker
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
from ray.experimental.internal_kv import _internal_kv_put, internal_kv_get_gcs_client

# how Serve's controller calls an autoscaling policy, for simulations and tests
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue  # noqa: F401
from ray.serve.autoscaling_policy import _apply_autoscaling_config as apply_autoscaling_config  # noqa: F401
from ray.serve.autoscaling_policy import _core_replica_queue_length_policy as queue_length_policy  # noqa: F401
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema, ServeInstanceDetails

LOOPBACK_NODE = {"_node_ip_address": "127.0.0.1"}  # of ray.init
# Ray replaces a loopback address by one that other nodes reach, unless it is not to have other nodes
ONE_NODE_VARIABLE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
ESSENTIAL = ("gcs_server", "raylet")  # processes without which a node serves nothing


TOKEN = Path("~/.ray/auth_token")
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TEMP_FOLDER_VARIABLE = "RAY_TMPDIR"
HEAD_STORE_VARIABLE = "RAY_REDIS_ADDRESS"  # of a head that keeps its state
HEAD_STORE_USER = ("RAY_REDIS_USERNAME", "REDIS_USERNAME")  # those of configs/clusters, and of KubeRay
HEAD_STORE_PASSWORD = ("RAY_REDIS_PASSWORD", "REDIS_PASSWORD")
CLUSTER_NAME_VARIABLE = "RAY_CLUSTER_NAME"  # set by KubeRay in every container of a cluster


def log_folder() -> Path:
    """Where Ray puts the logs of the session that it started last on this machine."""
    return Path(os.environ.get(TEMP_FOLDER_VARIABLE) or tempfile.gettempdir()) / "ray/session_latest/logs"


@contextmanager
def local_node() -> Iterator[None]:
    """A node that ray.init starts in this block listens on loopback only, and leaves SIGTERM of this process
    alone, for which Ray would print a stack trace.

    One port of each Serve replica is the exception: docs/security.md.
    """
    before = (ray_constants.ENABLE_RAY_CLUSTER, ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER)
    variables = {name: os.environ.get(name) for name in ONE_NODE_VARIABLE}
    os.environ |= ONE_NODE_VARIABLE  # for the processes of the node; Ray has read it for this one
    ray_constants.ENABLE_RAY_CLUSTER, ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = False, True
    try:
        yield
        close_token(TOKEN.expanduser())
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = before
        for name, value in variables.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def finds_token() -> bool:
    """Whether Ray has a token or can write one, which it does in the home directory."""
    if any(os.environ.get(name) for name in TOKEN_VARIABLES):
        return True
    try:
        path = TOKEN.expanduser()
        path.parent.mkdir(exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or there is no home directory
        return False
    return path.exists() or os.access(path.parent, os.W_OK)


def close_token(path: Path) -> None:
    """Let only our user read the file with Ray's token, which Ray writes for everybody to read."""
    with suppress(OSError):  # there is none, or another user's
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def ended_node_processes() -> dict[str, int]:
    """The essential processes of the node that this process has started and that have exited, by name, with
    their status; negative: the number of the signal. Empty without a node."""
    node = worker._global_node  # noqa: SLF001
    if node is None:
        return {}
    ended = [(name, process.poll()) for name, process in node.dead_processes()]
    return {name: int(status) for name, status in ended if name in ESSENTIAL}


def deploy_applications(schema: ServeDeploySchema) -> None:
    """Have the running Serve controller deploy what `serve deploy` would; returns before it is done.

    Raises RayServeException when no controller runs.
    """
    client = _get_global_client()
    assert client is not None, "it raises instead"
    client.deploy_apps(schema)


def query_serve_details() -> ServeInstanceDetails | None:
    """State and configuration of every application; None while no Serve controller runs. Blocks for one call.

    `serve.status()` is made of the same answer, without the arguments of the applications.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else ServeInstanceDetails(**client.get_serve_details())


def unchecked_handle(deployment: str, application: str) -> DeploymentHandle[Any]:
    """A handle to a deployment that need not exist yet. Without Serve's check it does not block."""
    return serve.get_deployment_handle(deployment, application, _check_exists=False)


def drain_node_of_this_process(reason: str, deadline: float) -> None:
    """Have Ray start nothing more on the node of this process, and Serve replace its replicas elsewhere.

    deadline: Unix seconds at which the node ends. Raises RuntimeError when Ray refuses.
    """
    context = ray.get_runtime_context()
    preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = GcsClient(address=context.gcs_address).drain_node(
        context.get_node_id(), preempted, reason, int(deadline * 1000)
    )
    if not accepted:
        raise RuntimeError(f"Ray does not drain this node: {refusal}")


def run_before_shutdown(callback: Callable[[], Awaitable[None]]) -> bool:
    """Have the replica in this process await `callback` whenever Serve asks it to shut down, before it does.

    Returns False when this process is no replica, or Serve's replica looks different.
    """
    for actor in global_worker.actors.values():
        replica = getattr(actor, "_replica_impl", None)
        shut_down = getattr(replica, "perform_graceful_shutdown", None)
        if replica is not None and shut_down is not None:
            replica.perform_graceful_shutdown = _in_sequence(callback, shut_down)
            return True
    return False


def _in_sequence(
    first: Callable[[], Awaitable[None]], second: Callable[[], Awaitable[None]]
) -> Callable[[], Awaitable[None]]:
    async def both() -> None:
        await first()
        await second()

    return both


def node_types_of_ray_cluster(spec: Mapping[str, Any]) -> dict[str, Any]:
    """By name, the node types that Ray's autoscaler reads in the spec of KubeRay's RayCluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "weft", "namespace": "weft"}, "spec": spec}
    types: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    return types


def put_value(key: bytes, value: bytes, namespace: bytes, *, overwrite: bool = True) -> None:
    """Store a value in the key-value store of Ray's head node. Blocks for one call.

    overwrite: False keeps a value that is there.
    """
    _internal_kv_put(key, value, overwrite=overwrite, namespace=namespace)


def get_value(key: bytes, namespace: bytes, timeout_s: float) -> bytes | None:
    """The value stored under this key, None without one. Blocks for one call."""
    store = internal_kv_get_gcs_client()  # type: ignore[no-untyped-call]
    value: bytes | None = store.internal_kv_get(key, namespace, timeout=timeout_s)
    return value
