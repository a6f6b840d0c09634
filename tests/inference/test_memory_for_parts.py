"""Memory runs out while a part of a model is loaded: an answer with bytes, no bug; later it may fit."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from PIL import Image

from deployments.engine.out_of_memory import load_or_free
from deployments.loras import cache as lora_cache
from deployments.loras import source as lora_source
from deployments.models.load import module_bytes
from deployments.models.parts import find_parts
from deployments.models.preprocessors import lazy_preprocessors
from deployments.models.weight_cache import ROOT
from deployments.planning.plan import everything_on_device
from deployments.protocol.card import ControlNet, Dtype, ModelCard, Weights, load_card
from deployments.protocol.errors import OutOfMemory
from deployments.protocol.events import Done, Event, Failed
from deployments.protocol.request import Control, GenerationRequest, Lora
from deployments.replica import ModelReplica
from tests.inference import lora_files

CARDS = ROOT / "configs/models"
NO_MEMORY = "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 23.68 GiB"


def card(name: str) -> ModelCard:
    loaded = load_card(CARDS / f"{name}.yaml")
    serving = loaded.serving.model_copy(update={"warm_up": False, "models_loaded": 2})
    return loaded.model_copy(update={"serving": serving})


@pytest.fixture(scope="module")
def replica() -> Iterator[ModelReplica]:
    base = card("tiny-sdxl-base").model_copy(update={"refiner": "tiny-sdxl-refiner"})
    made = ModelReplica([base, card("tiny-sd15")], {base.id: card("tiny-sdxl-refiner")})
    yield made
    made.__del__()


async def last_event(replica: ModelReplica, **changes: Any) -> Event:
    fields = {"model": "tiny-sdxl-base", "prompt": "a red circle", "width": 64, "height": 64, "seed": 5}
    request = GenerationRequest(**(fields | {"num_inference_steps": 2} | changes))
    return [event async for event in replica.generate(request)][-1]


class Full:
    """A device without space: what is loaded is complete on the host, and then does not fit."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self._load = load
        self.loaded: list[weakref.ref[Any]] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        loaded = self._load(*arguments, **options)
        self.loaded.append(weakref.ref(loaded))
        raise torch.OutOfMemoryError(NO_MEMORY)


def edges() -> Control:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(buffer, "PNG")
    return Control(image=buffer.getvalue(), type="canny", is_map=True)


def a_lora(replica: ModelReplica, seed: int) -> Lora:
    (loaded,) = [model for model in replica._runtime.models.models if model.card.id == "tiny-sdxl-base"]
    tensors = lora_files.random_lora(loaded.pipelines._pipeline, ["unet"], seed=seed)
    file = lora_files.file_of(tensors)
    return Lora(id=hashlib.sha256(file).hexdigest(), file=file)


def size_of(folder: Path) -> int:
    """Bytes of a pipeline or a module in float32."""
    if not (folder / "model_index.json").is_file():
        return module_bytes(Weights(path=str(folder), dtype="float32")) or 0
    parts = find_parts(folder, everything_on_device("float32"), None)
    return sum(part.size_bytes for part in parts.values())


REQUESTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a model of a group": (DiffusionPipeline, {"model": "tiny-sd15"}, "the model models/tiny-sd15"),
    "a ControlNet": (
        ControlNetModel,
        {"model": "tiny-sd15", "controls": [edges()]},
        "the ControlNet models/tiny-sd15-canny",
    ),
    "the refiner": (DiffusionPipeline, {"refiner": 0.5}, "the model models/tiny-sdxl-refiner"),
}


