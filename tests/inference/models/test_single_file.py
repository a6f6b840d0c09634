"""A checkpoint in one file, under the names of its trainer, becomes a folder with the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deployments.checkpoint_format.header import read_header
from deployments.models.single_file import default_source, import_checkpoint, needed_from_source
from deployments.protocol.errors import ModelFailed
from tests.inference.original_names import ROOT, Tensors, stable_diffusion, weights_of, write

SD15 = ROOT / "models/tiny-sd15"
DENOISER = "model.diffusion_model."


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return stable_diffusion(SD15)


@pytest.fixture(scope="module")
def checkpoint(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "Model.safetensors", tensors)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of the same kind of pipeline, without any weights."""
    folder = tmp_path / "config"
    shutil.copytree(SD15, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def assert_equal_weights(made: Path, original: Path) -> None:
    found, expected = weights_of(made), weights_of(original)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_every_weight_of_a_whole_model_is_the_files(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    imported = import_checkpoint(checkpoint, config, tmp_path / "made", "bfloat16")

    assert imported.pipeline_class == "StableDiffusionPipeline"
    assert set(imported.from_file) == {"unet", "vae", "text_encoder"}
    assert (imported.from_source, imported.notes) == ((), [])
    for part in imported.from_file:
        assert_equal_weights(tmp_path / "made" / part, SD15 / part)
    assert (tmp_path / "made/tokenizer/tokenizer_config.json").is_file()


def test_parts_that_are_not_in_the_file_come_from_the_other_pipeline(
    tensors: Tensors, tmp_path: Path
) -> None:
    bare = {name.removeprefix(DENOISER): one for name, one in tensors.items() if name.startswith(DENOISER)}
    file = write(tmp_path / "unet.safetensors", bare)

    imported = import_checkpoint(file, SD15, tmp_path / "made", "bfloat16")

    assert (imported.from_file, set(imported.from_source)) == (("unet",), {"vae", "text_encoder"})
    for part in ("unet", "vae", "text_encoder"):
        assert_equal_weights(tmp_path / "made" / part, SD15 / part)
    index = json.loads((SD15 / "model_index.json").read_text())
    assert {"vae", "text_encoder"} <= set(needed_from_source(read_header(file), index))
    assert "unet" not in needed_from_source(read_header(file), index)


def test_a_part_that_neither_has_is_named_before_anything_is_left(
    tensors: Tensors, config: Path, tmp_path: Path
) -> None:
    without = {name: one for name, one in tensors.items() if not name.startswith("cond_stage_model.")}
    file = write(tmp_path / "model.safetensors", without)

    with pytest.raises(ModelFailed, match=r"it has no text_encoder \(CLIPTextModel\), and .* has no weights"):
        import_checkpoint(file, config, tmp_path / "made", "bfloat16")

    assert [path.name for path in tmp_path.glob("*made*")] == []


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_file_of_another_model_is_refused(
    tensors: Tensors, config: Path, tmp_path: Path, change: str
) -> None:
    name = f"{DENOISER}middle_block.0.in_layers.2.weight"
    changed = (
        {**tensors, name: torch.zeros(7)}
        if change == "shape"
        else {k: v for k, v in tensors.items() if k != name}
    )
    file = write(tmp_path / "model.safetensors", changed)

    with pytest.raises(ModelFailed, match=r"the unet of .*; name a pipeline of the same kind with --config"):
        import_checkpoint(file, config, tmp_path / "made", "bfloat16")


def test_a_file_without_a_denoiser_is_no_model(tensors: Tensors, config: Path, tmp_path: Path) -> None:
    vae = {name: one for name, one in tensors.items() if name.startswith("first_stage_model.")}
    file = write(tmp_path / "vae.safetensors", vae)

    with pytest.raises(ModelFailed, match="it has no"):
        import_checkpoint(file, config, tmp_path / "made", "bfloat16")


def test_a_model_that_predicts_velocity_says_so_to_its_scheduler(
    tensors: Tensors, config: Path, tmp_path: Path
) -> None:
    file = write(
        tmp_path / "model.safetensors", tensors | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    )

    imported = import_checkpoint(file, config, tmp_path / "made", "bfloat16")

    scheduler = json.loads((tmp_path / "made/scheduler/scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert imported.notes == ["it predicts velocity (v_pred), and its noise scheduler is set so"]


def test_tensors_of_no_part_are_said(tensors: Tensors, config: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", tensors | {"aesthetic_head.weight": torch.zeros(1)})

    (note,) = import_checkpoint(file, config, tmp_path / "made", "bfloat16").notes

    assert note.startswith("warning: 1 tensors belong to no part")
    assert "aesthetic_head.weight" in note


def test_the_configuration_is_found_by_names_and_shapes(tmp_path: Path) -> None:
    cases = {
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (
            "stable-diffusion-v1-5/stable-diffusion-v1-5"
        ),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (
            "stabilityai/stable-diffusion-xl-base-1.0"
        ),
        "double_blocks.0.img_attn.norm.key_norm.scale": "black-forest-labs/FLUX.1-schnell",
        "layers.0.adaLN_modulation.0.weight": "Tongyi-MAI/Z-Image-Turbo",
    }
    found = {
        name: default_source(read_header(write(tmp_path / "model.safetensors", {name: torch.zeros(1, 1)})))
        for name in cases
    }

    assert found == cases
    with pytest.raises(ModelFailed, match="those of no model that diffusers reads"):
        default_source(read_header(write(tmp_path / "x.safetensors", {"x": torch.zeros(1)})))
