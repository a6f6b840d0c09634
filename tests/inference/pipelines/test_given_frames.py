"""Videos with a given first or last frame, on tiny random weights: the frames are those that diffusers makes,
whatever else is in the batch; what a pipeline cannot take is refused when it is loaded."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.given_frames import frame_arguments
from deployments.protocol.card import LastImage, ModelCard, Sizes, Weights, load_card
from deployments.protocol.errors import ModelFailed
from deployments.protocol.events import Done
from deployments.protocol.request import Edit, GenerationRequest, Task, Video
from deployments.replica import ModelReplica
from tests.inference import families, tiny
from tests.inference.more_families import cogvideox_i2v, over, wan_a14b, wan_part
from tests.inference.recorder import Recorder
from tests.inference.video_files import ROOT, png

WAN = load_card(ROOT / "configs/models/tiny-wan.yaml")
SIDE = 32
FPS = 8


def wan_between_frames() -> Any:
    """Wan 2.1 from a first and a last frame: its transformer reads the embeddings of both."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=28,
        patch_size=14,
    )
    reads_both = {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24, "pos_embed_seq_len": 10}
    return over(
        families.wan(),
        "WanImageToVideoPipeline",
        transformer=wan_part("WanTransformer3DModel", **reads_both),
        image_encoder=transformers.CLIPVisionModel(vision).eval(),
        image_processor=transformers.CLIPImageProcessor(size=28, crop_size=28),
    )


def ltx_with_conditions() -> Any:
    return over(families.ltx(), "LTXConditionPipeline", scheduler=families._flow())


def wan_ti2v() -> Any:
    source = families.wan(expand_timesteps=True)
    return over(source, "WanImageToVideoPipeline", image_encoder=None, image_processor=None)


