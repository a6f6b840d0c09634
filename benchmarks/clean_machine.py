"""Seconds from `git clone` to the first image, and the time of `make test`, on a clean machine.

Both run in a fresh clone with a virtual environment of its own; package files may be cached by pip.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import ledger

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 1800.0


def clone(folder: Path) -> Path:
    """A fresh clone of this repository's HEAD."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "weft")], check=True)
    return folder / "weft"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_picture_s(folder: Path) -> float:
    """Seconds from before the clone to the bytes of the first image of `make serve`."""
    began = time.monotonic()
    repository = clone(folder)
    port = free_port()
    environment = os.environ | {"WEFT_PORT": str(port), "WEFT_DATA_DIR": str(folder / "data")}
    serve = subprocess.Popen(["make", "serve"], cwd=repository, env=environment, start_new_session=True)
    try:
        body = {"prompt": "a red circle", "response_format": "b64_json"}
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        while time.monotonic() - began < LIMIT_S and serve.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    assert httpx.post(url, json=body, timeout=60).json()["data"][0]["b64_json"]
                    return time.monotonic() - began
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise RuntimeError("make serve returned no image")
    finally:
        os.killpg(serve.pid, signal.SIGINT)
        serve.wait(60)


def suite_s(folder: Path) -> float:
    """Seconds of `make test` in a fresh clone, the installation included."""
    began = time.monotonic()
    subprocess.run(["make", "test"], cwd=clone(folder), check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", action="store_true", help="time `make test` instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.suite:
            notes = "make test in a fresh clone, installation included, packages cached"
            ledger.record("suite_s", suite_s(Path(folder)), "s", notes=notes)
        else:
            notes = "git clone, make serve, first picture by HTTP; packages cached; most of it is pip"
            ledger.record("first_picture_s", first_picture_s(Path(folder)), "s", notes=notes)


if __name__ == "__main__":
    main()
