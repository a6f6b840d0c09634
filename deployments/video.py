"""VideoReplica: what a Serve replica of video models does; app.py makes the deployment of it."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from deployments import __version__
from deployments.executors.frame_scheduler import FrameReady, FrameScheduler
from deployments.executors.video_encoding import Encoder, EncodingSession, RemoteEncoder
from deployments.loras.file_reader import LoraFileReader
from deployments.media.video_spec import Frames, VideoFiles, VideoSpec
from deployments.observability.metrics import Sample
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelUnavailable, OutOfMemory
from deployments.protocol.events import Artifact, Done, Event, Failed, Queued, Stage, Started, Step
from deployments.protocol.request import ResolvedEdit, ResolvedRequest
from deployments.replica import ModelReplica
from deployments.validation.resolve import denoising_steps

if TYPE_CHECKING:
    from PIL.Image import Image

    from deployments.engine.worker import Finished
    from deployments.loras.lora_set import LoraSet
    from deployments.models.model_instance import ModelInstance
    from deployments.pipelines.latent_decoder import LatentDecoder


FRAMES_AT_ONCE = 16  # of one frame-wise video in the engine


class VideoReplica(ModelReplica):
    """An ModelReplica whose requests may be videos: they are denoised in the same engine, and then decoded on
    a thread of their own and encoded elsewhere, both at once, while their slot serves the next request.
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        encoder: Encoder | DeploymentHandle[Any],
        refiners: Mapping[str, ModelCard] | None = None,
        on_stop: Callable[[Callable[[], None]], object] | None = None,
        *,
        fetch_adapter: LoraFileReader | None = None,
        adapter_folder: str | None = None,
    ) -> None:
        """encoder: the VideoEncoder deployment, or one that is here. The others: see ModelReplica."""
        self._encoder = RemoteEncoder(encoder) if isinstance(encoder, DeploymentHandle) else encoder
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._decoding_since: float | None = None  # time.monotonic(); what the watchdog looks at
        self._frames_decoded, self._decode_s = 0, 0.0
        super().__init__(cards, refiners, on_stop, fetch_adapter=fetch_adapter, adapter_folder=adapter_folder)

    def samples(self) -> Iterator[Sample]:
        """See ModelReplica."""
        yield from super().samples()
        yield Sample("weft_video_frames_decoded", self._frames_decoded)
        yield Sample("weft_video_decode_seconds", self._decode_s)

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        super().check_health()
        since = self._decoding_since
        if since is not None and time.monotonic() - since > self._serving.watchdog_s:
            raise ModelUnavailable("the video decoder hangs; the replica must be replaced")

    async def _run(
        self,
        loaded: ModelInstance,
        request: ResolvedRequest,
        user: str,
        resume: bytes | None,
        max_wait_s: float | None,
        owner: LoraSet | None = None,
    ) -> AsyncGenerator[Event]:
        """The request's events. A frame-wise video is many requests, one per frame, so that its frames share
        their forwards with each other and with whatever else runs here."""
        video = request.video
        if video is None or not video.framewise or video.is_one_frame:
            async for item in super()._run(loaded, request, user, resume, max_wait_s, owner):
                yield item
            return

        def run_frame(wish: ResolvedRequest, frame: int) -> AsyncGenerator[Event | FrameReady]:
            one = wish.model_copy(
                update={
                    "video": video.model_copy(update={"frame": frame}),
                    "output": wish.output.model_copy(update={"previews": 0}),
                }
            )
            return ModelReplica._run(self, loaded, one, user, None, max_wait_s, owner)

        total = _all_steps(request, loaded.card)
        started = time.monotonic()
        queued_s = 0.0
        spec = _spec_of(request, video.num_frames)
        async with (
            EncodingSession(self._encoder, spec) as encoding,
            aclosing(self._frames(request, loaded.card, run_frame)) as events,
        ):
            encoded = done = 0
            async for event in events:
                match event:
                    case FrameReady(image=image):
                        await encoding.add(np.asarray(image, dtype=np.uint8)[None])
                        if encoding.encoded > encoded:
                            encoded = encoding.encoded
                            yield Stage("encode", encoded, video.num_frames)
                    case Started():
                        queued_s, started = time.monotonic() - started, time.monotonic()
                        yield Started(total)
                    case Step():
                        done += 1
                        yield Step(done, total)
                    case Failed():
                        yield event
                        return
                    case _:
                        yield event
            async for item in self._finish(request, spec, encoding, queued_s, 0.0, started):
                yield item

    async def _frames(
        self,
        request: ResolvedRequest,
        card: ModelCard,
        run_frame: Callable[[ResolvedRequest, int], AsyncGenerator[Event | FrameReady]],
    ) -> AsyncGenerator[Event | FrameReady]:
        """The frames in order, as Painting tells them. Where the view shall move over a picture and none was
        given, that one is painted first."""
        video, found = request.video, request
        assert video is not None, "a frame-wise video"
        if _starts_from_own_picture(request):
            async with FrameScheduler(partial(run_frame, request), 1, 1) as events:
                async for event in events:
                    if isinstance(event, FrameReady):
                        found = _over(request, card, await asyncio.to_thread(_png, event.image))
                        continue
                    yield event
                    if isinstance(event, Failed):
                        return
        window = min(self._serving.slots, FRAMES_AT_ONCE)
        async with FrameScheduler(partial(run_frame, found), video.num_frames, window) as events:
            async for event in events:
                if found is request or not isinstance(event, Queued | Started):
                    yield event

    async def _deliver(self, request: ResolvedRequest, finished: Finished) -> AsyncGenerator[Event]:
        """Decode and encode at the same time; the files, then Done. Of a single frame: the picture."""
        if request.video is None:
            async for event in super()._deliver(request, finished):
                yield event
            return
        if request.video.is_one_frame:
            yield FrameReady(finished.value[0])  # type: ignore[misc]  # read by Painting, never told
            return
        started = time.monotonic()
        latent_decoder: LatentDecoder = finished.value[0]
        spec = _spec_of(request, latent_decoder.total)
        async with EncodingSession(self._encoder, spec) as encoding:
            decoded = encoded = 0
            while (frames := await self._next_frames(latent_decoder)) is not None:
                decoded += len(frames)
                yield Stage("decode", decoded, latent_decoder.total)
                await encoding.add(frames)
                if encoding.encoded > encoded:
                    encoded = encoding.encoded
                    yield Stage("encode", encoded, latent_decoder.total)
            finish = self._finish(request, spec, encoding, finished.queued_s, finished.run_s, started)
            async for event in finish:
                yield event

    async def _finish(
        self,
        request: ResolvedRequest,
        spec: VideoSpec,
        encoding: EncodingSession,
        queued_s: float,
        run_s: float,
        started: float,
    ) -> AsyncGenerator[Event]:
        """When all frames were added. run_s: of work before `started`, which is a time.monotonic()."""
        while await encoding.wait_for_segment():
            yield Stage("encode", encoding.encoded, spec.num_frames)
        facts, text = _facts(request, run_s + time.monotonic() - started)
        files = await encoding.files(text, json.dumps(facts, ensure_ascii=False))
        for artifact in _artifacts(request, spec, files, facts):
            yield artifact
        yield Done(queued_s, run_s + time.monotonic() - started)

    async def _next_frames(self, latent_decoder: LatentDecoder) -> Frames | None:
        return await asyncio.get_running_loop().run_in_executor(self._decoder, self._decode, latent_decoder)

    def _decode(self, latent_decoder: LatentDecoder) -> Frames | None:
        """On the decoder's thread: the next frames of this video; other videos come in between."""
        import torch

        began = self._decoding_since = time.monotonic()
        try:
            frames = latent_decoder.next_frames()
            self._frames_decoded += 0 if frames is None else len(frames)
            self._decode_s += time.monotonic() - began
            return frames
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "the device ran out of memory while it decoded the video; "
                "ask for fewer frames or a smaller size"
            ) from error
        finally:
            self._decoding_since = None


