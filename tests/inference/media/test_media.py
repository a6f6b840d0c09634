"""Pictures in and out: files that say how they were made, and files that callers sent."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.media import decode, still
from deployments.protocol.errors import BadRequest, TooLarge
from deployments.protocol.request import OutputOptions, ResolvedEdit, ResolvedRequest

GRADIENT = Image.merge("RGB", [Image.linear_gradient("L").resize((64, 48)) for _ in range(3)])
TURNED_RIGHT = 6  # EXIF orientation: the camera was held a quarter turn askew
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def request(**changes: Any) -> ResolvedRequest:
    facts = {
        "model": "tiny",
        "prompt": "a fox, “quoted”: 狐",
        "negative_prompt": "blurry",
        "width": 64,
        "height": 48,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "seed": 41,
        "max_sequence_length": None,
    }
    return ResolvedRequest(**(facts | changes))


def file(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def reopened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def user_comment(data: bytes) -> str:
    """The text in the EXIF field where A1111 keeps its parameters."""
    raw = reopened(data).getexif().get_ifd(0x8769)[0x9286]
    return raw.removeprefix(b"UNICODE\0").decode("utf-16-be")


def halves(mode: str, left: Any, right: Any, size: tuple[int, int] = (64, 32)) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def decode_mask(data: bytes, field: str) -> Image.Image:
    return decode.mask(data, "luminance", field)


def forged_png(width: int, height: int) -> bytes:
    """A few bytes whose header claims `width` x `height` pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


# --- finished pictures ------------------------------------------------------------------------------------


def test_the_a1111_text_says_how_the_picture_was_made() -> None:
    text = still.a1111_parameters(request(), 42, "1.2")

    prompt, negative, settings = text.split("\n")
    assert prompt == "a fox, “quoted”: 狐"
    assert negative == "Negative prompt: blurry"
    assert settings == (
        "Steps: 4, Sampler: auto, CFG scale: 3.5, Seed: 42, Size: 64x48, Model: tiny, Version: weft 1.2"
    )


def test_the_a1111_text_of_an_edit_holds_its_strength_and_quotes_what_would_break_the_list() -> None:
    asked = request(model="a,b", negative_prompt="", edit=ResolvedEdit(image=b"", strength=0.6))

    text = still.a1111_parameters(asked, 1, "1")

    assert "Negative prompt" not in text
    assert 'Model: "a,b", Denoising strength: 0.6,' in text


def test_metadata_repeats_the_request_without_the_given_pictures() -> None:
    asked = request(edit=ResolvedEdit(image=b"secret", strength=0.6))

    facts = still.metadata(asked, 42, "1", 1.23456)

    assert facts["seed"] == 42
    assert facts["generation_s"] == 1.235
    assert facts["edit"] == {"strength": 0.6}
    assert "num_images" not in facts
    assert json.loads(json.dumps(facts)) == facts


def test_metadata_and_text_of_an_inpainting_say_how_its_mask_was_used() -> None:
    edit = ResolvedEdit(image=b"secret", mask_image=b"mask", strength=0.6, feather=4, only_masked=True)
    asked = request(edit=edit)

    stated = still.metadata(asked, 42, "1", 1.0)["edit"]
    text = still.a1111_parameters(asked, 42, "1")

    assert stated == {
        "strength": 0.6,
        "mask_channel": "luminance",
        "paste_back": True,
        "feather": 4,
        "only_masked": True,
        "only_masked_padding": 32,
    }
    assert "Mask blur: 4, Inpaint area: Only masked, Masked area padding: 32," in text


def test_a_png_holds_the_text_and_the_json_and_every_pixel() -> None:
    facts = {"seed": 42, "prompt": "狐"}

    data = still.encode(GRADIENT, OutputOptions(format="png"), "a fox 狐\nSteps: 4", facts)

    picture = reopened(data)
    assert picture.format == "PNG"
    assert picture.text["parameters"] == "a fox 狐\nSteps: 4"
    assert json.loads(picture.text["weft"]) == facts
    assert np.array_equal(np.asarray(picture), np.asarray(GRADIENT))


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_a_jpeg_or_webp_holds_the_text_as_user_comment(form: Any) -> None:
    data = still.encode(GRADIENT, OutputOptions(format=form, quality=90), "a fox 狐\nSteps: 4", {})

    assert reopened(data).format == form.upper()
    assert reopened(data).size == (64, 48)
    assert user_comment(data) == "a fox 狐\nSteps: 4"


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_less_quality_makes_a_smaller_file(form: Any) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")

    small, large = (still.encode(noise, OutputOptions(format=form, quality=q), "", {}) for q in (20, 95))

    assert len(small) < len(large)


