"""The shown job stays, and each page finds its own newest one, however many jobs are newer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.api.native.video_body import VideoBody
from tests.browser.fake_backend import TINY_WAN, FakeBackend

OpenPage = Callable[..., Any]
NEWER = 30  # more than the page lists
LISTED = 24


@pytest.fixture
def backend(backend: FakeBackend) -> FakeBackend:
    """One that has a video model too."""
    backend.cards = [*backend.cards, TINY_WAN]
    return backend


def _open_videos(page: Any) -> None:
    page.get_by_role("link", name="Video", exact=True).click()
    page.get_by_label("Seconds", exact=True).wait_for()


def _add_pictures(backend: FakeBackend) -> None:
    for number in range(NEWER):
        backend.add_finished(f"picture {number}", seed=number)


def test_the_video_page_opens_with_the_newest_video_behind_many_pictures(
    backend: FakeBackend, open_page: OpenPage
) -> None:
    backend.add_finished_video("a valley from above", 42, TINY_WAN)
    _add_pictures(backend)
    page = open_page(backend)
    pictures = page.locator(".frame[title^='picture']")
    pictures.nth(LISTED - 1).wait_for()
    assert pictures.count() == LISTED
    _open_videos(page)
    page.locator(".stage video").wait_for()

    page.reload()

    page.locator(".stage video").wait_for()
    page.get_by_role("button", name="Video: a valley from above").wait_for()
    assert page.locator(".frame").count() == 1  # pictures have their own history


def test_a_running_job_stays_on_the_stage_to_its_end(backend: FakeBackend, open_page: OpenPage) -> None:
    backend.hold = "decode"
    for prompt in ("another video", "a valley from above"):
        backend.submit({"model": TINY_WAN.id, "prompt": prompt}, VideoBody)
    page = open_page(backend)
    _open_videos(page)
    cancel = page.locator(".stage").get_by_role("button", name="Cancel")
    cancel.wait_for()

    _add_pictures(backend)
    with page.expect_response(re.compile(r"generate/\?limit=\d+&kind=video")):
        pass  # the list is read again

    assert cancel.is_visible()
    backend.release()
    page.locator(".stage video").wait_for()
    page.get_by_role("button", name="Video: a valley from above").wait_for()
