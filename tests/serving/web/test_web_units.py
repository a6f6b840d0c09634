"""The page's own unit tests and types, run by Node. Where Node is missing they are skipped, except in CI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.patience import patience

HERE = Path(__file__).parent
WEB = Path(__file__).parents[3] / "serve_app" / "web"
OLDEST_NODE = 20


def _missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def node() -> str:
    path = shutil.which("node")
    if path is None:
        _missing(f"node is not on the PATH; the page's unit tests need Node {OLDEST_NODE} or newer")
        raise AssertionError
    version_text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.match(r"v(\d+)", version_text)
    if version is None or int(version[1]) < OLDEST_NODE:
        _missing(f"node is {version_text.strip()}; the page's unit tests need Node {OLDEST_NODE} or newer")
    return path


def test_the_units_of_the_page(node: str) -> None:
    files = sorted(str(path) for path in (HERE / "js").glob("*.test.mjs"))

    done = subprocess.run([node, "--test", *files], capture_output=True, text=True, timeout=patience(4))

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_types_of_the_page() -> None:
    """tsc is a development tool only: `npm install -g typescript@<version in package.json>`."""
    path = shutil.which("tsc")
    if path is None:
        if os.environ.get("CI_TYPES"):
            pytest.fail("CI_TYPES is set, but tsc is not on the PATH")
        pytest.skip("tsc is not on the PATH; see serve_app/web/package.json for its version")

    done = subprocess.run(
        [path, "-p", str(WEB / "jsconfig.json")], capture_output=True, text=True, timeout=patience(4)
    )

    assert done.returncode == 0, done.stdout
