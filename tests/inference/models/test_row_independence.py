"""Quantised layers whose rows depend on each other are found in the loaded modules, whatever made them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerRow, PerTensor, quantize_

from deployments.models import model_instance
from deployments.models import quantise as quantising
from deployments.models.device_memory import DeviceMemory
from deployments.models.load import load_pipeline
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_instance import ModelInstance
from deployments.models.quantise import quantise
from deployments.models.row_independence import check_rows, is_row_independent
from deployments.planning.machine import Machine
from deployments.planning.plan import PartPlan
from deployments.protocol.card import ModelCard, Quantisation, load_card
from deployments.protocol.errors import ModelFailed

CARD = load_card(Path(__file__).parents[3] / "configs/models/tiny-flux-schnell.yaml")
KINDS = [kind for kind in get_args(Quantisation) if kind != "fp8_dynamic"]  # which needs a GPU


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32)).bfloat16()


def with_scales(made: nn.Module, granularity: Any) -> Any:
    config = Int8DynamicActivationInt8WeightConfig(granularity=granularity, set_inductor_config=False)
    quantize_(made, config)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_in_every_form_of_a_card(kind: Quantisation) -> None:
    made = net()

    quantise(made, PartPlan("part", "bfloat16", quantisation=kind))

    assert is_row_independent(made[0])
    check_rows([made], "strict")


def test_rows_with_scales_of_their_own_are_independent() -> None:
    check_rows([with_scales(net(), PerRow())], "strict")


def test_a_scale_of_a_whole_tensor_is_refused_where_exactness_is_strict() -> None:
    with pytest.raises(ModelFailed, match=r"Sequential\.0 scales its inputs .* or write exact: prefer"):
        check_rows([with_scales(net(), PerTensor())], "strict")


def test_one_such_layer_among_others_is_found() -> None:
    both = nn.Sequential(with_scales(net(), PerRow()), with_scales(net(), PerTensor()))

    with pytest.raises(ModelFailed, match=r"Sequential\.1\.0 scales its inputs"):
        check_rows([both], "strict")


def test_fp8_dynamic_has_a_scale_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products need a GPU; what torchao is asked for does not."""
    asked: list[Any] = []
    monkeypatch.setattr(quantising, "quantize_", lambda _layer, config: asked.append(config))

    quantise(net(), PartPlan("part", "bfloat16", quantisation="fp8_dynamic"))

    scales = {type(one) for config in asked for one in config.granularity}
    assert scales == {PerRow}


def test_otherwise_it_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_rows([with_scales(net(), PerTensor())], "prefer")

    assert "results depend on the requests that share a forward" in caplog.text


def test_a_model_with_such_layers_is_refused_as_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> Any:
        pipeline = load_pipeline(*args, **options)
        with_scales(pipeline.transformer, PerTensor())
        return pipeline

    monkeypatch.setattr(model_instance, "load_pipeline", load)
    card = CARD.model_copy(update={"serving": CARD.serving.model_copy(update={"exact": "strict"})})

    with pytest.raises(ModelFailed, match="which exact: strict rules out"):
        loaded(card)


def loaded(card: ModelCard) -> ModelInstance:
    admission = MemoryAdmission(DeviceMemory(lambda: None))
    return ModelInstance(card, Machine("CPU", "cpu"), None, torch.device("cpu"), admission=admission)


def test_a_module_that_a_request_has_loaded_is_looked_at_too() -> None:
    card = CARD.model_copy(update={"serving": CARD.serving.model_copy(update={"exact": "strict"})})
    model = loaded(card)
    try:
        with pytest.raises(ModelFailed, match="which exact: strict rules out"):
            model.pipelines.on_new_modules(CARD.weights, [with_scales(net(), PerTensor())])
    finally:
        model.unload()
