"""What only a real cluster can show: nodes from nothing, pictures on them, jobs that outlive a failure.

    WEFT_API_KEY=... python -m tools.cloud_check https://weft.example.org sdxl-base-1.0 flux.1-schnell \\
        --break "ray exec aws.yaml 'sudo pkill -9 -x gcs_server'" --nodes "ray exec aws.yaml 'ray status'"

Asks for one picture of each model, then for several of each at once, during which the command of --break
runs. Prints how long each took. Exit status 1 when a job did not end with its picture. It costs what its GPUs
cost.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

EVERY_S = 2.0  # between two looks at a job
ENDED = {"completed", "failed", "cancelled"}


class Unfinished(Exception):
    """A job that ended without its pictures, or did not end."""


class Cluster:
    """A running Weft, over HTTP. Calls that cannot be answered for a while are repeated until `limit_s`."""

    def __init__(self, client: httpx.Client, limit_s: float, every_s: float = EVERY_S) -> None:
        self._client = client
        self._limit_s = limit_s
        self._every_s = every_s

    def submit(self, model: str, seed: int) -> str:
        """Id of an accepted job. Its key makes a repeated call the same job."""
        body = {"model": model, "prompt": "a red circle on white", "seed": seed}
        key = {"Idempotency-Key": f"cloud-check-{os.getpid()}-{model}-{seed}"}
        answer = self._answer(lambda: self._client.post("/api/generate/image", json=body, headers=key))
        return str(answer["id"])

    def pictures_of(self, job: str) -> int:
        """How many pictures the job has made, once it has ended. Raises Unfinished."""
        deadline = time.monotonic() + self._limit_s
        while time.monotonic() < deadline:
            found = self._answer(lambda: self._client.get(f"/api/generate/{job}"))
            if found["status"] == "completed":
                return sum(artifact["kind"] == "image" for artifact in found["artifacts"])
            if found["status"] in ENDED:
                raise Unfinished(f"job {job} {found['status']}: {found.get('error')}")
            time.sleep(self._every_s)
        raise Unfinished(f"job {job} has not ended within {self._limit_s:.0f} s")

    def _answer(self, call: Callable[[], httpx.Response]) -> dict[str, Any]:
        deadline = time.monotonic() + self._limit_s
        while True:
            problem = "no connection"
            try:
                answer = call()
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if answer.is_success:
                    found: dict[str, Any] = answer.json()
                    return found
                problem = f"{answer.status_code}: {answer.text[:500]}"
                if answer.status_code < 500 and answer.status_code != 429:
                    raise Unfinished(problem)
            if time.monotonic() > deadline:
                raise Unfinished(problem)
            time.sleep(self._every_s)


def check(
    cluster: Cluster, models: Sequence[str], pictures: int, disturb: Callable[[], None], seed: int
) -> list[tuple[str, float]]:
    """Names of what was done, with seconds. Raises Unfinished."""
    done = []
    for model in models:
        began = time.monotonic()
        _require_one(cluster, [cluster.submit(model, seed)])
        done.append((f"first picture of {model}", time.monotonic() - began))
    began = time.monotonic()
    jobs = [cluster.submit(model, seed + number) for number in range(1, pictures + 1) for model in models]
    disturb()
    _require_one(cluster, jobs)
    done.append((f"{len(jobs)} pictures at once", time.monotonic() - began))
    return done


def _require_one(cluster: Cluster, jobs: Sequence[str]) -> None:
    for job in jobs:
        if (made := cluster.pictures_of(job)) != 1:
            raise Unfinished(f"job {job} has {made} pictures and not one")


def run_command(command: str | None) -> None:
    """Run it and show its exit status, which may be that of a connection lost with the head."""
    if command:
        print(f"$ {command}", flush=True)
        print(f"exit status {subprocess.run(shlex.split(command), check=False).returncode}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="address of Weft; its key is in WEFT_API_KEY")
    parser.add_argument("models", nargs="+", help="ids of model cards")
    parser.add_argument(
        "--pictures", type=int, default=8, help="of each model at once (default: %(default)s)"
    )
    parser.add_argument("--break", dest="disturb", help="a command that ends a node or the head meanwhile")
    parser.add_argument("--nodes", help="a command that lists the nodes, run before and after")
    parser.add_argument(
        "--limit-minutes", type=float, default=45.0, help="for each job (default: %(default)s)"
    )
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {os.environ.get('WEFT_API_KEY', '')}"}
    run_command(options.nodes)
    with httpx.Client(base_url=options.url, headers=headers, timeout=30.0) as client:
        cluster = Cluster(client, 60 * options.limit_minutes)
        try:
            done = check(
                cluster,
                options.models,
                options.pictures,
                lambda: run_command(options.disturb),
                int(time.time()),
            )
        except Unfinished as problem:
            print(problem, file=sys.stderr)
            return 1
        finally:
            run_command(options.nodes)
    for name, seconds in done:
        print(f"{name}: {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
