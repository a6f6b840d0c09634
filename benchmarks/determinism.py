"""What the switches for determinism cost: seconds of an image with torch's defaults, with the switches, and
without split-K kernels in addition. Rows `determinism_cost_...`, of a GPU only: on a CPU they do nothing.

Every variant runs in processes of its own, because cuBLAS reads its workspace setting when CUDA starts; the
variants take turns. Without `--card` the tiny models run, which says nothing about large ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ledger
import torch

from deployments.models.determinism import set_determinism_flags
from deployments.models.hardware import best_device
from deployments.models.load import load_pipeline
from deployments.protocol.card import load_card

CARDS = Path(__file__).parent.parent / "configs" / "models"
DEFAULT_CARDS = ("tiny-sd15", "tiny-flux-dev")
VARIANTS = ("defaults", "switches", "no_split_k")
IMAGES = 5  # timed, of one process; the fastest counts


def seconds_per_image(card_id: str, variant: str) -> tuple[str, float]:
    """The device, and the shortest seconds of an image at the card's defaults. Changes this process."""
    if variant != "defaults":
        set_determinism_flags()
    if variant == "no_split_k":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]
    card, device = load_card(CARDS / f"{card_id}.yaml"), best_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    pipeline: Any = load_pipeline(card.weights, device)
    pipeline.set_progress_bar_config(disable=True)

    def image(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        began = time.perf_counter()
        pipeline(
            "a red circle",
            width=card.sizes.width,
            height=card.sizes.height,
            num_inference_steps=card.steps.default,
            guidance_scale=card.guidance.default,
            generator=generator,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    with torch.inference_mode():
        image(0)  # warms up
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        return name, min(image(seed) for seed in range(IMAGES))


def measure(card_id: str, variant: str) -> tuple[str, float]:
    """seconds_per_image in a process of its own."""
    command = [sys.executable, __file__, "--one", card_id, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    device, seconds = json.loads(done.stdout.splitlines()[-1])
    return str(device), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", action="append", help="id of a card; again for more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="record nothing")
    parser.add_argument("--one", nargs=2, metavar=("CARD", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(seconds_per_image(*options.one)))
        return
    for card_id in options.card or DEFAULT_CARDS:
        device, found = "", dict[str, list[float]]()
        for _ in range(options.rounds):
            for variant in VARIANTS:
                device, seconds = measure(card_id, variant)
                found.setdefault(variant, []).append(seconds)
        for variant in VARIANTS[1:]:
            ratios = [a / b for a, b in zip(found[variant], found["defaults"], strict=True)]
            ratio, spread = statistics.median(ratios), f"{min(ratios):.3f}-{max(ratios):.3f}"
            note = f"{card_id} on {device}: {statistics.median(found[variant]):.3f} s an image, over defaults"
            if options.dry or device == "cpu":
                print(f"{variant}: {ratio:.3f} ({spread}) {note}; not recorded")
            else:
                name = f"determinism_cost_{variant}_{card_id}"
                ledger.record(name, ratio, "ratio", spread=spread, n=options.rounds, notes=note)


if __name__ == "__main__":
    main()
