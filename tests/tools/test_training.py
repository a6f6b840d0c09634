"""The one command that makes every tiny model from nothing, with a few steps of each stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline

ROOT = Path(__file__).parents[2]
PIPELINES = {
    "tiny-flux-schnell": "FluxPipeline",
    "tiny-flux-dev": "FluxPipeline",
    "tiny-sd15": "StableDiffusionPipeline",
    "tiny-sdxl-base": "StableDiffusionXLPipeline",
    "tiny-sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "tiny-wan": "WanPipeline",
}


def train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m tools.tiny_models.train` without torch.compile, which takes longer than a few steps."""
    return subprocess.run(
        [sys.executable, "-m", "tools.tiny_models.train", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a rehearsal of the whole recipe wrote its models."""
    folder = tmp_path_factory.mktemp("rehearsal")
    ended = train("--work", folder / "work", "--out", folder / "models", "--workers", "1", "--rehearsal")
    assert ended.returncode == 0, ended.stderr[-2_000:]
    return folder / "models"


@pytest.mark.parametrize("name", PIPELINES)
def test_a_rehearsal_makes_models_that_diffusers_loads(rehearsed: Path, name: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(rehearsed / name, torch_dtype=torch.float32)

    assert type(pipeline).__name__ == PIPELINES[name]
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    assert all(weight.isfinite().all() for weight in denoiser.parameters())


def test_a_rehearsal_makes_the_adapters_and_the_controlnet(rehearsed: Path) -> None:
    controlnet = ControlNetModel.from_pretrained(rehearsed / "tiny-sd15-canny")
    adapters = sorted(path.parent.name for path in rehearsed.rglob("pytorch_lora_weights.safetensors"))

    assert controlnet.config.cross_attention_dim > 0
    assert adapters == ["lora_mosaic", "lora_night", "lora_outline"]


def test_a_rehearsal_links_what_models_have_in_common(rehearsed: Path) -> None:
    assert {path.name for path in (rehearsed / "tiny-flux-dev").iterdir() if path.is_symlink()} >= {"vae"}
    assert all((rehearsed / name / "vae").is_symlink() for name in ("tiny-sd15", "tiny-sdxl-base"))


@pytest.mark.parametrize("out", [(), ("--out", "models")])
def test_a_rehearsal_spares_the_shipped_models(tmp_path: Path, out: tuple[str, ...]) -> None:
    ended = train("--work", tmp_path, "--rehearsal", *out)

    assert ended.returncode == 2
    assert "give --out" in ended.stderr
    assert not list(tmp_path.iterdir())
