"""Which addresses reach only this machine, in usual and in odd spellings."""

from __future__ import annotations

import pytest

from serve_app.admission.loopback import is_loopback


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "127.0.0.1",
        "127.0.0.2",
        "127.255.255.254",
        "::1",
        "0:0:0:0:0:0:0:1",
        "0000:0000:0000:0000:0000:0000:0000:0001",
        "::0.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
    ],
)
def test_every_spelling_of_loopback_is_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "0.0.0.0",
        "::",
        "127.999.1.1",
        "127.0.0.1.example.org",
        "127.0.0.1 ",
        "127.1",
        "0127.0.0.1",
        "0x7f000001",
        "2130706433",
        "128.0.0.1",
        "10.0.0.1",
        "::2",
        "::ffff:10.0.0.1",
        "[::1]",
        "localhost.example.org",
        "localhost.",
        "127.0.0.1:8000",
    ],
)
def test_what_is_no_loopback_address_needs_a_key(host: str) -> None:
    assert not is_loopback(host)
