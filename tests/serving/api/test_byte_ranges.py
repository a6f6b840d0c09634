"""Byte ranges: what a player may ask, and what it gets."""

from __future__ import annotations

import pytest

from serve_app.api.byte_ranges import ByteRange, RangeNotSatisfiable, requested_range

TAG = '"abc"'


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-1", 0, 1),
        ("bytes=90-", 90, 99),
        ("bytes=-10", 90, 99),
        ("bytes=-1000", 0, 99),
        ("bytes=50-1000", 50, 99),
        (" bytes=0-0 ", 0, 0),
    ],
)
def test_a_part_is_cut_out(header: str, start: int, end: int) -> None:
    assert requested_range(header, 100, TAG) == ByteRange(start, end, 100)


@pytest.mark.parametrize("header", [None, "bytes=0-1,5-6", "items=0-1", "bytes=-", "bytes=7-3", "bytes=a-b"])
def test_what_is_no_single_range_gets_the_whole_file(header: str | None) -> None:
    assert requested_range(header, 100, TAG) is None


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=1000-2000", "bytes=-0"])
def test_what_lies_outside_is_refused(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        requested_range(header, 100, TAG)


def test_a_part_of_another_version_is_the_whole_file() -> None:
    assert requested_range("bytes=0-1", 100, TAG, if_range='"old"') is None
    assert requested_range("bytes=0-1", 100, TAG, if_range=TAG) is not None


def test_the_header_that_comes_with_a_part() -> None:
    assert ByteRange(5, 9, 100).content_range == "bytes 5-9/100"
