"""Only a trusted proxy says who called, and no caller can add to what it says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.admission.forwarded import Origin, TrustedProxies, limit_name

PROXIES = TrustedProxies(["10.0.0.0/8", "192.168.1.7", "2001:db8:1::/48", "::1"])
PROXY = "10.1.2.3"


def origin(headers: Mapping[str, str | list[str]], peer: str = PROXY) -> Origin:
    def values(name: str) -> list[str]:
        found = headers.get(name, [])
        return [found] if isinstance(found, str) else found

    return PROXIES.origin(peer, values)


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ({}, PROXY),
        ({"x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
        ({"x-forwarded-for": "203.0.113.9:4711"}, "203.0.113.9"),
        ({"x-forwarded-for": "6.6.6.6, 203.0.113.9"}, "203.0.113.9"),  # the left one is a claim
        ({"x-forwarded-for": "6.6.6.6, 203.0.113.9, 10.9.9.9, 192.168.1.7"}, "203.0.113.9"),
        ({"x-forwarded-for": ["6.6.6.6", "203.0.113.9, 10.9.9.9"]}, "203.0.113.9"),  # a header sent twice
        ({"x-forwarded-for": "10.7.7.7, 10.9.9.9"}, "10.7.7.7"),  # a caller within our own network
        ({"x-forwarded-for": "2001:db8:ffff::1"}, "2001:db8:ffff::1"),
        ({"x-forwarded-for": "[2001:db8:ffff::1]:4711"}, "2001:db8:ffff::1"),
        ({"x-forwarded-for": "::ffff:203.0.113.9"}, "203.0.113.9"),
        ({"x-forwarded-for": "2001:db8:ffff::1, 2001:db8:1::5"}, "2001:db8:ffff::1"),
        ({"x-forwarded-for": "6.6.6.6, unknown"}, PROXY),
        ({"x-forwarded-for": "6.6.6.6, unknown, 10.9.9.9"}, "10.9.9.9"),
        ({"x-forwarded-for": "127.999.1.1"}, PROXY),
        ({"x-forwarded-for": ""}, PROXY),
        ({"forwarded": "for=203.0.113.9"}, "203.0.113.9"),
        ({"forwarded": 'For="[2001:db8:ffff::1]:4711";proto=https'}, "2001:db8:ffff::1"),
        ({"forwarded": "for=6.6.6.6, for=203.0.113.9;by=10.1.2.3, for=10.9.9.9"}, "203.0.113.9"),
        ({"forwarded": ["for=6.6.6.6", "for=203.0.113.9"]}, "203.0.113.9"),
        ({"forwarded": "for=_hidden"}, PROXY),
        ({"forwarded": r'for="6.6.6.6\", for=6.6.6.6"'}, PROXY),
        ({"forwarded": 'for=6.6.6.6;x=", for="203.0.113.9"'}, PROXY),  # a quote around what the proxy added
        ({"forwarded": "for=203.0.113.9", "x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
        ({"forwarded": "for=6.6.6.6", "x-forwarded-for": "203.0.113.9"}, PROXY),  # not both are the proxy's
    ],
)  # fmt: skip
def test_the_caller_is_the_last_address_that_is_no_proxy(
    headers: Mapping[str, str | list[str]], address: str
) -> None:
    assert origin(headers).address == address


@pytest.mark.parametrize(
    "peer", ["203.0.113.1", "11.0.0.1", "::2", "2001:db8:2::1", "unix", "testclient", ""]
)
@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded"])
def test_from_any_other_peer_the_headers_count_for_nothing(peer: str, name: str) -> None:
    headers = {name: "for=6.6.6.6" if name == "forwarded" else "6.6.6.6", "x-forwarded-proto": "https"}

    assert origin(headers, peer) == Origin(peer)


def test_without_the_setting_no_peer_is_trusted() -> None:
    for peer in ("127.0.0.1", "::1", "10.0.0.1", "203.0.113.9"):
        assert TrustedProxies(()).origin(peer, lambda _: ["6.6.6.6"]) == Origin(peer)


@pytest.mark.parametrize("peer", ["::1", "0:0:0:0:0:0:0:1", "::ffff:10.1.1.1", "2001:DB8:1:0::9"])
def test_a_proxy_is_known_however_its_address_is_written(peer: str) -> None:
    assert origin({"x-forwarded-for": "203.0.113.9"}, peer).address == "203.0.113.9"


@pytest.mark.parametrize(
    ("headers", "scheme", "host"),
    [
        ({"x-forwarded-for": "6.6.6.6", "x-forwarded-proto": "https"}, "https", None),
        ({"x-forwarded-proto": "HTTPS", "x-forwarded-host": "weft.example"}, "https", "weft.example"),
        ({"x-forwarded-for": "6.6.6.6, 10.9.9.9", "x-forwarded-proto": "https, http"}, "https", None),
        ({"x-forwarded-for": "1.1.1.1, 6.6.6.6", "x-forwarded-proto": "wss, http, https"}, "https", None),
        ({"x-forwarded-for": "6.6.6.6", "x-forwarded-proto": "javascript"}, None, None),
        ({"x-forwarded-for": "6.6.6.6", "x-forwarded-host": "a b@evil/"}, None, None),
        ({"x-forwarded-for": "6.6.6.6", "x-forwarded-host": "[2001:db8::1]:84"}, None, "[2001:db8::1]:84"),
        ({"forwarded": 'for=6.6.6.6;proto=https;host="weft.example:8443"'}, "https", "weft.example:8443"),
        ({"forwarded": "for=1.1.1.1;proto=http;host=evil.example, for=6.6.6.6;proto=https;host=weft.example"},
         "https", "weft.example"),
    ],
)  # fmt: skip
def test_the_scheme_and_host_are_those_that_the_proxy_was_called_by(
    headers: Mapping[str, str], scheme: str | None, host: str | None
) -> None:
    found = origin(headers)

    assert (found.scheme, found.host) == (scheme, host)


@given(st.lists(st.text(max_size=30), max_size=5), st.lists(st.text(max_size=60), max_size=3))
def test_a_caller_can_prepend_anything_and_pass_for_no_other(listed: list[str], standard: list[str]) -> None:
    old = {"x-forwarded-for": [*listed, "203.0.113.9"], "x-forwarded-proto": ["x", "https"]}
    new = {"forwarded": [*standard, 'for="203.0.113.9"']}

    assert origin(old).address == "203.0.113.9"
    assert origin(new).address in ("203.0.113.9", PROXY)


def test_an_ipv6_caller_is_counted_by_network_and_an_ipv4_caller_by_address() -> None:
    assert limit_name("2001:db8::1") == limit_name("2001:db8::ffff:1") == "2001:db8::/64"
    assert limit_name("203.0.113.9") == "203.0.113.9"
    assert limit_name("testclient") == "testclient"
