"""LoRAs that cannot fit are refused as soon as the layers of a model are known, and not before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from deployments.protocol.card import load_card
from deployments.protocol.errors import BadRequest
from serve_app.loras import compatibility
from serve_app.loras.compatibility import CompatibilityCheck
from serve_app.loras.model_layers import stored_layer_shapes
from serve_app.storage.results import ResultStore, adapter_path
from tests.serving.api.cards import CARDS, ROOT
from tests.serving.api.lora_files import digest, lora_file

SKETCH = CARDS["sketch"]
FILE = lora_file(1)  # (2, 4) and (4, 2), of unet.down_blocks.0.attn.to_q
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
        "layer needs (rank, 640); use a file that was trained for this model, or save it without this layer"
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


def of_ones(layers: dict[str, tuple[list[int], list[int]]], **metadata: str) -> bytes:
    """A file of float32 tensors of ones, or zeros where the name begins with "zero."."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for module, shapes in layers.items():
        for side, shape in zip(("lora_down", "lora_up"), shapes, strict=True):
            count = shape[0] * shape[1]
            key = f"{module.removeprefix('zero.')}.{side}.weight"
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * count]}
            data += (b"\0\0\0\0" if module.startswith("zero.") else b"\0\0\x80\x3f") * count
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


Q = ([2, 4], [4, 2])


async def test_a_tensor_without_a_layer_is_refused_by_its_name_unless_it_is_zero(
    results: ResultStore,
) -> None:
    fits = {"lora_unet_down_blocks_0_attn_to_q": Q}
    lost = of_ones(fits | {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": Q})
    zero = of_ones(fits | {"zero.lora_te3_encoder_block_0_layer_0_SelfAttention_q": Q})
    for file in (lost, zero):
        await results.put(adapter_path(digest(file)), file)
    subject = CompatibilityCheck(results, Model(FITS))

    with pytest.raises(BadRequest, match=r"'lora_te3_encoder_block_0_.*names no .* layer of this model"):
        await subject.check("ink", digest(lost), SKETCH, "loras")

    assert await subject.check("ink", digest(zero), SKETCH, "loras")


async def test_a_header_of_megabytes_is_read_to_its_end(results: ResultStore) -> None:
    file = of_ones({"lora_unet_nowhere": Q}, ss_tag_frequency="x" * (2 * compatibility.HEAD_BYTES))
    await results.put(adapter_path(digest(file)), file)

    with pytest.raises(BadRequest, match=r"'lora_unet_nowhere\.lora_down\.weight' names no"):
        await CompatibilityCheck(results, Model(FITS)).check("ink", digest(file), SKETCH, "loras")


async def test_the_layers_decide_and_not_the_family_that_names_suggest(results: ResultStore) -> None:
    """An SDXL file without a second transformer block has the names of one for Stable Diffusion 1.5."""
    file = of_ones({"lora_unet_down_blocks_0_attn_to_q": Q})
    await results.put(adapter_path(digest(file)), file)
    sdxl = SKETCH.model_copy(update={"family": "sdxl"})

    assert await CompatibilityCheck(results, Model(FITS)).check("ink", digest(file), sdxl, "loras")
    with pytest.raises(BadRequest, match="it looks like a LoRA for sd"):
        await CompatibilityCheck(results, Model(TOO_WIDE)).check("ink", digest(file), sdxl, "loras")


CASES = Path(__file__).parents[2] / "inference/loras/cases"


@pytest.mark.parametrize("name", sorted(path.stem for path in CASES.glob("*.safetensors")))
async def test_files_that_the_service_refused_fit_before_a_replica_runs(
    name: str, results: ResultStore
) -> None:
    """All but the Wan file with a modulation difference, which no model takes."""
    file = case(name)
    model = {"wan": "tiny-wan", "sdxl": "tiny-sdxl-base"}.get(name.partition("_")[0], "tiny-flux-schnell")
    card = load_card(ROOT / f"configs/models/{model}.yaml")
    await results.put(adapter_path(digest(file)), file)
    subject = CompatibilityCheck(results, Model(stored_layer_shapes(card.weights)))

    if name == "wan_diff_m":
        with pytest.raises(BadRequest, match=r"'diffusion_model\.blocks\.0\.diff_m'"):
            await subject.check("ink", digest(file), card, "loras")
    else:
        assert await subject.check("ink", digest(file), card, "loras")


def case(name: str) -> bytes:
    return (CASES / f"{name}.safetensors").read_bytes()
