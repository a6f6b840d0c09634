"""How `weft serve` ends: at a signal, at a second one, and when a part that it needs has gone for good."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from serve_app.cli.stop_signals import StopSignals
from serve_app.processes import end_descendants
from serve_app.ray_serve import local_cluster
from serve_app.ray_serve.local_health import Pulse, answers_http
from tests.patience import patience

# an embedded store, a child, and an orphan: a grandchild whose parent has ended
SERVING = """
import subprocess, sys, threading
from pathlib import Path
from serve_app.cli.stop_signals import StopSignals
from serve_app.cli.watchdog import Watchdog
from serve_app.processes import adopt_orphans
from serve_app.redis.embedded import EmbeddedRedis

folder = Path(sys.argv[1])
adopt_orphans()
store = EmbeddedRedis(folder)
store.start()
child = subprocess.Popen(["sleep", "1000"])
subprocess.run(["sh", "-c", "sleep 1000 & echo $! > " + str(folder / "orphan")], check=True)
watchdog = Watchdog(store, 1.0)
with StopSignals(lambda number: watchdog.end_now(128 + number)) as signals:
    watchdog.start(lambda: "the node has gone" if (folder / "gone").exists() else None)
    print(child.pid, (folder / "orphan").read_text().strip(), *store.pids, flush=True)
    signals.received.wait()
    if "stuck" in sys.argv:
        watchdog.stopping()
    threading.Event().wait()
"""


def eventually(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + patience()
    pause = threading.Event()
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"did not happen in time: {what}")
        pause.wait(0.02)


def ended(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    )


@pytest.fixture
def serving(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A program that serves, and the processes that it has started."""
    command = [sys.executable, "-c", SERVING, str(tmp_path), *getattr(request, "param", ())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        yield process, [int(pid) for pid in process.stdout.readline().split()]
        process.kill()


def test_a_part_that_has_gone_ends_everything_at_once(
    serving: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    process, started = serving

    (tmp_path / "gone").touch()
    _, error = process.communicate(timeout=patience())

    assert process.returncode == 3
    assert error == "weft: the node has gone\n"
    assert len(started) == 4
    assert ended(started)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_everything_at_once(
    serving: tuple[subprocess.Popen[str], list[int]], number: signal.Signals
) -> None:
    process, started = serving

    def has_ended() -> bool:
        process.send_signal(number)
        return process.poll() is not None

    eventually(has_ended, "its end")

    assert process.returncode == 128 + number
    assert process.communicate()[1] == ""
    assert ended(started)


@pytest.mark.parametrize("serving", [("stuck",)], indirect=True)
def test_a_stop_that_gets_stuck_is_ended_with_all_processes(
    serving: tuple[subprocess.Popen[str], list[int]],
) -> None:
    process, started = serving

    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=patience(3))

    assert process.returncode == 0
    assert error == ""
    assert ended(started)


def test_the_store_does_not_outlive_a_process_that_was_killed(
    serving: tuple[subprocess.Popen[str], list[int]],
) -> None:
    process, (child, orphan, *store) = serving

    process.kill()
    process.wait()

    eventually(lambda: ended(store), "the end of the store")
    for pid in (child, orphan):  # nothing of Ray, which ends with its parent
        psutil.Process(pid).kill()


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Restores the handlers of this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signal_handlers")
def test_a_signal_is_seen_and_the_second_is_passed_on() -> None:
    again: list[int] = []

    with StopSignals(again.append) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        seen = signals.received.wait(patience())
        os.kill(os.getpid(), signal.SIGINT)
        eventually(lambda: bool(again), "the second signal")

    assert seen
    assert again == [signal.SIGINT]
    os.kill(os.getpid(), signal.SIGTERM)  # has no effect on a process that is ending


def test_a_pulse_counts_the_polls_since_the_last_answer() -> None:
    answers = threading.Event()
    asked = threading.Event()

    def probe() -> bool:
        asked.set()
        return answers.is_set()

    pulse = Pulse(probe, every_s=0.001)
    pulse.start()
    asked.wait(patience())
    before = [pulse.poll() for _ in range(3)]  # it never answered: still on its way
    answers.set()
    eventually(lambda: pulse.poll() > 0, "the first answer")
    eventually(lambda: pulse.poll() <= 1, "an answer after a poll")
    answers.clear()
    eventually(lambda: pulse.poll() > 20, "polls without an answer")
    pulse.stop()

    assert before == [0, 0, 0]


def test_whatever_is_answered_the_proxy_is_there() -> None:
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        there = answers_http("127.0.0.1", server.server_port)
        server.shutdown()
    gone = answers_http("127.0.0.1", server.server_port)

    assert there
    assert not gone


class RayThatIsSlow:
    """ray.init that leaves a process behind and fails, as on a machine where a node needs over 30 s."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.left: list[subprocess.Popen[bytes]] = []

    def __call__(self, **_options: object) -> None:
        if self.failures:
            self.failures -= 1
            self.left.append(subprocess.Popen(["sleep", "1000"]))
            raise Exception("The current node timed out during startup.\nIt ...")


def test_a_node_that_is_slow_to_start_gets_a_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_init = RayThatIsSlow(failures=1)
    monkeypatch.setattr(local_cluster.ray, "init", ray_init)

    with local_cluster.local_ray():
        pass

    assert ended([process.pid for process in ray_init.left])
    assert [process.wait() is not None for process in ray_init.left] == [True]


def test_a_node_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_init = RayThatIsSlow(failures=2)
    monkeypatch.setattr(local_cluster.ray, "init", ray_init)
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")

    with pytest.raises(RuntimeError) as failed, local_cluster.local_ray():
        pass

    assert "did not start, tried 2 times (The current node timed out during startup.)" in str(failed.value)
    assert "logs are in /elsewhere/ray/session_latest/logs" in str(failed.value)
    assert "\n" not in str(failed.value)
    assert ended([process.pid for process in ray_init.left])
    assert [process.wait() is not None for process in ray_init.left] == [True, True]


def test_processes_that_are_to_be_kept_are_kept() -> None:
    kept, other = subprocess.Popen(["sleep", "1000"]), subprocess.Popen(["sleep", "1000"])
    try:
        children = [child.pid for child in psutil.Process().children()]

        end_descendants(keep=[pid for pid in children if pid != other.pid])

        assert ended([other.pid])
        assert kept.poll() is None
    finally:
        for process in (kept, other):
            process.kill()
            process.wait()
