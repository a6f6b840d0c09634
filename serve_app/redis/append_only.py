"""The append-only log of an embedded Valkey: checked before it is loaded, repaired where that loses nothing.

A log is a base file and the changes since, in files that a manifest names in order. Without the manifest the
server would start empty and overwrite them; at a bad byte it would stop, with the name of a tool that we do
not ship. The program itself checks the files, called by the name of that tool.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = "appendonlydir"
NAME = "appendonly.aof"
MANIFEST = f"{NAME}.manifest"
FILE = re.compile(rf"{re.escape(NAME)}\.(\d+)\.(base|incr)\.(?:rdb|aof)")
LINE = re.compile(r'file "?([^"\s]+)"? seq (\d+) type ([bih])(?: .*)?')
VALID_UP_TO = re.compile(r"ok_up_to=(\d+)")
NEWER = re.compile(r"Can't handle RDB format version|Unsupported RDB version|[Ww]rong signature")
CHECK_LIMIT_S = 300.0
RESTORE = (
    "restore data/valkey from a back-up (docs/operations.md), or move {folder} away to start without its jobs"
)


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a log."""

    text: str  # what is wrong
    safe: bool = False  # whether the repair loses nothing that was confirmed
    repair: Callable[[], str] | None = None  # mends it and returns what was done; None: nothing of ours can
    advice: str = ""  # what to do where nothing of ours can


class DamagedLog(RuntimeError):
    """The log cannot be loaded as it is; the message says what to do."""


def mend(directory: Path, server: str) -> list[str]:
    """Repair what can be repaired without loss, and return a sentence for each thing that was done or is odd.

    directory: of the server's files.  server: its program.
    Raises DamagedLog when the server must not start on these files.
    """
    done = []
    while damage := inspect(directory, server):
        if damage.repair is None or not damage.safe:
            cure = damage.advice or "`weft repair` shows what a repair would remove"
            raise DamagedLog(f"the job store is damaged: {damage.text}; {cure}")
        done.append(f"{damage.text}; {damage.repair()}")
    if not _parts(directory / FOLDER) and (directory / "secret").exists():
        done.append(
            f"the job store in {directory} was used before and has no data now: it starts empty (stop, and "
            "restore a back-up, unless that is as it should be)"
        )
    return done


def inspect(directory: Path, server: str) -> Damage | None:
    """The first damage of the log in this directory; None when it can be loaded, or there is none yet.

    Raises DamagedLog for files that our user may not read and write.
    """
    folder = directory / FOLDER
    try:
        parts = _parts(folder)
        if not parts and not (folder / MANIFEST).exists():
            return None
        listed = _manifest(folder)
        if listed is None or (parts.get("base") and "b" not in listed.values()):
            return _without_manifest(folder, parts)
        return next(_damages(folder, listed, parts, server), None)
    except PermissionError as error:
        raise DamagedLog(
            f"{error.filename} cannot be read and written; give this user the permission (chown -R)"
        ) from None


