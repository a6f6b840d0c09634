"""A Ray cluster on this machine only, and the deployment of a Serve config file to it."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ApplicationStatusOverview, ServeDeploySchema

from deployments.protocol.errors import BadRequest
from deployments.protocol.invalid_values import wrong_values
from serve_app.processes import descendants, end_descendants
from serve_app.ray_serve.private_api import (
    LOOPBACK_NODE,
    deploy_applications,
    local_node,
    log_folder,
)
from serve_app.setting_values import without_secrets

STARTUP_LIMIT_S = 3600.0  # a large model may be downloading
OBJECT_STORE_BYTES = 256 * 2**20  # images travel through it one at a time
STARTS = 2
CAUSE = re.compile(r"(\w+\.)*\w*(Error|Exception|Request|NotFound|Unavailable|Failed|OutOfMemory)\b.*: ")


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """A new Ray on loopback, shut down after the block; other Rays on the machine are not touched.

    options: for ray.init; they override ours. Raises RuntimeError when it does not start.
    """
    ours: dict[str, Any] = {
        "address": "local",  # without it ray.init joins a cluster that it finds on the machine
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "object_store_memory": OBJECT_STORE_BYTES,
        **LOOPBACK_NODE,
    }
    _start(ours | options)
    try:
        yield
    finally:
        if ray.is_initialized():
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def _start(options: Mapping[str, Any]) -> None:
    """Start Ray, with a second try: on a busy machine its node may need longer than Ray waits (30 s)."""
    reason = ""
    for _ in range(STARTS):
        others = {process.pid for process in descendants()}
        try:
            with local_node():
                ray.init(**options)
            return
        except Exception as error:  # Ray raises a bare one
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            ray.shutdown()
            end_descendants(keep=others)
    raise RuntimeError(
        f"Ray did not start, tried {STARTS} times ({reason}); stop what keeps this machine busy or fills its "
        f"memory or the disk of Ray's logs, and start again; these logs are in {log_folder()}"
    )


def parse_config(config: Mapping[str, Any]) -> ServeDeploySchema:
    """The Serve config as Serve reads it. Raises BadRequest naming the key at fault."""
    try:
        return ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        raise BadRequest(f"the Serve config is not valid: {wrong_values(error)}") from None


def deploy(
    config: Mapping[str, Any], report: Callable[[str], None], stopped: threading.Event | None = None
) -> bool:
    """Deploy as `serve deploy` does and report each change of a deployment; True when all applications run.

    Returns False when one failed (the reason is on stderr) or `stopped` was set meanwhile.
    """
    stopped = stopped or threading.Event()
    schema = parse_config(config)
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        logging_config=schema.logging_config,
        tracing_config=schema.tracing_config,
    )
    deploy_applications(schema)
    names = {application.name for application in schema.applications}
    reported: dict[str, str] = {}
    began = time.monotonic()
    while not stopped.wait(0.2):
        applications = {n: a for n, a in serve.status().applications.items() if n in names}
        elapsed_s = time.monotonic() - began
        for name, state in _deployment_states(applications).items():
            if reported.get(name) != state:
                reported[name] = state
                report(f"  {name}: {state}  ({elapsed_s:.0f} s)")
        states = {application.status.value for application in applications.values()}
        if states == {"RUNNING"} and applications.keys() == names:
            return True
        if "DEPLOY_FAILED" in states or elapsed_s > STARTUP_LIMIT_S:
            _print_failures(applications)
            return False
    return False


def _deployment_states(applications: Mapping[str, ApplicationStatusOverview]) -> dict[str, str]:
    return {
        name: "ready" if deployment.status == "HEALTHY" else deployment.message or "starting"
        for application in applications.values()
        for name, deployment in application.deployments.items()
    }


def _print_failures(applications: Mapping[str, ApplicationStatusOverview]) -> None:
    for name, application in applications.items():
        if application.status.value == "DEPLOY_FAILED":
            reason = _cause(application.message)
            print(f"weft: the application {name} did not start: {reason}", file=sys.stderr)


def _cause(message: str) -> str:
    """What a traceback ends with, without the secrets of the environment; the whole is in Serve's log."""
    lines = [line for line in message.strip().splitlines() if line.strip()]
    causes = [line for line in lines if CAUSE.match(line)]
    return without_secrets((causes or lines or ["it gave no reason"])[-1].strip())
