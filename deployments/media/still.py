"""Finished pictures as PNG, JPEG or WebP files that contain their generation settings."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deployments.media.metadata_text import as_json, prompt_lines
from deployments.protocol.request import OutputOptions, ResolvedEdit, ResolvedRequest
from deployments.protocol.visible_text import visible

THUMBNAIL_SIDE = 320  # pixels
PREVIEW_SIDE = 256
_USER_COMMENT = 0x9286  # EXIF tags
_EXIF_IFD = 0x8769


def encode(
    image: Image.Image, output: OutputOptions, parameters: str, metadata: Mapping[str, object]
) -> bytes:
    """The file's bytes. PNG files contain the text chunks `parameters` (A1111's form) and `weft` (JSON); JPEG
    and WebP files contain the A1111 text as EXIF UserComment, as A1111 does.
    """
    buffer = io.BytesIO()
    if output.format == "png":
        info = PngInfo()
        info.add_itxt("parameters", parameters)
        info.add_itxt("weft", as_json(metadata))
        # level 6 takes 5 times as long and saves 8 % of the bytes of a 1024 px picture
        image.save(buffer, "PNG", pnginfo=info, compress_level=1)
    else:
        exif = Image.Exif()
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
        image.save(buffer, output.format.upper(), quality=output.quality, exif=exif.tobytes())
    return buffer.getvalue()


def preview(rough: Image.Image, width: int, height: int) -> bytes:
    """A preview, such as one pixel per latent, as a small WebP file with the shape of the picture."""
    scale = min(1.0, PREVIEW_SIDE / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    rough.resize(size, Image.Resampling.BICUBIC).save(buffer, "WEBP", quality=70)
    return buffer.getvalue()


def thumbnail(image: Image.Image) -> tuple[bytes, int, int]:
    """A WebP file of at most 320 px per side, its width and its height."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue(), small.width, small.height


def a1111_parameters(request: ResolvedRequest, seed: int, version: str) -> str:
    """The generation settings in the text form of A1111, which other programs read too."""
    settings: dict[str, object] = {
        "Steps": request.num_inference_steps,
        "Sampler": request.scheduler,
        "CFG scale": request.guidance_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model": request.model,
    }
    if request.video is not None:
        settings |= {"Frames": request.video.num_frames, "FPS": request.video.fps}
        if request.video.last_image is not None:
            settings["Last frame"] = hashlib.sha256(request.video.last_image).hexdigest()[:12]
    elif request.edit is not None:
        settings["Denoising strength"] = request.edit.strength
        settings |= _mask_settings(request.edit)
    for index, picture in enumerate(request.references):
        settings[f"Reference {index}"] = hashlib.sha256(picture).hexdigest()[:12]
    for index, control in enumerate(request.controls):
        settings[f"ControlNet {index}"] = (
            f"Module: {control.type}, Weight: {control.weight:g}, "
            f"Guidance Start: {control.start:g}, Guidance End: {control.end:g}"
        )
    if request.loras:
        used = ", ".join(f"{_plain(lora.name) or lora.id[:12]}: {lora.id[:12]}" for lora in request.loras)
        settings["Lora hashes"] = used
    if request.refiner is not None:
        settings["Refiner switch at"] = request.refiner
    settings["Version"] = f"weft {version}"
    lines = [prompt_lines(request.prompt)]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {prompt_lines(request.negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def _mask_settings(edit: ResolvedEdit) -> dict[str, object]:
    """How the mask was used, by A1111's names."""
    if not edit.is_masked or not edit.paste_back:
        return {}
    if not edit.only_masked:
        return {"Mask blur": edit.feather}
    return {
        "Mask blur": edit.feather,
        "Inpaint area": "Only masked",
        "Masked area padding": edit.only_masked_padding,
    }


def _plain(name: str) -> str:
    """A name that cannot end its entry in a list of `name: hash`."""
    return re.sub(r'[,:"\s]+', " ", name).strip()


def _quoted(value: object) -> str:
    text = visible(str(value))
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def metadata(
    request: ResolvedRequest,
    seed: int,
    version: str,
    generation_s: float,
    unproven: Collection[str] = (),
    planned: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The settings needed to generate the same picture again, as JSON, and whether its bits are those of
    the request alone (`exact`).

    unproven: modules whose forwards were shared in batch sizes that are not proven to be exact.
    planned: what the plan for the device changes in pictures, such as `quantised` weights.
    """
    edit = request.edit
    bulky: dict[str, Any] = {
        "edit": None if edit is None else set(ResolvedEdit.model_fields) - edit.settings.keys(),
        "references": True,
        "video": {"last_image"},
        "controls": {"__all__": {"image"}},
        "loras": {"__all__": {"file"}},
        "num_images": True,
        "exact": True,
    }
    facts = request.model_dump(mode="json", exclude=bulky)
    if request.references:  # by content: SHA-256 of each file
        facts["references"] = [hashlib.sha256(picture).hexdigest() for picture in request.references]
    if request.video is not None and request.video.last_image is not None:
        facts["video"]["last_image"] = hashlib.sha256(request.video.last_image).hexdigest()
    exactness: dict[str, object] = {"exact": not unproven}
    if unproven:
        exactness["merged_unproven"] = sorted(unproven)
    exactness |= planned or {}
    return facts | exactness | {"seed": seed, "generation_s": round(generation_s, 3), "version": version}
