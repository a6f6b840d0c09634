"""LTX and HunyuanVideo as videos, on tiny random weights: the frames are those that diffusers makes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

from deployments.pipelines import latent_decoder as videos
from deployments.protocol.card import Sizes, Weights, load_card
from deployments.protocol.events import Done, Stage
from deployments.protocol.request import Edit, GenerationRequest, Task, Video
from deployments.replica import ModelReplica
from tests.inference import families
from tests.inference.recorder import Recorder
from tests.inference.video_files import ROOT, png

WAN = load_card(ROOT / "configs/models/tiny-wan.yaml")
SIDE = 32


MARKS = ["<pad>", "<bos>", "<image>", "\n\n", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def hunyuan_from_a_picture(condition: str) -> Any:
    """condition: latent_concat, the first model, or token_replace, the one after it."""
    parts = dict(families.hunyuan_video().components)
    tokens = {mark: number for number, mark in enumerate([*MARKS, "<unk>", "cat"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    parts["tokenizer"] = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", additional_special_tokens=MARKS
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=336,
        patch_size=14,
    )
    language = transformers.LlamaConfig(**families._LANGUAGE)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=language, pad_token_id=0, image_token_index=MARKS.index("<image>")
    )
    parts["text_encoder"] = transformers.LlavaForConditionalGeneration(config).eval()
    known = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    concat = condition == "latent_concat"  # the picture's latents and their mask come as channels
    known |= {
        "in_channels": 2 * known["in_channels"] + 1 if concat else known["in_channels"],
        "image_condition_type": condition,
        "guidance_embeds": not concat,
    }
    parts["transformer"] = diffusers.HunyuanVideoTransformer3DModel(**known)
    processor = transformers.CLIPImageProcessor(size=336, crop_size=336)
    return diffusers.HunyuanVideoImageToVideoPipeline(image_processor=processor, **parts)


@pytest.mark.parametrize(
    ("build", "frames", "image", "decodes"),
    [
        (families.ltx, 9, False, [8, 9]),
        (families.ltx, 9, True, [8, 9]),
        (families.hunyuan_video, 25, False, [13, 25]),
        (lambda: hunyuan_from_a_picture("latent_concat"), 5, True, [5]),
        (lambda: hunyuan_from_a_picture("token_replace"), 21, True, [13, 21]),
    ],
    ids=["LTX", "LTX-i2v", "HunyuanVideo", "HunyuanVideo-i2v-33ch", "HunyuanVideo-i2v-16ch"],
)
async def test_a_video_has_the_frames_of_diffusers(
    build: Callable[[], Any], frames: int, image: bool, decodes: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    card = WAN.model_copy(
        update={
            "weights": Weights(path=str(tmp_path), dtype="float32"),
            "tasks": ["i2v" if image else "t2v"],
            "sizes": Sizes(width=SIDE, height=SIDE, min=SIDE),
            "max_sequence_length": 256,
        }
    )
    recorder = Recorder()
    model = ModelReplica([card], encoder=recorder)
    request = GenerationRequest(
        model=card.id,
        prompt="a cat",
        seed=3,
        width=SIDE,
        height=SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        edit=Edit(image=png(SIDE, SIDE)) if image else None,
        video=Video(num_frames=frames),
    )
    try:
        events = [event async for event in model.generate(request)]
    finally:
        model.__del__()

    assert isinstance(events[-1], Done), events[-1]
    assert [e.done for e in events if isinstance(e, Stage) and e.name == "decode"] == decodes
    expected = np.round(diffusers_own(pipeline, frames, image) * 255).astype(np.int16)
    assert len(expected) == frames
    assert np.abs(recorder.frames_of(8).astype(np.int16) - expected).max() <= 1
    assert expected.std() > 5, "the frames show something"


def diffusers_own(pipeline: Any, frames: int, image: bool) -> Any:
    """Frames (n, H, W, 3) in 0..1 of the pipeline called as its documentation says."""
    made = videos.video_class(type(pipeline), Task.i2v if image else Task.t2v)(**pipeline.components)
    made.set_progress_bar_config(disable=True)
    frame_rate = {"frame_rate": 8} if "LTX" in type(made).__name__ else {}
    picture = {"image": Image.open(io.BytesIO(png(SIDE, SIDE))).convert("RGB")} if image else {}
    with torch.inference_mode():
        return made(
            prompt="a cat",
            width=SIDE,
            height=SIDE,
            num_inference_steps=2,
            guidance_scale=3.0,
            num_frames=videos.requested_frames(made, frames),
            generator=torch.Generator().manual_seed(3),
            max_sequence_length=256,
            output_type="np",
            **frame_rate,
            **picture,
        ).frames[0]
