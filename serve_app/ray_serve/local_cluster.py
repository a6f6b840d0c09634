"""A Ray of our own on this machine, and a Serve config file deployed to it."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

STARTUP_LIMIT_S = 3600.0  # a large model may be downloading
OBJECT_STORE_BYTES = 256 * 2**20  # pictures travel through it one at a time
ERROR_LINES = 8  # lines of a failed start's traceback worth reading


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """A fresh Ray on loopback, ended with the block; other Rays on the machine are not touched.

    options: for ray.init, over ours.
    """
    ours: dict[str, Any] = {
        "address": "local",  # without it ray.init joins whatever cluster it finds
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
    }
    ray.init(**(ours | options))
    try:
        yield
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def deploy(
    config: Mapping[str, Any], report: Callable[[str], None], stopped: threading.Event | None = None
) -> bool:
    """Deploy as `serve deploy` does and tell every change; True when all of it runs.

    False when it failed (the reason is on stderr) or `stopped` was set meanwhile.
    """
    stopped = stopped or threading.Event()
    schema = ServeDeploySchema.model_validate(config)
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        logging_config=schema.logging_config,
        tracing_config=schema.tracing_config,
    )
    client = _get_global_client()
    assert client is not None, "serve.start has made one"
    client.deploy_apps(schema)
    names = {application.name for application in schema.applications}
    reported: dict[str, str] = {}
    began = time.monotonic()
    while not stopped.wait(0.2):
        applications = {n: a for n, a in serve.status().applications.items() if n in names}
        for application in applications.values():
            for name, deployment in application.deployments.items():
                state = "ready" if deployment.status == "HEALTHY" else deployment.message or "starting"
                if reported.get(name) != state:
                    reported[name] = state
                    report(f"  {name}: {state}  ({time.monotonic() - began:.0f} s)")
        states = {application.status.value for application in applications.values()}
        if states == {"RUNNING"} and applications.keys() == names:
            return True
        if "DEPLOY_FAILED" in states or time.monotonic() - began > STARTUP_LIMIT_S:
            for name, application in applications.items():
                reason = "\n".join(application.message.strip().splitlines()[-ERROR_LINES:])
                print(f"weft: {name} did not start: {reason}", file=sys.stderr)
            return False
    return False
