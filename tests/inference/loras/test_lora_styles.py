"""The shipped style LoRAs on a replica: three requests in one batch, each in its own style, by the pixels."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from safetensors.torch import load, save

from deployments.protocol.card import load_card
from deployments.protocol.errors import BadRequest
from deployments.protocol.events import Artifact, Done, Failed
from deployments.protocol.request import GenerationRequest, Lora
from deployments.replica import ModelReplica
from deployments.validation.resolve import resolve

ROOT = Path(__file__).parents[3]
CARD = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
STYLES = ("outline", "mosaic", "night")
FILES = {
    style: (
        ROOT / f"models/tiny-flux-schnell/loras/lora_{style}/pytorch_lora_weights.safetensors"
    ).read_bytes()
    for style in STYLES
}
Pixels = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def model() -> Iterator[ModelReplica]:
    made = ModelReplica([CARD])
    yield made
    made.__del__()


def styled(*styles: str, weight: float = 1.0, **changes: Any) -> GenerationRequest:
    loras = tuple(Lora.of(FILES[style], weight, style) for style in styles)
    words = {"model": CARD.id, "prompt": "a red circle in the center on white", "seed": 5, "loras": loras}
    return GenerationRequest(**(words | changes))


async def picture(model: ModelReplica, request: GenerationRequest) -> bytes:
    async for event in model.generate(request, unlimited_wait=True):
        assert not isinstance(event, Failed), event
        if isinstance(event, Artifact) and event.kind == "image":
            found = event.data
    return found


def pixels(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.float64)


def grid_darkness(picture: Pixels) -> float:
    """How much darker every 16th row is than the others, 0..255: a mosaic's joints."""
    rows = picture.mean((1, 2)).reshape(8, 16)
    return float(rows[:, 3:13].mean() - rows[:, 0].mean())


def filled_centre(picture: Pixels) -> bool:
    """Whether the middle pixels differ from the corner's; an outline has nothing there."""
    middle, corner = picture[60:68, 60:68].mean((0, 1)), picture[2:10, 2:10].mean((0, 1))
    return float(np.abs(middle - corner).max()) > 55


async def test_three_requests_in_one_batch_come_out_in_their_own_style(model: ModelReplica) -> None:
    requests = [styled("outline"), styled("mosaic"), styled("night"), styled()]

    together = await asyncio.gather(*(picture(model, request) for request in requests))

    alone = [await picture(model, request) for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(pixels(one), pixels(other)), "a picture depends on its neighbours"
    outline, mosaic, night, plain = map(pixels, together)
    assert [filled_centre(one) for one in (outline, plain)] == [False, True]
    assert grid_darkness(mosaic) > 30 > 15 > max(map(grid_darkness, (outline, night, plain)))
    assert night.mean() < 0.6 * plain.mean()


async def test_a_request_without_loras_has_the_bits_of_a_replica_without_loras(
    model: ModelReplica,
) -> None:
    fresh = ModelReplica([CARD])
    try:
        before = await picture(fresh, styled())
    finally:
        fresh.__del__()

    among_others, *_ = await asyncio.gather(
        *(picture(model, one) for one in (styled(), styled("night"), styled("mosaic")))
    )

    assert np.array_equal(pixels(among_others), pixels(before))


async def test_weights_and_several_loras_act_on_their_request_alone(model: ModelReplica) -> None:
    requests = [
        styled("night", weight=0.3),
        styled("night"),
        styled("night", "mosaic", weight=0.9),
        styled(weight=0),
    ]

    faint, full, both, plain = [
        pixels(data) for data in await asyncio.gather(*(picture(model, one) for one in requests))
    ]

    assert plain.mean() > faint.mean() > full.mean()
    assert grid_darkness(both) > grid_darkness(full) + 5
    assert both.mean() < 0.7 * plain.mean()


async def test_a_lora_of_weight_zero_changes_no_bit(model: ModelReplica) -> None:
    assert np.array_equal(
        pixels(await picture(model, styled("outline", weight=0.0))), pixels(await picture(model, styled()))
    )


async def test_the_metadata_of_a_picture_names_its_loras_without_their_files(model: ModelReplica) -> None:
    events = [event async for event in model.generate(styled("night", weight=0.5))]

    facts = next(event.metadata for event in events if isinstance(event, Artifact))
    assert facts["loras"] == [{"id": Lora.of(FILES["night"]).id, "weight": 0.5, "name": "night"}]


@pytest.mark.parametrize(
    ("lora", "kind", "words"),
    [
        (Lora(id="0" * 64), "not_found", "send its file along"),
        (Lora.of(b"PK not safetensors"), "bad_request", "pickle"),
        (Lora.of(FILES["night"][:-10]), "bad_request", "truncated"),
    ],
)
async def test_what_cannot_be_used_fails_with_the_reason_and_alone(
    model: ModelReplica, lora: Lora, kind: str, words: str
) -> None:
    failing = [event async for event in model.generate(styled(loras=(lora,)))]

    assert isinstance(failing[-1], Failed)
    assert failing[-1].kind == kind
    assert words in failing[-1].message
    assert await picture(model, styled())


async def test_a_card_that_takes_none_refuses() -> None:
    none = CARD.model_copy(update={"max_loras": 0})

    with pytest.raises(BadRequest, match="takes no LoRA"):
        resolve(styled("night"), none, fresh_seed=1)


async def test_a_lora_of_zeros_is_warned_of(model: ModelReplica) -> None:
    tensors = load(FILES["night"])
    zero = save({key: tensor * 0 if ".lora_B." in key else tensor for key, tensor in tensors.items()})
    request = styled("outline")
    loras = (*request.loras, Lora.of(zero, 1.0, "unborn"))

    ends = [
        event
        async for event in model.generate(request.model_copy(update={"loras": loras}), unlimited_wait=True)
        if isinstance(event, Done)
    ]

    assert [(one.code, one.param) for one in ends[0].warnings] == [("lora_without_effect", "loras")]
    assert "unborn holds only zeros" in ends[0].warnings[0].message
