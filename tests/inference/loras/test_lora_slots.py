"""Factors of a batch in slots: only those that changed are written, and memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.loras import lora_slots
from deployments.loras.layer_change import LowRankFactors
from deployments.loras.lora_set import LoraSet, combine
from deployments.loras.lora_slots import Block, KeptSlots, LoraSlots

LAYERS = [("transformer", name) for name in ("q", "k", "v", "out")]
GROUPS = dict.fromkeys(LAYERS[:3], LAYERS[:3])


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def factors(rank: int, seed: int, scale: float = 1.0) -> LowRankFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 6, generator=generator), torch.randn(rank, 5, generator=generator)
    return LowRankFactors(a, b.t(), scale)


def lora_set(seed: int, rank: int = 8, weight: float = 1.0) -> LoraSet:
    return combine([({layer: factors(rank, seed + i) for i, layer in enumerate(LAYERS)}, weight)])


class Written(TorchDispatchMode):
    """Counts the tensors that are copied into slots."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.count += len(args[0])
        return func(*args, **(kwargs or {}))


def get(kept: KeptSlots, sets: Sequence[LoraSet]) -> LoraSlots:
    return kept.get("transformer", sets, LAYERS, GROUPS)


def block_of(slots: LoraSlots, name: str) -> Block:
    block = slots.block(("transformer", name))
    assert block is not None
    return block


def difference(block: Block, name: str, slot: int) -> torch.Tensor:
    """What a slot adds to a layer's weight."""
    key = ("transformer", name)
    kind, index = block.places[key]
    return block.b[kind][index, slot].t() @ block.a[slot, :, block.plan.layers.index(key)]


def expected(one: LoraSet, name: str) -> torch.Tensor:
    total = one.layers["transformer", name]
    return sum((part.scale * part.b @ part.a for part in total.parts), torch.zeros(5, 6))


def test_layers_that_read_the_same_tensor_share_a_block_and_ranks_are_padded_to_the_largest() -> None:
    sets = [
        combine([({layer: factors(3, 1) for layer in LAYERS}, 0.5)]),
        combine([({layer: factors(9, 2, 2.0) for layer in LAYERS}, -1.0)] * 2),
    ]

    slots = get(KeptSlots(), sets)

    assert block_of(slots, "q") is block_of(slots, "v") is not block_of(slots, "out")
    assert block_of(slots, "q").plan.ranks == (8, 32)
    assert block_of(slots, "q").a.shape == (2, 32, 3, 6)
    for slot, one in enumerate(sets):
        for name in ("q", "k", "v", "out"):
            assert torch.allclose(
                difference(block_of(slots, name), name, slot), expected(one, name), atol=1e-5
            )


def test_layers_that_not_all_sets_change_have_a_block_of_their_own() -> None:
    whole = lora_set(0)
    part = combine([({layer: factors(8, 9) for layer in LAYERS[:1]}, 1.0)])

    slots = get(KeptSlots(), [whole, part])

    assert block_of(slots, "q").plan.slots == (0, 1)
    assert block_of(slots, "k").plan.slots == block_of(slots, "out").plan.slots == (0,)
    assert get(KeptSlots(), [part]).block(("transformer", "out")) is None


def test_a_batch_in_which_one_set_changed_writes_the_factors_of_that_one() -> None:
    kept, sets = KeptSlots(), [lora_set(0), lora_set(10), lora_set(20, rank=5, weight=0.5)]
    with Written() as first:
        before = get(kept, sets)
    kept.forget(sets[1])
    sets[1] = lora_set(30, rank=7, weight=2.0)

    with Written() as changed:
        after = get(kept, sets)
    with Written() as same:
        again = get(kept, sets)

    assert (first.count, changed.count, same.count) == (24, 8, 0)
    assert again is after
    assert block_of(after, "q").a.data_ptr() == block_of(before, "q").a.data_ptr()
    for slot, one in enumerate(sets):
        for name in ("q", "k", "v", "out"):
            assert torch.allclose(
                difference(block_of(after, name), name, slot), expected(one, name), atol=1e-5
            )


def test_batches_that_take_turns_keep_their_slots() -> None:
    kept, one, other = KeptSlots(), [lora_set(0)], [lora_set(10)]
    get(kept, one), get(kept, other)

    with Written() as turns:
        for _ in range(3):
            get(kept, one), get(kept, other)
    get(kept, [lora_set(20)])

    assert turns.count == 0
    assert kept.size_bytes == 2 * get(kept, one).size_bytes, "the third took over the slots of another"


def test_slots_are_freed_with_their_last_set_and_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, sets = KeptSlots(), [lora_set(0), lora_set(10)]
    get(kept, sets)
    kept.forget(sets[0])
    held = kept.size_bytes
    kept.forget(sets[1])
    freed = kept.size_bytes

    monkeypatch.setattr(lora_slots, "MAX_KEPT_BYTES", held)
    get(kept, sets)
    larger = get(kept, [*sets, lora_set(20)])

    assert (held > 0, freed) == (True, 0)
    assert kept.size_bytes == larger.size_bytes, "the current batch is kept though it is over the limit"
