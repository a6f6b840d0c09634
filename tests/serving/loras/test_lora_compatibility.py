"""LoRAs that cannot fit are refused as soon as the layers of a model are known, and not before."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from deployments.protocol.errors import BadRequest
from serve_app.loras import compatibility
from serve_app.loras.compatibility import CompatibilityCheck
from serve_app.storage.results import ResultStore, adapter_path
from tests.serving.api.cards import CARDS
from tests.serving.api.lora_files import digest, lora_file

SKETCH = CARDS["sketch"]
FILE = lora_file()  # (2, 4) and (4, 2), of unet.down_blocks.0.attn.to_q
FITS = {"unet.down_blocks.0.attn.to_q": (4, 4)}
TOO_WIDE = {"unet.down_blocks.0.attn.to_q": (4, 640)}


class Model:
    """A model that knows its layers once it has any, and counts lookups."""

    def __init__(self, layers: Mapping[str, tuple[int, ...]] | None) -> None:
        self.layers = layers
        self.lookups = 0

    async def __call__(self, _model: str) -> Mapping[str, tuple[int, ...]] | None:
        self.lookups += 1
        return self.layers


@pytest.fixture
async def stored(results: ResultStore) -> ResultStore:
    await results.put(adapter_path(digest(FILE)), FILE)
    return results


async def test_a_wrong_shape_is_refused_with_both_shapes(stored: ResultStore) -> None:
    with pytest.raises(BadRequest) as refusal:
        await CompatibilityCheck(stored, Model(TOO_WIDE)).check("ink", digest(FILE), SKETCH, "model_id")

    assert refusal.value.param == "model_id"
    assert refusal.value.message == (
        "ink does not fit sketch: 'unet.down_blocks.0.attn.to_q.lora_A.weight' is of shape (2, 4), and its "
        "layer needs (rank, 640); use one that was trained for this model"
    )


async def test_layers_are_looked_up_once_and_a_file_read_once(stored: ResultStore) -> None:
    model = Model(FITS)
    subject = CompatibilityCheck(stored, model)

    await subject.check("ink", digest(FILE), SKETCH, "loras")
    await stored.remove(adapter_path(digest(FILE)))
    await subject.check("ink", digest(FILE), SKETCH, "loras")

    assert model.lookups == 1


async def test_other_weights_under_the_same_name_are_looked_up_anew(stored: ResultStore) -> None:
    model = Model(FITS)
    subject = CompatibilityCheck(stored, model)
    await subject.check("ink", digest(FILE), SKETCH, "loras")
    model.layers = TOO_WIDE
    weights = SKETCH.weights.model_copy(update={"path": "models/another"})

    with pytest.raises(BadRequest, match="640"):
        await subject.check("ink", digest(FILE), SKETCH.model_copy(update={"weights": weights}), "loras")


async def test_unknown_layers_refuse_nothing_and_are_looked_up_again_later(
    stored: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(None)
    subject = CompatibilityCheck(stored, model)

    await subject.check("ink", digest(FILE), SKETCH, "loras")
    await subject.check("ink", digest(FILE), SKETCH, "loras")
    assert model.lookups == 1

    monkeypatch.setattr(compatibility, "RETRY_LOOKUP_S", 0.0)
    later = CompatibilityCheck(stored, model)
    await later.check("ink", digest(FILE), SKETCH, "loras")
    model.layers = TOO_WIDE
    with pytest.raises(BadRequest, match="640"):
        await later.check("ink", digest(FILE), SKETCH, "loras")


async def test_memory_of_verdicts_is_bounded(stored: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "MAX_VERDICTS", 2)
    subject = CompatibilityCheck(stored, Model(FITS))

    for seed in range(5):
        file = lora_file(seed)
        await stored.put(adapter_path(digest(file)), file)
        await subject.check("ink", digest(file), SKETCH, "loras")

    assert len(subject._verdicts) == 2
