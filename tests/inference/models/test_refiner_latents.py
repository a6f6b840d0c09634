"""A refiner goes on from the base model's latents: of any number of channels, but they must be the same."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.pipelines.ensemble import check_same_latents
from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact, Event, Failed, Step
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica
from serve_app.settings import ROOT
from tests.inference import tiny
from tests.inference.models.test_shared_refiner import card
from tools.tiny_models.score import find_objects


async def events_of(replica: ModelReplica, **changes: Any) -> list[Event]:
    facts = {"prompt": "a red heart on a white background", "seed": 3}
    return [event async for event in replica.generate(GenerationRequest(**(facts | changes)))]


def picture(events: list[Event]) -> Image.Image:
    made = next(event for event in events if isinstance(event, Artifact))
    return Image.open(io.BytesIO(made.data)).convert("RGB")


async def test_the_shipped_refiner_goes_on_from_latents_of_16_channels() -> None:
    base, refiner = (
        load_card(ROOT / f"configs/models/tiny-sdxl-{name}.yaml") for name in ("base", "refiner")
    )
    assert base.refiner == refiner.id
    replica = ModelReplica([base], {base.id: refiner})
    shares: list[dict[str, float]] = [{}, {"refiner": 0.8}, {"refiner": 0.5}]
    try:
        together = await asyncio.gather(*(events_of(replica, model=base.id, **share) for share in shares))
        alone = [await events_of(replica, model=base.id, **share) for share in shares]
    finally:
        replica.__del__()

    pictures = [picture(events) for events in together]
    assert [np.array_equal(one, picture(events)) for one, events in zip(pictures, alone, strict=True)] == [
        True
    ] * 3
    assert len({one.tobytes() for one in pictures}) == 3
    for one in pictures:
        ground, found = find_objects(one)
        assert (ground, [(seen.colour, seen.shape) for seen in found]) == ("white", [("red", "heart")])


def another_scale(refiner: Any) -> None:
    refiner.vae.register_to_config(scaling_factor=0.5)


def more_channels(refiner: Any) -> None:
    refiner.unet = type(refiner.unet).from_config(
        {**refiner.unet.config, "in_channels": 8, "out_channels": 8}
    )


def test_a_model_for_inpainting_has_the_latents_of_its_plain_kin() -> None:
    base = tiny.sdxl()
    base.unet = type(base.unet).from_config({**base.unet.config, "in_channels": 9})

    check_same_latents(tiny.sdxl_refiner(), base)


@pytest.mark.parametrize("in_group", [True, False])
@pytest.mark.parametrize(
    ("change", "cause"),
    [(another_scale, "scaling factor 0.5 instead of"), (more_channels, "latent channels 8 instead of 4")],
)
async def test_a_refiner_of_other_latents_is_refused_before_any_step(
    tmp_path: Path, change: Callable[[Any], None], cause: str, in_group: bool
) -> None:
    tiny.sdxl().save_pretrained(tmp_path / "base")
    refiner = tiny.sdxl_refiner()
    change(refiner)
    refiner.save_pretrained(tmp_path / "refiner")
    base, other = card("sdxl-base-1.0", tmp_path / "base"), card("sdxl-refiner-1.0", tmp_path / "refiner")
    replica = ModelReplica([base, other] if in_group else [base], {base.id: other})
    try:
        events = await events_of(replica, model=base.id, num_inference_steps=5, refiner=0.6)
        plain = await events_of(replica, model=base.id, num_inference_steps=2)
    finally:
        replica.__del__()

    assert isinstance(events[-1], Failed)
    assert cause in events[-1].message
    assert not any(isinstance(event, Step) for event in events)
    assert not isinstance(plain[-1], Failed)
