"""The video of a request: frames, frame rate and encoding, checked against a model card (pure)."""

from __future__ import annotations

from deployments.protocol.card import ModelCard, Videos
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    MAX_SEED,
    GenerationRequest,
    ResolvedVideo,
    Task,
    Video,
    VideoCodec,
    VideoFormat,
)
from deployments.validation.inputs import mask_field

CODECS: dict[VideoFormat, tuple[VideoCodec, ...]] = {"mp4": ("h264",), "webm": ("vp9", "av1")}
FRAMEWISE_ONLY = ("end_prompt", "end_seed", "zoom", "pan_x", "pan_y")
MOTION = ("zoom", "pan_x", "pan_y")


def resolve_video(
    request: GenerationRequest, card: ModelCard, width: int, height: int, seed: int
) -> ResolvedVideo | None:
    """The video with every blank filled from the card; None when pictures are requested.

    width, height: of a frame in pixels. A frame-wise video that names neither its end nor a motion ends with
    the picture of the next seed. Raises BadRequest naming the field, the cause and what would be right.
    """
    video, limits = request.video, card.videos
    if video is None:
        return None
    assert limits is not None, "a card whose tasks make videos has their limits"
    _check_combination(request, video, limits)
    _check_given_frames(request, video, card.id, limits)
    _check_motion(video, card)
    _check_codec(video)
    fps = limits.fps if video.fps is None else video.fps
    num_frames = _num_frames(video, fps, limits, card.id)
    _check_pixels(width, height, num_frames, limits, card.id)
    return ResolvedVideo(
        num_frames=num_frames,
        fps=fps,
        format=video.format,
        codec=video.codec,
        quality=video.quality,
        last_image=video.last_image,
        sound=video.sound,
        end_prompt=video.end_prompt,
        end_seed=_end_seed(video, limits, seed),
        zoom=video.zoom,
        pan_x=video.pan_x,
        pan_y=video.pan_y,
        framewise=limits.framewise,
    )


def _check_combination(request: GenerationRequest, video: Video, limits: Videos) -> None:
    """Raises BadRequest for fields that cannot be combined with a video."""
    if request.num_images != 1:
        raise BadRequest(f"num_images is {request.num_images}; a request makes one video", param="num_images")
    if request.controls:
        raise BadRequest("videos take no control pictures; leave controls out", param="controls")
    if request.edit is not None:
        if request.edit.is_masked:
            field = mask_field(request.edit)
            raise BadRequest(f"a video cannot be inpainted; leave {field} out", param=field)
        if not limits.framewise and request.edit.strength not in (None, 1.0):
            raise BadRequest(
                "strength has no meaning here: the picture is the first frame; leave it out", param="strength"
            )
    if not limits.framewise:
        for name in FRAMEWISE_ONLY:
            if getattr(video, name) is not None:
                raise BadRequest(
                    f"{name} is for frame-wise videos of picture models; leave it out", param=name
                )


def _check_given_frames(request: GenerationRequest, video: Video, card_id: str, limits: Videos) -> None:
    """Raises BadRequest for a first or last frame that the model cannot take, or lacks. Only pictures that
    are given count: a video from text alone needs none."""
    if video.last_image is None:
        if limits.last_image == "required" and request.edit is not None:
            raise BadRequest(
                f"{card_id} makes what lies between two frames; send last_image too", param="last_image"
            )
        return
    if limits.last_image is None:
        cure = "end_prompt and end_seed say how it ends" if limits.framewise else "send image, the first one"
        raise BadRequest(
            f"{card_id} cannot end with a given frame; leave last_image out ({cure}), or use a model whose "
            "videos in GET /api/models/ have last_image",
            param="last_image",
        )
    if request.edit is None and limits.last_image != "alone":
        raise BadRequest(
            f"{card_id} takes a last frame beside a first one only; send image too", param="image"
        )


def _check_motion(video: Video, card: ModelCard) -> None:
    if video.moves and Task.i2i not in card.tasks:
        raise BadRequest(
            f"{card.id} makes no picture from another, so the view cannot move; "
            "leave zoom, pan_x and pan_y out",
            param=next(name for name in MOTION if getattr(video, name) is not None),
        )


def _check_codec(video: Video) -> None:
    codecs = CODECS[video.format]
    if video.codec not in (None, *codecs):
        raise BadRequest(
            f"{video.format} with codec {video.codec} is not supported; "
            f"{video.format} takes {' or '.join(codecs)}",
            param="codec",
        )


def _check_pixels(width: int, height: int, num_frames: int, limits: Videos, card_id: str) -> None:
    if width % 2 or height % 2:
        raise BadRequest(f"a video of {width}x{height} cannot be encoded; both must be even", param="width")
    if width * height * num_frames > limits.max_frame_pixels:
        most = (limits.max_frame_pixels // (width * height) - 1) // limits.every * limits.every + 1
        remedy = f"at most {most} frames" if most >= limits.min_frames else "a smaller size"
        raise BadRequest(
            f"{num_frames} frames of {width}x{height} are too much for {card_id}; ask for {remedy}",
            param="num_frames",
        )


def _end_seed(video: Video, limits: Videos, seed: int) -> int | None:
    if video.end_seed is not None or video.end_prompt is not None or video.moves or not limits.framewise:
        return video.end_seed
    return seed + 1 if seed < MAX_SEED else 0


def _num_frames(video: Video, fps: float, limits: Videos, card_id: str) -> int:
    if video.seconds is not None:
        return _frames_of_seconds(video, video.seconds, fps, limits, card_id)
    requested = limits.num_frames if video.num_frames is None else video.num_frames
    nearest = _nearest_num_frames(requested, limits)
    if nearest != requested:
        rule = "" if limits.every == 1 else f" and a multiple of {limits.every}, plus 1"
        raise BadRequest(
            f"num_frames is {requested}; for {card_id} it must be "
            f"{limits.min_frames}-{limits.max_frames}{rule} (nearest: {nearest})",
            param="num_frames",
        )
    return requested


def _frames_of_seconds(video: Video, seconds: float, fps: float, limits: Videos, card_id: str) -> int:
    if video.num_frames is not None:
        raise BadRequest("seconds and num_frames are both given; send one of them", param="seconds")
    longest_s = limits.max_frames / fps
    if seconds > longest_s:
        raise BadRequest(
            f"seconds is {seconds:g}; {card_id} makes at most {longest_s:.4g} at {fps:g} frames a second",
            param="seconds",
        )
    return _nearest_num_frames(seconds * fps, limits)


def _nearest_num_frames(frames: float, limits: Videos) -> int:
    """The nearest number of frames that the model can make."""
    nearest = round((frames - 1) / limits.every) * limits.every + 1
    return max(limits.min_frames, min(limits.max_frames, nearest))
