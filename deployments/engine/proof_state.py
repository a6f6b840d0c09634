"""What is known of batch sizes, as other parts see it (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProofState:
    """What is known of the calls of one module that have one shape and number of rows."""

    module: str  # such as "UNet2DConditionModel.forward"
    shape: str  # of one row of the first batched tensor, with its type
    call_rows: int
    proven: tuple[int, ...]  # batch sizes
    refused: tuple[int, ...]
    pending: tuple[int, ...]
