"""A model that made way for another one of its group leaves nothing in memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from deployments.models.activations import Activations
from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.events import Done
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica

ROOT = Path(__file__).parents[3]


def alone_on_its_replica(name: str) -> ModelCard:
    card = load_card(ROOT / f"configs/models/{name}.yaml")
    serving: dict[str, Any] = {"warm_up": False, "models_loaded": 1, "max_rows": 4}
    return card.model_copy(update={"serving": card.serving.model_copy(update=serving)})


async def make_picture(replica: ModelReplica, card: ModelCard) -> None:
    request = GenerationRequest(model=card.id, prompt="x", seed=1, num_inference_steps=4)
    events = [event async for event in replica.generate(request, unlimited_wait=True)]
    assert isinstance(events[-1], Done)


async def test_nothing_of_an_unloaded_model_stays() -> None:
    first, second = alone_on_its_replica("tiny-sd15"), alone_on_its_replica("tiny-flux-schnell")
    replica = ModelReplica([first, second])
    await make_picture(replica, first)
    (model,) = replica._runtime.models.models
    modules = [weakref.ref(one) for one in model.pipelines.modules if isinstance(one, nn.Module)]
    names = {seam.name for seam in model.seams}
    del model
    assert len(modules) >= 3

    await make_picture(replica, second)
    gc.collect()

    assert [one() for one in modules if one() is not None] == []
    assert list(replica._runtime.models.loaded) == [second.id]
    assert "UNet2DConditionModel.forward" in names
    assert "UNet2DConditionModel.forward" not in {one.module for one in replica._runtime.worker.proofs()}
    replica.__del__()


def test_what_an_unloaded_model_has_taken_counts_no_more() -> None:
    activations = Activations()
    activations.record("auxiliary", "decode", 1, 8)
    activations.record("auxiliary", "of another", 1, 2)

    activations.forget(["decode", "never measured"])

    assert activations.of_one_call("auxiliary") == 2
