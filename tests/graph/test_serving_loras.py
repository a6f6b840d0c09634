"""LoRAs through the whole graph: named over HTTP, fetched by the replica, mixed into the picture, deleted."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from tests.graph.calls import ended, picture, submit
from tests.graph.running import ROOT, until

pytestmark = pytest.mark.ray

PROMPT = "a red circle on a blue background"
WEIGHTS = "models/tiny-flux-schnell/loras/lora_{}/pytorch_lora_weights.safetensors"


def painted(client: httpx.Client, **wish: Any) -> np.ndarray:
    """The picture of one job, as floats of 0 to 255."""
    job = ended(client, submit(client, **{"prompt": PROMPT, "seed": 7, **wish}))
    assert job["status"] == "completed", job["error"]
    return np.asarray(picture(client, job), dtype=float)


def test_an_adapter_by_name_changes_the_picture_as_it_was_trained_to(client: httpx.Client) -> None:
    plain = painted(client)
    night = painted(client, loras=[{"id": "night", "weight": 1.0}])
    off = painted(client, loras=[{"id": "night", "weight": 0.0}])
    again = painted(client)

    assert night.mean() < 0.8 * plain.mean()
    assert np.abs(off - plain).max() <= 1
    assert (again == plain).all()


def test_two_adapters_act_at_once_each_with_its_weight(client: httpx.Client) -> None:
    night = painted(client, loras="night:1.0")
    both = painted(client, loras="night:1.0, mosaic:1.0")
    by_prompt = painted(client, prompt=f"{PROMPT} <lora:night:1><lora:mosaic:1>")

    assert np.abs(both - night).mean() > 2
    assert (by_prompt == both).all()


def test_an_uploaded_adapter_serves_until_it_is_deleted(client: httpx.Client) -> None:
    file = (ROOT / WEIGHTS.format("mosaic")).read_bytes()
    changed = file[:-2] + b"\x01\x3a"  # another file, with nearly the same effect
    name = {"name": "my mosaic", "trigger_words": "mosaic"}
    registered = client.post("/api/loras", files={"file": changed}, data=name).json()

    own = painted(client, loras="my mosaic:1.0")
    shipped = painted(client, loras="mosaic:1.0")
    deleted = client.delete(f"/api/loras/{registered['id']}")
    gone = client.post("/api/generate/image", json={"prompt": PROMPT, "loras": "my mosaic:1.0"})

    assert np.abs(own - shipped).mean() < 8
    assert deleted.json() == {"id": registered["id"], "deleted": True}
    assert gone.status_code == 404


def test_the_graph_has_a_deployment_for_loras_beside_the_plain_one(client: httpx.Client) -> None:
    from ray import serve

    def running() -> bool:
        deployments = serve.status().applications["weft"].deployments
        return {"tiny-flux-schnell", "lora-tiny-flux-schnell", "Adapters"} <= set(deployments)

    assert until(running, "both deployments are there")
