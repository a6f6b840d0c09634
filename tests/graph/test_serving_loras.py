"""LoRAs through the whole graph: named over HTTP, fetched by the replica, mixed into the picture, deleted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.graph.calls import ended, picture, submit
from tests.graph.running import ROOT, until
from tests.inference.video_files import decode_video

pytestmark = pytest.mark.ray

PROMPT = "a red circle on a blue background"
WAN_WIDTH = 160  # of the tiny video model's attention
WEIGHTS = "models/tiny-flux-schnell/loras/lora_{}/pytorch_lora_weights.safetensors"


def pixels_of(client: httpx.Client, **fields: Any) -> np.ndarray:
    """The picture of one job, as floats of 0 to 255."""
    job = ended(client, submit(client, **{"prompt": PROMPT, "seed": 7, **fields}))
    assert job["status"] == "completed", job["error"]
    return np.asarray(picture(client, job), dtype=float)


def ready(client: httpx.Client) -> list[str]:
    models = client.get("/api/models/").json()["models"]
    return [model["id"] for model in models if model["state"] == "ready"]


def frames_of(client: httpx.Client, job_id: str) -> np.ndarray:
    """The video of a job, as floats of 0 to 255."""
    job = ended(client, job_id)
    assert job["status"] == "completed", job["error"]
    return np.asarray(decode_video(client.get(job["artifacts"][0]["url"]).content).frames, dtype=float)


def test_an_adapter_by_name_changes_the_picture_as_it_was_trained_to(client: httpx.Client) -> None:
    plain = pixels_of(client)
    night = pixels_of(client, loras=[{"id": "night", "weight": 1.0}])
    off = pixels_of(client, loras=[{"id": "night", "weight": 0.0}])
    again = pixels_of(client)

    assert night.mean() < 0.8 * plain.mean()
    assert np.abs(off - plain).max() <= 1
    assert (again == plain).all()


def test_two_adapters_act_at_once_each_with_its_weight(client: httpx.Client) -> None:
    night = pixels_of(client, loras="night:1.0")
    both = pixels_of(client, loras="night:1.0, mosaic:1.0")
    by_prompt = pixels_of(client, prompt=f"{PROMPT} <lora:night:1><lora:mosaic:1>")

    assert np.abs(both - night).mean() > 2
    assert (by_prompt == both).all()


def test_an_uploaded_adapter_serves_until_it_is_deleted(client: httpx.Client) -> None:
    file = (ROOT / WEIGHTS.format("mosaic")).read_bytes()
    changed = file[:-2] + b"\x01\x3a"  # another file, with nearly the same effect
    name = {"name": "my mosaic", "trigger_words": "mosaic"}
    registered = client.post("/api/loras", files={"file": changed}, data=name).json()

    own = pixels_of(client, loras="my mosaic:1.0")
    shipped = pixels_of(client, loras="mosaic:1.0")
    deleted = client.delete(f"/api/loras/{registered['id']}")
    gone = client.post("/api/generate/image", json={"prompt": PROMPT, "loras": "my mosaic:1.0"})

    assert np.abs(own - shipped).mean() < 8
    assert deleted.json() == {"id": registered["id"], "deleted": True}
    assert gone.status_code == 404


def test_a_deleted_adapter_leaves_every_replica(client: httpx.Client) -> None:
    file = (ROOT / WEIGHTS.format("night")).read_bytes()
    changed = file[:-2] + b"\x01\x3a"
    registered = client.post("/api/loras", files={"file": changed}, data={"name": "dusk"}).json()
    pixels_of(client, loras="dusk:1.0")
    kept = Path(os.environ["WEFT_DATA_DIR"]) / "adapter-cache" / f"{registered['sha256']}.safetensors"
    assert kept.read_bytes() == changed

    assert client.delete("/api/loras/dusk").status_code == 200

    assert until(lambda: not kept.exists(), "the replica unloads the LoRA")


def test_a_wrong_shape_is_refused_before_the_job_is_accepted(client: httpx.Client) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    file = save(
        {f"{layer}.lora_A.weight": torch.ones(4, 3072), f"{layer}.lora_B.weight": torch.ones(3072, 4)}
    )
    assert until(lambda: "tiny-flux-schnell" in ready(client), "the model can report its layer shapes")
    before = len(client.get("/api/generate/").json()["jobs"])

    answer = client.post(
        "/api/generate/image",
        data={"model": "tiny-flux-schnell", "prompt": PROMPT},
        files={"lora_file": file},
    )

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, "lora_file")
    assert "(4, 3072), and its layer needs (rank, 160)" in error["message"]
    assert len(client.get("/api/generate/").json()["jobs"]) == before


def test_a_video_takes_an_adapter_in_both_dialects(client: httpx.Client) -> None:
    """Random factors: what they must do is proven elsewhere; here they must arrive at the video model."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(2):
        for name in ("to_q", "to_k", "to_v"):
            layer = f"transformer.blocks.{block}.attn1.{name}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(4, WAN_WIDTH, generator=draw)
            tensors[f"{layer}.lora_B.weight"] = torch.randn(WAN_WIDTH, 4, generator=draw)
    client.post("/api/loras", files={"file": save(tensors)}, data={"name": "shiver"}).raise_for_status()
    fields = {"model": "tiny-wan", "prompt": "a red circle moving left", "seed": 3}
    small = {"num_frames": 5, "num_inference_steps": 1}

    plain = client.post("/api/generate/video", json=fields | small).json()["id"]
    native = client.post("/api/generate/video", json=fields | small | {"loras": "shiver:1.0"}).json()["id"]
    omni = client.post("/v1/videos", json=fields | small | {"lora": {"name": "shiver"}}).json()["id"]

    frames = [frames_of(client, job_id) for job_id in (plain, native, omni)]
    assert np.abs(frames[1] - frames[0]).mean() > 2
    assert np.abs(frames[2] - frames[1]).mean() < 0.5


def test_the_graph_has_a_deployment_for_loras_beside_the_plain_one(client: httpx.Client) -> None:
    from ray import serve

    def running() -> bool:
        deployments = serve.status().applications["weft"].deployments
        return {"tiny-flux-schnell", "lora-tiny-flux-schnell", "Adapters"} <= set(deployments)

    assert until(running, "both deployments are there")
