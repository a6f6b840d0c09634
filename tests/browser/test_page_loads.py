"""What loading the page costs: a browser that knows this version asks for the document only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.browser.fake_backend import FakeBackend

OpenPage = Callable[..., Any]


def test_a_second_load_asks_for_the_document_only(backend: FakeBackend, open_page: OpenPage) -> None:
    page = open_page(backend)
    first = len(backend.page_requests)
    backend.page_requests.clear()

    again = page.context.new_page()
    again.goto(backend.url)
    again.locator("#generate:enabled").wait_for()

    assert first > 40
    assert set(backend.page_requests) <= {"index.html", "manifest.webmanifest"}
    assert len(backend.page_requests) <= 2


def test_a_first_load_asks_for_every_file_once(backend: FakeBackend, open_page: OpenPage) -> None:
    open_page(backend)

    assert sorted(backend.page_requests) == sorted(set(backend.page_requests))
