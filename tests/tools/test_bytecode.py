"""What an install compiles is what processes import."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tools.bytecode import MODULES, RAY_FOLDERS


@pytest.mark.parametrize("name", [name for names in MODULES.values() for name in names])
def test_every_module_that_is_compiled_exists(name: str) -> None:
    assert find_spec(name) is not None


def test_the_folders_of_rays_own_processes_exist() -> None:
    assert all(find_spec(f"ray.{folder}") is not None for folder in RAY_FOLDERS)
