"""`weft plan`."""

from __future__ import annotations

import pytest

from deployments.planning.gpus import GPUS
from serve_app.cli.main import main


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

    assert "refused: hunyuan-video needs 22." in capsys.readouterr().out


def test_a_gpu_that_is_not_known_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "flux.1-dev", "--gpu", "a10"]) == 1

    assert "there is no GPU 'a10' in the table; there is rtx-3060, t4, a10g" in capsys.readouterr().err


def test_without_a_gpu_it_is_the_device_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny-sd15"]) == 0

    assert "all on the device, in float32" in capsys.readouterr().out


def test_settings_that_change_how_models_run_change_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_PRECISION", "nf4")

    assert main(["plan", "flux.1-dev", "--gpu", "h100"]) == 0

    assert "- transformer has weights of 4 bits (nf4)" in capsys.readouterr().out
