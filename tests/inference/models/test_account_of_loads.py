"""What is claimed for a load is what it takes, and nothing of it is left where a load fails at any step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from deployments.models.device_memory import GIB, PIPELINE, DeviceMemory
from deployments.models.load import pipeline_bytes
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_instance import ModelInstance
from deployments.models.model_loader import ModelLoader
from deployments.models.model_memory import LoadBytes, MemoryBeside
from deployments.models.quantise import QUANTISING_BYTES, quantise, quantising_bytes
from deployments.planning.plan import PartPlan, plan_of
from deployments.protocol.card import ControlNet, ModelCard, Quantisation, Weights, load_card
from deployments.protocol.errors import OutOfMemory, WeftError
from tests.inference.tiny_controls import LICENCE, save_depth_estimator

CARDS = Path(__file__).parents[3] / "configs/models"
CPU = torch.device("cpu")
CANNY = Weights(path="models/tiny-sd15-canny", dtype="float32")
MIB = 2**20


class Injected(Exception):
    """A failure that no library raises."""


def card(name: str, **serving: Any) -> ModelCard:
    read = load_card(CARDS / f"{name}.yaml")
    return read.model_copy(update={"serving": read.serving.model_copy(update=serving)})


def loader(*cards: ModelCard, refiner: ModelCard | None = None) -> ModelLoader:
    refiners = {} if refiner is None else {cards[0].id: refiner}
    return ModelLoader(cards, refiners, None, gpu_share=0, device="cpu")  # type: ignore[arg-type]  no LoRAs


def account(memory: DeviceMemory) -> Any:
    """All that is claimed, and what is kept free."""
    claims = {part: dict(things) for part, things in memory._claims.items()}
    return claims, memory.working_bytes, dict(memory._loading), len(memory._watched)


# --- failures ---------------------------------------------------------------------------------------------

LOAD, PARTS = "deployments.models.load", "deployments.models.parts"
EXTRAS, INSTANCE = "deployments.models.model_extras", "deployments.models.model_instance"
OF_A_MODULE = (f"{LOAD}.find_part", f"{PARTS}.PartFiles.load", f"{LOAD}.weights_bytes")
OF_A_PIPELINE = (f"{LOAD}.find_parts", f"{PARTS}.PartFiles.load", f"{LOAD}.assemble", f"{LOAD}.held_bytes")
OF_USE = (f"{EXTRAS}.check_rows", f"{EXTRAS}.intercept", f"{EXTRAS}.pad_small_linears")
OF_A_REFINER = (
    "deployments.pipelines.ensemble.share_equal_parts",
    "deployments.pipelines.diffusers_model._template",
)
OF_AN_INSTANCE = tuple(
    f"{INSTANCE}.{name}"
    for name in ("check_rows", "DiffusersModel", "BatchedLora", "LoraCache", "compile_blocks")
)
STEPS = [
    *(("a ControlNet", step) for step in (*OF_A_MODULE, *OF_USE)),
    *(("the refiner", step) for step in (*OF_A_PIPELINE, *OF_A_REFINER, *OF_USE)),
    *(("a preprocessor", step) for step in (*OF_A_MODULE, "deployments.models.preprocessors.load_processor")),
    *(("a model", step) for step in (*OF_A_PIPELINE, *OF_AN_INSTANCE, *OF_USE[1:])),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelLoader, ModelInstance]]:
    folder = tmp_path_factory.mktemp("depth")
    save_depth_estimator(folder)
    depth = Weights(path=str(folder), dtype="float32")
    controls = {
        "canny": ControlNet(weights=CANNY, licence=LICENCE),
        "depth": ControlNet(weights=CANNY, preprocessor=depth, licence=LICENCE),
    }
    base = card("tiny-sdxl-base").model_copy(update={"refiner": "tiny-sdxl-refiner", "controls": controls})
    made = loader(base, card("tiny-sd15"), refiner=card("tiny-sdxl-refiner"))
    model = made._load_once(base.id)
    yield made, model
    model.unload()


def works(loader: ModelLoader, model: ModelInstance) -> dict[str, Callable[[], object]]:
    return {
        "a ControlNet": lambda: model.extras.load(CANNY),
        "the refiner": lambda: model.extras.load("refiner"),
        "a preprocessor": model.extras.preprocessors["depth"].load,
        "a model": lambda: loader._load_once("tiny-sd15"),
    }


@pytest.mark.parametrize(("what", "step"), STEPS)
def test_a_load_that_fails_leaves_the_account_and_the_model_as_they_were(
    what: str,
    step: str,
    loaded: tuple[ModelLoader, ModelInstance],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, model = loaded
    before, modules, seams = account(made.memory), model.pipelines.modules, model.seams
    reached = []

    def failing(*_arguments: Any, **_options: Any) -> Any:
        reached.append(step)
        raise torch.OutOfMemoryError if step.endswith("PartFiles.load") else Injected

    monkeypatch.setattr(step, failing)
    with pytest.raises((Injected, WeftError)):
        works(made, model)[what]()

    assert reached
    assert account(made.memory) == before
    assert model.pipelines.modules == modules
    assert model.seams == seams
    assert sum(map(len, made.admission._evictors.values())) == 2, "its LoRAs, and the extras"


def test_after_failures_everything_can_be_loaded_and_is_released(
    loaded: tuple[ModelLoader, ModelInstance],
) -> None:
    made, model = loaded
    before = account(made.memory)

    for what, work in works(made, model).items():
        held = made.memory.held["weights"]
        result = work()
        assert made.memory.held["weights"] > held, what
        if isinstance(result, ModelInstance):
            result.unload()
            made.memory.release_model("tiny-sd15")
    for need in (CANNY, "refiner"):
        model.extras._remove(need)  # type: ignore[arg-type]
    model.extras.preprocessors["depth"].unload()

    assert account(made.memory) == before


def test_two_revisions_and_roles_of_the_same_weights_are_counted_apart() -> None:
    admission = MemoryAdmission(DeviceMemory(lambda: None))
    weights = [Weights(repo="a/net", revision=revision) for revision in ("main", "v2")]
    variants = [Weights(repo="a/net", variant="fp16"), Weights(repo="a/net", dtype="float32")]

    for what in ("the ControlNet", "the preprocessor"):
        for one in (*weights, *variants):
            MemoryBeside(admission, "m", what).admit(one)(LoadBytes(3))
    assert admission.memory.held["weights"] == 8 * 3
    MemoryBeside(admission, "m", "the ControlNet").release(weights[0])

    assert admission.memory.held["weights"] == 7 * 3


# --- what a load needs ------------------------------------------------------------------------------------


def test_what_loading_takes_may_use_the_space_for_the_model_s_own_picture() -> None:
    """It makes none yet: 4 of weights and the larger of 3 and 2 beside them."""
    memory = DeviceMemory(lambda: 7)

    assert not memory.claim("weights", ("a", PIPELINE), 5, loading=3, picture=2)
    assert memory.claim("weights", ("a", PIPELINE), 4, loading=3, picture=2)
    assert memory.working_bytes == 3
    assert memory.claim("weights", ("a", PIPELINE), 4)

    assert memory.working_bytes == 2


def test_what_loading_takes_is_beside_the_pictures_of_other_models() -> None:
    memory = DeviceMemory(lambda: 12)
    memory.claim("weights", ("a", PIPELINE), 3, picture=2)

    assert not memory.claim("weights", ("b", PIPELINE), 5, loading=3, picture=2)
    assert memory.claim("weights", ("b", PIPELINE), 4, loading=3, picture=2)
    assert memory.working_bytes == 2 + 3


class _Live(TorchDispatchMode):
    """Bytes of the storages that functions of torch have made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if type(tensor) in (torch.Tensor, nn.Parameter):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            self._seen.discard(key)

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    "kind", [kind for kind in QUANTISING_BYTES if kind not in ("fp8_dynamic", "fp8_cast")]
)
def test_quantising_a_layer_takes_about_the_bytes_that_are_claimed_for_it(
    kind: Quantisation, dtype: Any
) -> None:
    wanted: torch.dtype = getattr(torch, dtype)
    net = nn.Sequential(nn.Linear(512, 512, bias=False, dtype=wanted).requires_grad_(requires_grad=False))
    old_form, live = 512 * 512 * wanted.itemsize, _Live()

    with live:
        quantise(net, PartPlan("part", dtype, quantisation=kind))

    beside_new_form = old_form + live.peak - live.now
    claimed = quantising_bytes(kind, wanted, 512 * 512)
    assert beside_new_form <= claimed
    assert beside_new_form > 0.7 * claimed


