"""The page "Video" in a real browser: its fields, the parts of the work, the player, and the strip."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser.fake_backend import FRAMEWISE, TINY_WAN, FakeBackend

OpenPage = Callable[..., Any]
Keep = Callable[[Any, str], None]
PROMPT = "a red circle moving left"


@pytest.fixture
def backend(backend: FakeBackend) -> FakeBackend:
    """One that has video models too."""
    backend.cards = [*backend.cards, TINY_WAN, FRAMEWISE]
    return backend


def _open(page: Any) -> Any:
    page.get_by_role("link", name="Video", exact=True).click()
    page.get_by_label("Seconds", exact=True).wait_for()
    page.locator("#generate:enabled").wait_for()
    return page


def _generate(page: Any, prompt: str = PROMPT) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")


def _see(page: Any, words: str | re.Pattern[str]) -> None:
    page.get_by_text(words).first.wait_for()


def _finished(page: Any) -> None:
    page.get_by_role("button", name="Save", exact=True).wait_for()


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), "green").save(buffer, "PNG")
    return buffer.getvalue()


def test_only_models_that_make_videos_are_offered(backend: FakeBackend, open_page: OpenPage) -> None:
    page = _open(open_page(backend))

    offered = page.get_by_label("Model", exact=True).locator("option").all_text_contents()

    assert offered == ["Tiny Wan", "Frame by frame"]
    _see(page, "What should the video show?")
    assert not page.get_by_text("Pictures to follow").is_visible()
    assert not page.locator("#start-picture").is_visible()


def test_seconds_and_frames_agree_and_everything_is_sent(backend: FakeBackend, open_page: OpenPage) -> None:
    page = _open(open_page(backend))
    page.get_by_label("Seconds", exact=True).fill("4")
    page.get_by_label("Seconds", exact=True).press("Tab")
    assert page.get_by_label("Frames", exact=True).input_value() == "33"
    assert page.get_by_label("Seconds", exact=True).input_value() == "4.13"
    page.get_by_label("Frames a second").fill("12")
    page.get_by_label("Leave out").fill("text")
    page.get_by_label("Steps", exact=True).fill("6")
    page.get_by_label("Seed", exact=True).fill("9223372036854775800")
    page.get_by_label("Format").select_option("webm")

    _generate(page)

    _finished(page)
    assert backend.received == [
        {
            "model": "tiny-wan",
            "prompt": PROMPT,
            "negative_prompt": "text",
            "width": 64,
            "height": 64,
            "num_inference_steps": 6,
            "guidance_scale": 3,
            "seed": 9223372036854775800,
            "output_format": "webm",
            "num_frames": 33,
            "fps": 12,
        }
    ]
    _see(page, "33 frames, 2.75 s at 12 a second")


def test_each_stage_of_the_work_is_shown_and_the_video_plays(
    backend: FakeBackend, open_page: OpenPage, keep_picture: Keep
) -> None:
    backend.hold = "decode"
    page = _open(open_page(backend))

    _generate(page)

    _see(page, "Decoding frame 8 of 17")
    keep_picture(page, "video-decode-1360-light")
    assert page.get_by_role("progressbar", name="Denoise").evaluate("bar => bar.value") == 1
    backend.release("encode")
    _see(page, "Encoding frame 8 of 17")
    backend.release()
    _finished(page)
    player = page.locator(".stage video")
    assert player.get_attribute("aria-label") == PROMPT
    assert player.get_attribute("poster").endswith("/0/poster")
    page.wait_for_function("() => document.querySelector('.stage video').videoWidth === 64")
    keep_picture(page, "video-done-1360-light")


def test_save_gives_the_file_itself(backend: FakeBackend, open_page: OpenPage) -> None:
    page = _open(open_page(backend))
    _generate(page)
    _finished(page)

    with page.expect_download() as download:
        page.keyboard.press("Control+s")

    (job_id,) = backend.jobs
    assert download.value.suggested_filename == f"weft-{job_id}-0.mp4"
    assert Path(download.value.path()).read_bytes() == backend.jobs[job_id].pictures[0]


def test_escape_cancels_while_frames_are_decoded(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.hold = "decode"
    page = _open(open_page(backend))
    _generate(page)
    _see(page, "Decoding frame")

    page.keyboard.press("Escape")

    page.get_by_role("heading", name="Cancelled").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT


def test_a_frame_wise_video_begins_with_a_dropped_picture_and_has_an_end(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    page = _open(open_page(backend))
    page.get_by_label("Model", exact=True).select_option(FRAMEWISE.id)
    dropped = page.evaluate_handle(
        """(text) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "start.png", { type: "image/png" }));
            return data;
        }""",
        base64.b64encode(_png()).decode(),
    )
    page.locator("label.drop[for=start-picture]").dispatch_event("drop", {"dataTransfer": dropped})
    page.get_by_alt_text("Picture the video begins with").wait_for()
    page.get_by_label("At the end", exact=True).fill("a blue circle")
    page.get_by_label("Seed at the end").fill("9")

    _generate(page)

    _finished(page)
    (sent,) = backend.received
    assert base64.b64decode(sent["image"].removeprefix("data:image/png;base64,")) == _png()
    assert (sent["strength"], sent["end_prompt"], sent["end_seed"]) == (0.75, "a blue circle", 9)
    assert sent["num_frames"] == 16


def test_a_larger_video_offers_fewer_frames(backend: FakeBackend, open_page: OpenPage) -> None:
    page = _open(open_page(backend))
    frames = page.get_by_label("Frames", exact=True)
    assert frames.get_attribute("max") == "129"

    page.get_by_label("Width").fill("128")
    page.get_by_label("Height").fill("128")

    assert frames.get_attribute("max") == "29"


def test_the_strip_holds_videos_of_the_past_and_use_again_fills_the_form(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    for prompt, seed in (("a valley from above", 42), ("a newer valley", 43)):
        backend.add_finished_video(prompt, seed, TINY_WAN)
    page = _open(open_page(backend))

    page.get_by_role("button", name="Video: a valley from above").click()
    page.get_by_role("button", name="Use again").click()

    assert page.get_by_label("Prompt", exact=True).input_value() == "a valley from above"
    assert page.get_by_label("Seed", exact=True).input_value() == "42"
    assert page.get_by_label("Model", exact=True).input_value() == TINY_WAN.id


def test_a_key_that_stays_in_the_tab_plays_videos_too(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    page.evaluate("() => sessionStorage.setItem('weft.key', 'a key')")
    page.reload()
    _open(page)

    _generate(page)

    _finished(page)
    page.wait_for_function("() => document.querySelector('.stage video').src.startsWith('blob:')")
    page.wait_for_function("() => document.querySelector('.stage video').videoWidth === 64")
