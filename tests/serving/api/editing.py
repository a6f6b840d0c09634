"""Models for edits: one that takes reference images, one that inpaints, beside those of the other tests."""

import io
from typing import Any

from PIL import Image

from deployments.protocol.card import ModelCard
from tests.serving.api.cards import SKETCH

RETOUCH = ModelCard.model_validate(
    SKETCH.model_dump(exclude={"controls", "refiner", "aliases"})
    | {
        "id": "retouch",
        "name": "Retouch",
        "tasks": ["edit"],
        "steps": {"min": 1, "default": 4, "max": 50},
        "references": {"max": 3, "max_pixels": 65_536},
    }
)
INPAINTER = ModelCard.model_validate(
    SKETCH.model_dump(exclude={"controls", "refiner", "aliases"}) | {"id": "inpainter", "tasks": ["inpaint"]}
)


def png(colour: Any = (200, 30, 40), size: tuple[int, int] = (128, 128), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()
