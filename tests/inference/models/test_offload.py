"""Parts whose weights are on the device only while they compute give the bits that they give there.

On a CPU a copy "on the device" is a second block of memory. What a module holds on the host is NaN in these
tests, so that a weight that is used while it is not on the device changes every picture.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.step_scheduler import StepScheduler
from deployments.models import offload as offloading
from deployments.models.device_memory import DeviceMemory
from deployments.models.load import load_pipeline
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_extras import _weights_of
from deployments.models.model_instance import ModelInstance
from deployments.models.model_memory import LoadBytes, held_bytes, weights_bytes
from deployments.models.offload import OnDemand, blocks_of, offload, offloaded_part
from deployments.models.packed_weights import PackedWeights
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.planning.machine import Machine
from deployments.planning.plan import PartPlan, Placement, Plan, plan_of
from deployments.protocol.card import Quantisation, load_card
from deployments.protocol.errors import OutOfMemory
from deployments.protocol.request import ResolvedEdit, ResolvedRequest, Task
from tests.inference.engine.exactness import Bench

CPU = torch.device("cpu")
CARDS = Path(__file__).parents[3] / "configs/models"
ENCODERS = ("text_encoder", "text_encoder_2")


def blank(weight: Tensor) -> Tensor:
    return torch.full_like(weight, float("nan") if weight.is_floating_point() else 0)


def is_blank(weight: Tensor) -> bool:
    return bool(weight.isnan().all())


@pytest.fixture(autouse=True)
def _host_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def use_host(packed: PackedWeights) -> None:
        packed.use([blank(weight) for weight in packed._on_host])

    monkeypatch.setattr(PackedWeights, "use_host", use_host)
    monkeypatch.setattr(offloading, "SMALL_BYTES", 0)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def planned(denoiser: Placement, encoders: Placement) -> Plan:
    return Plan(
        "float32",
        (
            PartPlan("transformer", "float32", denoiser, resident_blocks=1),
            PartPlan("unet", "float32", denoiser, resident_blocks=1),
            *(PartPlan(name, "float32", encoders) for name in ENCODERS),
        ),
    )


class OffloadedBench(Bench):
    """Intercepts as a loaded model does."""

    def _intercept(self) -> None:
        if not self.intercepted:
            intercept(self.modules, weights_of=_weights_of)
            pad_small_linears(self.modules)
        self.intercepted = True


def bench(name: str, plan: Plan | None = None) -> Bench:
    weights = load_card(CARDS / f"{name}.yaml").weights.model_copy(update={"dtype": "float32"})
    pipeline = load_pipeline(weights, CPU, plan=plan)
    requests = [
        ResolvedRequest(
            model="tiny",
            prompt=("a red circle", "two stars")[seed % 2],
            width=64,
            height=64,
            num_inference_steps=2 + seed % 2,
            guidance_scale=3.0,
            seed=seed,
            max_sequence_length=32,
            edit=ResolvedEdit(image=b"", strength=1.0) if seed == 2 else None,
        )
        for seed in range(4)
    ]
    model = DiffusersModel(pipeline, (Task.t2i, Task.i2i))
    return OffloadedBench(requests, exact="strict", model=model, decode=True)


@pytest.fixture(scope="module", params=["tiny-flux-dev", "tiny-sd15"])
def on_device(request: pytest.FixtureRequest) -> tuple[str, Bench]:
    return request.param, bench(request.param)


PLACEMENTS: Sequence[tuple[Placement, Placement]] = (
    ("device", "on_demand"),
    ("streamed", "streamed"),
    ("sequential", "sequential"),
)


@pytest.mark.parametrize("placements", PLACEMENTS)
def test_a_batch_has_the_bits_of_requests_alone_on_the_device(
    on_device: tuple[str, Bench], placements: tuple[Placement, Placement]
) -> None:
    name, plain = on_device
    offloaded = bench(name, planned(*placements))

    fibers = offloaded.together(offloaded.requests)

    for request, fiber in zip(offloaded.requests, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert fiber.result.same_bits(plain.expected(request))
    assert offloaded.rows == plain.rows


@pytest.mark.parametrize(
    ("denoiser", "encoder", "quantisation"),
    [
        ("streamed", "on_demand", "int8"),
        ("sequential", "sequential", "fp8"),
        ("streamed", "streamed", "fp8_cast"),
        ("device", "on_demand", "nf4"),
    ],
)
def test_quantised_weights_may_live_on_the_host(
    denoiser: Placement, encoder: Placement, quantisation: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # NaN cannot be written to weights of all forms
    monkeypatch.setattr(offloading, "SMALL_BYTES", 0)
    places = planned(denoiser, encoder)
    forms = tuple(replace(part, quantisation=quantisation) for part in places.parts if part.name != "unet")
    on_device = tuple(replace(part, placement="device") for part in forms)
    plain = bench("tiny-flux-dev", replace(places, parts=on_device))
    moving = bench("tiny-flux-dev", replace(places, parts=forms))

    fibers = moving.together(moving.requests)

    for request, fiber in zip(moving.requests, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert fiber.result.same_bits(plain.expected(request))


@pytest.mark.parametrize("placement", ["streamed", "sequential"])
def test_a_part_holds_less_of_the_device_than_it_has_weights(placement: Placement) -> None:
    transformer = bench("tiny-flux-dev", planned(placement, "device")).model._pipeline.transformer
    part = offloaded_part(transformer)

    assert part is not None
    on_host = [weight for weight in transformer.parameters() if is_blank(weight)]
    resident = sum(weight.nbytes for weight in transformer.parameters() if not is_blank(weight))
    assert resident < part.held_bytes == held_bytes([transformer])
    assert part.held_bytes < weights_bytes([transformer])
    assert part.host_bytes >= sum(weight.nbytes for weight in on_host)
    assert not is_blank(next(transformer.parameters())), "diffusers takes its device for that of the part"


class Blocks(nn.Module):
    """A list of blocks between two layers."""

    def __init__(self, blocks: int = 4, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(blocks)])
        self.order = list(range(blocks))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index in self.order:
            x = self.blocks[index](x)
            if self.fails:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return x


def reference(module: Blocks, order: Sequence[int], x: Tensor) -> Tensor:
    module.order = list(order)
    return module(x)


@pytest.mark.parametrize("resident", [0, 1, 4])
def test_blocks_may_compute_in_any_order(resident: int) -> None:
    module, x = Blocks(), torch.linspace(-1, 1, 32).expand(2, 32)
    orders = [(0, 1, 2, 3), (0, 1, 2, 3), (3, 1, 1, 0, 2), (2,), (0, 1, 2, 3), (1, 3)]
    expected = [reference(module, order, x) for order in orders]

    offload(module, PartPlan("blocks", "float32", "streamed", resident_blocks=resident), CPU)

    assert blocks_of(module) == list(module.blocks)
    for order, answer in zip(orders, expected, strict=True):
        assert torch.equal(reference(module, order, x), answer)
    resident_now = [not is_blank(block.weight) for block in module.blocks]
    assert all(resident_now[:resident])
    assert sum(resident_now) <= resident + 1, "and the one that computed last"


def test_a_forward_that_fails_midway_leaves_nothing_half_moved() -> None:
    module, x = Blocks(), torch.linspace(-1, 1, 32).expand(2, 32)
    expected = module(x)
    offload(module, PartPlan("blocks", "float32", "streamed"), CPU)
    module(x)

    module.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        module(x)
    module.fails = False

    assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)


class Encoder(Blocks):
    """Counts what is copied for it."""

    config = None


def engine_for(module: nn.Module) -> Engine:
    part = offloaded_part(module)
    assert isinstance(part, OnDemand)
    intercept([module], weights_of=lambda _module: part)
    return Engine(StepScheduler(8), exact="off")


def run(engine: Engine, works: Sequence[Any]) -> list[Fiber]:
    fibers = [Fiber(work) for work in works]
    for fiber in fibers:
        engine.start(fiber)
    while not engine.idle:
        engine.step()
    return fibers


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of copies to the device."""
    made: list[int] = []
    copy_to = PackedWeights.copy_to

    def counted(packed: PackedWeights, block: Tensor) -> None:
        made.append(packed.size_bytes)
        copy_to(packed, block)

    monkeypatch.setattr(PackedWeights, "copy_to", counted)
    return made


