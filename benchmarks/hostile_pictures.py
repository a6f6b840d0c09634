"""What a hostile picture costs: the time to read a header, and the /health of others while one is posted.

python benchmarks/hostile_pictures.py [--rounds 8] [--dry]

The app of an ingress replica runs under uvicorn in a process of its own, with Valkey and without Ray; a
second process posts a picture of nearly 20 MB again and again, while this one asks for /health 50 times a
second, each time on a new connection.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import uvicorn

from benchmarks import ledger
from deployments.protocol.errors import WeftError
from deployments.validation.image_header import read_image_header
from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.services import Services
from serve_app.settings import Settings

SIZE_BYTES = 19_500_000
EVERY_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    options = parser.parse_args()
    headers(options.dry)
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as url:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(url, port, folder))
        server.start()
        try:
            asyncio.run(health(f"http://127.0.0.1:{port}", options.rounds, options.dry))
        finally:
            server.terminate()
            server.join()


def headers(dry: bool) -> None:
    """Measure milliseconds to read or refuse the header of every kind of picture; the slowest kind counts."""
    slowest, which = 0.0, ""
    for name, data in pictures().items():
        taken_ms = min(header_ms(data) for _ in range(20))
        slowest, which = max((slowest, which), (taken_ms, name))
    keep(
        "picture_header_slowest_ms", slowest, f"the slowest of {len(pictures())} kinds: {which}", "", 20, dry
    )


def header_ms(data: bytes) -> float:
    began = time.perf_counter()
    with contextlib.suppress(WeftError):
        read_image_header(data, "image")
    return 1000 * (time.perf_counter() - began)


async def health(address: str, rounds: int, dry: bool) -> None:
    """Measure milliseconds of /health: alone, and while each kind of picture is posted."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        await until_served(client)
        keep_latencies("health_alone", await latencies(client, asyncio.sleep(5)), "without other calls", dry)
        kinds = pictures()
        for name, data in {"hostile": kinds["a million chunks"], "sound": kinds["a sound picture"]}.items():
            for form in ("json", "form"):
                posting = asyncio.to_thread(posted, address, name, form, rounds)
                taken = await latencies(client, posting)
                note = f"a {name} picture of {len(data) / 1e6:.1f} MB is posted {rounds} times, as {form}"
                keep_latencies(f"health_during_{name}_{form}", taken, note, dry)


def posted(address: str, name: str, form: str, rounds: int) -> None:
    """Return when another process has posted the picture so often."""
    poster = multiprocessing.get_context("spawn").Process(target=post, args=(address, name, form, rounds))
    poster.start()
    poster.join()


def post(address: str, name: str, form: str, rounds: int) -> None:
    """The poster's process."""
    data = pictures()["a million chunks" if name == "hostile" else "a sound picture"]
    fields = {"prompt": "a fox", "model": "tiny-flux-schnell"}
    with httpx.Client(base_url=address, timeout=120) as client:
        if form == "json":
            body = json.dumps(fields | {"image": base64.b64encode(data).decode()}).encode()
            call = {"content": body, "headers": {"content-type": "application/json"}}
        else:
            call = {"data": fields, "files": {"image": ("a.png", data)}}
        for _ in range(rounds):
            client.post("/api/generate/image", **call)


async def latencies(client: httpx.AsyncClient, work: Awaitable[object]) -> list[float]:
    """Milliseconds of /health, asked for every EVERY_S whether the last was answered or not, until then."""
    doing = asyncio.ensure_future(work)
    calls = []
    while not doing.done():
        calls.append(asyncio.create_task(one(client)))
        await asyncio.sleep(EVERY_S)
    await doing
    return await asyncio.gather(*calls)


async def one(client: httpx.AsyncClient) -> float:
    began = time.perf_counter()
    (await client.get("/health")).raise_for_status()
    return 1000 * (time.perf_counter() - began)


async def until_served(client: httpx.AsyncClient) -> None:
    while True:
        try:
            (await client.get("/health")).raise_for_status()
        except httpx.TransportError:
            await asyncio.sleep(0.1)
        else:
            return


def serve(url: str, port: int, folder: str) -> None:
    """The server's process."""
    asyncio.run(_serve(Settings(redis_url=url, data_dir=Path(folder), min_free_bytes=0), port))


async def _serve(settings: Settings, port: int) -> None:
    async def model_states() -> dict[str, str]:
        return {}

    job_service = Services.open(settings).job_service({})
    state = ApiState(job_service, {}, settings, model_states)
    await uvicorn.Server(
        uvicorn.Config(create_app(state), port=port, lifespan="off", log_level="error")
    ).serve()


def pictures() -> dict[str, bytes]:
    """Files of nearly 20 MB by what they are."""
    signature, end = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", 2560, 2560, 8, 2, 0, 0, 0))
    noise = os.urandom(SIZE_BYTES - 1000)
    blocks = b"".join(chunk(b"IDAT", noise[at : at + 8192]) for at in range(0, len(noise), 8192))
    app = b"\xff\xed\x00\x10Photoshop 3.0\0"
    webp = b"VP8X" + struct.pack("<I", 10) + b"\x0c" + bytes(9) + b"abcd\0\0\0\0" * (SIZE_BYTES // 8)
    return {
        "a million chunks": signature + size + chunk(b"tEXt", b"k\0") * (SIZE_BYTES // 14) + end,
        "a million empty pixel chunks": signature + size + chunk(b"IDAT", b"") * (SIZE_BYTES // 12) + end,
        "a chain of application segments": b"\xff\xd8" + app * (SIZE_BYTES // len(app)),
        "a million WebP chunks": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "a sound picture": signature + size + blocks + end,
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def keep_latencies(name: str, taken: list[float], notes: str, dry: bool) -> None:
    taken.sort()
    p50, p99 = statistics.median(taken), taken[min(len(taken) - 1, int(0.99 * len(taken)))]
    busy = f"{notes}; {os.getloadavg()[0]:.0f} processes busy on the machine"
    keep(f"{name}_p99_ms", p99, busy, f"p50 {p50:.1f}, worst {taken[-1]:.1f}", len(taken), dry)


def keep(name: str, value: float, notes: str, spread: str, count: int, dry: bool) -> None:
    if dry:
        print(f"{name} = {value:.3f} ms  {spread} (n={count}) {notes}")
    else:
        ledger.record(name, value, "ms", spread=spread, n=count, notes=notes)


if __name__ == "__main__":
    main()
