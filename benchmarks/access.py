"""What access costs: naming a caller, counting a call, decoding a picture in its own program.

python benchmarks/access.py [--calls 500] [--pictures 50] [--dry]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image
from pydantic import SecretStr

from benchmarks import ledger
from deployments.protocol.decoding import Decoders, Kind
from serve_app.admission.gate import Books, Gate
from serve_app.admission.principal import USER_SCOPES
from serve_app.admission.ratelimit import CallClass
from serve_app.embedded_redis import EmbeddedRedis
from serve_app.settings import Settings
from serve_app.transaction import connect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--dry", action="store_true", help="print, keep no rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as url:
        asyncio.run(gate(url, options.calls, options.dry))
    pictures(options.pictures, options.dry)


async def gate(url: str, calls: int, dry: bool) -> None:
    """Milliseconds to name the caller of a key and of a token, and to count a call."""
    settings = Settings(api_key=SecretStr("k" * 43), jwt_secret=SecretStr("s" * 43), submits_per_minute=10**9)
    async with connect(url) as redis:
        books = Books.of(redis, settings)
        ours = Gate(settings, redis)
        user = await books.users.add("Ann", "ann@example.org")
        _, key = await books.keys.create(user.id, USER_SCOPES)
        token, _ = await ours.log_in(key.encode(), None, session=False)

        async def count() -> None:
            await books.limits.take(CallClass.submit, user.id)
            async with books.limits.slot():
                pass

        for name, call in {
            "access_by_key_ms": lambda: ours.identify(key.encode()),
            "access_by_token_ms": lambda: ours.identify(token.encode()),
            "access_count_and_slot_ms": count,
        }.items():
            keep(name, await timed(call, calls), dry)


async def timed(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
    for _ in range(20):
        await call()
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        await call()
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def pictures(count: int, dry: bool) -> None:
    """Milliseconds that decoding one megapixel elsewhere takes over decoding it here."""
    picture = Image.effect_noise((64, 64), 80).convert("RGB").resize((1024, 1024), Image.Resampling.BICUBIC)
    for form in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        picture.save(buffer, form)
        data = buffer.getvalue()
        decoders = Decoders(processes=1)
        decoders.decode(data, Kind.picture, "image")
        extra = []
        for _ in range(count):
            began = time.perf_counter()
            Image.open(io.BytesIO(data)).convert("RGB")
            between = time.perf_counter()
            decoders.decode(data, Kind.picture, "image")
            extra.append(1000 * (time.perf_counter() - between - (between - began)))
        decoders.close()
        keep(f"decode_elsewhere_extra_{form.lower()}_1mp_ms", extra, dry)


def keep(name: str, taken: list[float], dry: bool) -> None:
    taken.sort()
    p50, p99 = statistics.median(taken), taken[min(len(taken) - 1, int(0.99 * len(taken)))]
    if dry:
        print(f"{name} = {p50:.3f} ms, p99 {p99:.3f}, n={len(taken)}")
    else:
        ledger.record(name, p50, "ms", spread=f"p99 {p99:.2f}", n=len(taken))


if __name__ == "__main__":
    main()
