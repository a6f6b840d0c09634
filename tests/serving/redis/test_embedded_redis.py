"""The bundled Valkey: one per directory, durable, and closed to other users."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis as redis_py

from serve_app.redis import embedded
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.server_files import owner_pid
from tests.patience import patience

KILLED_PARENT = """
import os, signal, sys
from pathlib import Path
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.server_files import owner_pid
server = EmbeddedRedis(Path(sys.argv[1]))
print(server.start(), server.pid, flush=True)
sys.stdin.read()
"""


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience()
    while not true():
        if time.monotonic() > deadline:
            pytest.fail("it did not come true in time")
        time.sleep(0.01)


def answers(url: str) -> bool:
    with redis_py.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis_py.exceptions.ConnectionError:
            return False


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat_file = Path(f"/proc/{pid}/stat")
    return not stat_file.exists() or stat_file.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as url, redis_py.Redis.from_url(url) as client:
        client.set("weft:kept", "yes")

    with EmbeddedRedis(tmp_path) as url, redis_py.Redis.from_url(url) as client:
        kept = client.get("weft:kept")

    assert kept == b"yes"


def test_a_killed_server_is_restarted_with_its_data(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    url = server.start()
    try:
        with redis_py.Redis.from_url(url) as client:
            client.set("weft:kept", "yes")
        first = server.pid

        os.kill(first, signal.SIGKILL)
        eventually(lambda: server.pid != first and answers(url))

        with redis_py.Redis.from_url(url) as client:
            assert client.get("weft:kept") == b"yes"
    finally:
        server.stop()
    assert not lives(server.pid)


def test_a_torn_last_write_does_not_stop_the_next_start(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as url, redis_py.Redis.from_url(url) as client:
        client.set("weft:kept", "yes")
        client.set("weft:torn", "x" * 100)
    newest = max((tmp_path / "valkey" / "appendonlydir").glob("*.incr.aof"))
    os.truncate(newest, newest.stat().st_size - 7)

    with EmbeddedRedis(tmp_path) as url, redis_py.Redis.from_url(url) as client:
        assert client.get("weft:kept") == b"yes"
        assert client.get("weft:torn") is None


def test_a_secret_that_was_lost_is_made_again(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as url, redis_py.Redis.from_url(url) as client:
        client.set("weft:kept", "yes")
    (tmp_path / "valkey" / "secret").write_text("")

    with EmbeddedRedis(tmp_path) as url, redis_py.Redis.from_url(url) as client:
        assert client.get("weft:kept") == b"yes"


def test_the_process_that_serves_from_a_directory_is_known(tmp_path: Path) -> None:
    before = owner_pid(tmp_path)
    with EmbeddedRedis(tmp_path):
        meanwhile = owner_pid(tmp_path)
    after = owner_pid(tmp_path)

    assert (before, meanwhile, after) == (None, os.getpid(), None)


def test_a_second_start_on_one_directory_is_refused(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as url:
        with pytest.raises(RuntimeError, match="in use by another weft serve"):
            EmbeddedRedis(tmp_path).start()

        assert answers(url)


@pytest.mark.parametrize("guarded", [True, False])
def test_the_server_of_a_killed_parent_is_terminated(guarded: bool, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", KILLED_PARENT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        url, text = parent.stdout.readline().split()
        leftover = int(text)
        with redis_py.Redis.from_url(url) as client:
            client.set("weft:kept", "yes")
        if not guarded:  # then the next start has to end it
            (guard,) = (child for child in psutil.Process(parent.pid).children() if child.pid != leftover)
            guard.kill()
        parent.kill()
        parent.wait()
        if guarded:
            eventually(lambda: not lives(leftover))
        else:
            assert lives(leftover)

    with EmbeddedRedis(tmp_path) as url, redis_py.Redis.from_url(url) as client:
        assert not lives(leftover)
        assert client.get("weft:kept") == b"yes"


def test_a_server_that_does_not_restart_has_gone_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "RESTARTS_MAX", 2)
    server = EmbeddedRedis(tmp_path)
    server.start()
    try:
        before = server.failure
        (tmp_path / "valkey" / "users.acl").write_text("no rules")  # it does not start with these

        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: server.failure is not None)

        assert before is None
        assert "did not restart in 2 tries" in str(server.failure)
    finally:
        server.stop()


def test_a_long_path_gets_a_short_private_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    server = EmbeddedRedis(deep)
    try:
        url = server.start()
        socket = Path(url.partition("@")[2])

        assert answers(url)
        assert len(str(socket)) < 100
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    finally:
        server.stop()
    assert not socket.parent.exists()


def test_a_path_with_blanks_and_quotes_works(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / 'my "data" #1') as url:
        assert answers(url)


@pytest.mark.parametrize(
    "command",
    [
        ("EVAL", "return 1", "0"),
        ("CONFIG", "GET", "dir"),
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("MODULE", "LIST"),
        ("GET", "other:key"),
        ("PUBLISH", "other:channel", "x"),
        ("SHUTDOWN",),
    ],
    ids=lambda command: command[0],
)
def test_the_account_may_not(valkey_url: str, command: tuple[str, ...]) -> None:
    with (
        redis_py.Redis.from_url(valkey_url) as client,
        pytest.raises(redis_py.exceptions.NoPermissionError),
    ):
        client.execute_command(*command)


def test_a_client_without_the_secret_is_refused(valkey_url: str) -> None:
    socket = valkey_url.partition("@")[2]

    with (
        redis_py.Redis.from_url(f"unix://{socket}") as client,
        pytest.raises(redis_py.exceptions.AuthenticationError),
    ):
        client.ping()


def test_only_our_user_can_read_the_directory(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path):
        directory = tmp_path / "valkey"

        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for name in ("secret", "users.acl", "valkey.conf"):
            assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600


def test_the_terminals_interrupt_does_not_reach_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    try:
        assert os.getpgid(server.pid) != os.getpgid(os.getpid())
    finally:
        server.stop()