def test_calls_that_wait_share_one_copy_which_is_dropped_after_them(copies: list[int]) -> None:
    module = Encoder()
    inputs = [torch.full((1, 32), float(value)) for value in range(3)]
    expected = [module(x) for x in inputs]
    offload(module, PartPlan("text_encoder", "float32", "on_demand"), CPU)
    engine = engine_for(module)

    fibers = run(engine, [lambda x=x: module(x) for x in inputs])

    assert [torch.equal(f.result, e) for f, e in zip(fibers, expected, strict=True)] == [True] * 3
    assert len(copies) == 1
    assert all(is_blank(weight) for weight in module.parameters())
    run(engine, [lambda: module(inputs[0])])
    assert len(copies) == 2


def test_a_call_outside_of_the_engine_drops_its_copy() -> None:
    module = Encoder()
    offload(module, PartPlan("text_encoder", "float32", "on_demand"), CPU)
    engine_for(module)

    module(torch.zeros(1, 32))

    assert all(is_blank(weight) for weight in module.parameters())


def test_too_little_memory_for_the_copy_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Encoder()
    expected = module(torch.ones(1, 32))
    offload(module, PartPlan("text_encoder", "float32", "on_demand"), CPU)
    engine = engine_for(module)

    def full(*_arguments: Any, **_options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.12 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(offloading.torch, "empty", full)
        (fiber,) = run(engine, [lambda: module(torch.ones(1, 32))])
    assert "ran out of memory in Encoder.forward" in str(fiber.failure)
    assert all(is_blank(weight) for weight in module.parameters())

    (fiber,) = run(engine, [lambda: module(torch.ones(1, 32))])
    assert torch.equal(fiber.result, expected)


def test_a_closed_part_keeps_nothing_on_the_device() -> None:
    module = Blocks()
    offload(module, PartPlan("blocks", "float32", "streamed"), CPU)
    module(torch.zeros(1, 32))
    part = offloaded_part(module)
    assert part is not None

    part.close()

    assert all(is_blank(block.weight) for block in module.blocks)
    assert not part._places  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("offload", "encoder", "denoiser", "vae"),
    [
        ("none", "device", "device", "device"),
        ("text_encoders", "on_demand", "device", "device"),
        ("sequential", "sequential", "sequential", "on_demand"),
    ],
)
def test_a_card_says_where_weights_live(offload: str, encoder: str, denoiser: str, vae: str) -> None:
    card = load_card(CARDS / "flux.1-dev.yaml")
    card = card.model_copy(update={"serving": card.serving.model_copy(update={"offload": offload})})
    l40s = Machine("NVIDIA L40S", "cuda", 45 * 2**30, (8, 9), 256 * 2**30)

    plan = plan_of(card, l40s)

    assert plan.part("text_encoder_2").placement == encoder
    assert plan.part("transformer").placement == denoiser
    assert plan.part("vae").placement == vae
    on_cpu = plan_of(card, Machine("CPU", "cpu"))
    assert {on_cpu.part(name).placement for name in ("text_encoder_2", "transformer")} == {"device"}


