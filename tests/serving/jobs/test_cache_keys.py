"""Which requests are equal, and which are not (no server)."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from pydantic import BaseModel

from deployments.protocol.request import ResolvedEdit, ResolvedRequest
from serve_app.jobs.store import cache_keys
from serve_app.jobs.store.cache_keys import body_digest, compute_cache_key
from tests.serving.fakes import resolved

SECRET = b"s" * 32
MODELS = {"pipeline": "digest of the weights"}
EDIT = ResolvedEdit(image=b"an image", strength=0.5)


def key(
    request: ResolvedRequest,
    *,
    secret: bytes = SECRET,
    owner: str = "ada",
    epoch: int = 0,
    models: dict[str, str] = MODELS,
) -> str:
    return compute_cache_key(secret, owner, epoch, request, models)


def test_a_key_is_64_hex_digits_and_the_same_again() -> None:
    assert key(resolved()) == key(resolved())
    assert len(key(resolved())) == 64
    assert int(key(resolved()), 16) > 0


@pytest.mark.parametrize(
    "other",
    [{"secret": b"t" * 32}, {"owner": "bob"}, {"epoch": 1}, {"models": {"pipeline": "other weights"}}],
    ids=lambda other: next(iter(other)),
)
def test_everything_a_result_depends_on_changes_the_key(other: dict[str, Any]) -> None:
    assert key(resolved(), **other) != key(resolved())


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a dog"},
        {"seed": 8},
        {"width": 128},
        {"num_inference_steps": 5},
        {"guidance_scale": 1.0},
        {"num_images": 2},
        {"edit": EDIT},
        {"exact": "strict"},  # another promise
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_of_the_result_changes_the_key(changes: dict[str, Any]) -> None:
    assert key(resolved().model_copy(update=changes)) != key(resolved())


@pytest.mark.parametrize("changes", [{"priority": "high"}, {"deadline_s": 5.0}])
def test_when_a_result_is_generated_does_not_change_the_key(changes: dict[str, Any]) -> None:
    assert key(resolved().model_copy(update=changes)) == key(resolved())


def test_previews_do_not_change_the_key_and_other_output_options_do() -> None:
    request = resolved()
    previews = request.model_copy(update={"output": request.output.model_copy(update={"previews": 3})})
    quality = request.model_copy(update={"output": request.output.model_copy(update={"quality": 50})})

    assert key(previews) == key(request)
    assert key(quality) != key(request)


def test_input_images_count_by_their_content() -> None:
    def edited(image: bytes) -> ResolvedRequest:
        return resolved().model_copy(update={"edit": EDIT.model_copy(update={"image": image})})

    assert key(edited(b"one")) == key(edited(b"one"))
    assert key(edited(b"one")) != key(edited(b"two"))


def test_another_version_of_the_code_has_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(resolved())
    monkeypatch.setattr(cache_keys, "CODE_VERSION", "another")

    assert key(resolved()) != before


def test_the_version_of_the_code_names_what_generates() -> None:
    assert all(name in cache_keys.CODE_VERSION for name in ("weft", "diffusers", "torch"))


class Body(BaseModel):
    prompt: str
    image: bytes = b""


def test_a_digest_is_of_the_body_and_what_goes_with_it() -> None:
    body = Body(prompt="a cat")

    assert body_digest(body, kind="Body") == body_digest(Body(prompt="a cat"), kind="Body")
    assert body_digest(body, kind="Body") != body_digest(body, kind="Other")
    assert body_digest(body) != body_digest(Body(prompt="a dog"))
    assert body_digest(body) != body_digest(Body(prompt="a cat", image=b"x"))
    assert len(body_digest(body)) == 64


def test_digests_are_the_same_in_every_version() -> None:
    digest = "cc01985c9dd948255cd2085ad9e00dabfd0c10946046c84aec89adabc999b8dc"

    assert body_digest(Body(prompt="a cat", image=b"x"), kind="image") == digest


def test_a_field_that_a_later_version_adds_leaves_the_digest_of_an_old_body() -> None:
    class LaterBody(Body):
        exact: str | None = None

    assert body_digest(LaterBody(prompt="a cat")) == body_digest(Body(prompt="a cat"))
    assert body_digest(LaterBody(prompt="a cat", exact="strict")) != body_digest(Body(prompt="a cat"))


def test_the_order_of_models_does_not_matter() -> None:
    one, other = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}

    assert key(resolved(), models=one) == key(resolved(), models=other)
    assert key(resolved(), models=one) != key(resolved(), models={"a": "2", "b": "1"})


def test_the_canonical_form_is_sorted_compact_json_with_digests_for_bytes() -> None:
    digest = hashlib.sha256(b"x").hexdigest()

    assert cache_keys._canonical({"b": b"x", "a": [1, None]}) == (
        f'{{"a":[1,null],"b":"sha256:{digest}"}}'.encode()
    )


def test_only_bytes_are_digested_beside_json() -> None:
    with pytest.raises(AssertionError, match="set in a request"):
        cache_keys._digest_of_bytes(set())
