"""Layers that read the same tensor are recognised, and computed together only while they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.lora_rows import run_with_lora_rows
from deployments.lora_format.layer_names import LayerKey
from deployments.loras.batched_lora import BatchedLora
from deployments.loras.layer_change import LowRankFactors
from deployments.loras.lora_set import LoraSet, combine
from deployments.loras.shared_inputs import SharedInputs

Q, K, V = (("unet", name) for name in "qkv")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def learnt(readings: Callable[[Callable[[LayerKey, Tensor], None]], None]) -> SharedInputs:
    shared = SharedInputs()
    recorder = shared.begin("unet", lambda _: 1)
    assert recorder is not None
    readings(recorder.note)
    assert shared.begin("unet", lambda key: {Q: 2, K: 1, V: 2}[key]) is None, "once is enough"
    return shared


def test_readers_of_one_tensor_are_a_group_ordered_by_the_width_of_their_outputs() -> None:
    def readings(note: Callable[[LayerKey, Tensor], None]) -> None:
        x = torch.ones(3)
        note(Q, x), note(K, x), note(V, x)
        note(("unet", "out"), x.clone())

    shared = learnt(readings)

    assert dict(shared.groups("unet")) == {key: [K, Q, V] for key in (Q, K, V)}
    shared.separate(Q)
    assert not shared.groups("unet")


def test_a_tensor_that_changed_or_a_layer_that_ran_twice_makes_no_group() -> None:
    def readings(note: Callable[[LayerKey, Tensor], None]) -> None:
        x, twice = torch.ones(3), torch.ones(2)
        note(Q, x), note(K, x.add_(1))
        note(V, twice), note(("unet", "twice"), twice), note(("unet", "twice"), twice)

    assert not learnt(readings).groups("unet")


class Projections(nn.Module):
    """Two layers that read the same tensor, unless `apart`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x + 1 if self.apart else x)], dim=-1)


def a_set(module: nn.Module, seed: int) -> LoraSet:
    torch.manual_seed(seed)
    layers = {key: module.get_submodule(key[1]) for key in (Q, K)}
    return combine(
        [
            (
                {
                    key: LowRankFactors(torch.randn(4, 8), torch.randn(4, layer.weight.shape[0]).t(), 0.5)  # type: ignore[union-attr]
                    for key, layer in layers.items()
                },
                1.0,
            )
        ]
    )


def merged(module: Projections, lora_set: LoraSet, x: Tensor) -> Tensor:
    parts = []
    for key, layer, own in ((Q, module.q, x), (K, module.k, x + 1 if module.apart else x)):
        (part,) = lora_set.layers[key].parts
        weight = layer.weight + part.scale * part.b @ part.a
        parts.append(nn.functional.linear(own, weight, layer.bias))
    return torch.cat(parts, dim=-1)


def test_a_module_that_ceases_to_share_a_tensor_is_computed_as_it_is_called() -> None:
    module = Projections()
    batched_lora = BatchedLora({"unet": module}, deterministic=True)
    batched_lora.hook([Q, K])
    lora_sets = [a_set(module, 1), a_set(module, 2)]
    x = torch.randn(3, 20, 8)

    for module.apart in (False, False, False, True, True, False):
        output = run_with_lora_rows([lora_sets[0], None, lora_sets[1]], [1, 1, 1], lambda: module(x))

        for row, lora_set in ((0, lora_sets[0]), (2, lora_sets[1])):
            expected = merged(module, lora_set, x[row : row + 1])
            alone = run_with_lora_rows([lora_set], [1], lambda row=row: module(x[row : row + 1]))  # type: ignore[misc]
            assert torch.allclose(output[row : row + 1], expected, atol=1e-5)
            assert torch.equal(output[row : row + 1], alone)
        assert torch.equal(output[1], torch.cat([module.q(x[1:2]), module.k(x[1:2] + module.apart)], -1)[0])


def test_layers_of_one_tensor_are_computed_by_one_pair_of_products() -> None:
    module = Projections()
    batched_lora = BatchedLora({"unet": module}, deterministic=False)
    batched_lora.hook([Q, K])
    lora_sets = [a_set(module, 1), a_set(module, 2)]
    x = torch.randn(2, 20, 8)
    counts = []

    for _ in range(3):
        with torch.profiler.profile() as profile:
            run_with_lora_rows(lora_sets, [1, 1], lambda: module(x))
        counts.append({event.key: event.count for event in profile.key_averages()})

    assert [count["aten::bmm"] for count in counts] == [2, 1, 1]
    assert [count["aten::baddbmm_"] for count in counts] == [2, 2, 2], "of two widths"
