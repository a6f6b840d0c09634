"""What `weft doctor` says of the served models and the devices that they run on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ray.util.accelerators import accelerators

from deployments.planning.gpus import ACCELERATORS, GPUS
from deployments.planning.machine import Machine
from deployments.protocol.card import ModelCard, load_cards
from deployments.protocol.errors import ModelUnavailable
from serve_app.cli import plan_findings
from serve_app.cli.doctor import model_findings
from serve_app.cli.findings import Level
from serve_app.settings import ROOT, Settings

CARDS = load_cards(ROOT / "configs/models")


def cards(**serving: object) -> dict[str, ModelCard]:
    """FLUX.1-dev and HunyuanVideo with these changes."""
    return {
        name: card.model_copy(update={"serving": card.serving.model_copy(update=serving)})
        for name in ("flux.1-dev", "hunyuan-video")
        if (card := CARDS[name])
    }


def test_models_are_checked_for_the_gpu_that_their_cards_name() -> None:
    flux, hunyuan = plan_findings.plan_findings(cards(accelerator_type="A10G"))
    _, refused = plan_findings.plan_findings(cards(accelerator_type="T4"))

    assert (flux.level, hunyuan.level) == (Level.ok, Level.warn)
    assert flux.text.startswith("flux.1-dev on NVIDIA A10G: int8 transformer, int8 text_encoder_2: 20.2 GiB")
    assert "weights of transformer, text_encoder are copied again and again" in hunyuan.text
    assert refused.level is Level.fail
    assert refused.text.startswith("hunyuan-video needs ")
    assert "of the memory of Tesla T4" in refused.text


def test_a_kind_of_node_that_is_not_known_is_named_without_a_plan() -> None:
    flux, _ = plan_findings.plan_findings(cards(accelerator_type="24GB"))

    assert flux.text == "flux.1-dev runs on nodes with 24GB; weft plan flux.1-dev says there how"


def test_the_names_that_ray_has_for_gpus_are_in_the_table() -> None:
    assert {*ACCELERATORS} <= {name for name in vars(accelerators).values() if isinstance(name, str)}
    assert {*ACCELERATORS.values()} <= {*GPUS}


def test_the_device_at_hand_is_asked_once_and_without_what_others_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def small_gpu(card: ModelCard, model_device: str | None, *, alone: bool) -> Machine:
        asked.append((card.id, model_device, alone))
        return replace(GPUS["rtx-3060"].machine(), limit_bytes=6 * 2**30)

    monkeypatch.setattr(plan_findings, "machine_at_hand", small_gpu)
    flux, hunyuan = plan_findings.plan_findings(cards(), "cuda:1")

    assert asked == [("flux.1-dev", "cuda:1", True)]
    assert flux.level is Level.warn
    assert "weights of transformer, text_encoder_2 are copied" in flux.text
    assert hunyuan.level is Level.fail


def test_a_device_that_cannot_be_asked_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_card: ModelCard, _device: str | None, *, alone: bool) -> Machine:
        raise ModelUnavailable(f"no driver, alone: {alone}")

    monkeypatch.setattr(plan_findings, "machine_at_hand", broken)
    flux, _ = plan_findings.plan_findings(cards())

    assert (flux.level, flux.text) == (Level.warn, "flux.1-dev: no driver, alone: True")


def test_a_machine_without_a_gpu_starts_no_model_that_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "-1")
    flux, _ = plan_findings.plan_findings(cards())

    assert flux.level is Level.warn
    assert flux.text.startswith("flux.1-dev asks for a GPU, and this machine has none that Ray counts")


def test_the_models_of_the_default_config_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    findings = [*model_findings(Settings(), ROOT / "serve_config.yaml")]

    assert findings
    assert {finding.level for finding in findings} == {Level.ok}
    assert findings[0].text.startswith("tiny-")
    assert " on CPU: all on the device" in findings[0].text


def test_a_config_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    (finding,) = model_findings(Settings(), tmp_path / "none.yaml")

    assert finding.level is Level.fail
    assert f"there is no file {tmp_path / 'none.yaml'}" in finding.text
