"""A class that computes with a library that is not installed is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from deployments.models import missing_libraries
from deployments.models.load import load_pipeline
from deployments.models.missing_libraries import refuse_missing_library
from deployments.protocol.card import Weights
from deployments.protocol.errors import ModelFailed
from tests.inference.pipelines.test_modular_families import anima


@pytest.fixture(params=[True, False])
def has_torchvision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(missing_libraries, "is_torchvision_available", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("kind", ["CosmosTransformer3DModel", "CosmosControlNetModel", "OmniGenPipeline"])
def test_a_class_that_needs_torchvision_is_refused_without_it(kind: str, has_torchvision: bool) -> None:
    if has_torchvision:
        refuse_missing_library(getattr(diffusers, kind))
        return
    with pytest.raises(ModelFailed, match=f"{kind} .* torchvision, which is not installed; install"):
        refuse_missing_library(getattr(diffusers, kind))


@pytest.mark.parametrize(
    "kind", ["FluxTransformer2DModel", "AutoencoderKLQwenImage", "WanTransformer3DModel"]
)
def test_other_classes_are_not(kind: str) -> None:
    refuse_missing_library(getattr(diffusers, kind))


@pytest.mark.filterwarnings("default")
def test_a_model_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing_libraries, "is_torchvision_available", lambda: False)
    anima()._modular.save_pretrained(str(tmp_path))
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"not weights")

    with pytest.raises(ModelFailed, match="computes with torchvision"):
        load_pipeline(Weights(path=str(tmp_path), dtype="float32"), torch.device("cpu"))
