"""Sizes of a model whose card states none, from the headers of its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deployments.models.load import load_pipeline
from deployments.models.offload import blocks_of
from deployments.planning.device_limit import GIB
from deployments.planning.file_needs import with_needs
from deployments.planning.machine import Machine
from deployments.planning.part_plan import block_sizes
from deployments.planning.plan import plan_of
from deployments.protocol.card import ModelCard, Weights, load_card
from serve_app.cli.main import main

ROOT = Path(__file__).parents[3]


def card(name: str, **changes: Any) -> ModelCard:
    return load_card(ROOT / f"configs/models/{name}.yaml").model_copy(update=changes)


@pytest.mark.parametrize("name", ["tiny-flux-dev", "tiny-sd15"])
def test_parts_are_those_of_the_loaded_model(name: str) -> None:
    needs = with_needs(card(name)).memory
    pipeline = load_pipeline(card(name).weights, torch.device("cpu"))

    assert needs is not None
    assert needs.from_files
    modules = {part: m for part, m in pipeline.components.items() if isinstance(m, nn.Module)}
    assert needs.parts.keys() == modules.keys()
    for part, module in modules.items():
        counted = sum({id(weight): weight.numel() for weight in module.parameters()}.values())
        assert needs.parts[part].parameters == pytest.approx(counted / 1e6, rel=0.01)
    denoiser = modules.get("transformer")
    if denoiser is not None:
        blocks = [sum(weight.numel() for weight in block.parameters()) / 1e6 for block in blocks_of(denoiser)]
        assert sorted(block_sizes(needs.parts["transformer"])) == pytest.approx(sorted(blocks), rel=0.01)


def test_the_plan_says_where_its_sizes_are_from_and_refuses_nothing() -> None:
    known = with_needs(card("tiny-flux-dev"))

    fits = plan_of(known, Machine("GPU", "cuda", 4 * GIB, (8, 9)))
    too_small = plan_of(known, Machine("GPU", "cuda", 2**20, (8, 9)))

    assert fits.planned is not None
    assert any("headers of its files" in note for note in fits.notes)
    assert too_small.refusal is None
    assert any("does not seem to fit" in note for note in too_small.notes)


def test_what_is_not_at_hand_or_known_stays_as_it_is(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "models/tiny-flux-dev", tmp_path / "model"))
    next((folder / "transformer").glob("*.safetensors")).write_bytes(b"cut")
    for one in (
        card("flux.1-dev"),
        card("tiny-wan"),
        card("tiny-sd15", weights=Weights(repo="example/model")),
        card("tiny-sd15", weights=Weights(path=str(tmp_path / "nothing"))),
        card("tiny-flux-dev", weights=Weights(path=str(folder))),
    ):
        assert with_needs(one) is one


def test_weft_plan_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny-sd15", "--gpu", "t4"]) == 0

    assert "headers of its files" in capsys.readouterr().out
