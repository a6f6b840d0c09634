"""Tiny pipelines of diffusers that edit by reference pictures, and schedules of their edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from deployments.protocol.request import ResolvedRequest
from tests.inference import families, tiny
from tests.inference.engine.exactness import IMAGE, Answer, Bench

VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
PICTURES: dict[bytes, Image.Image] = {  # by the bytes that stand for their files
    b"square": IMAGE,
    b"turned": IMAGE.rotate(90),
    b"wide": IMAGE.resize((96, 64)),
}


def kontext() -> Any:
    """FLUX.1 Kontext in small: one reference picture."""
    return diffusers.FluxKontextPipeline(**tiny.flux().components)


def klein() -> Any:
    """FLUX.2 klein in small. Its pipeline reads the language model's layers 9, 18 and 27."""
    parts = families.flux2_klein().components
    config = parts["text_encoder"].config
    config.num_hidden_layers = 27
    config.layer_types = ["full_attention"] * 27
    text_encoder = transformers.Qwen3ForCausalLM(config).eval()
    return diffusers.Flux2KleinPipeline(**parts | {"text_encoder": text_encoder})


def qwen_edit_plus() -> Any:
    """Qwen-Image-Edit-Plus in small: its language model reads the reference pictures, too."""
    base = families.qwen_image()
    tokenizer = base.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    config = base.text_encoder.config
    config.vision_start_token_id, config.image_token_id, config.vision_end_token_id = (
        tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS
    )
    config.text_config.vocab_size = len(tokenizer)
    return diffusers.QwenImageEditPlusPipeline(
        scheduler=base.scheduler,
        vae=base.vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        processor=_Processor(tokenizer, config),
        transformer=base.transformer,
    )


class _Processor(transformers.Qwen2VLProcessor):
    """The processor of Qwen2.5-VL without its part for videos, which needs torchvision."""

    def __init__(self, tokenizer: Any, config: Any) -> None:
        vision = config.vision_config
        self.tokenizer = tokenizer
        self.image_processor = transformers.Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size, merge_size=vision.spatial_merge_size, min_pixels=28 * 28
        )

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        data: dict[str, Any] = {}
        if images is not None:
            data = dict(self.image_processor(images=images, return_tensors="pt"))
            pads = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in data["image_grid_thw"]]
            text = [_expanded(line, pads) for line in text]
        tokens = self.tokenizer(text, padding=options["padding"], return_tensors="pt")
        return transformers.BatchFeature(data | dict(tokens))


def _expanded(line: str, pads: list[int]) -> str:
    """The text with as many image tokens as each picture has patches."""
    start, *rest = line.split("<|image_pad|>")
    return start + "".join("<|image_pad|>" * pad + part for pad, part in zip(pads, rest, strict=True))


@dataclass(kw_only=True)
class EditBench(Bench):
    """Edits by reference pictures, by the names in PICTURES, and requests without any."""

    def work(self, request: ResolvedRequest) -> Callable[[], Answer]:
        def call() -> Answer:
            pictures = [PICTURES[name] for name in request.references]
            latents = self.model.call(
                request, lambda _step, _steps: None, references=pictures, output_type="latent"
            )
            return Answer(torch.stack(latents), ())

        return call
