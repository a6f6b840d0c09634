"""Compiled blocks: the same pictures in any batch, and code that the next replica finds on its node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import FluxTransformer2DModel
from torch import nn

from deployments.models.compile import repeated_blocks
from deployments.models.weight_cache import COMPILED
from deployments.protocol.card import ModelCard, Serving
from deployments.protocol.errors import ModelFailed
from tests.inference import tiny

ROOT = Path(__file__).parents[3]
# a replica in a process of its own, which prints its pictures and the counters of the compiler
REPLICA = """
import asyncio, io, json, os, sys
from pathlib import Path

from PIL import Image

from deployments.replica import ModelReplica
from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact
from deployments.protocol.request import GenerationRequest


async def picture(model, seed, **size):
    request = GenerationRequest(model="tiny", prompt="a red circle", seed=seed, num_inference_steps=2, **size)
    async for event in model.generate(request):
        if isinstance(event, Artifact) and event.kind == "image":
            return Image.open(io.BytesIO(event.data)).convert("RGB").tobytes().hex()


async def pictures(model):
    alone = [await picture(model, seed) for seed in range(3)]
    together = await asyncio.gather(*(picture(model, seed) for seed in range(3)))
    return {"alone": alone, "together": together, "larger": await picture(model, 0, width=96, height=64)}


model = ModelReplica([load_card(Path(sys.argv[1]))])  # imports torch
from torch._dynamo.utils import counters

graphs = counters["stats"].get("unique_graphs", 0)
report = asyncio.run(pictures(model))
report["graphs"] = graphs
report["later_graphs"] = counters["stats"].get("unique_graphs", 0) - graphs
report["compiled"] = counters["inductor"]["fxgraph_cache_miss"]
print(json.dumps(report), flush=True)
os._exit(0)  # a trial of a batch size may be running
"""


def replica(folder: Path, *, compiled: bool) -> dict[str, Any]:
    card = yaml.safe_load((ROOT / "configs/models/tiny-flux-schnell.yaml").read_text())
    card |= {"id": "tiny", "weights": {"path": str(folder / "model"), "dtype": "float32"}, "adapters": []}
    card["sizes"] |= {"width": 64, "height": 64}
    card["corrects"] = False
    card["steps"] = {"min": 2, "default": 2, "max": 8}
    card["serving"] |= {"lora": "none", "compile": compiled}
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(card))
    inherited = {name: value for name, value in os.environ.items() if name != COMPILED}  # torch here sets it
    done = subprocess.run(
        [sys.executable, "-c", REPLICA, str(path)],
        cwd=ROOT,
        env=inherited | {"WEFT_MODEL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++, which is not here")
def test_compiled_blocks_give_equal_pictures_in_any_batch_and_are_compiled_once_per_node(
    tmp_path: Path,
) -> None:
    pipeline = tiny.flux(guidance=False)
    config = dict(pipeline.transformer.config) | {"num_layers": 1, "num_single_layers": 0}  # compiles sooner
    pipeline.transformer = FluxTransformer2DModel.from_config(config)
    pipeline.save_pretrained(tmp_path / "model")

    plain = replica(tmp_path, compiled=False)
    first = replica(tmp_path, compiled=True)
    second = replica(tmp_path, compiled=True)

    assert first["together"] == first["alone"], "other requests of the batch change no bit"
    assert differ_at_most_by(1, first["alone"], plain["alone"]), "the compiler rounds otherwise, no more"
    assert (plain["graphs"], first["graphs"], second["graphs"]) == (0, 2, 2), "for one row and for several"
    assert first["later_graphs"] == second["later_graphs"] == 0, "another size needs no other"
    assert (first["compiled"], second["compiled"]) == (2, 0)
    assert {**first, "compiled": 0} == second
    assert any((tmp_path / "cache" / "compiled").iterdir()), "where the node keeps it"


def differ_at_most_by(levels: int, ours: list[str], theirs: list[str]) -> bool:
    pairs = zip(bytes.fromhex("".join(ours)), bytes.fromhex("".join(theirs)), strict=True)
    return all(abs(one - other) <= levels for one, other in pairs)


def test_a_denoiser_that_does_not_name_its_blocks_is_refused() -> None:
    class Plain(nn.Module):
        pass

    class Pipeline:
        transformer = Plain()

    with pytest.raises(ModelFailed, match=r"Plain cannot be compiled.*take compile out of the card"):
        repeated_blocks(Pipeline())


@pytest.mark.parametrize(
    ("serving", "reason"),
    [
        ({"warm_up": False}, "compile needs warm_up"),
        ({"lora": "none", "warm_up": False}, "compile needs warm_up"),
    ],
)
def test_a_card_that_cannot_be_compiled_is_refused(serving: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Serving.model_validate(serving | {"compile": True})


def test_a_model_without_warm_up_is_not_compiled() -> None:
    card = yaml.safe_load((ROOT / "configs/models/tiny-wan.yaml").read_text())
    card["serving"] |= {"lora": "none", "compile": True}

    with pytest.raises(ValueError, match="compile needs the task t2i"):
        ModelCard.model_validate(card)
