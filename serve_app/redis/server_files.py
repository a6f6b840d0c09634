"""The directory of an embedded server: its locks, secret, access rules, configuration and log."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote

SOCKET_PATH_MAX_BYTES = 100  # the kernel takes 107; some systems less

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


class ServerFiles:
    """Files of one server in `{data_dir}/valkey`; only our user can read them."""

    def __init__(self, data_dir: Path) -> None:
        self.directory = data_dir.resolve() / "valkey"
        self.config = self.directory / "valkey.conf"
        self._log = self.directory / "valkey.log"
        self._pid = self.directory / "valkey.pid"
        self._socket = self.directory / "valkey.sock"
        self._short_directory: Path | None = None  # holds the socket when its path would be too long
        self._secret = ""

    @property
    def url(self) -> str:
        """The only address of the server, with its password."""
        return _url(self._secret, str(self._socket))

    def create_directory(self) -> None:
        """Create the directory with mode 0700."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)

    def lock(self, name: str) -> int:
        """The descriptor of an open file that holds the lock, or -1 when another process has it."""
        file = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return -1
        return file

    def write(self, prefix: str) -> None:
        """Write secret, access rules and configuration. prefix: of the keys that the account may use."""
        if len(os.fsencode(self._socket)) > SOCKET_PATH_MAX_BYTES:
            self._short_directory = Path(tempfile.mkdtemp(prefix="weft-"))  # mkdtemp sets mode 0700
            self._socket = self._short_directory / "valkey.sock"
        secret, acl = self.directory / "secret", self.directory / "users.acl"
        if not secret.exists() or not secret.read_text().strip():  # by a disk that was full
            _write_private(secret, secrets.token_urlsafe(32))
        self._secret = secret.read_text()
        digest = hashlib.sha256(self._secret.encode()).hexdigest()
        rules = RULES.format(prefix=prefix)
        _write_private(acl, f"user default off\nuser app on #{digest} {rules}\n")
        paths = {
            "socket": self._socket,
            "directory": self.directory,
            "pid_file": self._pid,
            "log_file": self._log,
            "acl_file": acl,
        }
        _write_private(self.config, CONFIG.format(**{name: _quoted(path) for name, path in paths.items()}))

    def write_owner(self, lock: int, pid: int | None) -> None:
        """Note in the owner's lock file which process has it; None: that none does."""
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(pid or "").encode(), 0)

    def running_pid(self) -> int | None:
        """The process that uses our configuration file; None while that is uncertain."""
        try:
            pid = int(self._pid.read_text())
        except (FileNotFoundError, ValueError):  # it is starting or exiting
            return None
        return pid if str(self.config) in _command_line(pid) else None

    def log_tail(self) -> str:
        """The last lines of the log."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return " | ".join(lines[-3:]) or f"there is no {self._log}"

    def remove_socket(self) -> None:
        """Remove the short directory of the socket, if there is one."""
        if self._short_directory is not None:
            shutil.rmtree(self._short_directory, ignore_errors=True)


def owner_pid(data_dir: Path) -> int | None:
    """The process that serves from this directory, such as `weft serve`; None without one."""
    try:  # not by the lock: a start at this moment would find it taken
        pid = int((data_dir.resolve() / "valkey" / "owner.lock").read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def configured_url(data_dir: Path) -> str | None:
    """The URL of the server that was last configured for this directory; None without one.

    Raises RuntimeError when another user configured it.
    """
    directory = data_dir.resolve() / "valkey"
    try:
        secret = (directory / "secret").read_text()
        lines = (directory / "valkey.conf").read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise RuntimeError(
            f"{error.filename} belongs to another user; run this as the user that runs weft serve"
        ) from None
    quoted = next((line.partition(" ")[2] for line in lines if line.startswith("unixsocket ")), None)
    if quoted is None:
        return None
    socket = quoted.removeprefix('"').removesuffix('"').replace('\\"', '"').replace("\\\\", "\\")
    return _url(secret, socket)


def _url(secret: str, socket: str) -> str:
    return f"unix://app:{secret}@{quote(socket)}"


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
