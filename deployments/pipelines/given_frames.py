"""The first and the last frame that a video is to have, as diffusers' pipelines take them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import diffusers
from PIL import Image

from deployments.pipelines.arguments import parameters_of
from deployments.protocol.card import LastImage
from deployments.protocol.errors import ModelFailed

LAST_LATENT = -1  # LTX-2 counts latents, the first LTX frames
CURE = "take last_image out of the card's videos"


def i2v_class(found: type, last_image: LastImage | None) -> type:
    """The pipeline of diffusers for i2v with the components of `found`, which makes videos from an image.

    last_image: of the card. For LTX's pipeline from an image it is that with conditions, which takes frames
    at any place. Raises ModelFailed where no pipeline takes a last frame.
    """
    if last_image is None or _takes_last(found):
        return found
    sibling = getattr(diffusers, found.__name__.replace("ImageToVideo", "Condition"), None)
    if isinstance(sibling, type) and _takes_last(sibling):
        return sibling
    raise ModelFailed(f"{found.__name__} takes no last frame; {CURE}")


def check_last_image(pipeline: Any, last_image: LastImage | None) -> None:
    """Raises ModelFailed for a pipeline that fails on frames which the card allows, or leaves them out."""
    name = type(pipeline).__name__
    if last_image == "alone" and "conditions" not in _parameters(pipeline):
        raise ModelFailed(
            f"{name} takes a last frame beside a first one only; write last_image: optional in the card's "
            "videos"
        )
    if last_image is not None and pipeline.config.get("expand_timesteps"):  # Wan 2.2 TI2V
        raise ModelFailed(f"{name} leaves the last frame out with these weights; {CURE}")
    if last_image is not None and _shifts_by_length(pipeline):
        raise ModelFailed(
            f"{name} works with the noise scheduler of LTX-Video 0.9.5 and later, not with that of these "
            f"weights; {CURE}"
        )
    needs_both = _embeds_two_pictures(pipeline)
    if needs_both is True and last_image != "required":
        raise ModelFailed(
            f"the transformer of {name} takes a first and a last frame at once; write last_image: required "
            "in the card's videos"
        )
    if needs_both is False and last_image is not None:
        raise ModelFailed(f"the transformer of {name} takes one frame; {CURE}")


def frame_arguments(
    pipeline_class: type, first: Image.Image | None, last: Image.Image | None, num_frames: int
) -> dict[str, Any]:
    """Arguments for the pipeline's call. first, last: RGB, of the video's size; None where not given."""
    known = parameters_of(pipeline_class)
    if "conditions" not in known:
        return {} if last is None else {"last_image": last}
    if "frame_index" in known:  # LTX
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition  # loads other models

        if last is None:  # `image` alone is the first frame
            return {}
        given = [] if first is None else [LTXVideoCondition(image=first, frame_index=0)]
        last_one = LTXVideoCondition(image=last, frame_index=num_frames - 1)
        return {"conditions": [*given, last_one], "image": None}
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition  # loads other models

    frames = [(first, 0), (last, LAST_LATENT)]
    conditions = [LTX2VideoCondition(frames=[f], index=index) for f, index in frames if f is not None]
    return {"conditions": conditions or None}


def keep_size(pipeline: Any, width: int, height: int) -> None:
    """Have this request's pipeline make frames of this size where it would choose one of its own by the
    aspect ratio of the picture, as HunyuanVideo 1.5 does. The picture has the size already."""
    processor = getattr(pipeline, "video_processor", None)
    if "width" in _parameters(pipeline) or not hasattr(processor, "calculate_default_height_width"):
        return
    own = copy.copy(processor)
    vars(own)["calculate_default_height_width"] = partial(_size, width, height)
    vars(pipeline)["video_processor"] = own


def _size(chosen_width: int, chosen_height: int, **_of_picture: object) -> tuple[int, int]:
    return chosen_height, chosen_width


def _parameters(pipeline: Any) -> frozenset[str]:
    pipeline_class: type = type(pipeline)
    return parameters_of(pipeline_class)


def _takes_last(pipeline_class: type) -> bool:
    return bool({"last_image", "conditions"} & parameters_of(pipeline_class))


def _shifts_by_length(pipeline: Any) -> bool:
    """Whether its noise scheduler needs a shift by the video's length, which LTX's pipeline with conditions
    does not give it."""
    is_ltx = type(pipeline).__name__ == "LTXConditionPipeline"
    return is_ltx and bool(pipeline.scheduler.config.get("use_dynamic_shifting"))


def _embeds_two_pictures(pipeline: Any) -> bool | None:
    """Whether Wan's transformer has places for the embeddings of two pictures; None: it takes none."""
    transformer = getattr(pipeline, "transformer", None)
    config = {} if transformer is None else transformer.config
    if config.get("image_dim") is None or "image_embeds" not in _parameters(pipeline):
        return None
    return config.get("pos_embed_seq_len") is not None
