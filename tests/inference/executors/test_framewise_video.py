"""Videos of a picture model, frame by frame: where the path begins and ends, and what its frames share."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deployments.executors.frame_scheduler import FrameReady, FrameScheduler
from deployments.pipelines.framewise import VideoFrame, camera_view, slerp
from deployments.protocol.card import Videos, load_card
from deployments.protocol.events import Artifact, Done, Event, Failed, Preview, Queued, Started, Step
from deployments.protocol.request import Edit, GenerationRequest, OutputOptions, ResolvedVideo, Video
from deployments.replica import ModelReplica
from tests.inference.recorder import Recorder
from tests.inference.video_files import ROOT, Frames, clip, decode_video, png
from tests.patience import patience
from tests.serving.fakes import eventually

VIDEOS = Videos(num_frames=9, fps=8, max_frames=64, max_frame_pixels=64 * 64 * 64, framewise=True)
FLUX = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
CARD = FLUX.model_copy(update={"tasks": ["t2i", "i2i", "t2v", "i2v"], "videos": VIDEOS})


@pytest.fixture(scope="module")
def loaded() -> Iterator[ModelReplica]:
    made = ModelReplica([CARD], encoder=Recorder())
    yield made
    made.__del__()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def model(loaded: ModelReplica, recorder: Recorder) -> ModelReplica:
    loaded._runtime.encoder = recorder
    return loaded


def make_request(**changes: Any) -> GenerationRequest:
    known = {"model": CARD.id, "prompt": "a red circle", "seed": 5, "width": 64, "height": 64}
    return GenerationRequest(**(known | changes))


async def events_of(model: ModelReplica, **changes: Any) -> list[Event]:
    return [event async for event in model.generate(make_request(**changes))]


async def picture_of(model: ModelReplica, **changes: Any) -> Frames:
    events = await events_of(model, **changes)
    (data,) = (e.data for e in events if isinstance(e, Artifact) and e.kind == "image")
    return np.asarray(Image.open(io.BytesIO(data)))


def furthest(one: Frames, other: Frames) -> int:
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())


async def test_previews_are_finished_frames_at_even_distances(
    model: ModelReplica, recorder: Recorder
) -> None:
    plain = await events_of(model, video=Video(num_frames=8))
    output = OutputOptions(previews=3)

    events = await events_of(model, video=Video(num_frames=8), output=output)

    previews = [event for event in events if isinstance(event, Preview)]
    steps = [preview.step for preview in previews]
    assert len(steps) == 3
    assert steps == sorted(steps)
    for preview in previews:
        shown = Image.open(io.BytesIO(preview.data))
        assert (preview.media_type, shown.format, shown.size) == ("image/webp", "WEBP", (64, 64))
    assert not any(isinstance(event, Preview) for event in plain)


async def test_every_step_is_reported_and_the_file_has_all_frames(
    model: ModelReplica, recorder: Recorder
) -> None:
    events = await events_of(model, video=Video(num_frames=40, fps=10))

    assert [type(event) for event in events[:2]] == [Queued, Started]
    steps = [event for event in events if isinstance(event, Step)]
    assert steps == [Step(step, 160) for step in range(1, 161)]
    (video,) = (e for e in events if isinstance(e, Artifact) and e.kind == "video")
    assert len(decode_video(video.data).frames) == 40
    assert isinstance(events[-1], Done)
    assert events[-1].generation_s > 0


async def test_the_first_and_last_frame_are_the_pictures_of_the_two_seeds(
    model: ModelReplica, recorder: Recorder
) -> None:
    await events_of(model, video=Video(num_frames=5, fps=11, end_seed=77))

    frames = recorder.frames_of(11)
    assert furthest(frames[0], await picture_of(model)) <= 1
    assert furthest(frames[-1], await picture_of(model, seed=77)) <= 1
    assert all(furthest(a, b) > 1 for a, b in pairwise(frames))


async def test_frames_may_go_from_one_prompt_to_another(model: ModelReplica, recorder: Recorder) -> None:
    await events_of(model, video=Video(num_frames=5, fps=12, end_prompt="a blue star"))

    frames = recorder.frames_of(12)
    assert furthest(frames[0], await picture_of(model)) <= 1
    assert furthest(frames[-1], await picture_of(model, prompt="a blue star")) <= 1
    assert furthest(frames[1], frames[0]) > 1


async def test_without_an_end_the_last_frame_is_the_picture_of_the_next_seed(
    model: ModelReplica, recorder: Recorder
) -> None:
    await events_of(model, video=Video(num_frames=3, fps=13))

    assert furthest(recorder.frames_of(13)[-1], await picture_of(model, seed=6)) <= 1


async def test_frames_start_from_a_given_picture_by_its_strength(
    model: ModelReplica, recorder: Recorder
) -> None:
    edit = Edit(image=png(), strength=0.5)

    await events_of(model, edit=edit, video=Video(num_frames=3, fps=14))

    assert furthest(recorder.frames_of(14)[0], await picture_of(model, edit=edit)) <= 1


async def test_every_frame_starts_from_what_the_moving_camera_sees(
    model: ModelReplica, recorder: Recorder
) -> None:
    start, way = Edit(image=png(96, 96), strength=0.5), {"zoom": 2.0, "pan_x": 0.25}

    await events_of(model, edit=start, video=Video(num_frames=3, fps=15, **way))

    seen = camera_view(
        Image.open(io.BytesIO(start.image)).convert("RGB"),
        VideoFrame(ResolvedVideo(num_frames=3, fps=15, **way), 2),
        64,
        64,
    )
    last = Edit(image=_file(seen), strength=0.5)
    frames = recorder.frames_of(15)
    assert furthest(frames[0], await picture_of(model, edit=start)) <= 1
    assert furthest(frames[2], await picture_of(model, edit=last)) <= 1
    assert furthest(frames[1], frames[2]) > 1


async def test_without_a_picture_the_camera_moves_over_that_of_the_prompt(
    model: ModelReplica, recorder: Recorder
) -> None:
    events = await events_of(model, video=Video(num_frames=3, fps=16, zoom=0.5))

    first = Edit(image=_file(Image.fromarray(await picture_of(model))), strength=CARD.strength)
    frames = recorder.frames_of(16)
    assert furthest(frames[0], await picture_of(model, edit=first)) <= 1
    assert furthest(frames[2], frames[0]) > 1
    delivered = [event for event in events if isinstance(event, Queued | Started | Step)]
    steps = 4 + 3 * 3
    assert delivered == [Queued(0, 0.0), Started(steps), *(Step(step, steps) for step in range(1, steps + 1))]


def _file(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


async def test_frames_of_one_request_share_forwards(model: ModelReplica) -> None:
    engine = model._runtime.worker._engine
    await model._runtime.worker.prove_all(patience(60))
    before = engine.rows, engine.forwards

    await events_of(model, video=Video(num_frames=16))

    rows, forwards = engine.rows - before[0], engine.forwards - before[1]
    assert rows / forwards > 1.5, "frames share forwards"


async def test_closing_the_stream_cancels_all_frames(model: ModelReplica) -> None:
    async with aclosing(model.generate(make_request(video=Video(num_frames=64)))) as events:
        async for event in events:
            if isinstance(event, Step):
                break

    await eventually(lambda: model._runtime.worker.active == 0, quiet_s=4)
    assert isinstance((await events_of(model))[-1], Done)


def test_slerp_of_two_noises_is_noise() -> None:
    one, other = (torch.randn(4, 16, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))

    middle = slerp(one, other, 0.5)

    assert torch.equal(slerp(one, other, 0.0), one)
    assert torch.equal(slerp(one, other, 1.0), other)
    assert middle.std() == pytest.approx(1.0, abs=0.01)
    assert torch.lerp(one, other, 0.5).std() < 0.8


def frame(index: int, **camera: float) -> VideoFrame:
    """One of three frames of a video whose camera moves so."""
    return VideoFrame(ResolvedVideo(num_frames=3, fps=8, **camera), index)  # type: ignore[arg-type]


def test_the_camera_starts_with_the_whole_picture_and_zooms_by_equal_factors() -> None:
    picture = Image.fromarray(clip(1, 64, 96)[0])

    first, middle, last = (camera_view(picture, frame(index, zoom=4.0), 48, 32) for index in range(3))

    assert first == picture.resize((48, 32), Image.Resampling.LANCZOS)
    assert middle == picture.resize((48, 32), Image.Resampling.LANCZOS, box=(24, 16, 72, 48))
    assert last == picture.resize((48, 32), Image.Resampling.LANCZOS, box=(36, 24, 60, 40))


def test_a_picture_is_mirrored_beyond_its_edges() -> None:
    pixels = clip(1, 64, 64)[0]
    picture = Image.fromarray(pixels)

    right_above = np.asarray(camera_view(picture, frame(2, pan_x=0.5, pan_y=-0.5), 64, 64))
    further = camera_view(picture, frame(2, zoom=0.5), 128, 128)

    assert np.array_equal(right_above[32:, :32], pixels[:32, 32:]), "what lies to the right and above"
    assert np.array_equal(right_above[32:, 32:], pixels[:32, :31:-1])
    assert np.array_equal(right_above[:32, :32], pixels[31::-1, 32:])
    assert np.array_equal(np.asarray(further)[32:96, 32:96], pixels)


def test_the_widest_view_has_the_size_of_the_request() -> None:
    picture = Image.fromarray(clip(1, 50, 70)[0])

    for camera in ({"zoom": 0.25, "pan_x": -1.0, "pan_y": 1.0}, {"zoom": 4.0, "pan_x": 1.0}):
        assert camera_view(picture, frame(2, **camera), 64, 48).size == (64, 48)


# --- the order of frames -----------------------------------------------------------------------------------


class Counted(list[int]):
    """Knows how long it ever was."""

    most = 0

    def append(self, item: int) -> None:
        super().append(item)
        self.most = max(self.most, len(self))


def frame_runner(order: list[int], running: list[int], failing: int | None = None) -> Any:
    """Frames that finish in this order, whatever the order they begin in."""
    turn = asyncio.Condition()
    finished: list[int] = []

    async def run_frame(frame: int) -> AsyncGenerator[Any]:
        running.append(frame)
        try:
            yield Started(1)
            await asyncio.sleep(0)  # lets all started frames reach this line
            async with turn:
                await turn.wait_for(lambda: finished == order[: order.index(frame)])
                if frame == failing:
                    yield Failed("internal", "this frame failed", retryable=False)
                    return
                yield FrameReady(Image.new("RGB", (2, 2), (frame, 0, 0)))
                finished.append(frame)
                turn.notify_all()
        finally:
            running.remove(frame)

    return run_frame


async def test_frames_are_delivered_in_order_however_they_finish() -> None:
    async with FrameScheduler(frame_runner([3, 1, 0, 2], []), 4, window=4) as events:
        delivered = [event async for event in events]

    assert delivered[0] == Started(1)
    assert [e.image.getpixel((0, 0))[0] for e in delivered if isinstance(e, FrameReady)] == [0, 1, 2, 3]  # type: ignore[index]


async def test_no_more_frames_run_than_the_window_allows() -> None:
    running = Counted()
    async with FrameScheduler(frame_runner(list(range(20)), running), 20, window=3) as events:
        ready = [event async for event in events if isinstance(event, FrameReady)]

    assert len(ready) == 20
    assert (running.most, list(running)) == (3, [])


async def test_the_first_failure_ends_the_video() -> None:
    running: list[int] = []
    async with FrameScheduler(frame_runner([0, 1, 2, 3], running, failing=1), 4, window=4) as events:
        delivered = [event async for event in events]

    assert isinstance(delivered[-1], Failed)
    assert [type(event) for event in delivered].count(FrameReady) == 1
    assert running == []