def hunyuan_video_15() -> Any:
    """HunyuanVideo 1.5 from an image, made for frames of about 64x64."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = transformers.models.qwen2_5_vl
    language = text.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(**families._LANGUAGE, rope_parameters=rope)
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=28,
        patch_size=14,
    )
    return diffusers.HunyuanVideo15ImageToVideoPipeline(
        text_encoder=text.modeling_qwen2_5_vl.Qwen2_5_VLTextModel(language).eval(),
        tokenizer=families._tokenizer(),
        text_encoder_2=tiny._t5(),
        tokenizer_2=families._tokenizer(),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=32,
            text_embed_2_dim=32,
            image_embed_dim=16,
            rope_axes_dim=(2, 6, 8),
            target_size=64,
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        scheduler=families._flow(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        image_encoder=transformers.SiglipVisionModel(vision).eval(),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 28, "width": 28}),
    )


def last_frame() -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(SIDE, SIDE))).transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG")
    return buffer.getvalue()


def card_of(folder: Path, last_image: LastImage | None) -> ModelCard:
    assert WAN.videos is not None
    return WAN.model_copy(
        update={
            "weights": Weights(path=str(folder), dtype="float32"),
            "tasks": ["i2v"],
            "sizes": Sizes(width=SIDE, height=SIDE, min=SIDE),
            "max_sequence_length": 256,
            "videos": WAN.videos.model_copy(update={"last_image": last_image}),
        }
    )


def request_for(frames: int, given: tuple[bool, bool], seed: int) -> GenerationRequest:
    """given: whether the first and whether the last frame are."""
    return GenerationRequest(
        model=WAN.id,
        prompt="a cat",
        seed=seed,
        width=SIDE,
        height=SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        edit=Edit(image=png(SIDE, SIDE)) if given[0] else None,
        video=Video(num_frames=frames, fps=FPS + seed, last_image=last_frame() if given[1] else None),
    )


@pytest.mark.parametrize(
    ("build", "last_image", "frames", "given"),
    [
        (wan_a14b, "optional", 5, [(True, True), (True, False), (True, True)]),
        (wan_between_frames, "required", 5, [(True, True)]),
        (ltx_with_conditions, "alone", 9, [(True, True), (False, True), (True, False)]),
        (hunyuan_video_15, None, 5, [(True, False), (True, False)]),
        (cogvideox_i2v, None, 9, [(True, False), (True, False)]),
    ],
    ids=["Wan 2.2 A14B", "Wan 2.1 between two frames", "LTX", "HunyuanVideo 1.5", "CogVideoX"],
)
async def test_a_video_has_the_frames_of_diffusers_in_any_batch(
    build: Callable[[], Any],
    last_image: LastImage | None,
    frames: int,
    given: list[tuple[bool, bool]],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    recorder = Recorder()
    model = ModelReplica([card_of(tmp_path, last_image)], encoder=recorder)
    requests = [request_for(frames, which, seed) for seed, which in enumerate(given)]
    try:
        await asyncio.gather(*(finished(model, request) for request in requests))
        together = [recorder.frames_of(FPS + seed) for seed in range(len(given))]
        recorder.frames.clear()
        for request in requests:
            await finished(model, request)
        alone = [recorder.frames_of(FPS + seed) for seed in range(len(given))]
    finally:
        model.__del__()

    for seed, which in enumerate(given):
        assert np.array_equal(together[seed], alone[seed])
        expected = diffusers_own(pipeline, frames, which, seed)
        assert np.abs(alone[seed].astype(np.int16) - expected).max() <= 1
        assert expected.std() > 5, "the frames show something"
        if which == (True, True) and last_image != "required":
            without = diffusers_own(pipeline, frames, (True, False), seed)
            assert np.abs(expected - without).max() > 1, "the last frame has an effect"


async def finished(model: ModelReplica, request: GenerationRequest) -> None:
    events = [event async for event in model.generate(request)]
    assert isinstance(events[-1], Done), events[-1]


def diffusers_own(pipeline: Any, frames: int, given: tuple[bool, bool], seed: int) -> Any:
    """Frames (n, H, W, 3) in 0..255 of the pipeline called as its documentation says."""
    first, last = (
        Image.open(io.BytesIO(data)).convert("RGB") if there else None
        for there, data in zip(given, (png(SIDE, SIDE), last_frame()), strict=True)
    )
    made = type(pipeline)(**pipeline.components, **without_parts(pipeline))
    made.set_progress_bar_config(disable=True)
    if isinstance(made, diffusers.LTXConditionPipeline):
        pictures = [(picture, frame) for picture, frame in ((first, 0), (last, frames - 1)) if picture]
        conditions = [
            diffusers.pipelines.ltx.pipeline_ltx_condition.LTXVideoCondition(image=p, frame_index=f)
            for p, f in pictures
        ]
        given_frames: dict[str, Any] = {"conditions": conditions, "frame_rate": FPS + seed}
    else:
        given_frames = {"image": first} if last is None else {"image": first, "last_image": last}
    options = {"width": SIDE, "height": SIDE, "guidance_scale": 3.0, "max_sequence_length": 256}
    if isinstance(made, diffusers.HunyuanVideo15ImageToVideoPipeline):  # it chooses the size by its target
        made.target_size, options = SIDE, {}
    with torch.inference_mode():
        output = made(
            prompt="a cat",
            num_inference_steps=2,
            num_frames=frames,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **options,
            **given_frames,
        )
    return np.round(output.frames[0] * 255).astype(np.int16)


def without_parts(pipeline: Any) -> dict[str, Any]:
    """Options of the pipeline that are no components."""
    _, options = type(pipeline)._get_signature_keys(type(pipeline))
    return {name: pipeline.config[name] for name in options if name not in pipeline.components}


@pytest.mark.parametrize(
    ("build", "last_image", "says"),
    [
        (cogvideox_i2v, "optional", "CogVideoXImageToVideoPipeline takes no last frame; take last_image out"),
        (wan_ti2v, "optional", "leaves the last frame out with these weights"),
        (wan_a14b, "alone", "write last_image: optional"),
        (wan_between_frames, "optional", "write last_image: required"),
        (wan_between_frames, None, "write last_image: required"),
        (families.ltx, "optional", "noise scheduler of LTX-Video 0.9.5"),
    ],
)
def test_a_card_that_promises_what_its_pipeline_cannot_is_refused_when_loaded(
    build: Callable[[], Any], last_image: LastImage | None, says: str
) -> None:
    with pytest.raises(ModelFailed, match=says):
        DiffusersModel(build(), [Task.i2v], last_image=last_image)


def test_ltx_2_is_given_its_frames_as_conditions() -> None:
    first, last = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))

    given = frame_arguments(diffusers.LTX2ConditionPipeline, first, last, 9)["conditions"]

    assert [(c.frames, c.index, c.strength) for c in given] == [([first], 0, 1.0), ([last], -1, 1.0)]
