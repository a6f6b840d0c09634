"""Every bad request is a 4xx that names the cause and the fix; none is a 500, and none leaves a job."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.api.native.image_body import ImageBody
from serve_app.api.openai.image_schemas import OpenAIImageBody
from tests.serving.api import forged
from tests.serving.api.fake_model import FakeModel

PNG = base64.b64encode(forged.png()).decode()
EDGES = {"control_image": PNG, "control_type": "canny"}
CONTROL: dict[str, Any] = {"image": PNG, "type": "canny"}
NOTHING = {"jobs": [], "next_cursor": None}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "sketch", "prompt": "a red fox", **fields}


async def assert_refused(
    client: httpx.AsyncClient, answer: httpx.Response, message: str, status: int | None = None
) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    if status is not None:
        assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert len(answer.content) < 2_000
    assert answer.headers["x-request-id"]
    assert (await client.get("/api/generate/")).json() == NOTHING


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"model": "skech"}, "Did you mean 'sketch'?", "model"),
        ({"model": 7}, "valid string", "model"),
        ({"model": ""}, "at least 1 character", "model"),
        ({"prompt": None}, "prompt is missing", "prompt"),
        ({"prompt": "   "}, "describe the picture", "prompt"),
        ({"prompt": "x" * 100_000}, "32000", "prompt"),
        ({"prompt": "x" * 5_000}, "sketch takes at most 4000", "prompt"),
        ({"width": 100}, "nearest: 96", "width"),
        ({"width": 8192}, "64-512 and a multiple of 16", "width"),
        ({"height": -64}, "greater than or equal to 1", "height"),
        ({"width": 10**30}, "less than or equal to 16384", "width"),
        ({"width": 512, "height": 512}, "262144 pixels; at most 131072", "width"),
        ({"width": 512, "height": 64}, "at most 3 to 1", "width"),
        ({"width": 128.5}, "valid integer", "width"),
        ({"width": "128"}, "valid integer", "width"),
        ({"num_inference_steps": 51}, "sketch runs 1-50", "num_inference_steps"),
        ({"steps": 10**9}, "less than or equal to 1000", "num_inference_steps"),
        ({"steps": 0}, "greater than or equal to 1", "num_inference_steps"),
        ({"steps": True}, "valid integer", "steps"),
        ({"steps": 4, "num_inference_steps": 5}, "steps", "steps"),
        ({"guidance_scale": 21}, "0-20", "guidance_scale"),
        ({"guidance_scale": -1.0}, "greater than or equal to 0", "guidance_scale"),
        ({"seed": -2}, "greater than or equal to 0", "seed"),
        ({"seed": "seven"}, "-1 for a random one", "seed"),
        ({"seed": 1e17}, "write it without one", "seed"),
        ({"seed": 2**63}, "less than or equal to 9223372036854775807", "seed"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seed must be at most", "seed"),
        ({"num_images": 5}, "at most 4 at once", "num_images"),
        ({"num_images": 0}, "greater than or equal to 1", "num_images"),
        ({"scheduler": "lcm"}, "not one of sketch's: auto", "scheduler"),
        ({"output_format": "gif"}, "'png', 'jpeg' or 'webp'", "output_format"),
        ({"output_quality": 0}, "greater than or equal to 1", "output_quality"),
        ({"previews": 9}, "less than or equal to 8", "previews"),
        ({"previews": -1}, "greater than or equal to 0", "previews"),
        ({"previews": True}, "valid integer", "previews"),
        ({"previews": "4"}, "valid integer", "previews"),
        ({"previews": 2.5}, "valid integer", "previews"),
        ({"preview": 4}, "did you mean previews?", "preview"),
        ({"strength": 0.5}, "send image too", "strength"),
        ({"mask_image": base64.b64encode(forged.png()).decode()}, "send image too", "mask_image"),
        ({"image": "not base64!"}, "not base64", "image"),
        ({"image": "https://example.com/fox.png"}, "fetches no addresses", "image"),
        ({"image": "data:image/png,abc"}, "data URL must read", "image"),
        ({"image": 5}, "valid bytes", "image"),
        ({"image": ""}, "image is empty", "image"),
        ({"image": PNG, "image_2": PNG}, "did you mean image?", "image_2"),
        ({"control_image": PNG}, "control_image needs its control_type", "control_type"),
        ({"control_image": PNG, "control_type": "scribble"}, "'canny', 'depth' or 'pose'", "control_type"),
        ({"control_type": "canny"}, "send control_image too", "control_type"),
        ({"control_weight": 0.5}, "send control_image too", "control_weight"),
        ({"control_is_map": True}, "send control_image too", "control_is_map"),
        ({"control_image": "not base64!", "control_type": "canny"}, "not base64", "control_image"),
        ({"control_image": 5, "control_type": "canny"}, "valid bytes", "control_image"),
        ({"control_image": "", "control_type": "canny"}, "control_image is empty", "control_image"),
        (EDGES | {"control_weight": 2.5}, "less than or equal to 2", "control_weight"),
        (EDGES | {"control_weight": -0.1}, "greater than or equal to 0", "control_weight"),
        (EDGES | {"control_weight": "1"}, "valid number", "control_weight"),
        (EDGES | {"control_start": 1.5}, "less than or equal to 1", "control_start"),
        (EDGES | {"control_start": 0.8, "control_end": 0.2}, "start must be below end", "control_start"),
        (EDGES | {"control_end": 0.0}, "start must be below end", "control_start"),
        (EDGES | {"control_is_map": "yes"}, "valid boolean", "control_is_map"),
        (EDGES | {"controls": [CONTROL]}, "send one of them", "control_image"),
        (EDGES | {"control_type": "pose"}, "it takes canny, depth", "control_type"),
        (EDGES | {"control_type": "depth"}, "send a depth map and say is_map: true", "control_image"),
        (EDGES | {"model": "tiny-flux-schnell"}, "it takes none", "control_type"),
        ({"controls": CONTROL}, "valid array", "controls"),
        ({"controls": [CONTROL] * 5}, "at most 4 items", "controls"),
        ({"controls": [CONTROL | {"type": "tile"}]}, "'canny', 'depth' or 'pose'", "controls.0.type"),
        ({"controls": [{"type": "canny"}]}, "controls.0.image is missing", "controls.0.image"),
        ({"controls": [{"image": PNG}]}, "controls.0.type is missing", "controls.0.type"),
        ({"controls": [CONTROL, CONTROL | {"weight": 3}]}, "less than or equal to 2", "controls.1.weight"),
        ({"controls": [CONTROL | {"start": 0.5, "end": 0.5}]}, "start must be below end", "controls.0"),
        ({"controls": [CONTROL | {"strength": 1}]}, "controls.0.strength", "controls.0.strength"),
        ({"controls": [CONTROL, CONTROL | {"image": ""}]}, "controls.1.image is empty", "controls.1.image"),
        ({"refine": True}, "refine needs a picture; send image", "image"),
        ({"refine": "yes", "image": PNG}, "valid boolean", "refine"),
        ({"refine": True, "image": PNG, "mask_image": PNG}, "leave mask_image out", "mask_image"),
        ({"refine": True, "image": PNG} | EDGES, "leave control pictures out", "controls"),
        ({"refine": True, "image": PNG, "model": "tiny-flux-schnell"}, "cannot do refine", "refine"),
        ({"refiner": 1.5}, "a number between 0 and 1", "refiner"),
        ({"refiner": "late"}, "must be true, false, or a number", "refiner"),
        ({"refiner": [0.5]}, "must be true, false, or a number", "refiner"),
        ({"refiner": 0.5, "image": PNG}, "text-to-image only", "refiner"),
        ({"refiner": True, "steps": 1}, "use at least 2 steps", "num_inference_steps"),
        ({"refiner": True, "model": "tiny-flux-schnell"}, "has no refiner", "refiner"),
        ({"promt": "x"}, "did you mean prompt?", "promt"),
        ({"embeddings": []}, "not a field of this request", "embeddings"),
    ],
)
async def test_a_wrong_field_is_named_with_its_cure(
    client: httpx.AsyncClient, fields: dict[str, Any], message: str, param: str | None
):
    answer = await client.post("/api/generate/image", json=body(**fields))

    await assert_refused(client, answer, message)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "message", "status"),
    [
        (b"", "not valid JSON", 422),
        (b"{", "not valid JSON", 422),
        (b"[]", "one JSON object", 422),
        (b"null", "one JSON object", 422),
        (b'"a red fox"', "one JSON object", 422),
        (b"{}", "prompt is missing", 422),
        (b"\xff\xfe\x00{", "not valid JSON", 422),
        (b'{"prompt": "a", "guidance_scale": NaN}', "finite number", 422),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "finite number", 422),
        (b'{"prompt": "a", "width": NaN}', "width", 422),
        (b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", "not valid JSON", 422),
        (b'{"prompt": "\\ud800"}', "not valid JSON", 422),
        (b'{"prompt": "a", "\\ud800": 1}', "not valid JSON", 422),
        (b"[" * 200_000, "deeper than 32 levels", 400),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "deeper than 32 levels", 400),
        (b"[" + b"1," * 100_000 + b"1]", "parts", 400),
    ],
)
async def test_a_wrong_body_is_named_with_its_cure(
    client: httpx.AsyncClient, body: bytes, message: str, status: int
):
    answer = await client.post(
        "/api/generate/image", content=body, headers={"content-type": "application/json"}
    )

    await assert_refused(client, answer, message, status)


async def test_a_body_without_its_content_type_is_refused_with_the_header_to_send(client: httpx.AsyncClient):
    answer = await client.post("/api/generate/image", content=b'{"prompt": "a"}')

    await assert_refused(client, answer, "Content-Type: application/json", 415)


async def test_a_body_without_end_is_cut_off_by_counting_not_by_its_header(client: httpx.AsyncClient):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 2**20
            yield b" " * 2**20

    answer = await client.post(
        "/api/generate/image", content=endless(), headers={"content-type": "application/json"}
    )

    await assert_refused(client, answer, "the body is over 33554432 bytes", 413)
    assert sent <= 34 * 2**20


async def test_a_lying_content_length_is_refused_before_a_byte_is_read(client: httpx.AsyncClient):
    answer = await client.post(
        "/api/generate/image", content=b"{}", headers={"content-length": "999999999999999999999"}
    )

    await assert_refused(client, answer, "the body is over", 413)


@pytest.mark.parametrize("name", forged.BAD)
async def test_a_forged_picture_is_refused_as_a_file_and_as_base64(client: httpx.AsyncClient, name: str):
    data = forged.BAD[name]

    as_file = await client.post(
        "/api/generate/image", data={"prompt": "a", "model": "sketch"}, files={"image": ("x.png", data)}
    )
    as_text = await client.post("/api/generate/image", json=body(image=base64.b64encode(data).decode()))

    await assert_refused(client, as_file, "image")
    await assert_refused(client, as_text, "image")


@pytest.mark.parametrize("name", forged.BAD)
async def test_a_forged_control_picture_is_refused_wherever_it_stands(client: httpx.AsyncClient, name: str):
    data, url = forged.BAD[name], "/api/generate/image"
    control = CONTROL | {"image": base64.b64encode(data).decode()}

    as_file = await client.post(
        url,
        data={"prompt": "a", "model": "sketch", "control_type": "canny"},
        files={"control_image": ("x.png", data)},
    )
    second = await client.post(url, json=body(controls=[CONTROL, control]))

    await assert_refused(client, as_file, "control_image")
    await assert_refused(client, second, "controls.1.image")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "refine needs a picture; send image"),
        ({"image": PNG, "model": "tiny-flux-schnell"}, "cannot do refine"),
        ({"image": PNG, "refiner": True}, "text-to-image only"),
        ({"image": PNG, "refine": "no"}, "valid boolean"),
    ],
)
async def test_a_wrong_request_to_refine_is_named_with_its_fix(
    client: httpx.AsyncClient, fields: dict[str, Any], message: str
):
    answer = await client.post("/refine", json=body(**fields))

    await assert_refused(client, answer, message, 422)


@pytest.mark.parametrize(
    ("fields", "files", "message"),
    [
        ({"prompt": "a", "steps": "many"}, {}, "valid integer"),
        ({"prompt": "a", "guidance_scale": "nan"}, {}, "finite number"),
        ({"prompt": "a", "tiling": "true"}, {}, "not a field"),
        ({"prompt": ["a", "b"]}, {}, "prompt is there twice"),
        ({"prompt": "a"}, {"prompt": ("x.txt", b"a")}, "prompt is there twice"),
        ({"prompt": "a"}, {"picture": ("x.png", forged.png())}, "files are image, mask_image, control_image"),
        ({"prompt": "a", "control_weight": "heavy"}, {}, "valid number"),
        ({"prompt": "a", "controls": "[]"}, {}, "valid array"),
        ({"prompt": "a", "previews": "some"}, {}, "valid integer"),
        ({"prompt": "a", "previews": "9"}, {}, "less than or equal to 8"),
        ({"prompt": "a", "refiner": "late"}, {}, "must be true, false, or a number"),
        ({"prompt": "a"}, {"control_image": ("x.png", forged.png())}, "needs its control_type"),
        ({"prompt": "a"}, {"mask_image": ("x.png", forged.png())}, "send image too"),
        ({}, {"image": ("x.png", forged.png())}, "prompt is missing"),
        ({"prompt": "a" * 2_000_000}, {"image": ("x.png", forged.png())}, "1024KB"),
        ({f"f{n}": "x" for n in range(100)}, {}, "Too many fields"),
    ],
)
async def test_a_wrong_form_is_named_with_its_cure(
    client: httpx.AsyncClient, fields: dict[str, Any], files: dict[str, Any], message: str
):
    padding = files or {"image": ("x.png", forged.png())}

    answer = await client.post("/api/generate/image", data={"model": "sketch", **fields}, files=padding)

    await assert_refused(client, answer, message)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "multipart/form-data"),
        (b"--x\r\n\r\nrubbish", "multipart/form-data; boundary=x"),
        (b"rubbish", "multipart/form-data; boundary=x"),
        (b"\x00\xff" * 100, "multipart/form-data; boundary=\xe9"),
        (
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\\ud800\r\n--x--\r\n',
            "multipart/form-data; boundary=x; charset=unicode_escape",
        ),
    ],
)
async def test_a_form_that_is_none_is_a_4xx(client: httpx.AsyncClient, body: bytes, content_type: str):
    answer = await client.post(
        "/api/generate/image", content=body, headers={"content-type": content_type.encode("latin-1")}
    )

    await assert_refused(client, answer, "")


WRONG_IDS = ["0" * 32, "1", "x" * 32, "0" * 33, "A" * 32, "..%2f..%2fetc%2fpasswd", "%00", "0" * 31 + "é"]


@pytest.mark.parametrize(
    "path", ["/api/generate/{}", "/api/generate/{}/events", "/task/{}/status", "/task/{}/result"]
)
@pytest.mark.parametrize("wrong", WRONG_IDS)
async def test_a_wrong_id_is_a_404_with_our_error_body(client: httpx.AsyncClient, path: str, wrong: str):
    answer = await client.get(path.format(wrong))

    await assert_refused(client, answer, "", 404)


@pytest.mark.parametrize(
    "path",
    [
        "/api/results/{}/0.png",
        "/api/results/{}/../../etc/passwd",
        "/api/results/{}/0.svg",
        "/api/results/{}/0/thumbnail",
        "/nothing/here",
        "/api",
        "/v1",
    ],
)
async def test_a_path_that_leads_nowhere_is_a_404(client: httpx.AsyncClient, path: str):
    await assert_refused(client, await client.get(path.format("0" * 32)), "", 404)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", "limit"),
        ("limit=many", "limit"),
        ("status=asleep", "status"),
        ("cursor=rubbish", "cursor"),
    ],
)
async def test_a_wrong_query_is_named(client: httpx.AsyncClient, query: str, message: str):
    await assert_refused(client, await client.get(f"/api/generate/?{query}"), message, 422)


async def test_a_wrong_method_names_the_right_one(client: httpx.AsyncClient):
    await assert_refused(client, await client.get("/generate-image"), "use POST", 405)


async def test_a_malformed_event_id_is_refused_before_the_stream_begins(client: httpx.AsyncClient):
    answer = await client.get(f"/api/generate/{'0' * 32}/events", headers={"last-event-id": "yesterday"})

    await assert_refused(client, answer, "must be the id of an event", 422)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([*ImageBody.model_fields, "steps"])


BODIES = JSON | st.dictionaries(FIELDS, JSON, max_size=6) | st.binary(max_size=60)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(body=BODIES)
async def test_no_body_whatever_breaks_the_service(client: httpx.AsyncClient, body: Any):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    answer = await client.post(
        "/api/generate/image", content=content, headers={"content-type": "application/json"}
    )

    assert answer.status_code < 500, answer.text
    assert answer.status_code == 202 or answer.json()["error"]["message"]


@FUZZ
@given(
    body=st.dictionaries(st.sampled_from(sorted(OpenAIImageBody.model_fields)), JSON, max_size=6).map(
        lambda fields: {"prompt": "a red fox", **fields}
    )
)
async def test_no_body_whatever_breaks_the_openai_dialect(
    client: httpx.AsyncClient, fake_model: FakeModel, body: dict[str, Any]
):
    answer = await client.post(
        "/v1/images/generations",
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )

    assert answer.status_code in (200, 400, 403, 404), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert "event: error" not in answer.text


@FUZZ
@given(
    path=st.sampled_from(
        [
            "/api/generate/{}",
            "/api/generate/{}/events",
            "/api/results/{}/0.png",
            "/api/results/{}/0/thumbnail",
            "/task/{}/result",
            "/api/models/{}",
            "/v1/models/{}",
            "/{}",
        ]
    ),
    part=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    method=st.sampled_from(["GET", "DELETE", "POST", "PUT", "HEAD"]),
)
async def test_no_path_whatever_breaks_the_service(
    client: httpx.AsyncClient, path: str, part: str, method: str
):
    answer = await client.request(method, path.format(quote(part, safe="")))

    assert 400 <= answer.status_code < 500
