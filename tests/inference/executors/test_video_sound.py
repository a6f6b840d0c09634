"""A video model that makes sound, on tiny random weights: the file has it unless the request has not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import av
import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from deployments.protocol.card import Sizes, Weights, load_card
from deployments.protocol.events import Artifact, Done
from deployments.protocol.request import GenerationRequest, Video
from deployments.replica import ModelReplica
from tests.inference import families
from tests.inference.recorder import Recorder
from tests.inference.video_files import ROOT

WAN = load_card(ROOT / "configs/models/tiny-wan.yaml")
SIDE, FRAMES, FPS, RATE = 32, 9, 8, 24_000


def ltx2() -> Any:
    heads = {
        f"{which}_connector_{name}": value
        for which in ("video", "audio")
        for name, value in (
            ("num_attention_heads", 4),
            ("attention_head_dim", 8),
            ("num_layers", 1),
            ("num_learnable_registers", None),
        )
    }
    return diffusers.LTX2Pipeline(
        scheduler=families._flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8, 8),
            down_block_types=("LTX2VideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False,) * 3,
            downsample_type=("spatial", "temporal"),
            upsample_type=("spatiotemporal", "spatiotemporal"),
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
            patch_size=2,
        ),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=16,
            ch_mult=(1, 2, 2),
            num_res_blocks=1,
            latent_channels=4,
            mel_bins=16,
            sample_rate=16_000,
            mel_hop_length=160,
            resolution=32,
        ),
        text_encoder=families._language_model("LlamaModel", "LlamaConfig"),
        tokenizer=families._tokenizer(),
        connectors=LTX2TextConnectors(
            caption_channels=32,
            text_proj_in_factor=4,
            connector_rope_base_seq_len=32,
            rope_type="split",
            **heads,
        ),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            audio_in_channels=16,
            audio_out_channels=16,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=32,
            rope_type="split",
            perturbed_attn=True,
            vae_scale_factors=(4, 8, 8),
        ),
        vocoder=LTX2Vocoder(
            in_channels=32,
            hidden_channels=16,
            out_channels=2,
            upsample_kernel_sizes=[16, 15, 4],
            upsample_factors=[8, 15, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=RATE,
        ),
    )


def request_for(container: Literal["mp4", "webm"], sound: bool) -> GenerationRequest:
    return GenerationRequest(
        model=WAN.id,
        prompt="a cat",
        seed=3,
        width=SIDE,
        height=SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        video=Video(num_frames=FRAMES, fps=FPS, format=container, sound=sound),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx2")
    torch.manual_seed(0)
    ltx2().save_pretrained(folder)
    return folder


async def artifacts(folder: Path, *requests: GenerationRequest) -> list[Artifact]:
    """The video of each request."""
    card = WAN.model_copy(
        update={
            "weights": Weights(path=str(folder), dtype="float32"),
            "sizes": Sizes(width=SIDE, height=SIDE, min=SIDE),
            "max_sequence_length": 32,
        }
    )
    model = ModelReplica([card], encoder=Recorder())
    try:
        made = []
        for request in requests:
            events = [event async for event in model.generate(request)]
            assert isinstance(events[-1], Done), events[-1]
            made += [e for e in events if isinstance(e, Artifact) and e.kind == "video"]
        return made
    finally:
        model.__del__()


async def test_the_sound_is_in_the_file_in_step_with_the_frames_unless_left_out(folder: Path) -> None:
    mp4, webm, silent = await artifacts(
        folder, request_for("mp4", True), request_for("webm", True), request_for("mp4", False)
    )

    for video, codec, rate in ((mp4, "aac", RATE), (webm, "opus", 48_000)):
        with av.open(io.BytesIO(video.data)) as file:
            stream = file.streams.audio[0]
            samples = np.concatenate([frame.to_ndarray() for frame in file.decode(stream)], axis=1)
            assert (stream.codec_context.name, stream.rate, stream.channels) == (codec, rate, 2)
        assert abs(samples.shape[1] / rate - FRAMES / FPS) <= 1 / FPS
        assert samples.std() > 1e-3, "not silence"
        assert video.metadata["sound"] == {"sample_rate": RATE, "channels": 2}
    with av.open(io.BytesIO(silent.data)) as file:
        assert len(file.streams.audio) == 0
    assert "sound" not in silent.metadata
