"""What clients of OpenAI send by default is corrected for the model, with a warning for each value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from deployments.protocol.request import GenerationRequest
from deployments.validation.resolve import resolve
from serve_app.admission.foreign_values import fit_values
from serve_app.api.openai.image_schemas import OpenAIImageBody
from tests.serving.api.cards import SCHNELL, SKETCH
from tests.serving.api.fake_model import FakeModel

ROUTE = "/v1/images/generations"


async def answer_of(client: httpx.AsyncClient, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    answer = await client.post(ROUTE, json={"prompt": "a red fox", "model": "sketch", **body})
    assert answer.status_code == 200, answer.text
    return answer.json(), [warning["code"] for warning in answer.json()["warnings"]]


@pytest.mark.parametrize(
    ("body", "expected", "codes"),
    [
        ({"size": "1024x1024"}, {"width": 352, "height": 352}, ["size_fitted"]),
        ({"size": "1792x1024"}, {"width": 480, "height": 272}, ["size_fitted"]),
        ({"size": "32x32"}, {"width": 64, "height": 64}, ["size_fitted"]),
        ({"size": "128x128"}, {"width": 128, "height": 128}, []),
        ({"aspect_ratio": "16:9"}, {"width": 176, "height": 96}, []),
        ({"height": 9000}, {"width": 352, "height": 352}, ["size_fitted"]),
        ({"width": 256}, {"width": 256, "height": 256}, []),
        ({"steps": 90}, {"num_inference_steps": 50}, ["steps_corrected"]),
        ({"cfg_scale": 30}, {"guidance_scale": 20.0}, ["guidance_corrected"]),
        ({"sampler_name": "Heun++"}, {"scheduler": "auto"}, ["scheduler_corrected"]),
        ({"max_sequence_length": 512}, {"max_sequence_length": None}, ["sequence_length_corrected"]),
        ({"extra_body": {"seed": 5, "steps": 3}}, {"seed": 5, "num_inference_steps": 3}, []),
        ({"num_images": 2}, {"num_images": 2}, []),
        ({"true_cfg_scale": 4.0}, {}, ["field_ignored"]),
        ({"metadata": {"trace": "x"}, "tools": []}, {}, []),
    ],
)
async def test_values_that_the_model_does_not_allow_are_corrected(
    client: httpx.AsyncClient,
    fake_model: FakeModel,
    body: dict[str, Any],
    expected: dict[str, Any],
    codes: list[str],
) -> None:
    answer, warned = await answer_of(client, body)

    request = fake_model.requests[-1]
    assert {name: getattr(request, name) for name in expected} == expected
    assert warned == codes
    assert answer["size"] == f"{request.width}x{request.height}"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            {"n": 1, "size": "512x512", "response_format": "b64_json"},
            id="Open WebUI",
        ),
        pytest.param(
            {
                "n": 1,
                "background": "auto",
                "output_format": "png",
                "output_compression": 100,
                "quality": "auto",
                "size": "auto",
            },
            id="LibreChat",
        ),
        pytest.param(
            {
                "response_format": "b64_json",
                "n": 1,
                "size": "1024x1024",
                "quality": "standard",
                "style": "vivid",
                "user": "me",
            },
            id="n8n",
        ),
        pytest.param(
            {
                "n": 1,
                "width": 1024,
                "height": 1024,
                "steps": 20,
                "cfg": 7,
                "seed": None,
                "aspectRatio": "1:1",
            },
            id="LobeChat",
        ),
        pytest.param({"n": 1, "size": "1280x720", "response_format": "b64_json"}, id="Vercel AI"),
    ],
)
async def test_default_calls_of_known_clients_are_answered(
    client: httpx.AsyncClient, fake_model: FakeModel, body: dict[str, Any]
) -> None:
    answer, _ = await answer_of(client, body)

    assert answer["data"][0]["b64_json"]
    assert answer["data"][0]["url"] is None


def test_names_of_dall_e_have_links_unless_they_ask_for_data() -> None:
    def wants(**fields: Any) -> bool:
        return OpenAIImageBody.model_validate({"prompt": "x", **fields}).wants_url

    assert wants(model="dall-e-3")
    assert not wants(model="dall-e-3", response_format="b64_json")
    assert not wants(model="gpt-image-1")
    assert not wants()


async def test_the_models_say_what_they_can_do_and_since_when(client: httpx.AsyncClient) -> None:
    sketch = (await client.get("/v1/models/sketch")).json()

    assert sketch["tasks"] == ["t2i", "i2i", "refine"]
    assert sketch["created"] > 1_700_000_000


@pytest.mark.parametrize("card", [SCHNELL, SKETCH])
@pytest.mark.parametrize("width", [1, 63, 100, 720, 1280, 4096, 9999])
@pytest.mark.parametrize("height", [1, 64, 1024, 4096])
def test_a_fitted_request_is_always_allowed(card: Any, width: int, height: int) -> None:
    request = GenerationRequest(
        model=card.id, prompt="x", width=width, height=height, num_inference_steps=1000, guidance_scale=99.0
    )

    fitted, warnings = fit_values(request, card)

    resolved = resolve(fitted, card, fresh_seed=1).request
    allowed = card.sizes.min <= min(resolved.width, resolved.height)
    assert allowed
    assert ("size_fitted" in [one.code for one in warnings]) == (
        (resolved.width, resolved.height) != (width, height)
    )
