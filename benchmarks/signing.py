"""Milliseconds of one core to sign a 1024 px picture with a manifest, by file format and with one input."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import io
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import SecretStr

from benchmarks import ledger
from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact
from deployments.protocol.request import GenerationRequest, ResolvedRequest
from deployments.protocol.signing_identity import SigningIdentity
from deployments.provenance.certificates import make_test_chain
from deployments.provenance.signing import ManifestSigner
from deployments.validation.resolve import resolve

CARD = Path(__file__).parents[1] / "configs/models/tiny-flux-schnell.yaml"
SIDE = 1024
FORMATS = ("png", "jpeg", "webp", "png_with_input")


def picture(file_format: str) -> bytes:
    """Noise, which compresses to the largest files that there are."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    options = {"compress_level": 1} if file_format == "png" else {"quality": 95}
    Image.fromarray(pixels).save(buffer, file_format.upper(), **options)
    return buffer.getvalue()


def cpu_ms(signer: ManifestSigner, artifact: Artifact, request: ResolvedRequest, rounds: int) -> list[float]:
    """Of all threads of this process, for each of the rounds."""

    async def measured() -> list[float]:
        found = []
        for _ in range(rounds):
            began = time.process_time()
            await signer.sign(artifact, request)
            found.append(1e3 * (time.process_time() - began))
        return found

    return asyncio.run(measured())[1:]  # the first one loads code


def main() -> None:
    """Measure and record each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    options = parser.parse_args()
    chain, key = make_test_chain(datetime.datetime.now(datetime.UTC))
    signer = ManifestSigner(SigningIdentity(chain, SecretStr(key)))
    card = load_card(CARD)
    plain, _ = resolve(GenerationRequest(model=card.id, prompt="noise"), card, fresh_seed=1)
    for file_format in options.formats:
        data = picture(file_format.split("_")[0])
        media_type = f"image/{file_format.split('_')[0]}"
        artifact = Artifact(0, "image", media_type, data, SIDE, SIDE, 1)
        request = plain
        if file_format == "png_with_input":
            given = asyncio.run(signer.sign(artifact, plain)).data
            request = plain.model_copy(update={"references": (given,)})
        times = cpu_ms(signer, artifact, request, options.rounds)
        notes = f"{SIDE} px of noise, {len(data)} bytes, es256, no time stamp"
        p95 = statistics.quantiles(times, n=20)[18]
        ledger.record(
            f"sign_cpu_ms_{file_format}",
            statistics.median(times),
            "ms",
            spread=f"p95 {p95:.1f}",
            n=len(times),
            notes=notes,
        )


if __name__ == "__main__":
    main()
