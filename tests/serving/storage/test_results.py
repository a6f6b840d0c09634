"""Files of jobs: whole or absent, checked, and never outside their folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from deployments.protocol.errors import Internal, NotFound
from serve_app.storage.results import ResultStore, input_path, output_path

JOB = "0123456789abcdef" * 2
OTHER = "f" * 32


@pytest.fixture(params=["directory", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    """The same promises on a local directory and on any other fsspec file system."""
    return ResultStore(str(tmp_path / "new") if request.param == "directory" else f"memory://{tmp_path}")


def image(attempt: int, index: int = 0, kind: str = "image") -> str:
    return output_path(JOB, attempt, index, kind, "image/png")


async def test_a_file_comes_back_as_it_went(anywhere: ResultStore) -> None:
    file = await anywhere.put(image(1), b"pixels")

    assert file.size_bytes == 6
    assert file.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert await anywhere.get(file.path, sha256=file.sha256) == b"pixels"


async def test_the_path_names_job_and_attempt() -> None:
    assert image(2, 1) == f"outputs/{JOB}/2-1.png"
    assert image(2, 1, "thumbnail") == f"outputs/{JOB}/2-1-thumbnail.png"


async def test_a_missing_file_is_not_found(anywhere: ResultStore) -> None:
    with pytest.raises(NotFound):
        await anywhere.get(image(1))


async def test_a_changed_file_is_refused(anywhere: ResultStore) -> None:
    file = await anywhere.put(image(1), b"pixels")
    await anywhere.put(image(1), b"others")

    with pytest.raises(Internal, match="damaged"):
        await anywhere.get(file.path, sha256=file.sha256)


async def test_a_sweep_keeps_what_was_committed_and_nothing_else(anywhere: ResultStore) -> None:
    for path in (image(1), image(2), image(2, 0, "thumbnail"), input_path(JOB, "image")):
        await anywhere.put(path, b"x")
    await anywhere.put(input_path(OTHER, "image"), b"x")

    await anywhere.sweep(JOB, keep=[image(2)])

    assert await anywhere.get(image(2)) == b"x"
    assert await anywhere.get(input_path(OTHER, "image")) == b"x"
    for gone in (image(1), image(2, 0, "thumbnail"), input_path(JOB, "image")):
        with pytest.raises(NotFound):
            await anywhere.get(gone)


async def test_a_lost_attempt_takes_only_its_own_files(anywhere: ResultStore) -> None:
    await anywhere.put(image(1), b"lost")
    await anywhere.put(image(11), b"won")

    await anywhere.discard(JOB, 1)

    assert await anywhere.get(image(11)) == b"won"
    with pytest.raises(NotFound):
        await anywhere.get(image(1))


async def test_removing_what_is_not_there_is_fine(anywhere: ResultStore) -> None:
    await anywhere.sweep(JOB)
    await anywhere.discard(JOB, 1)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "/etc/passwd",
        f"outputs/{JOB}/../../secret",
        f"outputs/{JOB}/..",
        f"outputs/{JOB}/.hidden",
        f"outputs/{JOB}/a/b",
        "outputs/short/1-0.png",
        f"outputs/{JOB}/1-0.png\0",
        f"outputs/{JOB}/1-0.png\n",
        f"other/{JOB}/1-0.png",
    ],
)
async def test_no_path_leads_outside(results: ResultStore, path: str) -> None:
    with pytest.raises(NotFound):
        await results.get(path)
    with pytest.raises(NotFound):
        await results.put(path, b"x")
    with pytest.raises(NotFound):
        await results.sweep("../outputs")


async def test_a_write_that_fails_leaves_no_part(
    results: ResultStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)

    with pytest.raises(OSError, match="No space"):
        await results.put(image(1), b"pixels")

    assert list((tmp_path / "results" / "outputs" / JOB).iterdir()) == []


async def test_an_empty_job_leaves_no_folder(results: ResultStore, tmp_path: Path) -> None:
    await results.put(image(1), b"x")

    await results.sweep(JOB)

    assert not (tmp_path / "results" / "outputs" / JOB).exists()


async def test_too_little_free_space_is_reported(tmp_path: Path) -> None:
    assert await ResultStore(str(tmp_path), min_free_bytes=1).free_space_ok()
    assert not await ResultStore(str(tmp_path), min_free_bytes=2**60).free_space_ok()
    assert await ResultStore("memory://anywhere", min_free_bytes=2**60).free_space_ok()
