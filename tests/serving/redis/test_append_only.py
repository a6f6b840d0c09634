"""The log of the embedded store: whole, torn, zero-filled, without its manifest, broken; `weft repair`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_py
from hypothesis import given
from hypothesis import strategies as st

from serve_app.cli.main import main
from serve_app.redis.append_only import DamagedLog, is_begun
from serve_app.redis.embedded import EmbeddedRedis

KEYS = 20
BASE, CHANGES, MANIFEST = "appendonly.aof.1.base.rdb", "appendonly.aof.1.incr.aof", "appendonly.aof.manifest"


@pytest.fixture(scope="session")
def whole_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a store that was stopped after KEYS changes and one transaction."""
    folder = tmp_path_factory.mktemp("store")
    with EmbeddedRedis(folder) as url, redis_py.Redis.from_url(url) as client:
        for number in range(KEYS):
            client.set(f"weft:{number}", "x" * 50)
        with client.pipeline() as both:
            both.set("weft:first", "1").set("weft:second", "2").execute()
    return folder


@pytest.fixture
def data(whole_log: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole_log, tmp_path / "data")
    return tmp_path / "data"


def log(data: Path, name: str) -> Path:
    return data / "valkey" / "appendonlydir" / name


def keys_after_start(data: Path, notes: list[str]) -> int:
    with EmbeddedRedis(data, report=notes.append) as url, redis_py.Redis.from_url(url) as client:
        return sum(1 for _ in client.scan_iter("weft:*"))


def cut(data: Path) -> None:
    os.truncate(log(data, CHANGES), log(data, CHANGES).stat().st_size - 7)


def add_zeros(data: Path) -> None:
    with log(data, CHANGES).open("ab") as file:
        file.write(b"\0" * 5000)


def cut_and_add_zeros(data: Path) -> None:
    cut(data)
    add_zeros(data)


def change_end(data: Path) -> None:
    content = log(data, CHANGES).read_bytes()
    log(data, CHANGES).write_bytes(content[:-20] + b"*1\r\n!garbage, EXEC\r\n")


def zeros_amid(data: Path) -> None:
    content = log(data, CHANGES).read_bytes()
    middle = content.index(b"*3\r\n", len(content) // 2)
    log(data, CHANGES).write_bytes(content[:middle] + b"\0" * 20 + content[middle + 20 :])


def remove(name: str) -> Callable[[Path], None]:
    return lambda data: log(data, name).unlink()


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda data: log(data, name).write_bytes(content) and None


def newer_base(data: Path) -> None:
    log(data, BASE).write_bytes(b"REDIS0999" + log(data, BASE).read_bytes()[9:])


def broken_base(data: Path) -> None:
    os.truncate(log(data, BASE), 40)


def two_bases(data: Path) -> None:
    log(data, MANIFEST).unlink()
    shutil.copy(log(data, BASE), log(data, "appendonly.aof.2.base.rdb"))


def gap(data: Path) -> None:
    log(data, MANIFEST).unlink()
    shutil.copy(log(data, CHANGES), log(data, "appendonly.aof.3.incr.aof"))


def old_manifest(data: Path) -> None:
    shutil.copy(log(data, CHANGES), log(data, "appendonly.aof.2.incr.aof"))


def only_manifest(data: Path) -> None:
    log(data, BASE).unlink()
    log(data, CHANGES).unlink()


def remove_all(data: Path) -> None:
    shutil.rmtree(log(data, ""))


SAFE = {
    "nothing": (lambda _: None, KEYS + 2, ""),
    "zeros at the end": (add_zeros, KEYS + 2, "the last 5000 bytes of"),
    "a torn transaction": (cut, KEYS, "one change that was not written whole"),
    "a torn transaction and zeros": (cut_and_add_zeros, KEYS, "nothing that was confirmed was in them"),
    "no manifest": (remove(MANIFEST), KEYS + 2, "written again from the 2 files beside it"),
    "an empty manifest": (overwrite(MANIFEST, b""), KEYS + 2, "missing or broken"),
    "a manifest of zeros": (overwrite(MANIFEST, b"\0" * 88), KEYS + 2, "missing or broken"),
    "a manifest without the base": (
        overwrite(MANIFEST, f"file {CHANGES} seq 1 type i\n".encode()),
        KEYS + 2,
        "written again from the 2 files beside it",
    ),
    "nothing at all": (remove_all, 0, "it starts empty"),
}


@pytest.mark.parametrize(("damage", "keys", "words"), SAFE.values(), ids=SAFE)
def test_what_loses_nothing_is_repaired_and_reported(
    damage: Callable[[Path], None], keys: int, words: str, data: Path
) -> None:
    damage(data)
    notes: list[str] = []
    later: list[str] = []

    found = keys_after_start(data, notes)
    again = keys_after_start(data, later)

    assert (found, again) == (keys, keys)
    assert (words in notes[0] and len(notes) == 1) if words else notes == []
    assert later == []


def test_what_is_taken_out_is_kept(data: Path) -> None:
    end = log(data, CHANGES).read_bytes()[1673:-7]
    cut(data)

    keys_after_start(data, [])

    (kept,) = (data / "valkey").glob("*.removed-*")
    assert kept.read_bytes().endswith(end[-20:])
    assert log(data, CHANGES).read_bytes().endswith(b"\r\n")


REFUSED = {
    "a broken end": (change_end, "weft repair"),
    "zeros before other changes": (zeros_amid, "weft repair"),
    "no base": (remove(BASE), f"{BASE} is missing; restore data/valkey"),
    "no changes": (remove(CHANGES), f"{CHANGES} is missing; restore data/valkey"),
    "a base of a newer version": (newer_base, "written by another version"),
    "a base of something else": (overwrite(BASE, b"no RDB file"), "is broken"),
    "a base that was cut": (broken_base, f"{BASE} is broken; restore data/valkey"),
    "two bases without a manifest": (two_bases, "do not show which of them belong together"),
    "a manifest of an earlier day": (old_manifest, "does not name appendonly.aof.2.incr.aof, which holds"),
    "a manifest alone": (only_manifest, f"{BASE} is missing; restore data/valkey"),
    "a gap without a manifest": (gap, "do not show which of them belong together"),
}


@pytest.mark.parametrize(("damage", "words"), REFUSED.values(), ids=REFUSED)
def test_what_may_lose_jobs_stops_the_start_and_changes_nothing(
    damage: Callable[[Path], None], words: str, data: Path
) -> None:
    damage(data)
    before = {path.name: path.read_bytes() for path in log(data, "").iterdir()}

    with pytest.raises(DamagedLog) as refused:
        EmbeddedRedis(data).start()

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path.name: path.read_bytes() for path in log(data, "").iterdir()} == before