def _starts_from_own_picture(request: ResolvedRequest) -> bool:
    return request.video is not None and request.video.moves and request.edit is None


def _over(request: ResolvedRequest, card: ModelCard, picture: bytes) -> ResolvedRequest:
    """The request whose frames start from this picture, by the card's strength if that leaves a step."""
    for strength in (card.strength, 1.0):
        edit = ResolvedEdit(image=picture, strength=strength)
        found = request.model_copy(update={"edit": edit})
        if denoising_steps(found, card) > 0:
            break
    return found


def _all_steps(request: ResolvedRequest, card: ModelCard) -> int:
    """Of all pictures of a frame-wise video."""
    assert request.video is not None, "a frame-wise video"
    steps, frames = denoising_steps(request, card), request.video.num_frames
    return (
        steps + frames * denoising_steps(_over(request, card, b""), card)
        if _starts_from_own_picture(request)
        else frames * steps
    )


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _spec_of(request: ResolvedRequest, num_frames: int) -> VideoSpec:
    video = request.video
    assert video is not None, "only videos are encoded"
    return VideoSpec(
        request.width,
        request.height,
        num_frames,
        video.fps,
        video.format,
        video.quality,
        codec=video.codec,
    )


def _facts(request: ResolvedRequest, generation_s: float) -> tuple[dict[str, object], str]:
    """How the video was made: as JSON, and in A1111's form."""
    from deployments.media import still

    text = still.a1111_parameters(request, request.seed, __version__)
    return still.metadata(request, request.seed, __version__, generation_s), text


def _artifacts(
    request: ResolvedRequest, spec: VideoSpec, files: VideoFiles, facts: Mapping[str, object]
) -> list[Artifact]:
    seed = request.seed
    stills = {"thumbnail": files.thumbnail, "poster": files.poster, "spritesheet": files.spritesheet}
    return [
        Artifact(0, "video", spec.media_type, files.video, spec.width, spec.height, seed, facts),
        *(
            Artifact(0, kind, still.media_type, still.data, still.width, still.height, seed)
            for kind, still in stills.items()
        ),
    ]
