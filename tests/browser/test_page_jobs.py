"""Every click becomes a job, in the order of the clicks; and what ends does not take the stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.browser.fake_backend import TINY_WAN, FakeBackend

OpenPage = Callable[..., Any]
PROMPTS = ["a fig", "a plum", "a pear", "a quince", "a medlar"]


def _generate(page: Any, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")


def _frame(page: Any, words: str) -> Any:
    return page.locator(".strip").get_by_role("button", name=words, exact=True)


def test_five_clicks_while_the_service_is_slow_are_five_jobs_in_order(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    page = open_page(backend)
    backend.answers.clear()

    for prompt in PROMPTS:
        _generate(page, prompt)

    for prompt in PROMPTS:
        _frame(page, f"Sending: {prompt}").wait_for()
    assert [sent["prompt"] for sent in backend.received] in ([], PROMPTS[:1])
    assert page.locator("#generate").is_enabled()
    backend.answers.set()
    page.locator(".strip .frame[data-status='completed']").nth(4).wait_for()
    assert [sent["prompt"] for sent in backend.received] == PROMPTS
    page.locator(f".stage img[alt='{PROMPTS[-1]}']").wait_for()
    titles = page.locator(".strip .frame").evaluate_all("frames => frames.map(frame => frame.title)")
    assert [title.removeprefix("New: ") for title in titles] == PROMPTS[::-1]


def test_a_key_held_down_is_one_job(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    page.get_by_label("Prompt", exact=True).fill("a fig")

    page.keyboard.down("Control")
    for _ in range(3):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    page.keyboard.up("Control")

    page.locator(".stage img[alt='a fig']").wait_for()
    assert len(backend.received) == 1


def test_requests_on_their_way_survive_a_change_of_page(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.cards = [*backend.cards, TINY_WAN]
    page = open_page(backend)
    backend.answers.clear()
    _generate(page, PROMPTS[0])
    _generate(page, PROMPTS[1])

    page.get_by_role("link", name="Video", exact=True).click()
    page.get_by_label("Seconds", exact=True).wait_for()
    backend.answers.set()

    page.get_by_role("link", name="Create 2 new").click()
    page.locator(f".stage img[alt='{PROMPTS[1]}']").wait_for()
    _frame(page, f"New: {PROMPTS[0]}").click()
    page.locator(f".stage img[alt='{PROMPTS[0]}']").wait_for()
    page.get_by_role("link", name="Create", exact=True).wait_for()  # nothing is new any more


def test_a_refused_request_stays_with_its_cure(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    page.expected_errors = ["422"]
    backend.refuse = 422, {"kind": "bad_request", "message": "seed is unlucky", "param": "seed"}, {}
    page.get_by_label("Seed", exact=True).fill("13")
    _generate(page, "a fig")
    refused = _frame(page, "Not accepted: a fig")
    refused.wait_for()
    backend.refuse = None
    page.get_by_label("Seed", exact=True).fill("")
    _generate(page, "a plum")
    page.locator(".stage img[alt='a plum']").wait_for()

    refused.click()
    page.get_by_role("button", name="Change it").click()
    assert page.get_by_label("Prompt", exact=True).input_value() == "a fig"
    assert page.get_by_label("Seed", exact=True).input_value() == "13"
    page.get_by_label("Seed", exact=True).fill("14")
    page.keyboard.press("Control+Enter")

    page.locator(".stage img[alt='a fig']").wait_for()
    assert refused.count() == 0
    assert [(sent["prompt"], sent.get("seed")) for sent in backend.received] == [
        ("a fig", 13),
        ("a plum", None),
        ("a fig", 14),
    ]


def test_a_refused_request_is_removed_when_asked(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    page.expected_errors = ["403"]
    backend.refuse = 403, {"kind": "forbidden", "message": "not for you", "param": None}, {}
    _generate(page, "a fig")

    page.locator(".stage").get_by_text("a fig", exact=True).wait_for()
    page.get_by_role("button", name="Remove", exact=True).click()

    page.get_by_text("What should the picture show?").wait_for()
    assert page.locator(".strip .frame").count() == 0
    assert page.evaluate("document.activeElement.id") == "stage"


def test_a_finished_job_does_not_take_the_stage(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.add_finished("an old oak", seed=1)
    backend.step_s = 0.5
    page = open_page(backend)
    _generate(page, "a fig")
    page.get_by_role("button", name="Cancel").wait_for()
    _frame(page, "an old oak").click()

    _frame(page, "New: a fig").wait_for()

    assert page.locator(".stage img").get_attribute("alt") == "an old oak"
    _frame(page, "New: a fig").click()
    page.locator(".stage img[alt='a fig']").wait_for()
    _frame(page, "a fig").wait_for()
