"""A request for a video against a card: what is filled in, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.protocol.card import ModelCard, Sizes, Videos, load_card
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Control, Edit, GenerationRequest, ResolvedRequest, Task, Video
from deployments.validation.resolve import denoising_steps, resolve
from tests.inference.video_files import ROOT, png

WAN = load_card(ROOT / "configs/models/tiny-wan.yaml").model_copy(
    update={"tasks": ["t2v", "i2v"], "max_images": 4}
)


def resolved(card: ModelCard = WAN, /, video: Video | None = None, **changes: Any) -> ResolvedRequest:
    request = GenerationRequest(model=card.id, prompt="a red circle", video=video or Video(), **changes)
    return resolve(request, card, fresh_seed=1).request


def test_an_empty_video_gets_the_cards_frames_and_frame_rate() -> None:
    video = resolved().video

    assert video is not None
    assert (video.num_frames, video.fps, video.format, video.seconds) == (17, 8, "mp4", None)


@pytest.mark.parametrize(("seconds", "fps", "frames"), [(4.0, None, 33), (2.0, 24, 49), (0.1, None, 1)])
def test_seconds_become_the_nearest_number_of_frames(seconds: float, fps: int | None, frames: int) -> None:
    video = resolved(video=Video(seconds=seconds, fps=fps)).video

    assert video is not None
    assert video.num_frames == frames


def test_resolving_again_changes_nothing() -> None:
    once = resolved(video=Video(seconds=3, format="webm"), edit=Edit(image=png()))

    assert resolve(once, WAN, fresh_seed=9).request == once
    assert ResolvedRequest.model_validate_json(once.model_dump_json()) == once


def test_the_task_is_read_off_the_request() -> None:
    assert resolved().task is Task.t2v
    assert resolved(edit=Edit(image=png())).task is Task.i2v


def test_a_picture_to_begin_with_leaves_no_step_out() -> None:
    request = resolved(edit=Edit(image=png()), num_inference_steps=12)

    assert denoising_steps(request, WAN) == 12


@pytest.mark.parametrize(
    ("video", "changes", "param", "says"),
    [
        (Video(num_frames=16), {}, "num_frames", r"multiple of 4, plus 1 \(nearest: 17\)"),
        (Video(num_frames=133), {}, "num_frames", "nearest: 129"),
        (Video(seconds=40), {}, "seconds", "at most 16.12"),
        (Video(seconds=1, num_frames=17), {}, "seconds", "both given"),
        (Video(), {"num_images": 2}, "num_images", "one video"),
        (Video(end_seed=4), {}, "end_seed", "frame-wise"),
        (Video(end_prompt="a blue star"), {}, "end_prompt", "frame-wise"),
        (Video(zoom=2.0), {}, "zoom", "frame-wise"),
        (Video(pan_y=0.5), {}, "pan_y", "frame-wise"),
        (Video(codec="av1"), {}, "codec", "mp4 takes h264"),
        (Video(format="webm", codec="h264"), {}, "codec", "webm takes vp9 or av1"),
        (Video(), {"edit": Edit(image=png(), strength=0.5)}, "strength", "first frame"),
        (Video(), {"edit": Edit(image=png(), mask_image=png())}, "mask_image", "inpainted"),
        (Video(), {"controls": (Control(image=png(), type="canny"),)}, "controls", "leave controls out"),
        (Video(), {"width": 63}, "width", "multiple of 16"),
    ],
    ids=str,
)
def test_what_the_card_does_not_allow_is_refused_by_name(
    video: Video, changes: dict[str, Any], param: str, says: str
) -> None:
    card = WAN.model_copy(update={"controls": {"canny": None}}) if "controls" in changes else WAN

    with pytest.raises(BadRequest, match=says) as refused:
        resolved(card, video, **changes)

    assert refused.value.param == param


def test_many_frames_are_refused_at_sizes_where_few_are_accepted() -> None:
    assert WAN.videos is not None
    small = WAN.model_copy(
        update={"videos": WAN.videos.model_copy(update={"max_frame_pixels": 64 * 64 * 30})}
    )

    with pytest.raises(BadRequest, match="at most 29 frames"):
        resolved(small, Video(num_frames=33))


def test_odd_sizes_are_refused_where_a_card_would_let_them_through() -> None:
    odd = WAN.model_copy(update={"sizes": Sizes(width=64, height=64, multiple=1, min=32, max=128)})

    with pytest.raises(BadRequest, match="65x64 cannot be encoded; both must be even"):
        resolved(odd, width=65, height=64)


def test_a_view_moves_only_where_a_picture_can_be_made_from_another() -> None:
    assert WAN.videos is not None
    update = {"tasks": ["t2i", "t2v"], "videos": WAN.videos.model_copy(update={"framewise": True})}
    card = WAN.model_copy(update=update)

    with pytest.raises(BadRequest, match="leave zoom, pan_x and pan_y out") as refused:
        resolved(card, Video(pan_x=0.5))

    assert refused.value.param == "pan_x"
    able = card.model_copy(update={"tasks": ["t2i", "i2i", "t2v"]})
    moving = resolved(able, Video(pan_x=0.5)).video
    assert moving is not None
    assert (moving.pan_x, moving.moves, moving.end_seed) == (0.5, True, None), "its noise stands still"


def test_a_model_of_pictures_says_that_it_makes_no_videos() -> None:
    flux = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")

    with pytest.raises(BadRequest, match="cannot do t2v"):
        resolved(flux.model_copy(update={"tasks": ["t2i"]}))


def test_four_frames_cost_as_much_as_one_picture() -> None:
    assert resolved().cost_mpx_steps == pytest.approx(5 * 64 * 64 * 20 / 1e6)


def test_a_card_with_video_tasks_and_no_limits_is_refused() -> None:
    with pytest.raises(ValidationError, match="need the limits in videos"):
        ModelCard.model_validate(WAN.model_dump() | {"videos": None})
    with pytest.raises(ValidationError, match="multiple of 4"):
        Videos(num_frames=16, fps=8, max_frames=17, every=4, max_frame_pixels=10**6)
