"""Sizes of a model whose card states none, from the headers of its files."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
)
from torch import nn

from deployments.models.load import load_pipeline
from deployments.models.offload import blocks_of
from deployments.planning.device_limit import GIB
from deployments.planning.file_needs import with_needs
from deployments.planning.machine import Machine
from deployments.planning.part_plan import block_sizes
from deployments.planning.plan import plan_of
from deployments.planning.video_needs import video_activations
from deployments.protocol.card import ModelCard, Weights, load_card
from serve_app.cli.main import main
from tests.inference.planning.published_cards import card_of

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
        card("tiny-sd15", weights=Weights(repo="example/model")),
        card("tiny-sd15", weights=Weights(path=str(tmp_path / "nothing"))),
        card("tiny-flux-dev", weights=Weights(path=str(folder))),
    ):
        assert with_needs(one) is one


def in_hub_cache(cache: Path, folder: Path) -> Weights:
    """These weights as a repository that was fetched."""
    repo, commit = cache / "models--example--model", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    return Weights(repo="example/model")


def test_weights_in_the_cache_of_the_hub_have_the_sizes_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    weights = in_hub_cache(tmp_path, ROOT / "models/tiny-flux-dev")

    found = with_needs(card("tiny-flux-dev", weights=weights)).memory

    assert found is not None
    assert found == with_needs(card("tiny-flux-dev")).memory


def test_a_fetch_that_was_cut_off_gives_no_sizes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "models/tiny-flux-dev", tmp_path / "model"))
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "another.safetensors"}}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    one = card("tiny-flux-dev", weights=Weights(path=str(folder)))

    assert with_needs(one) is one


PUBLISHED: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "wan-2.1-t2v-14b": (WanTransformer3DModel, AutoencoderKLWan, {}),
    "wan-2.1-t2v-1.3b": (WanTransformer3DModel, AutoencoderKLWan, {"num_attention_heads": 12}),
    "ltx-video": (LTXVideoTransformer3DModel, AutoencoderKLLTXVideo, {}),
    "hunyuan-video": (HunyuanVideoTransformer3DModel, AutoencoderKLHunyuanVideo, {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("as_published", [False, True])
def test_what_a_video_takes_is_reckoned_from_configurations(
    name: str, as_published: bool, tmp_path: Path
) -> None:
    """Never less than what a plan reckons with for that model, and at most twice as much for a row."""
    transformer, vae, changes = PUBLISHED[name]
    for folder, kind, config in (("transformer", transformer, changes), ("vae", vae, {})):
        found = signature_of(kind) | config
        if as_published:  # those of Wan 2.1 have no factors
            found = {key: value for key, value in found.items() if not key.startswith("scale_factor_")}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(found))

    found = video_activations(card_of(name), tmp_path)
    known = card_of(name).memory

    assert found is not None
    assert known is not None
    assert 0.98 * known.row_gib <= found.row <= 2 * known.row_gib
    assert known.decode_gib <= found.decode <= 4 * known.decode_gib


def signature_of(kind: type[Any]) -> dict[str, Any]:
    """The configuration that its defaults are."""
    parameters = inspect.signature(kind).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def test_a_video_whose_configurations_say_too_little_has_no_sizes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "models/tiny-wan", tmp_path / "model"))
    one = card("tiny-wan", weights=Weights(path=str(folder)))
    assert with_needs(one).memory is not None

    (folder / "vae/config.json").write_text("{}")

    assert with_needs(one) is one


def test_weft_plan_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny-sd15", "--gpu", "t4"]) == 0

    assert "headers of its files" in capsys.readouterr().out
