"""`weft plan`."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.planning.gpus import GPUS
from deployments.planning.local_files import MODEL_CACHE
from deployments.planning.plan import plan_of
from deployments.planning.profile import Profile, profile_key, write_profile
from serve_app.card_settings import known_cards
from serve_app.cli.main import main
from serve_app.settings import Settings


def test_a_plan_is_printed_part_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "flux-dev", "--gpu", "l4"]) == 0

    text = capsys.readouterr().out
    assert text.startswith("NVIDIA L4: 20.5 GiB for one replica")
    assert "text_encoder_2     bfloat16  fp8" in text
    assert "peak 20.16 GiB = " in text
    assert "- transformer has weights of 8 bits (fp8)" in text


def test_all_known_gpus_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "hunyuan-video", "--all"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*GPUS]
    assert lines[0].endswith("refused")


def test_a_model_that_does_not_fit_is_a_failure_with_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "hunyuan-video", "--gpu", "t4"]) == 1

    assert "refused: hunyuan-video needs 23." in capsys.readouterr().out


def test_a_gpu_that_is_not_known_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "flux.1-dev", "--gpu", "a10"]) == 1

    assert "there is no GPU 'a10' in the table; there is rtx-3060, t4, a10g" in capsys.readouterr().err


def test_without_a_gpu_it_is_the_device_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny-sd15"]) == 0

    assert "all on the device, in float32" in capsys.readouterr().out


def test_what_weft_bench_measured_of_a_plan_is_shown_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(MODEL_CACHE, str(tmp_path))
    card = known_cards(Settings.load())["flux.1-dev"]
    made = plan_of(card, GPUS["l4"].machine())
    profile = Profile(1024, 1024, 1, {1: 1.5, 2: 2.5, 4: 5.25}, 0.5, 0.25)
    write_profile(card.weights, profile_key(card, made, GPUS["l4"].machine()), profile)

    assert main(["plan", "flux.1-dev", "--gpu", "l4"]) == 0
    shown = capsys.readouterr().out
    assert main(["plan", "flux.1-dev", "--gpu", "h100"]) == 0

    assert "at 1024x1024: a step takes 1.5 s with 1 rows, 2.5 s with 2, which gives most rows" in shown
    assert f"a picture alone about {0.75 + 1.5 * card.steps.default:.3g} s" in shown
    assert "measured by weft bench" not in capsys.readouterr().out


def test_settings_that_change_how_models_run_change_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_PRECISION", "nf4")

    assert main(["plan", "flux.1-dev", "--gpu", "h100"]) == 0

    assert "- transformer has weights of 4 bits (nf4)" in capsys.readouterr().out
