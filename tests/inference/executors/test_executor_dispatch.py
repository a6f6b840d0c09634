"""Which executor runs a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.executors.dispatch import executor_of
from deployments.executors.run import Run
from deployments.protocol.card import Videos, load_card
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.request import GenerationRequest, Video
from deployments.validation.resolve import resolve
from tests.inference.recorder import Recorder

CARDS = Path(__file__).parents[3] / "configs/models"
FLUX, WAN = load_card(CARDS / "tiny-flux-schnell.yaml"), load_card(CARDS / "tiny-wan.yaml")
FRAMEWISE = FLUX.model_copy(
    update={
        "tasks": ["t2i", "t2v"],
        "videos": Videos(num_frames=9, fps=8, max_frames=64, max_frame_pixels=64**3, framewise=True),
    }
)


class Model:
    """A model of which only the card is asked."""

    def __init__(self, card: Any) -> None:
        self.card = card


def run(card: Any, video: Video | None, encoder: Recorder | None) -> Run:
    request = GenerationRequest(model=card.id, prompt="a red circle", width=64, height=64, video=video)
    unused: Any = None
    model: Any = Model(card)
    return Run(resolve(request, card, fresh_seed=0).request, model, unused, unused, encoder)


@pytest.mark.parametrize(
    ("card", "video", "executor"),
    [
        (FLUX, None, "generate_images"),
        (FRAMEWISE, None, "generate_images"),
        (FRAMEWISE, Video(), "generate_framewise_video"),
        (WAN, Video(), "generate_video"),
    ],
)
def test_the_executor_follows_from_the_request(card: Any, video: Video | None, executor: str) -> None:
    assert executor_of(run(card, video, Recorder())).__name__ == executor


@pytest.mark.parametrize("card", [FRAMEWISE, WAN])
def test_a_video_without_an_encoder_is_refused_before_it_is_generated(card: Any) -> None:
    with pytest.raises(ModelUnavailable, match="no video encoder"):
        executor_of(run(card, Video(), None))