def test_a_quantised_model_is_admitted_by_its_quantised_size() -> None:
    """And not by what its card states for its weights in their own dtype."""
    plain = card("tiny-flux-schnell")
    whole = pipeline_bytes(plain.weights, CPU, plan=plan_of(plain, loader(plain).machine)).held
    forms = {"transformer": "int8", "text_encoder_2": "int8"}
    picture = 4 * MIB
    quantised = card("tiny-flux-schnell", quantisation=forms)
    quantised = quantised.model_copy(update={"vram_gib": (whole + picture) / GIB})
    needed = loader(quantised)._needed(quantised.id)

    model = (made := loader(quantised))._load_once(quantised.id)

    assert needed.held == pytest.approx(model.size_bytes, rel=0.05)
    assert needed.held < whole / 1.5
    assert needed.picture == pytest.approx(picture, rel=0.1)
    assert 0 < needed.loading < whole
    assert made.memory.working_bytes == pytest.approx(picture, rel=0.1)
    assert made.memory._loading == {}
    model.unload()


@pytest.mark.parametrize("enough", [True, False])
def test_a_quantised_model_is_loaded_where_it_fits_with_what_quantising_takes(enough: bool) -> None:
    probe = card("tiny-flux-schnell", quantisation={"transformer": "int8", "text_encoder_2": "int8"})
    needed = loader(probe)._needed(probe.id)
    budget = needed.held + needed.loading - (0 if enough else 2 * MIB // 10)
    limited = card(
        "tiny-flux-schnell",
        quantisation={"transformer": "int8", "text_encoder_2": "int8"},
        memory_gib=budget / GIB,
    )
    made = loader(limited)

    if not enough:
        with pytest.raises(OutOfMemory, match="while it is loaded"):
            made._load_once(limited.id)
        assert made.memory.held["weights"] == 0
        return
    model = made._load_once(limited.id)
    assert made.memory.held["weights"] == model.size_bytes <= budget
    model.unload()
