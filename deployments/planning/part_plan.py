"""How one component of a pipeline runs: its dtype, its place, the form of its weights, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deployments.planning.gguf_needs import GgufNeeds
from deployments.protocol.card import Dtype, Quantisation
from deployments.protocol.memory_needs import PartNeeds

# device: always on it. on_demand: in memory of the host, copied to the device for each use and dropped there
# after it. cpu: computes on the CPU. streamed: blocks beyond `resident_blocks` are copied to the device while
# others compute. sequential: each layer is copied when it computes
Placement = Literal["device", "on_demand", "cpu", "streamed", "sequential"]

DENOISERS = ("transformer", "transformer_2", "unet")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CONVOLUTIONAL = ("unet", "vae")  # parts that gain from channels_last

MILLION = 10**6
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# of a weight of a Linear layer. The scales of int8 and fp8, one per row, are under 0.1 %; nf4 has one in
# float32 for 64 weights
QUANTISED_BYTES: dict[Quantisation, float] = {
    "int8": 1.0,
    "fp8": 1.0,
    "fp8_dynamic": 1.0,
    "fp8_cast": 1.0,
    "nf4": 0.5 + 4 / 64,
}
# bytes for each value of a GGUF file's largest layer while it is brought into 16 bits, where the file is not
# here: of most types
GGUF_WORKSPACE = 7.5
STREAMED_AT_ONCE = 2  # blocks or layers on the device beside the resident ones: one computes, one is copied


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One component of a pipeline."""

    name: str  # as in the pipeline, such as "text_encoder_2"
    dtype: Dtype  # it computes in
    placement: Placement = "device"
    quantisation: Quantisation | None = None
    resident_blocks: int = 0  # of a streamed part: so many of its first blocks stay on the device
    weight_bytes: int = 0  # all of it, in its final form; 0: not known
    device_bytes: int = 0  # the most of it that is on the device at a time
    gguf: GgufNeeds | None = None  # of the file that its weights come from
    workspace_bytes: int = 0  # while a layer computes, beside all that

    @property
    def form(self) -> str | None:
        """The form of its weights in words, such as "int8" or "gguf Q4_K"; None: as they are."""
        return self.quantisation if self.gguf is None else f"gguf {self.gguf.form}".rstrip()

    @property
    def held_bytes(self) -> int:
        """What is on the device all the time."""
        return self.device_bytes if self.placement in ("device", "streamed", "sequential") else 0

    @property
    def host_bytes(self) -> int:
        """What is in memory of the host all the time."""
        return 0 if self.placement == "device" else self.weight_bytes


def planned_part(
    name: str,
    needs: PartNeeds,
    dtype: Dtype,
    placement: Placement = "device",
    quantisation: Quantisation | None = None,
    resident_blocks: int = 0,
    gguf: GgufNeeds | None = None,
) -> PartPlan:
    """The plan of a part with its bytes. gguf: of the file that its weights come from, with known bytes."""
    workspace = 0
    if gguf is None or gguf.weight_bytes is None:
        per_million = bytes_per_weight(needs, dtype, quantisation) * MILLION
        weight_bytes = int(needs.parameters * per_million)
    else:
        weight_bytes = gguf.weight_bytes
        per_million = weight_bytes / needs.parameters
        usual = int(needs.largest_layer * MILLION * GGUF_WORKSPACE)
        workspace = usual if gguf.workspace_bytes is None else gguf.workspace_bytes
    if placement == "cpu":
        device_bytes = 0
    elif placement in ("streamed", "sequential"):
        blocks = resident_blocks if placement == "streamed" else None
        device_bytes = _moving_bytes(needs, dtype, quantisation, blocks)
    else:
        device_bytes = weight_bytes
    return PartPlan(
        name,
        dtype,
        placement,
        quantisation,
        resident_blocks,
        weight_bytes,
        min(device_bytes, weight_bytes),
        gguf,
        workspace,
    )


def bytes_per_weight(needs: PartNeeds, dtype: Dtype, quantisation: Quantisation | None) -> float:
    """Of a part, on average over its weights."""
    plain = float(DTYPE_BYTES[dtype])
    if quantisation is not None:
        linear = needs.linear if quantisation != "fp8_cast" else 1.0  # layerwise casting takes all layers
        return linear * min(QUANTISED_BYTES[quantisation], plain) + (1 - linear) * plain
    kept = needs.float32 if dtype == "float16" else 0.0
    return plain + kept * (DTYPE_BYTES["float32"] - plain)


def block_sizes(needs: PartNeeds) -> list[float]:
    """Parameters of each block in millions, in the order in which they compute."""
    return [kind.parameters for kind in needs.blocks for _ in range(kind.count)]


def _moving_bytes(
    needs: PartNeeds, dtype: Dtype, quantisation: Quantisation | None, resident_blocks: int | None
) -> int:
    """On the device at a time of a part whose blocks are copied, but for the resident ones; None: its layers.

    What is in no block is above all embeddings. They stay on the device, and are not quantised.
    """
    blocks = block_sizes(needs)
    outside = needs.parameters - sum(blocks)
    kept = max(0.0, min(outside, (1 - needs.linear) * needs.parameters))
    if resident_blocks is None:
        others = STREAMED_AT_ONCE * needs.largest_layer
    else:
        moving = max(blocks[resident_blocks:], default=0.0)
        others = outside - kept + sum(blocks[:resident_blocks]) + STREAMED_AT_ONCE * moving
    kept_bytes, all_others = kept * DTYPE_BYTES[dtype], needs.parameters - kept
    all_bytes = needs.parameters * bytes_per_weight(needs, dtype, quantisation)
    other_bytes = others * (all_bytes - kept_bytes) / all_others if all_others > 0 else 0.0
    return int((kept_bytes + other_bytes) * MILLION)