@pytest.fixture
def weft_repair(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    monkeypatch.setenv("WEFT_DATA_DIR", str(data))

    def run(*options: str) -> tuple[int, str]:
        status = main(["repair", *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_repair_shows_first_and_removes_on_demand(
    data: Path, weft_repair: Callable[..., tuple[int, str]]
) -> None:
    zeros_amid(data)
    size = log(data, CHANGES).stat().st_size

    shown = weft_repair()
    unchanged = log(data, CHANGES).stat().st_size
    done = weft_repair("--yes")
    again = weft_repair()

    assert shown[0] == 1
    assert "which may be jobs" in shown[1]
    assert unchanged == size
    assert done[0] == 0
    assert "are kept as" in done[1]
    assert (again[0], again[1].strip()) == (0, f"the job store in {data / 'valkey'} is whole")
    assert 0 < keys_after_start(data, []) < KEYS


def test_repair_says_what_it_cannot_mend(data: Path, weft_repair: Callable[..., tuple[int, str]]) -> None:
    broken_base(data)

    status, text = weft_repair("--yes")

    assert status == 1
    assert "Nothing of it can be repaired; restore data/valkey from a back-up" in text


def test_repair_leaves_a_running_store_alone(data: Path, weft_repair: Callable[..., tuple[int, str]]) -> None:
    with EmbeddedRedis(data):
        status, text = weft_repair("--yes")

    assert status == 1
    assert "stop weft serve first" in text


def test_repair_without_a_store_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path / "none"))

    assert main(["repair"]) == 1
    assert "there is no embedded job store" in capsys.readouterr().err


@given(
    st.lists(st.lists(st.binary(min_size=0, max_size=40), min_size=1, max_size=4), min_size=1, max_size=4),
    st.data(),
)
def test_every_beginning_of_commands_is_known_as_one(
    commands: list[list[bytes]], draw: st.DataObject
) -> None:
    written = b"".join(
        b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in command)
        for command in commands
    )
    end = draw.draw(st.integers(0, len(written)))

    assert is_begun(written[:end])
    assert not is_begun(written + b"\0" * 20 + written)