@pytest.mark.parametrize("placement", ["on_demand", "streamed", "sequential"])
def test_a_part_that_is_dropped_frees_its_memory_at_once(placement: Placement) -> None:
    """As where a model is refused after its first parts are loaded."""
    module = Blocks()
    offload(module, PartPlan("blocks", "float32", placement), CPU)
    module(torch.zeros(1, 32))
    found = offloaded_part(module)
    assert found is not None
    part = weakref.ref(found)

    gc.disable()
    try:
        del module, found
        assert part() is None
    finally:
        gc.enable()


def test_a_placement_that_a_part_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="vae cannot be placed as 'cpu'"):
        offload(Blocks(), PartPlan("vae", "float32", "cpu"), CPU)


def test_the_account_has_what_is_held_and_space_for_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    card = load_card(CARDS / "tiny-flux-dev.yaml")
    plan = planned("streamed", "on_demand")
    monkeypatch.setattr("deployments.models.model_instance.plan_of", lambda *_arguments: plan)
    memory = DeviceMemory(lambda: 2**30)
    model = ModelInstance(card, Machine("CPU", "cpu"), None, CPU, admission=MemoryAdmission(memory))
    parts = model.pipelines._pipeline.components
    used = {name: offloaded_part(parts[name]).used_bytes for name in ENCODERS}  # type: ignore[union-attr]

    assert model.size_bytes == held_bytes([part for part in parts.values() if isinstance(part, nn.Module)])
    assert model.size_bytes < weights_bytes([part for part in parts.values() if isinstance(part, nn.Module)])
    assert memory.working_bytes == max(used.values())

    model.unload()
    memory.release_model(card.id)
    assert memory.held["weights"] == memory.working_bytes == 0
    moving = blocks_of(parts["transformer"])[1:]
    assert moving
    assert all(is_blank(weight) for block in moving for weight in block.parameters())


def test_too_little_memory_for_an_encoder_is_refused_before_weights_are_read() -> None:
    weights = load_card(CARDS / "tiny-flux-dev.yaml").weights
    asked: list[int] = []

    def refuse(size: LoadBytes) -> None:
        asked.append(size.held)
        raise OutOfMemory("no")

    for plan in (planned("device", "device"), planned("device", "on_demand")):
        with pytest.raises(OutOfMemory):
            load_pipeline(weights.model_copy(update={"dtype": "float32"}), CPU, plan=plan, admit=refuse)

    pipeline = load_pipeline(weights, CPU, plan=planned("device", "device"))
    sizes = [weights_bytes([getattr(pipeline, name)]) for name in ENCODERS]
    saved = asked[0] - asked[1]
    assert saved == pytest.approx(min(sizes), rel=0.01), "one encoder at a time is on the device"
