"""A part of a video whose decoding failed is decoded again, as if it had not failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deployments.media.video_spec import Frames
from deployments.pipelines.latent_decoder import LatentDecoder, latent_decoder
from tests.inference import families


def frames_of(decoder: LatentDecoder, next_frames: Callable[[LatentDecoder], Frames | None]) -> Frames:
    parts = []
    while (part := next_frames(decoder)) is not None:
        parts.append(part)
    return np.concatenate(parts)


class FailsAtLast:
    """Fails every other call of a decoder at its last convolution, when all caches have changed."""

    def __init__(self, vae: Any) -> None:
        convolutions = [part for part in vae.decoder.modules() if isinstance(part, nn.Conv3d)]
        convolutions[-1].register_forward_pre_hook(self._fail)
        self.failures = 0
        self._fails = False

    def _fail(self, *_: object) -> None:
        if self._fails:
            self._fails = False
            self.failures += 1
            raise torch.OutOfMemoryError("for a moment")

    def next_frames(self, decoder: LatentDecoder) -> Frames | None:
        self._fails = True
        try:
            return decoder.next_frames()
        except torch.OutOfMemoryError:
            return decoder.next_frames()


@pytest.fixture(params=["wan", "hunyuan_video"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return getattr(families, request.param)()


@torch.inference_mode()
def test_frames_after_a_failed_part_are_those_of_a_decode_without_failure(pipeline: Any) -> None:
    channels = pipeline.transformer.config.in_channels
    latents = torch.randn(1, channels, 30, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = frames_of(latent_decoder(pipeline, latents), lambda decoder: decoder.next_frames())

    failing = FailsAtLast(pipeline.vae)
    frames = frames_of(latent_decoder(pipeline, latents), failing.next_frames)

    assert failing.failures >= 2
    assert np.array_equal(frames, expected)
