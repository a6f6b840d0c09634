"""The page "Create" in a real browser: each state a person can meet."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serve_app.jobs.job import JobError, JobState
from tests.browser.fake_backend import SCHNELL, SDXL, TINY, FakeBackend

OpenPage = Callable[..., Any]
Keep = Callable[[Any, str], None]
TIMES = "\N{MULTIPLICATION SIGN}"


def _generate(page: Any, prompt: str = "a lighthouse on a basalt cliff") -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.keyboard.press("Control+Enter")


def _see(page: Any, words: str | re.Pattern[str]) -> None:
    page.get_by_text(words).first.wait_for()


def _finished(page: Any) -> Any:
    save = page.get_by_role("button", name="Save", exact=True)
    save.wait_for()
    return save


def test_a_sample_prompt_becomes_a_picture_on_first_use(
    backend: FakeBackend, open_page: OpenPage, keep_picture: Keep
) -> None:
    page = open_page(backend)
    _see(page, "What should the picture show?")
    keep_picture(page, "first-1360-light")

    page.get_by_role("button", name="a red heart on a white background").click()

    _finished(page)
    picture = page.locator(".stage img")
    assert picture.get_attribute("alt") == "a red heart on a white background"
    assert picture.evaluate("img => img.naturalWidth") == 1024
    assert page.locator(".strip li").count() == 1


def test_flux_is_noticed_before_sending_and_sent_with_four_steps(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    page = open_page(backend)
    page.get_by_label("Model").select_option(SDXL.id)
    page.get_by_label("Steps").fill("50")
    assert not page.get_by_text("requires exactly").is_visible()

    page.get_by_label("Model").select_option(SCHNELL.id)

    _see(page, "FLUX requires exactly 4 steps. Overriding 50 → 4")
    assert not page.get_by_label("Steps").is_visible()
    _generate(page)
    _finished(page)
    assert backend.received[0]["num_inference_steps"] == 4
    assert "guidance_scale" not in backend.received[0]


def test_a_correction_of_the_service_is_shown(backend: FakeBackend, open_page: OpenPage) -> None:
    asked = {"model": SCHNELL.id, "prompt": "sent by another program", "num_inference_steps": 30}
    backend.submit(asked)

    page = open_page(backend)

    _see(page, "FLUX requires exactly 4 steps. Overriding 30 -> 4")


def test_everything_in_the_form_is_sent(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    page.get_by_label("Model").select_option(SDXL.id)
    page.get_by_label("Leave out").fill("people")
    page.get_by_role("radio", name="3:2").check(force=True)
    page.get_by_label("Steps").fill("12")
    page.get_by_label("Guidance").fill("6.5")
    page.get_by_role("radio", name="2", exact=True).check(force=True)
    page.get_by_label("Seed", exact=True).fill("9223372036854775800")
    page.get_by_label("Format").select_option("webp")
    page.get_by_label("Noise scheduler").select_option("euler")

    _generate(page, "a harbour")

    _finished(page)
    assert backend.received == [
        {
            "model": "sdxl",
            "prompt": "a harbour",
            "negative_prompt": "people",
            "width": 1256,
            "height": 840,
            "num_inference_steps": 12,
            "guidance_scale": 6.5,
            "seed": 9223372036854775800,
            "num_images": 2,
            "scheduler": "euler",
            "output_format": "webp",
            "previews": 4,
        }
    ]
    _see(page, "Seed 9223372036854775800")
    page.get_by_role("button", name="picture 2 of 2").click()
    _see(page, "Seed 9223372036854775801")


def test_progress_is_live_and_escape_cancels(
    backend: FakeBackend, open_page: OpenPage, keep_picture: Keep
) -> None:
    backend.step_s, backend.steps_shown = 0.15, 40
    page = open_page(backend)

    _generate(page)

    _see(page, re.compile(r"Step \d+ of 40 · about \d s left"))
    page.locator("img.preview[src^='data:image/jpeg']").wait_for()
    assert page.locator(".below progress").evaluate("bar => bar.value") > 0
    keep_picture(page, "running-1360-light")
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Cancelled").wait_for()
    assert page.get_by_role("button", name="Cancelled: a lighthouse").count() == 1
    assert page.get_by_label("Prompt").input_value() == "a lighthouse on a basalt cliff"


def test_a_waiting_job_shows_how_many_are_ahead(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.queue_s, backend.ahead = 0.8, 3
    page = open_page(backend)

    _generate(page)

    _see(page, "3 ahead of you")
    _finished(page)


def test_a_reload_in_mid_run_picks_the_job_up(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.step_s, backend.steps_shown = 0.15, 14
    page = open_page(backend)
    _generate(page)
    _see(page, re.compile("Step [2-9] of 14"))

    page.reload()

    _see(page, re.compile(r"Step \d+ of 14"))
    _finished(page)
    assert page.get_by_label("Prompt").input_value() == "a lighthouse on a basalt cliff"
    assert len(backend.received) == 1


def test_a_broken_stream_is_taken_up_where_it_broke(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.cut_streams = 2
    page = open_page(backend)

    _generate(page)

    _finished(page)
    assert backend.resumed_from[0] == "2-0"
    assert len(backend.received) == 1


def test_a_lost_connection_is_shown_and_restored(
    backend: FakeBackend, open_page: OpenPage, keep_picture: Keep
) -> None:
    backend.step_s, backend.steps_shown = 0.2, 30
    page = open_page(backend)
    page.expected_errors = ["ERR_EMPTY_RESPONSE", "ERR_INCOMPLETE_CHUNKED", "ERR_CONNECTION"]
    _generate(page)
    _see(page, re.compile("Step [2-9] of"))

    backend.down = True
    _see(page, "Connection lost")
    keep_picture(page, "lost-1360-light")
    backend.down = False

    page.get_by_text("Connection lost").wait_for(state="hidden")
    _finished(page)


def test_save_gives_a_file_named_after_its_job(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    _generate(page)
    _finished(page)

    with page.expect_download() as download:
        page.keyboard.press("Control+s")

    (job_id,) = backend.jobs
    assert download.value.suggested_filename == f"weft-{job_id}-0.png"
    assert Path(download.value.path()).read_bytes() == backend.jobs[job_id].pictures[0]


def test_use_again_fills_the_form_from_a_picture_of_the_past(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    backend.add_finished("a valley at dusk", seed=42)
    backend.add_finished("a newer one", seed=43)
    page = open_page(backend)

    page.get_by_role("button", name="a valley at dusk").click()
    page.get_by_role("button", name="Use again").click()

    assert page.get_by_label("Prompt").input_value() == "a valley at dusk"
    assert page.get_by_label("Seed", exact=True).input_value() == "42"


def small_picture() -> str:
    """A PNG as a JSON body has it."""
    buffer = io.BytesIO()
    Image.new("RGB", (256, 256), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_use_again_says_that_a_picture_is_missing_instead_of_making_another(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    """The record of a job has no input pictures: its settings alone are another request."""
    picture = small_picture()
    backend.add_finished("a red barn", seed=42, image=picture, mask_image=picture)
    backend.add_finished("a plain one", seed=43)
    page = open_page(backend)

    page.get_by_role("button", name="a red barn").click()
    page.get_by_role("button", name="Use again").click()

    page.locator(".toast", has_text="but not the picture that it began from").wait_for()
    assert page.get_by_label("Prompt").input_value() == "a red barn"


def test_a_failed_inpainting_is_not_sent_again_without_its_picture(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    picture = small_picture()
    backend.add_finished("a red barn", seed=42, state=JobState.failed, image=picture, mask_image=picture)
    page = open_page(backend)
    sent = len(backend.received)

    page.get_by_role("button", name="Try again").click()

    page.locator(".toast", has_text="but not the picture that it began from").wait_for()
    assert len(backend.received) == sent


def test_out_of_memory_offers_a_smaller_size(
    backend: FakeBackend, open_page: OpenPage, keep_picture: Keep
) -> None:
    backend.fail = JobError("out_of_memory", "1024x1024 needs 30 GiB; the device has 24")
    page = open_page(backend)
    _generate(page)
    page.get_by_role("heading", name="This picture is too big for the machine").wait_for()
    keep_picture(page, "failed-1360-light")
    backend.fail = None

    page.get_by_role("button", name=f"Try at 512 {TIMES} 512").click()

    _finished(page)
    assert (backend.received[1]["width"], backend.received[1]["height"]) == (512, 512)
    assert page.get_by_role("button", name="Failed: a lighthouse").count() == 1


def test_a_refusal_points_at_its_field(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    page.expected_errors = ["422"]
    backend.refuse = 422, {"kind": "bad_request", "message": "seed is unlucky", "param": "seed"}, {}

    _generate(page)
    _see(page, "seed is unlucky")
    page.get_by_role("button", name="Change it").click()

    assert page.evaluate("document.activeElement.id") == "seed"
    assert page.get_by_label("Prompt").input_value() == "a lighthouse on a basalt cliff"


def test_too_many_requests_count_down_to_another_try(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    page.expected_errors = ["429"]
    backend.refuse = (
        429,
        {"kind": "rate_limited", "message": "slow down", "param": None},
        {"Retry-After": "2"},
    )

    _generate(page)
    assert page.get_by_role("button", name=re.compile("Try again in [12] s")).is_disabled()
    backend.refuse = None
    page.get_by_role("button", name="Try again", exact=True).click()

    _finished(page)


def test_a_service_that_does_not_answer_can_be_tried_again(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.down = True
    page = open_page(backend, ready=False)
    page.expected_errors = ["ERR_EMPTY_RESPONSE"]
    page.get_by_role("heading", name="The service does not answer").wait_for()
    backend.down = False

    page.get_by_role("button", name="Try again").click()

    _see(page, "What should the picture show?")


def test_a_key_is_asked_for_and_traded_for_a_session(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.key = "opensesame"
    page = open_page(backend, ready=False)
    page.expected_errors = ["401"]

    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    _see(page, "That key was not accepted.")
    page.get_by_label("Key", exact=True).fill("opensesame")
    page.keyboard.press("Enter")
    _see(page, "What should the picture show?")
    _generate(page)

    _finished(page)
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "opensesame" not in kept
    assert "weft_session" not in kept
    page.reload()
    _finished(page)  # the cookie speaks for us still
    page.get_by_role("button", name="Access key").click()
    page.get_by_role("button", name="Log out").click()
    _see(page, "This service asks for a key")


def test_a_size_off_the_grid_is_not_sent_but_corrected(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    page.get_by_label("Width").fill("1000")

    _generate(page)
    assert backend.received == []
    assert page.evaluate("document.activeElement.id") == "width"
    page.get_by_role("button", name=f"Use 1008 {TIMES} 1024").click()
    page.keyboard.press("Control+Enter")

    _finished(page)
    assert backend.received[0]["width"] == 1008


def test_an_empty_prompt_is_not_sent(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)

    page.get_by_role("button", name="Generate").click()

    _see(page, "Describe what the picture should show.")
    assert backend.received == []


def test_an_empty_list_of_models_is_explained(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.cards = []

    page = open_page(backend, ready=False)

    _see(page, "No model is set up")


def test_a_loading_model_becomes_ready_by_itself(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.states = {SCHNELL.id: "loading", SDXL.id: "loading"}
    page = open_page(backend)
    page.locator(".state", has_text="starting").wait_for()

    backend.states = {}

    page.locator(".state", has_text="ready").wait_for()


def test_a_tiny_picture_is_shown_large(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.cards = [TINY]
    page = open_page(backend)

    _generate(page)

    _finished(page)
    assert page.locator(".stage .picture").bounding_box()["width"] == pytest.approx(512, abs=2)


def test_a_prefix_in_front_of_everything_changes_nothing(open_page: OpenPage) -> None:
    backend = FakeBackend(prefix="/below/here")
    page = open_page(backend)

    _generate(page)

    _finished(page)
    assert page.locator(".stage img").evaluate("img => img.naturalWidth") == 1024
    backend.close()


def test_the_keyboard_alone_is_enough(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    _see(page, "What should the picture show?")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the picture"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "stage"
    page.keyboard.press("?")
    page.get_by_role("heading", name="Shortcuts").wait_for()
    page.keyboard.press("Escape")
    page.get_by_label("Prompt").focus()
    page.keyboard.type("what is it?")  # a question mark in a field is only text
    assert page.get_by_label("Prompt").input_value() == "what is it?"
    page.get_by_role("radio", name="1:1").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="3:2").is_checked()


def test_the_chosen_colours_outlive_a_reload(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend, color_scheme="light")
    background = "getComputedStyle(document.querySelector('.panel')).backgroundColor"
    light = page.evaluate(background)

    page.get_by_role("button", name="Colours: as the system").click()
    page.get_by_role("button", name="Colours: light").click()
    page.reload()

    page.get_by_role("button", name="Colours: dark").wait_for()
    page.locator(".panel").first.wait_for()  # the page builds it after its head
    assert page.evaluate(background) != light


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 820, 390, 320])
def test_every_width_fits_without_scrolling_sideways(
    backend: FakeBackend, open_page: OpenPage, keep_picture: Keep, width: int, scheme: str
) -> None:
    for seed in range(6):
        backend.add_finished(f"hills and a sun, number {seed}", seed)
    backend.add_finished("one that broke", 9, JobState.failed)
    page = open_page(backend, width=width, height=860 if width > 800 else 844, color_scheme=scheme)
    page.get_by_label("Model").select_option(SDXL.id)

    _generate(page)

    _finished(page)
    page.locator(".stage img").evaluate("img => img.decode()")
    keep_picture(page, f"done-{width}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".stage .picture").bounding_box()["y"] >= 0, (
        "a phone shows the picture after Generate"
    )
    page.get_by_role("button", name="Generate").wait_for()


def _picture_file(name: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def test_pictures_to_follow_and_the_refiner_are_sent_to_the_model_that_knows_them(
    backend: FakeBackend, open_page: OpenPage, keep_picture: Keep
) -> None:
    page = open_page(backend)
    section = page.get_by_role("group", name="Pictures to follow")
    refiner = page.get_by_label("Finish with the refiner")
    assert not section.is_visible()
    assert not refiner.is_visible()

    page.get_by_label("Model").select_option(SDXL.id)
    page.locator("#controls").set_input_files([_picture_file("one.png"), _picture_file("two.png")])
    rows = section.get_by_role("listitem")
    rows.nth(1).get_by_label("Follow its").select_option("depth")
    rows.nth(1).get_by_label("Weight").fill("0.5")
    refiner.check()
    keep_picture(page, "controls-1360-light")
    _generate(page)
    _finished(page)

    sent = backend.received[0]
    assert [(control["type"], control["weight"]) for control in sent["controls"]] == [
        ("canny", 1),
        ("depth", 0.5),
    ]
    assert ["is_map" in control for control in sent["controls"]] == [False, True]
    assert all(control["image"].startswith("data:image/png;base64,") for control in sent["controls"])
    assert (sent["refiner"], sent["previews"]) == (True, 4)


def test_styles_are_picked_weighed_and_uploaded(
    backend: FakeBackend, open_page: OpenPage, keep_picture: Keep
) -> None:
    page = open_page(backend)
    section = page.get_by_role("group", name="Styles (LoRA)")
    page.get_by_label("Model").select_option(SDXL.id)
    page.get_by_label("Prompt").fill("a fox")

    assert section.get_by_label("Add a style").get_by_role("option").all_inner_texts() == [
        "Add a style",
        "ink",
    ]
    section.get_by_label("Add a style").select_option(label="ink")
    section.get_by_label("ink", exact=True).fill("-0.5")
    section.get_by_role("button", name="Put “inky” into the prompt").click()
    file = {"name": "a.safetensors", "mimeType": "application/octet-stream", "buffer": b"x"}
    page.locator("#lora-file").set_input_files([file])
    section.get_by_role("listitem").nth(1).wait_for()
    keep_picture(page, "loras-1360-light")
    page.get_by_role("button", name="Generate").click()
    _finished(page)

    sent = backend.received[0]
    ink, uploaded = backend.loras[0], backend.loras[-1]
    assert sent["prompt"] == "a fox, inky"
    assert sent["loras"] == [{"id": ink.sha256, "weight": -0.5}, {"id": uploaded.sha256, "weight": 1}]


def test_a_style_can_be_taken_out_again(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    section = page.get_by_role("group", name="Styles (LoRA)")
    page.get_by_label("Model").select_option(SDXL.id)
    section.get_by_label("Add a style").select_option(label="ink")

    section.get_by_role("button", name="Remove ink").click()

    assert section.get_by_role("listitem").count() == 0
    _generate(page)
    _finished(page)
    assert "loras" not in backend.received[0]


def test_a_picture_to_follow_can_be_dropped_in_and_taken_out(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    page = open_page(backend)
    page.get_by_label("Model").select_option(SDXL.id)
    section = page.get_by_role("group", name="Pictures to follow")
    dropped = page.evaluate_handle(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["not a picture"], "notes.txt", { type: "text/plain" }));
            return data;
        }"""
    )

    page.locator("label.drop").dispatch_event("drop", {"dataTransfer": dropped})
    _see(page, "Choose a PNG, JPEG or WebP picture.")
    page.locator("#controls").set_input_files([_picture_file(f"{n}.png") for n in range(4)])
    section.get_by_role("listitem").nth(3).wait_for()
    assert not page.locator("label.drop").is_visible()
    section.get_by_role("button", name="Remove this picture").first.click()

    assert section.get_by_role("listitem").count() == 3
    assert page.locator("label.drop").is_visible()
    _generate(page)
    _finished(page)
    assert len(backend.received[0]["controls"]) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(backend: FakeBackend, open_page: OpenPage, scheme: str) -> None:
    """With WEFT_AXE naming an axe.min.js (npm package axe-core, a development tool)."""
    axe = os.environ.get("WEFT_AXE")
    if not axe:
        pytest.skip("WEFT_AXE does not name an axe.min.js")
    script = Path(axe).read_text(encoding="utf-8")
    check = "async () => (await axe.run()).violations.map(v => `${v.id}: ${v.nodes.map(n => n.html)}`)"
    page = open_page(backend, color_scheme=scheme)
    _see(page, "What should the picture show?")
    found = {"first": _axe(page, script, check)}

    backend.fail = JobError("internal", "the engine died")
    _generate(page)
    _see(page, "the engine died")
    found["failed"] = _axe(page, script, check)
    backend.fail = None
    page.get_by_label("Model").select_option(SDXL.id)
    page.get_by_role("radio", name="4", exact=True).check(force=True)
    page.keyboard.press("Control+Enter")
    _finished(page)
    found["done"] = _axe(page, script, check)
    backend.step_s = 1
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Cancel").wait_for()
    found["running"] = _axe(page, script, check)
    page.keyboard.press("?")

    assert found == {"first": [], "failed": [], "done": [], "running": []}


def _axe(page: Any, script: str, check: str) -> list[str]:
    page.evaluate(script)  # by the debugger, which the page's policy does not bind
    found: list[str] = page.evaluate(check)
    return found
