"""LoRAs come and go in compiled blocks: no other graph, and the bits that each request has alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.lora_rows import run_with_lora_rows
from deployments.loras.batched_lora import BatchedLora
from deployments.loras.lora_set import LoraSet, combine
from deployments.loras.source import read_lora
from deployments.models.compile import compile_blocks, repeated_blocks
from deployments.protocol.errors import ModelFailed
from tests.inference import tiny
from tests.inference.lora_files import file_of, random_lora

RANKS = (4, 4, 20)
Own = Sequence[LoraSet | None]


class FluxWithLoras:
    """A FLUX transformer of two blocks, compiled or not, and LoRAs for it."""

    def __init__(self, weights: dict[str, Tensor] | None = None, *, compiled: bool) -> None:
        pipeline: Any = tiny.flux(guidance=False)
        self.config = dict(pipeline.transformer.config) | {"num_layers": 2, "num_single_layers": 0}
        self.transformer = FluxTransformer2DModel.from_config(self.config).eval()
        if weights is not None:
            self.transformer.load_state_dict(weights)
        pipeline.transformer = self.transformer
        pad_small_linears([self.transformer])
        self.loras = BatchedLora({"transformer": self.transformer}, deterministic=True)
        if compiled:
            blocks = repeated_blocks(pipeline)
            self.loras.make_graph_layers(blocks)
            compile_blocks(blocks)
        self._pipeline = pipeline

    def lora_sets(self) -> list[LoraSet]:
        sets = []
        for seed, rank in enumerate(RANKS):
            file = file_of(random_lora(self._pipeline, ["transformer"], rank=rank, seed=seed))
            factors = read_lora(file, self._pipeline).factors
            self.loras.hook(factors)
            sets.append(combine([(factors, 0.7)]))
        return sets

    def run(self, rows: Sequence[int], lora_sets: Own, tokens: int = 22) -> Tensor:
        def noise(*shape: int) -> Tensor:
            return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r)) for r in rows])

        given: dict[str, Any] = {
            "hidden_states": noise(tokens, self.config["in_channels"]),
            "encoder_hidden_states": noise(9, self.config["joint_attention_dim"]),
            "pooled_projections": noise(self.config["pooled_projection_dim"]),
            "timestep": torch.full((len(rows),), 0.5),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(9, 3),
            "return_dict": False,
        }
        output = run_with_lora_rows(lora_sets, [1] * len(rows), lambda: self.transformer(**given))
        result: Tensor = output[0]
        return result


@pytest.fixture
def compiled() -> Iterator[FluxWithLoras]:
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        made = FluxWithLoras(compiled=True)
        made.run([0], [None])  # one row, then several: what the warm-up of a replica runs
        made.run([0, 1], [None, None])
        yield made
    made.loras.unhook()
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++, which is not here")
def test_joins_leaves_and_other_loras_make_no_graph_and_change_no_bit(compiled: FluxWithLoras) -> None:
    graphs = counters["stats"]["unique_graphs"]
    plain = FluxWithLoras(compiled.transformer.state_dict(), compiled=False)
    one, two, large = compiled.lora_sets()
    batches: list[tuple[list[int], Own]] = [
        ([0], [one]),
        ([0, 1], [one, None]),
        ([0, 1, 2], [one, two, large]),
        ([2, 1], [two, two]),
        ([1, 3, 2, 0], [None, large, None, two]),
    ]
    same = dict(zip((one, two, large), plain.lora_sets(), strict=True))

    for rows, lora_sets in batches * 2:
        together = compiled.run(rows, lora_sets)

        eager = plain.run(rows, [same[own] if own is not None else None for own in lora_sets])
        assert torch.allclose(together, eager, rtol=1e-4, atol=1e-4)
        for output, row, own in zip(together, rows, lora_sets, strict=True):
            assert torch.equal(output, compiled.run([row], [own])[0])
            assert own is None or not torch.allclose(output, compiled.run([row], [None])[0], atol=1e-3)
    compiled.run([0, 1, 2], [one, None, large], tokens=26)

    assert graphs == 2, "for one row and for several, of both blocks"
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_blocks_with_convolutions_are_not_compiled_with_loras() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1))

    with pytest.raises(ModelFailed, match=r"Sequential has convolutions.*set lora: none in the card"):
        BatchedLora({}, deterministic=True).make_graph_layers([block])


def test_layers_are_as_they_were_afterwards() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pad_small_linears([block[1]])
    padded, x = block[1].forward, torch.randn(2, 4)
    expected = block(x)
    loras = BatchedLora({"transformer": block}, deterministic=True)

    with torch.inference_mode():
        loras.make_graph_layers([block])
        operators = block(x)
    loras.unhook()

    assert torch.equal(operators, expected)
    assert "forward" not in vars(block[0])
    assert block[1].forward is padded
