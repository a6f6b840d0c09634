"""The undocumented names of Ray in private_api.py, compared with the installed Ray without a cluster."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray._private import ray_constants, services
from ray._private.authentication import authentication_token_setup
from ray._private.node import Node
from ray._private.worker import Worker, global_worker
from ray.experimental import internal_kv
from ray.serve._private import replica as serve_replica
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve.context import _get_global_client

from serve_app.ray_serve import private_api

ROOT = Path(__file__).parents[3]
HOME = Path("serve_app/ray_serve/private_api.py")
CHANGED = "Ray has changed a name that serve_app/ray_serve/private_api.py uses: "
DOCUMENTED_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED"}


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_the_serve_client_is_found_as_before_and_has_our_two_methods() -> None:
    assert "raise_if_no_controller_running" in parameters(_get_global_client), CHANGED + "_get_global_client"
    assert list(inspect.signature(ServeControllerClient.deploy_apps).parameters)[:2] == ["self", "config"], (
        CHANGED + "ServeControllerClient.deploy_apps"
    )
    details = inspect.signature(ServeControllerClient.get_serve_details)
    assert list(details.parameters) == ["self"], CHANGED + "ServeControllerClient.get_serve_details"


def test_a_handle_can_be_made_without_asking_the_controller() -> None:
    assert "_check_exists" in parameters(serve.get_deployment_handle), CHANGED + "_check_exists"


def test_ray_finds_a_token_where_it_can_read_or_write_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in private_api.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert private_api.finds_token()
    monkeypatch.setenv("HOME", "/dev/null/home")
    assert not private_api.finds_token()

    file = tmp_path / "token"
    file.write_text("t" * 43)
    loader = authentication_token_setup.AuthenticationTokenLoader.instance()
    for name, value in zip(private_api.TOKEN_VARIABLES, ("t" * 43, str(file)), strict=True):
        with monkeypatch.context() as only:
            only.setenv(name, value)
            loader.reset_cache()
            assert private_api.finds_token()
            assert loader.has_token(ignore_auth_mode=True), CHANGED + name
    loader.reset_cache()
    assert not loader.has_token(ignore_auth_mode=True)
    monkeypatch.undo()
    loader.reset_cache()


def test_a_node_can_be_bound_to_loopback() -> None:
    source = inspect.getsource(ray.init)

    for option in private_api.LOOPBACK_NODE:
        assert f'"{option}"' in source, CHANGED + f"the option {option} of ray.init"
    assert "ENABLE_RAY_CLUSTER" in inspect.getsource(services.get_node_ip_address), CHANGED + "loopback"
    assert [*private_api.ONE_NODE_VARIABLE] == [ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR], (
        CHANGED + "loopback"
    )
    assert ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER is False, CHANGED + "the handler of signals"


def test_the_environment_is_as_before_when_a_local_node_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = private_api.ONE_NODE_VARIABLE
    monkeypatch.setenv(name, "1")
    before = ray_constants.ENABLE_RAY_CLUSTER

    with private_api.local_node():
        inside = (os.environ[name], ray_constants.ENABLE_RAY_CLUSTER)

    assert inside == ("0", False)
    assert (os.environ[name], ray_constants.ENABLE_RAY_CLUSTER) == ("1", before)


def test_only_our_user_can_read_rays_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o644)

    private_api.close_token(tmp_path / "token")
    private_api.close_token(tmp_path / "none")

    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert private_api.TOKEN.expanduser() == authentication_token_setup._get_default_token_path(), (
        CHANGED + "the token's file"
    )


def test_the_processes_of_a_node_are_found_where_we_look_for_them() -> None:
    assert {*private_api.ESSENTIAL} == {
        ray_constants.PROCESS_TYPE_GCS_SERVER,
        ray_constants.PROCESS_TYPE_RAYLET,
    }, CHANGED + "the names of a node's processes"
    assert parameters(Node.dead_processes) == {"self"}, CHANGED + "Node.dead_processes"
    assert "_global_node = None" in inspect.getsource(ray._private.worker), CHANGED + "_global_node"
    assert private_api.ended_node_processes() == {}  # there is no node


def test_a_replica_actor_holds_its_replica_where_we_look_for_it() -> None:
    assert isinstance(global_worker.actors, dict), CHANGED + "global_worker.actors"
    assert "self.actors = {}" in inspect.getsource(Worker.__init__), CHANGED + "Worker.actors"
    actor = inspect.getsource(serve_replica.ReplicaActor)
    assert re.search(r"self\._replica_impl\b.*= create_replica_impl\(", actor), CHANGED + "_replica_impl"
    assert "await self._replica_impl.perform_graceful_shutdown()" in actor, (
        CHANGED + "the actor's call of perform_graceful_shutdown"
    )


def test_a_replica_shuts_down_through_a_coroutine_without_arguments() -> None:
    shut_down = serve_replica.Replica.perform_graceful_shutdown

    assert inspect.iscoroutinefunction(shut_down), CHANGED + "Replica.perform_graceful_shutdown"
    assert parameters(shut_down) == {"self"}, CHANGED + "Replica.perform_graceful_shutdown"


def test_the_key_value_store_is_called_as_before() -> None:
    put = inspect.signature(internal_kv._internal_kv_put).parameters

    assert list(put)[:2] == ["key", "value"], CHANGED + "_internal_kv_put"
    assert {"namespace", "overwrite"} <= set(put), CHANGED + "_internal_kv_put"
    assert parameters(internal_kv.internal_kv_get_gcs_client) == set(), CHANGED + "internal_kv_get_gcs_client"
    get = parameters(ray._raylet.InnerGcsClient.internal_kv_get)
    assert get == {"self", "key", "namespace", "timeout"}, CHANGED + "GcsClient.internal_kv_get"


def test_serve_logs_where_our_lines_join_it() -> None:
    assert SERVE_LOGGER_NAME == "ray.serve", "Serve's logger has another name: change join_serve_log"


def test_a_policy_can_be_run_as_serves_controller_runs_it() -> None:
    assert parameters(private_api.apply_autoscaling_config) == {"policy_func"}, CHANGED + "the policy wrapper"
    assert "ctx" in parameters(private_api.queue_length_policy), CHANGED + "Ray's default policy"
    for kind, names in {
        private_api.DeploymentID: {"name", "app_name"},
        private_api.ReplicaID: {"unique_id", "deployment_id"},
        private_api.TimeStampedValue: {"timestamp", "value"},
    }.items():
        assert names <= parameters(kind), CHANGED + kind.__name__


def test_the_hook_runs_before_the_shutdown_of_a_replica_and_nothing_runs_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Replica:
        async def perform_graceful_shutdown(self) -> None:
            calls.append("shutdown")

    class Actor:
        _replica_impl = Replica()

    async def hook() -> None:
        calls.append("hook")

    monkeypatch.setattr(global_worker, "actors", {})
    assert not private_api.run_before_shutdown(hook)
    monkeypatch.setattr(global_worker, "actors", {"other": object(), "replica": Actor()})
    assert private_api.run_before_shutdown(hook)

    asyncio.run(Actor._replica_impl.perform_graceful_shutdown())
    assert calls == ["hook", "shutdown"]


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every undocumented name of Ray in a module."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "ray":
                for alias in names:
                    if re.search(r"(^|\.)_", f"{module}.{alias.name}") or "internal" in alias.name:
                        yield node.lineno, f"{module}.{alias.name}"
            case ast.Import(names=names):
                for alias in names:
                    if re.match(r"ray\.(.*\.)?_", alias.name):
                        yield node.lineno, alias.name
            case ast.Attribute(attr=attr, value=value) if re.match(r"_[^_]", attr):
                if re.match(r"(ray|serve)\b", ast.unparse(value)):
                    yield node.lineno, ast.unparse(node)
            case ast.Call(func=function, keywords=keywords) if re.match(
                r"(ray|serve)\b", ast.unparse(function)
            ):
                for keyword in keywords:
                    if keyword.arg is not None and keyword.arg.startswith("_"):
                        yield node.lineno, f"{ast.unparse(function)}({keyword.arg}=)"
            case ast.Constant(value=str(text)):
                if re.fullmatch(r"_node_\w+|_replica_impl|_internal_kv\w*|_system_config", text):
                    yield node.lineno, text
                if re.fullmatch(r"RAY_[A-Z_]+", text) and text not in DOCUMENTED_VARIABLES:
                    yield node.lineno, text


def test_no_other_module_uses_a_private_name_of_ray() -> None:
    found = []
    for folder in ("serve_app", "deployments", "benchmarks", "examples", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (module := path.relative_to(ROOT)) != HOME:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                found += [f"{module}:{line} {name}" for line, name in private_names(tree)]

    assert found == [], f"move these to {HOME}"
    assert {name for _, name in private_names(ast.parse((ROOT / HOME).read_text(encoding="utf-8")))} >= {
        "ray.serve.context._get_global_client",
        "ray._private.worker.global_worker",
    }
