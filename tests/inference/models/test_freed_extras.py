"""What a model had beside its pipeline is really freed: when it is unloaded, and when others need memory."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves

from deployments.models.model_instance import ModelInstance
from deployments.protocol.card import ControlNet, ModelCard, Weights, load_card
from deployments.protocol.events import Artifact, Failed
from deployments.protocol.request import Control, GenerationRequest, Lora
from deployments.replica import ModelReplica
from tests.inference import tiny
from tests.inference.lora_files import file_of, random_lora
from tests.inference.tiny_controls import LICENCE, save_depth_estimator, unet_controlnet

CARDS = Path(__file__).parents[3] / "configs/models"
SIZES = {"width": 64, "height": 64, "min": 64, "max": 128, "max_pixels": 16384}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny.sdxl().save_pretrained(folder / "base")
    tiny.sdxl_refiner().save_pretrained(folder / "refiner")
    tiny.sd().save_pretrained(folder / "other")
    for seed, name in enumerate(("canny", "depth")):
        unet_controlnet(tiny.sdxl().unet, seed).float().save_pretrained(folder / name)
    save_depth_estimator(folder / "estimator")
    return folder


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """What is freed late, by Python's own collection, would be missing on the device until then."""
    gc.disable()
    yield
    gc.enable()


@asynccontextmanager
async def served(folder: Path) -> AsyncGenerator[ModelReplica]:
    """A model with all that may be beside it, and another one; one of them at a time."""

    def weights(name: str) -> Weights:
        return Weights(path=str(folder / name), dtype="float32")

    def card(name: str, place: str, **changes: Any) -> ModelCard:
        facts = load_card(CARDS / f"{name}.yaml").model_dump() | {"weights": weights(place), "sizes": SIZES}
        serving = {"num_cpus": 1, "num_gpus": 0, "warm_up": False, "models_loaded": 1}
        return ModelCard.model_validate(facts | {"serving": serving} | changes)

    controls = {
        "canny": ControlNet(weights=weights("canny"), licence=LICENCE),
        "depth": ControlNet(weights=weights("depth"), preprocessor=weights("estimator"), licence=LICENCE),
    }
    base = card("sdxl-base-1.0", "base", controls=controls)
    refiner = card("sdxl-refiner-1.0", "refiner")
    made = ModelReplica([base, card("stable-diffusion-v1.5", "other", controls={})], {base.id: refiner})
    yield made
    made.__del__()


async def picture(replica: ModelReplica, **changes: Any) -> bytes:
    """Its pixels."""
    facts = {"model": "sdxl-base-1.0", "prompt": "a fox", "seed": 5, "num_inference_steps": 3}
    events = [event async for event in replica.generate(GenerationRequest(**(facts | changes)))]
    assert not isinstance(events[-1], Failed), events[-1]
    data = next(event.data for event in events if isinstance(event, Artifact) and event.kind == "image")
    return Image.open(io.BytesIO(data)).tobytes()


def control(kind: Any) -> Control:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return Control(image=file.getvalue(), type=kind, is_map=kind == "canny")


def everything() -> dict[str, Any]:
    lora = Lora.of(file_of(random_lora(tiny.sdxl(), ["unet", "text_encoder_2"], seed=1, rank=4)))
    return {"controls": [control("canny"), control("depth")], "refiner": 0.6, "loras": [lora]}


def parts_of(model: ModelInstance) -> dict[str, list[weakref.ref[Any]]]:
    """Weak references to all that a model holds on the device."""
    estimate = model.extras.preprocessors["depth"]._preprocess
    assert estimate is not None
    cells = [cell.cell_contents for cell in getattr(estimate, "__closure__", ())]
    found: dict[str, list[Any]] = {
        "modules": [part for module in model.pipelines.modules for part in module.modules()],
        "preprocessors": [cell for cell in cells if isinstance(cell, nn.Module)],
        "LoRAs": [
            tensor
            for slot in model.loras._slots.values()
            if slot.loaded is not None
            for factors in slot.loaded.factors.values()
            for tensor in (factors.a, factors.b)
        ],
        "prompts": [
            leaf
            for result in model.prompts._results.values()
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor)
        ],
        "stacks": [one.stacked for seam in model.seams for one in seam.stacked_constants.values()],
        "model": [model],
    }
    return {name: [weakref.ref(one) for one in ones] for name, ones in found.items()}


def alive(references: dict[str, list[weakref.ref[Any]]]) -> dict[str, int]:
    counts = {name: sum(one() is not None for one in ones) for name, ones in references.items()}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.usefixtures("_no_collection")
async def test_nothing_of_an_unloaded_model_stays_whatever_was_beside_it(folder: Path) -> None:
    async with served(folder) as replica:
        await picture(replica, **everything())
        (model,) = replica._runtime.models.models
        references = parts_of(model)
        del model
        there = alive(references)

        await picture(replica, model="stable-diffusion-v1.5")

        assert alive(references) == {}
        claims = replica._runtime._loader.memory._claims
        assert [thing for things in claims.values() for thing in things] == [
            ("stable-diffusion-v1.5", "pipeline")
        ]
    assert set(there) >= {"modules", "preprocessors", "LoRAs", "prompts", "model"}


@pytest.mark.usefixtures("_no_collection")
async def test_what_is_idle_beside_a_model_is_freed_for_others_and_loaded_again(folder: Path) -> None:
    async with served(folder) as replica:
        runtime = replica._runtime
        alone = await picture(replica)
        own = dict(runtime._loader.memory._claims["weights"])
        (model,) = runtime.models.models
        modules, seams = len(model.pipelines.modules), len(model.seams)
        before = await picture(replica, **everything())
        beside = [weakref.ref(one) for one in model.pipelines.modules[modules:]]
        beside += [*parts_of(model)["preprocessors"]]
        bytes_beside = runtime._loader.memory.held["weights"] - sum(own.values())

        outcomes = [await runtime._loader.extras.make_way("another") for _ in range(5)]

        assert outcomes == ["freed"] * 4 + ["nothing"], "two nets, the refiner and what finds depth"
        assert len(beside) >= 4
        assert [one() for one in beside if one() is not None] == []
        assert bytes_beside > 0
        assert runtime._loader.memory._claims["weights"] == own
        assert (len(model.pipelines.modules), len(model.seams)) == (modules, seams)
        assert await picture(replica) == alone
        assert await picture(replica, **everything()) == before
        samples = {sample.name: sample.value for sample in runtime.samples()}
        assert samples["weft_extras_evicted_total"] == 4
