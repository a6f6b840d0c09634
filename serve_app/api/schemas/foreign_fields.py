"""Fields beyond OpenAI's own: other spellings in use, hints without effect, and what must not be ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import BadRequest

NESTED = ("extra_body", "extra_params", "extra_args")  # objects whose fields belong beside them
WITHOUT_EFFECT = frozenset(  # cannot change the result, or say what holds anyway
    """metadata user generator_device device response_modalities modalities max_tokens temperature top_p
    session_id chat_id tools tool_choice""".split()
)
PICTURES = frozenset(  # to ignore them would give another picture than asked for
    """image images image[] mask init_image init_images input_image input_images image_url reference_images
    mask_image control_image control_images controlnet video""".split()
)
MAX_NAMED = 16  # unknown fields that get a warning each
MAX_NAME_CHARS = 64


def unnested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body with those of the objects in NESTED beside them; what is there already counts."""
    inner: dict[str, Any] = {}
    for name in NESTED:
        if isinstance(values.get(name), Mapping):
            inner |= values[name]
    return {**inner, **{name: value for name, value in values.items() if name not in NESTED}}


def ignored_fields(others: Mapping[str, Any]) -> Iterator[Adjustment]:
    """A warning for each field that is not known and might have had an effect."""
    for name in [name for name in others if name not in WITHOUT_EFFECT][:MAX_NAMED]:
        shown = name[:MAX_NAME_CHARS]
        yield Adjustment("field_ignored", shown, f"{shown} is not known here and has no effect")


def refuse_pictures(others: Mapping[str, Any]) -> None:
    """Raises BadRequest for a picture in a body that takes none under this name."""
    for name in others:
        if name in PICTURES:
            raise BadRequest(
                f"{name} is no field of this call, and without it the result would be another; send pictures "
                "to /v1/images/edits, as image and mask",
                param=name,
            )
