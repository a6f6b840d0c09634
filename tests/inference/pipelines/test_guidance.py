"""A request's guidance scale arrives in the argument that guides in its pipeline, or the answer warns."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.guidance import argument_of_class, guidance_argument, is_guided, own_guiders
from deployments.protocol.card import Guidance, Licence, ModelCard, Serving, Sizes, Steps, Weights
from deployments.protocol.events import Artifact, Done, Event
from deployments.protocol.request import GenerationRequest, ResolvedRequest, Task
from deployments.replica import ModelReplica
from tests.inference import families, tiny

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes

LICENCE = Licence(name="Apache-2.0", url="https://www.apache.org/licenses/LICENSE-2.0", commercial=True)
QWEN = """QwenImage QwenImageControlNet QwenImageControlNetInpaint QwenImageEdit QwenImageEditInpaint
QwenImageEditPlus QwenImageImg2Img QwenImageInpaint QwenImageLayered QwenImage21""".split()
# weights without an embedded scale, by the argument, where that is not guidance_scale
ELSEWHERE: dict[str | None, set[str]] = {
    "true_cfg_scale": {*QWEN, "HunyuanSkyreelsImageToVideo"},
    "prior_guidance_scale": {"StableCascadeCombined"},
    # without effect where the denoiser does not embed it (FLUX.1-schnell), of a guider, or of no guidance
    None: set(
        """Flux FluxControlNet FluxImg2Img FluxInpaint FluxKontext FluxKontextInpaint ChromaInpaint
        HunyuanVideo HunyuanVideoFramepack HunyuanVideoImageToVideo HunyuanImage HunyuanImageRefiner
        HunyuanVideo15 HunyuanVideo15ImageToVideo MotifVideo MotifVideoImage2Video Flux2KleinKV FluxPriorRedux
        LTX2DFR LTX2DFRTemporalRefine DiffusionGemma LLaDA2 StableAudio3AudioToAudio
        StableAudio3Inpaint""".split()
    ),
}


def pipelines_with_prompts() -> Iterator[type]:
    """Every pipeline class of diffusers that takes a prompt and is not deprecated."""
    seen: set[type] = set()
    root = diffusers.pipelines
    for module in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        if ".deprecated" in module.name or "pipeline_" not in module.name or "_flax_" in module.name:
            continue
        try:
            members = vars(importlib.import_module(module.name))
        except Exception:  # it needs a library that is not installed
            continue
        for member in members.values():
            if (
                isinstance(member, type)
                and issubclass(member, diffusers.DiffusionPipeline)
                and member.__module__ == module.name
                and member not in seen
                and "prompt" in inspect.signature(member.__call__).parameters
            ):
                seen.add(member)
                yield member


def test_every_pipeline_of_diffusers_has_the_argument_that_guides_it() -> None:
    found: dict[str | None, set[str]] = {}
    for kind in pipelines_with_prompts():
        argument = argument_of_class(kind, embeds=False)
        assert argument is None or argument in inspect.signature(kind.__call__).parameters
        if argument != "guidance_scale":
            found.setdefault(argument, set()).add(kind.__name__.removesuffix("Pipeline"))

    assert found == ELSEWHERE


@pytest.mark.parametrize("name", ["Flux", "FluxKontext", "HunyuanVideo", "HunyuanImage", "QwenImage"])
def test_weights_that_embed_the_scale_are_given_it(name: str) -> None:
    argument = "distilled_guidance_scale" if name == "HunyuanImage" else "guidance_scale"
    assert argument_of_class(getattr(diffusers, f"{name}Pipeline"), embeds=True) == argument


def request(**changes: Any) -> ResolvedRequest:
    facts = {
        "model": "qwen",
        "prompt": "a cat",
        "width": 32,
        "height": 32,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "seed": 1,
        "max_sequence_length": 512,  # Qwen's template is 200 letters, each a token of the tiny tokenizer
    }
    return ResolvedRequest(**(facts | changes))


def test_the_scale_of_qwen_image_guides_it() -> None:
    torch.manual_seed(0)
    pipeline = families.qwen_image().to(torch.float32)
    model = DiffusersModel(pipeline, [Task.t2i])

    def made(**changes: Any) -> Any:
        return model.call(request(**changes), lambda _step, _steps: None, output_type="latent")[0]

    direct = pipeline(
        prompt="a cat",
        negative_prompt=" ",
        true_cfg_scale=4.0,
        width=32,
        height=32,
        num_inference_steps=2,
        max_sequence_length=512,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images[0]

    assert torch.equal(made(), direct)
    assert not torch.equal(made(), made(guidance_scale=8.0))
    assert not torch.equal(made(), made(guidance_scale=1.0))
    assert not torch.equal(made(), made(negative_prompt="a dog"))


class Guided:
    """A pipeline with a guider, and without a parameter for its scale, as HunyuanVideo 1.5."""

    def __init__(self, guider: ClassifierFreeGuidance) -> None:
        self.components = {"guider": guider, "tokenizer": None}

    def __call__(self, prompt: str) -> None: ...


def test_a_guider_is_the_requests_own_and_has_its_scale() -> None:
    shared = ClassifierFreeGuidance(guidance_scale=6.0, start=0.1)
    pipeline = Guided(shared)

    own = own_guiders(pipeline, request(guidance_scale=2.5))["guider"]

    assert own is not shared
    assert (own.config.guidance_scale, own.config.start) == (2.5, 0.1)
    assert shared.config.guidance_scale == 6.0
    assert guidance_argument(pipeline) is None
    assert is_guided(pipeline)


@pytest.mark.parametrize(("scale", "codes"), [(3.5, ["guidance_ignored"]), (1.0, [])])
async def test_a_scale_without_effect_is_a_warning(tmp_path: Path, scale: float, codes: list[str]) -> None:
    tiny.flux(guidance=False).save_pretrained(tmp_path)
    card = ModelCard(
        id="schnell",
        name="schnell",
        weights=Weights(path=str(tmp_path), dtype="float32"),
        tasks=["t2i"],
        steps=Steps(min=1, default=1, max=4),
        guidance=Guidance(min=0.0, default=1.0, max=10.0),
        sizes=Sizes(width=32, height=32, min=32, max=64),
        max_sequence_length=16,
        licence=LICENCE,
        serving=Serving(exact="off"),
    )
    model = ModelReplica([card])
    asked = GenerationRequest(model="schnell", prompt="a cat", seed=1, guidance_scale=scale)
    try:
        events: list[Event] = [event async for event in model.generate(asked)]
    finally:
        model.__del__()

    assert any(isinstance(event, Artifact) for event in events)
    done = events[-1]
    assert isinstance(done, Done)
    assert [warning.code for warning in done.warnings] == codes
