"""The last part of every video: remaining segments, then its files with how they were made."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Collection, Mapping

from deployments import __version__
from deployments.executors.denoise import reported_unproven
from deployments.executors.run import Run
from deployments.executors.video_encoding import EncodingSession
from deployments.media import still
from deployments.media.metadata_text import as_json
from deployments.media.video_spec import VideoFiles, VideoSpec
from deployments.protocol.events import Artifact, Done, Event, Stage


def encoding_session(run: Run, num_frames: int) -> EncodingSession:
    """A session that makes the video file the request asks for; use it in an `async with`."""
    request, video = run.request, run.request.video
    assert video is not None, "only videos are encoded"
    assert run.encoder is not None, "execute checks it"
    spec = VideoSpec(
        request.width,
        request.height,
        num_frames,
        video.fps,
        video.format,
        video.quality,
        codec=video.codec,
    )
    return EncodingSession(run.encoder, spec)


async def finish_video(
    run: Run,
    session: EncodingSession,
    queued_s: float,
    run_s: float,
    started: float,
    unproven: Collection[str],
) -> AsyncGenerator[Event]:
    """Stage events of the segments still being encoded, the files, Done. All frames were added before.

    run_s: seconds of work before `started`, which is a time.monotonic().
    unproven: modules whose forwards were shared in batch sizes that are not proven to be exact.
    """
    request = run.request
    while await session.wait_for_segment():
        yield Stage("encode", session.encoded, session.spec.num_frames)
    generation_s = run_s + time.monotonic() - started
    planned = run.model.changes_of(request)
    metadata = still.metadata(request, request.seed, __version__, generation_s, unproven, planned)
    if (sound := session.sound) is not None:
        metadata["sound"] = {"sample_rate": sound.rate, "channels": len(sound.samples)}
    parameters = still.a1111_parameters(request, request.seed, __version__)
    files = await session.files(parameters, as_json(metadata))
    for artifact in _artifacts(request.seed, session.spec, files, metadata):
        yield artifact
    generation_s = run_s + time.monotonic() - started
    yield Done(queued_s, generation_s, reported_unproven(request, unproven), tuple(run.warnings))


def _artifacts(
    seed: int, spec: VideoSpec, files: VideoFiles, metadata: Mapping[str, object]
) -> list[Artifact]:
    stills = {"thumbnail": files.thumbnail, "poster": files.poster, "spritesheet": files.spritesheet}
    return [
        Artifact(0, "video", spec.media_type, files.video, spec.width, spec.height, seed, metadata),
        *(
            Artifact(0, kind, picture.media_type, picture.data, picture.width, picture.height, seed)
            for kind, picture in stills.items()
        ),
    ]
