"""Weights whose pipeline says that they are distilled work without guidance, whatever the scale."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.guidance import guidance_argument, guidance_arguments, is_guided
from deployments.pipelines.modular import ModularAdapter
from deployments.protocol.request import ResolvedRequest, Task
from tests.inference import editing
from tests.inference.pipelines.test_modular import quiet

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes


def klein(*, distilled: bool) -> Any:
    torch.manual_seed(0)
    plain = editing.klein()
    parts = {name: part for name, part in plain.components.items() if part is not None}
    return diffusers.Flux2KleinPipeline(**parts, is_distilled=distilled)


def modular(name: str, *, distilled: bool) -> ModularAdapter:
    pipeline = getattr(diffusers, name)()
    parts = klein(distilled=distilled).components
    known = [part for part in pipeline.component_names if parts.get(part) is not None]
    pipeline.update_components(**{part: parts[part] for part in known}, is_distilled=distilled)
    return quiet(pipeline)


def request(scale: float) -> ResolvedRequest:
    return ResolvedRequest(
        model="klein",
        prompt="a cat",
        width=32,
        height=32,
        num_inference_steps=2,
        guidance_scale=scale,
        seed=1,
        max_sequence_length=512,
    )


def latents(pipeline: Any, scale: float) -> Any:
    model = DiffusersModel(pipeline, [Task.t2i])
    return model.call(request(scale), lambda _step, _steps: None, output_type="latent")[0]


@pytest.mark.parametrize("distilled", [True, False])
def test_klein_is_guided_where_its_config_says_it_is_not_distilled(*, distilled: bool) -> None:
    pipeline = klein(distilled=distilled)

    assert is_guided(pipeline) is not distilled
    assert guidance_argument(pipeline) == (None if distilled else "guidance_scale")
    assert torch.equal(latents(pipeline, 1.0), latents(pipeline, 6.0)) is distilled


def test_no_scale_is_given_to_distilled_weights(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = klein(distilled=True)

    assert guidance_arguments(pipeline, request(6.0)) == {"guidance_scale": 1.0}
    latents(pipeline, 6.0)

    assert "ignored" not in caplog.text  # of diffusers, about a scale above 1


@pytest.mark.parametrize(
    ("name", "guided"),
    [("Flux2KleinModularPipeline", False), ("Flux2KleinBaseModularPipeline", True)],
)
def test_the_modular_pipelines_of_klein_say_the_same(name: str, *, guided: bool) -> None:
    assert is_guided(modular(name, distilled=not guided)) is guided
