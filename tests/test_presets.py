"""Serve configs for one GPU: what their models take in the form and place of their plans fits its size."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.planning.machine import Machine
from deployments.planning.plan import plan_of
from deployments.protocol.card import ModelCard
from serve_app.cli.serve_config import read_config, served_cards

ROOT = Path(__file__).parent.parent
GIB = 2**30
# of the smallest card that is sold with so many GB, as torch's total_memory says; GiB
GPUS = {12: 11.76, 24: 22.03, 48: 44.39, 80: 79.10}
PRESETS = {size: ROOT / f"configs/serve/gpu_{size}gb.yaml" for size in GPUS}
EXAMPLE = ROOT / "configs/serve/one_gpu.yaml"
CONTEXT_GIB, USABLE = 0.5, 0.95  # of the process, and of the rest: docs/memory.md
# million parameters by part, from the published models
FLUX = {"transformer": 11_901, "text_encoder": 123, "text_encoder_2": 4_762, "vae": 84}
SD15 = {"unet": 860, "text_encoder": 123, "vae": 84}
PARTS = {
    "flux.1-dev": FLUX,
    "flux.1-schnell": FLUX,
    "sdxl-base-1.0": {"unet": 2_567, "text_encoder": 123, "text_encoder_2": 695, "vae": 84},
    "sdxl-refiner-1.0": {"unet": 2_310, "text_encoder_2": 695, "vae": 84},
    "stable-diffusion-v1.5": SD15,
    "dreamshaper-8": SD15,
}
BITS = {None: 16, "int8": 8.1, "nf4": 4.5}  # per weight, with scales; layers that stay as they are hold 3 %
PLAIN = 0.03
PICTURE_GIB = {
    "flux": 1.88 + 2 * 0.45,
    "sdxl": 1.88 + 4 * 0.155,
    "sd": 0.47 + 4 * 0.1,
}  # decoded, two requests


def usable_gib(size: int) -> float:
    return (GPUS[size] - CONTEXT_GIB) * USABLE


def cards_of(size: int, file: Path | None = None) -> dict[str, ModelCard]:
    """The models by id that share the GPU, without refiners; file: another one than the preset."""
    file = file or PRESETS[size]
    served = served_cards(read_config(file, None, None), file)
    return {name: card for name, card in served.items() if card.serving.group is not None}


def gib(card: ModelCard, size: int) -> tuple[float, float]:
    """What stays on the device, and what is there at most while one of its pictures is made."""
    plan = plan_of(card, Machine(f"{size} GB", "cuda", int(usable_gib(size) * GIB), (8, 6)))
    held, brought = 0.0, 0.0
    for name, million in PARTS[card.id].items():
        part = plan.part(name)
        bits = PLAIN * 16 + (1 - PLAIN) * BITS[part.quantisation]
        size_gib = million * 1e6 * bits / 8 / GIB
        if part.placement == "device":
            held += size_gib
        else:
            assert part.placement == "on_demand"
            brought = max(brought, size_gib)
    return held, held + max(brought, PICTURE_GIB[card.family])


@pytest.mark.parametrize("size", PRESETS)
def test_each_model_of_a_preset_fits_its_gpu(size: int) -> None:
    peaks = {name: gib(card, size)[1] for name, card in cards_of(size).items()}

    assert len(peaks) >= 3
    assert {name: peak for name, peak in peaks.items() if peak > usable_gib(size)} == {}


@pytest.mark.parametrize(("size", "smaller"), [(24, 12), (48, 24), (80, 48)])
def test_a_preset_needs_its_gpu_and_not_the_next_smaller_one(size: int, smaller: int) -> None:
    cards = cards_of(size).values()
    loaded = next(iter(cards)).serving.models_loaded
    together = sum(sorted(gib(card, smaller)[0] for card in cards)[-loaded:])

    assert together > usable_gib(smaller)


@pytest.mark.parametrize(
    ("size", "models"),
    [
        (48, ["flux.1-dev", "sdxl-base-1.0"]),
        (80, ["flux.1-dev", "flux.1-schnell", "sdxl-base-1.0", "stable-diffusion-v1.5"]),
    ],
)
def test_models_of_large_presets_stay_loaded_together(size: int, models: list[str]) -> None:
    sizes = [gib(card, size) for name, card in cards_of(size).items() if name in models]
    held = sum(held for held, _ in sizes)

    assert len(sizes) == len(models) <= cards_of(size)["flux.1-dev"].serving.models_loaded
    assert held + max(peak - own for own, peak in sizes) <= usable_gib(size)


def test_the_example_for_one_gpu_fits_48_gb_sdxl_with_its_refiner_too() -> None:
    cards = cards_of(48, EXAMPLE)
    refiner = PARTS["sdxl-refiner-1.0"]["unet"] * 2e6 / GIB  # it shares the rest

    peaks = {name: gib(card, 48)[1] for name, card in cards.items()}

    assert peaks.keys() == {"flux.1-schnell", "sdxl-base-1.0"}
    assert max(peaks["flux.1-schnell"], peaks["sdxl-base-1.0"] + refiner) <= usable_gib(48)


@pytest.mark.parametrize("file", PRESETS.values(), ids=lambda file: file.name)
def test_a_preset_begins_with_what_it_is_for_and_its_one_command(file: Path) -> None:
    purpose, command, *_ = file.read_text(encoding="utf-8").splitlines()

    assert purpose.startswith(f"# One GPU of {file.stem.removeprefix('gpu_').removesuffix('gb')} GB (")
    assert command == f"#   weft serve --config configs/serve/{file.name}"


@pytest.mark.parametrize("size", PRESETS)
def test_the_models_of_a_preset_share_one_gpu(size: int) -> None:
    cards = cards_of(size)

    assert {card.serving.group for card in cards.values()} == {"pictures"}
    assert next(iter(cards.values())).serving.num_gpus == 1
