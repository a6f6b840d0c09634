"""`weft bench` measures a model in a process of its own, and a replica begins with what it found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deployments.planning.profile import FOLDER
from deployments.protocol.card import ModelCard, Weights, load_card
from deployments.replica import ModelReplica
from serve_app.cli import bench
from serve_app.cli.main import main

ROOT = Path(__file__).parents[2]


def card_named(name: str, folder: Path) -> ModelCard:
    """The card with weights in this folder, for pictures of 64 pixels."""
    card = load_card(ROOT / f"configs/models/{name}.yaml")
    shutil.copytree(ROOT / str(card.weights.path), folder)
    return card.model_copy(
        update={
            "weights": Weights(path=str(folder), dtype="float32"),
            "steps": card.steps.model_copy(update={"min": 1}),
            "sizes": card.sizes.model_copy(update={"width": 64, "height": 64}),
            "serving": card.serving.model_copy(update={"slots": 4, "warm_up_sizes": [], "max_rows": None}),
        }
    )


def test_a_replica_knows_after_its_start_what_was_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = card_named("tiny-sd15", tmp_path / "weights")
    monkeypatch.setattr(bench, "known_cards", lambda _settings: {card.id: card})

    status = main(["bench", card.id])

    printed = capsys.readouterr()
    assert status == 0, printed.err
    (file,) = (tmp_path / "weights" / FOLDER).iterdir()
    lines = printed.out.splitlines()
    assert lines[0] == "tiny-sd15, 64x64"
    assert [line.split()[0] for line in lines[2:5]] == ["2", "4", "8"]  # with guidance two rows each
    assert lines[-1] == f"kept in {file}"

    kept = json.loads(file.read_text())
    assert set(kept["profile"]["step_s"]) == {"2", "4", "8"}
    kept["profile"]["step_s"] = {
        "2": 1e-6,
        "4": 1.1e-6,
        "8": 5e-6,
    }  # whatever else this machine does meanwhile
    file.write_text(json.dumps(kept))
    replica = ModelReplica([card])
    try:
        scheduler = replica._runtime._scheduler
        key = scheduler._step_costs.key_of((card.id, 64, 64, None))
        assert scheduler._cost_model.best_batch_size(key) == 4
    finally:
        replica.__del__()


def test_a_model_that_makes_no_pictures_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = card_named("tiny-wan", tmp_path / "weights")
    monkeypatch.setattr(bench, "known_cards", lambda _settings: {card.id: card})

    assert main(["bench", card.id]) == 1

    assert "tiny-wan makes no pictures from text" in capsys.readouterr().err
    assert not (tmp_path / "weights" / FOLDER).exists()


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "painter"]) == 1

    assert "there is no model 'painter'; there is " in capsys.readouterr().err


def test_what_a_process_that_broke_has_said_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)  # without the code
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")

    assert main(["bench", "tiny-sd15"]) == 1

    assert "ended with status 1" in capsys.readouterr().err
