"""How deep and how full a JSON body may be."""

import time

import pytest

from deployments.protocol.errors import BadRequest
from serve_app.api.guards import check_json_shape


def test_an_ordinary_body_passes():
    check_json_shape(b'{"prompt": "a {fox} [in] \\"snow\\"", "list": [1, 2, [3]]}', max_depth=3)


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b'{"a":' * 200_000, b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}"]
)
def test_deep_nesting_is_refused(body: bytes):
    with pytest.raises(BadRequest, match="deeper than 32 levels"):
        check_json_shape(body, max_depth=32)


@pytest.mark.parametrize("body", [b"[" + b"[]," * 20_000 + b"[]]", b"[" + b"1," * 20_000 + b"1]"])
def test_a_flood_of_values_is_refused(body: bytes):
    with pytest.raises(BadRequest, match="parts"):
        check_json_shape(body, max_depth=32)


@pytest.mark.parametrize(
    "body",
    [
        b'{"image": "' + b"A" * 30_000_000 + b'"}',
        b'"' + b'\\"' * 10_000_000,
        b"\\" * 20_000_000,
        b'"' + b"\\" * 20_000_001,
    ],
    ids=["a long string", "a string of quotes without an end", "backslashes", "an odd escape at the end"],
)
def test_the_longest_bodies_are_scanned_in_linear_time(body: bytes):
    began = time.perf_counter()

    check_json_shape(body, max_depth=32)

    assert time.perf_counter() - began < 5


def test_brackets_in_strings_do_not_count():
    check_json_shape(b'{"prompt": "' + b"[{" * 5_000 + b'"}', max_depth=4)
