"""What a replica does with the plan of a model, and says of it."""

from __future__ import annotations

from pathlib import Path

from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica

CARDS = Path(__file__).parents[3] / "configs/models"
TINY = load_card(CARDS / "tiny-flux-schnell.yaml")


async def test_quantised_parts_are_in_the_plan_and_in_the_files() -> None:
    serving = TINY.serving.model_copy(update={"quantisation": "int8", "warm_up": False})
    replica = ModelReplica([TINY.model_copy(update={"serving": serving})])
    try:
        plans = await replica.plans()
        events = [event async for event in replica.generate(GenerationRequest(model=TINY.id, prompt="a cat"))]
    finally:
        replica.__del__()

    assert plans[TINY.id]["summary"] == "int8 transformer"
    picture = next(event for event in events if isinstance(event, Artifact) and event.kind == "image")
    assert picture.metadata["quantised"] == {"transformer": "int8"}


async def test_a_model_that_is_not_loaded_yet_shows_how_it_would_run() -> None:
    other = load_card(CARDS / "tiny-sd15.yaml")
    int8 = other.model_copy(update={"serving": other.serving.model_copy(update={"quantisation": "int8"})})
    serving = TINY.serving.model_copy(update={"warm_up": False})
    replica = ModelReplica([TINY.model_copy(update={"serving": serving}), int8])
    try:
        plans = await replica.plans()
    finally:
        replica.__del__()

    assert {name: plan["loaded"] for name, plan in plans.items()} == {TINY.id: True, other.id: False}
    assert "int8 unet" in str(plans[other.id]["summary"])
    assert plans[other.id]["device"] == "CPU"


async def test_a_model_that_no_plan_fits_fails_with_bytes_before_it_is_read() -> None:
    memory = load_card(CARDS / "flux.1-dev.yaml").memory
    serving = TINY.serving.model_copy(update={"memory_gib": 2.0, "warm_up": False})
    replica = ModelReplica([TINY.model_copy(update={"memory": memory, "serving": serving})])
    try:
        (failure,) = (await replica.load_failures()).values()
    finally:
        replica.__del__()

    assert failure["kind"] == "out_of_memory"
    assert "of the memory of CPU even with" in str(failure["message"])
    assert "2.0 GiB are there; use a GPU such as" in str(failure["message"])
