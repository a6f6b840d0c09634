"""Video files from frames: segments that are encoded separately and joined without encoding again.

A segment depends only on its frames, so any process may encode it, in any order, and again if the process
dies. Joining copies packets.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image

from deployments.media.sound import add_sound_stream, sound_packets
from deployments.media.still import THUMBNAIL_SIDE
from deployments.media.thread_scheduling import kept_scheduling
from deployments.media.video_spec import (
    SEGMENT_FRAMES,
    SHEET_COLUMNS,
    Frames,
    Segment,
    Sound,
    Still,
    VideoFiles,
    VideoSpec,
)
from deployments.protocol.errors import Internal

TILE_SIDE = 160  # pixels
WORST_CRF = {"h264": 38.0, "vp9": 56.0, "av1": 50.0}  # at quality 0
BEST_CRF = {"h264": 13.0, "vp9": 16.0, "av1": 14.0}  # at quality 100
ENCODERS = {"h264": "libx264", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
USUAL_CODEC = {"mp4": "h264", "webm": "vp9"}


def encode_segment(spec: VideoSpec, index: int, chunks: Sequence[Frames], threads: int) -> Segment:
    """Segment `index` of the video from its frames, given as arrays (n, H, W, 3) of RGB.

    Raises Internal when number or size of the frames do not match the segment.
    """
    first = index * SEGMENT_FRAMES
    expected = min(SEGMENT_FRAMES, spec.num_frames - first)
    given = sum(len(chunk) for chunk in chunks)
    if given != expected or any(c.shape[1:] != (spec.height, spec.width, 3) for c in chunks):
        raise Internal(
            f"segment {index} needs {expected} frames of {spec.width}x{spec.height}; "
            f"there are {given}: {[chunk.shape for chunk in chunks]}"
        )
    frames = [frame for chunk in chunks for frame in chunk]
    wanted = set(spec.tiles)
    buffer = io.BytesIO()
    # colours are converted in a second thread, as the ffmpeg program does
    with av.open(buffer, "w", format=spec.format) as container, ThreadPoolExecutor(1) as converter:
        stream = _stream(container, spec, threads)
        with kept_scheduling():
            stream.codec_context.open()
        for picture in converter.map(partial(_picture, VideoReformatter()), frames, range(given)):
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return Segment(
        index,
        given,
        buffer.getvalue(),
        {first + k: _small(frame, TILE_SIDE) for k, frame in enumerate(frames) if first + k in wanted},
        _jpeg(Image.fromarray(frames[0])) if index == 0 else None,
    )


def join(spec: VideoSpec, segments: Sequence[Segment], sound: Sound | None = None) -> VideoFiles:
    """The whole video from all its segments in order, with poster, thumbnail and spritesheet.

    An MP4 file starts with its index, so that it plays before it is loaded. `sound` begins with the first
    frame and is as long as the frames are shown.
    Raises Internal when a segment is missing.
    """
    if [segment.index for segment in segments] != list(range(spec.segments)):
        raise Internal(f"segments {[s.index for s in segments]} are not all {spec.segments} of the video")
    poster = segments[0].poster
    assert poster is not None, "the first segment contains the poster"
    tiles = [tile for segment in segments for _, tile in sorted(segment.tiles.items())]
    sheet = _sheet(tiles)
    first_frame = Image.open(io.BytesIO(poster)).convert("RGB")
    thumbnail = Image.fromarray(_small(np.asarray(first_frame), THUMBNAIL_SIDE))
    return VideoFiles(
        _joined(spec, segments, sound),
        Still("image/jpeg", poster, spec.width, spec.height),
        Still("image/webp", _webp(thumbnail, quality=80), thumbnail.width, thumbnail.height),
        Still("image/jpeg", _jpeg(sheet), sheet.width, sheet.height),
    )


def _joined(spec: VideoSpec, segments: Sequence[Segment], sound: Sound | None) -> bytes:
    options = {"movflags": "faststart"} if spec.format == "mp4" else {}
    with tempfile.TemporaryDirectory(prefix="weft-video-") as folder:  # faststart reads the file again
        path = Path(folder) / f"video.{spec.format}"
        with av.open(str(path), "w", format=spec.format, options=options) as container:
            container.metadata["comment"] = spec.comment
            container.metadata["description"] = spec.description
            parts = [av.open(io.BytesIO(segment.data), format=spec.format) for segment in segments]
            # opaque: packets are copied, so no encoder is searched by the name of the decoder
            stream: Any = container.add_stream_from_template(parts[0].streams.video[0], opaque=True)
            sound_stream = None if sound is None else add_sound_stream(container, sound, spec.format)
            packets = _timed(spec, parts)
            for packet in packets:
                packet.stream = stream
            if sound_stream is not None and sound is not None:
                packets += sound_packets(sound_stream, sound, spec.num_frames / spec.rate)
                packets.sort(key=lambda packet: packet.dts * packet.time_base)
            container.mux(packets)
            for part in parts:
                part.close()
        return path.read_bytes()


def _timed(spec: VideoSpec, parts: Sequence[Any]) -> list[Any]:
    """The packets of all segments, with the timestamps of the whole video.

    Segments of different lengths delay their first frame differently, which would leave gaps.
    """
    packets: list[tuple[Any, int]] = []  # with the index of their frame
    for index, part in enumerate(parts):
        for packet in part.demux(part.streams.video[0]):
            if packet.pts is not None:  # None marks the end of the stream
                number = round(packet.pts * packet.time_base * spec.rate)
                packets.append((packet, index * SEGMENT_FRAMES + number))
    if len(packets) != spec.num_frames:
        raise Internal(f"the segments contain {len(packets)} frames of {spec.num_frames}")
    delay = max(position - number for position, (_, number) in enumerate(packets))
    for position, (packet, number) in enumerate(packets):
        ticks = 1 / (packet.time_base * spec.rate)
        packet.pts, packet.dts = round(number * ticks), round((position - delay) * ticks)
        packet.duration = round(ticks)
    return [packet for packet, _ in packets]


def _stream(container: Any, spec: VideoSpec, threads: int) -> Any:
    """An encoder in the container: CRF by the requested quality, BT.709 as players expect for RGB sources."""
    name = spec.codec or USUAL_CODEC[spec.format]
    crf = f"{WORST_CRF[name] + (BEST_CRF[name] - WORST_CRF[name]) * spec.quality / 100:.0f}"
    match name:
        case "h264":
            options = {"preset": "veryfast"}
        case "vp9":
            options = {"b": "0", "deadline": "good", "cpu-used": "5", "row-mt": "1", "tile-columns": "2"}
        case _:
            os.environ.setdefault("SVT_LOG", "1")  # only errors; by default it prints its settings
            options = {"preset": "8", "svtav1-params": f"lp={threads}"}
    options |= {"crf": crf, "g": str(SEGMENT_FRAMES)}
    stream = container.add_stream(ENCODERS[name], rate=spec.rate, options=options)
    stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
    codec = stream.codec_context
    codec.thread_count = threads
    codec.colorspace = Colorspace.ITU709
    codec.color_range = ColorRange.MPEG
    codec.color_primaries = ColorPrimaries.BT709
    codec.color_trc = ColorTrc.BT709
    return stream


def _picture(reformatter: VideoReformatter, frame: Frames, number: int) -> av.VideoFrame:
    """The RGB frame (H, W, 3) with index `number`, in the colour space of the file."""
    picture = reformatter.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        threads=1,
    )
    picture.pts = number
    return picture


def _small(frame: Frames, side: int) -> Frames:
    small = Image.fromarray(frame)
    small.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=1.0)
    return np.asarray(small)


def _sheet(tiles: Sequence[Frames]) -> Image.Image:
    """The tiles in rows, left to right."""
    height, width, _ = tiles[0].shape
    columns = min(SHEET_COLUMNS, len(tiles))
    sheet = Image.new("RGB", (width * columns, height * -(-len(tiles) // columns)))
    for number, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (width * (number % columns), height * (number // columns)))
    return sheet


def _webp(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
