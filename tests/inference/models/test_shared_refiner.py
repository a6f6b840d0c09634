"""A refiner that is also a model of the group is on the device once, and refines as its own copy would."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from deployments.protocol.card import ModelCard, Weights, load_card
from deployments.protocol.events import Artifact, Event, Failed
from deployments.protocol.request import Edit, GenerationRequest, Lora
from deployments.replica import ModelReplica
from tests.inference import tiny
from tests.inference.lora_files import file_of, random_lora

CARDS = Path(__file__).parents[3] / "configs/models"
SIZES = {"width": 64, "height": 64, "min": 64, "max": 128, "max_pixels": 16384}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny.sdxl().save_pretrained(folder / "base")
    tiny.sdxl_refiner().save_pretrained(folder / "refiner")
    return folder


def card(name: str, weights: Path, **serving: Any) -> ModelCard:
    facts = load_card(CARDS / f"{name}.yaml").model_dump() | {
        "weights": Weights(path=str(weights), dtype="float32"),
        "sizes": SIZES,
        "serving": {"num_cpus": 1, "num_gpus": 0, "warm_up": False} | serving,
    }
    return ModelCard.model_validate(facts)


@asynccontextmanager
async def served(folder: Path, *, in_group: bool, **serving: Any) -> AsyncGenerator[ModelReplica]:
    base = card("sdxl-base-1.0", folder / "base", **serving)
    refiner = card("sdxl-refiner-1.0", folder / "refiner")
    made = ModelReplica([base, refiner] if in_group else [base], {base.id: refiner})
    yield made
    made.__del__()


async def events_of(replica: ModelReplica, **changes: Any) -> list[Event]:
    facts = {"model": "sdxl-base-1.0", "prompt": "a fox", "seed": 5, "num_inference_steps": 5}
    events = [event async for event in replica.generate(GenerationRequest(**(facts | changes)))]
    assert not isinstance(events[-1], Failed), events[-1]
    return events


async def picture(model: ModelReplica, **changes: Any) -> npt.NDArray[np.uint8]:
    events = await events_of(model, **changes)
    (artifact,) = [event for event in events if isinstance(event, Artifact) and event.kind == "image"]
    return np.asarray(Image.open(io.BytesIO(artifact.data)))


def a_lora(seed: int) -> Lora:
    return Lora.of(file_of(random_lora(tiny.sdxl(), ["unet", "text_encoder_2"], seed=seed, rank=4)))


async def redraw(model: ModelReplica, **changes: Any) -> None:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    await events_of(model, model="sdxl-refiner-1.0", edit=Edit(image=file.getvalue()), **changes)


async def test_it_is_loaded_once_for_both_uses_and_pictures_have_the_same_bits(folder: Path) -> None:
    asked = {"refiner": 0.6}
    async with served(folder, in_group=False) as alone:
        expected = await picture(alone, **asked)
        beside = alone._runtime._loader.memory._claims["weights"]
        assert len(beside) == 2, "the pipeline, and the refiner beside it"
    async with served(folder, in_group=True) as shared:
        refined = await picture(shared, **asked)
        again = await picture(shared, **asked)
        await redraw(shared)
        loads = {model: count for model, (count, _) in shared._runtime._loader.loads.items()}
        things = [what for _, what in shared._runtime._loader.memory._claims["weights"]]
        users = [entry.users for entry in shared._runtime.models._entries.values()]

    assert np.array_equal(refined, expected)
    assert np.array_equal(again, expected)
    assert loads == {"sdxl-base-1.0": 1, "sdxl-refiner-1.0": 1}
    assert things == ["pipeline", "pipeline"]
    assert users == [0, 0]


async def test_loras_of_the_base_model_do_not_change_the_refiner_s_layers_of_the_same_names(
    folder: Path,
) -> None:
    asked = {"refiner": 0.6, "loras": (a_lora(1),)}
    async with served(folder, in_group=False) as alone:
        expected = await picture(alone, **asked)
        plain = await picture(alone, refiner=0.6)
    async with served(folder, in_group=True) as shared:
        await redraw(shared, loras=(refiner_lora(),))  # so that its layers look for LoRAs
        refined = await picture(shared, **asked)

    assert not np.array_equal(plain, expected)
    assert np.array_equal(refined, expected)


def refiner_lora() -> Lora:
    return Lora.of(file_of(random_lora(tiny.sdxl_refiner(), ["unet"], seed=2, rank=4)))


async def test_a_replica_that_holds_one_model_at_a_time_loads_the_refiner_beside_it(folder: Path) -> None:
    async with served(folder, in_group=True, models_loaded=1) as model:
        await picture(model, refiner=0.6)
        await redraw(model)
        loaded = list(model._runtime.models.loaded)
        things = list(model._runtime._loader.memory._claims["weights"])

    assert loaded == ["sdxl-refiner-1.0"]
    assert things == [("sdxl-refiner-1.0", "pipeline")]


async def test_the_refiner_is_unloaded_for_others_and_loaded_again(folder: Path) -> None:
    async with served(folder, in_group=True) as model:
        first = await picture(model, refiner=0.6)
        assert await model._runtime.models._make_way("sdxl-base-1.0") == "freed"
        again = await picture(model, refiner=0.6)

    assert np.array_equal(first, again)
