"""What a field that a body does not have was meant to be: by its meaning, then by its spelling."""

from collections.abc import Mapping
from difflib import get_close_matches

from pydantic import BaseModel

from serve_app.api.schemas.body import field_names

# by field, what other tools call it, in lower case
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "guidance_scale": ("cfg", "cfg_value", "guidance", "guidance_strength", "true_cfg_scale", "cfg_scale"),
    "num_inference_steps": (
        "num_steps",
        "inference_steps",
        "sampling_steps",
        "sample_steps",
        "ddim_steps",
        "iterations",
    ),
    "num_images": (
        "n_iter",
        "num_outputs_per_prompt",
        "samples",
        "num_samples",
        "count",
        "batch_count",
    ),
    "negative_prompt": ("negative", "negativeprompt", "neg_prompt", "negative_text"),
    "prompt": ("text", "input", "positive_prompt", "description", "text_prompt"),
    "seed": ("random_seed", "noise_seed", "generator"),
    "width and height": ("size", "resolution", "image_size", "aspect_ratio", "dimensions"),
    "width": ("w",),
    "height": ("h",),
    "image": (
        "init_images",
        "input_image",
        "source_image",
        "start_image",
        "first_frame",
        "image_url",
        "img",
        "input_reference",
    ),
    "reference_images": ("reference_image", "input_images", "ref_images", "images", "image[]"),
    "mask_image": ("inpaint_mask", "mask_url", "edit_mask"),
    "strength": ("denoise", "denoising", "noise_strength", "img2img_strength", "image_guidance"),
    "scheduler": ("sampling_method", "sampler_index", "noise_scheduler", "solver"),
    "output_format": ("format", "file_format", "image_format", "response_format", "mime_type"),
    "output_quality": ("quality", "jpeg_quality", "compression", "output_compression"),
    "output_codec": ("codec", "video_codec"),
    "max_sequence_length": ("max_tokens", "max_length", "sequence_length"),
    "model": ("checkpoint", "sd_model_checkpoint", "model_name", "base_model", "ckpt_name"),
    "control_image": ("controlnet_image", "conditioning_image", "control_net_image"),
    "control_type": ("controlnet_type", "module", "control_mode"),
    "control_weight": ("controlnet_conditioning_scale", "conditioning_scale", "control_scale"),
    "control_start": ("control_guidance_start", "guidance_start"),
    "control_end": ("control_guidance_end", "guidance_end"),
    "loras": ("adapters", "lora_weights", "lora_scales", "lora_name"),
    "lora_weight": ("lora_scale", "lora_strength"),
    "weight": ("strength", "multiplier", "alpha"),
    "previews": ("partial_images", "preview_count", "num_previews"),
    "webhook_url": ("webhook", "callback", "callback_url", "notify_url"),
    "num_frames": ("frames", "length", "video_length", "frame_count", "num_of_frames"),
    "seconds": ("length_s", "video_seconds"),
    "fps": ("framerate", "frames_per_second"),
    "priority": ("urgency",),
    "expires_in_s": ("expires", "expires_in", "ttl", "ttl_s"),
    "images_per_day": ("quota", "daily_limit", "limit"),
    "trigger_words": ("trigger", "trigger_word", "keywords"),
}
# names whose meaning is the opposite or another one
NOTES: Mapping[str, str] = {
    "image_strength": "use strength, which counts the other way: 1 replaces the image, 0 keeps it",
    "clip_skip": "no model here takes it; leave it out",
    "eta": "no model here takes it; leave it out",
    "subseed": "no model here takes it; leave it out",
    "num_images_per_prompt": "use num_images",
}


OF_THE_OTHER_BODY: Mapping[str, tuple[str, ...]] = {
    "/api/generate/video": (
        "num_frames",
        "seconds",
        "duration",
        "fps",
        "frame_rate",
        "output_codec",
        "end_prompt",
        "end_seed",
        "zoom",
        "pan_x",
        "pan_y",
    ),
    "/api/generate/image": (
        "num_images",
        "n",
        "batch_size",
        "mask_image",
        "mask",
        "controls",
        "control_image",
        "control_type",
        "refine",
        "refiner",
        "reference_images",
        "references",
        "priority",
    ),
}


def suggestion(name: str, schema: type[BaseModel]) -> str:
    """What to send instead of a field that the schema does not have, as the end of a sentence."""
    wanted = name.lower().replace("-", "_").replace(" ", "_")
    fields = {known: field for field, names in field_names(schema).items() for known in names}
    meant = next((field for field, others in OTHER_NAMES.items() if wanted in others), None)
    if meant is not None and all(part in fields for part in meant.split(" and ")):
        return f"use {meant}"
    if wanted in NOTES:
        return NOTES[wanted]
    for path, names in OF_THE_OTHER_BODY.items():
        if wanted in names and "prompt" in fields:
            return f"it is one of POST {path}"
    near = get_close_matches(wanted, sorted(fields), n=1)
    return f"did you mean {near[0]}?" if near else f"there is {', '.join(sorted(set(fields.values())))}"
