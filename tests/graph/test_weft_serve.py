"""`weft serve` as it is run: up by one command, down in order and when parts of it are killed; jobs kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.admission.loopback import is_loopback
from tests.graph.calls import ended, submit
from tests.graph.running import PATIENCE_S, RAY, ROOT, free_port

pytestmark = pytest.mark.ray


def environment(data: Path, **extra: str) -> dict[str, str]:
    """Ours, without what the shared service of this folder may have set."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("WEFT_", "REDIS_"))}
    return ours | {"WEFT_DATA_DIR": str(data)} | RAY | extra


ESSENTIAL = {"gcs_server", "raylet", "valkey-server", "sh"}
KEY = "the-operators-own-key-of-this-test-0123456789"
SECRET = "the-operators-own-secret-of-this-test-0123456789"


class Serve:
    """`weft serve` as it was started, with what it has printed."""

    def __init__(self, data: Path, port: int, **extra: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve_app.cli", "serve", "--port", str(port)],
            cwd=ROOT,
            env=environment(data, **extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.printed: list[str] = []

    def wait_for(self, words: str) -> None:
        """Returns when a line with these words has been printed."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            if words in line:
                return
        pytest.fail("weft serve has ended:\n" + "".join(self.printed))

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def pid_of(self, program: str) -> int:
        (pid,) = (child.pid for child in self.family() if child.name() == program)
        return pid

    def end(self) -> int:
        """The exit status; what was printed before it is in `printed`."""
        assert self.process.stdout is not None
        self.printed += self.process.stdout.readlines()
        return self.process.wait(PATIENCE_S)


@contextmanager
def weft_serve(data: Path, port: int, **extra: str) -> Iterator[Serve]:
    """The command while it runs; killed with all that it has started when the block leaves it running."""
    serve = Serve(data, port, **extra)
    try:
        yield serve
    finally:
        if serve.process.poll() is None:
            family = serve.family()
            serve.process.kill()
            for process in family:
                with suppress(psutil.Error):
                    process.kill()
        serve.process.communicate()


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def session_logs(serve: Serve) -> str:
    """Everything that Ray and Serve have logged for this service, and the command lines of its processes."""
    (folder,) = (Path(tempfile.gettempdir()) / "ray").glob(f"session_*_{serve.process.pid}")
    texts = [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]
    lines = [" ".join(child.cmdline()) for child in serve.family() if child.is_running()]
    return "\n".join([*texts, *lines])


def test_a_killed_node_ends_the_service_and_a_second_start_keeps_jobs_and_pictures(tmp_path: Path) -> None:
    port = free_port()
    secrets = {"WEFT_API_KEY": KEY, "WEFT_JWT_SECRET": SECRET}
    headers = {"Authorization": f"Bearer {KEY}"}

    with (
        weft_serve(tmp_path, port, **secrets) as serve,
        httpx.Client(base_url=serve.url, headers=headers) as client,
    ):
        serve.wait_for("Ctrl+C ends it")
        job = ended(client, submit(client, prompt="a red circle", seed=1))
        image = client.get(job["artifacts"][0]["url"]).content
        family = serve.family()
        ours = {process.pid for process in family}
        reached = [
            str(connection.laddr)
            for process in family
            if not process.cmdline()[0].startswith("ray::ServeReplica")  # one port each, with Ray's token
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip)
        ]
        known = session_logs(serve) + "".join(serve.printed)
        assert len(ours) > 10
        assert reached == []
        assert KEY not in known
        assert SECRET not in known

        os.kill(serve.pid_of("raylet"), signal.SIGKILL)

        assert serve.end() == 3
        assert "weft: Ray's raylet was ended by signal 9, and nothing can be served" in serve.printed[-1]
        assert_gone(family)

    with (
        weft_serve(tmp_path, port, **secrets) as serve,
        httpx.Client(base_url=serve.url, headers=headers) as client,
    ):
        serve.wait_for("Ctrl+C ends it")
        again = client.get(f"/api/generate/{job['id']}").json()
        assert again["status"] == "completed"
        assert client.get(again["artifacts"][0]["url"]).content == image
        family = serve.family()

        os.killpg(serve.process.pid, signal.SIGINT)  # what a terminal does: the whole group

        assert serve.end() == 0
        assert_gone(family)


def test_sigterm_ends_it_without_a_trace_also_while_it_starts(tmp_path: Path) -> None:
    with weft_serve(tmp_path, free_port()) as serve:
        serve.wait_for("loading models")
        family = serve.family()
        serve.process.send_signal(signal.SIGTERM)

        assert serve.end() == 0
        assert_gone(family)
    assert "SIGTERM" not in "".join(serve.printed)
    assert "Traceback" not in "".join(serve.printed)


@pytest.mark.parametrize(
    ("after", "program", "statuses"),
    [
        ("starting Ray", None, {130, 143}),
        ("loading models", "gcs_server", {3}),
        ("loading models", "weft", {-9}),
    ],
)
def test_whatever_is_killed_while_it_starts_nothing_stays(
    after: str, program: str | None, statuses: set[int], tmp_path: Path
) -> None:
    with weft_serve(tmp_path, free_port()) as serve:
        serve.wait_for(after)
        family = serve.family()
        if program == "weft":
            serve.process.kill()
        elif program is not None:
            os.kill(serve.pid_of(program), signal.SIGKILL)
        else:  # two signals
            serve.process.send_signal(signal.SIGINT)
            serve.process.send_signal(signal.SIGTERM)

        assert serve.process.wait(PATIENCE_S) in statuses
        if program == "weft":  # workers that were starting look for their node for a minute
            workers = [process for process in family if process.name() not in ESSENTIAL]
            family = [process for process in family if process not in workers]
            for worker in workers:
                worker.kill()
        assert_gone(family)
