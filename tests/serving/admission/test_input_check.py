"""Uploaded pictures: whole PNG, JPEG and WebP files pass, everything else is named."""

import asyncio
import threading

import pytest

from deployments.protocol.errors import BadRequest, WeftError
from deployments.protocol.request import Control, Edit, GenerationRequest
from serve_app.admission import input_check
from serve_app.admission.input_check import InputCheck
from tests.serving.api import forged


def generation_request(image: bytes, mask_image: bytes | None = None) -> GenerationRequest:
    return GenerationRequest(model="sketch", prompt="a fox", edit=Edit(image=image, mask_image=mask_image))


@pytest.mark.parametrize("picture", [forged.png(), forged.jpeg(), forged.webp()], ids=["png", "jpeg", "webp"])
async def test_a_whole_picture_passes(picture: bytes):
    await InputCheck().verify(generation_request(picture), "ann")


@pytest.mark.parametrize("name", forged.BAD)
async def test_a_forged_file_is_refused_with_the_fields_name(name: str):
    with pytest.raises(WeftError) as refusal:
        await InputCheck().verify(generation_request(forged.BAD[name]), "ann")

    assert refusal.value.kind in ("bad_request", "too_large")
    assert "image" in refusal.value.message
    assert refusal.value.param == "image"


async def test_a_mask_is_checked_too():
    with pytest.raises(BadRequest, match="mask_image is damaged"):
        await InputCheck().verify(generation_request(forged.png(), forged.BAD["png header and junk"]), "ann")


async def test_every_control_picture_is_checked_too():
    good, bad = (Control(image=data, type="canny") for data in (forged.png(), forged.png()[:100]))

    with pytest.raises(BadRequest, match=r"controls\.1\.image is damaged"):
        await InputCheck().verify(
            generation_request(forged.png()).model_copy(update={"controls": (good, bad)}), "ann"
        )


async def test_a_request_without_a_picture_has_nothing_to_verify():
    await InputCheck().verify(GenerationRequest(model="sketch", prompt="a fox"), "ann")


async def test_many_uploads_are_decoded_two_at_a_time():
    check = InputCheck()
    before = set(threading.enumerate())

    await asyncio.gather(*(check.verify(generation_request(forged.png()), "ann") for _ in range(12)))

    assert len(set(threading.enumerate()) - before) <= 2


async def test_a_picture_of_another_owner_comes_before_the_rest_of_many(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []

    class Slow:
        def decode(self, data: bytes, *_: object) -> None:
            order.append("bob" if data == forged.jpeg() else "ann")

    monkeypatch.setattr(input_check, "decoder_pool", Slow)
    check = InputCheck()

    await asyncio.gather(
        *(check.verify(generation_request(forged.png()), "ann") for _ in range(20)),
        check.verify(generation_request(forged.jpeg()), "bob"),
    )

    assert order.index("bob") <= 4
    assert order.count("ann") == 20
