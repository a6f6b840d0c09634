"""Modular pipelines of families that have plain ones too, and Anima, which has none: all share forwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from deployments.pipelines.modular import ModularAdapter
from tests.inference import families
from tests.inference.pipelines.test_modular import play, quiet, work

SAME_PARTS = {  # the parts of the plain pipeline make the Modular one
    "FluxModularPipeline": "FLUX.1-dev",
    "Flux2KleinModularPipeline": "FLUX.2 klein",
    "Flux2KleinBaseModularPipeline": "FLUX.2 klein",
    "StableDiffusion3ModularPipeline": "Stable Diffusion 3",
    "QwenImageModularPipeline": "Qwen-Image",
    "WanModularPipeline": "Wan",
    "LTXModularPipeline": "LTX-Video",
}
SIDE = 32  # pixels


def anima() -> ModularAdapter:
    """Anima in small: the transformer of Cosmos behind a conditioner of two texts."""
    torch.manual_seed(0)
    pipeline = diffusers.AnimaModularPipeline()
    pipeline.update_components(
        text_encoder=families.z_image().text_encoder,
        tokenizer=families._tokenizer(),
        t5_tokenizer=families._tokenizer(),
        vae=families.qwen_image().vae,
        scheduler=families._flow(shift=3.0),
        text_conditioner=diffusers.AnimaTextConditioner(
            source_dim=32,
            target_dim=32,
            model_dim=32,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=98,
            min_sequence_length=16,
        ),
        transformer=diffusers.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=32,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            concat_padding_mask=False,  # it is resized by torchvision
            extra_pos_embed_type=None,
        ),
    )
    return quiet(pipeline)


def of_the_same_parts(name: str, family: str) -> ModularAdapter:
    parts = families.FAMILIES[family].build().components
    pipeline = getattr(diffusers, name)()
    known = [part for part in pipeline.component_names if parts.get(part) is not None]
    pipeline.update_components(**{part: parts[part] for part in known})
    return quiet(pipeline)


BUILD: dict[str, tuple[Callable[[], ModularAdapter], dict[str, Any]]] = {
    "AnimaModularPipeline": (anima, {"max_sequence_length": 16}),
    **{
        name: (
            lambda name=name, family=family: of_the_same_parts(name, family),
            families.FAMILIES[family].common,
        )
        for name, family in SAME_PARTS.items()
    },
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", BUILD)
def test_mixed_requests_of_a_modular_family_share_forwards_and_equal_each_alone(name: str) -> None:
    build, common = BUILD[name]
    pipeline = build()
    works = [work(pipeline, request, seed) for seed, request in enumerate(requests_for(pipeline, common))]

    with torch.inference_mode():
        alone = [call() for call in works]
        together, forwards, calls = play(pipeline, works)

    assert forwards <= 0.5 * calls
    for one, other in zip(alone, together, strict=True):
        assert (one - other).abs().max() < 1e-5 * one.abs().max()
    assert not torch.equal(alone[0], alone[1])


def requests_for(pipeline: ModularAdapter, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests with different prompts, steps and, where the pipeline has it, guidance."""
    known = set(inspect.signature(type(pipeline).__call__).parameters)  # type: ignore[operator]
    requests = []
    for number, scale in enumerate((3.0, 5.0, 7.0)):
        request = {key: value for key, value in common.items() if key in known}
        request |= {"prompt": families.PROMPTS[number], "num_inference_steps": 2 + number}
        if "guidance_scale" in known:
            request["guidance_scale"] = scale
        requests.append({**request, "height": SIDE, "width": SIDE})
    return requests
