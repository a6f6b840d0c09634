"""What the serving layer knows of cards that name GGUF files: results, checks at the start, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.protocol.card import ModelCard, Weights, load_cards
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import ResolvedRequest
from serve_app.app import _fetchers
from serve_app.card_settings import as_set, card_notices, with_base_model
from serve_app.cli.doctor import card_findings
from serve_app.cli.findings import Level
from serve_app.cli.main import main
from serve_app.cli.start_checks import check_weights
from serve_app.settings import Settings
from serve_app.storage.model_digests import ModelDigests
from tests.inference.gguf_files import write_gguf

ROOT = Path(__file__).parents[2]
CARDS = load_cards(ROOT / "configs/models")
REQUEST = ResolvedRequest(
    model="tiny",
    prompt="a",
    width=64,
    height=64,
    num_inference_steps=1,
    guidance_scale=1.0,
    seed=1,
    max_sequence_length=32,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "a.gguf", {"a": torch.ones(2, 32)}, "Q8_0")


def card_with(path: Path | str, **changes: Any) -> ModelCard:
    card = CARDS["tiny-flux-dev"]
    weights = Weights(path=card.weights.path, dtype="float32", gguf={"transformer": str(path)})
    return card.model_copy(update={"weights": weights, **changes})


async def test_results_of_another_file_are_others(file: Path, tmp_path: Path) -> None:
    digests = ModelDigests()
    same = await digests.of(card_with(file), REQUEST, None)
    plain = await digests.of(CARDS["tiny-flux-dev"], REQUEST, None)
    again = await digests.of(card_with(file), REQUEST, None)
    write_gguf(file, {"a": torch.zeros(2, 32)}, "Q8_0")
    changed = await digests.of(card_with(file), REQUEST, None)

    assert same is not None
    assert same == again
    assert len({str(one) for one in (same, plain, changed)}) == 3
    assert await digests.of(card_with(tmp_path / "no.gguf"), REQUEST, None) is None


async def test_a_file_of_the_hub_is_known_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    card, digests = card_with("a/b/c.gguf"), ModelDigests()
    before = await digests.of(card, REQUEST, None)
    recorded = tmp_path / "hub/models--a--b/refs/main"
    recorded.parent.mkdir(parents=True)
    found = []
    for digit in "12":
        recorded.write_text(digit * 40)
        found.append(await digests.of(card, REQUEST, None))

    assert before is None
    assert found[0] is not None
    assert found[0] != found[1]


def test_files_are_checked_before_anything_starts(file: Path, tmp_path: Path) -> None:
    check_weights([card_with(file)])

    with pytest.raises(BadRequest, match=r"transformer of tiny-flux-dev .*/no.gguf cannot be read"):
        check_weights([card_with(tmp_path / "no.gguf")])
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(BadRequest, match=r"it is cut: .* fetch it again"):
        check_weights([card_with(file)])


def test_doctor_names_files_that_are_missing(file: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no.gguf"

    (found,) = card_findings([card_with(file), CARDS["flux.1-dev-q4"]])
    (other,) = card_findings([card_with(missing)])

    assert found.level is Level.ok
    assert (other.level, other.text) == (Level.warn, f"weights are missing: tiny-flux-dev ({missing})")


def test_a_file_is_fetched_to_the_nodes_also_where_the_rest_is_local(file: Path) -> None:
    remote = card_with("a/b/c.gguf")

    assert len(_fetchers({remote.id: remote}, {})) == 1
    assert _fetchers({"tiny-flux-dev": card_with(file)}, {}) == []


def test_the_list_of_models_names_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0

    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("flux.1-dev-q8 ")]
    assert "black-forest-labs/FLUX.1-dev, transformer from city96/FLUX.1-dev-gguf/flux1-dev-Q8_0.gguf" in line


def test_settings_of_forms_leave_such_models_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PRECISION", "int8")
    settings = Settings.load()
    cards = as_set({name: CARDS[name] for name in ("flux.1-dev", "flux.1-dev-q8")}, settings, set())

    assert cards["flux.1-dev"].serving.quantisation == "int8"
    assert cards["flux.1-dev-q8"].serving.quantisation == "auto"
    notices = [*card_notices(cards, settings)]
    assert any(
        "MODEL_PRECISION has no effect on the weights of flux.1-dev-q8, which" in line for line in notices
    )


def test_a_folder_of_models_has_the_rest_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "FLUX.1-dev"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(tmp_path))
    cards = {name: CARDS[name] for name in ("flux.1-dev-q8", "flux.1-dev")}

    found = as_set(cards, Settings.load(), set())["flux.1-dev-q8"].weights

    assert found.path == str(folder)
    assert found.gguf == CARDS["flux.1-dev-q8"].weights.gguf
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(folder))
    chosen = with_base_model(cards, cards, Settings.load(), one_application=True)
    assert chosen["flux.1-dev"].weights.path == str(folder), "its name means the model without files"
