"""The folder of the examples: files there must outlive the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.ray_job import check_folder


@pytest.fixture
def copy_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `ray job submit --working-dir .` runs a program."""
    copy = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)


@pytest.mark.usefixtures("copy_of_a_job")
def test_a_relative_folder_is_refused_where_ray_removes_it() -> None:
    with pytest.raises(ValueError, match="images/ would be removed"):
        check_folder("images/")


@pytest.mark.usefixtures("copy_of_a_job")
@pytest.mark.parametrize("folder", ["s3://my-bucket/images", "/mnt/images"])
def test_folders_elsewhere_are_taken(folder: str) -> None:
    check_folder(folder)


def test_beside_weft_serve_any_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    check_folder("images/")