@pytest.mark.parametrize(("kind", "changes", "names"), REQUESTS.values(), ids=REQUESTS)
async def test_a_part_that_does_not_fit_is_named_with_its_bytes_and_may_fit_later(
    kind: Any, changes: dict[str, Any], names: str, replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full(kind.from_pretrained)
    monkeypatch.setattr(kind, "from_pretrained", full)
    failed = await last_event(replica, **changes)
    parts_left = [reference() for reference in full.loaded]
    monkeypatch.undo()

    later = await last_event(replica, **changes)

    assert isinstance(failed, Failed)
    assert (failed.kind, failed.retryable) == ("out_of_memory", False)
    # the tiny refiner is loaded, but diffusers gives it no latents of 16 channels
    assert isinstance(later, Done) or (isinstance(later, Failed) and "16 channels" in later.message)
    size = size_of(ROOT / names.split()[-1])
    assert f"{names} does not fit into the memory ({size / 2**20:.3g} MiB needed)" in failed.message
    assert "try again when less is running" in failed.message
    assert parts_left == [None], "what was loaded is freed"


async def test_a_picture_that_cannot_be_decoded_fails_alone(replica: ModelReplica) -> None:
    (loaded,) = [model for model in replica._runtime.models.models if model.card.id == "tiny-sdxl-base"]

    def too_large(_layer: object, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[-1] > inputs[0].shape[-2]:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    hook = loaded.pipelines._pipeline.vae.decoder.conv_in.register_forward_pre_hook(too_large)
    wide, other = await asyncio.gather(
        last_event(replica, width=128), last_event(replica, num_inference_steps=20, seed=6)
    )
    hook.remove()

    assert isinstance(wide, Failed)
    assert (wide.kind, wide.retryable) == ("out_of_memory", False)
    assert "in Decoder.forward with 1 rows; ask for fewer pictures or a smaller size" in wide.message
    assert isinstance(other, Done)
    assert isinstance(await last_event(replica, width=128), Done)
    replica.check_health()


def too_little(*_arguments: Any, **_options: Any) -> Any:
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize(
    ("patch", "name", "says"),
    [
        (lora_source, "load_tensors", r"the LoRA \w{12} does not fit"),  # into the host's memory
        (lora_cache.LoraCache, "_copy_to_device", r"the LoRA \w{12} does not fit"),
    ],
)
async def test_a_lora_that_does_not_fit_is_an_answer_with_its_bytes_and_may_fit_later(
    patch: Any, name: str, says: str, replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = a_lora(replica, seed=len(name))  # another one each time
    monkeypatch.setattr(patch, name, too_little)
    failed = await last_event(replica, loras=[lora])
    monkeypatch.undo()

    later = await last_event(replica, loras=[lora])

    assert isinstance(failed, Failed)
    assert re.search(says, failed.message), failed.message
    assert (failed.kind, failed.retryable, failed.param) == ("out_of_memory", False, "loras")
    assert "MiB needed" in failed.message
    assert isinstance(later, Done)


def test_a_preprocessor_that_does_not_fit_is_named_and_asked_again_at_the_next_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    licence = card("tiny-sd15").licence
    control = ControlNet(
        weights=Weights(path="net"), licence=licence, preprocessor=Weights(path=str(tmp_path))
    )
    (tmp_path / "config.json").write_text("{}")
    attempts: list[int] = []

    def load(*_arguments: Any) -> Any:
        attempts.append(1)
        raise torch.OutOfMemoryError(NO_MEMORY)

    monkeypatch.setattr("deployments.models.preprocessors.load_depth_estimator", load)
    preprocess = lazy_preprocessors({"depth": control}, torch.device("cpu"))["depth"]

    for _ in range(2):
        with pytest.raises(
            OutOfMemory, match=r"control maps does not fit .*0.5 GiB needed.*finished control map"
        ):
            preprocess(Image.new("RGB", (8, 8)))

    assert attempts == [1, 1]


def test_what_was_half_loaded_is_freed_before_the_answer() -> None:
    module = torch.nn.Linear(2, 2)
    module.itself = [module]  # type: ignore[assignment]  as hooks refer to their modules
    parts = [weakref.ref(module)]

    def load() -> Any:
        nonlocal module
        mine, module = module, None  # type: ignore[assignment]
        assert mine is not None
        raise torch.OutOfMemoryError(NO_MEMORY)

    with pytest.raises(OutOfMemory, match=r"it does not fit into the memory \(0.5 GiB needed\); take less"):
        load_or_free("it", load, cure="take less")

    assert parts[0]() is None


def test_an_error_of_another_kind_is_left_as_it_is() -> None:
    def load() -> Any:
        raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        load_or_free("it", load, cure="take less")


def test_the_size_of_weights_counts_their_elements_in_the_dtype_they_get(tmp_path: Path) -> None:
    folder = ROOT / "models/tiny-sd15-canny"
    net = ControlNetModel.from_pretrained(folder)
    elements = sum(parameter.numel() for parameter in net.parameters())

    def size(folder: Path, dtype: Dtype) -> int | None:
        return module_bytes(Weights(path=str(folder), dtype=dtype))

    assert size(folder, "float32") == 4 * elements
    assert size(folder, "bfloat16") == 2 * elements
    assert size(tmp_path, "bfloat16") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0[1]")
    assert size(tmp_path, "bfloat16") is None
