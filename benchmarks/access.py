"""Cost of access control: identifying a caller, counting a call, decoding an image in its own program.

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
from deployments.sandbox.decoder import DecodeMode, DecoderPool
from serve_app.admission.authenticator import AccountStore, Authenticator
from serve_app.admission.principals import USER_SCOPES
from serve_app.admission.rate_limits import CallClass
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as url:
        asyncio.run(access(url, options.calls, options.dry))
    pictures(options.pictures, options.dry)


async def access(url: str, calls: int, dry: bool) -> None:
    """Measure milliseconds to identify the caller of a key and of a token, and to count a call."""
    settings = Settings(api_key=SecretStr("k" * 43), jwt_secret=SecretStr("s" * 43), submits_per_minute=10**9)
    async with connect(url) as redis:
        accounts = AccountStore.of(redis, settings)
        authenticator = Authenticator(settings, redis)
        user = await accounts.users.add("Ann", "ann@example.org")
        _, key = await accounts.keys.create(user.id, USER_SCOPES)
        token, _ = await authenticator.log_in(key.encode(), None, session=False)

        async def count() -> None:
            await accounts.limits.take(CallClass.submit, user.id)
            async with accounts.limits.slot():
                pass

        for name, call in {
            "access_by_key_ms": lambda: authenticator.identify(key.encode()),
            "access_by_token_ms": lambda: authenticator.identify(token.encode()),
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
    """Measure milliseconds that decoding one megapixel takes longer in the sandbox than in this process."""
    picture = Image.effect_noise((64, 64), 80).convert("RGB").resize((1024, 1024), Image.Resampling.BICUBIC)
    for form in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        picture.save(buffer, form)
        data = buffer.getvalue()
        decoder_pool = DecoderPool(processes=1)
        decoder_pool.decode(data, DecodeMode.picture, "image")
        extra = []
        for _ in range(count):
            began = time.perf_counter()
            Image.open(io.BytesIO(data)).convert("RGB")
            decoded_here = time.perf_counter()
            decoder_pool.decode(data, DecodeMode.picture, "image")
            extra.append(1000 * (time.perf_counter() - decoded_here - (decoded_here - began)))
        decoder_pool.close()
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
