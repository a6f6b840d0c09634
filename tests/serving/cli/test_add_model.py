"""`weft models add`: files become folders and cards; what cannot be used is said, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.protocol.card import load_cards
from serve_app.cli.add_model import model_id_of
from serve_app.cli.main import main
from serve_app.settings import ROOT
from tests.inference.original_names import stable_diffusion, weights_of, write

SD15 = ROOT / "models/tiny-sd15"


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cards"
    folder.mkdir()
    shutil.copy(ROOT / "configs/models/tiny-sd15.yaml", folder)
    monkeypatch.setenv("WEFT_CARDS_DIR", str(folder))
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def test_a_folder_of_files_becomes_models_and_bad_ones_are_said(
    cards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    write(files / "My Model_v2.safetensors", stable_diffusion(SD15))
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, files / "style.safetensors")

    status = main(["models", "add", str(files), "--config", str(SD15), "--licence", "CreativeML Open RAIL-M"])

    said = capsys.readouterr()
    assert status == 1
    assert "style.safetensors: the checkpoint" in said.err
    assert "it is a LoRA" in said.err
    assert "StableDiffusionPipeline: text_encoder, unet, vae from the file" in said.out
    card = load_cards(cards)["my-model-v2"]
    like = load_cards(cards)["tiny-sd15"]
    assert (card.steps, card.sizes, card.schedulers) == (like.steps, like.sizes, like.schedulers)
    assert card.licence.name == "CreativeML Open RAIL-M"
    assert card.weights.dtype == "bfloat16"
    assert weights_of(Path(str(card.weights.path)) / "unet").keys() == weights_of(SD15 / "unet").keys()
    assert sorted(load_cards(cards)) == ["my-model-v2", "tiny-sd15"]

    again = main(["models", "add", str(files / "My Model_v2.safetensors"), "--config", str(SD15)])

    assert again == 1
    assert "there is a model my-model-v2 already" in capsys.readouterr().err


def test_a_configuration_that_is_not_here_is_named(
    cards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "model.diffusion_model.output_blocks.11.0.skip_connection.weight"
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(1, 1)}, file)

    assert main(["models", "add", str(file)]) == 1

    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in capsys.readouterr().err
    assert sorted(load_cards(cards)) == ["tiny-sd15"]
    assert not list((tmp_path / "data").glob("models/*"))


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("Juggernaut_XL v9", "juggernaut-xl-v9"),
        ("sd_xl_base_1.0", "sd-xl-base-1.0"),
        ("日本 Anime", "anime"),
        ("x" * 80, "x" * 64),
    ],
)
def test_the_id_is_made_of_the_files_name(name: str, model_id: str) -> None:
    assert model_id_of(Path(f"{name}.safetensors")) == model_id


def test_an_empty_folder_and_a_name_for_many_are_refused(
    cards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["models", "add", str(empty)]) == 1
    assert "there is no .safetensors file in" in capsys.readouterr().err
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, empty / f"{name}.safetensors")

    assert main(["models", "add", str(empty), "--name", "one"]) == 1

    assert "--name is for one file" in capsys.readouterr().err
