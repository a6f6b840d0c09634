"""Time that HTTP, the durable job, Ray and the engine add to one image: POST to PNG minus the plain pipeline.

Both sides use the same weights and seeds, one thread each, concurrency 1, interleaved A B A B; the tax is
the paired difference. Every image is compared with the plain pipeline's.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import ledger
import torch
import yaml
from PIL import Image

from deployments.models.load import load_pipeline
from deployments.protocol.card import Weights, load_card
from serve_app.redis.embedded import EmbeddedRedis

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny-flux-schnell"
PROMPT = "a red circle on a white background"


def bare(pipeline: Any, seed: int) -> tuple[float, Image.Image]:
    """Seconds of a plain pipeline call with its PNG, and the image."""
    began = time.perf_counter()
    image: Image.Image = pipeline(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=0.0,
        width=128,
        height=128,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    image.save(io.BytesIO(), "PNG", compress_level=1)
    return time.perf_counter() - began, image


def served(client: httpx.Client, seed: int) -> tuple[float, Image.Image]:
    """Seconds from POST to the PNG's bytes, and the image."""
    began = time.perf_counter()
    answer = client.post(
        "/v1/images/generations",
        json={"model": MODEL, "prompt": PROMPT, "seed": seed, "response_format": "b64_json"},
    )
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    seconds = time.perf_counter() - began
    return seconds, Image.open(io.BytesIO(data)).convert("RGB")


def difference(a: Image.Image, b: Image.Image) -> int:
    """Largest difference in levels of 0..255."""
    return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--suffix", default="", help="appended to the rows' names, such as _haproxy")
    parser.add_argument("--port", type=int, default=18_765)
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    card = load_card(ROOT / f"configs/models/{MODEL}.yaml")
    pipeline = load_pipeline(Weights(path=card.weights.path, dtype=card.weights.dtype), torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = options.port
    with tempfile.TemporaryDirectory() as data:
        os.environ["WEFT_DATA_DIR"] = data
        with EmbeddedRedis(Path(data)) as url:
            os.environ["REDIS_URL"] = url
            from serve_app.ray_serve import local_cluster

            with local_cluster.local_ray():
                assert local_cluster.deploy(config, print)
                taxes = measure(pipeline, options.port, options.pairs)
    report(taxes, options.suffix, options.dry)


def measure(pipeline: Any, port: int, pairs: int) -> list[float]:
    """Milliseconds of tax per pair, after ten pairs of warm-up."""
    taxes: list[float] = []
    with torch.inference_mode(), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for seed in range(pairs + 10):
            alone_s, expected = bare(pipeline, seed)
            served_s, got = served(client, seed)
            assert difference(expected, got) <= 1, "the service must return the plain pipeline's image"
            if seed >= 10:
                taxes.append(1000 * (served_s - alone_s))
    return taxes


def report(taxes: list[float], suffix: str, dry: bool) -> None:
    percentiles = statistics.quantiles(taxes, n=100)
    spread = f"p10 {percentiles[9]:.1f}, p90 {percentiles[89]:.1f}"
    print(f"p50 {percentiles[49]:.1f} ms, p99 {percentiles[98]:.1f} ms, {spread}")
    if not dry:
        notes = "POST /v1/images/generations to PNG in hand, minus bare pipeline + PNG; paired, same pictures"
        for name, value in (("p50", percentiles[49]), ("p99", percentiles[98])):
            ledger.record(
                f"serving_tax_{name}_ms{suffix}", value, "ms", spread=spread, n=len(taxes), notes=notes
            )


if __name__ == "__main__":
    main()
