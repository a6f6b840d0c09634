"""The one command that makes every tiny model from nothing, with a few steps of each stage."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline

from tools.tiny_models.controlnet import MAPS
from tools.tiny_models.train import main

ROOT = Path(__file__).parents[2]
PIPELINES = {
    "tiny-flux-schnell": "FluxPipeline",
    "tiny-flux-dev": "FluxPipeline",
    "tiny-flux-kontext": "FluxKontextPipeline",
    "tiny-sd15": "StableDiffusionPipeline",
    "tiny-sdxl-base": "StableDiffusionXLPipeline",
    "tiny-sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "tiny-wan": "WanPipeline",
}


def train(folder: Path, *arguments: str) -> Path:
    """The folder of the models that a rehearsal writes, in this process and without torch.compile."""
    command = ["--work", str(folder / "work"), "--out", str(folder / "models"), "--workers", "1"]
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # the libraries' own
        main([*command, "--rehearsal", *arguments])
    return folder / "models"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a rehearsal of all stages wrote its models."""
    return train(tmp_path_factory.mktemp("rehearsal"))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_rehearsal_makes_models_that_diffusers_loads(rehearsed: Path, name: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(rehearsed / name, torch_dtype=torch.float32)

    assert type(pipeline).__name__ == PIPELINES[name]
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    assert all(weight.isfinite().all() for weight in denoiser.parameters())


@pytest.mark.parametrize("kind", MAPS)
def test_a_rehearsal_makes_the_controlnets(rehearsed: Path, kind: str) -> None:
    controlnet = ControlNetModel.from_pretrained(rehearsed / f"tiny-sd15-{kind}")

    assert controlnet.config.cross_attention_dim > 0
    assert all(weight.isfinite().all() for weight in controlnet.parameters())


def test_a_rehearsal_makes_the_adapters(rehearsed: Path) -> None:
    adapters = sorted(path.parent.name for path in rehearsed.rglob("pytorch_lora_weights.safetensors"))

    assert adapters == ["lora_mosaic", "lora_night", "lora_outline"]


def test_a_rehearsal_links_what_models_have_in_common(rehearsed: Path) -> None:
    assert {path.name for path in (rehearsed / "tiny-flux-dev").iterdir() if path.is_symlink()} >= {"vae"}
    assert all((rehearsed / name / "vae").is_symlink() for name in ("tiny-sd15", "tiny-sdxl-base"))


@pytest.mark.parametrize("out", [(), ("--out", "models")])
def test_a_rehearsal_spares_the_shipped_models(
    tmp_path: Path, out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)

    with pytest.raises(SystemExit) as ended:
        main(["--work", str(tmp_path), "--rehearsal", *out])

    assert ended.value.code == 2
    assert "give --out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.rehearsal
def test_the_command_makes_all_models_in_two_processes_with_compiled_networks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.tiny_models.train", "--work", tmp_path / "work"]
    command += ["--out", tmp_path / "models", "--workers", "2", "--rehearsal"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-2_000:]
    assert {path.name for path in (tmp_path / "models").iterdir()} == {*PIPELINES, "tiny-sd15-canny"}
