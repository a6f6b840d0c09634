"""Parts whose weights live on the host, on the simulated device, for test_simulated_offload.py.

python -m tests.device_sim.offloaded_programs prints what the device counted for each program, as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deployments.models.offload import OnDemand, blocks_of, layers_of, offload, offloaded_part
from deployments.planning.plan import PartPlan, Placement
from tests.device_sim import patches
from tests.device_sim.costs import KINDS
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.small_programs import count

BLOCKS, WIDTH = 6, 512
CUDA = torch.device("cuda")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Blocks between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)  # type: ignore[no-any-return]


def offloaded(placement: Placement, resident_blocks: int = 0) -> tuple[Transformer, Any]:
    module = Transformer().requires_grad_(False)
    offload(module, PartPlan("transformer", "float32", placement, resident_blocks=resident_blocks), CUDA)
    return module, offloaded_part(module)


def weights() -> int:
    return sum(weight.nbytes for weight in Transformer().parameters())


def runs(placement: Placement, resident_blocks: int = 0) -> dict[str, Any]:
    """Three forwards on the engine's stream: bytes before them and beyond those at most."""
    cuda: Any = torch.cuda
    module, part = offloaded(placement, resident_blocks)
    loaded = cuda.memory_allocated()
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    cuda.reset_peak_memory_stats()
    with cuda.stream(stream):
        x = torch.zeros(1, WIDTH, device="cuda")
        for _ in range(3):
            x = module(x)
        peak = cuda.max_memory_allocated() - loaded
        stream.synchronize()
    part.close()
    moving = blocks_of(module) if placement == "streamed" else layers_of(module)
    return {
        "device": str(x.device),
        "loaded": loaded,
        "held": part.held_bytes,
        "peak": peak,
        "weights": weights(),
        "units": len(moving),
    }


def streams_blocks() -> Any:
    return runs("streamed")


def keeps_some_blocks() -> Any:
    return runs("streamed", 3)


def copies_each_layer() -> Any:
    return runs("sequential")


def copies_on_demand() -> Any:
    cuda: Any = torch.cuda
    module, part = offloaded("on_demand")
    assert isinstance(part, OnDemand)
    before = cuda.memory_allocated()
    part.bring()
    during = cuda.memory_allocated()
    out = module(torch.zeros(1, WIDTH, device="cuda"))
    part.release()
    after = cuda.memory_allocated() - out.nbytes
    return {"before": before, "during": during, "after": after, "used": part.used_bytes, "weights": weights()}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def computes_before_the_copy_is_done() -> Any:
    part: Any = type(offloaded("streamed")[1])
    with replaced(part, "_wait_for", lambda _self, _place: None):
        return runs("streamed")


def copies_over_what_still_computes() -> Any:
    cuda: Any = torch.cuda
    with replaced(cuda.Stream, "wait_event", lambda _self, _event: None):
        module, part = offloaded("streamed")
        x = torch.zeros(1, WIDTH, device="cuda")
        with replaced(type(part), "_wait_for", lambda _self, place: place.copied.synchronize()):
            module(module(x))
        cuda.synchronize()
        part.close()


PROGRAMS: tuple[Callable[[], Any], ...] = (
    streams_blocks,
    keeps_some_blocks,
    copies_each_layer,
    copies_on_demand,
    computes_before_the_copy_is_done,
    copies_over_what_still_computes,
)


def main() -> None:
    device = SimulatedDevice(KINDS["a10g"])
    patches.install(device)
    print(json.dumps({program.__name__: count(device, program) for program in PROGRAMS}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