@pytest.mark.parametrize(
    ("size", "expected"), [((1024, 512), (320, 160)), ((512, 1024), (160, 320)), ((64, 48), (64, 48))]
)
def test_a_thumbnail_is_a_webp_of_at_most_320_pixels_and_never_larger_than_its_picture(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    data, width, height = still.thumbnail(Image.new("RGB", size, RED))

    assert (width, height) == expected
    assert reopened(data).size == expected
    assert reopened(data).format == "WEBP"


# --- given pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_given_picture_becomes_rgb(form: str) -> None:
    image = decode.own_size(file(GRADIENT, form), "image")

    assert (image.mode, image.size) == ("RGB", GRADIENT.size)


def test_a_photo_is_rotated_by_its_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = TURNED_RIGHT
    askew = file(halves("RGB", RED, BLUE), "JPEG", exif=exif, quality=100, subsampling=0)

    upright = decode.own_size(askew, "image")

    assert upright.getpixel((16, 8)) == pytest.approx(RED, abs=4)
    assert upright.getpixel((16, 56)) == pytest.approx(BLUE, abs=4)


@pytest.mark.parametrize(
    "given",
    [
        halves("RGBA", (*RED, 255), (0, 0, 0, 0)),
        halves("LA", (54, 255), (0, 0)),
        halves("RGBA", (*RED, 255), (0, 0, 0, 0)).quantize(8),
    ],
    ids=["rgba", "grey with alpha", "palette"],
)
def test_transparent_pixels_become_white(given: Image.Image) -> None:
    image = decode.own_size(file(given, "PNG"), "image")

    assert image.getpixel((60, 16)) == WHITE
    assert image.getpixel((4, 16)) != WHITE


def test_a_transparent_colour_of_a_png_without_alpha_becomes_white() -> None:
    data = file(halves("RGB", RED, BLUE), "PNG", transparency=BLUE)

    image = decode.own_size(data, "image")

    assert image.getpixel((4, 16)) == RED
    assert image.getpixel((60, 16)) == WHITE


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    deep = Image.fromarray(np.full((32, 64), 32_768, dtype=np.uint16))

    image = decode.own_size(file(deep, "PNG"), "image")

    assert image.getpixel((4, 4)) == pytest.approx((128, 128, 128), abs=1)


# --- dangerous files ------------------------------------------------------------------------


@pytest.mark.parametrize("read", [decode.own_size, decode_mask], ids=["picture", "mask"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture at all",
        b"\x89PNG\r\n\x1a\n",
        file(GRADIENT, "GIF"),
        file(GRADIENT, "BMP"),
        file(GRADIENT, "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=["empty", "text", "signature only", "gif", "bmp", "tiff", "postscript", "svg"],
)
def test_anything_but_png_jpeg_and_webp_is_refused(read: Any, data: bytes) -> None:
    with pytest.raises(BadRequest, match="PNG, JPEG or WebP") as caught:
        read(data, "image")

    assert caught.value.param == "image"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_breaks_off_is_called_damaged(form: str) -> None:
    data = file(Image.effect_noise((256, 256), 90), form)

    with pytest.raises(BadRequest, match=r"damaged|not a readable picture"):
        decode.own_size(data[: len(data) // 2], "image")


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 801), (60_000, 60_000)], ids=str)
def test_a_header_that_claims_too_many_pixels_is_refused_before_any_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises((TooLarge, BadRequest)) as caught:
        decode.own_size(forged_png(*size), "image")

    assert caught.value.param == "image"


def test_a_small_file_that_unpacks_to_16_megapixels_and_more_is_refused() -> None:
    bomb = file(Image.new("1", (5000, 4000)), "PNG")

    with pytest.raises(TooLarge, match="at most 16 megapixels"):
        decode.own_size(bomb, "image")

    assert len(bomb) < 10_000


def test_a_text_chunk_that_unpacks_to_megabytes_is_refused() -> None:
    text = b"zTXt" + b"note\0\0" + zlib.compress(b"\0" * 80_000_000, 9)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    clean = file(GRADIENT, "PNG")
    after_header = 33  # signature 8, IHDR chunk 25

    with pytest.raises(BadRequest) as caught:
        decode.own_size(clean[:after_header] + chunk + clean[after_header:], "image")

    assert caught.value.param == "image"


def test_a_file_of_more_than_20_mib_is_refused_unread() -> None:
    with pytest.raises(TooLarge, match="20971521 bytes"):
        decode.own_size(b"\0" * (20 * 2**20 + 1), "image")


@pytest.mark.parametrize("policy", ["prefer", "strict", "off"])
@pytest.mark.parametrize(
    ("unproven", "stated"),
    [
        (frozenset(), {"exact": True}),
        ({"B.forward", "A.forward"}, {"exact": False, "merged_unproven": ["A.forward", "B.forward"]}),
    ],
    ids=["alone or in proven sizes", "merged unproven"],
)
def test_metadata_says_whether_other_requests_may_have_changed_bits(
    policy: str, unproven: Collection[str], stated: dict[str, Any]
) -> None:
    facts = still.metadata(request(exact=policy), 42, "1", 1.0, unproven)

    assert {name: facts[name] for name in ("exact", "merged_unproven") if name in facts} == stated
