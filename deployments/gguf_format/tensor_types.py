"""Types of tensors in GGUF files: blocks of values, and which of them are computed with.

Numbers, blocks and bytes are those of ggml (github.com/ggml-org/ggml, ggml.h), as the library gguf lists
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorType:
    """One type. Values of a row are stored in blocks."""

    name: str  # as ggml has it, such as "Q4_K"
    block: int  # values of one
    block_bytes: int
    # bytes that are needed for each value while a weight is brought into 16 bits, with the result: as
    # tests/inference/models/test_gguf_workspace.py measures them
    workspace: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether each value is stored as a number of its own."""
        return self.block == 1


# whose values are read as they are
PLAIN: Mapping[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    28: TensorType("F64", 1, 8),
    30: TensorType("BF16", 1, 2),
}
# which diffusers brings into floats as a layer runs
QUANTISED: Mapping[int, TensorType] = {
    2: TensorType("Q4_0", 32, 18, 5.0),
    3: TensorType("Q4_1", 32, 20, 5.0),
    6: TensorType("Q5_0", 32, 22, 10.0),
    7: TensorType("Q5_1", 32, 24, 10.0),
    8: TensorType("Q8_0", 32, 34, 4.0),
    10: TensorType("Q2_K", 256, 84, 5.25),
    11: TensorType("Q3_K", 256, 110, 7.32),
    12: TensorType("Q4_K", 256, 144, 5.19),
    13: TensorType("Q5_K", 256, 176, 7.19),
    14: TensorType("Q6_K", 256, 210, 7.13),
    20: TensorType("IQ4_NL", 32, 18, 12.0),
    23: TensorType("IQ4_XS", 256, 136, 12.22),
}
COMPUTED: Mapping[int, TensorType] = {**PLAIN, **QUANTISED}
# others that files have, for messages
OTHERS: Mapping[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
