"""How deep and how full a JSON body may be."""

import time
from contextlib import suppress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.protocol.errors import BadRequest
from serve_app.api.json_shape import check_json_shape


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
    quarter = min(_cpu_s(body[: len(body) // 4]) for _ in range(3))

    assert _cpu_s(body) < 8 * max(quarter, 0.01)  # 16 times as long if it were quadratic


def _cpu_s(body: bytes) -> float:
    """Seconds of CPU that a scan takes."""
    began = time.process_time()
    with suppress(BadRequest):  # of too many quotes
        check_json_shape(body, max_depth=32)
    return time.process_time() - began


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'"' + b'\\"' * 200_000 + b'"', "quotes"),
        (b"[" + b" " * 2**21 + b"1]", "bytes beside its strings"),
        (b"[" + b"7" * 2**21 + b"]", "bytes beside its strings"),
        (b"[" * 33 + b" " * 2**21, "deeper than 32 levels"),
    ],
)
def test_a_body_that_is_no_request_is_refused_by_its_shape(body: bytes, named: str):
    with pytest.raises(BadRequest, match=named):
        check_json_shape(body, max_depth=32)


@given(st.text(st.sampled_from('"\\[]{},a '), max_size=40), st.integers(1, 4))
def test_the_shape_is_that_of_a_reader_character_by_character(text: str, max_depth: int):
    depth, deepest, within, escaped = 0, 0, False, False
    for character in text:
        if within:
            within = escaped or character != '"'
            escaped = character == "\\" and not escaped
        else:
            within = character == '"'
            depth += (character in "[{") - (character in "]}")
            deepest = max(deepest, depth)

    refused = False
    try:
        check_json_shape(text.encode(), max_depth)
    except BadRequest:
        refused = True

    assert refused == (deepest > max_depth)


def test_brackets_in_strings_do_not_count():
    check_json_shape(b'{"prompt": "' + b"[{" * 5_000 + b'"}', max_depth=4)


async def test_headers_and_addresses_beyond_all_need_are_refused(client: httpx.AsyncClient):
    long = {"x-note": "n" * 40_000}
    many = {f"x-note-{number}": "n" * 400 for number in range(100)}

    answers = [
        await client.get("/health", headers=long),
        await client.get("/health", headers=many),
        await client.get("/v1/models", params={"q": "n" * 40_000}),
        await client.get("/health", headers={"x-note": "n" * 8_000}),
    ]

    assert [answer.status_code for answer in answers] == [431, 431, 431, 200]
    assert "32768" in answers[0].json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON", "application/x+JSON"])
async def test_json_is_held_against_its_depth_however_it_is_named(
    client: httpx.AsyncClient, content_type: str
):
    deep = b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}"

    answer = await client.post("/api/generate/image", content=deep, headers={"content-type": content_type})

    assert answer.status_code == 400
    assert "deeper than 32 levels" in answer.json()["error"]["message"]
