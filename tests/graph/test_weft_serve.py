"""`weft serve` as a newcomer runs it: one command up, Ctrl+C down, pictures kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.graph.calls import ended, submit
from tests.graph.running import PATIENCE_S, RAY, ROOT, free_port

pytestmark = pytest.mark.ray


def environment(data: Path, **extra: str) -> dict[str, str]:
    """Ours, without what the shared service of this folder may have set."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("WEFT_", "REDIS_"))}
    return ours | {"WEFT_DATA_DIR": str(data)} | RAY | extra


@contextmanager
def weft_serve(data: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """The command running and ready; ended with the block by Ctrl+C, as from a terminal."""
    command = [sys.executable, "-m", "serve_app.cli", "serve", "--port", str(port)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(data),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if "Ctrl+C ends it" in line:
                break
        else:
            pytest.fail("weft serve did not start:\n" + "".join(said))
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGINT)  # what a terminal does: the whole group
            process.communicate(timeout=PATIENCE_S)


def test_ctrl_c_ends_all_it_started_and_a_second_start_keeps_jobs_and_pictures(tmp_path: Path) -> None:
    port = free_port()
    with weft_serve(tmp_path, port) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        job = ended(client, submit(client, prompt="a red circle", seed=1))
        image = client.get(job["artifacts"][0]["url"]).content
        family = psutil.Process(process.pid).children(recursive=True)
    assert process.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert alive == []

    with weft_serve(tmp_path, port), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        again = client.get(f"/api/generate/{job['id']}").json()
        assert again["status"] == "completed"
        assert client.get(again["artifacts"][0]["url"]).content == image


def test_a_second_serve_on_the_same_data_is_refused_in_words(tmp_path: Path) -> None:
    from serve_app.redis.embedded import EmbeddedRedis

    with EmbeddedRedis(tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "serve_app.cli", "serve", "--port", str(free_port())],
            cwd=ROOT,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    assert done.returncode == 1
    assert "in use by another weft serve" in done.stderr


def test_an_unknown_setting_stops_the_start_with_its_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli", "serve"],
        cwd=ROOT,
        env=environment(tmp_path, WEFT_LEESE_S="3"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert done.returncode == 1
    assert "WEFT_LEESE_S" in done.stderr