def _parts(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """The files of a log by kind (base, incr), each with its number; empty without any."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := FILE.fullmatch(path.name):
            parts.setdefault(match[2], []).append((int(match[1]), path.name))
    return {kind: sorted(files) for kind, files in parts.items()}


def _manifest(folder: Path) -> dict[str, str] | None:
    """The names of the files in order, with their type: b(ase), i(ncrement), h(istory).

    None when the manifest is missing or not one.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    lines = [LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    if not lines or not all(lines):
        return None
    return {line[1]: line[3] for line in lines if line is not None}


def _without_manifest(folder: Path, parts: dict[str, list[tuple[int, str]]]) -> Damage:
    """A manifest can be made again when there is one base, and no gap in the changes."""
    text = (
        f"{folder / MANIFEST} is missing or broken, and the server would start empty and overwrite the jobs"
    )
    bases, changes = parts.get("base", []), parts.get("incr", [])
    numbers = [number for number, _ in changes]
    if len(bases) != 1 or (numbers and numbers != [*range(numbers[0], numbers[0] + len(numbers))]):
        return Damage(
            f"{text}; the files beside it do not show which of them belong together",
            advice=RESTORE.format(folder=folder),
        )
    lines = [f"file {name} seq {number} type b\n" for number, name in bases]
    lines += [f"file {name} seq {number} type i\n" for number, name in changes]

    def write() -> str:
        old = folder / MANIFEST
        if old.exists():
            old.replace(_kept(folder, MANIFEST))
        new = folder / f"{MANIFEST}.new"
        new.write_text("".join(lines), encoding="utf-8")
        new.replace(old)
        return f"it has been written again from the {len(lines)} files beside it"

    return Damage(text, safe=True, repair=write)


def _damages(
    folder: Path, listed: dict[str, str], parts: dict[str, list[tuple[int, str]]], server: str
) -> Iterator[Damage]:
    advice = RESTORE.format(folder=folder)
    for _, name in parts.get("incr", []):
        if name not in listed and (folder / name).stat().st_size:  # an empty one had just been made
            yield Damage(f"{folder / MANIFEST} does not name {name}, which holds changes", advice=advice)
    names = [name for name, kind in listed.items() if kind != "h"]
    for name in names:
        path = folder / name
        if not path.exists():
            yield Damage(f"{path} is missing", advice=advice)
            continue
        with path.open("r+b") as file:  # also shows whether we may write it
            is_rdb = file.read(5) in (b"REDIS", b"VALKE")
            size = path.stat().st_size
        if is_rdb or name.endswith(".rdb"):
            yield from _damages_of_base(path, is_rdb, server, advice)
            continue
        valid = _valid_up_to(path, server)
        if valid is None or valid >= size:
            continue
        if name != names[-1]:
            yield Damage(f"{path} is broken at byte {valid}, and later changes follow it", advice=advice)
        else:
            yield _broken_end(path, valid, size)


def _damages_of_base(path: Path, is_rdb: bool, server: str, advice: str) -> Iterator[Damage]:
    done = _check("rdb", path, server)
    if done.returncode == 0:
        return
    if is_rdb and NEWER.search(done.stdout):
        yield Damage(
            f"{path} was written by another version of Valkey or Redis than {server}",
            advice="start with the version that wrote it, or a newer one",
        )
    elif "RDB" in done.stdout:
        yield Damage(f"{path} is broken", advice=advice)


def _broken_end(path: Path, valid: int, size: int) -> Damage:
    with path.open("rb") as file:
        file.seek(valid)
        end = file.read()
    written = end.rstrip(b"\0")
    torn = is_begun(written)
    what = (
        f"the last {size - valid} bytes of {path} are "
        + ("zeros" if not written else "one change that was not written whole")
        if torn
        else f"{path} is broken at byte {valid} of {size}, and other changes may follow it"
    )

    def cut() -> str:
        kept = _kept(path.parent, f"{path.name}.from-byte-{valid}")
        kept.write_bytes(end)
        with path.open("r+b") as file:
            file.truncate(valid)
        return f"they have been removed, and are kept as {kept}" + (
            "; nothing that was confirmed was in them" if torn else ""
        )

    return Damage(what, safe=torn, repair=cut)


def is_begun(data: bytes) -> bool:
    """Whether these bytes are the beginning of commands in the server's protocol, and end before one does."""
    position = 0
    pending = 0  # arguments of the current command that are still to come
    while position < len(data):
        end = data.find(b"\r\n", position)
        if end < 0:
            return re.fullmatch(rb"[*$]\d{0,9}\r?", data[position:]) is not None
        match = re.fullmatch(rb"([*$])(\d{1,9})", data[position:end])
        if match is None or (match[1] == b"$") != (pending > 0):
            return False
        position = end + 2
        if match[1] == b"*":
            pending = int(match[2])
            continue
        pending -= 1
        position += int(match[2]) + 2
        if position <= len(data) and data[position - 2 : position] != b"\r\n":
            return False
    return True


def _kept(folder: Path, name: str) -> Path:
    """A name for what is taken out of the log, outside of its folder; no earlier one is overwritten."""
    paths = (folder.parent / f"{name}.removed-{number}" for number in range(1, 10_000))
    return next(path for path in paths if not path.exists())


def _valid_up_to(path: Path, server: str) -> int | None:
    """How many bytes of a file of changes are whole commands; None when the program does not say."""
    match = VALID_UP_TO.search(_check("aof", path, server).stdout)
    return None if match is None else int(match[1])


def _check(kind: str, path: Path, server: str) -> subprocess.CompletedProcess[str]:
    """Run the server's program as its own checking tool, which it is under that name."""
    tool = Path(server).name.replace("-server", f"-check-{kind}")
    return subprocess.run(
        [tool, str(path)],
        executable=server,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=CHECK_LIMIT_S,
        check=False,
        env={"LC_ALL": "C"},
    )
