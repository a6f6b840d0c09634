"""The whole service while its processes are killed in the middle of jobs: accepted, lost, ended twice.

`weft serve` runs as under systemd: whenever it ends it is started again. 300 requests are sent, each until it
is accepted; model replica, dispatcher, ingress, raylet, GCS, Valkey and the command itself are killed in turn
while at least BUSY jobs run. Rows `chaos_serve_*`; fails when a job was lost or ended twice, cannot be read,
or when fewer than half of the jobs were begun twice.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import ledger
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serve_app.jobs import events
from serve_app.jobs.job import JobState
from serve_app.jobs.store.store import JobStore
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.chaos.runner import is_readable
from tests.graph.running import free_port

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny-flux-dev"
STEPS = 50
OWNERS_JOBS = 64  # sent and not yet ended, at most
BUSY, DENOISING = 12, 4  # jobs that a replica has, and those of them with a finished step, at each kill
SETTLE_S = 3600.0
TITLES = {  # of processes, as Ray names them
    "model replica": f"ServeReplica:weft:{MODEL}",
    "dispatcher": "ServeReplica:weft:Dispatcher",
    "ingress": "ServeReplica:weft:Ingress",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
    "valkey": "valkey-server",
}
ORDER = ("model replica", "raylet", "dispatcher", "valkey", "model replica", "weft serve", "gcs", "ingress")


@dataclass
class Outcome:
    """What became of the jobs."""

    accepted: int = 0
    lost: int = 0  # no record or no ending
    double: int = 0  # more than one ending
    unreadable: int = 0  # completed, and a file is missing or not the one that was written
    begun_twice: int = 0
    states: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0  # of the command
    seconds: float = 0.0


class Supervisor:
    """Runs `weft serve`, and runs it again whenever it ends."""

    def __init__(self, data: Path, port: int, log: Path) -> None:
        self.port = port
        self.starts = 0
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
        config["applications"][0]["args"]["models"] = [MODEL]
        self._config = data / "serve.yaml"
        self._config.write_text(yaml.safe_dump(config), encoding="utf-8")
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("WEFT_", "REDIS_"))}
        self._environment = ours | {
            "WEFT_DATA_DIR": str(data),
            "WEFT_MAX_ATTEMPTS": "1000",  # they are killed from outside, not by their jobs
            "WEFT_SUBMITS_PER_MINUTE": "100000",
            "WEFT_READS_PER_MINUTE": "100000",
            "RAY_AUTH_MODE": "disabled",
        }
        self._log = log
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def kill(self) -> None:
        """kill -9 of the command alone: what it started stays behind."""
        assert self._process is not None
        self._process.kill()

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of this service with this in their command line."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if title in " ".join(process.cmdline()) and self._is_ours(process):
                    found.append(process)
        return found

    def stop(self) -> None:
        """As Ctrl+C."""
        self._stopping = True
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._thread.join()

    def _is_ours(self, process: psutil.Process) -> bool:
        data = self._environment["WEFT_DATA_DIR"]  # Valkey gets no environment, but has its file there
        return process.environ().get("WEFT_DATA_DIR") == data or data in " ".join(process.cmdline())

    def _run(self) -> None:
        command = [sys.executable, "-m", "serve_app.cli", "serve", "--port", str(self.port)]
        with self._log.open("ab") as log:
            while not self._stopping:
                self.starts += 1
                self._process = subprocess.Popen(
                    [*command, "--config", str(self._config)],
                    cwd=ROOT,
                    env=self._environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._process.wait()


async def submit(client: httpx.AsyncClient, number: int) -> str:
    """The id of the job, once it is accepted: the same request is sent until then, under one key."""
    body = {"model": MODEL, "prompt": f"a red circle {number}", "seed": number, "num_inference_steps": STEPS}
    while True:
        with suppress(httpx.TransportError):
            answer = await client.post(
                "/api/generate/image", json=body, headers={"Idempotency-Key": f"request-{number}"}
            )
            if answer.status_code in (200, 202):
                job_id: str = answer.json()["id"]
                return job_id
            # Serve's proxy answers 404 before it knows its routes
            if answer.status_code < 500 and answer.status_code not in (404, 429):
                raise RuntimeError(answer.text)
        await asyncio.sleep(0.5)


async def end_of(client: httpx.AsyncClient, job_id: str) -> None:
    """Returns when the job has ended."""
    began = time.monotonic()
    while time.monotonic() < began + SETTLE_S:
        with suppress(httpx.TransportError, KeyError, ValueError):
            job = (await client.get(f"/api/generate/{job_id}")).json()
            if job["status"] in ("completed", "failed", "cancelled"):
                return
        await asyncio.sleep(1.0)


async def send_all(base: str, count: int) -> list[str]:
    """The ids of all requests; returns when their jobs have ended."""
    allowed = asyncio.Semaphore(OWNERS_JOBS)
    async with httpx.AsyncClient(base_url=base, timeout=30.0) as client:

        async def one(number: int) -> str:
            async with allowed:
                job_id = await submit(client, number)
                await end_of(client, job_id)
            return job_id

        return await asyncio.gather(*(one(number) for number in range(count)))


def is_busy(base: str) -> bool:
    """Whether enough jobs run for a kill."""
    with suppress(httpx.HTTPError, KeyError, ValueError):
        page = httpx.get(f"{base}/api/generate/", params={"status": "processing", "limit": 100}, timeout=5.0)
        steps = [job["step"] for job in page.json()["jobs"]]
        return len(steps) >= BUSY and sum(step > 0 for step in steps) >= DENOISING
    return False


def kill_in_turn(supervisor: Supervisor, kills: Counter[str], over: threading.Event) -> None:
    """Kill one after the other, each while enough jobs run."""
    base = f"http://127.0.0.1:{supervisor.port}"
    for kind in itertools.cycle(ORDER):
        while not is_busy(base):
            if over.wait(0.5):
                return
        if kind == "weft serve":
            supervisor.kill()
        for process in supervisor.processes(TITLES[kind]) if kind in TITLES else ():
            with suppress(psutil.Error):
                process.kill()
        kills[kind] += 1
        print(f"killed: {kind}", flush=True)


async def count(data: Path, ids: list[str]) -> Outcome:
    """What the store and the result folder say of these jobs."""
    outcome = Outcome(accepted=len(ids), double=len(ids) - len(set(ids)))
    settings = Settings(_env_file=None, data_dir=data)
    results = ResultStore(settings.results_root)
    with EmbeddedRedis(data) as url:
        async with connect(url) as redis:
            store = JobStore(redis, settings)
            for job_id in ids:
                job = await store.get(job_id)
                published = [event for _, event in await store.events(job_id)]
                outcome.states[job.state] += 1
                outcome.lost += not job.state.ended
                outcome.double += sum(isinstance(event, events.ENDINGS) for event in published) > 1
                outcome.begun_twice += job.attempt > 1
                if job.state is JobState.completed:
                    outcome.unreadable += not await is_readable(results, job.artifacts)
    return outcome


def run(folder: Path, jobs: int) -> Outcome:
    """One run in this folder."""
    began, kills, over = time.monotonic(), Counter[str](), threading.Event()
    supervisor = Supervisor(folder, free_port(), folder / "weft.log")
    base = f"http://127.0.0.1:{supervisor.port}"
    killer = threading.Thread(target=kill_in_turn, args=(supervisor, kills, over))
    killer.start()
    try:
        ids = asyncio.run(send_all(base, jobs))
    finally:
        over.set()
        killer.join()
        supervisor.stop()
    outcome = asyncio.run(count(folder, ids))
    outcome.kills, outcome.starts, outcome.seconds = kills, supervisor.starts, time.monotonic() - began
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--keep", action="store_true", help="record the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Path(folder), options.jobs)
        print(outcome, flush=True)
    kills = ", ".join(f"{number} x {kind}" for kind, number in outcome.kills.items())
    notes = f"{MODEL}, {STEPS} steps; killed: {kills}; weft serve began {outcome.starts} times, as by systemd"
    for name, value in (
        ("chaos_serve_accepted", outcome.accepted),
        ("chaos_serve_lost", outcome.lost),
        ("chaos_serve_double", outcome.double),
        ("chaos_serve_unreadable", outcome.unreadable),
        ("chaos_serve_begun_twice", outcome.begun_twice),
    ):
        if options.keep:
            ledger.record(name, value, "jobs", n=options.jobs, notes=notes)
    broken = outcome.lost or outcome.double or outcome.unreadable or outcome.states.keys() != {"completed"}
    sys.exit(bool(broken or 2 * outcome.begun_twice < options.jobs))


if __name__ == "__main__":
    main()
