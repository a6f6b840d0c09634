"""ModelReplica as a handle sees it, without Ray: the tiny Wan that ships, and a real encoder."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image

from deployments.encoder import VideoEncoder
from deployments.pipelines.latent_decoder import latent_decoder, video_class
from deployments.protocol.card import Weights, load_card
from deployments.protocol.errors import Internal, ModelUnavailable
from deployments.protocol.events import (
    Artifact,
    Done,
    Event,
    Failed,
    Preview,
    Queued,
    Stage,
    Started,
    Step,
)
from deployments.protocol.request import Edit, GenerationRequest, OutputOptions, Task, Video
from deployments.replica import ModelReplica
from tests.inference.recorder import Recorder
from tests.inference.video_files import ROOT, Frames, decibels, decode_video, png
from tests.patience import patience
from tests.serving.fakes import eventually

CARD = load_card(ROOT / "configs/models/tiny-wan.yaml")
SD15 = load_card(ROOT / "configs/models/tiny-sd15.yaml")
CODEC_DB = 30.0


@pytest.fixture(scope="module")
def loaded() -> Iterator[ModelReplica]:
    made = ModelReplica([CARD], encoder=VideoEncoder())
    yield made
    made.__del__()


@pytest.fixture(scope="module")
def both() -> Iterator[ModelReplica]:
    """One replica with a model of videos and one of pictures."""
    group = CARD.serving.model_copy(update={"group": "both", "models_loaded": 2})
    made = ModelReplica(
        [card.model_copy(update={"serving": group}) for card in (CARD, SD15)], encoder=Recorder()
    )
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
    known = {"model": CARD.id, "prompt": "a red circle moving left", "seed": 5, "num_inference_steps": 3}
    return GenerationRequest(**(known | {"video": Video(num_frames=5)} | changes))


def stream(model: ModelReplica, **changes: Any) -> AsyncGenerator[Event]:
    return model.generate(make_request(**changes))


async def events_of(model: ModelReplica, **changes: Any) -> list[Event]:
    return [event async for event in stream(model, **changes)]


def file(events: Sequence[Event], kind: str = "video") -> Artifact:
    (found,) = (event for event in events if isinstance(event, Artifact) and event.kind == kind)
    return found


async def test_a_video_is_denoised_decoded_and_encoded_with_progress(model: ModelReplica) -> None:
    events = await events_of(model, video=Video(num_frames=41))

    assert events[:2] == [Queued(0, 0.0), Started(3)]
    assert events[2:5] == [Step(step, 3) for step in (1, 2, 3)]
    stages = [event for event in events if isinstance(event, Stage)]
    assert [s.done for s in stages if s.name == "decode"] == [1 + 4 * latent for latent in range(11)]
    assert [s.done for s in stages if s.name == "encode"][-1] == 41
    assert all(stage.total == 41 for stage in stages)
    kinds = [event.kind for event in events if isinstance(event, Artifact)]
    assert kinds == ["video", "thumbnail", "poster", "spritesheet"]
    assert isinstance(events[-1], Done)
    last_step = next(event for event in reversed(events) if isinstance(event, Step))
    assert events[-1].device_s > last_step.device_s, "decoding counts"


async def test_previews_show_the_frame_in_the_middle_of_the_video(
    model: ModelReplica, recorder: Recorder
) -> None:
    events = await events_of(
        model, video=Video(num_frames=17), num_inference_steps=12, output=OutputOptions(previews=3)
    )

    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.step for preview in previews] == [3, 6, 9]
    shown = [Image.open(io.BytesIO(preview.data)) for preview in previews]
    assert [(one.format, one.size) for one in shown] == [("WEBP", (64, 64))] * 3
    middle = recorder.frames_of(CARD.videos.fps)[8].astype(np.int16)  # type: ignore[union-attr]
    errors = [float(np.abs(np.asarray(one, dtype=np.int16) - middle).mean()) for one in shown]
    assert max(errors) < 20, "the colours are those of the video"


async def test_the_file_has_the_frames_of_diffusers(model: ModelReplica, recorder: Recorder) -> None:
    async with model._runtime.models.using(CARD.id) as held:
        pipeline = held.pipelines.pipeline_for(_fitted(model))
    with torch.inference_mode():
        own = pipeline(
            "a red circle moving left",
            num_frames=17,
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=CARD.guidance.default,
            max_sequence_length=CARD.max_sequence_length,
            generator=torch.Generator().manual_seed(5),
            output_type="np",
        ).frames[0]

    events = await events_of(model, video=Video(num_frames=17, fps=12))

    expected = np.round(own * 255).astype(np.int16)
    assert np.abs(recorder.frames_of(12).astype(np.int16) - expected).max() <= 1
    shown = decode_video(file(events).data)
    assert shown.frames.shape == expected.shape
    assert min(decibels(a, b) for a, b in zip(shown.frames, expected, strict=True)) > CODEC_DB
    assert (shown.duration_s, shown.pixel_format) == (pytest.approx(17 / 12, abs=0.01), "yuv420p")


def _fitted(model: ModelReplica) -> Any:
    from deployments.validation.resolve import resolve

    return resolve(make_request(), CARD, fresh_seed=0).request


async def test_decoding_latent_by_latent_is_bit_equal_to_decoding_at_once(model: ModelReplica) -> None:
    async with model._runtime.models.using(CARD.id) as held:
        pipeline = held.pipelines.pipeline_for(_fitted(model))
    latents = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = pipeline.video_processor.postprocess_video(pipeline.vae.decode(latents).sample, "np")[0]
        two = [latent_decoder(pipeline, latents), latent_decoder(pipeline, latents)]

        chunks_of_both = [[one.next_frames() for one in two] for _ in range(5)]  # the two in turns

    assert chunks_of_both[-1] == [None, None]
    for chunks in zip(*chunks_of_both[:-1], strict=True):
        assert np.array_equal(np.concatenate(chunks), np.round(whole * 255).astype(np.uint8))


async def test_four_different_videos_in_one_batch_equal_each_alone(
    model: ModelReplica, recorder: Recorder
) -> None:
    requests = [
        {"prompt": "a blue star", "seed": 1, "num_inference_steps": 2, "video": Video(num_frames=5, fps=21)},
        {"prompt": "a circle", "seed": 2, "num_inference_steps": 5, "video": Video(num_frames=5, fps=22)},
        {"guidance_scale": 1.0, "num_inference_steps": 4, "video": Video(num_frames=5, fps=23)},
        {"negative_prompt": "red", "scheduler": "flow_euler", "video": Video(num_frames=9, fps=24)},
    ]
    alone = []
    for changes in requests:
        await events_of(model, **changes)
        alone.append(recorder.frames_of(changes["video"].fps))  # type: ignore[union-attr]
    recorder.frames.clear()

    await asyncio.gather(*(events_of(model, **changes) for changes in requests))

    together = [recorder.frames_of(changes["video"].fps) for changes in requests]  # type: ignore[union-attr]
    assert [len(frames) for frames in together] == [5, 5, 5, 9]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("count", [1, 129])
async def test_videos_may_have_one_frame_or_129(count: int, model: ModelReplica, recorder: Recorder) -> None:
    events = await events_of(
        model, video=Video(num_frames=count, fps=25), num_inference_steps=1, guidance_scale=1.0
    )

    shown = decode_video(file(events).data)
    assert len(shown.frames) == len(recorder.frames_of(25)) == count
    pairs = zip(shown.frames, recorder.frames_of(25), strict=True)
    assert min(decibels(a, b) for a, b in pairs) > CODEC_DB
    assert shown.times_s == pytest.approx([k / 25 for k in range(count)], abs=1e-3)


class _Held:
    """An engine that stands still between two forwards, until it is released."""

    def __init__(self, model: ModelReplica) -> None:
        self._worker = model._runtime.worker
        self._standing, self._released = threading.Event(), threading.Event()

    async def __aenter__(self) -> _Held:
        self._call = asyncio.create_task(self._worker.run_on_thread(self._stand))
        await eventually(self._standing.is_set, quiet_s=4)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()
        await self._call

    def release(self) -> None:
        self._released.set()

    @property
    def waiting(self) -> int:
        """Requests that have come since."""
        return self._worker._inbox.qsize()

    def _stand(self) -> None:
        self._standing.set()
        self._released.wait(patience(4))


@pytest.mark.parametrize("long", ["video", "picture"])
async def test_a_short_request_runs_between_the_steps_of_a_long_one_and_changes_nothing(
    long: str, both: ModelReplica, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    both._runtime.encoder = recorder
    steps = {kind: 12 if kind == long else 2 for kind in ("video", "picture")}
    small = {"width": 64, "height": 64}
    requests = {
        "video": make_request(num_inference_steps=steps["video"], video=Video(num_frames=5, fps=26)),
        "picture": make_request(model=SD15.id, num_inference_steps=steps["picture"], video=None, **small),
    }
    alone = {kind: [event async for event in both.generate(requests[kind])] for kind in requests}
    frames_alone = recorder.frames_of(26)
    recorder.frames.clear()
    made: list[bool] = []  # in the engine's own order: whether each step was one of the long one

    def noted(step: int, all_steps: int) -> Step:
        made.append(all_steps > 6)
        return Step(step, all_steps)

    monkeypatch.setattr("deployments.executors.pipeline_calls.Step", noted)
    events_together: dict[str, list[Event]] = {}

    async def follow(kind: str) -> None:
        events_together[kind] = [event async for event in both.generate(requests[kind])]

    async with _Held(both) as engine, asyncio.TaskGroup() as group:
        for arrived, kind in enumerate((long, "picture" if long == "video" else "video"), 1):
            group.create_task(follow(kind))
            await eventually(lambda arrived=arrived: engine.waiting == arrived, quiet_s=4)  # type: ignore[misc]
        engine.release()

    assert made.count(False) >= 2
    assert made[-1] is True, "the long one came first, and the short one passed it at a step"
    assert np.array_equal(recorder.frames_of(26), frames_alone)
    together, separate = (_pixels(file(run["picture"], "image").data) for run in (events_together, alone))
    assert np.array_equal(together, separate)


def _pixels(data: bytes) -> Frames:
    return np.asarray(Image.open(io.BytesIO(data)))


async def test_the_container_says_how_it_was_made(model: ModelReplica) -> None:
    artifact = file(await events_of(model, video=Video(num_frames=5, format="webm")))

    metadata = decode_video(artifact.data).metadata
    assert artifact.media_type == "video/webm"
    assert metadata["comment"].startswith("a red circle moving left\nSteps: 3")
    assert "Frames: 5, FPS: 8" in metadata["comment"]
    facts = json.loads(metadata["description"])
    assert (facts["seed"], facts["video"]["num_frames"]) == (5, 5)
    assert artifact.metadata["seed"] == 5


@pytest.mark.parametrize("phase", ["denoise", "decode", "encode"])
async def test_closing_the_stream_ends_the_work_in_any_phase(
    phase: str, model: ModelReplica, recorder: Recorder
) -> None:
    recorder.gate.clear()
    one_segment = Video(num_frames=29)
    steps = 20 if phase == "denoise" else 1
    async with aclosing(stream(model, video=one_segment, num_inference_steps=steps)) as events:
        if phase == "denoise":
            await _until(events, Step)
        elif phase == "decode":
            await _until(events, Stage)
        else:
            rest = asyncio.create_task(_exhaust(events))
            await eventually(lambda: recorder.asked == 1, quiet_s=4)
            rest.cancel()
            await asyncio.wait({rest})

    await eventually(lambda: model._runtime.worker.active == 0, quiet_s=4)
    assert recorder.cancelled == recorder.asked == (phase == "encode")
    recorder.gate.set()
    assert isinstance((await events_of(model))[-1], Done)


async def _until(events: AsyncGenerator[Event], kind: type) -> None:
    async for event in events:
        if isinstance(event, kind):
            return


async def _exhaust(events: AsyncGenerator[Event]) -> None:
    async for _ in events:
        pass


async def test_a_slot_serves_the_next_while_a_video_is_encoded(
    model: ModelReplica, recorder: Recorder
) -> None:
    recorder.gate.clear()
    first = asyncio.create_task(events_of(model))
    await eventually(lambda: recorder.asked == 1, quiet_s=4)

    assert not model._runtime.worker._running
    recorder.gate.set()
    assert isinstance((await first)[-1], Done)


@pytest.mark.parametrize(
    ("failure", "retryable"),
    [(Internal("no such frames"), False), (ModelUnavailable("the video encoder was lost"), True)],
)
async def test_a_failing_encoder_fails_the_video_and_nothing_is_delivered(
    failure: Exception, retryable: bool, model: ModelReplica, recorder: Recorder
) -> None:
    recorder.failure = failure

    events = await events_of(model)

    assert isinstance(events[-1], Failed)
    assert events[-1].retryable is retryable
    assert not [event for event in events if isinstance(event, Artifact)]


async def test_bad_input_is_one_failed_event_that_names_the_field(model: ModelReplica) -> None:
    (failed,) = await events_of(model, video=Video(num_frames=6))

    assert isinstance(failed, Failed)
    assert (failed.kind, failed.param) == ("bad_request", "num_frames")


def test_a_pipeline_has_its_sibling_for_the_other_task() -> None:
    from diffusers import HunyuanVideoPipeline, LTXImageToVideoPipeline, LTXPipeline, WanPipeline

    assert video_class(WanPipeline, Task.i2v) is WanImageToVideoPipeline
    assert video_class(WanImageToVideoPipeline, Task.i2v) is WanImageToVideoPipeline
    assert video_class(LTXImageToVideoPipeline, Task.t2v) is LTXPipeline
    assert video_class(HunyuanVideoPipeline, Task.t2v) is HunyuanVideoPipeline


async def test_a_video_begins_with_the_given_picture(loaded: ModelReplica, tmp_path: Path) -> None:
    async with loaded._runtime.models.using(CARD.id) as held:
        parts = dict(held.pipelines._pipeline.components)
    torch.manual_seed(0)
    config = dict(parts["transformer"].config) | {
        "in_channels": 36,
        "num_layers": 1,
    }  # + picture and its mask
    parts["transformer"] = WanTransformer3DModel.from_config(config)
    WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None).save_pretrained(tmp_path)
    weights = Weights(path=str(tmp_path), dtype="float32")
    recorder = Recorder()
    model = ModelReplica([CARD.model_copy(update={"weights": weights, "tasks": ["i2v"]})], encoder=recorder)
    try:
        for fps, side in ((31, 64), (32, 96)):
            edit = Edit(image=png(side, side))
            events = await events_of(
                model, edit=edit, width=64, height=64, video=Video(num_frames=5, fps=fps)
            )
            assert isinstance(events[-1], Done), events[-1]
    finally:
        model.__del__()

    assert recorder.frames_of(31).shape == (5, 64, 64, 3)
    assert not np.array_equal(recorder.frames_of(31), recorder.frames_of(32)), "the picture acts"
