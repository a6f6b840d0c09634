"""`weft serve` where nothing but its folders can be written, as in a container with a read-only root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.graph.running import PATIENCE_S, ROOT, free_port, until
from tests.patience import patience

pytestmark = pytest.mark.ray

PLACES = ("tmp", "outputs", "models")
# a mount namespace of its own: the root read-only, with the three folders writable again
SEALED = """
mount --bind / / && mount -o remount,bind,ro / && cd "$ROOT"
for place in tmp outputs models; do
  mount --bind "$HERE/$place" "$HERE/$place" && mount -o remount,bind,rw "$HERE/$place"
done
if touch "$ROOT/written" 2>/dev/null; then echo "the root can be written"; exit 9; fi
exec env -u ROOT -u HERE "$@"
"""


def namespaces() -> bool:
    """Whether this user may make a mount namespace."""
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "--bind", "/", "/"], capture_output=True, check=False
    )
    return tried.returncode == 0


@pytest.fixture
def sealed() -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """`weft serve` without a home directory; its address, and the folder above the three."""
    if not sys.platform.startswith("linux") or not namespaces():
        pytest.skip("needs Linux and the right to make a mount namespace")
    # short: Ray's unix sockets lie far below it, and their paths end at 107 bytes
    here, port = Path(tempfile.mkdtemp()), free_port()
    for place in PLACES:
        (here / place).mkdir()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(here / "tmp"),
        "WEFT_DATA_DIR": str(here / "outputs"),
        "HF_HOME": str(here / "models/huggingface"),
        "WEFT_MODEL_CACHE": str(here / "models/weft"),
        "HOME": str(here / "no home"),
        "RAY_worker_niceness": "0",
        "ROOT": str(ROOT),
        "HERE": str(here),
    }
    command = [
        "unshare",
        "--mount",
        "sh",
        "-euc",
        SEALED,
        "sh",
        sys.executable,
        "-m",
        "serve_app.cli",
        "serve",
    ]
    with (here / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )
    try:
        yield process, f"http://127.0.0.1:{port}", here
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        psutil.wait_procs(family, timeout=patience())
        for one in family:
            if one.is_running():
                one.kill()
        process.kill()
        process.wait()
        shutil.rmtree(here, ignore_errors=True)


def test_a_picture_is_made_where_only_the_volumes_can_be_written(
    sealed: tuple[subprocess.Popen[str], str, Path],
) -> None:
    process, url, here = sealed

    def ready() -> bool:
        assert process.poll() is None, (here / "log").read_text()
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    until(ready, f"it serves; see {here / 'log'}", every_s=0.5)
    body = {"model": "tiny-flux-schnell", "prompt": "a red circle", "response_format": "b64_json"}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=PATIENCE_S)

    assert answer.status_code == 200, answer.text
    assert not (here / "no home").exists()
    assert (here / "outputs/ray_token").stat().st_mode & 0o077 == 0
    assert (here / "tmp/ray").is_dir()
